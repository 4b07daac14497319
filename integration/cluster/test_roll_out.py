"""A node's reference plugin gives way to the image of deploy/kubernetes, and comes back: what host ports see of it."""
import os
import pathlib
import re
import time

import lab
import pytest
from cni_portmap import __version__
from lab.kubernetes import WEB, Upstream, conformance, pod_spec, port, says_hello
from lab.machine import HOST_IP, PLUGINS, flush_ruleset, shown_in
from lab.reference import traces

IMAGE = f"registry.example.org/cni-portmap:{__version__}"
NGINX = "docker.io/library/nginx:1.29"  # only by its name
CHOOSE = """
mkdir my-cluster
cat >my-cluster/kustomization.yaml <<EOF
resources: [../deploy/kubernetes/base]
components: [../deploy/kubernetes/components/agent]
images: [{name: cni-portmap, newName: registry.example.org/cni-portmap}]
EOF
"""
INSTALL = """
kubectl apply -k my-cluster
kubectl -n kube-system rollout status daemonset/cni-portmap
"""
TRY = """
kubectl apply -f - <<EOF
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  containers:
    - name: web
      image: nginx:1.29
      ports: [{containerPort: 80, hostPort: 8080}]
EOF
kubectl wait --for=condition=Ready pod/web
curl "http://$(kubectl get pod web -o jsonpath={.status.hostIP}):8080"
"""
ON_EACH_NODE = """
on_each_node() {
    for pod in $(kubectl -n kube-system get pods -l app.kubernetes.io/name=cni-portmap -o name); do
        kubectl -n kube-system exec "$pod" -c agent -- /cni-portmap "$@"
    done
}
"""
ADOPT = """
on_each_node adopt --dry-run
on_each_node adopt
on_each_node list
"""
BACK = """
mkdir way-back
cat >way-back/kustomization.yaml <<EOF
resources: [../my-cluster]
components: [../deploy/kubernetes/components/uninstall]
EOF
kubectl apply -k way-back
kubectl -n kube-system rollout status daemonset/cni-portmap
"""
RELEASE = """
on_each_node release
"""
REMOVE = """
kubectl delete -k way-back
"""


def of_its_age(commands):
    """The documented commands, for a cluster before Kubernetes 1.30, as this one is: with the component for those."""
    older = re.sub(r"(?m)^components: \[(.*)\]$", r"components: [\1, ../deploy/kubernetes/components/before-1.30]",
                   commands)
    assert older != commands
    return older


def test_the_documented_commands():
    """Those of docs/kubernetes.md."""
    for commands in CHOOSE, INSTALL, TRY, ON_EACH_NODE, ADOPT, BACK, RELEASE, REMOVE:
        assert shown_in("docs/kubernetes.md", commands), commands


@pytest.fixture(scope="module")
def image():
    """The image, as scripts/release makes it."""
    found = [*pathlib.Path(os.environ.get("CNI_PORTMAP_DIST", "/nonexistent")).glob("*oci*.tar")]
    if not found:
        pytest.skip("no image: scripts/test cluster makes one; or let CNI_PORTMAP_DIST name the folder of a release")
    return found[0]


@pytest.fixture(scope="module")
def cluster(built, messages, image):
    with Upstream(messages) as cluster:
        cluster.run("ctr", "-n", "k8s.io", "images", "import", image)
        imported, = [each for each in cluster.run("ctr", "-n", "k8s.io", "images", "ls", "-q").split()
                     if "cni-portmap:" in each]
        cluster.run("ctr", "-n", "k8s.io", "images", "tag", imported, IMAGE)
        cluster.load("ctr -n k8s.io images import", NGINX, "httpd", "-f", "-p", "80", "-h", "/")
        yield cluster


@pytest.fixture
def clean(cluster):
    """When a test's objects are gone, the node is as kubeadm left it."""
    yield
    cluster.delete_all("daemonset,deployment,pod")
    flush_ruleset()
    cluster.run("sh", "-euc", f"rm -rf /opt/clone/my-cluster /opt/clone/way-back {cluster.bin_dir}/.cni-portmap; "
                              f"cp -a --remove-destination {PLUGINS}/portmap {cluster.bin_dir}/portmap")


def test_from_zero(cluster, clean, measured):
    """The documented lines, one after the other: at their end a host port answers, from outside too"""
    cluster.shell(CHOOSE)
    assert 'unknown field "appArmorProfile"' in cluster.shell("! kubectl apply -k my-cluster 2>&1; rm -r my-cluster")
    cluster.shell(of_its_age(CHOOSE))
    assert "successfully rolled out" in cluster.shell(INSTALL)
    assert "hello" in cluster.shell(TRY)
    assert says_hello(cluster.client, HOST_IP[4], 8080)
    assert "c/" in lab.table() and not traces("8080")
    began = time.monotonic()
    cluster.kubectl("-n", "kube-system", "rollout", "restart", "daemonset/cni-portmap")
    cluster.kubectl("-n", "kube-system", "rollout", "status", "daemonset/cni-portmap", "--timeout=100s", timeout=110)
    measured(f"the DaemonSet's pod is replaced and ready in {time.monotonic() - began:.1f} s")
    assert says_hello(cluster.client, HOST_IP[4], 8080)


def run_web(cluster, name, *ports):
    """Run a deployment of one pod, and wait until it answers on its first host port."""
    cluster.apply("Deployment", name, {
        "selector": {"matchLabels": {"app": name}}, "strategy": {"type": "Recreate"},
        "template": {"metadata": {"labels": {"app": name}}, "spec": pod_spec(*ports, command=WEB)}}, "apps/v1")
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], ports[0]["hostPort"]), 60)


def restart(cluster, name, host_port):
    """Let a deployment have another pod, and wait until that one answers."""
    cluster.kubectl("rollout", "restart", f"deployment/{name}")
    cluster.kubectl("rollout", "status", f"deployment/{name}", "--timeout=100s", timeout=110)
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], host_port))


def test_roll_out(cluster, clean):
    """From the reference plugin to this one and back, under clients that go on connecting: none is refused"""
    plugin = cluster.root / "opt/cni/bin/portmap"
    reference = plugin.read_bytes()
    run_web(cluster, "web", port(8080), port(8081, host_ip="127.0.0.1"))
    run_web(cluster, "moves", port(8090))
    first = cluster.sandboxes("web")[0]["id"]
    assert traces("8080") and traces("8090") and lab.table() == ""
    cluster.shell(of_its_age(CHOOSE))
    with lab.connecting(cluster.client, 8080, *HOST_IP.values()), lab.connecting(lab.HOST, 8081, "127.0.0.1"):
        assert "successfully rolled out" in cluster.shell(INSTALL)
        assert plugin.is_symlink()
        cluster.run("cp", "--remove-destination", f"{PLUGINS}/portmap", f"{cluster.bin_dir}/portmap")  # someone else's
        assert lab.until(plugin.is_symlink)
        restart(cluster, "moves", 8090)
        assert not traces("8090") and traces("8080") and first not in lab.table()
        said = cluster.shell(ON_EACH_NODE + ADOPT)
        assert "\n1 adopted, 0 removed, 0 left\n" in said and "0.0.0.0:8080/tcp" in said
        assert not traces("8080", "8081") and first in lab.table()

    assert conformance(cluster) == ["pod1", "pod2", "pod3"]
    cluster.kubectl("delete", "pod", "pod1", "pod2", "pod3", "--wait=false")
    flush_ruleset()  # the agent restores what is published
    assert lab.until(lambda: says_hello(cluster.client, HOST_IP[4], 8080), 10)

    with lab.connecting(cluster.client, 8080, *HOST_IP.values()), lab.connecting(lab.HOST, 8081, "127.0.0.1"):
        assert "successfully rolled out" in cluster.shell(of_its_age(BACK))
        assert plugin.read_bytes() == reference and not plugin.is_symlink()
        restart(cluster, "moves", 8090)
        assert traces("8090")
    restart(cluster, "web", 8080)
    assert traces("8080")
    assert " 0 kept\n" in cluster.shell(ON_EACH_NODE + RELEASE)
    cluster.shell(REMOVE)
    assert "c/" not in lab.table() and says_hello(cluster.client, HOST_IP[4], 8080)
    assert not plugin.with_name(".cni-portmap").exists()
