"""containerd, by way of CRI, as Kubernetes uses it."""
import contextlib
import json
import subprocess
from types import ModuleType
from typing import Any

import lab
import pytest
from lab.cri import DEFINITION, Cri, compile_messages
from lab.machine import (CLIENT_IP, HOST_IP, NEWER_PLUGINS, PLUGINS, UNPACKED, VERSIONS, Machine, flush_ruleset,
                         shown_in)

RELEASES = {"1.6": "/usr/bin", "2": UNPACKED / "containerd-2/usr/bin"}
VERSION = {"1.6": "1.0.0", "2": "1.1.0"}  # of CNI, the newest that each speaks
CONF = """
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:latest"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
"""
COMMANDS = """
dpkg-divert --rename --add /usr/lib/cni/portmap
scripts/install --bin-dir /usr/lib/cni
install -D -m 644 conf/kubernetes/10-bridge.conflist /etc/cni/net.d/10-bridge.conflist
"""
UNDO = """
scripts/install --uninstall --bin-dir /usr/lib/cni
dpkg-divert --rename --remove /usr/lib/cni/portmap
"""
BREAKER = """#!/bin/sh
# A plugin at the end of the chain, whose ADD fails as long as a file exists.
case $CNI_COMMAND in
    VERSION) echo '{"cniVersion": "1.1.0", "supportedVersions": ["1.0.0", "1.1.0"]}' ;;
    ADD) [ ! -e /run/machine/broken ] || { echo '{"cniVersion": "1.0.0", "code": 100, "msg": "broken"}'; exit 1; }
         exec /usr/bin/python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))' ;;
esac
"""


class Containerd(Machine):
    """A machine with containerd, a pause image and a dual-stack network."""

    def __init__(self, release: str, messages: ModuleType) -> None:
        super().__init__(f"containerd-{release}", COMMANDS, NEWER_PLUGINS if release == "2" else PLUGINS)
        self.release, self._messages = release, messages

    def prepare(self) -> None:
        conflist = self.json("cat", "/etc/cni/net.d/10-bridge.conflist")
        conflist["cniVersion"] = VERSION[self.release]
        conflist["plugins"].append({"type": "breaker"})
        conflist["plugins"][0]["ipMasq"] = False  # after nft flush ruleset, its own DEL would fail
        self.write("/etc/cni/net.d/10-bridge.conflist", json.dumps(conflist))
        self.write("/usr/lib/cni/breaker", BREAKER)
        self.run("chmod", "755", "/usr/lib/cni/breaker")
        self.write("/etc/containerd/config.toml", CONF)
        self.start()
        self.load(f"{RELEASES[self.release]}/ctr -n k8s.io images import", "localhost/pause:latest", "sleep", "100000")
        assert lab.until(lambda: self.cri("ImageStatus", "ImageService", image={"image": "localhost/pause:latest"}))

    def start(self) -> None:
        """Start containerd, and wait for it."""
        self.write("/usr/local/sbin/start", f"PATH={RELEASES[self.release]}:$PATH; echo $$ >/run/containerd.pid; "
                                            f"exec containerd")
        with open(f"/run/machine/{self.name}.log", "ab") as log:
            self._daemon = subprocess.Popen(self.command("sh", "/usr/local/sbin/start"), stdout=log, stderr=log)
        self.cri = Cri("/run/containerd/containerd.sock", self._messages)

    def stop(self) -> None:
        self.cri.close()
        self.run("sh", "-c", "kill $(cat /run/containerd.pid)")
        self._daemon.wait(timeout=60)

    def conditions(self) -> dict[str, dict[str, Any]]:
        """RuntimeReady and NetworkReady, as the kubelet asks for them."""
        return {each["type"]: each for each in self.cri("Status")["status"]["conditions"]}


class Sandbox:
    """A pod sandbox. `ports`: (host port, container port, protocol, hostIP)."""

    def __init__(self, node: Containerd, name: str, *ports: tuple[int, int, str, str]) -> None:
        self.node, self.name = node, name
        mappings = [{"host_port": host_port, "container_port": port, "protocol": protocol, "host_ip": host_ip}
                    for host_port, port, protocol, host_ip in ports]
        self.id: str = node.cri("RunPodSandbox", config={
            "metadata": {"name": name, "uid": name, "namespace": "default"}, "hostname": name,
            "port_mappings": mappings, "linux": {}})["pod_sandbox_id"]

    @property
    def inside(self) -> lab.Netns:
        info = json.loads(self.node.cri("PodSandboxStatus", pod_sandbox_id=self.id, verbose=True)["info"]["info"])
        return lab.Netns(next(each["path"] for each in info["runtimeSpec"]["linux"]["namespaces"]
                            if each["type"] == "network"))

    def stop(self) -> None:
        self.node.cri("StopPodSandbox", pod_sandbox_id=self.id)

    def answers(self, port: int = 8080) -> bool:
        """Whether the pod's server answers on the node's addresses, and sees the client's own."""
        with lab.Server(self.name, self.inside, 80):
            return [lab.exchange(self.node.client, HOST_IP[family], port) for family in (4, 6)] == \
                [lab.Saw(self.name, CLIENT_IP[family], 80) for family in (4, 6)]


@pytest.fixture(scope="module")
def messages(need, tmp_path_factory):
    pytest.importorskip("grpc")
    need("protoc", DEFINITION)
    return compile_messages(tmp_path_factory.mktemp("cri"))


@pytest.fixture(scope="module", params=RELEASES)
def node(need, messages, request):
    need(f"{RELEASES[request.param]}/containerd", "runc", "busybox", f"{PLUGINS}/bridge")
    if request.param == "2":
        need(NEWER_PLUGINS / "bridge")
    with Containerd(request.param, messages) as node:
        VERSIONS[__name__].append(node.cri("Version")["runtime_version"])
        yield node
        node.stop()


@pytest.fixture
def clean(node):
    """When a test's pods are removed, nothing of them is left in our table."""
    yield
    for pod in node.cri("ListPodSandbox").get("items", ()):
        node.cri("StopPodSandbox", pod_sandbox_id=pod["id"])
        node.cri("RemovePodSandbox", pod_sandbox_id=pod["id"])
    assert "c/" not in lab.table()


def test_without_ports(node, clean):
    """A pod without ports: no table is made"""
    Sandbox(node, "web").stop()
    assert lab.table() == ""


class TestPaths:
    """One pod with every kind of published port."""

    @pytest.fixture(scope="class")
    def gateways(self, node):
        pod = Sandbox(node, "web", (8080, 80, "TCP", ""), (8081, 80, "TCP", "127.0.0.1"), (8082, 80, "TCP", "::1"),
                  (8083, 80, "TCP", HOST_IP[4]), (8084, 80, "TCP", "0.0.0.0"), (5353, 53, "UDP", ""),
                  (9090, 90, "SCTP", ""))
        with lab.Server("web", pod.inside, 80), lab.Server("web", pod.inside, 53, "udp"):
            yield ["10.244.0.1", "fd44::1"]
        pod.stop()

    @pytest.mark.parametrize(("source", "ip", "port", "protocol", "seen"), [
        ("client", HOST_IP[4], 8080, "tcp", CLIENT_IP[4]),
        ("client", HOST_IP[6], 8080, "tcp", CLIENT_IP[6]),
        ("host", HOST_IP[4], 8080, "tcp", HOST_IP[4]),
        ("host", "127.0.0.1", 8080, "tcp", "gateway"),
        ("host", "::1", 8080, "tcp", "gateway"),
        ("host", "127.0.0.1", 8081, "tcp", "gateway"),
        ("client", HOST_IP[4], 8081, "tcp", "nobody"),
        ("host", "::1", 8082, "tcp", "gateway"),
        ("client", HOST_IP[4], 8083, "tcp", CLIENT_IP[4]),
        ("host", "127.0.0.1", 8083, "tcp", "nobody"),
        ("client", HOST_IP[4], 8084, "tcp", CLIENT_IP[4]),
        ("client", HOST_IP[6], 8084, "tcp", "nobody"),
        ("client", HOST_IP[4], 5353, "udp", CLIENT_IP[4]),
        ("client", HOST_IP[6], 5353, "udp", CLIENT_IP[6]),
        ("client", HOST_IP[4], 5353, "tcp", "nobody"),
    ])
    def test_path_leads_where_it_should(self, node, gateways, source, ip, port, protocol, seen):
        """hostPort: whom the server sees"""
        assert node.whom_server_sees(source, ip, port, protocol) in (gateways if seen == "gateway" else [seen])

    def test_sctp_is_published(self, node, gateways):
        """hostPort of SCTP: published"""
        assert {line["protocol"] for line in node.json("cni-portmap", "list", "--json", "--port", "9090")} == {"sctp"}


@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("bridged", [False, True], ids=["alone", "with br_netfilter"])
def test_one_port_number_has_three_owners(node, clean, family, bridged):
    """Kubernetes' hostPort conformance test: one port number, three pods, hostIP and protocol differ"""
    if not lab.br_netfilter(bridged):
        pytest.skip("no br_netfilter in this kernel: modprobe br_netfilter")
    localhost = {4: "127.0.0.1", 6: "::1"}[family]
    node_ip = HOST_IP[family]
    pods = [Sandbox(node, "pod1", (54323, 8080, "TCP", localhost)),
            Sandbox(node, "pod2", (54323, 8080, "TCP", node_ip)),
            Sandbox(node, "pod3", (54323, 8080, "UDP", node_ip))]
    with contextlib.ExitStack() as stack:
        for pod in pods:
            for protocol in "tcp", "udp":
                stack.enter_context(lab.Server(pod.name, pod.inside, 8080, protocol))
        stack.callback(lab.br_netfilter, False)
        answers = [lab.exchange(lab.HOST, localhost, 54323, source=node_ip),
                   lab.exchange(lab.HOST, node_ip, 54323), lab.exchange(lab.HOST, node_ip, 54323, "udp")]
    assert [saw and saw.server for saw in answers] == ["pod1", "pod2", "pod3"]


def test_a_second_claim_is_refused(node, clean):
    """A second pod with the port is refused, with the owner's name; the first is unharmed"""
    import grpc
    first = Sandbox(node, "first", (8080, 80, "TCP", ""))
    before = lab.table()
    with pytest.raises(grpc.RpcError) as refused:
        Sandbox(node, "second", (8080, 80, "TCP", ""))
    assert f"tcp port 8080 on 0.0.0.0 is already published by pod default/first, container {first.id}" \
        in refused.value.details()
    assert lab.table() == before
    assert first.answers()


def test_stop_again(node, clean):
    """StopPodSandbox, again and again, and RemovePodSandbox: no error, nothing is left"""
    pod = Sandbox(node, "web", (8080, 80, "TCP", ""))
    for _ in range(3):
        pod.stop()
        assert "c/" not in lab.table()


def test_namespace_gone(node, clean):
    """The pod's network namespace vanishes: StopPodSandbox leaves nothing"""
    pod = Sandbox(node, "web", (8080, 80, "TCP", ""))
    path = pod.inside.path
    node.run("umount", "-l", path)
    node.run("rm", path)
    pod.stop()
    assert "c/" not in lab.table()


def test_later_plugin_fails(node, clean):
    """A plugin after ours fails: the pod fails, its port is free"""
    import grpc
    node.write("/run/machine/broken", "")
    with pytest.raises(grpc.RpcError) as failed:
        Sandbox(node, "first", (8080, 80, "TCP", ""))
    node.run("rm", "/run/machine/broken")
    assert "broken" in failed.value.details()
    assert "c/" not in lab.table()
    assert Sandbox(node, "second", (8080, 80, "TCP", "")).answers()


def test_pods_answer_while_containerd_restarts(node, clean):
    """containerd restarts: live pods answer meanwhile and afterwards, and can be stopped"""
    pod, stays = Sandbox(node, "web", (8080, 80, "TCP", "")), Sandbox(node, "stays", (8090, 80, "TCP", ""))
    where = pod.inside
    with lab.Server("web", where, 80):
        node.stop()
        assert lab.exchange(node.client, HOST_IP[4], 8080) == lab.Saw("web", CLIENT_IP[4], 80)
        node.start()
    assert pod.answers()
    pod.stop()
    assert stays.answers(8090)
    assert "8080" not in lab.table()


def test_ports_come_back_after_a_flush(node, clean):
    """nft flush ruleset, then cni-portmap restore: it answers again"""
    pod = Sandbox(node, "web", (8080, 80, "TCP", ""), (8081, 80, "TCP", "127.0.0.1"))
    flush_ruleset()
    assert not pod.answers()
    node.run("cni-portmap", "restore")
    assert pod.answers()
    assert lab.table().count("8081") == 2


def test_status_makes_the_network_not_ready(node, clean):
    """libnftables cannot be loaded: NetworkReady is false, with our reason (from containerd 2, by CNI's STATUS)"""
    assert node.conditions()["NetworkReady"]["status"]
    library = node.run("sh", "-c", "readlink -f /usr/lib/*/libnftables.so.1").strip()
    node.run("mount", "--bind", "/dev/null", library)
    try:
        network = node.conditions()["NetworkReady"]
    finally:
        node.run("umount", library)
    if node.release == "1.6":
        assert network["status"]
    else:
        assert not network.get("status")
        assert "cannot load libnftables" in network["message"]
    assert node.conditions()["NetworkReady"]["status"]


def test_documented_commands(node, clean):
    """The commands in docs/kubernetes.md, which have installed what was tested here; undone"""
    pod = Sandbox(node, "web", (8080, 80, "TCP", ""))
    assert pod.answers()
    pod.stop()
    node.shell(UNDO)
    assert "CNI portmap plugin" in node.shell("/usr/lib/cni/portmap 2>&1")  # the reference plugin's greeting
    assert shown_in("docs/kubernetes.md", COMMANDS)
    assert shown_in("docs/kubernetes.md", UNDO)
