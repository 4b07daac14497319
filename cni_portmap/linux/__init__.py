"""The only folder that makes system calls.

It knows how, and nothing of what: texts come from `ruleset`, decisions from `verbs`. Every failure leaves it as one
CniError that says what to do.
"""
import posix

from ..cni import IO_FAILURE, CniError

# errno(3): numbers of x86 and arm, as of most others; the module of that name costs 0.08 ms.
EPERM, ENOENT, ESRCH, EINTR, ENXIO, EACCES, EBUSY, EEXIST, ENODEV, ENOTDIR = 1, 2, 3, 4, 6, 13, 16, 17, 19, 20
EINVAL, ENFILE, EMFILE, ENOSPC, EROFS, ENAMETOOLONG = 22, 23, 24, 28, 30, 36
EBADMSG, ERESTART, EMSGSIZE, EOPNOTSUPP, EAFNOSUPPORT, EADDRINUSE, ENETUNREACH, EHOSTUNREACH = (
    74, 85, 90, 95, 97, 98, 101, 113)

HINTS = {
    EPERM: "run it as root, with CAP_NET_ADMIN in the network namespace of the host",
    ENOENT: "the kernel may lack nf_tables; try: modprobe nf_tables",
    EACCES: "run it as root",
    ENFILE: "too many files are open on this host; raise fs.file-max",
    EMFILE: "the runtime's limit of open files is too low; raise it",
    EMSGSIZE: "too many ports for a socket's buffer here; publish fewer, or raise net.core.wmem_max",
    ENOSPC: "no space left on the device",
    EROFS: "the file system is read-only; mount it read-write for the plugin",
}


def system_error(what: str, error: OSError) -> CniError:
    """The CniError for a system call that failed."""
    why = posix.strerror(error.errno) if error.errno else str(error)
    return CniError(IO_FAILURE, f"{what}: {why}", HINTS.get(error.errno or 0, ""))


def read(path: str, size: int = 1) -> bytes:
    """The first bytes of a file, b"" if there is no such file. Raises OSError."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return posix.read(fd, size)
    finally:
        posix.close(fd)
