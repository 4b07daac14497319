"""cnitool: libcni's own tool, built from the distribution's sources."""
import json
from typing import NamedTuple

import lab
import pytest
from lab.machine import CLIENT_IP, HOST_IP, NEWER_PLUGINS, PLUGINS, VERSIONS, Machine, flush_ruleset, shown_in

PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
         {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"},
         {"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]

COMMANDS = """
scripts/install
ip netns add box
export NETCONFPATH=conf CNI_PATH=/opt/cni/bin:/usr/lib/cni
export CAP_ARGS='{"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}'
cnitool add web /run/netns/box
cnitool check web /run/netns/box
cni-portmap list --port 8080
cnitool del web /run/netns/box
"""


class Case(NamedTuple):
    """A release of cnitool, and the cniVersion of the conflist."""

    release: str
    version: str


CASES = [pytest.param(Case(*case), id=" ".join(case)) for case in (
    ("1.1", "0.4.0"), ("1.1", "1.0.0"), ("1.3", "0.4.0"), ("1.3", "1.0.0"), ("1.3", "1.1.0"))]
NEWEST = [pytest.param(Case("1.3", "1.1.0"), id="1.3 1.1.0")]


@pytest.fixture(scope="module")
def machine(need, cnitool):
    need(f"{PLUGINS}/bridge", NEWER_PLUGINS / "bridge")
    with Machine("cnitool") as machine:
        VERSIONS[__name__] += ["1.1", "1.3"]
        machine.run("cp", cnitool / "cnitool-1.1", cnitool / "cnitool-1.3", "/usr/local/bin")
        machine.run("ln", "-s", "cnitool-1.3", "/usr/local/bin/cnitool")
        yield machine


class Box:
    """A network namespace, and cnitool that attaches it to the network `web`."""

    def __init__(self, machine: Machine, case: Case, name: str = "box") -> None:
        self.machine, self.case = machine, case
        self.namespace = lab.Namespace(name)
        machine.write("/etc/cni/net.d/web.conflist", json.dumps(lab.bridge_conflist("web", version=case.version)))

    def command(self, verb: str) -> list[object]:
        others = NEWER_PLUGINS if self.case.version == "1.1.0" else PLUGINS  # the older bridge ends at 1.0.0
        return ["env", f"CNI_PATH=/opt/cni/bin:{others}", f"CAP_ARGS={json.dumps({'portMappings': PORTS})}",
                f"cnitool-{self.case.release}", verb, "web", self.namespace.path]

    def do(self, verb: str) -> str:
        return self.machine.run(*self.command(verb))

    def answers(self) -> bool:
        with lab.Server("box", self.namespace, 80), lab.Server("box", self.namespace, 53, "udp"):
            return lab.exchange(self.machine.client, HOST_IP[4], 8080) == lab.Saw("box", CLIENT_IP[4], 80) and \
                lab.exchange(self.machine.client, HOST_IP[6], 5353, "udp") == lab.Saw("box", CLIENT_IP[6], 53) and \
                lab.exchange(lab.HOST, "127.0.0.1", 8081) is not None


@pytest.fixture
def box(machine, request):
    box = Box(machine, request.param)
    yield box
    box.do("del")
    box.namespace.remove()
    assert "c/" not in lab.table()


@pytest.mark.parametrize("box", CASES, indirect=True)
def test_added_it_answers_until_deleted(box):
    """add, check, del, del again"""
    result = json.loads(box.do("add"))
    assert result["cniVersion"] == box.case.version
    assert len(result["ips"]) == 2
    box.do("check")
    assert box.answers()
    box.do("del")
    assert "c/" not in lab.table()
    assert not box.answers()


@pytest.mark.parametrize("box", CASES, indirect=True)
def test_check_names_a_lost_port(box):
    """check fails when a port is gone, and names it; cni-portmap restore repairs it"""
    box.do("add")
    lab.run("nft", "delete", "element", "inet", "cni_portmap", "hostports", "{ ipv4 . tcp . 8080 }")
    assert "tcp port 8080 on 0.0.0.0 is not forwarded to this container" in box.machine.fails(*box.command("check"))
    box.machine.run("cni-portmap", "restore")
    box.do("check")
    flush_ruleset()
    box.machine.run("cni-portmap", "restore")
    box.do("check")
    assert box.answers()


@pytest.mark.parametrize("box", CASES, indirect=True)
def test_a_second_claim_is_refused(box):
    """add of a second namespace with the same ports fails, with the owner's name; the first is unharmed"""
    box.do("add")
    before, second = lab.table(), Box(box.machine, box.case, "second")
    said = box.machine.fails(*second.command("add"))
    assert "is already published by container cnitool-" in said
    second.do("del")
    second.namespace.remove()
    assert lab.table() == before
    assert box.answers()


@pytest.mark.parametrize("box", CASES, indirect=True)
def test_namespace_gone(box):
    """del when the namespace is gone: nothing is left"""
    box.do("add")
    box.namespace.remove()
    box.do("del")
    assert "c/" not in lab.table()


@pytest.mark.parametrize("box", NEWEST, indirect=True)
def test_status_says_why_it_cannot_work(box):
    """status: fine, and without CAP_NET_ADMIN the reason"""
    box.do("status")
    said = box.machine.fails("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *box.command("status"))
    assert "CAP_NET_ADMIN" in said


@pytest.mark.parametrize("box", NEWEST, indirect=True)
def test_gc_deletes_what_libcni_knows(box):
    """gc: libcni deletes the attachments that it knows; those of others, of which it sends no list, stay"""
    box.do("add")
    box.do("gc")
    assert "c/" not in lab.table()
    box.do("add")
    for file in (box.machine.root / "var/lib/cni/results").iterdir():
        file.unlink()
    before = lab.table()
    box.do("gc")
    assert lab.table() == before


def test_documented_commands(machine):
    """The commands in docs/cnitool.md"""
    assert "0.0.0.0:8080/tcp" in machine.shell(COMMANDS)
    lab.delete_namespace("box")
    assert "c/" not in lab.table()
    assert shown_in("docs/cnitool.md", COMMANDS)
