"""The plugin's process: one request of a runtime -> one verb -> one answer.

Most calls are for containers that publish nothing. They end here, with the kernel and nftables never loaded.
"""
from . import __version__, cni
from .config import parse, parse_valid_attachments

ABOUT = f"cni-portmap {__version__}: publishes container ports with nftables (CNI plugin portmap)"


def _add(request: cni.Request) -> str:
    attachment = parse(request)
    result = cni.with_version(request.prev_result, request.version)
    if attachment.ports:
        from . import kernel, portmap
        portmap.add(attachment, kernel.Kernel())
    return result


def _delete(request: cni.Request) -> None:
    from . import kernel, portmap
    portmap.delete(request.container_id, request.ifname, kernel.Kernel())


def _check(request: cni.Request) -> None:
    attachment = parse(request)
    if attachment.ports:
        from . import kernel, portmap
        portmap.check(attachment, kernel.Kernel())


def _gc(request: cni.Request) -> None:
    network, valid = parse_valid_attachments(request)
    if valid is not None:
        from . import kernel, portmap
        portmap.gc(network, valid, kernel.Kernel())


def _status(request: cni.Request) -> None:
    parse(request)
    from . import kernel, portmap
    portmap.status(kernel.Kernel())


HANDLERS = {"ADD": _add, "DEL": _delete, "CHECK": _check, "GC": _gc, "STATUS": _status}


def main() -> None:
    """Answer the runtime and end the process, without the interpreter's own end (1 ms)."""
    import posix
    import sys
    status = cni.serve(HANDLERS, ABOUT)
    kernel = sys.modules.get(f"{__package__}.kernel")
    if kernel:
        kernel.leave()
    posix._exit(status)
