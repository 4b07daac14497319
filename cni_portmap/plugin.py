"""The plugin's process: one request of a runtime -> one verb -> one answer.

Most calls are for containers that publish nothing. They end here, with the kernel and nftables never loaded.
"""
from . import __version__, cni
from .config import parse, parse_valid_attachments

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from .kernel import Kernel

ABOUT = f"cni-portmap {__version__}: publishes container ports with nftables (CNI plugin portmap)"


_in_use: "list[Kernel]" = []  # until the process ends: see kernel.leave


def _kernel() -> "Kernel":
    from .kernel import Kernel
    _in_use.append(Kernel())
    return _in_use[-1]


def _add(request: cni.Request) -> str:
    attachment = parse(request)
    result = cni.with_version(request.prev_result, request.version)
    if attachment.ports:
        from . import portmap
        portmap.add(attachment, _kernel())
    return result


def _delete(request: cni.Request) -> None:
    from . import portmap
    portmap.delete(request.container_id, request.ifname, _kernel())


def _check(request: cni.Request) -> None:
    attachment = parse(request)
    if attachment.ports:
        from . import portmap
        portmap.check(attachment, _kernel())


def _gc(request: cni.Request) -> None:
    network, valid = parse_valid_attachments(request)
    if valid is not None:
        from . import portmap
        portmap.gc(network, valid, _kernel())


def _status(request: cni.Request) -> None:
    parse(request)
    from . import portmap
    portmap.status(_kernel())


HANDLERS = {"ADD": _add, "DEL": _delete, "CHECK": _check, "GC": _gc, "STATUS": _status}


def main() -> None:
    """Answer the runtime and end the process, without the interpreter's own end (1 ms)."""
    import posix
    status = cni.serve(HANDLERS, ABOUT)
    if _in_use:
        from .kernel import leave
        leave()
    posix._exit(status)
