"""Kubernetes' network providers: the conflists that they ship, through libcni, with containerd's spelling of ports."""
import json
from typing import Any

import lab
import pytest
from lab.machine import CLIENT_IP, HOST_IP, PLUGINS, Machine

IPAM = {"type": "host-local", "ranges": [[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd44::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
# In place of the providers' own first plugins, which need their daemons: what those make in the end.
FLANNEL = {"type": "bridge", "bridge": "cni0", "hairpinMode": True, "isDefaultGateway": True,
           "ipam": {**IPAM, "routes": []}}
CALICO = {"type": "ptp", "ipam": IPAM}

CONFLISTS: dict[str, dict[str, Any]] = {
    "flannel": {"name": "cbr0", "cniVersion": "0.3.1", "plugins": [
        FLANNEL,
        {"type": "portmap", "capabilities": {"portMappings": True}}]},
    "Calico": {"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [
        CALICO,
        {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}}]},
    "k3s": {"name": "cbr0", "cniVersion": "1.0.0", "plugins": [
        {**FLANNEL, "forceAddress": True},
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "bandwidth", "capabilities": {"bandwidth": True}}]},
    "kind": {"cniVersion": "0.3.1", "name": "kindnet", "plugins": [
        {"type": "ptp", "ipMasq": False, "ipam": {**IPAM, "dataDir": "/run/cni-ipam-state"}, "mtu": 1500},
        {"type": "portmap", "capabilities": {"portMappings": True}}]},
}
PORTS = {"portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}]}


@pytest.fixture(scope="module")
def machine(need, cnitool):
    need(f"{PLUGINS}/bandwidth")
    with Machine("clusters") as machine:
        machine.run("cp", cnitool / "cnitool-1.3", "/usr/local/bin/cnitool")
        yield machine


@pytest.mark.parametrize("provider", CONFLISTS)
def test_a_conflist_publishes_a_host_port(machine, provider):
    """add, an answer, del of a pod with a hostPort"""
    conflist, pod = CONFLISTS[provider], lab.Namespace(f"pod-{provider}")
    machine.write(f"/etc/cni/net.d/{conflist['name']}.conflist", json.dumps(conflist))

    def cnitool(verb: str) -> str:
        return machine.run("env", f"CNI_PATH=/opt/cni/bin:{PLUGINS}", f"CAP_ARGS={json.dumps(PORTS)}", "cnitool", verb,
                           conflist["name"], pod.path)
    cnitool("add")
    with lab.Server(provider, pod, 80):
        for family in 4, 6:
            assert lab.exchange(machine.client, HOST_IP[family], 8080) == lab.Saw(provider, CLIENT_IP[family], 80)
        assert lab.exchange(lab.HOST, "127.0.0.1", 8080)
    cnitool("del")
    pod.remove()
    assert "c/" not in lab.table()
