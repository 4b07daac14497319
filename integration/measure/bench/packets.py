"""The cost of a packet: new connections to published and unpublished ports, and a connection that lasts."""
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator

from .results import Key, Results, Sample, interleave
from .subjects import Node, Nodes, Published, Subject, TimedCall, crowd

NODE_IP, CONTAINER_IP, PORT, SERVICE, UDP_PORT = "192.0.2.1", "10.88.0.2", 80, 79, 9999
NO_NAT = "no NAT"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close without TIME_WAIT
CONNECTIONS, SECONDS = 1000, 0.25  # of one sample, whichever comes first


class Traffic:
    """The sockets of a node's servers, and a client that talks to them, all in this process: nobody has to wake up."""

    def __init__(self, node: Node) -> None:
        self.node = node
        with node.container:
            self.web = _listen(PORT)
            self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.udp.bind(("", PORT))
        with node.namespace:
            self.service = _listen(SERVICE)

    def connect(self, ip: str, port: int, server: socket.socket) -> tuple[float, float]:
        """Microseconds that connect(2) takes (median), and connections per second, set-up and end included."""
        times: list[int] = []
        with self.node.client:
            start = time.perf_counter()
            while len(times) < CONNECTIONS and time.perf_counter() - start < SECONDS:
                with socket.socket() as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    before = time.perf_counter_ns()
                    client.connect((ip, port))
                    times.append(time.perf_counter_ns() - before)
                    server.accept()[0].close()
            took = time.perf_counter() - start
        return statistics.median(times) / 1e3, len(times) / took

    def connects(self, ip: str, port: int, server: socket.socket, count: int) -> list[int]:
        """Nanoseconds that each of so many connect(2) takes."""
        times: list[int] = []
        with self.node.client:
            for _ in range(count):
                with socket.socket() as client:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    before = time.perf_counter_ns()
                    client.connect((ip, port))
                    times.append(time.perf_counter_ns() - before)
                    server.accept()[0].close()
        return times

    def first_packet(self, ip: str, port: int) -> float:
        """Microseconds from sending a flow's first packet until the server has it (median)."""
        times: list[int] = []
        with self.node.client:
            start = time.perf_counter()
            while len(times) < CONNECTIONS and time.perf_counter() - start < SECONDS:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    before = time.perf_counter_ns()
                    client.sendto(b"?", (ip, port))
                    self.udp.recv(16)
                    times.append(time.perf_counter_ns() - before)
        return statistics.median(times) / 1e3

    def throughput(self, ip: str, port: int, seconds: float = 0.5) -> float:
        """Gbit/s of one TCP connection."""
        with self.node.client:
            client = socket.create_connection((ip, port))
        server = self.web.accept()[0]
        received, done = 0, False

        def send() -> None:
            data = bytes(1 << 20)
            while not done:
                client.sendall(data)
            client.close()

        thread = threading.Thread(target=send)
        thread.start()
        buffer = bytearray(1 << 20)
        start = time.perf_counter()
        while (took := time.perf_counter() - start) < seconds:
            received += server.recv_into(buffer)
        done = True
        while server.recv_into(buffer):
            pass
        thread.join()
        server.close()
        return received * 8 / took / 1e9


def _listen(port: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("", port))
    server.listen(1024)
    return server


def measure(everybody: list[Subject], nodes: Nodes, results: Results, sizes: tuple[int, ...], rounds: int) -> None:
    cells: list[Callable[[], Sample]] = []

    def cell(traffic: Traffic, subject: str, size: int, ip: str, port: int, udp_port: int) -> Callable[[], Sample]:
        def sample() -> Iterator[tuple[Key, float]]:
            for what, latency, rate in (("published", *traffic.connect(ip, port, traffic.web)),
                                        ("not published", *traffic.connect(NODE_IP, SERVICE, traffic.service))):
                yield Key("connect", what, size, subject, "µs"), latency
                yield Key("connections", what, size, subject, "1/s"), rate
            yield Key("UDP first packet", "published", size, subject, "µs"), traffic.first_packet(ip, udp_port)
            if size in (0, sizes[-1]):
                yield Key("throughput", "published", size, subject, "Gbit/s"), traffic.throughput(ip, port)
        return sample

    bare = Traffic(nodes.of(None, 0))
    for size in sizes:
        # No NAT is what all are compared with, so it is measured as often as they are.
        cells.append(cell(bare, NO_NAT, 0, CONTAINER_IP, PORT, PORT))
        for subject in everybody:
            node = nodes.of(subject, size)
            _publish_udp(subject, node)
            cells.append(cell(Traffic(node), subject.name, size, NODE_IP, crowd(size)[-1].ports[0][0], UDP_PORT))
    interleave("packets", cells, results, rounds, 60)


def _publish_udp(subject: Subject, node: Node) -> None:
    """One UDP port more, the last that was published."""
    with node.namespace:
        TimedCall.of(subject, "ADD", Published("udp", CONTAINER_IP, ((UDP_PORT, PORT),), "udp")).run()
