"""Servers that say whom they saw, and clients; a socket is opened in the namespace that it belongs to."""
import contextlib
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from .links import family_of


class Saw(NamedTuple):
    """A server's view of an exchange: its own name, the peer's address, and the port that was reached."""

    server: str
    peer: str
    port: int


KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}


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
        """The server's view of this flow now; None without an answer in time. Raises OSError if refused.

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
