"""nerdctl: the conflist that it generates and the calls that it makes through go-cni; itself it is not packaged."""
import secrets
import subprocess

import lab
import pytest
from lab.machine import CLIENT_IP, HOST_IP, PLUGINS, Machine, shown_in, wrappers

COMMANDS = """
scripts/install
"""
CONF = """
install -D -m 644 conf/nerdctl/nerdctl-web.conflist /etc/cni/net.d/nerdctl-web.conflist
"""
CONFLIST = {
    "cniVersion": "1.0.0", "name": "bridge",
    "nerdctlID": "17f29b073143d8cd97b5bbe492bdeffec1c5fee55cc1fe2112c8b9335f8b6121",
    "nerdctlLabels": {"nerdctl/default-network": "true"},
    "plugins": [
        {"type": "bridge", "bridge": "nerdctl0", "isGateway": True, "ipMasq": True, "hairpinMode": True,
         "ipam": {"ranges": [[{"gateway": "10.4.0.1", "subnet": "10.4.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
                  "type": "host-local"}},
        {"type": "portmap", "capabilities": {"portMappings": True}},
        {"type": "firewall", "ingressPolicy": "same-bridge"},
        {"type": "tuning"},
    ],
}
PORTS = [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "0.0.0.0"},
         {"HostPort": 8081, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "127.0.0.1"}]


class NerdctlContainer:
    """A process with a network namespace of its own, and what nerdctl's hooks do for it."""

    def __init__(self, machine: Machine, network: lab.Network, name: str) -> None:
        self.machine, self.network, self.name = machine, network, name
        self._process: subprocess.Popen[str] | None = None
        self._link = ""
        self.id = f"default-{secrets.token_hex(32)}"

    def create(self) -> None:
        """A process; createRuntime: removed first, in case that it was not, then attached."""
        self._process = subprocess.Popen(self.machine.command(
            "unshare", "--net", "sh", "-c", "echo $$; exec sleep 1000"), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        self.path = f"/proc/{self._process.stdout.readline().strip()}/ns/net"
        self.network.delete(self.id, "", PORTS)
        result = self.network.add(self.id, self.path, PORTS)
        self._link = next(each["name"] for each in result["interfaces"] if each["name"].startswith("veth"))

    def kill(self) -> None:
        """The process ends, and its network with it, and nobody says so."""
        if self._process:
            self.machine.run("kill", "-9", self.path.split("/")[2])
            self._process.communicate()
            self._process = None
            assert lab.until(lambda: not lab.has_link(self._link))

    def stop(self) -> None:
        """The process ends; postStop: detached."""
        self.kill()
        self.network.delete(self.id, "", PORTS)

    def answers(self) -> bool:
        with lab.Server(self.name, lab.Netns(f"{self.machine.root}{self.path}"), 80):
            return lab.exchange(self.machine.client, HOST_IP[4], 8080) == lab.Saw(self.name, CLIENT_IP[4], 80) and \
                lab.exchange(self.machine.client, HOST_IP[6], 8080) is None and \
                lab.exchange(lab.HOST, "127.0.0.1", 8081) is not None


@pytest.fixture(scope="module")
def machine(need):
    need(f"{PLUGINS}/firewall", "iptables")
    with Machine("nerdctl", COMMANDS) as machine:
        yield machine


@pytest.fixture
def container(machine, tmp_path):
    """Makes containers, which are stopped in the end; nothing of them is left."""
    network, made = lab.Network(CONFLIST, wrappers(tmp_path, machine.command())), []

    def make(name: str) -> NerdctlContainer:
        made.append(NerdctlContainer(machine, network, name))
        return made[-1]
    yield make
    for each in made:
        each.stop()
    assert "c/" not in lab.table()


def test_started_it_answers_until_stopped(container):
    """run -p, stop, start"""
    web = container("web")
    web.create()
    assert web.answers()
    web.stop()
    assert "c/" not in lab.table()
    web.create()
    assert web.answers()


def test_a_killed_container_frees_its_port(container):
    """A container dies, and its hook never runs: the next one gets the port (nerdctl#2699)"""
    web, after = container("web"), container("next")
    web.create()
    web.kill()
    after.create()
    assert after.answers()
    web.network.delete(web.id, "", PORTS)
    assert after.answers()


def test_created_again(container):
    """containerd was bounced: the same container is created again, and was never detached (nerdctl#3355)"""
    web = container("web")
    web.create()
    web.kill()
    web.create()
    assert web.answers()


def test_failed_create(container):
    """A failed create leaves the running container's port alone (nerdctl#4253)"""
    web, second = container("web"), container("second")
    web.create()
    before = lab.table()
    with pytest.raises(lab.CniFailed, match=f"already published by container {web.id}"):
        second.create()
    second.network.delete(second.id, "", PORTS)
    assert lab.table() == before
    assert web.answers()


def test_ports_that_are_held(container):
    """From 2.1.6 on a process holds the ports before ADD: no obstacle, unless hostPortInUse says so"""
    web = container("web")
    with lab.Server("reserver", lab.HOST, 8080, ip="0.0.0.0"):
        web.create()
        assert web.answers()
        web.stop()
        first, ours, *rest = CONFLIST["plugins"]
        web.network = lab.Network({**CONFLIST, "plugins": [first, {**ours, "hostPortInUse": "refuse"}, *rest]},
                                  web.network.bin_dir)
        with pytest.raises(lab.CniFailed, match="in use by a process of this host"):
            web.create()


def test_documented_commands(machine):
    """The commands in docs/nerdctl.md, which have installed what was tested here; the conflist is valid"""
    machine.shell(CONF)
    machine.run("cni-portmap", "validate", "/etc/cni/net.d/nerdctl-web.conflist")
    assert shown_in("docs/nerdctl.md", COMMANDS)
    assert shown_in("docs/nerdctl.md", CONF)
