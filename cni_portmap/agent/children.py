"""Work that takes long, in a child: the loop goes on, and what the work has opened and remembered ends with it.

So each of them sees the kernel with fresh eyes, as a call of the command does, and has its own name for listeners.
"""
import asyncio
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from ..cni import CniError, name_process, tell

_running: set[int] = set()


async def in_child(verb: str, work: Callable[[], Any], seconds: float = 120) -> Any:
    """What `work` returns (JSON), done by a child of the name cni-portmap/<verb>.

    Raises CniError with the child's own words, or where it ended without any, or took more than so many seconds.
    """
    read, write = os.pipe()
    pid = 0
    try:
        try:
            sys.stderr.flush()
            pid = os.fork()
            if not pid:
                _be_child(verb, work, write)
        finally:
            os.close(write)
        _running.add(pid)
        async with asyncio.timeout(seconds):
            answer = await _read_all(read)
    except TimeoutError:
        answer = b""
    finally:
        os.close(read)
        if pid:
            os.kill(pid, signal.SIGKILL)  # it has said all, or shall not any more
            os.waitpid(pid, 0)
            _running.discard(pid)
    try:
        kind, value = json.loads(answer)
    except ValueError:  # it was killed before it had said all
        kind, value = "error", ["ended without an answer", ""]
    if kind == "error":
        raise CniError(0, f"{verb}: {value[0]}", value[1])
    return value


def _be_child(verb: str, work: Callable[[], Any], write: int) -> None:
    answer: list[Any] = ["error", ["failed", ""]]
    try:
        gc.disable()
        os.closerange(3, write)  # a port, a connection or the agent's name is free as soon as the agent lets go of it
        os.closerange(write + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        signal.set_wakeup_fd(-1)
        for each in signal.SIGTERM, signal.SIGHUP, signal.SIGINT:
            signal.signal(each, signal.SIG_DFL)
        name_process(verb)
        answer = ["done", work()]
    except CniError as error:
        answer = ["error", [error.msg, error.details]]
    except MemoryError:
        answer = ["error", ["not enough memory", ""]]
    except BaseException as error:  # noqa: BLE001  # told to the parent
        answer = ["error", [f"{type(error).__name__}: {error}", "please report it"]]
    finally:
        try:
            tell()
            with open(write, "wb") as pipe:
                pipe.write(json.dumps(answer).encode())
        finally:
            os._exit(0)


async def _read_all(fd: int) -> bytes:
    """Everything until the other end is closed."""
    os.set_blocking(fd, False)
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    chunks: list[bytes] = []
    try:
        while True:
            await ready.wait()
            ready.clear()
            try:
                while chunk := os.read(fd, 1 << 16):
                    chunks.append(chunk)
                return b"".join(chunks)
            except BlockingIOError:
                continue
    finally:
        loop.remove_reader(fd)


def end_all() -> None:
    """End the children that still work: the agent ends."""
    for pid in _running:
        os.kill(pid, signal.SIGKILL)
