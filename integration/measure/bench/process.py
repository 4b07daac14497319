"""The plugin as a process: how long a call takes, what it needs, and what it costs many connections or calls."""
import os
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator

import lab
from cni_portmap.linux import alive

from . import subjects
from .results import Key, Results, Sample, interleave
from .subjects import Nodes, Published, Subject, TimedCall

NONE = Published("measured", "10.88.255.2", ())
ONE = subjects.shifted(1)
DUAL = ONE._replace(ip6="fd88::ff02")
FLOOR = "python3 -IS -c pass"
SLOW = 5000  # ms; an ADD that takes longer has no CHECK after it
AT_ONCE = 50
FLOWS = 100_000


def life(subject: Subject, nodes: Nodes, what: str, container: Published, size: int = 0) -> Callable[[], Sample]:
    """A container's ADD, CHECK and DEL on a node with `size` others."""
    node = nodes.of(subject, size)
    calls = [(verb, TimedCall.of(subject, verb, container)) for verb in subject.verbs]

    def sample() -> Iterator[tuple[Key, float]]:
        with node.namespace:
            slow = False
            for verb, call in calls:
                if not (slow and verb == "CHECK"):
                    took, cpu = call.run()
                    slow = took > SLOW
                    yield Key(verb, what, size, subject.name), took
                    yield Key(f"{verb}, processor", what, size, subject.name), cpu
    return sample


def single(subject: Subject, nodes: Nodes, verb: str) -> Callable[[], Sample]:
    call, node = TimedCall.of(subject, verb, NONE, "1.1.0" if verb == "STATUS" else "1.0.0"), nodes.of(subject, 0)

    def sample() -> Iterator[tuple[Key, float]]:
        with node.namespace:
            yield Key(verb, "", 0, subject.name), call.run()[0]
    return sample


def floor() -> Sample:
    """The time of the interpreter before any of our lines."""
    yield Key(FLOOR, "", 0, ""), TimedCall(["/usr/bin/python3", "-IS", "-c", "pass"]).run()[0]


def measure(everybody: list[Subject], nodes: Nodes, results: Results, sizes: tuple[int, ...], ports: tuple[int, ...],
            rounds: int, seconds: float, only: "set[Key] | None" = None) -> None:
    """The calls of each subject; `only`: what has one of these keys (of any verb)."""
    asked = None if only is None else {key._replace(measure="") for key in only}
    cells: list[Callable[[], Sample]] = []  # no two of a subject in a row: an ADD waits for what a DEL leaves behind

    modern = [subject for subject in everybody if not subject.old]
    quick = [subject for subject in modern if subject.backend != "iptables"]  # that one takes a minute for 1,000 ports

    def lives(of: list[Subject], what: str, container: Published, size: int = 0) -> None:
        cells.extend(life(subject, nodes, what, container, size) for subject in of
                     if asked is None or Key("", what, size, subject.name) in asked)

    for subject in everybody:
        cells.extend([floor] * (asked is None or Key("", "", 0, "") in asked))
        lives([subject], "no ports", NONE)
    lives(everybody, "1 TCP port", ONE)
    lives(everybody, "1 UDP port", ONE._replace(protocol="udp"))
    lives(modern, "1 TCP port, IPv4 and IPv6", DUAL)
    for size in sizes:
        lives(everybody, "1 TCP port", ONE, size)
    lives(modern, "no ports", NONE, sizes[-1])
    for count in ports:
        lives(modern, f"{count:,} identity ports", subjects.identity(count))
        lives(quick if count > 100 else modern, f"{count:,} shifted ports", subjects.shifted(count))
    lives(quick, f"{ports[-1]:,} identity ports, UDP", subjects.identity(ports[-1], "udp"))
    if asked is None:
        cells.extend(single(subject, nodes, "VERSION") for subject in everybody)
        cells.extend(single(subject, nodes, "STATUS") for subject in modern)
    interleave("process", cells, results, rounds, seconds)


def at_once(everybody: list[Subject], nodes: Nodes, results: Results, rounds: int) -> None:
    """Many containers that start, and later end, at the same time."""
    containers = [Published(f"burst{i}", f"10.88.254.{i + 2}", ((31000 + i, 80),)) for i in range(AT_ONCE)]

    def burst(subject: Subject) -> Callable[[], Sample]:
        node = nodes.of(subject, 0)
        calls = {verb: [TimedCall.of(subject, verb, each) for each in containers] for verb in ("ADD", "DEL")}

        def sample() -> Iterator[tuple[Key, float]]:
            for verb in "ADD", "DEL":
                with node.namespace, pathlib.Path("/dev/null").open("w") as nowhere:
                    start = time.perf_counter()
                    pids = [call.start(nowhere.fileno()) for call in calls[verb]]
                    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
                    took = (time.perf_counter() - start) * 1e3
                failed = sum(status != 0 for status in statuses)
                yield Key(verb, f"{AT_ONCE} at once", 0, subject.name), took
                yield Key(f"{verb}, failed", f"{AT_ONCE} at once", 0, subject.name, "calls"), failed
        return sample
    interleave("at once", [burst(subject) for subject in everybody], results, rounds, 60)


FOREIGN = -2  # the "number of containers" of a node with somebody's large set


def networks_beside(count: int) -> str:
    """What is measured beside a set of so many networks, which is somebody else's."""
    return f"1 TCP port, beside {count:,} networks"


def beside(everybody: list[Subject], nodes: Nodes, results: Results, networks: int, rounds: int) -> None:
    """ADD, ADD again and DEL on a node where another table has a set of many networks (a GeoIP list), and without."""
    def one(subject: Subject, size: int) -> Callable[[], Sample]:
        node, what = nodes.of(subject, size), networks_beside(networks if size else 0)
        again = [] if subject.backend else [("ADD again", "ADD")]  # the reference plugin would add its rules again
        calls = [(name, TimedCall.of(subject, verb, ONE)) for name, verb in (("ADD", "ADD"), *again, ("DEL", "DEL"))]

        def sample() -> Iterator[tuple[Key, float]]:
            with node.namespace:
                for name, call in calls:
                    yield Key(name, what, 0, subject.name), call.run()[0]
        return sample
    for subject in everybody:
        with nodes.of(subject, FOREIGN).namespace:
            elements = ", ".join(f"{10 + i // 65536}.{i // 256 % 256}.{i % 256}.0-{10 + i // 65536}.{i // 256 % 256}."
                                 f"{i % 256}.200" for i in range(networks))
            lab.nft_script(f"table inet geoip {{ set networks {{ type ipv4_addr; flags interval; "
                           f"elements = {{ {elements} }}; }}; }}")
    interleave("beside", [one(subject, size) for size in (0, FOREIGN) for subject in everybody], results, rounds, 60)


def addresses(ours: Subject, nodes: Nodes, results: Results, count: int, rounds: int) -> None:
    """ADD of a port on many addresses, and how much longer another container's ADD takes meanwhile."""
    many = Published("many", "10.88.255.4", ((8080, 80),),
                     host_ips=tuple(f"198.{18 + i // 62500}.{i // 250 % 250}.{i % 250 + 1}" for i in range(count)))
    what, node = f"a port on {count:,} addresses", nodes.of(ours, 0)
    big, other = ([TimedCall.of(ours, verb, each) for verb in ("ADD", "DEL")] for each in (many, ONE))

    def sample() -> Iterator[tuple[Key, float]]:
        with node.namespace, pathlib.Path("/dev/null").open("w") as nowhere:
            yield Key("ADD", what, 0, ours.name), big[0].run()[0]
            big[1].run()
            alone, meanwhile = other[0].run()[0], 0.0
            other[1].run()
            pid = big[0].start(nowhere.fileno())
            while not os.waitpid(pid, os.WNOHANG)[0]:
                meanwhile = max(meanwhile, other[0].run()[0])
                other[1].run()
            big[1].run()
            yield Key("ADD of another meanwhile, longer by", what, 0, ours.name), meanwhile - alone
    interleave("addresses", [sample], results, rounds, 60)


def conntrack(everybody: list[Subject], nodes: Nodes, results: Results, rounds: int) -> None:
    """One UDP port on a node with many connections. Conntrack is one table for the whole machine: one node for all."""
    node = nodes.of(None, 1)
    limit = int(pathlib.Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text())
    flows = min(FLOWS, limit * 3 // 4)
    with node.namespace:
        subjects.connect(flows)
        there = int(pathlib.Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())
        assert there >= flows, f"only {there} connections of {flows}"

    def one(subject: Subject) -> Callable[[], Sample]:
        calls = [(verb, TimedCall.of(subject, verb, ONE._replace(protocol="udp"))) for verb in ("ADD", "DEL")]

        def sample() -> Iterator[tuple[Key, float]]:
            with node.namespace:
                for verb, call in calls:
                    yield Key(verb, f"1 UDP port, {flows:,} connections", 0, subject.name), call.run()[0]
        return sample
    interleave("conntrack", [one(subject) for subject in everybody], results, rounds, 30)


JUDGED = 10_000


def judging(results: Results, rounds: int) -> None:
    """To look who lives, where no link says so, on a host with many processes."""
    crowd = [subprocess.Popen(["sleep", "1000"]) for _ in range(JUDGED)]
    try:
        for _ in range(rounds):
            began = time.perf_counter()
            alive.Sight()
            results.take([(Key("who lives", f"{JUDGED:,} processes", 0, "cni-portmap"),
                           (time.perf_counter() - began) * 1000)])
    finally:
        for process in crowd:
            process.kill()
        for process in crowd:
            process.wait()


# --- memory, instructions -------------------------------------------------------------------------------------

_SHIM = """#!/bin/sh
/usr/bin/time -q -f %M -a -o "$PEAKS" {tool} "$@"
status=$?
sed -n 's/^VmHWM:[^0-9]*\\([0-9]*\\).*/+\\1/p' /proc/$PPID/status >>"$PEAKS"
exit $status
"""


def memory(everybody: list[Subject], nodes: Nodes, results: Results, sizes: tuple[int, ...], ports: int) -> None:
    """Peak resident memory: the plugin's process and the largest child that ran beside it."""
    shims, peaks = pathlib.Path("/run/bench-shims"), pathlib.Path("/run/bench-peaks")
    shims.mkdir()
    for tool in "nft", "iptables", "ip6tables":
        if path := shutil.which(tool):
            (shims / tool).write_text(_SHIM.format(tool=path))
            (shims / tool).chmod(0o755)
    environ = {"PATH": f"{shims}:{subjects.ENVIRON['PATH']}", "PEAKS": str(peaks)}
    cases = [("1 TCP port", ONE, size) for size in (0, *sizes)]
    cases.append((f"{ports:,} identity ports", subjects.identity(ports), 0))
    for what, container, size in cases:
        for subject in everybody:
            if subject.root != "/" or subject.backend == "iptables" and len(container.ports) > 100:
                continue
            with nodes.of(subject, size).namespace:
                for verb in subject.verbs * 3:
                    peaks.write_text("")
                    call = TimedCall.of(subject, verb, container)
                    call.wrapped("/usr/bin/time", "-q", "-f", "=%M", "-a", "-o", str(peaks), **environ).run()
                    results.take([(Key(f"{verb}, peak memory", what, size, subject.name, "MiB"),
                                   _peak(peaks.read_text()) / 1024)])


def _peak(text: str) -> int:
    """KiB, from lines `child`, `+parent` (pairs), and `=all`: the largest process."""
    *lines, last = text.split()
    pairs = zip(lines[::2], lines[1::2])
    return max(int(last[1:]), *(int(child) + int(parent[1:]) for child, parent in pairs), 0)


def instructions(everybody: list[Subject], nodes: Nodes, results: Results) -> None:
    """Millions of instructions of a call and its children: counted by the processor, or else by valgrind."""
    by_processor = _by_perf(TimedCall(["/bin/true"])) > 0
    for subject in everybody:
        if subject.root != "/" or subject.backend == "iptables" and not by_processor:
            continue  # valgrind takes half a minute with iptables
        for what, container in ("no ports", NONE), ("1 TCP port", ONE):
            with nodes.of(subject, 0).namespace:
                for verb in subject.verbs:
                    call = TimedCall.of(subject, verb, container)
                    count = _by_perf(call) if by_processor else _by_valgrind(call)
                    results.take([(Key(f"{verb}, instructions", what, 0, subject.name, "million"), count / 1e6)])


def _by_perf(call: TimedCall) -> int:
    """Instructions of a call; 0 where there is no perf, or the (virtual) processor does not count for us."""
    perf, output = shutil.which("perf"), pathlib.Path("/run/bench-perf")
    if not perf:
        return 0
    call.wrapped(perf, "stat", "-x,", "-e", "instructions:u", "-o", str(output)).run()
    return sum(int(line.partition(",")[0]) for line in output.read_text().splitlines() if line[:1].isdigit())


def _by_valgrind(call: TimedCall) -> int:
    logs = pathlib.Path("/run/bench-valgrind")
    logs.mkdir(exist_ok=True)
    call.wrapped("/usr/bin/valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null",
                 "--trace-children=yes", f"--log-file={logs}/%p").run()
    total = 0
    for log in logs.iterdir():
        found = re.search(r"I +refs: +([\d,]+)", log.read_text())
        total += int(found[1].replace(",", "")) if found else 0
        log.unlink()
    return total
