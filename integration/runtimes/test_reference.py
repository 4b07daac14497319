"""The reference plugin portmap is exchanged for this one while its containers run: Debian's 1.1.1, 1.6.2 and 1.9.1."""
import contextlib
import json
import shutil
import signal
import subprocess
import time

import lab
import pytest
from lab.libcni_cache import Cache
from lab.reference import CACHE, LAN, PORTMAPS, REFERENCES, Node, Reference, traces

from cni_portmap.libcni_cache import CACHE_DIRS

TCP, UDP = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}, \
    {"hostPort": 5353, "containerPort": 53, "protocol": "udp"}
LOCAL = {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}
BOTH, NOBODY = {4: "web", 6: "web"}, {4: "", 6: ""}


def port(number):
    return {"hostPort": number, "containerPort": 80, "protocol": "tcp"}


@pytest.fixture(params=REFERENCES, ids=str)
def node(request, need, bin_dir, tmp_path_factory):
    need(PORTMAPS[request.param.release], "iptables-nft", "iptables-legacy", "strace")
    with Node(request.param, bin_dir, tmp_path_factory.mktemp(str(request.param))) as node:
        yield node
    lab.LOCK.unlink(missing_ok=True)


def rules_of(container):
    return traces(container.id, f"{container.ipv4}:", f"[{container.ipv6}]:", f"daddr {container.ipv4} ")


@pytest.mark.parametrize("late", [False, True], ids=["whole", "late"])
def test_delete(node, late):
    """DEL removes what was left of that container in that network, and the flows; nothing of another."""
    web, other = node.start("web", TCP, UDP, LOCAL), node.start("other", port(8090))
    elsewhere = node.start("far", port(8070), network="far")
    with lab.Server("web", web, 80), lab.Server("web", web, 53, "udp"), lab.Server("other", other, 80), \
            lab.Server("far", elsewhere, 80), lab.Client(node.client, LAN[4], 5353, "udp") as client, client.chatter():
        assert node.answers(8080) == BOTH and client.ask_until("web").server == "web"
        assert rules_of(web)
        node.swap()
        assert not node.call("DEL", web, late).code
        assert not rules_of(web)
        assert not [flow for flow in lab.flows("udp", 5353) if flow.target == web.ipv4]
        assert node.answers(8080, timeout=0.3) == NOBODY
        assert node.answers(8090) == {4: "other", 6: "other"} and node.answers(8070) == {4: "far", 6: "far"}
        assert rules_of(other) and rules_of(elsewhere)
        assert not node.call("DEL", web, late).code


def test_doctor_before_adoption(node):
    """What the reference plugin publishes is no alarm; doctor names it, and adopt, with a port and without"""
    web = node.start("web", TCP, LOCAL)
    node.swap()
    for words in ("8080",), ("8081",), ():
        found = node.command("doctor", *words)
        assert [(each["cause"], each["severity"]) for each in found if each["cause"] != "mtu"] == \
            [("published-by-other", "info")]
        assert found[0]["advice"].startswith("cni-portmap adopt") and web.id in json.dumps(found[0])
    lab.nft("flush", "ruleset")
    for program in "iptables-legacy", "ip6tables-legacy":
        lab.run(program, "-t", "nat", "-F")
    for words in ("8080",), ():
        assert node.command("doctor", *words, status=1)[0]["cause"] == "lost-from-kernel"
    node.command("restore")
    with lab.Server("web", web, 80):
        assert node.answers(8080) == BOTH


def test_doctor_knows_the_dead(node):
    """Rules of the reference plugin for a container that is gone are an error, and adopt removes them"""
    web = node.start("web", TCP)
    node.swap()
    node.kill(web)
    found = node.command("doctor", "8080", status=1)
    assert [(each["cause"], each["severity"]) for each in found] == [("published-by-other", "error")]
    assert found[0]["advice"].startswith("cni-portmap adopt")
    node.command("adopt")
    assert not traces(web.id)
    Cache(CACHE).forget(web)


def test_delete_in_one_of_two_networks(node):
    """A container in two networks keeps what it has in the other."""
    web = node.start("web", TCP)
    second = node.join(web, "far", port(8070))
    node.swap()
    assert not node.call("DEL", web).code
    assert not traces(f"{web.ipv4}:") and traces(f"{second.ipv4}:")
    assert not node.call("DEL", second).code
    assert not traces(web.id)


class Forked:
    """What is said of a container by `lab.start_fork`; `late`: without prevResult and CNI_NETNS."""

    def __init__(self, container, late=False):
        self._container, self._late = container, late

    def environ(self, verb):
        return {"CNI_COMMAND": verb, "CNI_CONTAINERID": self._container.id, "CNI_IFNAME": "eth0",
                "CNI_NETNS": "" if self._late else self._container.namespace.path}

    def stdin(self, verb):
        its = self._container
        return json.dumps(its.network.config() if self._late else its.network.config(its.ports, its.result))


@pytest.mark.parametrize("node", [Reference("1.9.1", "iptables"), Reference("1.9.1", "nftables")], ids=str,
                         indirect=True)
def test_delete_killed_at_any_system_call(node):
    """All of the rules in nf_tables are there, or none; the next DEL completes it. Every fourth call is tried."""
    web = node.start("web", TCP, UDP)
    config = web.network.config(web.ports, web.result)
    node.swap()
    whole, at = len(rules_of(web)), 0
    while True:
        fork = lab.start_fork("DEL", Forked(web, late=True), stop_at=at)
        fork.answer()
        assert len(rules_of(web)) in (whole, 0), at
        if not fork.killed:
            break
        assert not node.call("DEL", web).code and not rules_of(web)
        lab.call_plugin(node.theirs / "portmap", "ADD", config, web.id, web.namespace.path)
        at += 4
    assert at > 20 and not rules_of(web)


def test_gc(node):
    """GC removes what was left of containers that are not valid any more, in that network only."""
    web, other, far = node.start("web", TCP, UDP), node.start("other", port(8090)), \
        node.start("far", port(8070), network="far")
    node.swap()
    assert not node.gc("net", other).code
    assert not rules_of(web) and rules_of(other) and rules_of(far)
    assert not node.gc("far").code
    assert rules_of(other) and not rules_of(far)


def test_add_is_refused_while_the_owner_lives(node):
    """101 after four seconds of waiting, with the owner's ID; nothing is written, and the owner goes on answering."""
    web, other = node.start("web", TCP), node.start("other")
    node.swap()
    other.ports = [TCP]
    before, began = lab.generation(), time.monotonic()
    answer = node.call("ADD", other)
    assert answer.code == 101 and web.id in answer.msg and "reference plugin" in answer.msg, answer
    assert time.monotonic() - began > 3.9 and lab.generation() == before
    with lab.Server("web", web, 80):
        assert node.answers(8080) == BOTH


def test_add_waits_for_the_owner_to_leave(node):
    """ADD before the old container's DEL, as Kubernetes does it: it waits, and succeeds."""
    web, other = node.start("web", TCP), node.start("other")
    node.swap()
    other.ports = [TCP]
    waiting = lab.start_fork("ADD", Forked(other), prepare=lab.wait_long)
    time.sleep(0.5)
    assert waiting.is_running()
    assert not node.call("DEL", web).code
    answer = waiting.answer()
    assert not answer.code, answer
    with lab.Server("other", other, 80):
        assert node.answers(8080) == {4: "other", 6: "other"}


def test_add_takes_the_port_of_the_dead(node):
    """libcni's file proves the owner dead: its rules go in the same call, with those of its other ports."""
    web, other = node.start("web", TCP, UDP), node.start("other")
    node.swap()
    node.kill(web)
    other.ports = [TCP]
    assert not node.call("ADD", other).code
    assert not rules_of(web)
    with lab.Server("other", other, 80):
        assert node.answers(8080) == {4: "other", 6: "other"}


@pytest.mark.parametrize("verbs", [("DEL", "ADD"), ("ADD",)], ids="-".join)
def test_network_reload(node, verbs):
    """`podman network reload`, DEL and ADD, leaves only ours; ADD alone as well."""
    web = node.start("web", TCP, UDP)
    node.swap()
    for verb in verbs:
        assert not node.call(verb, web).code
    assert not rules_of(web) and len(lab.chains()) == 1
    with lab.Server("web", web, 80):
        assert node.answers(8080) == BOTH
    assert not node.call("CHECK", web).code


def test_check(node):
    """CHECK says who has published the container, and what to do."""
    web = node.start("web", TCP)
    node.swap()
    answer = node.call("CHECK", web)
    assert answer.code == 104 and "reference plugin" in answer.msg and "cni-portmap adopt" in answer.details


def test_list_all(node):
    """`list --all` names the publisher and the container, and a port that both publish."""
    web, other = node.start("web", TCP, UDP, LOCAL), node.start("other", port(8090))
    node.swap()
    found = node.command("list", "--all")
    assert {each["publisher"] for each in found} == {"the reference plugin portmap"}
    assert {(each["host_ip"], each["host_ports"][0], each["protocol"], each["container_ip"], each["container_ports"][0],
             each["container_id"]) for each in found} == {
        *((ip, number, protocol, target, to, owner.id)
          for owner, number, protocol, to in ((web, 8080, "tcp", 80), (web, 5353, "udp", 53), (other, 8090, "tcp", 80))
          for ip, target in (("0.0.0.0", owner.ipv4), ("::", owner.ipv6))),
        ("127.0.0.1", 8081, "tcp", web.ipv4, 80, web.id)}
    assert not any(each["split"] for each in found)
    assert node.command("list") == [] and node.command("list", "--port", 8080, status=1) == []
    config = web.network.config(web.ports, web.result)
    assert not node.call("ADD", web).code
    lab.call_plugin(node.theirs / "portmap", "ADD", config, web.id, web.namespace.path)
    split = {(each["publisher"], *each["split"]) for each in node.command("list", "--all", "--port", 8080)}
    assert split == {("cni-portmap", "the reference plugin portmap"), ("the reference plugin portmap", "cni-portmap")}


# --- adopt, and the way back ----------------------------------------------------------------------------------

def test_adopt(node):
    """Every live container is taken over without a lost connection; flows live on; what is dead goes."""
    web, other, far = node.start("web", TCP, UDP, LOCAL), node.start("other", port(8090)), \
        node.start("far", port(8070), network="far")
    dead = node.start("dead", port(8060))
    node.swap()
    node.kill(dead)
    with lab.Server("web", web, 80, keep=True), lab.Server("web", web, 53, "udp"), lab.Server("other", other, 80), \
            lab.Server("far", far, 80), lab.Client(node.client, LAN[4], 8080) as tcp, \
            lab.Client(node.client, LAN[6], 5353, "udp") as udp:
        assert tcp.ask().server == "web" and udp.ask_until("web").server == "web"
        flows = {flow for flow in lab.flows("udp", 5353, 6) if flow.target == web.ipv6}
        before = traces("CNI-DN", "dnat to")
        planned = node.command("adopt", "--dry-run")
        assert traces("CNI-DN", "dnat to") == before and not lab.table()
        with contextlib.ExitStack() as clients:
            for number in 8080, 8090, 8070:
                clients.enter_context(lab.connecting(node.client, number, *LAN.values()))
            time.sleep(0.2)
            report = node.command("adopt")
            time.sleep(0.2)
        assert report == planned
        assert {each["container"] for each in report["adopted"]} == {web.id, other.id, far.id}
        assert [each["container"] for each in report["removed"]] == [dead.id] and not report["left"]
        assert tcp.ask().server == "web" and udp.ask().server == "web"
        assert flows and flows <= {flow for flow in lab.flows("udp", 5353, 6) if flow.target == web.ipv6}
        assert node.answers(8080) == BOTH and lab.exchange(lab.HOST, "127.0.0.1", 8081).server == "web"
    assert not any(rules_of(container) for container in (web, other, far, dead))
    for container in web, other, far:
        assert not node.call("CHECK", container).code
    assert node.command("adopt") == {"adopted": [], "removed": [], "left": []}


def test_adopt_leaves_what_it_cannot_take(node):
    """A container that libcni does not know, and one whose port another has: left as it is, with the reason."""
    web, unknown, second = node.start("web", TCP), node.start("unknown", port(8090)), node.start("second", TCP)
    Cache(CACHE).forget(unknown)
    node.swap()
    kept = rules_of(unknown) + rules_of(second)
    report = node.command("adopt", status=1)
    assert [each["container"] for each in report["adopted"]] == [web.id]
    assert {each["container"]: each["reason"] for each in report["left"]} == {
        unknown.id: f"libcni has no file of it in {', '.join(CACHE_DIRS)}",
        second.id: f"tcp port 8080 on 0.0.0.0 is already published by container {web.id}, interface eth0, network net"}
    assert rules_of(unknown) + rules_of(second) == kept
    with lab.Server("web", web, 80), lab.Server("unknown", unknown, 80):
        assert node.answers(8080) == BOTH and node.answers(8090) == {4: "unknown", 6: "unknown"}


@pytest.mark.parametrize("folder", ["usual", "other"])
def test_adopt_in_one_of_two_networks(node, folder, tmp_path):
    """What cannot be taken over in the other network is named, and goes on; also where libcni's files are elsewhere."""
    node.start("rival", port(8070))
    web = node.start("web", TCP)
    second = node.join(web, "far", port(8071), port(8070))
    words = []
    if folder == "other":
        words = ["--cache", shutil.move(CACHE, tmp_path / "cache")]
        CACHE.mkdir()
    node.swap()
    kept = traces(f"{second.ipv4}:", f"[{second.ipv6}]:")
    planned = node.command("adopt", "--dry-run", *words, status=1)
    report = node.command("adopt", *words, status=1)
    assert report == planned and [each["container"] for each in report["left"]] == [web.id]
    assert "tcp port 8070 on 0.0.0.0 is already published" in report["left"][0]["reason"]
    assert kept and traces(f"{second.ipv4}:", f"[{second.ipv6}]:") == kept
    with lab.Server("web", web, 80):
        assert node.answers(8080) == BOTH and node.answers(8071)[4] == "web"
    assert not traces(f"{web.ipv4}:")


def test_adopt_leaves_a_port_to_whom_it_leads(node):
    """Where our table is older than theirs, their rules come first: the rival that stays does not get the port."""
    node.swap()
    node.start("own", port(9000))
    for network in node.networks.values():
        network.bin_dir = node.theirs
    web, rival = node.start("web", TCP), node.start("rival", TCP)
    node.swap()
    with lab.Server("web", web, 80), lab.Server("rival", rival, 80):
        assert node.answers(8080) == BOTH
        for _ in range(2):
            report = node.command("adopt", status=1)
            assert [each["container"] for each in report["adopted"] + report["left"]] == [web.id, rival.id]
            assert node.answers(8080) == BOTH and not node.call("CHECK", web).code
        assert not node.call("DEL", rival).code
        assert node.command("adopt")["left"] == [] and not rules_of(web) and node.answers(8080) == BOTH


def test_adopt_killed_at_any_point_can_be_repeated(node):
    """It answers after each of them, and what one has begun the next one ends. Every fifth call is tried."""
    web = node.start("web", TCP, LOCAL)
    node.swap()
    states, at, status = set(), 1, -signal.SIGKILL
    with lab.Server("web", web, 80):
        while status == -signal.SIGKILL:
            status = subprocess.run(["strace", "-f", "-o", "/dev/null", "-e", "trace=sendto",
                                     "-e", f"inject=sendto:signal=KILL:when={at}",
                                     node.ours.parent / "sbin/cni-portmap", "adopt"], capture_output=True,
                                    check=False).returncode
            states.add((bool(rules_of(web)), bool(lab.chains())))
            assert node.answers(8080) == BOTH and lab.exchange(lab.HOST, "127.0.0.1", 8081).server == "web", at
            at += 5
    assert status == 0 and states == {(True, False), (True, True), (False, True)}
    assert not rules_of(web) and not node.call("CHECK", web).code


def test_restore_takes_nothing_from_the_reference_plugin(node):
    """What that publishes is not lost: `adopt` takes it over, `restore` does not."""
    web = node.start("web", TCP)
    node.swap()
    assert node.command("restore")["restored"] == [] and rules_of(web) and lab.chains() == []


def test_release(node):
    """The way back: what the reference plugin publishes again goes here, without a lost connection; the rest stays."""
    node.swap()
    web, other = node.start("web", TCP, UDP, LOCAL), node.start("other", port(8090))
    dead = node.start("dead", port(8060))
    for network in node.networks.values():
        network.bin_dir = node.theirs
    lab.call_plugin(node.theirs / "portmap", "ADD", web.network.config(web.ports, web.result), web.id,
                    web.namespace.path)
    node.kill(dead)
    with lab.Server("web", web, 80, keep=True), lab.Server("other", other, 80), \
            lab.Client(node.client, LAN[4], 8080) as tcp:
        assert tcp.ask().server == "web"
        with lab.connecting(node.client, 8080, *LAN.values()), lab.connecting(node.client, 8090, *LAN.values()):
            time.sleep(0.2)
            report = node.command("release", status=1)
            time.sleep(0.2)
        assert tcp.ask().server == "web"
    assert {each["container"] for each in report["released"]} == {web.id, dead.id}
    assert [(each["container"], each["reason"]) for each in report["kept"]] == [
        (other.id, "the reference plugin does not publish this container")]
    assert rules_of(web) and lab.chains() == [f"c/{other.id}/eth0"]
    node.command("release", "--force", "", status=1)  # a variable of a script that is not set
    assert node.command("release", "other", "--force", "--dry-run")["released"] and lab.chains()
    assert node.command("release", "other", "--force")["kept"] == [] and lab.chains() == []
    node.command("release", "nobody", status=1)
    node.command("teardown")
    assert not lab.table() and node.answers(8060, timeout=0.2) == NOBODY
