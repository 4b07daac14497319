"""containerd, by way of CRI, and pod sandboxes."""
import json
import pathlib
from types import ModuleType
from typing import Any

from .cri import Cri
from .machine import CLIENT_IP, HOST_IP, Machine
from .namespaces import Netns
from .processes import until
from .servers import Saw, Server, exchange
from .userland import NEWER_PLUGINS, PLUGINS, UNPACKED

RELEASES: dict[str, str | pathlib.Path] = {"1.6": "/usr/bin", "2": UNPACKED / "containerd-2/usr/bin"}
VERSION = {"1.6": "1.0.0", "2": "1.1.0"}  # of CNI, the newest that each speaks
CONF = """
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:latest"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin_dir}"
    conf_dir = "/etc/cni/net.d"
"""
COMMANDS = """
dpkg-divert --rename --add /usr/lib/cni/portmap
scripts/install --bin-dir /usr/lib/cni
install -D -m 644 conf/kubernetes/10-bridge.conflist /etc/cni/net.d/10-bridge.conflist
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

    cgroup = "k8s.io"
    last = ("breaker", BREAKER)  # the plugin at the end of the chain: its type, and what it is
    bin_dir = PLUGINS  # where it looks for plugins

    def __init__(self, release: str, messages: ModuleType, install: str = COMMANDS, name: str = "containerd") -> None:
        super().__init__(f"{name}-{release}", install, plugins=NEWER_PLUGINS if release == "2" else PLUGINS)
        self.release, self._messages = release, messages

    def prepare(self) -> None:
        conflist = self.json("cat", "/etc/cni/net.d/10-bridge.conflist")
        name, text = self.last
        conflist["cniVersion"] = VERSION[self.release]
        conflist["plugins"].append({"type": name})
        conflist["plugins"][0]["ipMasq"] = False  # after nft flush ruleset, its own DEL would fail
        self.write("/etc/cni/net.d/10-bridge.conflist", json.dumps(conflist))
        self.write(f"{self.bin_dir}/{name}", text)
        self.run("chmod", "755", f"{self.bin_dir}/{name}")
        self.write("/etc/containerd/config.toml", CONF.replace("{bin_dir}", self.bin_dir))
        self.start()
        self.load(f"{RELEASES[self.release]}/ctr -n k8s.io images import", "localhost/pause:latest", "sleep", "100000")
        assert until(lambda: self.cri("ImageStatus", "ImageService", image={"image": "localhost/pause:latest"}))

    def start(self) -> None:
        """Start containerd, and wait for it."""
        self._daemon = self.daemon("containerd", path=RELEASES[self.release])
        self.cri = Cri("/run/containerd/containerd.sock", self._messages)

    def stop(self) -> None:
        self.cri.close()
        self._daemon.stop()

    def inside(self, pod_id: str) -> Netns:
        """The network namespace of a pod sandbox."""
        info = json.loads(self.cri("PodSandboxStatus", pod_sandbox_id=pod_id, verbose=True)["info"]["info"])
        return Netns(next(each["path"] for each in info["runtimeSpec"]["linux"]["namespaces"]
                          if each["type"] == "network"))

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
    def inside(self) -> Netns:
        return self.node.inside(self.id)

    def stop(self) -> None:
        self.node.cri("StopPodSandbox", pod_sandbox_id=self.id)

    def answers(self, port: int = 8080) -> bool:
        """Whether the pod's server answers on the node's addresses, and sees the client's own."""
        with Server(self.name, self.inside, 80):
            return [exchange(self.node.client, HOST_IP[family], port) for family in (4, 6)] == \
                [Saw(self.name, CLIENT_IP[family], 80) for family in (4, 6)]
