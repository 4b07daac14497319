"""Metrics for Prometheus, by its text format: read from the kernel when asked, and nothing kept.

Source: prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4.
"""
import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterable

from ..cni import IO_FAILURE, CniError
from ..linux import read
from ..linux.kernel import Kernel
from ..verbs.published import connections, ranges
from .children import in_child

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_MAX, REQUEST_SECONDS = 8192, 5
ASKED_AT_ONCE = 4


def family(name: str, kind: str, text: str, samples: Iterable[tuple[dict[str, str], int]]) -> str:
    """One metric in the text format."""
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escape(word)}"' for label, word in labels.items())
        lines.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")
    return "\n".join(lines) + "\n"


def _escape(word: str) -> str:
    return word.replace("\\", r"\\").replace('"', r'\"').replace("\n", r"\n")


def document(counters: dict[str, tuple[str, int]]) -> str:
    """All metrics; `counters`: the agent's own, by name without `cni_portmap_`, each with its text."""
    lines, containers = connections(Kernel())
    parts = [family("cni_portmap_published_ports", "gauge", "Published host ports, by family and hostIP.",
                    [({}, sum(len(line.host_ports) for line in lines))]),
             family("cni_portmap_connections_total", "counter", "Connections to published ports.",
                    (({"network": line.network, "container": line.container_id, "interface": line.ifname,
                       "protocol": line.protocol, "host_ip": line.host_ip, "host_port": ranges(line.host_ports)},
                      line.connections) for line in lines if line.connections is not None)),
             family("cni_portmap_container_connections_total", "counter", "Connections to any port of a container.",
                    (({"network": owner.network, "container": owner.container_id, "interface": owner.ifname}, count)
                     for owner, count in containers))]
    parts += [family(f"cni_portmap_{name}", "counter", text, [({}, value)]) for name, (text, value) in counters.items()]
    for name, text, path in (("entries", "Flows that conntrack tracks in this network namespace.", "count"),
                             ("limit", "Flows that conntrack can track.", "max")):
        value = read(f"/proc/sys/net/netfilter/nf_conntrack_{path}", 32).strip()
        if value.isdigit():
            parts.append(family(f"cni_portmap_conntrack_{name}", "gauge", text, [({}, int(value))]))
    return "".join(parts)


class Server:
    """Answers GET /metrics by HTTP/1.0, on `unix:PATH` or HOST:PORT. `counters`: see `document`."""

    def __init__(self, address: str, counters: Callable[[], dict[str, tuple[str, int]]]) -> None:
        self.address, self._counters = address, counters
        self._asked = asyncio.Semaphore(ASKED_AT_ONCE)

    async def start(self) -> None:
        """Listen. Raises CniError."""
        try:
            if self.address.startswith("unix:"):
                sock = _unix_socket(self.address.removeprefix("unix:"))
                self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=REQUEST_MAX)
            else:
                host, _, port = self.address.rpartition(":")
                self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port), limit=REQUEST_MAX)
        except OSError as error:
            raise CniError(IO_FAILURE, f"cannot listen on {self.address} for metrics: {error.strerror or error}",
                           "choose another address with --metrics") from None

    def stop(self) -> None:
        """Listen no more."""
        self._server.close()
        if self.address.startswith("unix:"):
            with contextlib.suppress(OSError):
                os.unlink(self.address.removeprefix("unix:"))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                request = (await reader.readuntil(b"\n")).split()
                while (await reader.readuntil(b"\n")).strip():
                    pass
            status, text = await self._answer(request)
            body = text.encode()
            writer.write(f"HTTP/1.0 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
                         "Connection: close\r\n\r\n".encode() + (b"" if request[:1] == [b"HEAD"] else body))
            async with asyncio.timeout(REQUEST_SECONDS):
                await writer.drain()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            writer.transport.abort()  # whoever asked has gone, says nothing that ends, or does not read
        finally:
            writer.close()

    async def _answer(self, request: list[bytes]) -> tuple[str, str]:
        if len(request) != 3 or request[0] not in (b"GET", b"HEAD"):
            return "405 Method Not Allowed", "expected: GET /metrics\n"
        if request[1].partition(b"?")[0] != b"/metrics":
            return "404 Not Found", "expected: GET /metrics\n"
        async with self._asked:
            counters = self._counters()
            try:
                return "200 OK", await in_child("metrics", lambda: document(counters))
            except (CniError, OSError) as error:
                return "500 Internal Server Error", f"{getattr(error, 'msg', error)}\n"


def _unix_socket(path: str) -> socket.socket:
    """A listening socket that nobody but its owner may connect to; one that nobody listens on is replaced."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            try:
                sock.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            sock.close()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except FileNotFoundError:
        pass
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    return sock
