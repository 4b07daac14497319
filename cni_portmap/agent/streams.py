"""TCP from a client to a container and back, by splice(2).

A pipe belongs to a direction only while bytes wait in it, so an idle connection costs two descriptors. Half-close,
resets and a reader that stops pass through as they are: what cannot be written is not read. Urgent data stays urgent.
"""
import contextlib
import errno
import fcntl
import os
import resource
import select
import socket
from collections.abc import Callable

from .poll import Poll
from .reserve import ROOM, Claim, reset

PIPE = 1 << 20  # bytes of a pipe; what fs.pipe-max-size allows
LARGE = 16  # pipes of that size; further ones, for readers that stop, have what the kernel gives: 64 KiB or less
KEPT = 4  # large pipes that wait for use; one serves all that do not block
FEW = 1 << 14  # bytes: less than that was all that there was
TURN = 1 << 20  # bytes before others have their turn
COPY = 1 << 16  # bytes that are copied at once, where there is no pipe
SIOCATMARK = 0x8905  # asks whether the next byte is an urgent one
KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6}  # seconds, seconds, probes
F_SETPIPE_SZ, SPLICE_F_MOVE, SPLICE_F_NONBLOCK = 1031, 1, 2
FLAGS = SPLICE_F_MOVE | SPLICE_F_NONBLOCK
READ, WRITE, HANGUP = select.EPOLLIN | select.EPOLLRDHUP, select.EPOLLOUT, select.EPOLLRDHUP | select.EPOLLHUP
QUIET = select.EPOLLERR  # which is told anyway: a socket that is watched, and not read


def prepare(sock: socket.socket) -> None:
    """Set what both sockets of a connection have; those that a listener accepts have it from the listener."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # an urgent byte is read in its place
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


class Pipes:
    """Pipes that wait for use, and how many there are: their descriptors are at most half of those that are left."""

    def __init__(self) -> None:
        self._count = 0
        self._free: list[tuple[int, int]] = []
        self._large: set[int] = set()

    def take(self) -> tuple[int, int] | None:
        """A pipe that is empty, None where the descriptors are for others."""
        if self._free:
            return self._free.pop()
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        self._count += 1
        if 4 * self._count > resource.getrlimit(resource.RLIMIT_NOFILE)[0] - ROOM - max(pipe):
            self.give(pipe, False)
            return None
        if len(self._large) < LARGE:
            self._large.add(pipe[0])
            with contextlib.suppress(OSError):  # this user's pipes are many by now
                fcntl.fcntl(pipe[1], F_SETPIPE_SZ, PIPE)
        return pipe

    def give(self, pipe: tuple[int, int], is_empty: bool) -> None:
        """Take a pipe back."""
        if is_empty and pipe[0] in self._large and len(self._free) < KEPT:
            self._free.append(pipe)
        else:
            self._count -= 1
            self._large.discard(pipe[0])
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self) -> None:
        """Close those that are not in use."""
        while self._free:
            self.give(self._free.pop(), False)


class _End:
    """One end of a connection, and what was read from it. `mask`: the events that it is watched for."""

    __slots__ = ("connection", "sock", "fd", "other", "mask", "pipe", "waiting", "ended", "done")

    def __init__(self, connection: "Connection", sock: socket.socket) -> None:
        self.connection, self.sock, self.fd = connection, sock, sock.fileno()
        self.other: _End
        self.mask = 0
        self.pipe: tuple[int, int] | None = None
        self.waiting = 0  # bytes in the pipe; without one, they are not read yet
        self.ended = False  # it says nothing more,
        self.done = False  # and the other end knows

    def watch(self, mask: int) -> None:
        """Wait for these events."""
        if mask == self.mask:
            return
        poll = self.connection.poll
        if not mask:
            poll.forget(self.fd)
        elif self.mask:
            poll.change(self.fd, mask)
        else:
            poll.watch(self.fd, mask, self.handle)
        self.mask = mask

    def handle(self, events: int) -> None:
        """Read, or write."""
        try:
            if events & WRITE and self.mask & WRITE:
                self.other.write()  # what else there is, is told again: the connection may have another state now
            elif self.mask & READ:
                if events & ~WRITE:
                    self.read(events & HANGUP)
            elif events & QUIET:
                self.connection.end(True)
            elif events & HANGUP:  # it has said all, and was told all, and the rest of it waits in a pipe
                self.watch(self.mask & ~QUIET)
        except OSError:
            self.connection.end(True)

    def read(self, is_last: int) -> None:
        """Read what there is, and write it. `is_last`: nothing comes after what is there."""
        left, self.pipe = TURN, self.connection.pipes.take()
        if not self.pipe:
            self._copy()
            left = 0
        while left > 0 and self.pipe:
            try:
                size = os.splice(self.fd, self.pipe[1], PIPE, flags=FLAGS)
            except BlockingIOError:
                if left == TURN:  # but there is something: splice(2) stops at an urgent byte
                    self._give()
                    self._copy()
                break
            if not size:
                self.ended = True
                break
            left -= size
            self.waiting = size
            if not self._pass_on() or (size < FEW and not is_last):
                break
        self._settle()

    def write(self) -> None:
        """Write on what waits: the other end has read."""
        self._pass_on()
        self._settle()

    def _pass_on(self) -> bool:
        """Write what is in the pipe, and tell whether that was all."""
        if not self.pipe:
            self.waiting = 0
            return True
        try:
            while self.waiting:
                self.waiting -= os.splice(self.pipe[0], self.other.fd, self.waiting, flags=FLAGS)
        except BlockingIOError:
            return False
        except OSError:
            self._refused()
            return False
        return True

    def _copy(self) -> None:
        """Pass on some bytes without a pipe, or one urgent byte: it is read when the other end has taken it."""
        is_urgent = any(fcntl.ioctl(self.fd, SIOCATMARK, bytes(4)))
        try:
            data = self.sock.recv(1 if is_urgent else COPY, socket.MSG_PEEK)
        except BlockingIOError:
            return
        self.ended = not data
        if data:
            try:
                self.sock.recv(self.other.sock.send(data, socket.MSG_OOB if is_urgent else 0))
            except BlockingIOError:
                self.waiting = len(data)
            except OSError:
                self._refused()

    def _refused(self) -> None:
        """The other end was reset. What it said before, such as an early answer, is passed on; then the reset is."""
        self._give()
        self.waiting = 0
        self.ended = self.done = self.connection.is_reset = True
        self.watch(self.mask & ~READ | QUIET)

    def _give(self) -> None:
        if self.pipe:
            self.connection.pipes.give(self.pipe, not self.waiting)
            self.pipe = None

    def _settle(self) -> None:
        """Wait for what is next."""
        other = self.other
        if self.waiting:
            self.watch(self.mask & ~READ | QUIET)
            other.watch(other.mask | WRITE)
            return
        self._give()
        if other.mask & WRITE:
            other.watch(other.mask & ~WRITE)
        if not self.ended:
            self.watch(self.mask | READ)
        elif other.done:
            self.connection.end(self.connection.is_reset)
        elif not self.done:
            self.done = True
            self.watch(self.mask & ~READ | QUIET)
            other.sock.shutdown(socket.SHUT_WR)

    def close(self, with_reset: bool) -> None:
        """Let go of everything."""
        self.watch(0)
        self._give()
        if with_reset:
            reset(self.sock)
        else:
            self.sock.close()


class Connection:
    """A client of a claim, and the container that it speaks with. Both sockets do not block, and are closed with it.

    `connected(connection)`, `ended(connection)`: what becomes of it.
    """

    def __init__(self, poll: Poll, pipes: Pipes, client: socket.socket, server: socket.socket, claim: Claim,
                 connected: Callable[["Connection"], object], ended: Callable[["Connection"], object]) -> None:
        self.poll, self.pipes, self.claim = poll, pipes, claim
        self._connected, self._ended, self.is_reset = connected, ended, False
        near, far = _End(self, client), _End(self, server)
        self._ends: tuple[_End, ...] = near, far
        near.other, far.other = far, near

    def connect(self, address: tuple[str, int]) -> bool:
        """Connect to the container, and tell whether its answer is still to come: most are there at once."""
        near, far = self._ends
        error = far.sock.connect_ex(address)
        if error == errno.EINPROGRESS:
            error = far.sock.connect_ex(address)
        if error == errno.EALREADY:
            far.mask = WRITE
            self.poll.watch(far.fd, WRITE, self._answered)
            near.watch(QUIET)
            return True
        self._start(error)
        return False

    def _answered(self, _: int) -> None:
        if not self._ends:  # the client left in the same turn
            return
        far = self._ends[1]
        far.watch(0)
        self._start(far.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _start(self, error: int) -> None:
        if error:
            self.end(True)
            return
        self._connected(self)
        for each in self._ends:
            each.watch(READ)

    def end(self, with_reset: bool) -> None:
        """Close both ends."""
        if self._ends:
            ends, self._ends = self._ends, ()  # no circle is left for the collector
            for each in ends:
                each.close(with_reset)
                del each.other
            self._ended(self)
