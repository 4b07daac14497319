#!/usr/bin/python3
"""Measure what a node with 110 pods costs, and simulate roll-outs to 500: the tables of docs/scale.md. As root.

    CNI_PORTMAP_BUNDLE=cni-portmap-VERSION integration/measure/scale.py [--write]

With a bundle, as the image has it; without, of this checkout, and then no installer is measured. In a network of its
own, with a bridge and real containers' links. A roll-out cannot be measured on one machine: see roll_outs.py.
"""
import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab.agent import Agent
from lab.runtime import BUNDLE
from measure import roll_outs

DOCUMENT = lab.ROOT / "docs/scale.md"
PODS = 110
ROUNDS = 21


def ports(index: int) -> list[dict[str, object]]:
    """The host ports of a pod: one of TCP, one of UDP."""
    return [{"hostPort": 20000 + index, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 20000 + index, "containerPort": 53, "protocol": "udp"}]


def timed(*command: object, stdin: str = "", **environ: str) -> tuple[float, float]:
    """The seconds that a command that succeeds takes, and those of CPU time."""
    began = time.monotonic()
    process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environ})
    assert process.stdin
    process.stdin.write(stdin.encode())
    process.stdin.close()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime


class Node:
    """A host with a bridge network; `containers`: those of pods that run."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.bin_dir = lab.install(folder / "bin")
        self.network = lab.Network(lab.bridge_conflist(), self.bin_dir)
        self.containers: list[lab.Container] = []

    def fill(self) -> None:
        """Start as many pods as a node may have."""
        self.containers += [lab.Container(self.network, f"pod{index}", ports(index)) for index in range(PODS)]

    def calls(self) -> dict[str, tuple[float, float]]:
        """The median seconds, and those of CPU time, of a call for one more pod; by verb."""
        pod = lab.Container(self.network, "measured", ports(PODS))
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(ROUNDS):
            for verb in "CHECK", "DEL", "ADD":
                found.setdefault(verb, []).append(self._call(verb, pod, ports(PODS)))
            for verb in "ADD", "DEL":
                found.setdefault(f"{verb}, no ports", []).append(self._call(verb, pod, ()))
        pod.remove()
        return {verb: (statistics.median(seconds for seconds, _ in its), statistics.median(cpu for _, cpu in its))
                for verb, its in found.items()}

    def _call(self, verb: str, pod: lab.Container, its: object) -> tuple[float, float]:
        config = self.network.config(its, pod.result)
        if not its:
            config.pop("runtimeConfig", None)
        return timed(self.bin_dir / "portmap", stdin=json.dumps(config), CNI_COMMAND=verb,
                     CNI_CONTAINERID=pod.id if its else "none", CNI_NETNS=pod.namespace.path, CNI_IFNAME="eth0",
                     CNI_PATH=str(self.bin_dir))

    def all_at_once(self) -> float:
        """The seconds until the ports of all pods are published, if all ADDs begin at once, as after a reboot."""
        lab.nft("delete", "table", "inet", "cni_portmap")
        began = time.monotonic()
        running = []
        for index, pod in enumerate(self.containers):
            process = subprocess.Popen(
                [str(self.bin_dir / "portmap")], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                env={"PATH": "/usr/sbin:/usr/bin", "CNI_COMMAND": "ADD", "CNI_CONTAINERID": pod.id,
                     "CNI_IFNAME": "eth0", "CNI_NETNS": pod.namespace.path, "CNI_PATH": str(self.bin_dir)})
            assert process.stdin
            process.stdin.write(json.dumps(self.network.config(ports(index), pod.result)).encode())
            process.stdin.close()
            running.append(process)
        assert not any(process.wait() for process in running)
        return time.monotonic() - began


def agent(node: Node, folder: pathlib.Path) -> dict[str, str]:
    """What the agent costs with all pods."""
    metrics = folder / "metrics"
    with Agent(node.bin_dir.parent / "sbin/cni-portmap", "--gc-seconds", 60, "--metrics", f"unix:{metrics}") as it:
        begun = it.cpu()
        time.sleep(10)
        idle = it.cpu() - begun
        scrapes = [timed("curl", "-s", "--unix-socket", metrics, "-o", folder / "scrape", "http://x/metrics")[0]
                   for _ in range(ROUNDS)]
        cpu = (it.cpu() - begun - idle) / ROUNDS
        text = (folder / "scrape").read_bytes()
        rss = it.rss()
        began = time.monotonic()
        lab.nft("flush", "ruleset")
        assert it.logs("restored")
        healed = time.monotonic() - began
        return {"resident memory at the start, after a heal": f"{rss / 1e6:.0f} MB, {it.rss() / 1e6:.0f} MB",
                "CPU when idle, in 10 s": f"{idle:.2f} s",
                "a scrape": f"{statistics.median(scrapes) * 1000:.0f} ms, {cpu * 1000:.0f} ms of CPU",
                "metrics": f"{len(text) / 1000:.0f} KB, "
                           f"{sum(1 for line in text.splitlines() if not line.startswith(b'#'))} series",
                "all ports are back after `nft flush ruleset` begins": f"{healed:.2f} s"}


def installer(folder: pathlib.Path) -> dict[str, str]:
    """What the container `install` costs; with a bundle only."""
    if not BUNDLE:
        return {}
    words = [f"{BUNDLE}/cni-portmap", "node-install", "--bin-dir", str(folder / "node")]
    (folder / "node").mkdir()
    took, _ = timed(*words)
    checks = [timed(*words, "--check") for _ in range(ROUNDS)]
    process = subprocess.Popen([*words, "--watch"], stdout=subprocess.DEVNULL)

    def cpu() -> float:
        fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    time.sleep(2)
    begun = cpu()
    time.sleep(10)
    watching = cpu() - begun
    rss = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    process.terminate()
    process.wait()
    size = sum(path.stat().st_size for path in pathlib.Path(BUNDLE).rglob("*") if path.is_file())
    return {"installation on a node": f"{took:.2f} s",
            "watching: CPU in 10 s": f"{watching:.2f} s", "watching: resident memory": f"{rss / 1e6:.0f} MB",
            "a readiness check": f"{statistics.median(each for each, _ in checks) * 1000:.0f} ms, "
                                 f"{statistics.median(each for _, each in checks) * 1000:.0f} ms of CPU",
            "a version on a node": f"{size / 1e6:.1f} MB"}


def measured() -> tuple[list[str], list[str]]:
    """The tables of calls and of what goes on all the time."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        lab.enter()
        node = Node(folder)
        empty = node.calls()
        node.fill()
        full = node.calls()
        together = node.all_at_once()
        rows = [f"| | on an empty node | with {PODS} pods |", "|---|---|---|"]
        rows += [f"| {verb} | {empty[verb][0] * 1000:.1f} ms, {empty[verb][1] * 1000:.1f} ms of CPU | "
                 f"{full[verb][0] * 1000:.1f} ms, {full[verb][1] * 1000:.1f} ms of CPU |" for verb in full]
        rows.append(f"| {PODS} ADDs at once | | {together:.2f} s for all |")
        costs = ["| | |", "|---|---|"]
        costs += [f"| agent: {what} | {value} |" for what, value in agent(node, folder).items()]
        costs += [f"| installer: {what} | {value} |" for what, value in installer(folder).items()]
        return rows, costs


def main() -> None:
    """Print the tables, or write them into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scale.md")
    options = parser.parse_args()
    calls, costs = measured()
    about = f"Kernel {platform.release().split('-')[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}:\n"
    tables = {"calls": [about, *calls], "costs": costs, "roll-outs": roll_outs.table()}
    text = DOCUMENT.read_text() if options.write else ""
    for name, rows in tables.items():
        block = "\n".join(rows)
        if options.write:
            text, count = re.subn(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda found: found[1] + block + found[2],  # noqa: B023
                                  text, flags=re.DOTALL)
            assert count == 1, name
        else:
            print(f"{block}\n")
    if options.write:
        DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
