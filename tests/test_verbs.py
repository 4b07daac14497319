"""The verbs, against a kernel that only records: what is asked and written, in which order, and what if it fails."""
import contextlib
import re
import socket
import types

import pytest
from helpers import (CHAIN, INODE, PORT, VARIABLES, RecordingKernel, attachment, base, base_comments,
                     configuration, elements, respond, verdicts)

from cni_portmap import cni, ruleset
from cni_portmap.verbs import others
from cni_portmap.verbs.add import add as publish
from cni_portmap.verbs.check import check as check_attachment
from cni_portmap.verbs.delete import delete
from cni_portmap.verbs.gc import gc
from cni_portmap.verbs.published import Published
from cni_portmap.verbs.restore import prune, restore
from cni_portmap.verbs.steps import chains_of_container, repair_shared_chains

WEB = attachment(PORT)
CLOSED = {"localnet": False, "is_noted": False}
BASE = base()
INTACT = {"comments": lambda chain: base_comments().get(chain, []), "has_chain": lambda chain: chain in ruleset.SHARED}
OTHER = "c/other/eth0"
OWN_RECORD = f"net=lab netns=/run/netns/web#{INODE}"
OTHER_RECORD = "net=theirs netns=/run/netns/other#99"


def holding(table, record=OTHER_RECORD, own=CHAIN, **answers):
    """Answers of a host with an intact base whose maps are `table`: (map, key) -> chain."""
    chains = {*table.values()}
    return {**INTACT, "has_chain": lambda chain: chain in ruleset.SHARED or chain in chains,
            "lookup": lambda wanted: {element: table[element] for element in wanted if element in table},
            "owners_of_port": lambda name, endings: [(chain, key[-8:]) for (its_name, key), chain in table.items()
                                                if its_name == name and key[-8:] in endings],
            "owned_elements": lambda wanted: [(element, chain) for element, chain in table.items() if chain in wanted],
            "owner": lambda chain: ruleset.Owner(chain, OWN_RECORD if chain in (CHAIN, own) else record), **answers}


def dead(owners):
    return verdicts(owners, "dead")


def other_is_dead(owners):
    return {owner.chain: (("dead" if owner.container_id == "other" else "alive"), "") for owner in owners}


UNBOUND = {"ips": [{"address": "10.88.0.2/16"}, {"address": "fd88::2/64"}]}  # addresses of whichever interface


def mapping(host_ip="", protocol="tcp", host_port=8080, container_port=80):
    return {"hostPort": host_port, "containerPort": container_port, "protocol": protocol, "hostIP": host_ip}


def add(kernel, *ports, **keys):
    """Publish ports; the CniError, or None."""
    try:
        publish(attachment(*ports or [PORT], **keys), kernel)
    except cni.CniError as error:
        return error
    return None


# --- ADD ------------------------------------------------------------------------------------------------------

def test_first_add(kernel):
    """The first ADD of a host writes the base, and opens localhost only then: the guard is part of it.

    What it opens is noted before, so that somebody can close it whenever this process dies.
    """
    kernel.answers.update(CLOSED)
    assert add(kernel) is None
    assert kernel.written == [BASE, ruleset.attach(WEB) + ruleset.note_interfaces({"cni0": ruleset.OPENED})]
    assert kernel.named("write", "set_localnet")[-1] == ("set_localnet", "cni0", True)


def test_add():
    """With the base there, only the attachment is written; nothing is deleted, and nothing is listed."""
    kernel = RecordingKernel(**INTACT)
    assert add(kernel) is None
    assert kernel.written == [ruleset.attach(WEB)]
    assert not kernel.named("owners", "snapshot", "dry_run_apart", "port_in_use", "owner")


def test_old_libnftables():
    """One that drops the rules of a chain is found out before anything is published."""
    kernel = RecordingKernel(is_empty=True)
    error = add(kernel)
    assert error.code == 100 and "libnftables" in error.msg
    assert len(kernel.written) == 1 and CHAIN not in kernel.written[0]
    with pytest.raises(cni.CniError, match="libnftables"):
        restore([WEB], RecordingKernel(is_empty=True))


def test_add_order():
    """Rules are read and written and localhost is opened under the lock; connections are forgotten after."""
    kernel = RecordingKernel(**INTACT, **CLOSED)
    add(kernel, mapping(protocol="udp"), conditionsV4=["ip saddr 10.0.0.1"])
    order = [call[0] for call in kernel.calls]
    lock, write, unlock = order.index("lock"), order.index("write"), order.index("unlock")
    assert set(order[:lock]) == {"namespace", "link", "dry_run_apart", "way_to", "localhost_obstacle"}
    assert order[write + 1:unlock] == ["localnet", "set_localnet", "allow_localhost6"]
    assert set(order[unlock + 1:]) == {"delete_flows"}
    assert {"is_noted", "lookup", "comments"} <= set(order[lock:write])


def test_add_again():
    """A repeated ADD replaces what the attachment had, whatever that was, in one transaction."""
    old = dict.fromkeys(elements(attachment(mapping(host_port=1), PORT)), CHAIN)
    kernel = RecordingKernel(**holding(old))
    assert add(kernel) is None
    assert kernel.written == [ruleset.detach([CHAIN], old) + ruleset.attach(WEB)]


def test_inode():
    """The record has the inode that the network namespace has at ADD."""
    kernel = RecordingKernel(namespace=77)
    add(kernel)
    assert ("namespace", "/run/netns/web") in kernel.calls and "netns=/run/netns/web#77" in kernel.written[-1]


@pytest.mark.parametrize("keys, texts", [
    ({}, []), ({"conditionsV4": ["ip saddr 10.0.0.1"]}, [ruleset.probe(4, "ip saddr 10.0.0.1", ["tcp"])]),
    ({"conditionsV4": ["-s 10.0.0.1"], "conditionsV6": ["ct state new"]},
     [ruleset.probe(4, "ip saddr 10.0.0.1", ["tcp"]), ruleset.probe(6, "ct state new", ["tcp"])])])
def test_conditions(keys, texts):
    """Conditions are tried alone, in a dry run; what nft doesn't take is code 7 before anything is written."""
    kernel = RecordingKernel()
    assert add(kernel, **keys) is None
    assert [text for _, text in kernel.named("dry_run_apart")] == texts
    kernel = RecordingKernel(dry_run_apart="syntax error")
    error = add(kernel, **keys)
    assert (error.code, error.details) == (7, "syntax error") if texts else error is None
    assert bool(kernel.written) != bool(texts)


def test_conditions_are_tried_with_each_protocol():
    """One that names a protocol cannot be written for the ports of another: that is told before anything is."""
    kernel = RecordingKernel(**INTACT)
    assert add(kernel, PORT, mapping(protocol="udp"), {**PORT, "hostIP": "::1", "protocol": "sctp"},
               conditionsV4=["tcp sport 1024-65535"]) is None
    (_, text), = kernel.named("dry_run_apart")
    rule = "meta nfproto ipv4 tcp sport 1024-65535"
    assert text.splitlines()[2:] == [f"{rule} tcp dport 1", f"{rule} udp dport 1", "}"]


# --- who owns a port ------------------------------------------------------------------------------------------

# As in bind(2): a wildcard and a specific address of one family conflict, two specific addresses don't.
OVERLAPS = [
    ({}, {}, True), ({}, {"host_ip": "0.0.0.0"}, True), ({}, {"host_ip": "::"}, True),
    ({"host_ip": "0.0.0.0"}, {"host_ip": "::"}, False), ({}, {"host_ip": "127.0.0.1"}, True),
    ({"host_ip": "127.0.0.1"}, {}, True), ({"host_ip": "::1"}, {}, True), ({}, {"host_ip": "::1"}, True),
    ({"host_ip": "127.0.0.1"}, {"host_ip": "127.0.0.1"}, True),
    ({"host_ip": "127.0.0.1"}, {"host_ip": "127.0.0.2"}, False), ({"host_ip": "::1"}, {"host_ip": "0.0.0.0"}, False),
    ({"host_ip": "127.0.0.1"}, {"host_ip": "::"}, False), ({"host_ip": "::1"}, {"host_ip": "fd00::1"}, False),
    ({}, {"protocol": "udp"}, False), ({"host_ip": "127.0.0.1"}, {"protocol": "udp"}, False),
    ({}, {"host_port": 8081}, False), ({}, {"host_ip": "127.0.0.1", "host_port": 8081}, False),
    ({}, {"container_port": 81}, True)]


@pytest.mark.parametrize("ours, theirs, conflict", OVERLAPS)
def test_conflict(ours, theirs, conflict):
    """A port of a living owner is refused before anything is written, and the owner is named."""
    table = dict.fromkeys(elements(attachment(mapping(**theirs))), OTHER)
    kernel = RecordingKernel(**holding(table))
    error = add(kernel, mapping(**ours))
    assert (error is not None) == conflict
    if conflict:
        assert error.code == 101 and kernel.written == []
        assert not kernel.named("set_localnet", "allow_localhost6", "delete_flows")
        words = ["tcp", "8080", "container other", "interface eth0", "network theirs"]
        assert all(word in error.args[0] for word in words)
        assert "/run/netns/other" in error.details


@pytest.mark.parametrize("ours, theirs, conflict", OVERLAPS)
def test_takeover(ours, theirs, conflict):
    """A dead owner's whole attachment is replaced in the same transaction; it is judged by its record."""
    table = dict.fromkeys(elements(attachment(mapping(**theirs), mapping(host_port=9))), OTHER)
    kernel = RecordingKernel(**holding(table, judge=dead))
    assert add(kernel, mapping(**ours)) is None
    new = ruleset.attach(attachment(mapping(**ours)))
    assert kernel.written == [(ruleset.detach([OTHER], table) if conflict else "") + new]
    judged = [(owner.netns, owner.inode) for _, owners in kernel.named("judge") for owner in owners]
    assert judged == [("/run/netns/other", 99)] * conflict


def test_two_owners():
    """One living owner among dead ones is enough to be refused."""
    table = dict(zip(elements(attachment(PORT, mapping(host_port=9))), [OTHER, OTHER, "c/third/eth0", "c/third/eth0"]))
    kernel = RecordingKernel(**holding(table, judge=other_is_dead))
    error = add(kernel, PORT, mapping(host_port=9))
    assert error.code == 101 and "container third" in error.args[0] and kernel.written == []


# Owners are judged without the lock, and checked again under it.

def taken(**answers):
    """A host where another container has WEB's ports."""
    return RecordingKernel(**holding(dict.fromkeys(elements(WEB), OTHER), **answers))


def locked(kernel):
    """The names of the calls that are made under the lock."""
    names, inside = [], False
    for call in kernel.calls:
        inside = (inside or call == ("lock",)) and call != ("unlock",)
        names += [call[0]] * inside
    return {*names}


@pytest.mark.parametrize("answers, code", [
    ({"namespace": -1}, 4), ({"namespace": 0}, 0), ({"namespace": -1, "link": "veth1#7"}, 0), ({"link": "veth1#7"}, 0),
    ({"link": "veth1#7", "has_link": False}, 4)])
def test_add_for_a_container_that_is_gone(answers, code):
    """It publishes nothing, if its link goes at the last moment or its namespace before; what is unknown is alive."""
    kernel = RecordingKernel(**answers)
    error = add(kernel)
    assert (error.code if error else 0) == code and bool(kernel.written) == (not code)
    assert not locked(kernel) & {"namespace", "namespace_soon", "judge", "link"}
    assert not code or ("veth1" if "link" in answers else "CNI_NETNS") in error.msg


def test_add_that_waited_for_the_lock():
    """Without a link the namespace is checked again, by what cannot hang, if the lock was waited for."""
    for waits, soon, code in (True, -1, 4), (True, 0, 0), (False, -1, 0):
        kernel = RecordingKernel(namespace_soon=soon, waits=waits)
        error = add(kernel)
        assert (error.code if error else 0) == code
        assert bool(kernel.named("namespace_soon")) == waits


def test_takeover_by_link():
    """A link says who lives at once: the lock is taken once, and nothing is judged."""
    record = "net=theirs netns=/run/netns/other#99 link=veth9#9"
    kernel = taken(record=record, glance=("dead", "gone"))
    assert add(kernel) is None
    assert len(kernel.named("lock")) == 1 and not kernel.named("judge", "wait_for") and OTHER in kernel.written[0]
    kernel = taken(record=record, glance=("alive", "its interface veth9 on this host exists"))
    error = add(kernel)
    assert error.code == 101 and "veth9" in error.details and not kernel.named("judge")


def test_an_add_again_reads_once():
    """The ruleset's number is asked for first: to look tens of thousands of ports up takes long."""
    kernel = RecordingKernel(**holding(FULL), generation=7)
    assert add(kernel) is None
    assert len(kernel.named("lookup")) == len(kernel.named("generation")) == 1
    assert [generation for _, _, generation in kernel.named("write")] == [7]


def test_judged_without_the_lock():
    """Without a link an owner is judged while nobody is held up, and the chain that was judged is the one that goes."""
    kernel = taken(judge=dead)
    assert add(kernel) is None
    assert "judge" not in locked(kernel) and len(kernel.named("lock")) == 2
    handles = iter([1, 2, 3, 3, 3, 3])  # it is rewritten while it is judged
    kernel = taken(judge=dead)
    kernel.answers["owner"] = lambda chain: ruleset.Owner(chain, OTHER_RECORD, next(handles) if chain == OTHER else 0)
    assert add(kernel) is None
    assert len(kernel.named("judge")) == 2


@pytest.mark.parametrize("record, refused", [
    (f"net=theirs netns=/run/netns/web#{INODE}", False),  # a new namespace of the same name, or a new ID of it
    (f"net=theirs netns=/run/netns/web#{INODE} link=veth9#9", True),  # its link is there
    (f"net=theirs netns=/run/netns/other#{INODE}", False), ("net=theirs netns=/run/netns/web#5", True)])
def test_the_same_namespace_under_another_id(record, refused):
    """An interface exists once in a namespace: who had it before, under another container ID, has gone."""
    kernel = taken(record=record, glance=lambda owner: ("alive", "") if owner.link else None)
    error = add(kernel, prevResult=UNBOUND)
    assert (error is not None) == refused
    if not refused:
        assert ruleset.detach([OTHER], elements(WEB)) in kernel.written[0] and not kernel.named("judge")


@pytest.mark.parametrize("record, verdict, refused", [
    ("net=other netns=/run/netns/other#99", "alive", True), ("net=other netns=/run/netns/other#99", "unknown", True),
    ("net=other netns=/run/netns/other#99", "dead", False), (f"net=other netns=/r#{INODE}", "alive", False),
    ("net=lab netns=/run/netns/other#99", "alive", False), ("", "alive", False)])
def test_a_namesake_in_another_network(record, verdict, refused):
    """Network, ID and interface are unique together; who is in another network, and lives, keeps its ports."""
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(WEB), CHAIN)),
                             judge=lambda owners: verdicts(owners, verdict))
    kernel.answers["owner"] = lambda chain: ruleset.Owner(chain, record)
    error = add(kernel)
    assert (error is not None) == refused == (not kernel.written)
    assert not refused or (error.code == 101 and "network other" in error.msg)


def waits(pod="", record=OTHER_RECORD, wait_for=lambda owner, seconds: seconds, **answers):
    kernel = taken(record=record, wait_for=wait_for, **answers)
    error = add(kernel, environ={**VARIABLES, "CNI_ARGS": pod})
    return kernel, error, [seconds for *_, seconds in kernel.named("wait_for")]


POD = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"
LAST_RECORD = "net=lab netns=/run/netns/other#99 pod=shop/web"


@pytest.mark.parametrize("args, record", [
    ("", OTHER_RECORD), (POD, OTHER_RECORD), (POD, LAST_RECORD + "-2"),
    ("K8S_POD_NAME=web", LAST_RECORD.replace("shop/", ""))])
def test_patience(args, record):
    """A living owner is waited for without the lock; the refusal says how long."""
    kernel, error, waited = waits(args, record)
    assert waited == [4] and "wait_for" not in locked(kernel)
    assert error.code == 101 and "waited 4 s" in error.msg and "container other" in error.msg
    assert len(kernel.named("lock")) == 4 and kernel.written == []  # unknown, met; and both again after the wait


def test_an_owner_that_goes():
    """The wait ends with the owner, and then the port is published."""
    table = dict.fromkeys(elements(WEB), OTHER)

    def goes(owner, seconds):
        table.clear()
        return 0.3
    kernel = RecordingKernel(**holding(table), wait_for=goes)
    assert add(kernel) is None and kernel.written == [ruleset.attach(WEB)]


def test_one_owner_is_waited_for_in_pieces():
    """An owner is waited for once, however often its chain changes."""
    _, error, waited = waits(wait_for=lambda owner, seconds: min(seconds, 1.5))
    assert waited == [4, 2.5, 1] and "waited 4 s" in error.msg


def test_each_owner_has_its_time():
    """Of several owners each is waited for, but not for ever; the refusal says how long it was for the last."""
    ports = [mapping(host_port=number) for number in range(1, 6)]
    owned = {f"c/owner{port['hostPort']}/eth0": elements(attachment(port)) for port in ports}
    table = {element: chain for chain, its in owned.items() for element in its}

    def goes(owner, seconds):
        for element in owned[owner.chain]:
            del table[element]
        return 1.75
    kernel = RecordingKernel(**holding(table), wait_for=goes)
    assert add(kernel, *ports[:4]) is None
    assert [seconds for *_, seconds in kernel.named("wait_for")] == [4, 4, 2.5, 0.75]
    table.update({element: chain for chain, its in owned.items() for element in its})
    error = add(RecordingKernel(**holding(table), wait_for=goes), *ports)
    assert error.code == 101 and "owner5" in error.msg and "waited 0 s" in error.msg


def test_an_owner_that_ends_during_the_wait_is_noticed():
    """Without a link nothing tells that it ends; so it is judged again before the refusal."""
    kernel = taken(judge=lambda owners: verdicts(owners, "dead" if kernel.named("wait_for") else "alive"))
    assert add(kernel) is None and OTHER in kernel.written[0]


def test_a_shared_link_is_no_witness():
    """Two results that name one link: whose it is the namespace tells."""
    record = "net=theirs netns=/run/netns/other#99 link=veth9#9"
    for state, code in ("alive", 101), ("dead", 0):
        kernel = taken(record=record, link="veth9#9", glance=("alive", ""),
                       judge=lambda owners, state=state: verdicts(owners, state))
        error = add(kernel)
        assert (error.code if error else 0) == code
        assert all(not owner.link for _, owners in kernel.named("judge") for owner in owners)


def test_refusals_name_the_pod():
    """People know pods, so a refusal names it, and the whole container ID."""
    _, error, _ = waits(record=f"{OTHER_RECORD} pod=shop/web-7d9f")
    assert "published by pod shop/web-7d9f, container other, interface eth0, network theirs" in error.msg


@pytest.mark.parametrize("failures, written", [(1, True), (2, False)])
def test_a_flush_in_the_middle(failures, written):
    """What had been read is gone when it is written: it is tried once more."""
    left = [cni.CniError(100, "nftables rejected it: No such file or directory, in: create chain x")] * failures

    def write(*_):
        if left:
            raise left.pop()
        return True
    kernel = RecordingKernel(**INTACT, write=write)
    status, document = respond("ADD", configuration(PORT), kernel)
    assert (status, len(kernel.named("lock"))) == (0 if written else 1, 2)
    assert written or document["code"] == 100


def test_warnings_are_written_after_the_lock(capfd):
    """Standard error may be a stopped terminal: nobody else waits for it."""
    kernel = RecordingKernel(**holding({elements(WEB)[0]: SECOND}, OWN_RECORD), allow_localhost6="bridge-nf")
    said = []
    kernel.answers["write"] = lambda *_: said.append(capfd.readouterr().err) or True
    assert respond("ADD", configuration(PORT, backend="iptables"), kernel)[0] == 0
    lines = capfd.readouterr().err.splitlines()
    assert said == [""] and len(lines) == 3 and "will take over" in "".join(lines)


@pytest.mark.parametrize("chain", ["guard", "", "mine"])
def test_foreign_element(chain):
    """An element that somebody else wrote into our map is refused with the command that finds it."""
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(WEB), chain)))
    error = add(kernel)
    assert error.code == 103 and "nft list table inet cni_portmap" in error.details and kernel.written == []


# A container may publish one port on several networks: the first one's chain gets it, and the others are standby.

FIRST, SECOND, THIRD = CHAIN, "c/web-1/eth1", "c/web-1/eth2"


def noted(notes, **answers):
    """Answers of a host with WEB's ports on its first interface, whose chain notes these others."""
    comments = {FIRST: ["net=lab netns=#", *(f"also on {ifname}" for ifname in notes)], SECOND: ["net=lab"],
                THIRD: ["net=lab"]}
    return {**holding(dict.fromkeys(elements(WEB), FIRST), own=SECOND),
            "comments": lambda chain: {**base_comments(), **comments}.get(chain, []),
            "has_chain": lambda chain: chain in comments or chain in ruleset.SHARED,
            "elements_wanted_by": dict.fromkeys(elements(WEB), False),
            **answers}


def test_second_interface(capfd):
    """A port that leads to this container through another interface stays there; this one will take over."""
    table = {elements(WEB)[0]: SECOND}
    kernel = RecordingKernel(**holding(table, OWN_RECORD))
    assert add(kernel) is None
    assert kernel.written == [ruleset.attach(WEB, table) + ruleset.standby_note(SECOND, "eth0")]
    assert "ipv6 . tcp . 8080 : goto" in kernel.written[0] and "ipv4 . tcp . 8080 : goto" not in kernel.written[0]
    cni.tell()
    assert "already published through eth1" in capfd.readouterr().err


def test_the_same_id_in_another_namespace_is_another_container():
    """Two runtimes may use one container ID: what lives in another network namespace is not this container."""
    kernel = RecordingKernel(**holding({elements(WEB)[0]: SECOND}))
    assert add(kernel).code == 101 and kernel.written == []


def test_second_interface_again():
    """A standby interface isn't noted twice."""
    kernel = RecordingKernel(**noted(["eth1"]))
    assert add(kernel, environ={**VARIABLES, "CNI_IFNAME": "eth1"}, prevResult=UNBOUND) is None
    assert "also on" not in kernel.written[0] and "elements = " not in kernel.written[0]


@pytest.mark.parametrize("notes, wanted, leads", [
    ([], {}, {}), (["eth1"], {SECOND: elements(WEB)}, {SECOND: elements(WEB)}),
    (["eth1"], {SECOND: elements(WEB)[:1]}, {SECOND: elements(WEB)[:1]}), (["eth9"], {}, {}),
    (["eth1", "eth2"], {SECOND: elements(WEB)[:1], THIRD: elements(WEB)},
     {SECOND: elements(WEB)[:1], THIRD: elements(WEB)[1:]}),
    (["eth1", "eth2"], {SECOND: elements(WEB), THIRD: elements(WEB)}, {SECOND: elements(WEB)})])
def test_heirs(notes, wanted, leads):
    """When the first interface goes, the standby interfaces get its ports, in order, and note one another."""
    kernel = RecordingKernel(**noted(notes, elements_wanted_by=lambda chain: dict.fromkeys(wanted[chain], False)))
    delete("web-1", "eth0", "net", kernel)
    [text] = kernel.written
    assert text.startswith(ruleset.detach([FIRST], elements(WEB)))
    assert all(ruleset.map_elements(those, chain) in text for chain, those in leads.items())
    assert text.count("elements = ") == len(leads)
    assert text.count("also on") == (len(leads) if len(wanted) > 1 else 0)


@pytest.mark.parametrize("own_address", [False, True])
def test_heir_with_a_condition_on_an_address(own_address):
    """A rule of one address is that of every address with a condition, unless its own element leads there."""
    wildcard, specific = elements(WEB)[0], elements(attachment({**PORT, "hostIP": "10.9.0.1"}))[0]
    table = dict.fromkeys(elements(WEB), FIRST) | ({specific: SECOND} if own_address else {})
    kernel = RecordingKernel(**noted(
        ["eth1"], elements_wanted_by={wildcard: False, specific: False},
        lookup=lambda wanted: {element: table[element] for element in wanted if element in table}))
    delete("web-1", "eth0", "net", kernel)
    assert ("elements = " in kernel.written[0]) == (not own_address)


def test_heirs_of_replacement():
    """A repeated ADD keeps the notes, and lets an heir have only what it doesn't publish any more."""
    kernel = RecordingKernel(**noted(["eth1"]))
    assert add(kernel, PORT) is None
    again = ruleset.detach([FIRST], elements(WEB)) + ruleset.attach(WEB)
    assert kernel.written == [again + ruleset.standby_note(FIRST, "eth1")]
    kernel = RecordingKernel(**noted(["eth1"]))
    assert add(kernel, mapping(host_port=9)) is None
    assert ruleset.map_elements(elements(WEB), SECOND) in kernel.written[0]


# A pod's next sandbox may come before the last one has gone, as a kubelet edits a static pod: it stands by.

def following(kernel, *ports):
    """ADD of the next sandbox of the pod of LAST_RECORD."""
    return add(kernel, *ports, environ={**VARIABLES, "CNI_ARGS": POD})


@pytest.mark.parametrize("state", ["alive", "unknown"])
def test_next_sandbox(state, capfd):
    """The port stays where it is, and nobody waits; what the last one has not is published at once."""
    kernel = taken(record=LAST_RECORD, judge=lambda owners: verdicts(owners, state))
    assert following(kernel, PORT, mapping(host_port=9)) is None
    new = attachment(PORT, mapping(host_port=9), environ={**VARIABLES, "CNI_ARGS": POD})
    assert kernel.written == [ruleset.attach(new, elements(WEB)) + ruleset.standby_note(OTHER, "eth0", "web-1")]
    assert not kernel.named("wait_for")
    cni.tell()
    assert "web-1 will take over" in capfd.readouterr().err


def test_next_sandbox_again():
    """It is noted once, however often its ADD is repeated; notes of those that are gone go."""
    notes = ["net=lab", "also on eth0 of gone", "also on eth0 of web-1", ""]
    kernel = taken(record=LAST_RECORD, comments=lambda chain: {**base_comments(), OTHER: notes}.get(chain, []),
                   has_chain=lambda chain: chain in (*ruleset.SHARED, OTHER, CHAIN),
                   rules=[(OTHER, note, b"", index) for index, note in enumerate(notes)])
    assert following(kernel) is None
    assert "continue" not in kernel.written[0] and kernel.written[0].count("delete rule") == 1
    assert f"delete rule inet cni_portmap {OTHER} handle 1\n" in kernel.written[0]


def test_next_sandbox_of_one_that_died():
    """What a dead one left passes to the one that stands by for it, and nobody else takes it."""
    table = dict.fromkeys(elements(WEB), OTHER)
    heir = "c/heir/eth0"
    records = {OTHER: LAST_RECORD, heir: LAST_RECORD}

    def comments(chain):
        return {**base_comments(), OTHER: [LAST_RECORD, "also on eth0 of heir"]}.get(chain, [])

    def goes(change, generation=0):
        table.update(change.leads)
        return True
    for its_pod, code in ("", 101), (POD, 0):
        table.update(dict.fromkeys(elements(WEB), OTHER))
        kernel = RecordingKernel(**holding(
            table, judge=other_is_dead, comments=comments, write=goes,
            elements_wanted_by=dict.fromkeys(elements(WEB), False),
            has_chain=lambda chain: chain in (*ruleset.SHARED, OTHER, heir),
            owner=lambda chain: ruleset.Owner(chain, records.get(chain, ""))))
        error = add(kernel, environ={**VARIABLES, "CNI_ARGS": its_pod})
        assert (error.code if error else 0) == code and {*table.values()} == {heir}
        assert kernel.written[0].startswith(ruleset.detach([OTHER], elements(WEB)))
        assert code or kernel.written[1].endswith(ruleset.standby_note(heir, "eth0", "web-1"))
        assert not code or "container heir" in error.msg


@pytest.mark.parametrize("notes, heirs", [
    (["eth1", "eth0 of next"], [SECOND, "c/next/eth0"]), (["eth0 of next", "eth1"], [SECOND, "c/next/eth0"]),
    (["eth0 of next", "eth0 of newer"], ["c/newer/eth0", "c/next/eth0"])])
def test_heirs_of_a_pod(notes, heirs):
    """A container's other interfaces come first, then the newest sandbox; the heir notes the others."""
    kernel = RecordingKernel(**noted(notes))
    comments, kernel.answers["has_chain"] = kernel.answers["comments"], lambda chain: "none" not in chain
    kernel.answers["comments"] = lambda chain: comments(chain) or ["net=lab"]
    delete("web-1", "eth0", "none", kernel)
    heir, other = heirs
    of = "" if other.split("/")[1] == heir.split("/")[1] else other.split("/")[1]
    assert kernel.written == [ruleset.detach([FIRST, "p/web-1/eth0"], elements(WEB)) +
                              ruleset.map_elements(elements(WEB), heir) +
                              ruleset.standby_note(heir, other.split("/")[2], of)]


@pytest.mark.parametrize("dead, heir", [
    ([], "c/web-1/eth1"), (["web-1"], "c/newer/eth0"), (["web-1", "newer"], "c/next/eth0"),
    (["web-1", "newer", "next"], "c/web-1/eth1")])
def test_who_inherits_first(dead, heir):
    """Who lives; the container itself, then the newest sandbox; and its first interface."""
    kernel = RecordingKernel(**noted([*(f"eth{number} of {who}" for who in ("next", "newer") for number in (0, 1)),
                                      "eth1"]))
    comments, kernel.answers["has_chain"] = kernel.answers["comments"], lambda chain: "none" not in chain
    kernel.answers |= {"comments": lambda chain: comments(chain) or ["net=lab"],
                       "glance": lambda owner: ("dead", "") if owner.container_id in dead else None}
    delete("web-1", "eth0", "none", kernel)
    assert ruleset.map_elements(elements(WEB), heir) in kernel.written[0]
    assert kernel.written[0].count("also on ") == 4


def test_heir_of_one_address_of_several():
    """Offered a port of every address and that of one, an heir that wants the second gets the second."""
    wildcard, specific = elements(attachment(mapping("0.0.0.0")))[0], elements(attachment(mapping("10.9.0.1")))[0]
    table = dict.fromkeys((wildcard, specific), FIRST)
    kernel = RecordingKernel(**noted(["eth1"], elements_wanted_by=dict.fromkeys((wildcard, specific), False)))
    kernel.answers |= {"owned_elements": [*table.items()], "lookup": table}
    delete("web-1", "eth0", "net", kernel)
    assert ruleset.map_elements([specific], SECOND) in kernel.written[0]
    assert kernel.written[0].count("elements = ") == 1


@pytest.mark.parametrize("notes, state, code", [
    (["also on eth0 of web-1"], "alive", 0), ([], "alive", 104), (["also on eth0 of web-1"], "dead", 104)])
def test_check_of_the_next_sandbox(notes, state, code):
    """It is whole while its port leads to the last one, which notes it; not where that is dead."""
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(WEB), OTHER), LAST_RECORD))
    comments = {**base_comments(), OTHER: [LAST_RECORD, *notes]}
    kernel.answers |= {"comments": lambda chain: comments.get(chain, []), "has_chain": lambda chain: True,
                       "glance": lambda owner: (state, "") if owner.container_id == "other" else None}
    asked = attachment(PORT, environ={**VARIABLES, "CNI_ARGS": POD})
    found = chains_of_container({OTHER}, asked, kernel, {})
    assert found == (set() if code else {OTHER})


def test_flows_of_what_it_stands_by_for():
    """Datagrams go on to the last sandbox; those to what it has not got are sent on to the next."""
    udp = mapping(protocol="udp"), mapping(protocol="udp", host_port=9)
    table = dict.fromkeys(elements(attachment(udp[0])), OTHER)
    kernel = RecordingKernel(**holding(table, LAST_RECORD), local_addresses={bytes((10, 9, 0, 1))})
    assert following(kernel, *udp) is None
    (_, _, filters, _), = kernel.named("delete_flows")
    assert {port for _, port, *_ in filters()} == {9}


def test_own_dead_interface():
    """Stale rules of another interface of the same container, in a namespace that is gone, are replaced."""
    table = dict.fromkeys(elements(WEB), "c/web-1/eth1")
    kernel = RecordingKernel(**holding(table, judge=dead))
    assert add(kernel) is None
    assert kernel.written == [ruleset.detach(["c/web-1/eth1"], table) + ruleset.attach(WEB)]


HASHED = {"CNI_CONTAINERID": "a" * 70, "CNI_NETNS": "/n", "CNI_IFNAME": "eth@"}  # its chain: c/<64 times a>/hash/...


def test_hashed_name_is_no_prefix():
    """A container whose ID is the beginning of a longer one is not the same container."""
    theirs = ruleset.chain_of(HASHED["CNI_CONTAINERID"], HASHED["CNI_IFNAME"])
    record = "".join(ruleset.record_of(attachment(environ=HASHED)))
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(WEB), theirs), record))
    error = add(kernel, environ={**VARIABLES, "CNI_CONTAINERID": "a" * 64})
    assert error is not None and error.code == 101


def test_hashed_name_is_own():
    """A container whose chain has a hashed name is known as itself all the same."""
    theirs = ruleset.chain_of(HASHED["CNI_CONTAINERID"], HASHED["CNI_IFNAME"])
    found = attachment(PORT, environ=HASHED, prevResult={"ips": [{"address": "10.88.0.2/16"}]})
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(found), theirs), "".join(ruleset.record_of(found))))
    assert add(kernel, environ={**HASHED, "CNI_IFNAME": "eth0"},
               prevResult={"ips": [{"address": "10.88.0.2/16"}]}) is None
    assert "elements = " not in kernel.written[0]


@pytest.mark.parametrize("value, refused", [(None, False), ("ignore", False), ("refuse", True)])
def test_bound(value, refused):
    """A port that a process uses is refused only if that is asked for (podman itself binds it before ADD)."""
    kernel = RecordingKernel(port_in_use=lambda family, *_: family == 6)
    error = add(kernel, hostPortInUse=value)
    if refused:
        assert (error.code, kernel.written) == (102, []) and "tcp port 8080 on ::" in error.args[0]
        assert kernel.named("port_in_use") == [("port_in_use", 4, "tcp", "", 8080), ("port_in_use", 6, "tcp", "", 8080)]
    else:
        assert error is None and not kernel.named("port_in_use")


# --- the base -------------------------------------------------------------------------------------------------

def base_written(comments, **keys):
    """ADD's commands besides the attachment, if the shared chains have these comments; no key: no such chain."""
    kernel = RecordingKernel(comments=lambda chain: comments.get(chain, []), has_chain=lambda chain: chain in comments)
    error = add(kernel, **keys)
    if error:
        raise error
    return kernel.written[0].removesuffix(ruleset.attach(attachment(PORT, **keys)))


@pytest.mark.parametrize("chain", ruleset.SHARED)
def test_base_repaired(chain):
    """A chain that is missing, empty, from another version, or in another order is rewritten, and no other."""
    comments = base_comments()
    missing = {name: those for name, those in comments.items() if name != chain}
    assert base_written(missing) == base([chain])
    damaged = [[], comments[chain][:-1], [comment.replace(f"portmap {ruleset.BASE_VERSION}", "portmap 0")
                                          for comment in comments[chain]],
               [*reversed(comments[chain])] if len({*comments[chain]}) > 1 else []]
    for those in damaged:
        assert base_written({**comments, chain: those}) == base((), (chain,))


def test_base_on_another_hook():
    """Only a chain that hangs on another hook is deleted first: for that libnftables 1.0 lists every set."""
    comments = {**base_comments(), "guard": [], "output": []}
    kernel = RecordingKernel(**INTACT)
    kernel.answers |= {"comments": lambda name: comments.get(name, []),
                       "hook": lambda name: ("nat", 3, -100) if name == "output" else ("filter", 0, -299)}
    assert add(kernel) is None
    gone = [line for line in kernel.written[0].splitlines() if line.startswith(("flush", "delete"))]
    assert gone == ["delete chain inet cni_portmap guard", "flush chain inet cni_portmap output"]


def test_base_of_others():
    """Rules that somebody added are left in peace, and stop us where the chain would have to be rebuilt."""
    comments = base_comments()
    assert base_written({chain: ["", *those, "mine"] for chain, those in comments.items()}) == ""
    for foreign in "", "mine":
        with pytest.raises(cni.CniError, match="foreign rule") as caught:
            base_written({**comments, "output": [foreign]})
        assert caught.value.code == 103


def test_base_mark_bits():
    """Another mark bit is one more masquerading rule; those that others asked for stay."""
    assert base_written(base_comments(), markMasqBit=5) == base((), ("postrouting",), {5, 13})
    assert base_written(base_comments((5, 13)), markMasqBit=5) == ""
    assert base_written(base_comments((5, 13)), markMasqBit=7) == base((), ("postrouting",), {5, 7, 13})
    assert base_written(base_comments((5, 13)), markMasqBit=5, snat=False) == ""


# --- localhost ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ports, keys, v4, v6", [
    ([{}], {}, True, True), ([{"host_ip": "0.0.0.0"}], {}, True, False), ([{"host_ip": "::"}], {}, False, True),
    ([{"host_ip": "127.0.0.1"}], {}, True, False), ([{"host_ip": "127.9.9.9"}], {}, True, False),
    ([{"host_ip": "::1"}], {}, False, True), ([{"host_ip": "192.0.2.1"}, {"host_ip": "fd00::1"}], {}, False, False),
    ([{"host_ip": "192.0.2.1"}, {"host_ip": "::1", "host_port": 9}], {}, False, True),
    ([{}], {"snat": False}, False, False), ([{}], {"masqAll": True}, True, True),
    ([{}], {"localhostIPv6": False}, True, False),
    ([{}], {"prevResult": {"ips": [{"address": "10.88.0.2/16"}]}}, True, False),
    ([{}], {"prevResult": {"ips": [{"address": "fd88::2/64"}]}}, False, True)])
def test_localhost(ports, keys, v4, v6):
    """Localhost is opened towards the container only where it is published there, and replies can be masqueraded."""
    kernel = RecordingKernel(**CLOSED)
    add(kernel, *(mapping(**port) for port in ports), **keys)
    assert kernel.named("set_localnet") == [("set_localnet", "cni0", True)] * v4
    assert (ruleset.LOCALHOST_INTERFACES + " { typeof iifname; elements" in kernel.written[-1]) == v4
    assert kernel.named("allow_localhost6") == [("allow_localhost6", "cni0")] * v6


@pytest.mark.parametrize("host_ip, said, left_alone", [("", False, True), ("127.0.0.1", True, False),
                                                       ("192.0.2.1", False, False)])
def test_localhost_without_masquerading(capfd, host_ip, said, left_alone):
    """No reply would come back to localhost: a service of the host there is not hidden; who asks for it is told."""
    kernel = RecordingKernel(**CLOSED)
    add(kernel, mapping(host_ip=host_ip), snat=False)
    cni.tell()
    assert capfd.readouterr().err == "cni-portmap: cannot publish on 127.0.0.1: snat is false\n" * said
    assert ("ip daddr 127.0.0.0/8 return comment" in kernel.written[-1]) == left_alone


def test_an_interface_that_is_open_already_is_guarded_and_stays_open():
    """Somebody else has opened it: it is noted, so that it is guarded, with a comment that it was open."""
    kernel = RecordingKernel(**INTACT, is_noted=False)
    add(kernel)
    assert kernel.written == [ruleset.attach(WEB) + ruleset.note_interfaces({"cni0": ruleset.WAS_OPEN})]
    assert not kernel.named("set_localnet")


def test_an_interface_that_is_closed_again_is_opened_again():
    """Its note is there still."""
    kernel = RecordingKernel(**INTACT, localnet=False)
    add(kernel)
    assert kernel.written == [ruleset.attach(WEB)] and len(kernel.named("set_localnet")) == 1


@pytest.mark.parametrize("answers, keys, code, left_alone", [
    ({"localhost_obstacle": lambda family, name: "read-only" if family == 4 else ""}, {}, 0, {4}),
    ({"localhost_obstacle": lambda family, name: "br_netfilter" if family == 6 else ""}, {}, 0, {6}),
    ({"localhost_obstacle": "read-only"}, {"host_ip": "127.0.0.1"}, 5, None),
    ({"localhost_obstacle": "br_netfilter"}, {"host_ip": "::1"}, 0, set()),
    ({"localhost_obstacle": "read-only"}, {"host_ip": "192.0.2.1"}, 0, set()),
    ({"way_to": ("eth0", False, [])}, {"host_ip": "127.0.0.1"}, 0, set()),
    ({"way_to": ("", False, [])}, {}, 0, {4, 6})])
def test_localhost_that_cannot_be_reached_is_left_alone(capfd, answers, keys, code, left_alone):
    """That is a line on stderr, or an error where a port is published there alone and the system refuses."""
    kernel = RecordingKernel(**INTACT, **CLOSED, **answers)
    error = add(kernel, mapping(**keys))
    cni.tell()
    said = capfd.readouterr().err
    assert (error.code if error else 0) == code and bool(said) == (code == 0 and keys != {"host_ip": "192.0.2.1"})
    if left_alone is None:
        assert not kernel.written
        return
    for family, rule in (4, "ip daddr 127.0.0.0/8 return"), (6, "ip6 daddr ::1 return"):
        assert (rule in kernel.written[0]) == (family in left_alone)
        assert not (family in left_alone and kernel.named("set_localnet" if family == 4 else "allow_localhost6"))


def test_masquerading_goes_by_interface_and_source():
    """Every network of the container's addresses and of its interface; the container itself where none leads there."""
    result = {"ips": [{"address": "10.88.0.2/16"}, {"address": "10.99.0.2/24"}]}
    kernel = RecordingKernel(**INTACT, way_to=("br0", True, ["10.88.0.0/16", "192.0.2.0/24"]))
    add(kernel, prevResult=result)
    for prefix in "10.88.0.0/16", "10.99.0.0/24", "192.0.2.0/24":
        assert f'iifname "br0" ip saddr {prefix} meta mark set' in kernel.written[0]
    assert kernel.written[0].count("iifname") == 3
    kernel = RecordingKernel(**INTACT, way_to=("", False, []))
    add(kernel, prevResult=result)
    assert "ip saddr 10.88.0.2 meta mark set" in kernel.written[0] and "iifname" not in kernel.written[0]


@pytest.mark.parametrize("noted, notes", [
    (True, {"cni0": ruleset.WAS_OPEN}), (False, {"cni1": ruleset.FOUND_OPEN, "cni0": ruleset.OPENED})])
def test_upgrade_notes_what_is_open(monkeypatch, noted, notes):
    """Tables of 0.1 do not note all that is open, and their guard was everywhere: the new one covers what is open."""
    monkeypatch.setattr("cni_portmap.linux.localhost.interfaces_of_published", lambda kernel: ["cni0"])
    monkeypatch.setattr("cni_portmap.linux.localhost.open_interfaces", lambda: ["cni1"])
    old = {chain: [comment.replace(f"{ruleset.BASE_VERSION}:", "1:") for comment in comments]
           for chain, comments in base_comments().items()}
    kernel = RecordingKernel(has_chain=True, comments=lambda chain: old.get(chain, []), notes_interfaces=noted)
    assert repair_shared_chains(kernel)
    assert kernel.written == [base((), tuple(ruleset.SHARED)) + ruleset.note_interfaces(notes)]


def test_repair_base():
    """Only a table that is there is repaired, and nothing is written that is not needed, or in a dry run."""
    for answers, needed in (INTACT, False), ({"has_table": False}, False), ({}, True):
        for dry_run in False, True:
            kernel = RecordingKernel(**answers)
            assert repair_shared_chains(kernel, dry_run) == needed
            assert kernel.written == [BASE] * (needed and not dry_run)


@pytest.mark.parametrize("families", [(4,), (4, 6)])
def test_a_container_that_nothing_leads_to(capfd, families):
    """ADD succeeds, with a line for each family that has ports: nobody else would say why none answers."""
    kernel = RecordingKernel(**INTACT, way_to=("", False, []))
    assert add(kernel, mapping(**({"host_ip": "0.0.0.0"} if families == (4,) else {}))) is None
    cni.tell()
    assert [line.partition(",")[0] for line in capfd.readouterr().err.splitlines()] == [
        f"cni-portmap: no interface of this host leads to {'10.88.0.2' if family == 4 else 'fd88::2'}"
        for family in families]


def test_localhost6_impossible(capfd):
    """An obstacle to opening [::1] is one line, and no failure."""
    assert add(RecordingKernel(allow_localhost6="bridge-nf")) is None
    cni.tell()
    assert capfd.readouterr().err == "cni-portmap: cannot publish on [::1]: bridge-nf\n"


# --- DEL ------------------------------------------------------------------------------------------------------

def test_delete_unknown(kernel):
    """Nothing of its own, nor of an operator's: success, without the lock."""
    delete("web-1", "eth0", "net", kernel)
    assert kernel.calls == [("has_chain", CHAIN), ("has_chain", f"p{CHAIN[1:]}"), ("has_reference",)]


def test_delete_what_an_operator_has_published():
    """Its chain goes with the runtime's, or alone, in one transaction."""
    operators = f"p{CHAIN[1:]}"
    for chains in [CHAIN, operators], [operators]:
        kernel = RecordingKernel(has_chain=lambda chain, its=chains: chain in its)
        delete("web-1", "eth0", "net", kernel)
        assert [call[1].chains for call in kernel.named("write")] == [chains]


def test_delete():
    """The elements of the attachment's chain go with the chain, in one transaction, and nothing else."""
    table = {**dict.fromkeys(elements(WEB), CHAIN),
             ("hostports", ruleset.key_of(attachment(mapping(host_port=9)).ports[0])): OTHER}
    kernel = RecordingKernel(**holding(table))
    delete("web-1", "eth0", "net", kernel)
    assert kernel.written == [ruleset.detach([CHAIN], elements(WEB))]


def test_delete_race():
    """A DEL that another call overtook before the lock writes nothing."""
    there = iter([True, False, False])
    kernel = RecordingKernel(has_chain=lambda chain: next(there))
    delete("web-1", "eth0", "net", kernel)
    assert kernel.written == [] and [call[0] for call in kernel.calls if call[0] != "generation"][:4] == \
        ["has_chain", "has_chain", "lock", "has_chain"]


def test_delete_reads_again():
    """What others have changed between reading and writing is read again, before that and after the generation."""
    generations, there = iter([1, 2, 3]), iter([True, False, True, True, False])
    kernel = RecordingKernel(**{**holding(FULL), "has_chain": lambda chain: next(there)},
                             generation=lambda: next(generations), write=False)
    delete("web-1", "eth0", "net", kernel)
    assert [(call[2], call[1].chains) for call in kernel.named("write")] == [(1, [CHAIN]), (2, [CHAIN])]
    order = [call[0] for call in kernel.calls]
    assert order.count("lock") == order.count("unlock") == 1 and order.count("owned_elements") == 3
    assert [name for name in order if name in ("generation", "has_chain", "write")][2:] == \
        ["generation", "has_chain", "write"] * 2 + ["generation", "has_chain"]


def test_delete_gives_up():
    """Where others write all the time, DEL minds only what is gone; where that is always so, it ends."""
    kernel = RecordingKernel(**holding(FULL), write=False, generation=7)
    status, document = respond("DEL", configuration(PORT), kernel)
    assert (status, document["code"]) == (1, 11)
    assert [call[2] for call in kernel.named("write")] == [7] * 5 + [0] * 5


def test_delete_drops_notes_of_what_is_gone():
    """What was opened to localhost is forgotten once the interface is gone."""
    kernel = RecordingKernel(**holding(FULL), noted_and_gone=["veth9"])
    delete("web-1", "eth0", "net", kernel)
    assert kernel.named("write")[0][1].forgotten == ["veth9"]


@pytest.mark.parametrize("keys", [
    {}, {"prevResult": None}, {"runtimeConfig": None}, {"name": "renamed"}, {"name": None}, {"snat": "nonsense"},
    {"prevResult": 1}, {"runtimeConfig": {"portMappings": [{"hostPort": -1}]}}, {"markMasqBit": 5}])
def test_delete_whatever_the_request(keys):
    """DEL minds neither what the request says nor what it lacks."""
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(WEB), CHAIN)))
    given = {key: value for key, value in {**configuration(PORT), **keys}.items() if value is not None}
    environ = {"CNI_CONTAINERID": "web-1", "CNI_IFNAME": "eth0", "CNI_NETNS": ""}
    assert respond("DEL", given, kernel, environ=environ) == (0, None)
    assert kernel.written == [ruleset.detach([CHAIN], elements(WEB))]


# --- GC -------------------------------------------------------------------------------------------------------

OWNERS = [ruleset.Owner("c/a/eth0", "net=lab"), ruleset.Owner("c/a/eth1", "net=lab"),
          ruleset.Owner("c/b/eth0", "net=lab"), ruleset.Owner("c/c/eth0", "net=x"), ruleset.Owner("c/d/eth0", "")]


@pytest.mark.parametrize("valid, removed", [
    ({("a", "eth0"), ("a", "eth1"), ("b", "eth0")}, []), ({("a", "eth0")}, ["c/a/eth1", "c/b/eth0"]),
    (set(), ["c/a/eth0", "c/a/eth1", "c/b/eth0"]),
    ({("c", "eth0"), ("a", "eth2")}, ["c/a/eth0", "c/a/eth1", "c/b/eth0"])])
def test_gc(valid, removed):
    """Stale attachments of this network go; those of other networks and unknown owners stay."""
    kernel = RecordingKernel(owners=OWNERS, has_chain=True)
    gc("lab", valid, kernel)
    assert kernel.written == ([ruleset.detach(removed, [])] if removed else [])


def test_gc_spares_what_was_written_meanwhile():
    """The listed chains are removed, not those that have come back since under the same names."""
    kernel = RecordingKernel(owners=OWNERS, has_chain=True,
                             owner=lambda chain: ruleset.Owner(chain, "", 9 if chain == "c/a/eth0" else 0))
    gc("lab", set(), kernel)
    assert kernel.written == [ruleset.detach(["c/a/eth1", "c/b/eth0"], [])]


def test_prune():
    """The dead go, the others are told; nothing is judged under the lock."""
    kernel = RecordingKernel(owners=OWNERS, has_chain=True, judge=lambda owners: {
        owner.chain: ("dead" if owner.container_id in "ab" else "unknown", "") for owner in owners})
    found, refused = prune(kernel)
    assert refused == []
    assert [state for _, (state, _) in found] == ["dead"] * 3 + ["unknown"] * 2 and "judge" not in locked(kernel)
    assert kernel.written == [ruleset.detach(["c/a/eth0", "c/a/eth1", "c/b/eth0"], [])]
    again = RecordingKernel(owners=OWNERS, has_chain=True, judge=dead)
    assert len(prune(again, dry_run=True)[0]) == 5 and again.written == []


def test_prune_goes_on():
    """One chain that cannot go, because somebody's rule jumps there, keeps no other; it is told."""
    def refuse(change, _):
        if "c/a/eth0" in change.chains:
            raise cni.CniError(100, "refused")
        return True
    kernel = RecordingKernel(owners=OWNERS, has_chain=True, judge=dead, write=refuse)
    found, refused = prune(kernel)
    assert len(found) == 5 and [(owner.chain, error.code) for owner, error in refused] == [("c/a/eth0", 100)]
    assert kernel.written[1:] == [ruleset.detach([chain], []) for chain in (owner.chain for owner in OWNERS)]


@pytest.mark.parametrize("remove", [prune, lambda kernel: gc("lab", set(), kernel)])
def test_who_waits_for_the_lock_in_vain_does_not_go_on(remove):
    """Each of the others would wait 30 seconds, too."""
    def lock():
        raise cni.CniError(11, "timed out")
    kernel = RecordingKernel(owners=OWNERS, has_chain=True, judge=dead)
    kernel.lock = lock
    with pytest.raises(cni.CniError, match="timed out"):
        remove(kernel)


def test_gc_goes_on():
    """An attachment that can't be removed doesn't keep the others; all failures are reported."""
    def write(change, _):
        if change.chains[0].startswith("c/a/eth"):
            raise cni.CniError(100, "refused")
        return True
    def leftovers(*_):
        raise cni.CniError(100, "the reference's rules are refused, too")
    kernel = RecordingKernel(owners=OWNERS, has_chain=True, write=write, has_reference=True,
                             leftovers=leftovers)
    with pytest.raises(cni.CniError) as caught:
        gc("lab", set(), kernel)
    assert caught.value.code == 100 and "2" in caught.value.args[0] and caught.value.details.count("refused") == 3
    assert kernel.written[-1] == ruleset.detach(["c/b/eth0"], [])


@pytest.mark.parametrize("keys, touched", [({}, False), ({"cni.dev/valid-attachments": None}, False),
                                           ({"cni.dev/valid-attachments": []}, True)])
def test_gc_absent_list(keys, touched):
    """Without a list nothing is even read."""
    kernel = RecordingKernel(owners=OWNERS, has_chain=True)
    assert respond("GC", configuration(**keys), kernel, environ={}) == (0, None)
    assert bool(kernel.calls) == touched == bool(kernel.written)


# --- STATUS ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answers, tried", [({}, BASE), (INTACT, "")])
def test_status(answers, tried):
    """STATUS asks for a dry run of what is missing of the base, of nothing if need be, and writes nothing."""
    kernel = RecordingKernel(**answers)
    assert respond("STATUS", configuration(prevResult=None), kernel, environ={}) == (0, None)
    assert kernel.named("dry_run") == [("dry_run", tried)] and kernel.written == []


@pytest.mark.parametrize("answers", [{"dry_run": "Operation not permitted"}, {"fails_at": 1},
                                     {**INTACT, "comments": [""]}])
def test_status_not_available(answers):
    """Anything that would make ADD fail is code 50, with the reason."""
    kernel = RecordingKernel(**answers)
    status, document = respond("STATUS", configuration(prevResult=None), kernel, environ={})
    assert (status, document["code"]) == (1, 50) and document["msg"] and kernel.written == []


# --- CHECK ----------------------------------------------------------------------------------------------------

HOOK = (b"hook", b"policy", b"type")


def intact(**answers):
    """A kernel that has WEB as it should be: a snapshot is a hook, then rules, here by their numbers."""
    def snapshot(chain, each_port=False):
        return [HOOK, *range(len([*ruleset.rules_of(WEB)] if chain == CHAIN else ruleset.shared_rules(chain, [])))]
    empty = RecordingKernel(snapshot=snapshot)
    comments = {CHAIN: [comment for rule in ruleset.rules_of(WEB) for comment in re.findall('comment "(.*)"', rule)]}
    kernel = RecordingKernel(**{**holding(dict.fromkeys(elements(WEB), CHAIN)), "snapshot": snapshot, "references": 2,
                                "comments": lambda chain: {**base_comments(), **comments}.get(chain, []), **answers})
    kernel.answers["empty_namespace"] = lambda: contextlib.nullcontext(empty)
    return kernel, empty, snapshot


def check(kernel, *ports):
    try:
        check_attachment(attachment(*ports or [PORT]), kernel)
    except cni.CniError as error:
        return error
    return None


def test_check():
    """CHECK writes ADD's rules elsewhere, and they equal those that are there; nothing is written here."""
    kernel, empty, _ = intact()
    assert check(kernel) is None
    assert kernel.written == [] and empty.written == [BASE + ruleset.attach(WEB)]
    reads = [call[0] for call in kernel.calls]
    assert reads.index("lock") < reads.index("lookup") and reads.index("unlock") < reads.index("empty_namespace")


@pytest.mark.parametrize("record, answers, word", [
    (f"net=lab netns=/var/run/netns/web#{INODE}", {}, ""),  # /var/run is /run
    ("net=lab netns=/run/netns/web#", {}, ""), ("net=lab netns=/run/netns/web#5", {}, "another network namespace"),
    ("net=lab netns=/run/netns/web#5", {"namespace": -1}, "gone"),
    (f"net=lab netns=/run/netns/web#{INODE} link=veth1#7", {"namespace": -1, "glance": ("alive", "")}, ""),
    (f"net=lab netns=/run/netns/web#{INODE} link=veth1#7", {"glance": ("dead", "its link is gone")}, "link is gone"),
    (f"net=lab netns=/run/netns/web#{INODE} link=veth1#7 pod=shop/web", {"glance": ("alive", "")}, "")])
def test_check_judges_the_owner(record, answers, word):
    """CHECK compares namespaces, not their paths; a container that is gone has nothing that is in order."""
    kernel, empty, _ = intact()
    kernel.answers |= {"owner": lambda chain: ruleset.Owner(chain, record), **answers}
    error = check(kernel)
    assert (error is None) == (not word) and (error is None or (error.code == 104 and word in error.msg))
    if not word:
        assert f'counter comment "{record}"' in empty.written[0]


def test_check_tries_conditions():
    """What nft does not take is code 7, as for ADD: the configuration has changed since."""
    kernel, empty, _ = intact(dry_run_apart="conflicting protocols")
    with pytest.raises(cni.CniError) as caught:
        check_attachment(attachment(PORT, conditionsV4=["udp sport 1"]), kernel)
    assert caught.value.code == 7 and empty.written == []


def test_check_foreign_rules():
    """Rules of others, before, between and after ours, don't matter."""
    kernel, _, snapshot = intact()
    kernel.answers["snapshot"] = lambda chain: [HOOK, "mine",
                                               *(each for rule in snapshot(chain)[1:] for each in (rule, "mine"))]
    assert check(kernel) is None


def test_check_foreign_verdicts():
    """One that ends a packet's way is named, wherever it stands in a chain of ours."""
    verdict = ("", ("immediate", {1: bytes(4), 2: b"\x0c\0\2\0" + b"\x08\0\1\0" + b"\0\0\0\1"}))
    for name in CHAINS:
        kernel, _, snapshot = intact()
        kernel.answers["snapshot"] = lambda chain, name=name, snapshot=snapshot: [
            HOOK, *([verdict] if chain == name else []), *snapshot(chain)[1:]]
        error = check(kernel)
        assert error.code == 104 and f"chain {name}: rule 1 is foreign" in error.msg and "accept" in error.msg


def test_check_element_of_a_chain_that_is_not_ours():
    """It leads elsewhere; nobody asks whose chain that is, which would read the whole table."""
    kernel, *_ = intact(lookup=dict.fromkeys(elements(WEB), ""))
    assert "not forwarded" in check(kernel).msg
    assert ("owner", "") not in kernel.calls


CHAINS = [*ruleset.SHARED, CHAIN]


@pytest.mark.parametrize("chain, damage, word", [
    *((chain, lambda snapshot: [], "is missing") for chain in CHAINS),
    *((chain, lambda snapshot: [(b"", *HOOK[1:]), *snapshot[1:]], "wrong hook") for chain in ruleset.SHARED),
    *((chain, lambda snapshot: snapshot[:-1], "missing or altered") for chain in CHAINS),
    *((chain, lambda snapshot: [*snapshot[:-1], "altered"], "missing or altered") for chain in CHAINS),
    *((chain, lambda snapshot: [HOOK, *reversed(snapshot[1:])], "missing or altered")
      for chain in ["dispatch", "guard", CHAIN])])
def test_check_damage(chain, damage, word):
    """A chain that is missing, hooked elsewhere, or lacks a rule is named, with the rule that should be there."""
    kernel, _, snapshot = intact()
    kernel.answers["snapshot"] = lambda name, *_: damage(snapshot(name)) if name == chain else snapshot(name)
    error = check(kernel)
    assert error.code == 104 and f"chain {chain} " in error.args[0].replace(":", " ") and word in error.args[0]
    if word == "missing or altered":
        rules = [f'{rule} comment "{comment}"' for rule, comment in ruleset.shared_rules(chain, [])] \
            if chain != CHAIN else [*ruleset.rules_of(WEB)]
        assert error.details in (rules[1:] or rules)


@pytest.mark.parametrize("answers, words", [
    ({"lookup": {}}, ["tcp port 8080 on 0.0.0.0", "no entry", "ipv4 . tcp . 8080"]),
    ({"lookup": dict.fromkeys(elements(WEB), OTHER)}, ["tcp port 8080", OTHER]),
    ({"references": 3}, [CHAIN, "unexpected"]),
    ({"references": 1}, [CHAIN]), ({"is_dormant": True}, ["dormant"])])
def test_check_maps(answers, words):
    """A port that leads nowhere or elsewhere, an element too many, a table that sleeps: each is named."""
    kernel, *_ = intact(**answers)
    error = check(kernel)
    assert error.code == 104 and all(word in error.args[0] for word in words)


def test_check_own_other_interface():
    """A port that leads to this container through another interface is as ADD left it."""
    kernel, *_ = intact(lookup=dict(zip(elements(WEB), [CHAIN, "c/web-1/eth1"])), references=1)
    assert check(kernel) is None


@pytest.mark.parametrize("container_id, home", [("a" * 64, False), (HASHED["CNI_CONTAINERID"], True)])
def test_check_hashed_name(container_id, home):
    """Whose chain a port leads to is what its record says, not how its name begins."""
    found = attachment(PORT, environ={**HASHED, "CNI_CONTAINERID": container_id, "CNI_IFNAME": "eth0"},
                       prevResult=UNBOUND)
    theirs = attachment(PORT, environ=HASHED, prevResult=UNBOUND)
    chain = ruleset.chain_of(theirs.container_id, theirs.ifname)
    kernel, empty, _ = intact(lookup=dict.fromkeys(elements(found), chain), references=0, snapshot=[HOOK],
                               owner=ruleset.Owner(chain, "".join(ruleset.record_of(theirs))))
    empty.answers["snapshot"] = [HOOK]
    with contextlib.nullcontext() if home else pytest.raises(cni.CniError, match="is not forwarded to this container"):
        check_attachment(found, kernel)


def test_check_no_ports():
    """Without ports there is nothing to compare."""
    assert respond("CHECK", configuration()) == (0, None)


# --- stale connections ----------------------------------------------------------------------------------------

def flow(destination, port, target):
    packed = [socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip) for ip in (destination, target)]
    return types.SimpleNamespace(family=6 if ":" in destination else 4, destination=packed[0], port=port,
                                 target=packed[1])


def pack(*ips):
    return {flow(ip, 0, ip).target for ip in ips}


LOCAL = {"local_addresses": pack("192.0.2.1", "127.0.0.1", "fd00::1", "::1")}


def test_forget_after_add():
    """After ADD the flows of udp and sctp that still go elsewhere are forgotten, once for each; tcp's are new flows."""
    kernel = RecordingKernel(**LOCAL)
    add(kernel, PORT, mapping(protocol="udp"), mapping(protocol="sctp"), mapping(protocol="udp", host_port=53))
    assert [call[1] for call in kernel.named("delete_flows")] == [17, 132]


@pytest.mark.parametrize("found, stale", [
    (flow("192.0.2.1", 8080, "192.0.2.1"), True), (flow("192.0.2.1", 8080, "10.88.0.9"), True),
    (flow("127.0.0.1", 8080, "127.0.0.1"), True), (flow("192.0.2.1", 8080, "10.88.0.2"), False),
    (flow("192.0.2.1", 8081, "10.88.0.9"), False), (flow("198.51.100.7", 8080, "198.51.100.7"), False),
    (flow("fd00::1", 8080, "fd00::1"), True), (flow("fd00::1", 8080, "fd88::2"), False),
    (flow("2001:db8::1", 8080, "2001:db8::1"), False)])
def test_stale_after_add(found, stale):
    """Stale is what asks this host for the port and is answered by anybody but the container."""
    kernel = RecordingKernel(**LOCAL)
    add(kernel, mapping(protocol="udp"))
    [(_, _, filters, is_stale)] = kernel.named("delete_flows")
    assert is_stale(found) == stale
    assert sorted(filters()) == sorted((4 if len(ip) == 4 else 6, 8080, ip, b"") for ip in LOCAL["local_addresses"])


@pytest.mark.parametrize("found, stale", [
    (flow("192.0.2.1", 8080, "10.88.0.9"), True), (flow("192.0.2.9", 8080, "10.88.0.9"), False),
    (flow("127.0.0.1", 8080, "10.88.0.9"), False)])
def test_stale_after_add_on_one_address(found, stale):
    """Published on one address, other addresses' live flows are spared."""
    kernel = RecordingKernel(**LOCAL)
    add(kernel, mapping("192.0.2.1", "udp"))
    [(_, protocol, filters, is_stale)] = kernel.named("delete_flows")
    assert (protocol, is_stale(found), filters()) == (17, stale, [(4, 8080, *pack("192.0.2.1"), b"")])


@pytest.mark.parametrize("found, stale", [
    (flow("192.0.2.1", 8080, "10.88.0.2"), True), (flow("127.0.0.1", 8080, "10.88.0.2"), True),
    (flow("192.0.2.1", 8080, "10.88.0.9"), False), (flow("192.0.2.1", 8081, "10.88.0.2"), False),
    (flow("192.0.2.1", 53, "10.88.0.2"), True), (flow("192.0.2.9", 53, "10.88.0.2"), False)])
def test_stale_after_delete(found, stale):
    """After DEL the flows to what it published, answered by its container, are forgotten; of every protocol."""
    table = dict.fromkeys([elements(attachment(PORT))[0], *elements(attachment(mapping("192.0.2.1", host_port=53)))],
                          CHAIN)
    kernel = RecordingKernel(**holding(table, targets={CHAIN: pack("10.88.0.2")}))
    delete("web-1", "eth0", "net", kernel)
    [(_, protocol, filters, is_stale)] = kernel.named("delete_flows")
    target = pack("10.88.0.2").pop()
    assert (protocol, is_stale(found)) == (6, stale)
    assert sorted(filters()) == sorted([(4, 8080, b"", target), (4, 53, *pack("192.0.2.1"), target)])
    order = [call[0] for call in kernel.calls]
    assert order.index("unlock") < order.index("delete_flows")


def test_forget_after_replacement():
    """A repeated ADD forgets the flows to what it does not publish any more, and spares the others."""
    old = dict.fromkeys(elements(attachment(PORT, mapping(host_port=9))), CHAIN)
    kernel = RecordingKernel(**holding(old, targets={CHAIN: pack("10.88.0.2", "fd88::2")}))
    add(kernel, PORT)
    [(_, protocol, _, is_stale)] = kernel.named("delete_flows")
    assert protocol == 6
    assert [is_stale(flow("192.0.2.1", port, "10.88.0.2")) for port in (9, 8080)] == [True, False]


# --- after a firewall's reload --------------------------------------------------------------------------------

def other(name, *ports, ifname="eth0"):
    return attachment(*ports or [PORT], environ={"CNI_CONTAINERID": name, "CNI_NETNS": f"/run/netns/{name}",
                                                 "CNI_IFNAME": ifname},
                      prevResult=UNBOUND)


def test_restore(kernel):
    """What the kernel has lost is written again: the base, then all the rest at once; then localhost is opened."""
    kernel.answers.update(CLOSED)
    second = other("second", mapping(host_port=9))
    assert restore([WEB, second], kernel) == ([WEB, second], [])
    notes = ruleset.note_interfaces({"cni0": ruleset.OPENED})
    assert kernel.written == [BASE, ruleset.attach(WEB) + ruleset.attach(second) + notes]
    assert locked(kernel) & {"lookup", "write", "set_localnet"} and not locked(kernel) & {"way_to"}
    assert [name for name, *_ in kernel.named("transact", "write", "set_localnet")] == \
        ["transact", "write", "set_localnet", "set_localnet"]


def test_restore_after_a_flush(kernel):
    """With the table its notes are gone: what leads to the restored is taken for opened by this plugin."""
    kernel.answers.update(has_table=False, is_noted=False)
    restore([WEB], kernel)
    assert kernel.written[-1] == ruleset.attach(WEB) + ruleset.note_interfaces({"cni0": ruleset.OPENED})


def test_restore_guards_what_is_open(kernel, monkeypatch):
    """After a flush, and without a container that lives: an interface is guarded as long as it is open."""
    monkeypatch.setattr("cni_portmap.verbs.restore.open_interfaces", lambda: ["br9"])
    kernel.answers.update(has_table=False)
    restore([], kernel)
    assert kernel.written == [BASE + ruleset.note_interfaces({"br9": ruleset.FOUND_OPEN})]
    kernel = RecordingKernel(**INTACT)
    monkeypatch.setattr("cni_portmap.verbs.restore.open_bridges", list)
    restore([], kernel)
    assert kernel.written == []


def test_restore_guards_bridges_that_a_new_table_does_not_know(monkeypatch):
    """ADD after a flush notes its own interface: the others, which it cannot know, stay open until `restore`."""
    monkeypatch.setattr("cni_portmap.verbs.restore.open_bridges", lambda: ["br8", "br9"])
    kernel = RecordingKernel(**INTACT, is_noted=lambda name: name == "br8")
    restore([], kernel, dry_run=True)
    assert kernel.written == []
    restore([], kernel)
    assert kernel.written == [ruleset.note_interfaces({"br9": ruleset.FOUND_OPEN})]


def test_restore_of_all_but_one():
    """What nft refuses of one container keeps no other's ports away: each is tried by itself, and is told."""
    def write(change):
        if "c/bad/eth0" in change.rules:
            raise cni.CniError(100, "refused")
        return True
    kernel = RecordingKernel(write=write, has_table=lambda: bool(kernel.written), is_noted=False)
    pods = [WEB, other("bad", mapping(host_port=1)), other("second", mapping(host_port=9))]
    restored, refused = restore(pods, kernel)
    assert restored == [pods[0], pods[2]] and [(pod, error.code) for pod, error in refused] == [(pods[1], 100)]
    notes = ruleset.note_interfaces({"cni0": ruleset.OPENED})
    assert [text for text in kernel.written[2:] if "c/bad" not in text] == \
        [ruleset.attach(pod) + notes for pod in restored]  # open since before the table went


def test_restore_does_not_go_on_without_the_base():
    """Where what all share cannot be written, nothing is; and one refusal says so."""
    def transact(text):
        raise cni.CniError(100, "refused")
    kernel = RecordingKernel(transact=transact)
    with pytest.raises(cni.CniError, match="refused"):
        restore([WEB, other("second", mapping(host_port=9))], kernel)
    assert len(kernel.written) == 1


@pytest.mark.parametrize("dry_run", [False, True])
def test_restore_forgets_flows(dry_run):
    """UDP flows that began meanwhile lead elsewhere, and those of dead owners nowhere: forgotten, as in ADD."""
    table = dict.fromkeys(elements(other("gone", mapping(host_port=8080), mapping(host_port=9))), "c/gone/eth0")
    kernel = RecordingKernel(**holding(table, targets={"c/gone/eth0": pack("10.88.0.9")}, judge=dead,
                                       record="netns=/run/netns/gone#5", local_addresses=pack("192.0.2.1")))
    udp = other("web", mapping(host_port=8080), mapping(host_port=53, protocol="udp"))
    assert restore([udp], kernel, dry_run) == ([udp], [])
    calls = kernel.named("delete_flows")
    assert [protocol for _, protocol, *_ in calls] == ([] if dry_run else [17, 6])
    if not dry_run:
        assert calls[0][3](flow("192.0.2.1", 53, "192.0.2.1"))
        assert [calls[1][3](flow("192.0.2.1", port, "10.88.0.9")) for port in (8080, 9)] == [False, True]
        order = [call[0] for call in kernel.calls]
        assert order.index("delete_flows") > order.index("unlock")


def test_restore_dry_run(kernel):
    """A dry run says the same, and writes nothing."""
    assert restore([WEB], kernel, dry_run=True) == ([WEB], [])
    assert not kernel.named("transact", "write", "set_localnet", "allow_localhost6")


def test_restore_nothing_lost():
    """Rules that are in place are left alone."""
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(WEB), CHAIN)))
    kernel.answers["comments"] = lambda chain: base_comments().get(chain) or [""] * len([*ruleset.rules_of(WEB)])
    assert restore([WEB], kernel) == ([], []) and kernel.written == []


@pytest.mark.parametrize("ours, theirs, conflict", OVERLAPS)
def test_restore_conflict(kernel, ours, theirs, conflict):
    """Of two that claim one port the first gets it, and the second is reported with the owner's name."""
    first, second = other("first", mapping(**theirs)), other("second", mapping(**ours))
    restored, refused = restore([first, second], kernel)
    assert restored == ([first] if conflict else [first, second])
    assert [(each, error.code) for each, error in refused] == [(second, 101)] * conflict
    assert len(kernel.written) == 2 and all("container first" in error.args[0] for _, error in refused)


def test_restore_two_interfaces(kernel):
    """Both interfaces of one container come back; the port leads to the first, as ADD left it."""
    first, second = other("web-1"), other("web-1", ifname="eth1")
    assert restore([first, second], kernel) == ([first, second], [])
    both = ruleset.attach(first) + ruleset.attach(second, elements(second))
    assert kernel.written == [BASE, both + ruleset.standby_note(CHAIN, "eth1")]


def test_restore_two_sandboxes(kernel):
    """Both sandboxes of a pod come back; the port leads to the one that had it, and the next stands by, as before."""
    last, following = (attachment(PORT, environ={**VARIABLES, "CNI_CONTAINERID": name, "CNI_ARGS": POD})
                       for name in ("last", "next"))
    assert restore([last, following], kernel) == ([last, following], [])
    both = ruleset.attach(last) + ruleset.attach(following, elements(following))
    assert kernel.written == [BASE, both + ruleset.standby_note("c/last/eth0", "eth0", "next")]


@pytest.mark.parametrize("damaged", [[CHAIN], ["c/web-1/eth1"], [CHAIN, "c/web-1/eth1"]], ids=len)
@pytest.mark.parametrize("order", [1, -1])
def test_restore_who_stands_by(damaged, order):
    """Whichever of a container's interfaces is damaged or comes first, the port leads to one that is written."""
    both = [other("web-1"), other("web-1", ifname="eth1")]
    kernel = RecordingKernel(**holding(dict.fromkeys(elements(WEB), CHAIN), record="net=lab"))
    kernel.answers["has_chain"] = lambda chain: True
    notes = {CHAIN: [""] * 9 + ["also on eth1"], "c/web-1/eth1": [""] * 9}
    kernel.answers["comments"] = lambda chain: base_comments().get(chain) or \
        (notes[chain] if chain not in damaged else [])
    restored, refused = restore(both[::order], kernel)
    assert not refused
    if CHAIN in damaged:
        assert restored == both[::order]
        text, first = kernel.written[0], restored[0]
        holder, second = (f"c/web-1/{each.ifname}" for each in restored)
        assert text.endswith(ruleset.attach(first) + ruleset.attach(restored[1], elements(WEB)) +
                             ruleset.standby_note(holder, restored[1].ifname)) and text.count("elements = ") == 1
        assert text.startswith("delete element") and f"delete chain inet cni_portmap {second}\n" in text
    else:
        assert restored == both[1:] and "element" not in kernel.written[0]


def test_restore_keeps_notes():
    """A chain that is repaired still notes its standby interfaces."""
    kernel = RecordingKernel(**noted(["eth1"]))
    kernel.answers["comments"] = lambda chain: {**base_comments(), CHAIN: ["net=lab", "also on eth1"]}.get(chain, [])
    restore([WEB], kernel)
    assert ruleset.standby_note(CHAIN, "eth1") in kernel.written[0]


def test_restore_looks_again(kernel):
    """An attachment that was deleted since it was read, or has come back, is passed over, under the lock."""
    first, second = other("first"), other("second", mapping(host_port=9))
    asked = []

    def is_current(attachment):
        asked.append(kernel.calls[-1][0] != "unlock" and ("lock",) in kernel.calls)
        return attachment is second
    assert restore([first, second], kernel, False, is_current) == ([second], [])
    assert asked == [True, True] and "c/first" not in "".join(kernel.written)


def test_restore_judges_all_at_once():
    """All conflicting owners are judged once, without the lock."""
    table = {element: chain for index, chain in enumerate([OTHER, "c/third/eth0"])
             for element in elements(other("x", mapping(host_port=80 + index)))}
    kernel = RecordingKernel(**holding(table, judge=dead))
    lost, refused = restore([other("a", mapping(host_port=80)), other("b", mapping(host_port=81))], kernel)
    assert len(lost) == 2 and not refused and len(kernel.named("judge")) == 1 and "judge" not in locked(kernel)


def test_restore_twice_remembered(kernel):
    """An attachment that two folders remember is written once."""
    restore([WEB, attachment(PORT)], kernel)
    assert kernel.written == [BASE, ruleset.attach(WEB)]


# --- failures -------------------------------------------------------------------------------------------------

FULL = dict.fromkeys(elements(WEB), CHAIN)
DEAD = dict.fromkeys(elements(WEB), OTHER)
UDP = configuration(PORT, mapping(protocol="udp"), hostPortInUse="refuse", conditionsV4=["ct state new"])
FAULTS = {"first-add": ("ADD", UDP, {}), "add": ("ADD", UDP, INTACT), "add-again": ("ADD", UDP, holding(FULL)),
          "takeover": ("ADD", UDP, holding(DEAD, judge=dead)), "del": ("DEL", configuration(), holding(FULL)),
          "check": ("CHECK", configuration(PORT), "intact"), "status": ("STATUS", configuration(), INTACT),
          "gc": ("GC", configuration(**{"cni.dev/valid-attachments": []}),
                 {**holding(FULL), "owners": OWNERS, "has_chain": True})}


@pytest.mark.parametrize("name", FAULTS)
def test_every_call_fails(name):
    """Whichever call fails, the answer is one error; written is nothing or all, in one piece; the lock is free.

    A first ADD's base is a piece of its own.
    """
    verb, given, answers = FAULTS[name]

    def run(fails_at=0):
        kernel = intact()[0] if answers == "intact" else RecordingKernel(**answers)
        kernel.fails_at = fails_at
        return kernel, *respond(verb, given, kernel)

    whole, status, _ = run()
    assert status == 0 and len(whole.calls) >= 3
    for fails_at, call in enumerate(whole.calls, 1):
        kernel, status, document = run(fails_at)
        if call == ("unlock",) or verb == "GC" and status == 0:  # GC goes on, one by one
            continue
        assert (status, document["code"]) == (1, 50 if verb == "STATUS" else 5), document
        writes = [call for call in whole.calls[:fails_at] if call[0] in ("transact", "write")]
        assert kernel.written == whole.written[:len(writes)]
        failed = kernel.calls[-1] == ("lock",)
        assert len(kernel.named("unlock")) == len(kernel.named("lock")) - failed


@pytest.mark.parametrize("fails", ["write", "delete_flows"])
def test_retry_after_commit(fails):
    """The next ADD replaces what a failed one may have left."""
    first = RecordingKernel()
    second = RecordingKernel(**holding(FULL))
    first.answers[fails] = lambda *_: (_ for _ in ()).throw(cni.CniError(5, "failed"))
    assert add(first, mapping(protocol="udp")) is not None
    assert add(second) is None
    assert second.written == [ruleset.detach([CHAIN], FULL) + ruleset.attach(WEB)]


def test_recording_kernel_is_honest():
    """The stand-in has no method that the kernel lacks, and takes no argument that it doesn't."""
    kernel = RecordingKernel()
    with pytest.raises(AttributeError):
        kernel.no_such_method()
    with pytest.raises(TypeError):
        kernel.has_chain()


def _publication(publisher, port, host_ip="0.0.0.0", protocol="tcp"):
    line = Published(6 if ":" in host_ip else 4, protocol, host_ip, (port,), "", (port,), "", "", "", None, "", "", "",
                     "")
    return others.Publication(line, publisher, "", ())


@pytest.mark.parametrize("one, other, is_split", [
    ((80,), (80,), True), ((80,), (81,), False), ((80, "192.0.2.1"), (80,), True),
    ((80, "192.0.2.1"), (80, "192.0.2.2"), False), ((80, "::"), (80,), False), ((80, "::"), (80, "2001:db8::1"), True),
    ((80, "0.0.0.0", "udp"), (80,), False), ((80, "0.0.0.0", "any"), (80,), True)])
def test_what_two_publish(one, other, is_split):
    """Ports overlap as in bind(2); what one publishes twice is not split."""
    both = [_publication("Docker", *one), _publication("netavark", *other), _publication("netavark", *other)]
    assert [each.split for each in others._with_split(both)] == [
        ("netavark",), ("Docker",), ("Docker",)] if is_split else [(), (), ()]


def test_only_one_port_is_compared(monkeypatch):
    """Of 2,000 ports each with each would be four million pairs: list --all took minutes."""
    compared = []
    monkeypatch.setattr(others, "_overlap", lambda one, other: compared.append(1))
    others._with_split([_publication(who, port) for port in range(1, 2001) for who in ("Docker", "netavark")])
    assert len(compared) == 4000
