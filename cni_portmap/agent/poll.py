"""A thread of its own for what is forwarded: neither a heal nor a scrape makes a packet wait.

It waits with epoll(7), level-triggered, and without asyncio, which costs more than the system calls of a short
connection. Handlers run in this thread alone; others ask for a turn with `do`.
"""
import contextlib
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

TICK = 5  # seconds
EVENTS = 256  # at once
SWITCH = 0.0001  # seconds that another thread computes before this one has its turn; Python's default is 5 ms

Handler = Callable[[int], object]  # is called with the events


class Poll:
    """Descriptors, and the handler of each. `tick()`: is called every few seconds; `log`: of what should not happen."""

    def __init__(self, tick: Callable[[], object], log: Callable[[str], object]) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._asked: deque[tuple[Callable[..., object], tuple[Any, ...], threading.Event]] = deque()
        self._tick, self._log, self._ended = tick, log, False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._wake, select.EPOLLIN, lambda _: os.eventfd_read(self._wake))
        self.change, self._interval = self._epoll.modify, sys.getswitchinterval()
        sys.setswitchinterval(SWITCH)
        self._thread = threading.Thread(target=self._run, name="forward", daemon=True)
        self._thread.start()

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call a handler at these events. Any thread may do this."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Watch a descriptor no more that is still open: a child may have a copy, and epoll would not forget it."""
        if self._handlers.pop(fd, None):
            self._epoll.unregister(fd)

    def do(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have something done between two handlers, and wait until it is."""
        done = threading.Event()
        self._asked.append((function, arguments, done))
        os.eventfd_write(self._wake, 1)
        done.wait()

    def close(self) -> None:
        """End the thread."""
        self.do(self._end)
        self._thread.join()
        sys.setswitchinterval(self._interval)
        self._epoll.close()
        os.close(self._wake)

    def _end(self) -> None:
        self._ended = True

    def _run(self) -> None:
        poll, handlers, due = self._epoll.poll, self._handlers, time.monotonic() + TICK
        while not self._ended:
            # All are looked up before the first is called: one that ends, and another that gets its number meanwhile,
            # are not taken for each other.
            for handler, events in [(handlers.get(fd), events) for fd, events in poll(TICK, EVENTS)]:
                if handler:
                    self._call(handler, events)
            while self._asked:
                function, arguments, done = self._asked.popleft()
                self._call(function, *arguments)
                done.set()
            if time.monotonic() >= due:
                due = time.monotonic() + TICK
                self._call(self._tick)

    def _call(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001  # the others go on
            with contextlib.suppress(Exception):  # where the log goes, nobody may read it any more
                self._log(f"forwarding: {type(error).__name__}: {error}; please report it")
