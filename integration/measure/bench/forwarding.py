"""What NAT cannot do: IPv6 clients of a container without IPv6, by the agent and by docker-proxy (docker.io)."""
import contextlib
import os
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import lab
from lab.agent import Agent
from lab.calls import mapping
from lab.libcni_cache import Cache

from .results import Key, Results, Sample, interleave

PACKAGE = "docker.io"
HOST6 = "fd09::1"
PORTS = {"agent": 8080, "docker-proxy": 8090}
CONNECTIONS, PINGS, SECONDS = 300, 1000, 1.0
WHAT = "TCP, IPv6 to IPv4"


def _serve(listener: socket.socket) -> None:
    """Answer as the first byte of a connection asks: C close, P ping, S swallow. Never returns."""
    import threading

    def converse(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            kind, buffer = connection.recv(1), bytearray(1 << 18)
            while kind != b"C" and (size := connection.recv_into(buffer)):
                if kind == b"P":
                    connection.sendall(buffer[:size])
            if kind == b"S":
                connection.sendall(b".")
    while True:
        threading.Thread(target=converse, args=(listener.accept()[0],), daemon=True).start()


def measure(root: pathlib.Path, command: pathlib.Path, bin_dir: pathlib.Path, results: Results, rounds: int) -> None:
    """Both forward to the same server, in turn. `root`: where docker.io is unpacked; `command`: cni-portmap."""
    proxy = next(path for path in root.rglob("docker-proxy") if path.is_file())
    with contextlib.ExitStack() as stack:
        stack.enter_context(lab.fresh_host())
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lan = lab.wire("lan", ("192.168.9.1/24", f"{HOST6}/64"), ("192.168.9.2/24", "fd09::2/64"))
        stack.callback(lan.remove)
        network = lab.Network(lab.bridge_conflist(subnets=("10.88.0.0/16",)), bin_dir)
        box = lab.Container(network, "box", [mapping(f"{PORTS['agent']}:80")])
        stack.callback(box.remove)
        Cache(folder).remember(box)
        with box:
            listener = socket.create_server(("", 80), backlog=1024)
        server = os.fork()
        if not server:
            _serve(listener)
        stack.callback(lambda: (os.kill(server, 9), os.waitpid(server, 0)))
        listener.close()
        stack.enter_context(Agent(command, "--forward", cache=folder))
        words = ["sh", "-c", 'exec "$@" 3>/dev/null', "sh", proxy,  # its status goes to descriptor 3
                 "-proto", "tcp", "-host-ip", "::", "-host-port", str(PORTS["docker-proxy"]),
                 "-container-ip", box.ipv4, "-container-port", "80"]
        docker = subprocess.Popen([str(word) for word in words])
        stack.callback(lambda: (docker.kill(), docker.wait()))
        for port in PORTS.values():
            assert lab.until(lambda port=port: f":{port}" in lab.run("ss", "-Hlnt6"), 20), port  # type: ignore[misc]
        cells = [_cell(name, lan, port) for name, port in PORTS.items()]
        interleave("forwarding", cells, results, rounds, 120)


def _connect(lan: lab.Namespace, port: int, kind: bytes) -> socket.socket:
    with lan:
        sock = socket.create_connection((HOST6, port), 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(kind)
    return sock


def _cell(name: str, lan: lab.Namespace, port: int) -> Callable[[], Sample]:
    def sample() -> Iterator[tuple[Key, float]]:
        with _connect(lan, port, b"S") as sock:
            block, size, began = bytes(1 << 20), 0, time.monotonic()
            while time.monotonic() - began < SECONDS:
                sock.sendall(block)
                size += len(block)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
            yield Key("throughput", WHAT, 0, name, "Gbit/s"), size * 8e-9 / (time.monotonic() - began)
        with _connect(lan, port, b"P") as sock:
            times = []
            for _ in range(PINGS):
                began_ns = time.monotonic_ns()
                sock.sendall(b"!")
                sock.recv(1)
                times.append((time.monotonic_ns() - began_ns) / 1e3)
            cuts = statistics.quantiles(times, n=100)
            yield Key("round trip, p50", WHAT, 0, name, "µs"), cuts[49]
            yield Key("round trip, p99", WHAT, 0, name, "µs"), cuts[98]
        began = time.monotonic()
        for _ in range(CONNECTIONS):
            with _connect(lan, port, b"C") as sock:
                sock.recv(1)
        yield Key("connections", WHAT, 0, name, "1/s"), CONNECTIONS / (time.monotonic() - began)
    return sample


def lines(results: Results) -> str:
    """A table of both, and the ratio of each round: its median and quartiles."""
    text = ["", "## Forwarding what NAT cannot, beside docker-proxy", "",
            "| | agent | docker-proxy | ratio (quartiles) |", "|---|---|---|---|"]
    for ours in [key for key in results if key.what == WHAT and key.subject == "agent"]:
        theirs = ours._replace(subject="docker-proxy")
        ratios = [one / other for one, other in zip(results[ours], results[theirs], strict=False)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        text.append(f"| {ours.measure}, {ours.unit} | {results.median(ours):.1f} | {results.median(theirs):.1f} | "
                    f"{median:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(text) + "\n"
