"""The agent's memory and its judgements, without a kernel."""
import asyncio
import base64
import errno
import json
import os
import signal
import socket
import types

import pytest

from cni_portmap.agent import children, heal, main, metrics, notify, redirect
from cni_portmap.agent.forward import is_admitted
from cni_portmap.agent.memory import NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELTABLE, Memory
from cni_portmap.agent.permits import Permit, permits_in
from cni_portmap.cni import CniError
from cni_portmap.linux.events import NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWTABLE
from cni_portmap.linux.netlink import NLM_F_APPEND, attribute, attributes, named
from cni_portmap.linux.table import NFGENMSG

TABLE = "cni_portmap"


def handle(kind, number):
    return attribute(kind, number.to_bytes(8, "big"))


def table(number=1):
    return NFT_MSG_NEWTABLE, 0, NFGENMSG + named(1, TABLE) + handle(4, number)


def chain(name, number, kind=NFT_MSG_NEWCHAIN):
    return kind, 0, NFGENMSG + named(1, TABLE) + handle(2, number) + named(3, name)


def rule(name, number, word, after=0, flags=NLM_F_APPEND, kind=NFT_MSG_NEWRULE):
    return kind, flags, NFGENMSG + named(1, TABLE) + named(2, name) + handle(3, number) + \
        (handle(6, after) if after else b"") + attribute(7, bytes((0, len(word) + 1)) + word.encode() + b"\0")


def words(messages):
    """The comments of the rules that are written, each with whether it goes to the end, and after which."""
    found = []
    for kind, flags, body in messages:
        if kind == NFT_MSG_NEWRULE:
            its = dict(attributes(body, 4))
            found.append((its[7][2:-1].decode(), bool(flags & NLM_F_APPEND), int.from_bytes(its.get(6, b""), "big")))
    return found


@pytest.fixture
def memory():
    """A chain with the rules a, b, c, d, whose handles are 11 to 14."""
    made = Memory(TABLE)
    rules = (rule("guard", 11 + place, word) for place, word in enumerate("abcd"))
    made.apply([table(), chain("guard", 2), *rules], True)
    return made


def comments(memory):
    return memory.comments("guard")


def test_order(memory):
    """A rule is where the kernel has put it: at the end, at the head, or after another."""
    memory.apply([rule("guard", 15, "x", after=12, flags=0), rule("guard", 16, "y", flags=0)], True)
    memory.apply([rule("guard", 17, "z")], True)
    assert comments(memory) == ["y", "a", "b", "x", "c", "d", "z"]


@pytest.mark.parametrize("lost, expected", [
    ("a", [("a", False, 0)]), ("d", [("d", True, 13)]), ("bc", [("c", True, 11), ("b", True, 11)]),
    ("ab", [("b", False, 0), ("a", False, 0)]), ("abcd", [(word, False, 0) for word in "dcba"])])
def test_a_lost_rule_goes_where_it_was(memory, lost, expected):
    """After the one that was before it; of several the last goes first."""
    gone = [rule("guard", 11 + "abcd".index(word), word, kind=NFT_MSG_DELRULE) for word in lost]
    assert memory.apply(gone, False) == len(lost)
    assert words(memory.missing()) == expected and not memory.is_whole()


def test_a_new_table_has_new_numbers(memory):
    """In a table that was made again the numbers begin again: a rule is known by what it says."""
    assert memory.apply([chain("guard", 2, NFT_MSG_DELCHAIN), (NFT_MSG_DELTABLE, 0, table()[2])], False)
    memory.apply([table(2), chain("guard", 2), rule("guard", 12, "a"), rule("guard", 13, "d")], True)
    assert comments(memory) == ["a", "b", "c", "d"]
    assert [word for word, _, _ in words(memory.missing())] == ["c", "b"]


def test_an_owner_comes_in_place_of_itself(memory):
    """What it had before is no more; what is shared keeps what others need."""
    memory.apply([chain("c/web/eth0", 5), rule("c/web/eth0", 21, "old")], True)
    memory.apply([chain("c/web/eth0", 5, NFT_MSG_DELCHAIN)], False)
    memory.apply([chain("c/web/eth0", 7), rule("c/web/eth0", 22, "new")], True)
    assert memory.comments("c/web/eth0") == ["new"]


@pytest.mark.parametrize("lost", [(21,), (22,), (21, 22)])
def test_an_owner_writes_other_rules(memory, lost):
    """Its chain stays, and what of it was lost before is no more; another's note there is no such change."""
    rules = {number: rule("c/web/eth0", number, f"old {number}") for number in (21, 22)}
    gone = {number: (NFT_MSG_DELRULE, *its[1:]) for number, its in rules.items()}
    memory.apply([chain("c/web/eth0", 5), *rules.values()], True)
    memory.apply([gone[number] for number in lost], False)
    note = chain("c/web/eth0", 5), rule("c/web/eth0", 23, "note")
    if len(lost) == 1:
        memory.apply(note, True)
        assert len(memory.comments("c/web/eth0")) == 3
        gone[23] = (NFT_MSG_DELRULE, *note[1][1:])
    deleted = [its for number, its in gone.items() if number not in lost]
    memory.apply([chain("c/web/eth0", 5), *deleted, rule("c/web/eth0", 24, "new")], True)
    assert memory.comments("c/web/eth0") == ["new"] and memory.is_whole()
    assert memory.chains["c/web/eth0"].first == 24


def test_what_others_add_is_not_known(memory):
    """Neither a rule nor a chain; and what they delete of theirs is no loss."""
    memory.apply([chain("theirs", 9), rule("guard", 30, "accept")], False)
    assert not memory.apply([rule("guard", 30, "accept", kind=NFT_MSG_DELRULE), chain("theirs", 9, NFT_MSG_DELCHAIN)],
                            False)
    assert comments(memory) == ["a", "b", "c", "d"] and memory.is_whole()


@pytest.mark.parametrize("name, own", [
    ("cni-portmap/ADD", True), ("cni-portmap/res", True), ("portmap", True), ("cni-portmap", True), ("nft", False),
    ("cni-portmapper", False), ("python3", False), ("", False)])
def test_whose_a_transaction_is(name, own):
    """By the name of its process: ours, and those of 0.1."""
    assert heal.is_own(name) == own


@pytest.mark.parametrize("cross, peer, local, admitted", [
    (True, "fd09::2", "fd09::1", True), (False, "fd09::2", "fd09::1", False), (False, "fe80::2", "fe80::1", True),
    (False, "::1", "::1", True), (False, "::1", "fd09::1", False), (False, "192.0.2.1", "192.0.2.2", False)])
def test_who_is_forwarded(cross, peer, local, admitted):
    """Only whom NAT cannot serve."""
    assert is_admitted(Permit("10.88.0.2", 80, cross), peer, local) == admitted


WEB = {"HostPort": 8080, "ContainerPort": 80, "Protocol": "TCP", "HostIP": ""}


def permits(tmp_path, mapping=WEB, name="portMappings", second=None, **config):
    """What the file of an attachment permits; `second`: of another entry of the plugin."""
    plugin = {"type": "portmap", "capabilities": {name: True}}
    plugins = [{**plugin, **config}, *([] if second is None else [{**plugin, **second}])]
    conflist = {"cniVersion": "1.0.0", "name": "lab", "plugins": plugins}
    (tmp_path / "file").write_text(json.dumps({
        "kind": "cniCacheV1", "containerId": "web", "ifName": "eth0", "networkName": "lab", "netns": "/run/netns/web",
        "config": base64.b64encode(json.dumps(conflist).encode()).decode(), "capabilityArgs": {name: [mapping]},
        "result": {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "/run/netns/web"}],
                   "ips": [{"address": "10.88.0.2/16", "interface": 0}]}}))
    return permits_in([("c/web/eth0", str(tmp_path / "file"))])["c/web/eth0"]


@pytest.mark.parametrize("name, config", [
    ("portMappings", {}), ("PortMappings", {}), ("PORTMAPPINGS", {"trustedHostInterfaces": [], "conditionsV4": []})])
def test_what_a_file_permits(tmp_path, name, config):
    """Keys are read in whatever case, as the plugin reads them."""
    assert permits(tmp_path, name=name, **config) == [((6, "tcp", "", 8080), Permit("10.88.0.2", 80, True))]


@pytest.mark.parametrize("config", [
    {"gatewayModeV4": "nat"}, {"GatewayModeV6": "nat"}, {"gatewayModeV4": "nat", "TrustedHostInterfaces": ["eth0"]},
    {"tru\u017ftedHostInterfaces": ["eth0"]}, {"conditionsV4": ["-s", "192.0.2.0/24"]},
    {"ConditionsV6": ["-s", "2001:db8::/32"]}, {"Type": "bridge"}])
def test_what_a_file_forbids(tmp_path, config):
    """Nobody gets past a policy or a condition, however its key is written."""
    assert permits(tmp_path, **config) == []


def test_a_file_that_is_being_written(tmp_path):
    """It permits nothing yet, and is not the last word."""
    permits(tmp_path)
    path = tmp_path / "file"
    text = path.read_text()
    for part in text[:-1], "":
        path.write_text(part)
        assert permits_in([("c/web/eth0", str(path))]) == {"c/web/eth0": None}


@pytest.mark.parametrize("second, permitted", [
    ({}, True), ({"conditionsV4": ["-s", "192.0.2.0/24"]}, False), ({"ConditionsV6": ["-s", "2001:db8::/32"]}, False),
    ({"gatewayModeV4": "nat"}, False)])
def test_the_second_entry_forbids_too(tmp_path, second, permitted):
    """A network with two entries of the plugin: a condition of either of them counts."""
    assert bool(permits(tmp_path, second=second)) == permitted


def test_metrics_are_escaped():
    """Others may have written a record."""
    text = metrics.family("x", "counter", "y", [({"a": 'b"\\\n'}, 1)])
    assert text.splitlines()[-1] == 'x{a="b\\"\\\\\\n"} 1'


def test_generations_wrap():
    """Of 32 bits, as the kernel's."""
    assert heal._is_after(1, 0xffffffff) and not heal._is_after(0xffffffff, 1) and not heal._is_after(5, 5)


def test_a_ruleset_that_does_not_hold_still(monkeypatch):
    """It is read as often as it takes, in one line of the log, and never believed before it holds still."""
    generations = iter([*range(5000), 7, 7])
    healer = heal.Healer.__new__(heal.Healer)
    logged, read = [], []
    healer.memories = [types.SimpleNamespace(name=TABLE, read=read.append)]
    healer.listener = types.SimpleNamespace(commits=lambda: iter(()))
    healer._witness, healer._log, healer._netlink = types.SimpleNamespace(look=lambda: None), logged.append, None

    async def lock(_):
        return types.SimpleNamespace(release=lambda: None)
    monkeypatch.setattr(heal.Healer, "_lock", lock)
    monkeypatch.setattr(heal, "generation", lambda _: next(generations))
    monkeypatch.setattr(heal, "read_table", lambda _, name: [name])
    monkeypatch.setattr(heal, "TRIES", 1)
    monkeypatch.setattr(heal, "LOCK_POLL", 0)
    monkeypatch.setattr(heal, "READ_POLL", 0)
    asyncio.run(healer.read())
    assert read == [[TABLE]] and len(logged) == 1 and not healer._overrun


def test_the_service_manager_does_not_listen(monkeypatch, tmp_path):
    """Nobody waits for it: what it has no room for is for later; and where there is none, there is nothing to say."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert notify.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        count = 0
        while notify.notify("WATCHDOG=1"):
            count += 1
        assert count
        assert manager.recv(100) == b"WATCHDOG=1"
        assert notify.notify("READY=1", "STATUS=x")
        assert [manager.recv(100) for _ in range(count)][-1] == b"READY=1\nSTATUS=x"


# --- children ----------------------------------------------------------------------------------------------------

def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def _refuses():
    raise CniError(11, "timed out", "see who holds it")


def _forbidden(*_):
    raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")


@pytest.mark.parametrize("work, patched, error", [
    (_refuses, {}, "gc: timed out"), (_killed, {}, "gc: ended without an answer"),
    (lambda: 1 / 0, {}, "gc: ZeroDivisionError: division by zero"), (object, {}, "gc: ended without an answer"),
    (int, {"json.dumps": lambda _: '["done", [1'}, "gc: ended without an answer"),
    (int, {"os.fork": _forbidden}, "Resource temporarily unavailable")])
def test_a_child_that_fails(monkeypatch, work, patched, error):
    """However it ends, there is one error, and neither a descriptor nor a process is left."""
    for name, instead in patched.items():
        monkeypatch.setattr(f"cni_portmap.agent.children.{name}", instead)
    before = {*os.listdir("/proc/self/fd")}
    with pytest.raises((CniError, OSError), match=error):
        asyncio.run(children.in_child("gc", work))
    assert {*os.listdir("/proc/self/fd")} == before and not children._running


def test_periodic_work_goes_on_after_a_failure(monkeypatch):
    """Of gc one child is killed, and one has to wait too long for the lock: the next removes what there is."""
    logged, works = [], [_killed, _refuses, lambda: (["removed web"], {})]
    in_child = children.in_child
    monkeypatch.setattr(main, "log", logged.append)
    monkeypatch.setattr(main.children, "in_child",
                        lambda verb, _: in_child(verb, works.pop(0) if works[1:] else works[0]))
    agent = main.Agent.__new__(main.Agent)
    agent._dead = {}

    async def run():
        task = asyncio.ensure_future(main._every(0, agent._gc))
        while not (task.done() or "removed web" in logged):
            await asyncio.sleep(0.01)
        task.cancel()
    asyncio.run(asyncio.wait_for(run(), 60))
    assert logged[:3] == ["gc: ended without an answer", "gc: timed out see who holds it", "removed web"]


def test_the_agents_own_table_is_flushed():
    """For a deletion libnftables 1.0 lists every set of the host, and dies on some; and no set is empty."""
    claims = [(6, "tcp", "", 80), (6, "udp", "::1", 53), (4, "tcp", "", 81)]
    for wanted, localhost, rules in (claims, True, 2), (claims, False, 1), ([], True, 0):
        lines = redirect.text(wanted, localhost).splitlines()
        assert lines[1] == f"flush table {redirect.TABLE}" and not any("delete" in line for line in lines)
        assert [line for line in lines if "redirect" in line] == [
            "ip6 saddr fe80::/10 fib daddr type local meta l4proto . th dport { tcp . 80 } redirect;",
            "ip6 saddr ::1 ip6 daddr ::1 meta l4proto . th dport { tcp . 80, udp . 53 } redirect;"][:rules]
