"""Transactions, by libnftables: nft text -> the kernel, all of it or nothing.

Its Python binding imports json and os for calls that we never make; two stand-ins save those 8 ms.
Source: libnftables(3), nftables.py of the package python3-nftables.
"""
import posix
import sys

from .. import see_packages
from ..cni import IO_FAILURE, NFT_REFUSED, CniError, give_up, is_serving

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from nftables import Nftables


class Libnftables:
    """A context of libnftables. `fd`: its netlink socket, -1 if that is not known."""

    def __init__(self) -> None:
        see_packages()
        try:
            nftables = import_lightly("nftables")
            sys.unraisablehook = _say_nothing  # its __del__ complains where its __init__ has failed
            if is_serving():
                _answer_if_it_exits()
            free = posix.open("/", posix.O_RDONLY | posix.O_CLOEXEC)
            posix.close(free)
            self._nft: Nftables = nftables.Nftables()
            self.fd = free if is_socket(free) else -1  # a new descriptor gets the lowest free number
        except (ImportError, OSError, AttributeError) as error:
            raise CniError(IO_FAILURE, f"cannot load libnftables: {error}",
                           "install the package python3-nftables") from None

    def run(self, text: str, dry: bool = False) -> str:
        """Run nft commands, a line each, as one transaction; the reason nft or the kernel rejects it, "" for none.

        `dry`: nothing is written.
        """
        self._nft.set_dry_run(dry)
        commands = text.splitlines()
        code, _, error = self._nft.cmd(";".join(commands))  # one line: nft's errors count columns, not lines
        if not code:
            return ""
        message, _, rest = error.partition("\n")
        carets = next((line for line in rest.splitlines() if line and not line.strip(" ^~")), "")
        at = len(carets) - len(carets.lstrip())
        for command in commands:
            if at <= len(command):
                break
            at -= len(command) + 1
        return f"{message.rpartition('Error: ')[2]}, in: {command[:200]}"


def is_socket(fd: int) -> bool:
    """Whether a descriptor is open, and a socket."""
    try:
        return posix.fstat(fd).st_mode & 0o170000 == 0o140000
    except OSError:
        return False


_modules: "dict[str, object]" = sys.modules  # type: ignore[assignment]  # any object can be one


class _StandIn:
    """Stands for a module until something is asked of it that is not among what is `known` of it."""

    __spec__ = None  # import asks for this

    def __init__(self, module: str, /, **known: object) -> None:
        self._module = module
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> object:
        self.step_aside()
        return getattr(__import__(self._module), name)

    def step_in(self) -> None:
        """Install the stand-in, unless the module is loaded."""
        _modules.setdefault(self._module, self)

    def step_aside(self) -> None:
        """Remove the stand-in."""
        if _modules.get(self._module) is self:
            del _modules[self._module]


def import_lightly(name: str) -> "ModuleType":
    """nftables or ctypes, less 8 ms: the one imports json, the other os, for calls that we never make."""
    later = _StandIn("json"), _StandIn("os", name="posix", fspath=posix.fspath)
    for module in later:
        module.step_in()
    try:
        return __import__(name)
    finally:
        for module in later:
            module.step_aside()


def _say_nothing(_: object) -> None:
    pass


def _answer_if_it_exits() -> None:
    """libnftables ends the process where it gets no socket or no memory; the runtime shall have its answer even so.

    on_exit(3) is called by exit(3) only: this plugin itself ends with _exit.
    """
    if not _at_exit:
        error = CniError(NFT_REFUSED, "libnftables exited unexpectedly; see stderr", "no changes were made")
        _at_exit.append(on_exit(lambda: give_up(error)))


_at_exit: list[object] = []  # kept for as long as C may call it

# What Python has not of the C library: the bundle has it in C, with the binding of libnftables (packaging/native.c).
if hasattr(sys, "frozen"):
    import nftables
    on_exit, unshare, setns = nftables.on_exit, nftables.unshare, nftables.setns
else:
    def on_exit(call: "Callable[[], object]") -> object:
        """Let exit(3) call a function at the end; what has to be kept until then."""
        import ctypes
        kept = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(lambda *_: call())
        ctypes.CDLL(None).on_exit(kept, None)
        return kept

    def unshare(flags: int) -> None:
        """Leave namespaces for new ones, as os does it from Python 3.12 on. Raises OSError."""
        _libc("unshare", flags)

    def setns(fd: int, flags: int) -> None:
        """Enter a namespace, as os does it from Python 3.12 on. Raises OSError."""
        _libc("setns", fd, flags)

    def _libc(function: str, *arguments: int) -> None:
        ctypes = import_lightly("ctypes")
        if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
            code = ctypes.get_errno()
            raise OSError(code, posix.strerror(code))
