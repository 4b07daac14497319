"""The agent: how soon everything is back after a flush, what it uses, and what calls cost beside it."""
import contextlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

import lab
from lab.agent import Agent

from . import process
from .results import Key, Results, Sample, interleave
from .subjects import Node, Nodes, Subject, crowd, populate

WHAT = "1 TCP port, against the agent"
HEAL = "the agent, containers of two ports"
IDLE_SECONDS = 4
BACK, IDLE, MEMORY = ("all is back, from the beginning of the flush", "ms"), ("processor when idle", "%"), \
    ("memory after heals", "MB")
TARGETS = ((*BACK, 1000, 250), (*BACK, 10000, 1500), (*IDLE, 1000, 0.1), (*MEMORY, 1000, 45))  # at most


def beside(name: str) -> str:
    """The name of a subject that runs beside an agent."""
    return f"{name}, beside the agent"


def measure(subject: Subject, command: pathlib.Path, nodes: Nodes, results: Results, sizes: tuple[int, ...],
            rounds: int) -> None:
    """`command`: cni-portmap; `sizes`: numbers of containers that are healed."""
    both = subject, subject._replace(name=beside(subject.name))
    with contextlib.ExitStack() as stack:
        for size in 0, 1000:
            with nodes.of(both[1], size).namespace:
                stack.enter_context(Agent(command))
        interleave("beside the agent", [process.life(each, nodes, WHAT, process.ONE, size)
                                        for size in (0, 1000) for each in both], results, rounds * 3, 60)
    interleave("healing", [_heal(subject, command, size) for size in sizes], results, max(3, rounds // 3), 60)


def _heal(subject: Subject, command: pathlib.Path, size: int) -> Callable[[], Sample]:
    """A new agent each time: it answers the first deletions at once. Its first heal is of what it has read."""
    node = Node(f"healed{size}")
    with node.namespace:
        populate(subject, [each._replace(ports=(*each.ports, (30000 + i, 81))) for i, each in enumerate(crowd(size))])

    def key(measure: str, unit: str) -> Key:
        return Key(measure, HEAL, size, "agent", unit)

    def sample() -> Iterator[tuple[Key, float]]:
        with node.namespace:
            began = time.perf_counter()
            with Agent(command) as agent:
                yield key("start to READY", "ms"), (time.perf_counter() - began) * 1e3
                yield key("memory at the start", "MB"), agent.rss() / 1e6
                time.sleep(1)  # it looks at libcni's files
                used = _nanoseconds(agent)
                time.sleep(IDLE_SECONDS)
                yield key(*IDLE), (_nanoseconds(agent) - used) / IDLE_SECONDS / 1e7
                for number in 1, 2:
                    before, began = agent.cpu(), time.perf_counter()
                    lab.nft_script("flush ruleset")
                    yield key("nft flush ruleset", "ms"), (time.perf_counter() - began) * 1e3
                    while agent.log.count("map elements") < number:
                        time.sleep(0.001)
                    yield key(*BACK), (time.perf_counter() - began) * 1e3
                    lab.keep_conntrack()
                    time.sleep(0.5)
                    yield key("processor, with the search for stale flows", "ms"), (agent.cpu() - before) * 1e3
                yield key(*MEMORY), agent.rss() / 1e6
    return sample


def _nanoseconds(agent: Agent) -> int:
    """The processor's time that the agent itself has had."""
    return int(pathlib.Path(f"/proc/{agent.process.pid}/schedstat").read_text().split()[0])


def lines(results: Results) -> str:
    """A table: medians, with quartiles."""
    sizes = sorted({key.size for key in results if key.what == HEAL})
    text = ["", "## The agent", "", "| | " + " | ".join(f"{size:,} containers" for size in sizes) + " |",
            "|---|" + "---:|" * len(sizes)]
    for measure, unit in dict.fromkeys((key.measure, key.unit) for key in results if key.what == HEAL):
        found = [results.summary(Key(measure, HEAL, size, "agent", unit)) for size in sizes]
        text.append(f"| {measure}, {unit} | " + " | ".join(
            f"{its.median:.3g} <sub>{its.low:.3g}–{its.high:.3g}</sub>" if its else "" for its in found) + " |")
    text += ["", "| beside the agent / without | ratio (quartiles) |", "|---|---:|"]
    for ours in [key for key in results if key.what == WHAT and key.unit == "ms" and "processor" not in key.measure
                 and not key.subject.endswith("agent")]:
        ratios = [one / other for one, other in zip(results[ours._replace(subject=beside(ours.subject))], results[ours],
                                                    strict=False)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        text.append(f"| {ours.measure}, {ours.size:,} containers present | {median:.3f} ({low:.3f} to {high:.3f}) |")
    return "\n".join(text) + "\n"
