"""The network of this host, or of another namespace, as it is: links, addresses, routes, neighbours, sockets, sysctls.

Reading changes nothing, loaded modules neither: see `can_ask`. For the operator's command; the plugin reads by
`netlink`, and only what it needs. pyroute2 would say the same in fewer lines, and takes 100 to 140 ms to be imported.

Source: include/uapi/linux/rtnetlink.h, if_link.h, neighbour.h, inet_diag.h, sock_diag.h.
"""
import contextlib
import ctypes
import os
import pathlib
import subprocess
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_ntop
from struct import Struct
from typing import NamedTuple

from ..attachment import AF
from ..ruleset import PROTOCOL_NUMBERS
from . import EINVAL
from .kernel import CLONE_NEWNET
from .netlink import (IFA_ADDRESS, IFA_LOCAL, IFLA_ADDRESS, IFLA_EXT_MASK, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO,
                      IFLA_MASTER, NETLINK_ROUTE, RTA_DST, RTA_GATEWAY, RTA_OIF, RTA_VIA, RTEXT_FILTER_SKIP_STATS,
                      RTM_GETADDR, RTM_GETLINK, RTM_GETROUTE, Socket, attribute, attributes, text)

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
RTM_GETNEIGH = 30
IFLA_MTU, IFLA_LINK, IFLA_GROUP = 4, 5, 27
IFLA_INFO_SLAVE_DATA, IFLA_BRPORT_STATE, IFLA_BRPORT_MODE = 5, 1, 4
RTA_SRC, RTA_IIF, RTA_MARK = 2, 3, 16
NDA_DST, NDA_LLADDR = 1, 2
IFA_F_PERMANENT = 0x80
IFF_UP, IFF_LOOPBACK, IFF_RUNNING = 0x1, 0x8, 0x40
BR_STATE_DISABLED, BR_STATE_FORWARDING = 0, 3
NUD_FAILED = 0x20
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST, RTN_MULTICAST = 1, 2, 3, 5
INET_DIAG_SKV6ONLY = 11
TCP_LISTEN, TCP_CLOSE = 10, 7
_IFINFO = Struct("=BxHiII")  # ifinfomsg
_IFADDR = Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ND = Struct("=Bxxxi HBB")  # ndmsg
_DIAG = Struct("=BBBB2s2s16s16sI8sIIIII")  # inet_diag_msg


class Link(NamedTuple):
    """An interface: its index and name; `type` as in ARPHRD_*, `kind` as `ip -d link` names it, `flags` as in IFF_*.

    `master`: the name of the bridge that it is a port of; `peer`: the index of its other end; `state`, `hairpin`: of a
    port of a bridge.
    """

    number: int
    name: str
    type: int = 1
    kind: str = ""
    group: int = 0
    master: str = ""
    flags: int = IFF_UP | IFF_RUNNING
    mtu: int = 0
    mac: str = ""
    peer: int = 0
    state: int = BR_STATE_FORWARDING
    hairpin: bool = False

    @property
    def is_up(self) -> bool:
        """Whether somebody has set it up."""
        return bool(self.flags & IFF_UP)

    @property
    def is_loopback(self) -> bool:
        """Whether it is this host's own."""
        return bool(self.flags & IFF_LOOPBACK)


class Address(NamedTuple):
    """An address of an interface. `broadcast`: of IPv4. `is_dynamic`: it was announced, and will end."""

    link: str
    family: int
    ip: bytes
    length: int
    broadcast: bytes
    is_dynamic: bool = False

    @property
    def is_link_local(self) -> bool:
        """Whether nobody beyond the link can use it (RFC 4291, 2.5.6; RFC 3927)."""
        return self.ip[:2] == b"\xa9\xfe" if self.family == 4 else self.ip[0] == 0xfe and self.ip[1] & 0xc0 == 0x80

    def has(self, ip: bytes) -> bool:
        """Whether an address is in its network."""
        bits = len(self.ip) * 8 - self.length
        return len(ip) == len(self.ip) and int.from_bytes(ip, "big") >> bits == int.from_bytes(self.ip, "big") >> bits


class Route(NamedTuple):
    """The kernel's answer: `type` as in RTN_*, `link` by name; `error`: errno where there is none."""

    type: int
    link: str
    gateway: str = ""
    error: int = 0


class Neighbour(NamedTuple):
    """What this host knows of an address on a link. `state`: NUD_* bits."""

    link: str
    ip: bytes
    mac: str
    state: int


class Listener(NamedTuple):
    """A socket that waits for clients. `only6`: it does not serve IPv4; `waiting` of `backlog` clients were not served.

    `backlog`: -1 where that is not known; `inode`: what /proc/PID/fd names.
    """

    family: int
    protocol: str
    ip: bytes
    port: int
    only6: bool
    waiting: int
    backlog: int
    inode: int


def mac_text(raw: bytes) -> str:
    """A hardware address as `ip` prints it."""
    return ":".join(f"{byte:02x}" for byte in raw)


def can_ask(module: str) -> bool:
    """Whether a question to a kernel module loads nothing: it is there, or this kernel has no modules."""
    try:
        loaded = pathlib.Path("/proc/modules").read_text()
    except OSError:
        return True
    if any(line.split(" ", 1)[0] == module for line in loaded.splitlines()):
        return True
    folder = pathlib.Path("/lib/modules", os.uname().release)
    try:
        builtin = (folder / "modules.builtin").read_text()
    except OSError:
        return not folder.is_dir()
    return f"/{module}.ko" in builtin


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """This process is in the network namespace at a path, until the end of the block. Raises OSError.

    Sockets and what was read before stay those of the namespace where they were made.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            there = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except ValueError:  # NUL or a lone surrogate: others may have written it
            raise OSError(EINVAL, os.strerror(EINVAL), path) from None
        try:
            if libc.setns(there, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        finally:
            os.close(there)
        try:
            yield
        finally:
            if libc.setns(outside, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot return to the own network namespace")
    finally:
        os.close(outside)


def is_own_namespace(path: str) -> bool:
    """Whether a path leads to the network namespace that this process is in."""
    try:
        there, here = os.stat(path), os.stat("/proc/thread-self/ns/net")
    except (OSError, ValueError):
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def sysctl(name: str) -> str:
    """The value of a sysctl of the namespace that this process is in, "" where there is none. `name`: with slashes."""
    try:
        return pathlib.Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


class Host:
    """The network of the namespace that this process is in when it is made. What was read once is kept."""

    def __init__(self) -> None:
        self._netlink = Socket(NETLINK_ROUTE)
        self.links = {link.name: link for link in self._links()}
        self._names = {link.number: name for name, link in self.links.items()}
        self.links = {name: link._replace(master=self._names.get(int(link.master or 0), ""))
                      for name, link in self.links.items()}
        self.addresses = [*self._addresses()]
        self._routes: dict[tuple[object, ...], Route] = {}
        self._neighbours: list[Neighbour] | None = None

    def close(self) -> None:
        """Close what it reads by."""
        self._netlink.close()

    def _links(self) -> Iterator[Link]:
        mask = attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_bytes(4, "little"))
        for answer in self._netlink.dump(RTM_GETLINK, bytes(16) + mask):
            _, kind, number, flags, _ = _IFINFO.unpack_from(answer)
            found = dict(attributes(answer, 16))
            info = dict(attributes(found.get(IFLA_LINKINFO, b"")))
            port = dict(attributes(info.get(IFLA_INFO_SLAVE_DATA, b"")))
            yield Link(number, text(found.get(IFLA_IFNAME, b"\0")), kind, text(info.get(IFLA_INFO_KIND, b"\0")),
                       _little(found.get(IFLA_GROUP, b"")), str(_little(found.get(IFLA_MASTER, b"")) or ""), flags,
                       _little(found.get(IFLA_MTU, b"")), mac_text(found.get(IFLA_ADDRESS, b"")),
                       _little(found.get(IFLA_LINK, b"")),
                       _little(port.get(IFLA_BRPORT_STATE, bytes((BR_STATE_FORWARDING,)))),
                       bool(_little(port.get(IFLA_BRPORT_MODE, b""))))

    def _addresses(self) -> Iterator[Address]:
        for answer in self._netlink.dump(RTM_GETADDR, bytes(8)):
            domain, length, flags, _, number = _IFADDR.unpack_from(answer)
            found = dict(attributes(answer, 8))
            ip = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS, b"")
            if domain in (AF_INET, AF_INET6) and ip:
                yield Address(self._names.get(number, ""), 4 if domain == AF_INET else 6, ip, length, found.get(4, b""),
                              not flags & IFA_F_PERMANENT)

    def name_of(self, number: int) -> str:
        """The name of the interface with an index, "" for none."""
        return self._names.get(number, "")

    # --- what rules ask, see firewall.packet.Facts ---

    def link(self, name: str) -> Link | None:
        """The interface of a name."""
        return self.links.get(name)

    def type_of(self, family: int, ip: bytes, link: str = "") -> int:
        """What an address is for this host, an RTN_* number; `link`: as that interface has it."""
        for address in self.addresses:
            if address.family == family and (not link or address.link == link):
                if address.ip == ip:
                    return RTN_LOCAL
                if family == 4 and address.broadcast == ip:
                    return RTN_BROADCAST
        if family == 4:
            if ip[0] == 127 and (not link or link == "lo"):
                return RTN_LOCAL
            return RTN_BROADCAST if ip == b"\xff" * 4 else RTN_MULTICAST if 224 <= ip[0] < 240 else RTN_UNICAST
        return RTN_MULTICAST if ip[0] == 0xff else RTN_UNICAST

    def route_to(self, family: int, ip: bytes, mark: int = 0) -> str:
        """The interface that leads to an address, "" for none."""
        return self.route(family, ip, mark=mark).link

    def address_of(self, link: str, family: int) -> bytes | None:
        """The address that an interface's packets come from, None if it has none; of localhost for "lo"."""
        if link == "lo":
            return b"\x7f\0\0\1" if family == 4 else bytes(15) + b"\1"
        return next((each.ip for each in self.addresses if each.link == link and each.family == family and
                     (family == 4 or not each.is_link_local)), None)

    # --- routes and neighbours ---

    def route(self, family: int, ip: bytes, source: bytes = b"", link: str = "", mark: int = 0) -> Route:
        """The route to an address. With `source` and `link`: the input routing of a packet that comes in there."""
        key = family, ip, source, link, mark
        if key not in self._routes:
            self._routes[key] = self._route(family, ip, source, link, mark)
        return self._routes[key]

    def _route(self, family: int, ip: bytes, source: bytes, link: str, mark: int) -> Route:
        body = bytes((AF[family], len(ip) * 8, len(source) * 8)) + bytes(9) + attribute(RTA_DST, ip)
        if source:
            body += attribute(RTA_SRC, source)
        if link:
            body += attribute(RTA_IIF, self.links[link].number.to_bytes(4, "little"))
        if mark:
            body += attribute(RTA_MARK, mark.to_bytes(4, "little"))
        try:
            answer = self._netlink.ask(RTM_GETROUTE, body)[0]
        except OSError as error:
            return Route(0, "", error=error.errno or -1)
        found = dict(attributes(answer, 12))
        gateway = found.get(RTA_GATEWAY, b"") or found.get(RTA_VIA, b"")[2:]
        shown = inet_ntop(AF_INET if len(gateway) == 4 else AF_INET6, gateway) if len(gateway) in (4, 16) else ""
        return Route(answer[7], self.name_of(_little(found.get(RTA_OIF, b""))), shown)

    def neighbours(self, ip: bytes) -> list[Neighbour]:
        """What this host knows of an address, on whichever link."""
        if self._neighbours is None:
            self._neighbours = []
            for answer in self._netlink.dump(RTM_GETNEIGH, bytes(12)):
                _, number, state, _, _ = _ND.unpack_from(answer)
                found = dict(attributes(answer, 12))
                self._neighbours.append(Neighbour(self.name_of(number), found.get(NDA_DST, b""),
                                                  mac_text(found.get(NDA_LLADDR, b"")), state))
        return [each for each in self._neighbours if each.ip == ip]


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


# --- sockets --------------------------------------------------------------------------------------------------

def listeners(protocol: str) -> list[Listener]:
    """The sockets of the namespace that this process is in that wait for clients, by sock_diag or by /proc/net."""
    found: list[Listener] = []
    if protocol not in PROTOCOL_NUMBERS or (protocol == "sctp" and not can_ask("sctp")):
        return found
    for family in 4, 6:
        if can_ask(f"{protocol}_diag"):
            try:
                found += _asked(family, protocol)
                continue
            except OSError:
                pass
        found += _listed(family, protocol)
    return found


def _asked(family: int, protocol: str) -> Iterator[Listener]:
    state = TCP_CLOSE if protocol == "udp" else TCP_LISTEN
    request = bytes((AF[family], PROTOCOL_NUMBERS[protocol], 0, 0)) + (1 << state).to_bytes(4, "little") + bytes(48)
    netlink = Socket(NETLINK_SOCK_DIAG)
    try:
        for answer in netlink.dump(SOCK_DIAG_BY_FAMILY, request):
            its = _DIAG.unpack_from(answer)
            extra = dict(attributes(answer, _DIAG.size))
            yield Listener(family, protocol, its[6][:4] if family == 4 else its[6], int.from_bytes(its[4], "big"),
                           bool(_little(extra.get(INET_DIAG_SKV6ONLY, b""))), its[11], its[12], its[14])
    finally:
        netlink.close()


def _listed(family: int, protocol: str) -> Iterator[Listener]:
    """From /proc/net, which does not tell whether a socket of IPv6 serves IPv4."""
    try:
        path = pathlib.Path("/proc/thread-self/net", f"{protocol}6" if family == 6 else protocol)
        lines = path.read_text().splitlines()[1:]
    except OSError:
        return
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and int(fields[3], 16) == (TCP_CLOSE if protocol == "udp" else TCP_LISTEN):
            address, _, port = fields[1].partition(":")
            raw = bytes.fromhex(address)
            ip = b"".join(raw[at:at + 4][::-1] for at in range(0, len(raw), 4))
            yield Listener(family, protocol, ip, int(port, 16), False, int(fields[4].partition(":")[2], 16), -1,
                           int(fields[9]))


# --- processes ------------------------------------------------------------------------------------------------

def process_of(inode: int) -> str:
    """Name and PID of a process that has a socket, "" if none of those that this one may look at has it."""
    wanted = f"socket:[{inode}]"
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                for fd in os.listdir(process / "fd"):
                    with contextlib.suppress(OSError):
                        if os.readlink(process / "fd" / fd) == wanted:
                            return f"{(process / 'comm').read_text().strip()} (PID {process.name})"
    return ""


def other_namespaces() -> Iterator[tuple[str, str]]:
    """The network namespaces of processes besides this one: a path, and name and PID of a process that is in it."""
    seen = {os.readlink("/proc/thread-self/ns/net")}
    for process in pathlib.Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                namespace = os.readlink(process / "ns/net")
                if namespace not in seen:
                    seen.add(namespace)
                    yield str(process / "ns/net"), f"{(process / 'comm').read_text().strip()} (PID {process.name})"


# --- rules as people read them --------------------------------------------------------------------------------

def rule_texts(family: str, table: str, chain: str) -> dict[int, str]:
    """The rules of a chain of nf_tables as nft prints them, by their handles; {} where nft is not there, or fails."""
    words = ["nft", "--stateless", "-a", "list", "chain", family, table, chain]
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=10, check=False,
                              env={**os.environ, "PATH": path})
    except (OSError, subprocess.SubprocessError):
        return {}
    found = {}
    for line in done.stdout.splitlines():
        rule, _, handle = line.strip().rpartition(" # handle ")
        if rule and handle.isdigit():
            found[int(handle)] = rule
    return found
