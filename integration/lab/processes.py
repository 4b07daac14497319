"""Other programs, and the C library's functions that Python has not."""
import ctypes
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:  # where this is no test: measure/, scripts/bench
    sys.path.insert(0, str(ROOT))
os.environ["PATH"] += ":/usr/sbin:/sbin"  # where nft and others are, and a plain su does not look
libc = ctypes.CDLL(None, use_errno=True)


def succeed(result: int) -> None:
    """Raise OSError for the result of a function of `libc` that failed."""
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def run(*command: object, input: str | None = None, check: bool = True, timeout: float = 300) -> str:
    """Run a command; its output. A failure names the command and what it printed."""
    done = subprocess.run([str(word) for word in command], input=input, text=True, capture_output=True,
                          timeout=timeout, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def until(condition: Callable[[], object], seconds: float = 30) -> bool:
    """Wait for what happens in somebody else's time and has no signal; whether it happened in time."""
    end = time.monotonic() + seconds
    while True:
        is_late = time.monotonic() > end  # before the last look: this process may be late, too
        if condition():
            return True
        if is_late:
            return False
        time.sleep(0.01)
