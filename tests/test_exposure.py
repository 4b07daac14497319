"""Exposure: what its keys mean, what they refuse, its elements, and the record by which they are found again."""
import json
import re
import socket

import hypothesis
import hypothesis.strategies as st
import pytest
from helpers import CHAIN, PORT, PREV_RESULT, RecordingKernel, attachment, configuration, explained, request, respond

from cni_portmap import cni, config, explain, exposure, ruleset
from cni_portmap.attachment import PROTOCOLS, Exposure
from cni_portmap.exposure import CONTAINER, ISOLATED, MODES, NAT, ROUTED

DNS = {"hostPort": 53, "containerPort": 53, "protocol": "udp"}
LOCAL = {"hostPort": 8443, "containerPort": 443, "hostIP": "127.0.0.1"}


def both(mode, **keys):
    return {"gatewayModeV4": mode, "gatewayModeV6": mode, **keys}


def parsed(*ports, **keys):
    return explained(config.parse, request(runtimeConfig={"portMappings": [*ports]}, **keys))


def members(*ports, **keys):
    """The elements of an attachment, as text: (set, key) -> value."""
    found = exposure.created_for(attachment(*ports, **keys), CHAIN)
    assert {*found.values()} <= {CHAIN}
    return {(member[0], exposure.member_text(member)): member[3] for member in found}


# --- keys -----------------------------------------------------------------------------------------------------

BAD = [
    *((f"gatewayMode{v}", value) for v in ("V4", "V6") for value in ["NAT", "bridge", "", 1, True, [], ["nat"], {}]),
    *(("allowDirectRouting", value) for value in ["true", 1, 0, [], {}]),
    *(("trustedHostInterfaces", value) for value in ["eth0", 1, {}, True]),
    *(("defaultHostIP", value) for value in ["", "host", "10.0.0.1/24", 1, True, [], {}, "1.2.3"]),
    *(("outgoingSourceV4", value) for value in [
        "", "host", 1, [], True, "::1", "fd00::1", "0.0.0.0", "0.0.0.1", "127.0.0.1", "127.8.8.8", "224.0.0.1",
        "255.255.255.255", "10.0.0.1/24", "Container"]),
    *(("outgoingSourceV6", value) for value in [
        "10.0.0.1", "::", "::1", "ff02::1", "::ffff:10.0.0.1", "fd00::1/64", "fe80::1", "febf::1"])]


@pytest.mark.parametrize("mode", [NAT, None])
@pytest.mark.parametrize("key, value", BAD)
def test_refused(key, value, mode):
    """A bad value is code 7, also where nothing is published; the message names key and value."""
    given = {**both(mode), key: value}
    status, document = respond("ADD", configuration(**given))
    assert (status, document["code"]) == (1, 7)
    assert document["msg"] == f"invalid value for {key}: {json.dumps(value)}"
    assert document["details"].startswith("expected ") and len(document["details"]) > 15


@pytest.mark.parametrize("name", ["", ".", "..", "a" * 16, "a b", "a/b", "eth0; drop", 'a"', "eth*", "a\n", "é", 1,
                                  None])
def test_interface_names(name):
    """A name that the kernel would not take, or that could leave nft text, is refused; its place is named."""
    with pytest.raises(cni.CniError) as caught:
        parsed(**both(NAT, trustedHostInterfaces=["eth0", name]))
    assert caught.value.code == 7 and "trustedHostInterfaces[1]" in caught.value.msg


CONTRADICTIONS = [
    ("allowDirectRouting", {"allowDirectRouting": True}),
    ("trustedHostInterfaces", {"trustedHostInterfaces": ["eth0"]}),
    ("allowDirectRouting", both(ROUTED, allowDirectRouting=True)),
    ("trustedHostInterfaces", both(ISOLATED, trustedHostInterfaces=["eth0"])),
    ("defaultHostIP", both(ROUTED, defaultHostIP="192.0.2.1")), ("defaultHostIP", both(ISOLATED, defaultHostIP="::1")),
    ("defaultHostIP", {"gatewayModeV6": ROUTED, "defaultHostIP": ["192.0.2.1", "2001:db8::1"]}),
    ("outgoingSourceV4", both(ROUTED, outgoingSourceV4="192.0.2.1")),
    ("outgoingSourceV6", both(ROUTED, outgoingSourceV6="2001:db8::1")),
    ("outgoingSourceV4", both(ISOLATED, outgoingSourceV4=CONTAINER)),
    ("outgoingSourceV6", {"gatewayModeV6": ISOLATED, "outgoingSourceV6": "2001:db8::1"}),
    ("conditionsV4", both(ROUTED, conditionsV4=["ct state", "new"])),
    ("conditionsV6", {"gatewayModeV6": NAT, "allowDirectRouting": True, "conditionsV6": ["ct state new"]})]


@pytest.mark.parametrize("key, keys", CONTRADICTIONS)
def test_contradictions(key, keys):
    """What contradicts another key is refused, key and value named; `validate` says the same."""
    document = respond("ADD", configuration(**keys))[1]
    assert document["code"] == 7 and document["msg"].startswith(f"invalid value for {key}: ")
    assert "gatewayMode" in document["details"]
    (path, value, expected), = explain.violations(configuration(**keys))
    assert (path, value, f"expected {expected}") == (key, keys[key], document["details"])


@pytest.mark.parametrize("keys, port, refused", [
    (both(ISOLATED), PORT, True), (both(ISOLATED), {**PORT, "hostIP": "0.0.0.0"}, True),
    ({"gatewayModeV4": ISOLATED}, {**PORT, "hostIP": "192.0.2.1"}, True),
    ({"gatewayModeV4": ISOLATED}, PORT, False), ({"gatewayModeV4": ISOLATED}, {**PORT, "hostIP": "::"}, False),
    ({"gatewayModeV4": ISOLATED, "defaultHostIP": "0.0.0.0"}, PORT, True)])
def test_mappings_of_isolated_families(keys, port, refused):
    """A mapping that only isolated families could serve is refused; another is served by the other family."""
    status, document = respond("ADD", configuration(port, **keys), None if refused else RecordingKernel())
    assert status == refused
    if refused:
        assert document["msg"].startswith("invalid value for runtimeConfig.portMappings[0]: ")
        assert "isolated" in document["details"]
        assert [path for path, *_ in explain.violations(configuration(port, **keys))] == \
            ["runtimeConfig.portMappings[0]"]
    else:
        assert {port.family for port in parsed(port, **keys).ports} == {6}


@pytest.mark.parametrize("default, expected", [
    ("192.0.2.1", [(4, "192.0.2.1")]), ("0.0.0.0", [(4, "")]), ("::", [(6, "")]), ("::1", [(6, "::1")]),
    (["192.0.2.1", "2001:DB8::1"], [(4, "192.0.2.1"), (6, "2001:db8::1")]), (["0.0.0.0", "::"], [(4, ""), (6, "")]),
    (["127.0.0.1", "192.0.2.1", "127.0.0.1"], [(4, "127.0.0.1"), (4, "192.0.2.1")]), (None, [(4, ""), (6, "")]),
    ("::ffff:192.0.2.1", [(4, "192.0.2.1")])])
@pytest.mark.parametrize("missing", [{}, {"hostIP": ""}, {"hostIP": None}])
def test_default_host_ip(default, expected, missing):
    """A mapping without hostIP is published once on each address; an explicit one wins, 0.0.0.0 too."""
    ports = parsed({**PORT, **missing}, {**DNS, "hostIP": "0.0.0.0"}, defaultHostIP=default).ports
    assert [(port.family, port.host_ip) for port in ports if port.protocol == "tcp"] == expected
    assert [(port.family, port.host_ip) for port in ports if port.protocol == "udp"] == [(4, "")]


def test_a_default_conflicts_as_what_it_stands_for():
    """Two mappings that are one only by the default are refused, and accepted where the default keeps them apart."""
    one, two = PORT, {**PORT, "containerPort": 81, "hostIP": "192.0.2.1"}
    for read in (lambda keys: respond("ADD", configuration(one, two, **keys))[1]["msg"],
                 lambda keys: next(explain.violations(configuration(one, two, **keys)))[0]):
        assert "runtimeConfig.portMappings[1]" in read({"defaultHostIP": "192.0.2.1"})
    assert len(parsed(one, two, defaultHostIP="192.0.2.9").ports) == 2
    assert [*explain.violations(configuration(one, two, defaultHostIP="192.0.2.9"))] == []


@pytest.mark.parametrize("ports, keys, words", [
    ([{**PORT, "hostIP": "0.0.0.0"}], {"defaultHostIP": "192.0.2.1"}, ["defaultHostIP", "no effect"]),
    ([{**PORT, "hostIP": "0.0.0.0"}, DNS], {"defaultHostIP": "192.0.2.1"}, []),
    ([PORT], {"defaultHostIP": "0.0.0.0"}, []), ([PORT], both(NAT), []), ([], both(ROUTED), []),
    ([PORT, DNS], {"gatewayModeV4": ROUTED}, ["gatewayModeV4", "host ports are ignored", "10.88.0.2"]),
    ([LOCAL], {"gatewayModeV4": ROUTED}, ["tcp port 8443 on 127.0.0.1", "gatewayModeV4"])])
def test_warned(ports, keys, words, capfd):
    """What a key cannot do is one line on stderr."""
    parsed(*ports, **keys)
    cni.tell()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(words) and all(word in line for word in words for line in lines)


# --- what an attachment gets ------------------------------------------------------------------------------------

GUARDED = {("guarded4", "10.88.0.2"): b"", ("home4", '"cni0" . 10.88.0.2'): b"",
           ("guarded6", "fd88::2"): b"", ("home6", '"cni0" . fd88::2'): b""}
OPEN = {("open4", "10.88.0.2 . tcp . 80"): b"", ("open6", "fd88::2 . tcp . 80"): b""}
OWN = {4: socket.inet_pton(socket.AF_INET, "10.88.0.2"), 6: socket.inet_pton(socket.AF_INET6, "fd88::2")}


@pytest.mark.parametrize("ports, keys, expected", [
    ([PORT, LOCAL], both(NAT), GUARDED), ([], both(NAT), GUARDED), ([PORT], both("nat-unprotected"), {}),
    ([PORT], {}, {}),
    ([PORT], {"defaultHostIP": "192.0.2.1"}, {}),
    ([PORT, LOCAL], both(NAT, allowDirectRouting=True), GUARDED | OPEN),
    ([PORT, LOCAL], {"gatewayModeV4": NAT, "trustedHostInterfaces": ["wg0", "wg0"]}, {
        **dict.fromkeys([*GUARDED][:2], b""),
        **{("trusted4", f'"wg0" . 10.88.0.2 . tcp . {port}'): b"" for port in (80, 443)}}),
    ([PORT, LOCAL], both(ROUTED), GUARDED | OPEN | {("ping4", "10.88.0.2"): b"", ("ping6", "fd88::2"): b"", (
        "outgoing4", "10.88.0.2"): OWN[4], ("outgoing6", "fd88::2"): OWN[6]}),
    ([], both(ISOLATED), GUARDED | {("isolated4", "10.88.0.2"): b"", ("isolated6", "fd88::2"): b""}),
    ([PORT], {"outgoingSourceV4": "192.0.2.9"}, {("home4", '"cni0" . 10.88.0.2'): b"", (
        "outgoing4", "10.88.0.2"): bytes((192, 0, 2, 9))}),
    ([PORT], both(ROUTED, conditionsV4=["ip saddr 10.0.0.0/8"], gatewayModeV6=None), {
        ("guarded4", "10.88.0.2"): b"", ("home4", '"cni0" . 10.88.0.2'): b"", ("open4", "10.88.0.2 . tcp . 80"): b"",
        ("ping4", "10.88.0.2"): b"", ("outgoing4", "10.88.0.2"): OWN[4],
        ("conditional4", "10.88.0.2"): "x/web-1/eth0"})])
def test_elements(ports, keys, expected):
    """Each mode has its elements, in no other set."""
    assert members(*ports, **keys) == expected


def test_a_routed_link_has_neighbours_behind_others():
    """Where no bridge leads to the container, its neighbours are those in the network of its address."""
    kernel = RecordingKernel(home_of=(("veth1",), True))
    found = explained(config.parse, request(**both(NAT)))
    from cni_portmap.verbs.steps import survey
    survey(found, kernel)
    texts = {exposure.member_text(member) for member in exposure.created_for(found, CHAIN) if member[0] == "near4"}
    assert texts == {"10.88.0.2 . 10.88.0.0-10.88.255.255"}


def test_every_address_is_guarded():
    """Not only the first of each family, which published ports lead to."""
    result = {"ips": [{"address": ip} for ip in ("10.88.0.2/16", "10.89.0.2/16", "10.88.0.2/16", "fd88::2/64")]}
    found = {key for name, key in members(PORT, prevResult=result, **both(NAT)) if name.startswith("guarded")}
    assert found == {"10.88.0.2", "10.89.0.2", "fd88::2"}


def test_host_ports_of_a_routed_family_are_nobodys():
    """They are not published, owned or looked for; two container ports may have one, and localhost is not opened."""
    found = parsed(PORT, {**PORT, "containerPort": 81}, **both(ROUTED))
    assert not found.ports and not found.addresses and found.mark_bit is None
    assert found.exposure[0].opened == (("tcp", 80), ("tcp", 81))
    mixed = parsed(PORT, gatewayModeV4=ROUTED)
    assert {port.family for port in mixed.ports} == {*mixed.addresses} == {6}


@pytest.mark.parametrize("keys", [{}, both(None), both("nat-unprotected"), {"defaultHostIP": ["0.0.0.0", "::"]},
                                  {"trustedHostInterfaces": [], "allowDirectRouting": False}])
def test_absent_keys_change_nothing(keys):
    """The same commands as without the keys, and without ports no call at all."""
    kernels = RecordingKernel(), RecordingKernel()
    for kernel, given in zip(kernels, ({}, keys)):
        assert respond("ADD", configuration(PORT, **given), kernel)[0] == 0
    assert kernels[0].written == kernels[1].written and "guarded" not in "".join(kernels[0].written)
    assert respond("ADD", configuration(**keys))[0] == 0


# --- the record ------------------------------------------------------------------------------------------------

NAMES = st.text(st.sampled_from("ab0_.-@+~=,"), min_size=1, max_size=15).filter(cni.is_ifname)
PORTS = st.lists(st.tuples(st.sampled_from(PROTOCOLS), st.integers(1, 65535) | st.integers(80, 90)), max_size=9).map(
    lambda ports: tuple(sorted({*ports})))
IPS = {4: st.ip_addresses(v=4).map(str), 6: st.ip_addresses(v=6).map(
    lambda ip: socket.inet_ntop(socket.AF_INET6, ip.packed)).filter(lambda ip: "." not in ip)}
NETWORKS = {4: st.sampled_from(["10.0.0.0/8", "192.0.2.7/32"]), 6: st.sampled_from(["fd88::/64", "::/0"])}


@st.composite
def exposures(draw):
    found = []
    for family in 4, 6:
        near = draw(st.lists(NETWORKS[family], max_size=2, unique=True))
        found.append(Exposure(
            family, draw(st.sampled_from(MODES)),
            tuple(draw(st.lists(IPS[family], min_size=1, max_size=2, unique=True))), networks=tuple(near),
            opened=draw(PORTS), trusted=draw(PORTS), interfaces=tuple(draw(st.lists(NAMES, max_size=2))),
            conditions=draw(st.sampled_from(["", "conditions"])),
            outgoing=draw(st.sampled_from(["", CONTAINER]) | IPS[family]),
            home=tuple(draw(st.lists(NAMES, max_size=2))), is_routed=bool(near)))
    return tuple(draw(st.lists(st.sampled_from(found), max_size=2, unique_by=lambda each: each.family)))


@hypothesis.given(exposures())
def test_record(exposed):
    """The record tells every element again, whatever it is split into."""
    for each in exposed:
        each.note = exposure.note_of(each)
    attached = attachment(PORT)
    attached.exposure = exposed
    record = "".join(ruleset.record_of(attached))
    read = exposure.exposure_in(record)
    expected = {member for each in exposed for member in exposure.members_of(each, CHAIN)}
    assert {member for each in read for member in exposure.members_of(each, CHAIN)} == expected
    owner = ruleset.Owner(CHAIN, record)
    assert (owner.network, owner.inode) == ("lab", attached.inode)


@hypothesis.given(st.text() | st.lists(st.sampled_from([
    "mode4=nat", "mode4=x", "ip4=10.0.0.1", "ip4=", "ip4=::1", "ip4=10.0.0.1;;", "home4=cni0;a b", "near4=10.0.0.1/8",
    "near4=10.0.0.0/8", "open4=tcp:1-99999999", "open4=tcp:0-70000", "open4=tcp:²", "open4=icmp:1", "from4=eth0",
    "trusted4=udp:53,54-60", "out4=container", "out4=evil", "if4=x", "mode6=routed", "ip6=fd88::2"])).map(" ".join))
def test_records_of_others(record):
    """Whatever others write there is no exposure, or gives elements that are valid nft text."""
    found = exposure.exposure_in(record) or ()
    for member in (member for each in found for member in exposure.members_of(each, CHAIN)):
        assert len(member[1]) == exposure.size_of(member[0])
        assert re.fullmatch(r'("[A-Za-z0-9_.@+~=,-]+"|[0-9a-f:.]+|tcp|udp|sctp|[0-9a-f:.]+-[0-9a-f:.]+)'
                            r'( \. ("[A-Za-z0-9_.@+~=,-]+"|[0-9a-f:.-]+|tcp|udp|sctp))*', exposure.member_text(member))


def test_comments():
    """The comment of an element is its owner's chain; one that is too long for the kernel is hashed."""
    assert exposure.comment_of(CHAIN) == CHAIN
    long = ruleset.chain_of("a" * 200, "eth0")
    assert len(exposure.comment_of(long)) <= ruleset.COMMENT_MAX
    assert exposure.comment_of(long) != exposure.comment_of(ruleset.chain_of("a" * 201, "eth0"))


def test_rules():
    """The rules of the shared chains look up sets that are declared; all have a comment that fits."""
    declared = {re.match(r"add (?:set|map) \S+ \S+ (\w+)", line)[1] for line in exposure.declarations()}
    rules = [pair for name in exposure.SHARED for pair in ruleset.shared_rules(name, [], (), exposure.SHARED)]
    used = {name for rule, _ in rules for name in re.findall(r"@(\w+)", rule)}
    assert used == declared == {*exposure.SETS} and ruleset.EXPOSED in declared
    assert all(len(comment) <= ruleset.COMMENT_MAX for _, comment in rules)
    assert not {*exposure.SHARED} & {*ruleset.SHARED}


def test_a_container_without_ports_has_a_chain():
    """Its record is all that it has: DEL and GC find the owner by it."""
    kernel = RecordingKernel()
    assert respond("ADD", configuration(**both(NAT)), kernel)[0] == 0
    chain = kernel.written[-1].partition(f"add chain inet cni_portmap {CHAIN} {{\n")[2].partition("\n}")[0]
    assert chain.count("\n") == chain.count("continue comment") and 'mode4=nat ip4=10.88.0.2 home4=cni0' in chain
    assert PREV_RESULT["ips"][0]["address"].startswith("10.88.0.2/")
