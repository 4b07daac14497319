"""Sockets for what is published, so that whoever looks for listeners sees it, and no service takes the port.

Lima, WSL2 and Rancher Desktop look for TCP sockets that listen and UDP sockets that are bound and not connected; a TCP
socket that is bound alone is in no list. A connection that NAT has not taken reaches such a socket: it is accepted and
reset, or forwarded.

A socket comes some seconds after ADD, because podman's conmon and others bind the port after it, and goes at once with
DEL. Where the port is in use, that is tried again later. SO_REUSEADDR is for sockets that listen alone: on UDP it gives
the port away.
"""
import asyncio
import errno
import resource
import socket
import struct
from collections.abc import Callable, Iterable

from ..ruleset import MAPS, PROTOCOLS, claim_of
from ..linux.netlink import attributes
from ..linux.table import NFTA_DATA_VALUE

Claim = tuple[int, str, str, int]  # family, protocol, host address ("" for all), port

DELAY = 3  # seconds after ADD
AGAIN = 20  # seconds, where a port is in use
AT_ONCE = 200  # sockets before others have their turn
ROOM = 64  # descriptors that are left for healing, however many clients there are
AF = {4: socket.AF_INET, 6: socket.AF_INET6}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}  # sctp is not reserved
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


def claim(name: str, key: bytes) -> Claim | None:
    """The claim of a map element, None where no socket can hold it."""
    value = dict(attributes(key)).get(NFTA_DATA_VALUE, b"")
    if name not in MAPS or len(value) < 12:
        return None
    family, protocol, host, port = claim_of((name, value))
    if PROTOCOLS.get(protocol) not in KINDS:
        return None
    return family, PROTOCOLS[protocol], socket.inet_ntop(AF[family], host) if host else "", port


class Reserve:
    """The sockets. `opened(claim, socket)`, `closed([(claim, socket)])`: who takes care of them while they are there.

    Without somebody else, connections are accepted and reset.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self.opened: Callable[[Claim, socket.socket], object] = self._reset_those_of
        self.closed: Callable[[list[tuple[Claim, socket.socket]]], object] = self._forget
        self.sockets: dict[Claim, socket.socket] = {}
        self._wanted: dict[Claim, float] = {}  # those without a socket, each with the time to try
        self._log = log
        self._timer: asyncio.TimerHandle | None = None
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def want(self, claims: Iterable[Claim], delay: float = DELAY) -> None:
        """Hold these, from so many seconds on; what is held already is let go of until then."""
        due = asyncio.get_running_loop().time() + delay
        claims = [*claims]
        self._close(claims)
        self._wanted.update(dict.fromkeys(claims, due))
        self._plan()

    def drop(self, claims: Iterable[Claim]) -> None:
        """Let go of these."""
        claims = [*claims]
        self._close(claims)
        for each in claims:
            self._wanted.pop(each, None)

    def yield_to(self, family: int, protocol: str, host_ip: str, port: int) -> bool:
        """Let go for some seconds of all that overlaps with a claim; whether there was something."""
        found = [each for each in self.sockets if (each[0], each[1], each[3]) == (family, protocol, port) and
                 (not host_ip or not each[2] or each[2] == host_ip)]
        self.want(found)
        return bool(found)

    def close(self) -> None:
        """Let go of everything."""
        self.drop([*self.sockets, *self._wanted])
        if self._timer:
            self._timer.cancel()

    def _plan(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if self._wanted:
            self._timer = asyncio.get_running_loop().call_at(min(self._wanted.values()), self._open_due)

    def _open_due(self) -> None:
        loop = asyncio.get_running_loop()
        due = [each for each, when in self._wanted.items() if when <= loop.time()][:AT_ONCE]
        for each in due:
            try:
                self.sockets[each] = self._open(each)
                del self._wanted[each]
            except OSError:  # somebody has it, or this host has no such address (yet)
                self._wanted[each] = loop.time() + AGAIN
        self._plan()

    def _open(self, each: Claim) -> socket.socket:
        family, protocol, host_ip, port = each
        sock = socket.socket(AF[family], KINDS[protocol] | socket.SOCK_NONBLOCK)
        try:
            if family == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # nobody reads it
            if room(sock) <= 0:
                raise OSError(errno.EMFILE, "too many sockets")
            sock.bind((host_ip, port))
            if protocol == "tcp":
                sock.listen(1024)
            self.opened(each, sock)
        except OSError:
            sock.close()
            raise
        return sock

    def _close(self, claims: list[Claim]) -> None:
        found = [(each, self.sockets.pop(each)) for each in dict.fromkeys(claims) if each in self.sockets]
        if found:
            self.closed(found)
        for _, sock in found:
            sock.close()

    def _reset_those_of(self, each: Claim, sock: socket.socket) -> None:
        if each[1] == "tcp":
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _forget(self, sockets: list[tuple[Claim, socket.socket]]) -> None:
        for _, sock in sockets:
            asyncio.get_running_loop().remove_reader(sock)

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            reset(connection)


def room(sock: socket.socket) -> int:
    """How many descriptors may be opened after this one: the kernel gives the lowest number that is free."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - ROOM - sock.fileno()


def reset(connection: socket.socket) -> None:
    """Close a connection with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()
