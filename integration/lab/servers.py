"""Servers that say whom they saw, and clients; a socket is opened in the namespace that it belongs to."""
import contextlib
import errno
import ipaddress
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from .links import family_of
from .processes import until


class Saw(NamedTuple):
    """A server's view of an exchange: its own name, the peer's address, and the port that was reached."""

    server: str
    peer: str
    port: int


KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}


# Seconds to wait for what should come, however busy the host is, and for what should not.
PATIENT, HASTY = 10.0, 0.3


def patience(comes: object) -> float:
    """How long to wait for an answer that should come, or should not."""
    return PATIENT if comes else HASTY


_questions = itertools.count(1)


def question() -> bytes:
    """A word that nobody has sent before: a server knows by it what has arrived, and a client what is answered."""
    return b"%d" % next(_questions)


_PKTINFO = 20  # bytes of struct in6_pktinfo: the address that was asked, an interface


class Server:
    """Answers on one port of one namespace, IPv4 and IPv6, with whom it saw; counts what arrives.

    UDP, too, is answered from the address that was asked, and with the first word of the question.

    A TCP connection is closed with its answer, or, with `keep`, goes on: each further message has an answer.
    """

    def __init__(self, name: str, where: contextlib.AbstractContextManager[object], port: int, protocol: str = "tcp",
                 ip: str = "", keep: bool = False) -> None:
        self.name, self.port, self.protocol, self._keep = name, port, protocol, keep
        self.arrivals: list[Saw] = []
        self._asked: dict[bytes, Saw] = {}
        with where:
            family = family_of(ip) if ip else socket.AF_INET6
            self._socket = socket.socket(family, KINDS[protocol])
            if not ip:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
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
                    data, control, _, address = self._socket.recvmsg(2048, socket.CMSG_SPACE(_PKTINFO))
                    if address is None:  # shut down
                        return
                    from_there = [(level, kind, info[:_PKTINFO - 4] + bytes(4)) for level, kind, info in control]
                    with contextlib.suppress(OSError):  # nobody there, as with spoofed sources
                        self._socket.sendmsg([self._answer(address, data)], from_there, 0, address)

    def _converse(self, connection: socket.socket, address: Any) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(self._answer(address))
            while connection.recv(2048):
                connection.sendall(self._answer(address))

    def _answer(self, address: Any, asked: bytes = b"") -> bytes:
        peer = ipaddress.ip_address(address[0].partition("%")[0])
        mapped = getattr(peer, "ipv4_mapped", None)
        saw = Saw(self.name, str(mapped or peer), self.port)
        self.arrivals.append(saw)
        word = asked.partition(b" ")[0]
        self._asked[word] = saw
        return json.dumps([*saw, word.decode(errors="replace")]).encode()

    def saw(self, word: bytes) -> Saw | None:
        """Whom it saw send a datagram that begins with this word; None for nobody, so far."""
        return self._asked.get(word)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Client:
    """One socket, so one flow: connected from a namespace (and from the address `source`) to `ip` and `port`.

    `size`: of what it sends, in bytes.
    """

    def __init__(self, where: contextlib.AbstractContextManager[object], ip: str, port: int, protocol: str = "tcp",
                 source: str = "", timeout: float = PATIENT, size: int = 9) -> None:
        with where:
            self._socket = socket.socket(family_of(ip), KINDS[protocol])
        self._timeout, self._protocol, self._size = timeout, protocol, size
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

    def ask(self, timeout: float = 0) -> Saw | None:
        """The server's view of this flow now; None without an answer in time. Raises OSError if refused.

        `timeout`: other than the client's.

        As TCP does, a datagram that has no answer within a second is sent again. What answers another is not for it.
        """
        if self._protocol == "udp":
            self._forget_answers()
        word, end = question(), time.monotonic() + (timeout or self._timeout)
        while (left := end - time.monotonic()) > 0:
            if not self._listens:
                self._socket.send((word + b" who am I?").ljust(self._size))
            self._listens = False
            with contextlib.suppress(TimeoutError):
                return self._answer(word, min(left, 1.0) if self._protocol == "udp" else left)
        return None

    def _answer(self, word: bytes, seconds: float) -> Saw | None:
        """The answer to that word. Raises TimeoutError if there is none in time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            data = self._socket.recv(2048)
            if not data:
                return None
            *saw, answered = json.loads(data)
            if self._protocol == "tcp" or answered == word.decode():
                return Saw(*saw)
        raise TimeoutError

    def _forget_answers(self) -> None:
        """Read what has come to what was sent before, so that there is room: answers, and refusals."""
        self._socket.settimeout(0)
        while True:
            try:
                self._socket.recv(2048)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise

    def ask_until(self, server: str, timeout: float = 30.0) -> Saw | None:
        """Ask again, as real clients do, until `server` answers; after `timeout` seconds the last answer, if any."""
        end, saw = time.monotonic() + timeout, None
        while (left := end - time.monotonic()) > 0 and (saw is None or saw.server != server):
            try:
                saw = self.ask(min(left, self._timeout))
            except OSError:  # refused, or where there is nobody now
                saw = None
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


@contextlib.contextmanager
def connecting(where: contextlib.AbstractContextManager[object], port: int, *ips: str) -> Iterator[None]:
    """Connect every five milliseconds, to each of these addresses, while the block runs: not one attempt may fail."""
    done, made = threading.Event(), []
    lost: list[tuple[str, OSError]] = []

    def connect(ip: str) -> None:
        with where:
            while not done.wait(0.005):
                try:
                    socket.create_connection((ip, port), 30).close()
                    made.append(ip)
                except OSError as error:
                    lost.append((ip, error))
    threads = [threading.Thread(target=connect, args=(ip,)) for ip in ips]
    for thread in threads:
        thread.start()
    try:
        yield
        until(lambda: lost or min(map(made.count, ips)) > 20)  # a busy host makes fewer in the same time
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not lost and min(map(made.count, ips)) > 20, (lost[:3], len(made))


def exchange(where: contextlib.AbstractContextManager[object], ip: str, port: int, protocol: str = "tcp",
             source: str = "", timeout: float = PATIENT, size: int = 9) -> Saw | None:
    """Talk to `ip` and `port` from a namespace: what the server that answered saw, None if nobody did."""
    try:
        with Client(where, ip, port, protocol, source, timeout, size) as client:
            return client.ask()
    except OSError:
        return None
