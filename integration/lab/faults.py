"""Faults: death at any system call, others who change the ruleset meanwhile, folders that are not there."""
import contextlib
import ctypes
import itertools
import os
import signal
from collections.abc import Generator, Iterator

import nftables

from .processes import libc, until
from .tables import generation, nft_script

# ptrace(2), which has no module. Only what is the same on every architecture.
PTRACE_TRACEME, PTRACE_SYSCALL, PTRACE_SETOPTIONS = 0, 24, 0x4200
PTRACE_O_TRACESYSGOOD, PTRACE_O_EXITKILL = 1, 0x100000
libc.ptrace.argtypes = ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p


def trace_me() -> None:
    """Stop this process, a fork, until its parent lets it run."""
    libc.ptrace(PTRACE_TRACEME, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)


def system_calls(pid: int) -> Generator[None, None, None]:
    """Run a traced process to its end; the beginning of each of its system calls comes by, with the process stopped.

    Between two system calls a process changes nothing outside of itself, so these are all the instants there are. It is
    killed if the caller comes no more.
    """
    os.waitpid(pid, 0)
    libc.ptrace(PTRACE_SETOPTIONS, pid, None, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL)
    pending, begins = 0, True  # each call stops at its beginning and at its end
    try:
        while True:
            libc.ptrace(PTRACE_SYSCALL, pid, None, pending)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSTOPPED(status):
                pid = 0
                return
            pending = os.WSTOPSIG(status)
            if pending == signal.SIGTRAP | 0x80:
                pending = 0
                if begins:
                    yield
                begins = not begins
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def kill_at(pid: int, number: int) -> bool:
    """Kill a traced process at the beginning of its system call `number`; False if it ended before."""
    with contextlib.closing(system_calls(pid)) as calls:
        return next(itertools.islice(calls, number, None), pid) is None


@contextlib.contextmanager
def foreign_changes(limit: float = 300) -> Iterator[None]:
    """Somebody else changes a table of their own without a pause, while the block runs and at most for `limit` s."""
    nft_script("add table inet other", "add chain inet other busy", "add set inet other ips { type ipv4_addr; }")
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(int(limit))
            context = nftables.Nftables()
            while True:
                context.cmd("add rule inet other busy counter; add element inet other ips { 192.0.2.1 }")
                context.cmd("flush chain inet other busy; flush set inet other ips")
        finally:
            os._exit(0)
    before = generation()
    try:
        yield
        until(lambda: generation() > before + 50)  # a busy host makes fewer in the same time
    finally:
        ended = os.waitpid(pid, os.WNOHANG)[0]
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert not ended and generation() > before + 50, "nothing was going on"


def in_own_mounts(script: str) -> tuple[str, ...]:
    """A command line that runs another after `script`, in a mount namespace of its own."""
    return "unshare", "-m", "--propagation", "private", "sh", "-ec", f'{script}\nexec "$@"', "sh"


_PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def adopted_orphans() -> Iterator[None]:
    """In the block, what this process's children leave running becomes its own child."""
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
