"""A lab of network namespaces: hosts, containers, servers that say whom they saw, and a runtime.

Everything happens in the private network and mount namespace that `enter` makes; it plays the host. The others are
named namespaces in it, wired by hand (the LAN) or by real CNI plugins (containers). Sockets are opened in the
namespace they belong to and used from this process, so a server is ready before the first probe, without sleeps.
"""
import contextlib
import ctypes
import ipaddress
import json
import os
import pathlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def run(*command: object, input: str | None = None, check: bool = True, timeout: float = 60) -> str:
    """Run a command; its output. A failure names the command and what it printed."""
    done = subprocess.run([str(word) for word in command], input=input, text=True, capture_output=True,
                          timeout=timeout, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def enter() -> None:
    """Move this process to a private network and mount namespace, and make it a host: forwarding, conntrack on."""
    _call(_libc.unshare(CLONE_NEWNET | CLONE_NEWNS))
    _call(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _call(_libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None))
    if not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        _call(_libc.mount(b"proc", b"/proc", b"proc", 0, None))
    _settle()
    sysctl("net.ipv4.ip_forward", 1)
    sysctl("net.ipv6.conf.all.forwarding", 1)
    # In a new namespace conntrack sleeps until something uses it, and sleeps again with the last NAT rule.
    run("nft", "-f", "-", input="table inet lab { chain keep_conntrack { type filter hook forward priority 0; "
                                "ct state new counter; }; }")


def _settle() -> None:
    """Loopback up; addresses usable at once."""
    run("ip", "link", "set", "lo", "up")
    for which in "all", "default":
        sysctl(f"net.ipv6.conf.{which}.accept_dad", 0)
        sysctl(f"net.ipv6.conf.{which}.accept_ra", 0)


def sysctl(name: str, value: object) -> None:
    pathlib.Path("/proc/sys", name.replace(".", "/")).write_text(str(value))


class Namespace:
    """A network namespace with a name under /run/netns, as runtimes make them."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, f"/run/netns/{name}"
        run("ip", "netns", "add", name)
        with self:
            _settle()

    def __enter__(self) -> "Namespace":
        """This thread's sockets, sysctls and children are the namespace's, until the end of the block."""
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        inside = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        _call(_libc.setns(inside, CLONE_NEWNET))
        os.close(inside)
        return self

    def __exit__(self, *_: object) -> None:
        _call(_libc.setns(self._outside, CLONE_NEWNET))
        os.close(self._outside)

    def ip(self, *words: object) -> str:
        return run("ip", "-n", self.name, *words)

    def remove(self) -> None:
        run("ip", "netns", "del", self.name, check=False)


HOST: contextlib.AbstractContextManager[object] = contextlib.nullcontext()  # the namespace that `enter` made


class Saw(NamedTuple):
    """What a server saw of an exchange: its own name, the peer's address, and the port that was reached."""

    server: str
    peer: str
    port: int


KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(ip).version == 6 else socket.AF_INET


class Server:
    """Answers on one port of one namespace, IPv4 and IPv6, with whom it saw; counts what arrives."""

    def __init__(self, name: str, where: contextlib.AbstractContextManager[object], port: int, protocol: str = "tcp",
                 ip: str = "") -> None:
        self.name, self.port, self.protocol = name, port, protocol
        self.arrivals: list[Saw] = []
        with where:
            family = family_of(ip) if ip else socket.AF_INET6
            self._socket = socket.socket(family, KINDS[protocol])
            if not ip:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((ip, port))
            if protocol == "tcp":
                self._socket.listen(128)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                if self.protocol == "tcp":
                    connection, address = self._socket.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.sendall(self._answer(address))
                else:
                    _, address = self._socket.recvfrom(2048)
                    self._socket.sendto(self._answer(address), address)

    def _answer(self, address: Any) -> bytes:
        peer = ipaddress.ip_address(address[0].partition("%")[0])
        mapped = getattr(peer, "ipv4_mapped", None)
        saw = Saw(self.name, str(mapped or peer), self.port)
        self.arrivals.append(saw)
        return json.dumps(saw).encode()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def exchange(where: contextlib.AbstractContextManager[object], ip: str, port: int, protocol: str = "tcp",
             source: str = "", timeout: float = 1.0) -> Saw | None:
    """Talk to `ip` and `port` from a namespace: what the server that answered saw, None if nobody did."""
    with where:
        client = socket.socket(family_of(ip), KINDS[protocol])
    with client:
        client.settimeout(timeout)
        try:
            if source:
                client.bind((source, 0))
            client.connect((ip, port))
            if protocol == "udp":
                client.send(b"who am I?")
            data = client.recv(2048)
        except OSError:
            return None
    return Saw(*json.loads(data)) if data else None


# --- wiring ---------------------------------------------------------------------------------------------------

def wire(name: str, host_ips: tuple[str, ...], their_ips: tuple[str, ...], device: str = "") -> Namespace:
    """A machine on a link of its own with the host; its default route leads through the host."""
    other, device = Namespace(name), device or f"to-{name}"
    run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", name)
    for ip in host_ips:
        run("ip", "address", "add", ip, "dev", device, *(["nodad"] if ":" in ip else []))
    run("ip", "link", "set", device, "up")
    for ip in their_ips:
        other.ip("address", "add", ip, "dev", "eth0", *(["nodad"] if ":" in ip else []))
    other.ip("link", "set", "eth0", "up")
    for ip in host_ips:
        gateway = ip.partition("/")[0]
        other.ip(*(["-6"] if ":" in ip else []), "route", "add", "default", "via", gateway)
    return other


# --- a runtime, as libcni is one ------------------------------------------------------------------------------

class CniFailed(Exception):
    """A plugin's error document."""

    def __init__(self, plugin: str, code: int, msg: str, details: str) -> None:
        super().__init__(f"{plugin}: {code}: {msg}; {details}")
        self.plugin, self.code, self.msg, self.details = plugin, code, msg, details


def call_plugin(executable: str | pathlib.Path, verb: str, config: object, container_id: str = "", netns: str = "",
                ifname: str = "eth0", timeout: float = 60) -> Any:
    """One call of one plugin: its result, {} for none. Raises CniFailed, and AssertionError for anything else."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND": verb, "CNI_CONTAINERID": container_id,
               "CNI_NETNS": netns, "CNI_IFNAME": ifname, "CNI_PATH": str(pathlib.Path(executable).parent)}
    stdin = config if isinstance(config, str) else json.dumps(config)
    done = subprocess.run([str(executable)], input=stdin, text=True, capture_output=True, timeout=timeout,
                          env=environ, check=False)
    name = pathlib.Path(executable).name
    try:
        answer = json.loads(done.stdout) if done.stdout else {}
    except ValueError:
        raise AssertionError(f"{name} {verb}: not one document: {done.stdout!r} {done.stderr!r}") from None
    if done.returncode:
        if "code" not in answer:
            raise AssertionError(f"{name} {verb}: status {done.returncode}: {done.stdout!r} {done.stderr!r}")
        raise CniFailed(name, answer["code"], answer["msg"], answer.get("details", ""))
    return answer


class Network:
    """A conflist and the folder of its plugins, driven as libcni does: ADD in order, DEL in reverse."""

    def __init__(self, conflist: dict[str, Any], bin_dir: str | pathlib.Path) -> None:
        self.conflist, self.bin_dir = conflist, pathlib.Path(bin_dir)
        self.results: dict[tuple[str, str], Any] = {}

    def _config(self, plugin: dict[str, Any], ports: object, previous: object) -> dict[str, Any]:
        config = {**plugin, "name": self.conflist["name"], "cniVersion": self.conflist["cniVersion"]}
        if ports and plugin.get("capabilities", {}).get("portMappings"):
            config["runtimeConfig"] = {"portMappings": ports}
        if previous:
            config["prevResult"] = previous
        return config

    def _call(self, plugin: dict[str, Any], verb: str, container_id: str, netns: str, ports: object, previous: object,
              ifname: str) -> Any:
        return call_plugin(self.bin_dir / plugin["type"], verb, self._config(plugin, ports, previous), container_id,
                           netns, ifname)

    def add(self, container_id: str, netns: str, ports: object = (), ifname: str = "eth0") -> Any:
        result = None
        for plugin in self.conflist["plugins"]:
            result = self._call(plugin, "ADD", container_id, netns, ports, result, ifname)
        self.results[container_id, ifname] = result
        return result

    def check(self, container_id: str, netns: str, ports: object = (), ifname: str = "eth0") -> None:
        for plugin in self.conflist["plugins"]:
            self._call(plugin, "CHECK", container_id, netns, ports, self.results[container_id, ifname], ifname)

    def delete(self, container_id: str, netns: str = "", ports: object = (), ifname: str = "eth0") -> None:
        result = self.results.pop((container_id, ifname), None)
        for plugin in reversed(self.conflist["plugins"]):
            self._call(plugin, "DEL", container_id, netns, ports, result, ifname)


def bridge_conflist(name: str = "labnet", bridge: str = "cni0", subnets: tuple[str, ...] = ("10.88.0.0/16", "fd88::/64"),
                    version: str = "1.0.0", **portmap: Any) -> dict[str, Any]:
    """The conflist that most nodes have: a bridge with an address, then our plugin."""
    return {"cniVersion": version, "name": name, "plugins": [
        {"type": "bridge", "bridge": bridge, "isGateway": True, "hairpinMode": True,
         "ipam": {"type": "host-local", "dataDir": f"/run/lab-ipam/{name}", "ranges": [[{"subnet": s}] for s in subnets],
                  "routes": [{"dst": "::/0" if ":" in s else "0.0.0.0/0"} for s in subnets]}},
        {"type": "portmap", "capabilities": {"portMappings": True}, **portmap}]}


class Container:
    """A container's namespace in a network, with its published ports."""

    def __init__(self, network: Network, name: str, ports: object = (), ifname: str = "eth0") -> None:
        self.network, self.ports, self.ifname = network, ports, ifname
        self.id = f"{name}-0123456789abcdef"
        self.namespace = Namespace(name)
        self.result = network.add(self.id, self.namespace.path, ports, ifname)
        ips = [entry["address"].partition("/")[0] for entry in self.result["ips"]]
        self.ipv4 = next((ip for ip in ips if ":" not in ip), "")
        self.ipv6 = next((ip for ip in ips if ":" in ip), "")

    def __enter__(self) -> "Container":
        self.namespace.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.namespace.__exit__()

    def check(self) -> None:
        self.network.check(self.id, self.namespace.path, self.ports, self.ifname)

    def remove(self) -> None:
        self.network.delete(self.id, self.namespace.path, self.ports, self.ifname)
        self.namespace.remove()


def install(bin_dir: pathlib.Path) -> pathlib.Path:
    """A folder of plugins: this checkout's portmap, and the distribution's others."""
    bin_dir.mkdir(parents=True, exist_ok=True)
    for plugin in pathlib.Path("/usr/lib/cni").iterdir():
        if plugin.name != "portmap":
            with contextlib.suppress(FileExistsError):
                (bin_dir / plugin.name).symlink_to(plugin)
    run(ROOT / "scripts/install", "--prefix", bin_dir.parent / "lib", "--bin-dir", bin_dir)
    return bin_dir


def table() -> str:
    """Our table as `nft` prints it, without counters; "" where there is none."""
    return run("nft", "-s", "list", "table", "inet", "cni_portmap", check=False)


@contextlib.contextmanager
def restored_table() -> Iterator[None]:
    """The table is at the end of the block what it was at its beginning."""
    before = table()
    yield
    assert table() == before
