"""A cluster of one node: API server, scheduler, controllers, kubelet, kube-proxy in its iptables mode."""
import time

import lab
import pytest
from lab.kubernetes import (HOST_PORTS, STAYING_WEB, WEB, Cluster, conformance, gap, host_ports_answer, pod_spec, port,
                            says_hello)
from lab.machine import HOST_IP, flush_ruleset, wrappers

NODE_PORT = 30080
REFUSED = "FailedCreatePodSandBox"


@pytest.fixture(scope="module")
def cluster(built, messages):
    with Cluster(messages) as cluster:
        yield cluster


@pytest.fixture
def clean(cluster):
    """When a test's objects are gone, nothing of them is left in our table."""
    yield
    cluster.delete_all("job,daemonset,deployment,pod")
    cluster.forget_events(REFUSED)
    assert lab.until(lambda: "c/" not in lab.table())


def refusals(cluster):
    """What the plugin's refusals say in events."""
    return [message for message in cluster.events(REFUSED) if "already published" in message]


def run_web(cluster, name, host_port=8080, **metadata):
    """Run a pod, and wait until it answers on its host port."""
    cluster.apply("Pod", name, pod_spec(port(host_port), command=WEB), **metadata)
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], host_port), 60)


def test_host_ports(cluster, clean):
    """hostPort TCP, UDP and hostIP, scheduled: from the LAN and on localhost; the pod sees the client's own address"""
    cluster.apply("Pod", "web", pod_spec(*HOST_PORTS))
    host_ports_answer(cluster, "web")


def test_conformance(cluster, clean):
    """Kubernetes' conformance test of host ports"""
    assert conformance(cluster) == ["pod1", "pod2", "pod3"]
    assert refusals(cluster) == []


def test_services(cluster, clean):
    """ClusterIP and NodePort beside a hostPort of the same pod; kube-proxy cleans up, and starts again: ours stays"""
    run_web(cluster, "web", labels={"app": "web"})
    cluster.apply("Service", "web", {"type": "NodePort", "selector": {"app": "web"},
                                     "ports": [{"port": 80, "nodePort": NODE_PORT}]})
    cluster_ip = cluster.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")

    def answers():
        return [says_hello(cluster.client, HOST_IP[4], 8080), says_hello(cluster.client, HOST_IP[4], NODE_PORT),
                says_hello(lab.HOST, cluster_ip, 80), says_hello(cluster.inside_pod("web"), HOST_IP[4], 8080)]
    assert lab.until(lambda: answers() == [True] * 4)
    before = lab.table()
    cluster.proxy.stop()
    cluster.clean_up_proxy()
    assert answers() == [True, False, False, True]
    cluster.start_proxy()
    assert lab.until(lambda: answers() == [True] * 4)
    assert lab.table() == before
    cluster.kubectl("delete", "service", "web")


def test_describe_names_the_owner(cluster, clean, tmp_path):
    """A port of a container that Kubernetes does not know: kubectl describe pod shows who has it, until it is free"""
    network = lab.Network(lab.bridge_conflist("other", "other0"), wrappers(tmp_path, cluster.command(), "/usr/lib/cni"))
    other = lab.Namespace("other")
    ports = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    network.add("other-container", other.path, ports)
    cluster.apply("Pod", "web", pod_spec(port(8080), command=WEB))
    assert lab.until(lambda: refusals(cluster), 60)
    said = cluster.kubectl("describe", "pod", "web")
    assert "tcp port 8080 on 0.0.0.0 is already published by container other-container" in said
    network.delete("other-container", other.path, ports)
    other.remove()
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], 8080), 60)


def run_job(cluster, name):
    """The seconds of a job of five pods, one after the other, with one hostPort."""
    spec = pod_spec(port(8097), command="exit 0")
    began = time.monotonic()
    cluster.apply("Job", name, {"completions": 5, "parallelism": 1, "template": {
        "spec": {**spec, "restartPolicy": "Never"}}}, "batch/v1")
    cluster.kubectl("wait", "--for=condition=complete", "--timeout=110s", f"job/{name}", timeout=120)
    seconds = time.monotonic() - began
    cluster.kubectl("delete", "job", name)
    return seconds


def test_job(cluster, clean, measured):
    """A job's pods hand a hostPort over, with a slow plugin behind ours: none is refused (each refusal costs 12 s)"""
    with cluster.slow_plugin():
        ours = [run_job(cluster, "ours-1")]
        with cluster.reference():
            reference = [run_job(cluster, "reference-1")]
        ours.append(run_job(cluster, "ours-2"))
        with cluster.reference():
            reference.append(run_job(cluster, "reference-2"))
    assert refusals(cluster) == []
    measured(f"job of five pods: {min(ours) / min(reference):.2f} of the reference's time "
             f"(ours {ours[0]:.1f} and {ours[1]:.1f} s, reference {reference[0]:.1f} and {reference[1]:.1f} s)")


def edit_static_pod(cluster, name):
    """The seconds for which nothing answers when a static pod with a hostPort is changed."""
    cluster.write_manifest(name, pod_spec(port(8080), command=STAYING_WEB))
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], 8080), 60)
    seconds = gap(cluster.client, HOST_IP[4], 8080,
                  lambda: cluster.write_manifest(name, pod_spec(port(8080), port(8079, 81), command=STAYING_WEB)))
    cluster.end_static_pods()
    return seconds


def test_static_pod_is_edited(cluster, clean, measured):
    """The kubelet starts the new sandbox before it stops the old one: the new one stands by, and nobody is refused"""
    ours, reference = [], []
    for number in range(3):
        ours.append(edit_static_pod(cluster, f"ours-{number}"))
        with cluster.reference():
            reference.append(edit_static_pod(cluster, f"reference-{number}"))
    assert refusals(cluster) == []
    measured(f"a static pod is edited: nothing answers for {sum(ours) / sum(reference):.2f} of the reference's time "
             f"(ours {_seconds(ours)}, reference {_seconds(reference)})")


def _seconds(found):
    return f"{', '.join(f'{each:.2f}' for each in found)} s"


def test_daemon_set_rolls_out(cluster, clean):
    """A DaemonSet with a hostPort is changed: the next pod gets the port"""
    def apply(*more):
        cluster.apply("DaemonSet", "web", {"selector": {"matchLabels": {"app": "ds"}}, "template": {
            "metadata": {"labels": {"app": "ds"}}, "spec": pod_spec(port(8080), *more, command=WEB)}}, "apps/v1")
        cluster.kubectl("rollout", "status", "daemonset/web", "--timeout=100s", timeout=110)
    apply()  # a pod that is not ready yet is replaced before it has ended: its port is refused, and tried again later
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], 8080), 60)
    first = cluster.sandboxes("web")[0]["id"]
    apply(port(8079, 81))
    assert lab.until(lambda: first not in lab.table())
    assert says_hello(cluster.client, HOST_IP[4], 8080)
    assert refusals(cluster) == []


def test_deleted_by_force(cluster, clean):
    """A pod that stays until it is killed is deleted by force; the next one gets its port then, and is not refused"""
    cluster.apply("Pod", "last", pod_spec(port(8080), command=STAYING_WEB))
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], 8080), 60)
    cluster.inside_pod("last")
    cluster.kubectl("delete", "pod", "last", "--grace-period=0", "--force")
    cluster.apply("Pod", "next", pod_spec(port(8080), command=WEB))
    assert lab.until(lambda: lab.chains() == [f"c/{each['id']}/eth0" for each in cluster.sandboxes("next")] != [], 60)
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], 8080)) and refusals(cluster) == []


def test_restarts_and_flush(cluster, clean):
    """kubelet, containerd and kube-proxy restart: the table is the same; after a flush, restore brings the port back"""
    run_web(cluster, "web")
    before = lab.table()
    cluster.proxy.stop()
    cluster.stop_all()
    assert says_hello(cluster.client, HOST_IP[4], 8080)
    cluster.start()
    cluster.start_kubelet()
    cluster.start_proxy()
    assert lab.until(lambda: cluster.sandboxes("web"))
    assert lab.table() == before
    flush_ruleset()
    assert not says_hello(cluster.client, HOST_IP[4], 8080)
    cluster.run("cni-portmap", "restore")
    assert says_hello(cluster.client, HOST_IP[4], 8080)


def test_reboot(cluster, clean):
    """The node reboots: its pod answers again, and nothing old is left"""
    run_web(cluster, "web")
    old = cluster.sandboxes("web")[0]["id"]
    cluster.reboot()
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], 8080), 120)
    assert lab.until(lambda: old not in lab.table() and len(lab.chains()) == 1)
