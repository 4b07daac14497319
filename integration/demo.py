"""The demonstration: scripts/demo. A LAN, a host, a bridge, two containers; real plugins, real packets."""
import pathlib
import shutil
import sys
import tempfile

import lab

PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
         {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"},
         {"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]
BOLD, GREEN, RED, PLAIN = ("\033[1m", "\033[32m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("",) * 4


def title(text: str) -> None:
    print(f"\n{BOLD}{text}{PLAIN}", flush=True)


def main() -> int:
    failures = 0

    def probe(path: str, where: object, ip: str, port: int, protocol: str = "tcp", answers: bool = True) -> None:
        nonlocal failures
        saw = lab.exchange(where, ip, port, protocol, timeout=1.0 if answers else 0.3)  # type: ignore[arg-type]
        fine = (saw is not None) == answers
        failures += not fine
        address = f"[{ip}]:{port}/{protocol}" if ":" in ip else f"{ip}:{port}/{protocol}"
        told = f"{saw.server!r} answers, it saw {saw.peer}" if saw else "nobody answers"
        print(f"  {GREEN + 'ok  ' if fine else RED + 'FAIL'}{PLAIN}  {path:34} {address:26} {told}", flush=True)

    if obstacle := lab.obstacle():
        print(f"demo: {obstacle}", file=sys.stderr)
        return 1
    lab.enter()
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="cni-portmap-demo-"))
    try:
        title("Install into a scratch folder")
        bin_dir = lab.install(scratch / "bin")
        print(f"  {bin_dir}/portmap")

        title("Two containers on a bridge; 'web' publishes 8080/tcp, 127.0.0.1:8081/tcp and 5353/udp")
        network = lab.Network(lab.bridge_conflist(), bin_dir)
        client = lab.wire("client", ("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
        web = lab.Container(network, "web", PORTS)
        neighbour = lab.Container(network, "neighbour")
        servers = [lab.Server("web", web, 80), lab.Server("dns", web, 53, "udp")]
        print(f"  the host is 192.0.2.1 and 2001:db8::1, web is {web.ipv4} and {web.ipv6}")

        title("Who reaches it")
        for ip in "192.0.2.1", "2001:db8::1":
            probe("a client in the LAN", client, ip, 8080)
        probe("a client in the LAN, UDP", client, "192.0.2.1", 5353, "udp")
        for ip in "192.0.2.1", "127.0.0.1", "::1":
            probe("the host itself", lab.HOST, ip, 8080)
        probe("the host, published on localhost", lab.HOST, "127.0.0.1", 8081)
        for ip in "192.0.2.1", "2001:db8::1":
            probe("the container itself", web, ip, 8080)
            probe("its neighbour on the bridge", neighbour, ip, 8080)

        title("And who does not")
        probe("a client, published on localhost", client, "192.0.2.1", 8081, answers=False)
        probe("a client, the other protocol", client, "192.0.2.1", 5353, answers=False)

        title("nft list table inet cni_portmap")
        print("  " + lab.table().replace("\n", "\n  ").replace("\t", "    ").rstrip())

        title("Delete the container")
        web.remove()
        probe("a client in the LAN", client, "192.0.2.1", 8080, answers=False)
        left = [line for line in lab.table().splitlines() if "c/" in line]
        failures += bool(left)
        print(f"  {left or 'nothing is left of it in the table'}")
        for server in servers:
            server.close()
    finally:
        shutil.rmtree(scratch)
    if failures:
        title(f"{RED}{failures} failures{PLAIN}")
        return 1
    title("It works. What next?")
    print("""  scripts/install             install it here: /opt/cni/bin/portmap, and the command cni-portmap
  cni-portmap list            who has which port
  README.md                   how podman, containerd, Kubernetes and cnitool find it
  scripts/test                every test; the machine's own network stays as it is""")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or nobody reads on
        sys.stderr.close()
        sys.exit(130)
