"""The agent, while real firewalls and runtimes work beside it and somebody flushes."""
import contextlib
import subprocess

import lab
import pytest
from lab import TABLE
from lab.agent import Agent
from lab.containerd import RELEASES, Containerd, Sandbox
from lab.firewalld import Firewalld
from lab.machine import PLUGINS, UNPACKED, VERSIONS, Userland, flush_ruleset
from lab.paths import SETTINGS
from lab.podman import Podman
from lab.site import Site


# Only ours and one of its own: podman's other plugins fail where theirs go between two of their commands.
RELOAD = f"add table {TABLE}; delete table {TABLE}; delete table inet reloaded; add table inet reloaded"


@contextlib.contextmanager
def flushed_all_the_time():
    """Every 0.3 seconds somebody loads their rules again, and takes our table along, as long as the context lasts."""
    lab.nft_script("add table inet reloaded")
    with subprocess.Popen(["sh", "-c", f"while nft '{RELOAD}'; do sleep 0.3; done"]) as process:
        try:
            yield
        finally:
            process.terminate()
    lab.keep_conntrack()


def agent_of(bin_dir, machine):
    """An agent of the host, which is outside of the machine's PID and mount namespaces."""
    return Agent(bin_dir.parent / "sbin/cni-portmap", cache=machine.root / "var/lib/cni/results")


def test_firewalld(need, bin_dir):
    """A reload of firewalld's takes nothing of ours; after a flush the agent is first, and every path leads on"""
    need("/usr/lib/cni/bridge", "dbus-daemon", "dbus", "gi", UNPACKED / "firewalld")
    with Site(SETTINGS[0], bin_dir) as site, Userland("firewalld-agent", "firewalld") as machine, \
            Firewalld(machine) as firewalld, Agent(bin_dir.parent / "sbin/cni-portmap") as agent:
        VERSIONS[__name__].append(f"firewalld {machine.run('firewall-cmd', '--version').strip()}")
        before = lab.table()
        for command in "--reload", "--complete-reload":
            firewalld.command(command)
            assert lab.table() == before and "restored" not in agent.log
        lab.nft_script("flush ruleset")
        assert lab.until(lambda: lab.table() == before), agent.log
        firewalld.stop()  # it cannot reload: its own table has gone, too
        firewalld.start()
        lab.keep_conntrack()
        assert lab.table() == before and agent.log.count("map elements") == 1, agent.log
        assert site.differences() == {}


@pytest.fixture
def podman(podman_version):
    with Podman("podman-agent") as machine:
        yield machine
        machine.podman("rm", "-af", "-t", "0")


def test_podman(podman, bin_dir):
    """run, restart and rm while our table is deleted all the time: in the end what runs answers, and nothing else"""
    podman.start("-p", "8080:80", name="stays")
    with agent_of(bin_dir, podman) as agent:
        podman.start("-p", "8081:80", name="goes")
        with flushed_all_the_time():
            podman.start("-p", "8082:80", name="comes")
            podman.podman("rm", "-f", "-t", "0", "goes")
            podman.podman("restart", "-t", "0", "stays")
        ids = [podman.podman("inspect", "--format", "{{.Id}}", name) for name in ("stays", "comes")]
        assert lab.until(lambda: lab.chains() == sorted(f"c/{each}/eth0" for each in ids), 60), agent.log
        assert podman.answers(8080, name="stays") and podman.answers(8082, name="comes")
        flush_ruleset()
        assert lab.until(lambda: podman.answers(8080, name="stays"), 60), agent.log  # heals wait for 15 s by now


@pytest.fixture(params=RELEASES)
def node(need, messages, request):
    need(f"{RELEASES[request.param]}/containerd", "runc", "busybox", f"{PLUGINS}/bridge")
    with Containerd(request.param, messages, name="containerd-agent") as node:
        VERSIONS[__name__].append(node.cri("Version")["runtime_version"])
        yield node
        node.stop()


def test_containerd(node, bin_dir):
    """Pods come and go while our table is deleted all the time: in the end what runs answers, and nothing else"""
    stays = Sandbox(node, "stays", (8080, 80, "TCP", ""))
    with agent_of(bin_dir, node) as agent:
        goes = Sandbox(node, "goes", (8081, 80, "TCP", ""))
        with flushed_all_the_time():
            comes = Sandbox(node, "comes", (8082, 80, "TCP", ""))
            goes.stop()
            again = Sandbox(node, "again", (8081, 80, "TCP", ""))
        pods = stays, comes, again
        assert lab.until(lambda: lab.chains() == sorted(f"c/{pod.id}/eth0" for pod in pods), 60), agent.log
        assert stays.answers(8080) and comes.answers(8082) and again.answers(8081)
        for pod in pods:
            pod.stop()
        assert lab.until(lambda: not lab.chains()), agent.log
