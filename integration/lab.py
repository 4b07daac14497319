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
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
_libc = ctypes.CDLL(None, use_errno=True)
os.environ["PATH"] += ":/usr/sbin:/sbin"  # where nft and others are, and a plain su does not look
# The distribution's plugins: Debian's folder, Fedora's
PLUGINS = next((path for path in map(pathlib.Path, ("/usr/lib/cni", "/usr/libexec/cni")) if path.is_dir()),
               pathlib.Path("/usr/lib/cni"))


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
    _become_host()


def obstacle() -> str:
    """Why no lab can be made here, and what to do, in one sentence; "" if it can. Tried in a process that ends."""
    if os.geteuid():
        return "a lab of network namespaces needs root: run it as root"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        reason = forbidden = "this process may not make network namespaces (CAP_SYS_ADMIN, CAP_NET_ADMIN): run it on " \
                             "a machine, or in a privileged container"
        try:
            _call(_libc.unshare(CLONE_NEWNET | CLONE_NEWNS))
            _call(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
            reason = "there is no veth or bridge in this kernel: boot the distribution's own, or load the modules " \
                     "(modprobe veth bridge)"
            run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
            run("ip", "link", "add", "bridge0", "type", "bridge")
            reason = "this kernel has no nf_tables: boot the distribution's own, or load it (modprobe nf_tables)"
            run("nft", "add", "table", "inet", "x")
            reason = ""
        except OSError:
            pass
        except AssertionError as error:
            if "not permitted" in str(error):
                reason = forbidden
        os.write(write, reason.encode())
        os._exit(0)
    os.close(write)
    with open(read) as answer:
        reason = answer.read()
    os.waitpid(pid, 0)
    return reason


@contextlib.contextmanager
def fresh_host() -> Iterator[None]:
    """Another network namespace plays the host, for this thread, until the end of the block."""
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _call(_libc.unshare(CLONE_NEWNET))
    try:
        _become_host()
        yield
    finally:
        _call(_libc.setns(outside, CLONE_NEWNET))
        os.close(outside)


def _become_host() -> None:
    _settle()
    sysctl("net.ipv4.ip_forward", 1)
    sysctl("net.ipv6.conf.all.forwarding", 1)
    br_netfilter(False)
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


def br_netfilter(on: bool) -> bool:
    """Whether this namespace's bridges hand their packets to nftables; False where the kernel cannot (no module)."""
    if pathlib.Path("/proc/sys/net/bridge").exists():
        for family in "ip", "ip6":
            sysctl(f"net.bridge.bridge-nf-call-{family}tables", int(on))
        return True
    return not on


class Namespace:
    """A network namespace with a name under /run/netns, as runtimes make them."""

    def __init__(self, name: str) -> None:
        self.name, self.path = name, f"/run/netns/{name}"
        self.host_device = ""  # the host's end of its wire, see `wire`
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
        if self.host_device:  # the kernel takes its time to end a namespace with what is in it
            run("ip", "link", "del", self.host_device, check=False)
        run("ip", "netns", "del", self.name, check=False)


HOST: contextlib.AbstractContextManager[object] = contextlib.nullcontext()  # the namespace that plays the host


class Saw(NamedTuple):
    """What a server saw of an exchange: its own name, the peer's address, and the port that was reached."""

    server: str
    peer: str
    port: int


KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}


def family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ipaddress.ip_address(ip).version == 6 else socket.AF_INET


class Server:
    """Answers on one port of one namespace, IPv4 and IPv6, with whom it saw; counts what arrives.

    A TCP connection is closed with its answer, or, with `keep`, goes on: each further message has an answer.
    """

    def __init__(self, name: str, where: contextlib.AbstractContextManager[object], port: int, protocol: str = "tcp",
                 ip: str = "", keep: bool = False) -> None:
        self.name, self.port, self.protocol, self._keep = name, port, protocol, keep
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
                    if self._keep:
                        threading.Thread(target=self._converse, args=(connection, address), daemon=True).start()
                        continue
                    with connection, contextlib.suppress(OSError):
                        connection.sendall(self._answer(address))
                else:
                    _, address = self._socket.recvfrom(2048)
                    if address is None:  # shut down
                        return
                    with contextlib.suppress(OSError):  # nobody there, as with spoofed sources
                        self._socket.sendto(self._answer(address), address)

    def _converse(self, connection: socket.socket, address: Any) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(self._answer(address))
            while connection.recv(2048):
                connection.sendall(self._answer(address))

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

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One socket, so one flow: connected from a namespace (and from the address `source`) to `ip` and `port`."""

    def __init__(self, where: contextlib.AbstractContextManager[object], ip: str, port: int, protocol: str = "tcp",
                 source: str = "", timeout: float = 1.0) -> None:
        with where:
            self._socket = socket.socket(family_of(ip), KINDS[protocol])
        self._timeout, self._protocol = timeout, protocol
        self._listens = protocol == "tcp"  # a TCP server speaks first
        self._socket.settimeout(timeout)
        try:
            if source:
                self._socket.bind((source, 0))
            self._socket.connect((ip, port))
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]

    def ask(self) -> Saw | None:
        """What the server sees of this flow now; None without an answer in time. Raises OSError if refused.

        As TCP does, a datagram that has no answer within a second is sent again.
        """
        if self._protocol == "udp":
            self._socket.settimeout(0)
            with contextlib.suppress(OSError):  # answers, and refusals, to what was sent before
                while self._socket.recv(2048):
                    pass
        left = self._timeout
        while left > 0:
            if not self._listens:
                self._socket.send(b"who am I?")
            self._listens = False
            self._socket.settimeout(min(left, 1.0) if self._protocol == "udp" else left)
            try:
                data = self._socket.recv(2048)
                return Saw(*json.loads(data)) if data else None
            except TimeoutError:
                left -= self._socket.gettimeout() or left
        return None

    def ask_until(self, server: str, timeout: float = 2.0) -> Saw | None:
        """Ask again, as real clients do, until `server` answers; the last answer after `timeout` seconds."""
        end, saw = time.monotonic() + timeout, None
        while time.monotonic() < end and (saw is None or saw.server != server):
            with contextlib.suppress(ConnectionRefusedError):
                saw = self.ask()
        return saw

    @contextlib.contextmanager
    def chatter(self) -> Iterator[None]:
        """Send without end, every two milliseconds, while the block runs."""
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(0.002):
                with contextlib.suppress(OSError):
                    self._socket.send(b"and another thing")
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def exchange(where: contextlib.AbstractContextManager[object], ip: str, port: int, protocol: str = "tcp",
             source: str = "", timeout: float = 2.5) -> Saw | None:
    """Talk to `ip` and `port` from a namespace: what the server that answered saw, None if nobody did."""
    try:
        with Client(where, ip, port, protocol, source, timeout) as client:
            return client.ask()
    except OSError:
        return None


# --- packets made by hand -------------------------------------------------------------------------------------

def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff


def _crc32c(data: bytes) -> bytes:
    """SCTP's checksum (RFC 9260, appendix A)."""
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return struct.pack("<I", crc ^ 0xffffffff)


def packet(source: str, destination: str, port: int, protocol: str = "udp", source_port: int = 40000) -> bytes:
    """An IP packet with any source: a datagram, a TCP SYN, or an SCTP INIT."""
    packed = [ipaddress.ip_address(ip).packed for ip in (source, destination)]
    ports = struct.pack("!HH", source_port, port)
    if protocol == "sctp":
        init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65536, 1, 1, 1)  # INIT, with one stream each way
        body = ports + bytes(4) + _crc32c(ports + bytes(8) + init) + init
    else:
        body, at = (ports + struct.pack("!HH", 12, 0) + b"data", 6) if protocol == "udp" else \
            (ports + struct.pack("!IIBBHHH", 1, 0, 5 << 4, 2, 65535, 0, 0), 16)  # SYN
        pseudo = b"".join(packed) + struct.pack("!II", len(body), NUMBERS[protocol])
        body = body[:at] + struct.pack("!H", _checksum(pseudo + body)) + body[at + 2:]
    if ":" in source:
        return struct.pack("!IHBB", 6 << 28, len(body), NUMBERS[protocol], 64) + b"".join(packed) + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, NUMBERS[protocol], 0) + b"".join(packed)
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + body


def inject(where: contextlib.AbstractContextManager[object], host_device: str, data: bytes) -> None:
    """Put a packet on the wire from a namespace's eth0 to the host's `host_device`, past all rules of its sender."""
    mac = bytes.fromhex(json.loads(run("ip", "-j", "link", "show", host_device))[0]["address"].replace(":", ""))
    with where:
        wire_end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with wire_end:
        kind = b"\x86\xdd" if data[0] >> 4 == 6 else b"\x08\x00"
        wire_end.bind(("eth0", 0))
        wire_end.send(mac + b"\x02\0\0\0\0\x02" + kind + data)


# --- conntrack ------------------------------------------------------------------------------------------------

class Flow(NamedTuple):
    """A flow that the host tracks; `target` answers it."""

    source: str
    source_port: int
    destination: str
    port: int
    target: str


_FLOW = re.compile(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+) .*?src=(\S+)")


def flows(protocol: str, port: int, family: int = 4) -> set[Flow]:
    """The flows to a port that the host tracks."""
    lines = run("conntrack", "-L", "-f", f"ipv{family}", "-p", protocol, "--dport", port)
    return {Flow(source, int(source_port), destination, int(its_port), target)
            for source, destination, source_port, its_port, target in _FLOW.findall(lines)}


def track(count: int, ip: str, port: int, target: str = "", ports: int = 1) -> None:
    """Let the host track `count` more UDP flows from 10.128.0.0/9 to `ip`, spread over `ports` ports from `port` on.

    `target`: the container that answers them, on the same port; without one, nobody has translated them.
    """
    lines = []
    for i in range(count):
        source, its_port = f"10.{128 + (i >> 16)}.{i >> 8 & 255}.{i & 255}", port + i % ports
        lines.append(f"-A -p udp -s {source} -d {ip} --sport 1000 --dport {its_port} --reply-src {target or ip} "
                     f"--reply-dst {source} --reply-port-src {its_port} --reply-port-dst 1000 --timeout 600\n")
    run("conntrack", "-R", "-", input="".join(lines))


def tracked() -> int:
    """How many flows the host tracks."""
    return int(run("conntrack", "-C"))


# --- wiring ---------------------------------------------------------------------------------------------------

def wire(name: str, host_ips: tuple[str, ...], their_ips: tuple[str, ...], device: str = "") -> Namespace:
    """A machine on a link of its own with the host; its default route leads through the host."""
    other, device = Namespace(name), device or f"to-{name}"
    other.host_device = device
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


def call_process(executable: str | pathlib.Path, verb: str, config: object, container_id: str = "", netns: str = "",
                 ifname: str = "eth0", timeout: float = 60) -> "subprocess.CompletedProcess[str]":
    """One call of one plugin, as it ended: status, stdout, stderr."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND": verb, "CNI_CONTAINERID": container_id,
               "CNI_NETNS": netns, "CNI_IFNAME": ifname, "CNI_PATH": str(pathlib.Path(executable).parent)}
    stdin = config if isinstance(config, str) else json.dumps(config)
    return subprocess.run([str(executable)], input=stdin, text=True, capture_output=True, timeout=timeout,
                          env=environ, check=False)


def call_plugin(executable: str | pathlib.Path, verb: str, config: object, container_id: str = "", netns: str = "",
                ifname: str = "eth0", timeout: float = 60) -> Any:
    """One call of one plugin: its result, {} for none. Raises CniFailed, and AssertionError for anything else."""
    done = call_process(executable, verb, config, container_id, netns, ifname, timeout)
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

    def config(self, ports: object = (), previous: object = None) -> dict[str, Any]:
        """What the last plugin of the chain, ours, gets on standard input."""
        return self._config(self.conflist["plugins"][-1], ports, previous)

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


def bridge_conflist(name: str = "labnet", bridge: str = "cni0",
                    subnets: tuple[str, ...] = ("10.88.0.0/16", "fd88::/64"), version: str = "1.0.0",
                    **portmap: Any) -> dict[str, Any]:
    """The conflist that most nodes have: a bridge with an address, then our plugin."""
    bridge_config = {"type": "bridge", "bridge": bridge, "isGateway": True, "hairpinMode": True,
                     "ipam": _ipam(name, subnets)}
    return _conflist(name, version, bridge_config, portmap)


def ptp_conflist(name: str = "labnet", subnets: tuple[str, ...] = ("10.88.0.0/16", "fd88::/64"),
                 version: str = "1.0.0", **portmap: Any) -> dict[str, Any]:
    """A conflist with a routed veth for each container in place of a bridge, then our plugin."""
    return _conflist(name, version, {"type": "ptp", "ipam": _ipam(name, subnets)}, portmap)


def _conflist(name: str, version: str, first: dict[str, Any], portmap: dict[str, Any]) -> dict[str, Any]:
    return {"cniVersion": version, "name": name, "plugins": [
        first, {"type": "portmap", "capabilities": {"portMappings": True}, **portmap}]}


def _ipam(name: str, subnets: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "host-local", "dataDir": f"/run/lab-ipam/{name}", "ranges": [[{"subnet": s}] for s in subnets],
            "routes": [{"dst": "::/0" if ":" in s else "0.0.0.0/0"} for s in subnets]}


class Container:
    """A container's namespace in a network, with its published ports."""

    def __init__(self, network: Network, name: str, ports: object = (), ifname: str = "eth0") -> None:
        self.network, self.ports, self.ifname = network, ports, ifname
        self.id = f"{name}-0123456789abcdef"
        self.namespace = Namespace(name)
        self.result = network.add(self.id, self.namespace.path, ports, ifname)
        self.namespace.host_device = next((each["name"] for each in self.result.get("interfaces", ())
                                           if not each.get("sandbox") and each["name"].startswith("veth")), "")
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


def plugins(bin_dir: pathlib.Path) -> pathlib.Path:
    """A folder of the distribution's plugins, without portmap."""
    bin_dir.mkdir(parents=True, exist_ok=True)
    for plugin in PLUGINS.iterdir():
        if plugin.name != "portmap":
            with contextlib.suppress(FileExistsError):
                (bin_dir / plugin.name).symlink_to(plugin)
    return bin_dir


def install(bin_dir: pathlib.Path) -> pathlib.Path:
    """A folder of plugins: this checkout's portmap, and the distribution's others."""
    plugins(bin_dir)
    run(ROOT / "scripts/install", "--prefix", bin_dir.parent / "lib", "--bin-dir", bin_dir, "--sbin-dir",
        bin_dir.parent / "sbin")
    return bin_dir


OTHER_ROOT = pathlib.Path("/mnt")  # where `other_root` shows it; in this process's own mount namespace


_NFT: list[object] = ["nft"]


@contextlib.contextmanager
def other_root(root: str) -> Iterator[None]:
    """Show another system's root folder at OTHER_ROOT, for chroot, with this host's /dev, /proc, /run and checkout.

    In the block, `nft` is that system's.
    """
    run("mount", "--make-rshared", "/run")  # so that it sees the namespaces to come
    run("mount", "--bind", root, OTHER_ROOT)
    for folder in "dev", "proc", "run":
        run("mount", "--rbind", f"/{folder}", OTHER_ROOT / folder)
    run("mount", "--bind", ROOT, OTHER_ROOT / "mnt")
    run("mount", "-t", "tmpfs", "none", OTHER_ROOT / "opt")
    _NFT[:] = "chroot", OTHER_ROOT, "nft"
    try:
        yield
    finally:
        _NFT[:] = ["nft"]  # the mounts end with this process's mount namespace


def install_in_other_root(bin_dir: pathlib.Path) -> pathlib.Path:
    """A folder of plugins: this checkout's portmap, run by OTHER_ROOT's Python and libnftables, and our others."""
    run("chroot", OTHER_ROOT, "/mnt/scripts/install", "--prefix", "/opt/lib", "--bin-dir", "/opt/cni/bin",
        "--sbin-dir", "/opt/sbin")
    launcher = plugins(bin_dir) / "portmap"
    launcher.write_text(f"#!/bin/sh\nexec chroot {OTHER_ROOT} /opt/cni/bin/portmap\n")
    launcher.chmod(0o755)
    return bin_dir


def nft(*words: object, input: str | None = None, check: bool = True) -> str:
    """Run nft, of the version that the plugin uses: 1.0.6 crashes where it reads a set that 1.1 has written."""
    return run(*_NFT, *words, input=input, check=check)


def table() -> str:
    """Our table as `nft` prints it, without counters; "" where there is none."""
    return nft("-s", "list", "table", "inet", "cni_portmap", check=False)


@contextlib.contextmanager
def restored_table() -> Iterator[None]:
    """The table is at the end of the block what it was at its beginning."""
    before = table()
    yield
    assert table() == before


if __name__ == "__main__":  # for scripts/test: whether a lab can be made here
    print(obstacle())
    raise SystemExit(bool(obstacle()))
