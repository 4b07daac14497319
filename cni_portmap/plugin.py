"""The plugin's process: one request of a runtime -> one verb -> one answer.

Most calls are for containers that publish nothing. They end here, with the kernel and nftables never loaded.
"""
from . import __version__, cni
from .config import parse, parse_valid_attachments

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable

    from .linux.kernel import Kernel

ABOUT = f"cni-portmap {__version__}: publishes container ports with nftables (CNI plugin portmap)"


_in_use: "list[Kernel]" = []  # until the process ends, see `main`


def _kernel() -> "Kernel":
    from .linux.kernel import Kernel
    _in_use.append(Kernel())
    return _in_use[-1]


# The newest version whose results look like those of another.
FORMS = {"0.1.0": "0.2.0", "0.2.0": "0.2.0", "0.3.0": "0.4.0", "0.3.1": "0.4.0", "0.4.0": "0.4.0", "1.0.0": "1.1.0",
         "1.1.0": "1.1.0"}


def _result(request: cni.Request) -> str:
    """ADD's result: prevResult in the form and with the number of the configuration's version.

    A prevResult of a version that nobody knows, or of none, has that form already.
    """
    version, previous = request.version, request.config["prevResult"]
    its = previous.get("cniVersion") if type(previous) is dict else None
    if its == version:
        return request.prev_result
    form = FORMS.get(its, FORMS[version]) if type(its) is str else FORMS[version]
    if form == FORMS[version]:
        return cni.with_version(request.prev_result, version)
    from .result import convert
    return convert(request.prev_result, form, FORMS[version], version)


def _add(request: cni.Request) -> str:
    attachment = parse(request)
    result = _result(request)
    if attachment.ports or attachment.exposure:
        from .verbs.add import add
        add(attachment, _kernel())
    return result


def _delete(request: cni.Request) -> None:
    from .verbs.delete import delete
    network = request.config.get("name")
    delete(request.container_id, request.ifname, network if type(network) is str else "", _kernel())


def _check(request: cni.Request) -> None:
    attachment = parse(request)
    if attachment.ports or attachment.exposure:
        from .verbs.check import check
        check(attachment, _kernel())


def _gc(request: cni.Request) -> None:
    network, valid = parse_valid_attachments(request)
    if valid is not None:
        from .verbs.gc import gc
        gc(network, valid, _kernel())


def _status(request: cni.Request) -> None:
    parse(request)
    from .verbs.status import status
    status(_kernel())


def _explaining(handler: "Callable[[cni.Request], str | None]") -> "Callable[[cni.Request], str | None]":
    def handle(request: cni.Request) -> str | None:
        try:
            return handler(request)
        except cni.ConfigError as error:
            from .explain import explain  # with jsonschema 70 ms, on this path only
            raise explain(request.config, error) from None
    return handle


HANDLERS = {"ADD": _explaining(_add), "DEL": _delete, "CHECK": _explaining(_check), "GC": _explaining(_gc),
            "STATUS": _explaining(_status)}


def main() -> None:
    """Answer the runtime and end the process, without the interpreter's own end (1 ms)."""
    import posix
    status = cni.serve(HANDLERS, ABOUT)
    try:
        for kernel in _in_use:
            kernel.leave()
    finally:
        posix._exit(status)  # whatever comes: the answer has been given
