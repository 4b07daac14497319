"""The socket by which the agent is known: one agent for each network namespace, and what others ask it.

It is a file in /run, which only root can write: nobody else can take its name, answer in the agent's place, or ask. A
lock says whether an agent runs, and not the socket, which stays behind where the agent was killed.
"""
import contextlib
import json
import os
import socket
import struct
from typing import Any

from . import system_error
from .kernel import Lock

SECONDS = 3


def _path() -> str:
    """The beginning of the files' names, for this network namespace."""
    return f"/run/cni-portmap-agent-{os.stat('/proc/thread-self/ns/net').st_ino}"


class Name:
    """The name of the agent of this network namespace, taken. `socket`: where it is asked, listening."""

    def __init__(self, lock: Lock, sock: socket.socket, path: str) -> None:
        self._lock, self.socket, self._path = lock, sock, path

    def close(self) -> None:
        """Give it up."""
        self.socket.close()
        for path in self._path, self._lock.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._lock.release()


def take() -> "Name | None":
    """Take the agent's name; None where another process has it. Raises CniError."""
    try:
        path = _path()
    except OSError as error:
        raise system_error("cannot see this process's network namespace", error) from None
    lock = Lock(f"{path}.lock")
    if not (lock.attempt() or lock.attempt()):  # the first may be that of one that ends just now
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}.socket")
        sock.bind(f"{path}.socket")
        sock.listen()
    except OSError as error:
        sock.close()
        lock.release()
        raise system_error(f"cannot listen on {path}.socket", error) from None
    finally:
        os.umask(before)
    return Name(lock, sock, f"{path}.socket")


def _connected(sock: socket.socket) -> bool:
    sock.settimeout(SECONDS)
    try:
        sock.connect(f"{_path()}.socket")
    except OSError:
        return False
    return True


def ask(word: str) -> "dict[str, Any] | None":
    """The agent's answer to "status", "resume" or "yield ..."; None where none runs in this network namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        if not _connected(sock):
            return None
        try:
            sock.sendall(f"{word}\n".encode())
            answer = b""
            while chunk := sock.recv(1 << 16):
                answer += chunk
            found = json.loads(answer)
        except (OSError, ValueError):
            return None
    return found if isinstance(found, dict) else None


def is_healing() -> bool:
    """Whether an agent runs in this network namespace, and restores what others delete."""
    return not (ask("status") or {"resting": True})["resting"]


def holder() -> int:
    """The PID of the process that has the name; 0 for none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        if not _connected(sock):
            return 0
        return int(struct.unpack("=iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def yields(family: int, protocol: str, host_ip: str, host_port: int) -> bool:
    """Whether the agent was all that used a port, and has let go of it: it holds ports only for those who publish."""
    words = ask(f"yield {family} {protocol} {host_ip or '*'} {host_port}")
    return bool(words and words.get("yielded"))
