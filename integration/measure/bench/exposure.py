"""The cost of a policy: calls and new connections with one, against the same without."""
import statistics
import time
from collections.abc import Callable, Iterator

from . import process
from .packets import NODE_IP, Traffic
from .results import Key, Results, Sample, interleave
from .subjects import Nodes, Subject, crowd

POLICY = (("gatewayModeV4", "nat"), ("gatewayModeV6", "nat"))
WHAT = "1 TCP port, against a policy"
CONNECTIONS, SECONDS = 2000, 0.5  # of one sample, whichever comes first


def with_policy(subject: Subject) -> Subject:
    """The same subject, whose containers have a policy."""
    return subject._replace(name=f"{subject.name}, mode nat", keys=POLICY)


def measure(subject: Subject, nodes: Nodes, results: Results, sizes: tuple[int, ...], crowds: tuple[int, ...],
            rounds: int) -> None:
    cells: list[Callable[[], Sample]] = []
    both = subject, with_policy(subject)
    for size in sizes:
        cells += (process.life(each, nodes, WHAT, process.ONE, size) for each in both)
    for size in crowds:
        cells += (_connects(Traffic(nodes.of(each, size)), each.name, size) for each in both)
    interleave("exposure", cells, results, rounds, 120)


def _connects(traffic: Traffic, subject: str, size: int) -> Callable[[], Sample]:
    """The tenth percentile of connect(2), which neighbours on the machine disturb least."""
    port = crowd(size)[-1].ports[0][0]

    def sample() -> Iterator[tuple[Key, float]]:
        times: list[float] = []
        end = time.monotonic() + SECONDS
        while len(times) < CONNECTIONS and time.monotonic() < end:
            times += traffic.connects(NODE_IP, port, traffic.web, 100)
        yield Key("connect, p10", WHAT, size, subject, "µs"), statistics.quantiles(times, n=10)[0] / 1e3
    return sample
