"""The subjects: this plugin, and the reference plugin's versions and backends; how each is called, and how a node looks
that has run it for long.

A measured call is a process as a runtime starts it: from its start until its output has ended and it is reaped.
"""
import contextlib
import hashlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import lab
from cni_portmap import attachment as ours
from cni_portmap import exposure, ruleset

NETWORK, IFNAME, NETNS = "bench", "eth0", "/run/netns/measured"
SUBNET = "10.88.0.0/16"
ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CNI_PATH": "/opt/cni/bin", "CNI_IFNAME": IFNAME,
           "CNI_NETNS": NETNS}
FLOWS = 20  # of each node. Conntrack is one table for the machine: all of them make what a node has anyway
INPUTS = pathlib.Path("/run/bench")  # a tmpfs, see lab.enter


class Subject(NamedTuple):
    """A plugin: its name in the tables, its executable, and the folder that is its /.

    `backend`: the reference plugin's; `keys`: more of its configuration, keys and values; `old`: it knows iptables
    alone, has no STATUS, and a CHECK that fails where a container has no IPv6 address (plugins#819).
    """

    name: str
    executable: pathlib.Path
    backend: str = ""
    old: bool = False
    root: str = "/"
    keys: tuple[tuple[str, str], ...] = ()

    @property
    def verbs(self) -> tuple[str, ...]:
        return ("ADD", "DEL") if self.old else ("ADD", "CHECK", "DEL")


class Published(NamedTuple):
    """A container that publishes `ports` (host port, container port) of one protocol, on `host_ips` ("": on all)."""

    container_id: str
    ip: str
    ports: tuple[tuple[int, int], ...]
    protocol: str = "tcp"
    ip6: str = ""
    host_ips: tuple[str, ...] = ("",)


def identity(count: int, protocol: str = "tcp") -> Published:
    return Published("measured", "10.88.255.2", tuple((30000 + i, 30000 + i) for i in range(count)), protocol)


def shifted(count: int, protocol: str = "tcp") -> Published:
    """Ports that change their number; one container's ports are 80 and up, as images have them."""
    return Published("measured", "10.88.255.2", tuple((30000 + i, 80 + i) for i in range(count)), protocol)


def crowd(count: int) -> list[Published]:
    """The containers of a busy node, a port each. The last is the one that packets are sent to."""
    return [Published(f"c{i:05d}", f"10.88.{1 + i // 250}.{i % 250 + 2}" if i < count - 1 else "10.88.0.2",
                      ((10000 + i, 80),)) for i in range(count)]


def configuration(subject: Subject, container: Published, version: str = "1.0.0") -> bytes:
    """The input from libcni for the plugin that comes after `bridge`."""
    ips = [{"address": f"{container.ip}/16", "gateway": "10.88.0.1", "interface": 2}]
    if container.ip6:
        ips.append({"address": f"{container.ip6}/64", "gateway": "fd88::1", "interface": 2})
    mac = "0a:00:00:00:00:01"
    config: dict[str, Any] = {
        **dict(subject.keys), "cniVersion": version, "name": NETWORK, "type": "portmap",
        "capabilities": {"portMappings": True},
        "prevResult": {"cniVersion": version, "ips": ips, "routes": [{"dst": "0.0.0.0/0"}], "dns": {},
                       "interfaces": [{"name": "cni0", "mac": mac}, {"name": "veth1f2e3d4c", "mac": mac},
                                      {"name": IFNAME, "mac": mac, "sandbox": NETNS}]}}
    if subject.backend and not subject.old:
        config["backend"] = subject.backend
    if container.ports:
        config["runtimeConfig"] = {"portMappings": [
            {"hostPort": host, "containerPort": inner, "protocol": container.protocol, "hostIP": ip}
            for host, inner in container.ports for ip in container.host_ips]}
    return json.dumps(config).encode()


# --- one call -------------------------------------------------------------------------------------------------

class TimedCall:
    """A prepared call of a program. `run` measures it in the network namespace that the caller is in."""

    def __init__(self, argv: list[str], environ: dict[str, str] | None = None, stdin: bytes = b"",
                 root: str = "/") -> None:
        self._argv, self._environ, self._root = argv, environ or ENVIRON, root
        INPUTS.mkdir(exist_ok=True)
        self._input = INPUTS / hashlib.sha256(stdin).hexdigest()[:32]
        self._input.write_bytes(stdin)

    @classmethod
    def of(cls, subject: Subject, verb: str, container: Published, version: str = "1.0.0") -> "TimedCall":
        environ = {**ENVIRON, "CNI_COMMAND": verb, "CNI_CONTAINERID": container.container_id}
        return cls([str(subject.executable)], environ, configuration(subject, container, version), subject.root)

    def start(self, output: int) -> int:
        """Start it; the process ID."""
        actions = [(os.POSIX_SPAWN_OPEN, 0, str(self._input), os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, output, 1),
                   (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)]
        with _root(self._root):
            return os.posix_spawn(self._argv[0], self._argv, self._environ, file_actions=actions)

    def run(self) -> tuple[float, float]:
        """Milliseconds of its life, and of the processors' time that it and its children took."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        start = time.perf_counter()
        pid = self.start(writer)
        os.close(writer)
        answer = b""
        while chunk := os.read(reader, 1 << 16):
            answer += chunk
        _, status, usage = os.wait4(pid, 0)
        end = time.perf_counter()
        os.close(reader)
        if status:
            raise AssertionError(f"{' '.join(self._argv)} {self._environ.get('CNI_COMMAND', '')}: {answer.decode()}")
        return (end - start) * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3

    def wrapped(self, *words: str, **environ: str) -> "TimedCall":
        """The same call, started by another program."""
        other = TimedCall([*words, *self._argv], {**self._environ, **environ}, b"", self._root)
        other._input = self._input
        return other


@contextlib.contextmanager
def _root(folder: str) -> Iterator[None]:
    """`folder` is / for what starts here."""
    if folder == "/":
        yield
        return
    outside = os.open("/", os.O_RDONLY | os.O_CLOEXEC)
    os.chroot(folder)
    try:
        yield
    finally:
        os.fchdir(outside)
        os.chroot(".")
        os.close(outside)


# --- a busy node ----------------------------------------------------------------------------------------------

def populate(subject: Subject, containers: list[Published]) -> None:
    """Publish all of `containers`, a port each: in bulk, as the plugin itself writes it, but the last by the plugin."""
    def call(verb: str, container: Published) -> None:
        TimedCall.of(subject, verb, container).run()

    call("ADD", identity(1))  # makes what is shared
    call("DEL", identity(1))
    *most, last = containers or [identity(1)]
    if most:
        command, text = _BULK["policy" if subject.keys else subject.backend](most)
        lab.run("chroot", subject.root, *command, input=text, timeout=300)
    if containers:
        call("ADD", last)


def _our_bulk(containers: Iterable[Published]) -> tuple[list[str], str]:
    return ["nft", "-f", "-"], "".join(map(ruleset.attach, map(_attachment, containers)))


def _our_bulk_with_policy(containers: Iterable[Published]) -> tuple[list[str], str]:
    text = ""
    for each in containers:
        found, guard = _attachment(each), ours.Exposure(4, "nat", (each.ip,), home=("cni0",))
        guard.note = exposure.note_of(guard)
        found.exposure = (guard,)
        members = exposure.created_for(found, ruleset.chain_of(found.container_id, found.ifname))
        text += ruleset.attach(found) + exposure.commands((), members)[1]
    return ["nft", "-f", "-"], text


def _attachment(container: Published) -> ours.Attachment:
    return ours.Attachment(
        container.container_id, IFNAME, NETWORK, netns=NETNS, inode=os.stat(NETNS).st_ino,
        addresses={4: ours.Address(4, container.ip, SUBNET)}, mark_bit=ours.DEFAULT_MARK_BIT,
        ports=tuple(ours.Port(4, container.protocol, "", *ports) for ports in container.ports))


def _reference_nftables_bulk(containers: Iterable[Published]) -> tuple[list[str], str]:
    lines = []
    for name, ip, ((host, inner), *_), protocol, *_ in containers:
        rule, comment = "add rule ip cni_hostport", f'comment "{name}"'
        lines += [f"{rule} hostports {protocol} dport {host} dnat to {ip}:{inner} {comment}",
                  f"{rule} masquerading ip saddr {ip} ip daddr {ip} masquerade {comment}",
                  f"{rule} masquerading ip saddr 127.0.0.1 ip daddr {ip} masquerade {comment}"]
    return ["nft", "-f", "-"], "\n".join(lines) + "\n"


def _reference_iptables_bulk(containers: Iterable[Published]) -> tuple[list[str], str]:
    chains, rules = [], []
    for name, ip, ((host, inner), *_), protocol, *_ in containers:
        chain = f"CNI-DN-{hashlib.sha512((NETWORK + name).encode()).hexdigest()[:21]}"
        match = f"-p {protocol} -m {protocol} --dport {host}"
        chains.append(f":{chain} - [0:0]")
        rules += [f"-A {chain} -s {SUBNET} {match} -j CNI-HOSTPORT-SETMARK",
                  f"-A {chain} -s 127.0.0.1/32 {match} -j CNI-HOSTPORT-SETMARK",
                  f"-A {chain} {match} -j DNAT --to-destination {ip}:{inner}",
                  f"-A CNI-HOSTPORT-DNAT -p {protocol} -m comment --comment "
                  f'"dnat name: \\"{NETWORK}\\" id: \\"{name}\\"" -m multiport --dports {host} -j {chain}']
    return ["iptables-restore", "--noflush"], "\n".join(["*nat", *chains, *rules, "COMMIT"]) + "\n"


_BULK = {"": _our_bulk, "policy": _our_bulk_with_policy,
         "nftables": _reference_nftables_bulk, "iptables": _reference_iptables_bulk}


class Node:
    """A node: its own network namespace, a bridge, one container on it, and a client on a link."""

    def __init__(self, name: str) -> None:
        self.namespace = lab.Namespace(name)
        with self.namespace:
            self.client = lab.wire(f"{name}-client", ("192.0.2.1/24",), ("192.0.2.2/24",), "to-client")
            lab.add_bridge("cni0")
            lab.bring_up("cni0", "10.88.0.1/16", "fd88::1/64")
            self.container = lab.Namespace(f"{name}-web")
            lab.add_veth("to-web", "eth0", self.container.path)
            lab.enslave("to-web", "cni0")
            lab.bring_up("to-web")
            with self.container:
                lab.bring_up("eth0", "10.88.0.2/16")
                lab.add_route("default", "10.88.0.1")
            lab.sysctl("net.ipv4.ip_forward", 1)
            lab.sysctl("net.ipv6.conf.all.forwarding", 1)
            lab.keep_conntrack()  # on a node there is always some other rule for it
            lab.sysctl("net.netfilter.nf_conntrack_udp_timeout", 3600)
            connect(FLOWS)


def connect(count: int) -> None:
    """Connections for conntrack to remember, in this namespace: a datagram to each of many localhost addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
        sink.bind(("0.0.0.0", 9))
        for i in range(count):
            source.sendto(b"", (f"127.{1 + i // 62500}.{i // 250 % 250}.{i % 250 + 1}", 9))


class Nodes:
    """A node for each subject and number of containers, made when it is first asked for."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[str, int], Node] = {}
        lab.Namespace("measured")

    def of(self, subject: Subject | None, containers: int) -> Node:
        """`None`: a node that publishes nothing, by nobody."""
        key = subject.name if subject else "", containers
        if key not in self._nodes:
            node = self._nodes[key] = Node(f"node{len(self._nodes)}")
            if subject:
                with node.namespace:
                    populate(subject, crowd(containers))
        return self._nodes[key]
