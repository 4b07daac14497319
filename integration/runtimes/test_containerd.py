"""containerd, by way of CRI, as Kubernetes uses it."""
import contextlib

import lab
import pytest
from lab.containerd import COMMANDS, RELEASES, Containerd, Sandbox
from lab.machine import CLIENT_IP, HOST_IP, NEWER_PLUGINS, PLUGINS, VERSIONS, flush_ruleset, shown_in

UNDO = """
scripts/install --uninstall --bin-dir /usr/lib/cni
dpkg-divert --rename --remove /usr/lib/cni/portmap
"""


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
        node.cri("RemovePodSandbox", pod_sandbox_id=pod.id)  # its name is another's then

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
        expected = gateways if seen == "gateway" else [seen]
        assert node.whom_server_sees(source, ip, port, protocol, seen != "nobody") in expected

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
