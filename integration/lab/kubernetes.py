"""Kubernetes on a machine: the kubelet with static pods, or a cluster of one node; see integration/cluster/build."""
import contextlib
import json
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from .containerd import COMMANDS, Containerd
from .links import add_route, delete_link
from .machine import CLIENT_IP, HOST_IP
from .namespaces import HOST, NAMED, Netns, delete_namespace
from .processes import ROOT, run, until
from .servers import Saw, Server, exchange
from .tables import keep_conntrack, nft, table

BIN = ROOT / "integration/cluster/bin"
NODE = "node1"
MANIFESTS = "/etc/kubernetes/manifests"
POD_CIDR = "10.244.0.0/24"
# A plugin behind ours whose DEL takes its time, as Calico's and k3s' bandwidth does.
SLOW = """#!/bin/sh
case $CNI_COMMAND in
    VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}' ;;
    ADD) exec /usr/bin/python3 -c 'import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))' ;;
    DEL) [ ! -e /run/machine/slow ] || sleep 0.4 ;;
esac
"""


def port(host_port: int, container_port: int = 80, protocol: str = "TCP", host_ip: str = "") -> dict[str, object]:
    """A container's port in a pod's specification."""
    return {"hostPort": host_port, "containerPort": container_port, "protocol": protocol,
            **({"hostIP": host_ip} if host_ip else {})}


def pod_spec(*ports: dict[str, object], command: str = "/bin/busybox sleep 100000") -> dict[str, Any]:
    """A pod's specification; it ends at once when it is told to, and its container is restarted when it ends."""
    return {"terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False, "enableServiceLinks": False,
            "containers": [{"name": "main", "image": "localhost/image:latest", "imagePullPolicy": "Never",
                            "command": ["/bin/busybox", "sh", "-c", f"trap exit TERM; {command} & wait"],
                            "ports": [*ports]}]}


HOST_PORTS = port(8080), port(5353, 53, "UDP"), port(8081, host_ip="127.0.0.1")


def host_ports_answer(node: "Kubelet", name: str) -> None:
    """The HOST_PORTS of a pod answer on the LAN and on localhost; the pod sees the client's own address."""
    inside = node.inside_pod(name)
    with Server(name, inside, 80), Server(name, inside, 53, "udp"):
        for family in 4, 6:
            assert exchange(node.client, HOST_IP[family], 8080) == Saw(name, CLIENT_IP[family], 80)
            assert exchange(node.client, HOST_IP[family], 5353, "udp") == Saw(name, CLIENT_IP[family], 53)
        assert exchange(HOST, "127.0.0.1", 8081)
        assert exchange(node.client, HOST_IP[4], 8081, timeout=0.3) is None


WEB = "/bin/busybox httpd -f -p 80 -h /"  # answers `says_hello`
STAYING_WEB = f"trap '' TERM; {WEB}"  # until it is killed: after two seconds, the least that the kubelet grants


def says_hello(where: contextlib.AbstractContextManager[object], ip: str, port: int, timeout: float = 1.0) -> bool:
    """Whether a pod that runs WEB answers."""
    with contextlib.suppress(OSError):
        with where:
            connection = socket.create_connection((ip, port), timeout)
        with connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b"hello" in connection.makefile("rb").read()
    return False


def gap(where: contextlib.AbstractContextManager[object], ip: str, port: int, change: Callable[[], object],
        seconds: float = 60) -> float:
    """For how many seconds nothing answers after `change`: from the last answer before to the first one after."""
    assert says_hello(where, ip, port)
    change()
    last, silent = time.monotonic(), False
    end = last + seconds
    while time.monotonic() < end:
        if not says_hello(where, ip, port, 0.2):
            silent = True
        elif silent:
            return time.monotonic() - last
        else:
            last = time.monotonic()
        time.sleep(0.02)
    raise AssertionError("it is silent" if silent else "it never was silent")


class Kubelet(Containerd):
    """A node whose kubelet runs static pods."""

    last = ("slow", SLOW)

    def __init__(self, messages: ModuleType, name: str = "kubelet", install: str = COMMANDS) -> None:
        super().__init__("1.6", messages, install, name)

    def prepare(self) -> None:
        self.run("mkdir", "-p", MANIFESTS, "/var/lib/kubelet")
        # The kubelet searches for a cloud's credentials there, and does not wait where nothing leads.
        run("ip", "route", "add", "unreachable", "169.254.169.254")
        super().prepare()
        self.load("ctr -n k8s.io images import", "localhost/image:latest", "sleep", "100000")
        self.start_kubelet()

    def start_kubelet(self, *options: str) -> None:
        """Start the kubelet, and wait until it is healthy."""
        self.kubelet = self.daemon(
            BIN / "kubelet", "--container-runtime=remote", "--cgroup-driver=cgroupfs", "--cgroups-per-qos=false",
            "--container-runtime-endpoint=unix:///run/containerd/containerd.sock", "--enforce-node-allocatable=",
            "--fail-swap-on=false", "--oom-score-adj=0", "--volume-plugin-dir=/var/lib/kubelet/plugins",
            f"--hostname-override={NODE}", f"--node-ip={HOST_IP[4]}", "--cert-dir=/var/lib/kubelet/pki",
            "--read-only-port=10255", "--resolv-conf=", "--file-check-frequency=1s", "--sync-frequency=2s",
            "--node-status-update-frequency=1s", "--minimum-image-ttl-duration=10h", "--image-gc-high-threshold=100",
            "--eviction-hard=", f"--pod-manifest-path={MANIFESTS}", *options)
        assert until(lambda: self.kubelet.has_ended() or self._healthy()) and self._healthy(), self.kubelet.last_words()

    def _healthy(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen("http://127.0.0.1:10248/healthz", timeout=1).read() == b"ok")
        return False

    def write_manifest(self, name: str, spec: dict[str, Any]) -> None:
        """Let the kubelet run a static pod. It takes a minute for one that it has just run under the same name."""
        text = json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
        temporary = f"/etc/kubernetes/{name}.json"  # it may not see half of it
        self.write(temporary, text)
        self.run("mv", temporary, f"{MANIFESTS}/{name}.json")

    def end_static_pods(self) -> None:
        """End all static pods; nothing is left of them, nor comes again.

        Told by their files alone, the kubelet may begin with one once more, a second after it has ended: in the next
        test, on its port. So it is killed first. It takes six seconds to start, five of them to look for Docker.
        """
        self.kubelet.stop("KILL")
        for file in (self.root / MANIFESTS.lstrip("/")).iterdir():
            file.unlink()
        for each in self.cri("ListPodSandbox").get("items", ()):
            for method in "StopPodSandbox", "RemovePodSandbox":
                self.cri(method, pod_sandbox_id=each["id"])
        assert until(self.is_empty, 60)
        self.start_kubelet()

    def sandboxes(self, name: str = "") -> list[dict[str, Any]]:
        """The pod sandboxes that are ready; of the pods whose names begin so."""
        found = self.cri("ListPodSandbox", filter={"state": {"state": "SANDBOX_READY"}}).get("items", ())
        return [each for each in found if each["metadata"]["name"].startswith(name)]

    def inside_pod(self, name: str) -> Netns:
        """The network namespace of the pod, when the kubelet says that it runs; until then it is bad at ending it."""
        assert until(lambda: len(self.sandboxes(name)) == 1 and self._runs(name), 60), self.sandboxes()
        return self.inside(self.sandboxes(name)[0]["id"])

    def _runs(self, name: str) -> bool:
        pods = json.load(urllib.request.urlopen("http://127.0.0.1:10255/pods", timeout=10))["items"]
        return any(each["metadata"]["name"].startswith(name) and each["status"]["phase"] == "Running"
                   for each in pods)

    def reboot(self) -> None:
        """What a reboot leaves: files on disk. Everything else is gone, and the daemons start again."""
        self.stop_all()
        self.run("sh", "-c", "for each in /proc/[0-9]*; do pid=${each#/proc/}; "
                             "[ $pid = 1 ] || [ $pid = $$ ] || kill -9 $pid; done 2>/dev/null; true")
        nft("flush", "ruleset")
        keep_conntrack()
        for path in NAMED.iterdir():
            if path.name.startswith("cni-"):
                delete_namespace(path.name)
        delete_link("cni0", missing_ok=True)
        mounts = [line.split()[1] for line in self.run("cat", "/proc/mounts").splitlines()]
        self.run("umount", "-l", *(path for path in mounts if path.startswith("/run/containerd/")))
        self.run("rm", "-rf", "/run/containerd", "/run/cni-portmap.lock")
        self._begin_again()

    def _begin_again(self) -> None:
        self.start()
        self.start_kubelet()

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The reference plugin is in place of ours. Nothing is published when they change places."""
        assert until(self.is_empty, 60)
        ours, reference = (f"/usr/lib/cni/portmap{suffix}" for suffix in ("", ".distrib"))
        self.run("sh", "-euc", f"mv {ours} {ours}.ours; cp {reference} {ours}")
        try:
            yield
            assert until(self.is_empty, 60)
        finally:
            self.run("mv", f"{ours}.ours", ours)

    def is_empty(self) -> bool:
        """Whether no pod is left, and nothing is published: a sandbox that is still being made has a namespace only."""
        return "c/" not in table() and "CNI-DN-" not in run("iptables", "-t", "nat", "-S") and \
            not self.sandboxes() and "cni-" not in self.run("ls", "/run/netns", check=False)

    @contextlib.contextmanager
    def slow_plugin(self) -> Iterator[None]:
        """The plugin behind ours takes 0.4 seconds for DEL."""
        self.write("/run/machine/slow", "")
        try:
            yield
        finally:
            self.run("rm", "/run/machine/slow")

    def stop_all(self) -> None:
        """Stop the daemons."""
        self.kubelet.stop("KILL")
        self.stop()


KUBECONFIG = "/etc/kubernetes/config"
TOKEN = "testing"
CONFIG = {"apiVersion": "v1", "kind": "Config", "current-context": "lab",
          "clusters": [{"name": "lab", "cluster": {"server": "https://127.0.0.1:6443",
                                                   "insecure-skip-tls-verify": True}}],
          "users": [{"name": "admin", "user": {"token": TOKEN}}],
          "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "admin"}}]}


class Cluster(Kubelet):
    """A cluster of one node: etcd, API server, controllers, scheduler, kubelet, kube-proxy in its iptables mode."""

    def __init__(self, messages: ModuleType, name: str = "cluster", install: str = COMMANDS) -> None:
        super().__init__(messages, name, install)

    def prepare(self) -> None:
        self.write(KUBECONFIG, json.dumps(CONFIG))
        self.write("/etc/kubernetes/tokens.csv", f"{TOKEN},admin,admin,system:masters\n")
        self.run("openssl", "genrsa", "-out", "/etc/kubernetes/key.pem", "2048")
        add_route("default", CLIENT_IP[4])  # a node has one, also for addresses of services
        self._start_control_plane()
        super().prepare()
        self.start_proxy()
        assert until(lambda: "True" in self.kubectl(
            "get", "nodes", "-o", "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"), 60)

    def _start_control_plane(self) -> None:
        self.daemon(BIN / "etcd", "--data-dir=/var/lib/etcd")
        apiserver = self.daemon(
            BIN / "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--service-cluster-ip-range=10.96.0.0/16",
            "--cert-dir=/var/lib/kubernetes", "--token-auth-file=/etc/kubernetes/tokens.csv",
            "--authorization-mode=AlwaysAllow", "--service-account-key-file=/etc/kubernetes/key.pem",
            "--service-account-signing-key-file=/etc/kubernetes/key.pem", "--service-account-issuer=https://kubernetes",
            "--disable-admission-plugins=ServiceAccount", "--kubelet-preferred-address-types=InternalIP",
            f"--advertise-address={HOST_IP[4]}")
        assert until(lambda: apiserver.has_ended() or self.kubectl("get", "--raw", "/readyz", check=False) == "ok",
                     60) and not apiserver.has_ended(), apiserver.last_words()
        self.daemon(BIN / "kube-controller-manager", f"--kubeconfig={KUBECONFIG}", "--leader-elect=false",
                    "--service-account-private-key-file=/etc/kubernetes/key.pem", "--cert-dir=/var/lib/kubernetes")
        self.daemon(BIN / "kube-scheduler", f"--kubeconfig={KUBECONFIG}", "--leader-elect=false",
                    "--cert-dir=/var/lib/kubernetes")

    def start_kubelet(self, *options: str) -> None:
        super().start_kubelet(f"--kubeconfig={KUBECONFIG}", *options)

    def start_proxy(self) -> None:
        """Start kube-proxy; without these options it writes sysctls of the whole machine."""
        self.proxy = self.daemon(
            BIN / "kube-proxy", f"--kubeconfig={KUBECONFIG}", "--proxy-mode=iptables", f"--cluster-cidr={POD_CIDR}",
            f"--hostname-override={NODE}", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0")

    def clean_up_proxy(self) -> None:
        """Let kube-proxy remove its rules."""
        self.run(BIN / "kube-proxy", "--cleanup", "--conntrack-max-per-core=0", check=False)

    def reboot(self) -> None:
        self.proxy.stop("KILL")
        super().reboot()
        self.start_proxy()

    def _begin_again(self) -> None:
        self._start_control_plane()
        super()._begin_again()

    def kubectl(self, *words: object, check: bool = True, input: str | None = None, timeout: float = 60) -> str:
        return self.run(BIN / "kubectl", f"--kubeconfig={KUBECONFIG}", *words, check=check, input=input,
                        timeout=timeout)

    def apply(self, kind: str, name: str, spec: dict[str, Any], version: str = "v1", **metadata: Any) -> None:
        """Create or change an object."""
        self.kubectl("apply", "-f", "-", input=json.dumps({
            "apiVersion": version, "kind": kind, "metadata": {"name": name, **metadata}, "spec": spec}))

    def delete_all(self, kinds: str) -> None:
        """Delete all objects of some kinds, pods among them; nothing is left of them.

        By force only when there is no sandbox any more: of a pod that is just starting, the kubelet would make another
        one when the first is gone. But it may take a minute to tell the API server that a pod has ended.
        """
        self.kubectl("delete", kinds, "--all", "--all-namespaces", "--grace-period=1", "--wait=false")

        def is_gone() -> bool:
            if not self.is_empty():
                return False
            self.kubectl("delete", "pod", "--all", "--all-namespaces", "--grace-period=0", "--force")
            return not self.kubectl("get", f"{kinds},replicaset", "--all-namespaces", "-o", "name")
        assert until(is_gone, 60), self.sandboxes()

    def events(self, reason: str) -> list[str]:
        """The messages of events with a reason."""
        return self.kubectl("get", "events", f"--field-selector=reason={reason}", "-o",
                            "jsonpath={range .items[*]}{.message}{'\\n'}{end}").splitlines()

    def forget_events(self, reason: str) -> None:
        """Delete the events with a reason. All events would be too many: kubectl deletes five a second."""
        self.kubectl("delete", "events", f"--field-selector=reason={reason}")


def conformance(cluster: Cluster) -> list[str]:
    """Kubernetes' conformance test: one hostPort, three pods on one node, whose hostIP and protocol differ.

    The names of those of pod1, pod2 and pod3 that answered where they should. They stay.
    """
    cases = {"pod1": ("TCP", "127.0.0.1"), "pod2": ("TCP", HOST_IP[4]), "pod3": ("UDP", HOST_IP[4])}
    for name, (protocol, host_ip) in cases.items():
        cluster.apply("Pod", name, pod_spec(port(54323, 8080, protocol, host_ip)))
    with contextlib.ExitStack() as stack:
        for name, (protocol, _) in cases.items():
            stack.enter_context(Server(name, cluster.inside_pod(name), 8080, protocol.lower()))
        saw = [exchange(HOST, host_ip, 54323, protocol.lower(), source=HOST_IP[4])
               for protocol, host_ip in cases.values()]
    return [each.server for each, name in zip(saw, cases, strict=True) if each and each.server == name]


CLONE = "/opt/clone"
KUBECTL = f"""#!/bin/sh
# kubectl, whose -k knows components, as those of today do. What this server does not know, it refuses, as theirs do.
set -eu
kubectl="{BIN}/kubectl --kubeconfig={KUBECONFIG}"
case "$*" in
    "apply -k "*) {BIN}/kustomize build "$3" | $kubectl apply -f - ;;
    "delete -k "*) {BIN}/kustomize build "$3" | $kubectl delete -f - ;;
    *) exec $kubectl "$@" ;;
esac
"""


class Upstream(Cluster):
    """A cluster whose node is as kubeadm's: the reference's plugins are in /opt/cni/bin, and ours is not there yet."""

    bin_dir = "/opt/cni/bin"

    def __init__(self, messages: ModuleType) -> None:
        super().__init__(messages, "upstream", f"""
            mkdir -p {self.bin_dir} {CLONE}
            cp -a /usr/lib/cni/. {self.bin_dir}
            cp -r deploy {CLONE}
            install -D -m 644 conf/kubernetes/10-bridge.conflist /etc/cni/net.d/10-bridge.conflist
            """)

    def prepare(self) -> None:
        self.write("/usr/local/bin/kubectl", KUBECTL)
        self.run("chmod", "755", "/usr/local/bin/kubectl")
        super().prepare()

    def shell(self, commands: str) -> str:
        """Run what somebody has typed in a clone; until the installation, in the project's folder."""
        if not (self.root / CLONE[1:] / "deploy").exists():
            return super().shell(commands)
        return self.run("env", "--chdir", CLONE, "sh", "-euc", commands, timeout=180)
