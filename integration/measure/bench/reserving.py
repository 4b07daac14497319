"""What one ADD costs the agent that holds a socket for each of many published ports."""
import contextlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator

import lab
from lab import Pod
from lab.agent import Agent

from cni_portmap import cni, config, ruleset
from cni_portmap.linux.kernel import Kernel

from .results import Key, Results, interleave

WHAT = "1 TCP port, beside many that are reserved"
SECONDS = 11  # after an ADD: its socket comes after 3, and libcni's file is looked for after 2 and 10
FIRST = 10000


def _pod(index: int) -> Pod:
    return Pod(f"pod{index}", f"{FIRST + index}:80", ips=(f"10.20.{index // 256}.{index % 256}/8",),
               netns="/run/netns/all")


def measure(host: lab.Host, results: Results, ports: int, rounds: int) -> None:
    """The agent's processor time of one ADD, beside `ports` containers of a port each, with libcni's files."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(lab.fresh_host())
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        inode, kernel = os.stat(lab.Namespace("all").path).st_ino, Kernel()
        pods = [_pod(index) for index in range(ports)]
        with kernel.lock():
            kernel.transact(ruleset.base({name: ruleset.shared_rules(name, []) for name in ruleset.SHARED}))
            for start in range(0, ports, 1000):
                kernel.transact("".join(_text(pod, inode, folder) for pod in pods[start:start + 1000]))
        kernel.close()
        agent = stack.enter_context(Agent(host.cli, "--reserve", cache=folder))
        assert lab.until(lambda: len(lab.run("ss", "-Hlnt4").splitlines()) >= ports, 60), agent.log
        time.sleep(SECONDS)  # what begins with the agent has ended

        def sample() -> Iterator[tuple[Key, float]]:
            web = Pod("web", "80:80")
            before = _cpu(agent)
            host.add(web)
            time.sleep(SECONDS)
            yield Key("CPU of the agent for an ADD", WHAT, ports, "agent --reserve"), (_cpu(agent) - before) * 1e3
            host.delete(web)
        interleave("reserving", [sample], results, rounds, 120)


def lines(results: Results) -> str:
    """A table of what it costs."""
    text = ["", "## An ADD, beside many reserved ports", "",
            "| | ports reserved | median | most |", "|---|---|---|---|"]
    text += [f"| {key.measure}, {key.unit} | {key.size:,} | {results.median(key):.1f} | {max(results[key]):.1f} |"
             for key in results if key.what == WHAT]
    return "\n".join(text) + "\n"


def _text(pod: Pod, inode: int, folder: pathlib.Path) -> str:
    (folder / f"{pod.network}-{pod.id}-{pod.ifname}").write_text("{}")
    found = config.parse(cni.Request("ADD", "1.1.0", pod.environ("X"), json.loads(pod.stdin("ADD")), "{}"))
    found.inode = inode
    return ruleset.attach(found)


def _cpu(agent: Agent) -> float:
    """The seconds of processor time of an agent's threads (schedstat) and of its children that ended."""
    process = pathlib.Path(f"/proc/{agent.process.pid}")
    own = sum(int(path.read_text().split()[0]) for path in process.glob("task/*/schedstat"))
    children = process.joinpath("stat").read_text().rpartition(")")[2].split()[13:15]
    return own / 1e9 + sum(map(int, children)) / os.sysconf("SC_CLK_TCK")
