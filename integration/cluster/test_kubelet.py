"""The kubelet alone, with static pods."""
import lab
import pytest
from lab.kubernetes import HOST_PORTS, WEB, Kubelet, host_ports_answer, pod_spec, port, says_hello
from lab.machine import HOST_IP, flush_ruleset


@pytest.fixture(scope="module")
def node(built, messages):
    with Kubelet(messages) as node:
        yield node
        node.stop_all()


@pytest.fixture
def clean(node):
    """When a test's pods are gone, nothing of them is left in our table."""
    yield
    node.end_static_pods()


def run_web(node, name):
    """Run a pod, and wait until it answers on port 8080."""
    node.write_manifest(name, pod_spec(port(8080), command=WEB))
    assert lab.until(lambda: says_hello(node.client, HOST_IP[4], 8080))


def test_host_ports(node, clean):
    """hostPort TCP, UDP and hostIP: from the LAN and on localhost; the pod sees the client's own address"""
    node.write_manifest("web", pod_spec(*HOST_PORTS))
    host_ports_answer(node, "web")


def test_container_killed(node, clean):
    """The container is killed: it starts again in the same sandbox, and the plugin is not called"""
    run_web(node, "container-killed")
    before, sandbox = lab.generation(), node.sandboxes()[0]["id"]
    container, = node.cri("ListContainers", filter={"pod_sandbox_id": sandbox})["containers"]
    node.cri("StopContainer", container_id=container["id"], timeout=0)
    assert lab.until(lambda: says_hello(node.client, HOST_IP[4], 8080), 60)
    assert (lab.generation(), node.sandboxes()[0]["id"]) == (before, sandbox)


def test_sandbox_killed(node, clean):
    """The sandbox is killed: the next one gets the port, and late DELs of the first spare it"""
    run_web(node, "sandbox-killed")
    first = node.sandboxes()[0]["id"]
    node.run("ctr", "-n", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", first)
    assert lab.until(lambda: first not in lab.table() and says_hello(node.client, HOST_IP[4], 8080), 60)
    second, = node.sandboxes("sandbox-killed")
    node.cri("StopPodSandbox", pod_sandbox_id=first)
    assert says_hello(node.client, HOST_IP[4], 8080)
    assert lab.chains() == [f"c/{second['id']}/eth0"]


def test_restarts(node, clean):
    """The kubelet and containerd restart: the table is the same, and the pod answers all the time"""
    run_web(node, "restarts")
    before = lab.table()
    node.kubelet.stop()
    assert says_hello(node.client, HOST_IP[4], 8080)
    node.start_kubelet()
    node.stop()
    assert says_hello(node.client, HOST_IP[4], 8080)
    node.start()
    assert lab.until(lambda: node.sandboxes("restarts"))
    assert says_hello(node.client, HOST_IP[4], 8080)
    assert lab.table() == before


def test_a_second_pod_never_reaches_the_plugin(node, clean):
    """Two pods with one hostPort: the kubelet itself refuses the second"""
    node.write_manifest("first", pod_spec(port(8080)))
    node.inside_pod("first")
    before = lab.table()
    node.write_manifest("second", pod_spec(port(8080)))
    assert lab.until(lambda: "Predicate NodePorts failed" in node.run("curl", "-s", "http://127.0.0.1:10255/pods"))
    assert [each["metadata"]["name"] for each in node.sandboxes()] == ["first-node1"]
    assert lab.table() == before


def test_flush(node, clean):
    """nft flush ruleset: hostPorts are dead; cni-portmap restore: they answer"""
    run_web(node, "flush")
    flush_ruleset()
    assert not says_hello(node.client, HOST_IP[4], 8080)
    node.run("cni-portmap", "restore")
    assert says_hello(node.client, HOST_IP[4], 8080)


def test_reboot(node, clean):
    """Everything but the disk is gone: the pod answers again, and nothing old is left"""
    run_web(node, "reboot")
    old = node.sandboxes()[0]["id"]
    node.reboot()
    assert lab.until(lambda: says_hello(node.client, HOST_IP[4], 8080), 90)
    assert lab.until(lambda: old not in lab.table() and len(lab.chains()) == 1)
