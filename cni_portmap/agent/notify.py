"""Tells systemd how the agent does. Source: sd_notify(3)."""
import os
import socket


def notify(*lines: str) -> bool:
    """Send lines such as READY=1 to the service manager, if one started this process and wants to know.

    Never waits: False where that is not possible at the moment, as the manager has too many messages to read.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return True
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError:  # no descriptor is free
        return False
    with sock:
        try:
            sock.sendto("\n".join(lines).encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        except BlockingIOError:
            return False
        except OSError:  # it may be starting again; then there is nobody to tell
            pass
    return True


def watchdog_seconds() -> float:
    """How often to say WATCHDOG=1, in seconds: twice in the time that systemd gives; 0 for never."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() else 0
