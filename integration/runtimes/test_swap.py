"""The reference plugin is exchanged for this one, and back, under real runtimes whose containers go on running."""
import time

import lab
import pytest
from lab.containerd import RELEASES, Containerd, Sandbox
from lab.machine import HOST_IP, NEWER_PLUGINS, PLUGINS, VERSIONS, shown_in
from lab.podman import Podman
from lab.reference import traces

ADOPT = """
cni-portmap adopt --dry-run
cni-portmap adopt
cni-portmap list
"""
PODMAN = "scripts/install --bin-dir /usr/local/lib/cni\n"
PODMAN_BACK = """
rm /usr/local/lib/cni/portmap
podman network reload --all
cni-portmap release
scripts/install --uninstall --bin-dir /usr/local/lib/cni
"""
CONTAINERD = """
dpkg-divert --rename --add /usr/lib/cni/portmap
scripts/install --bin-dir /usr/lib/cni
"""
CONTAINERD_BACK = """
rm /usr/lib/cni/portmap
dpkg-divert --rename --remove /usr/lib/cni/portmap
cni-portmap release
scripts/install --uninstall --bin-dir /usr/lib/cni
"""


def test_the_documented_commands():
    """Those of docs/upgrade.md."""
    for commands in PODMAN + ADOPT, PODMAN_BACK, CONTAINERD + ADOPT, CONTAINERD_BACK:
        assert shown_in("docs/upgrade.md", commands.replace("\n\n", "\n"))


@pytest.fixture
def podman(podman_version):
    with Podman("podman-swap", "true") as machine:
        yield machine
        machine.podman("rm", "-af", "-t", "0")


def test_podman(podman):
    """podman: exchange, stop of one container, adopt, and the way back"""
    podman.start("-p", "8080:80", "-p", "5353:53/udp")
    stopped = podman.start("-p", "8090:80", name="stopped")
    podman.start("-p", "8070:80", name="reloaded")
    assert podman.answers() and traces(stopped)
    said = podman.shell(PODMAN)
    assert "cni-portmap adopt takes them over" in said and lab.table() == ""
    podman.podman("stop", "-t", "0", "stopped")
    assert not traces(stopped, "8090")
    podman.podman("network", "reload", "reloaded")
    assert not traces("8070") and podman.answers(8070, name="reloaded")
    with lab.Server("web", podman.inside(), 80), lab.connecting(podman.client, 8080, *HOST_IP.values()):
        said = podman.shell(ADOPT)
        time.sleep(0.2)
    assert "\n1 adopted, 0 removed, 0 left\n" in said and "0.0.0.0:8080/tcp" in said
    assert not traces("8080", "5353") and podman.answers() and podman.answers(8070, name="reloaded")
    said = podman.shell(PODMAN_BACK)
    assert "2 released, 0 kept" in said and lab.table() == ""
    assert podman.answers() and podman.answers(8070, name="reloaded") and traces("8080")


@pytest.fixture(params=RELEASES)
def node(need, messages, request):
    need(f"{RELEASES[request.param]}/containerd", "runc", "busybox", f"{PLUGINS}/bridge")
    if request.param == "2":
        need(NEWER_PLUGINS / "bridge")
    conflist = "install -D -m 644 conf/kubernetes/10-bridge.conflist /etc/cni/net.d/10-bridge.conflist"
    with Containerd(request.param, messages, conflist) as node:
        VERSIONS[__name__].append(node.cri("Version")["runtime_version"])
        yield node
        for pod in node.cri("ListPodSandbox").get("items", ()):
            node.cri("StopPodSandbox", pod_sandbox_id=pod["id"])
            node.cri("RemovePodSandbox", pod_sandbox_id=pod["id"])
        node.stop()


def test_containerd(node):
    """containerd: exchange, stop of one pod, adopt, and the way back"""
    web, stopped = Sandbox(node, "web", (8080, 80, "TCP", ""), (5353, 53, "UDP", "")), \
        Sandbox(node, "stopped", (8090, 80, "TCP", ""))
    assert web.answers() and traces(stopped.id, "8090")
    assert "cni-portmap adopt takes them over" in node.shell(CONTAINERD)
    stopped.stop()
    assert not traces(stopped.id, "8090")
    after = Sandbox(node, "after", (8090, 80, "TCP", ""))
    assert after.answers(8090) and not traces("8090")
    with lab.Server("web", web.inside, 80), lab.connecting(node.client, 8080, *HOST_IP.values()):
        said = node.shell(ADOPT)
        time.sleep(0.2)
    assert "\n1 adopted, 0 removed, 0 left\n" in said
    assert not traces("8080", "5353") and web.answers()
    commands = CONTAINERD_BACK.partition("cni-portmap release")[0]
    node.shell(commands)
    for pod in web, after:
        pod.stop()
    again = Sandbox(node, "again", (8080, 80, "TCP", ""))
    assert traces("8080")
    node.shell(CONTAINERD_BACK.removeprefix(commands))
    assert again.answers() and lab.table() == ""
