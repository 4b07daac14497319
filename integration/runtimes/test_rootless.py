"""The rootless shape: an ordinary user's user, network and mount namespaces, as rootless runtimes make them."""
import pathlib
import subprocess
from typing import Any

import lab
import pytest
from lab.machine import PLUGINS, Machine, wrappers

USER = 65534
# Links by command, not by the lab: this is a shell in user and mount namespaces that the tests' process is not in.
BOOT = """
echo $$; read mapped
mount -t tmpfs tmpfs /run  # the user's own there, as is libcni's folder
mount -t tmpfs tmpfs /var/lib/cni
ip link set lo up; ip netns add box
echo ready; exec sleep 1000
"""


class Rootless:
    """`network` calls the plugins there; `host` is the user's network, `box` a container's in it."""

    def __init__(self, machine: Machine, folder: pathlib.Path) -> None:
        self._machine = machine
        machine.run("mkdir", "-p", "/var/lib/cni")
        self._process = subprocess.Popen(machine.command(
            "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "unshare", "--user", "--net", "--mount",
            "sh", "-euc", BOOT), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin and self._process.stdout
        self._pid = self._process.stdout.readline().strip()
        self.proc = machine.root / "proc" / self._pid
        for kind in "uid", "gid":  # what newuidmap and newgidmap do
            (self.proc / f"{kind}_map").write_text(f"0 {USER} 1")
        self._process.stdin.write("mapped\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "ready\n"
        self.host, self.box = lab.Netns(self.proc / "ns/net"), lab.Netns(self.proc / "root/run/netns/box")
        with self.host:
            lab.br_netfilter(False)
        inside = machine.command("nsenter", "-t", self._pid, "-U", "-m", "-n", "--")
        self.network = lab.Network(lab.bridge_conflist("rootless", subnets=("10.77.0.0/16", "fd77::/64")),
                                   wrappers(folder, inside))
        self.command = inside

    def add(self, ports: list[dict[str, Any]]) -> None:
        self.network.add("box", "/run/netns/box", ports)

    def delete(self, ports: list[dict[str, Any]]) -> None:
        self.network.delete("box", "/run/netns/box", ports)

    def table(self) -> str:
        return lab.run(*self.command, "nft", "-s", "list", "ruleset")

    def end(self) -> None:
        self._machine.run("kill", "-9", self._pid)
        self._process.communicate()


@pytest.fixture(scope="module")
def machine(need):
    need(f"{PLUGINS}/bridge", "setpriv")
    with Machine("rootless") as machine:
        yield machine


@pytest.fixture
def rootless(machine, tmp_path):
    rootless = Rootless(machine, tmp_path)
    yield rootless
    rootless.end()
    assert lab.table() == ""


def test_a_container_answers_its_user(rootless):
    """ADD, answers on localhost and to the user's network, CHECK, DEL; the host's own rules stay as they are"""
    ports = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    rootless.add(ports)
    with rootless.host:
        slirp = lab.wire("slirp", ("10.0.2.1/24", "fd00:2::1/64"), ("10.0.2.2/24", "fd00:2::2/64"), "tap0")
    with lab.Server("box", rootless.box, 80):
        for ip in "127.0.0.1", "::1":
            assert lab.exchange(rootless.host, ip, 8080)
        assert lab.exchange(slirp, "10.0.2.1", 8080) == lab.Saw("box", "10.0.2.2", 80)
        assert lab.exchange(slirp, "fd00:2::1", 8080) == lab.Saw("box", "fd00:2::2", 80)
    rootless.network.check("box", "/run/netns/box", ports)
    rootless.delete(ports)
    assert "c/" not in rootless.table()
    with rootless.host:
        slirp.remove()


@pytest.mark.parametrize(("shift", "number"), [(0, 1000), (1, 150)], ids=["to themselves", "to others"])
def test_many_ports(rootless, shift, number):
    """Many ports in one ADD, where socket buffers cannot be raised; they lead"""
    ports = [{"hostPort": port, "containerPort": port + shift, "protocol": "tcp"}
             for port in range(11000 - number, 11000)]
    rootless.add(ports)
    with lab.Server("box", rootless.box, 10999 + shift):
        assert lab.exchange(rootless.host, "127.0.0.1", 10999)
    rootless.delete(ports)
    assert "c/" not in rootless.table()


def test_too_many_shifted_ports_are_refused_with_advice(rootless):
    """Each has a rule, and a thousand do not fit into a socket buffer that cannot be raised."""
    ports = [{"hostPort": port, "containerPort": port + 1, "protocol": "tcp"} for port in range(10000, 11000)]
    with pytest.raises(lab.CniFailed, match=r"net\.core\.wmem_max"):
        rootless.add(ports)
    assert "c/" not in rootless.table()
