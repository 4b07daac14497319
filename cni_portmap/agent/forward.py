"""Forwards what NAT cannot: TCP, see `streams`, and UDP by sessions. See `permits` for what is let in.

All of it happens in a thread, see `poll`; what other threads call has it done there.
"""
import contextlib
import errno
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from select import EPOLLIN

from .permits import Permit
from .poll import Poll
from .reserve import AF, Claim, reset, room
from .streams import Connection, Pipes, prepare

CONNECT_SECONDS = 10
CONNECTIONS, SESSIONS = 16384, 1024  # of a TCP port, of a UDP port
SHARE = 4  # descriptors of a port for each one that it leaves free
SESSION_SECONDS = 60
DATAGRAM = 1 << 16
AT_ONCE = 64  # connections, or datagrams, before others have their turn
IPV6_RECVPKTINFO, IPV6_PKTINFO, IP_PKTINFO = 49, 50, 8


def is_admitted(permit: Permit, peer: str, local: str) -> bool:
    """Whether a client needs forwarding: its family is not the container's, or NAT cannot answer it."""
    return permit.cross or peer.startswith("fe80:") or (peer == "::1" and local == "::1")


class _Session:
    """A UDP client: `server` is connected to the container; answers leave from the address that was asked."""

    __slots__ = ("server", "last", "answer")

    def __init__(self, server: socket.socket, last: float, answer: Callable[[bytes], object]) -> None:
        self.server, self.last, self.answer = server, last, answer


class Forward:
    """What is forwarded. `forwarded`: connections and sessions so far; `permits`: what may be, by claim.

    A port has at most four descriptors for each one that is free: however many clients it has, other ports have theirs.
    """

    def __init__(self, log: Callable[[str], object]) -> None:
        self.forwarded = 0
        self.permits: dict[Claim, Permit] = {}
        self._pipes = Pipes()
        self._connections: dict[Claim, set[Connection]] = {}
        self._connecting: dict[Connection, float] = {}  # each with the time to give up, the first one first
        self._sessions: dict[Claim, OrderedDict[object, _Session]] = {}
        self._poll = Poll(self._sweep, log)

    def close(self) -> None:
        """End everything."""
        self.forbid([*self.permits])
        self._poll.close()
        self._pipes.close()

    def forbid(self, claims: Iterable[Claim]) -> None:
        """Forward these no more, and end what is open."""
        found = [each for each in claims if self.permits.pop(each, None)]
        if found:
            self._poll.do(self._end_all, found)

    def _end_all(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            for connection in [*self._connections.pop(claim, ())]:
                connection.end(True)
            self._end_sessions(claim)

    # --- sockets that are held ---

    def opened(self, claim: Claim, sock: socket.socket) -> None:
        """A socket is there: accept its connections; read its datagrams, if they are forwarded."""
        if claim[1] == "tcp":
            prepare(sock)
            self._poll.watch(sock.fileno(), EPOLLIN, lambda _: self._accept(claim, sock))
        elif claim in self.permits:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            if claim[0] == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            self._poll.watch(sock.fileno(), EPOLLIN, lambda _: self._receive(claim, sock))

    def closed(self, sockets: Iterable[tuple[Claim, socket.socket]]) -> None:
        """These go."""
        self._poll.do(self._forget, sockets)

    def _forget(self, sockets: Iterable[tuple[Claim, socket.socket]]) -> None:
        for claim, sock in sockets:
            self._poll.forget(sock.fileno())
            self._end_sessions(claim)  # they answer from it

    # --- TCP ---

    def _accept(self, claim: Claim, listener: socket.socket) -> None:
        """Connections that NAT did not take: forward them, or reset them."""
        for _ in range(AT_ONCE):
            try:
                client, peer = listener.accept()
            except OSError:
                return
            client.setblocking(False)
            permit = self.permits.get(claim)
            try:
                admitted = permit and is_admitted(permit, peer[0], "" if permit.cross else client.getsockname()[0])
            except OSError:  # it has gone
                admitted = False
            if permit and admitted:
                self._connect(claim, permit, client)
            else:
                reset(client)

    def _connect(self, claim: Claim, permit: Permit, client: socket.socket) -> None:
        its = self._connections.setdefault(claim, set())
        try:
            server = socket.socket(AF[6 if ":" in permit.ip else 4], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            reset(client)
            return
        if len(its) >= CONNECTIONS or 2 * len(its) >= SHARE * room(server):
            server.close()
            reset(client)
            return
        prepare(server)
        connection = Connection(self._poll, self._pipes, client, server, claim, self._connected, self._ended)
        its.add(connection)
        if connection.connect((permit.ip, permit.port)):
            self._connecting[connection] = time.monotonic() + CONNECT_SECONDS

    def _connected(self, connection: Connection) -> None:
        self._connecting.pop(connection, None)
        self.forwarded += 1

    def _ended(self, connection: Connection) -> None:
        self._connecting.pop(connection, None)
        self._connections.get(connection.claim, set()).discard(connection)

    # --- UDP ---

    def _receive(self, claim: Claim, sock: socket.socket) -> None:
        permit = self.permits.get(claim)
        for _ in range(AT_ONCE):
            try:
                data, ancillary, _, peer = sock.recvmsg(DATAGRAM, 64)
            except OSError:
                return
            info = next((its for level, kind, its in ancillary if (level, kind) in (
                (socket.IPPROTO_IPV6, IPV6_PKTINFO), (socket.IPPROTO_IP, IP_PKTINFO))), b"")
            local, answer_info = _local(claim[0], info)
            if permit and info and is_admitted(permit, peer[0], local):
                session = self._session(claim, permit, sock, peer, answer_info)
                if session:
                    session.last = time.monotonic()
                    with contextlib.suppress(OSError):  # nobody listens there; as with NAT, the client may try again
                        session.server.send(data)

    def _session(self, claim: Claim, permit: Permit, sock: socket.socket, peer: object, info: bytes) \
            -> _Session | None:
        sessions, key = self._sessions.setdefault(claim, OrderedDict()), (peer, info)
        if key in sessions:
            sessions.move_to_end(key)
            return sessions[key]
        try:
            server = socket.socket(AF[6 if ":" in permit.ip else 4], socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        except OSError:
            return None
        try:
            if len(sessions) >= min(SESSIONS, SHARE * room(server)):  # the one that was silent longest goes
                if not sessions:
                    raise OSError(errno.EMFILE, "too many sessions")
                self._end(sessions.popitem(last=False)[1])
            server.connect((permit.ip, permit.port))
        except OSError:
            server.close()
            return None
        level, kind = (socket.IPPROTO_IPV6, IPV6_PKTINFO) if claim[0] == 6 else (socket.IPPROTO_IP, IP_PKTINFO)
        session = sessions[key] = _Session(server, time.monotonic(), lambda data: sock.sendmsg(
            [data], [(level, kind, info)], 0, peer))  # type: ignore[arg-type]
        self._poll.watch(server.fileno(), EPOLLIN, lambda _: self._answer(session))
        self.forwarded += 1
        return session

    def _answer(self, session: _Session) -> None:
        for _ in range(AT_ONCE):
            try:
                data = session.server.recv(DATAGRAM)
            except OSError:
                return
            session.last = time.monotonic()
            with contextlib.suppress(OSError):  # the client has gone
                session.answer(data)

    def _end_sessions(self, claim: Claim) -> None:
        for session in self._sessions.pop(claim, {}).values():
            self._end(session)

    def _end(self, session: _Session) -> None:
        self._poll.forget(session.server.fileno())
        session.server.close()

    def _sweep(self) -> None:
        """End what has waited too long."""
        now = time.monotonic()
        for connection in [each for each, due in self._connecting.items() if due < now]:
            connection.end(True)
        for sessions in self._sessions.values():
            for key in [key for key, session in sessions.items() if session.last < now - SESSION_SECONDS]:
                self._end(sessions.pop(key))


def _local(family: int, info: bytes) -> tuple[str, bytes]:
    """The address that a datagram was sent to, and what makes an answer leave from it (in6_pktinfo, in_pktinfo)."""
    if family == 6 and len(info) >= 20:
        address, index = info[:16], info[16:20]
        text = socket.inet_ntop(socket.AF_INET6, address)
        return text, address + (index if text.startswith("fe80:") else bytes(4))
    if family == 4 and len(info) >= 12:
        return socket.inet_ntop(socket.AF_INET, info[8:12]), bytes(4) + info[8:12] + bytes(4)
    return "", b""


