"""Exposure, with real packets: who reaches a container besides its published ports, and as whom it goes out."""
import contextlib
import json
import re
import socket
import struct
import textwrap

import lab
import pytest
from lab import TABLE, GcCall, Pod, exposed
from lab.agent import Agent
from lab.exposed import MODES, SETTINGS, TARGETS, WHO
from lab.libcni_cache import Cache


@pytest.mark.parametrize("setting, mode", [(setting, mode) for setting in SETTINGS for mode in MODES],
                         ids=lambda each: each.name)
def test_who_reaches_what(places, setting, mode):
    """In each mode everybody reaches what they should, and nothing else; and the container goes out as it should."""
    place = places(setting)
    with place.having(mode.keys):
        assert place.table(mode) == place.wanted(mode)
    assert "0123456789abcdef" not in lab.table()


@pytest.fixture
def place(places):
    """The place of the first setting: a bridge."""
    return places(SETTINGS[0])


HTTP, LOCAL, PING = TARGETS[2], TARGETS[5], TARGETS[6]
CONDITIONS = {"conditionsV4": ["ip saddr 192.0.2.0/24"], "conditionsV6": ["ip6 saddr 2001:db8::/64"]}


@pytest.mark.parametrize("keys", [mode.keys for mode in MODES if mode.name in ("routed", "nat, allowDirectRouting",
                                                                              "nat, trustedHostInterfaces")],
                         ids=["routed", "direct", "trusted"])
@pytest.mark.parametrize("family", [4, 6])
def test_conditions_restrict_what_is_open(place, keys, family):
    """Conditions decide who reaches a port on the container's address, as on the host's; ping and neighbours stay."""
    everybody = WHO[1:2] if "trustedHostInterfaces" in keys else WHO[:3]
    with place.having({**keys, **CONDITIONS}):
        for who in WHO[:3]:
            wanted = who in everybody and who == "LAN client"
            assert place.reach(who, HTTP, family, lab.patience(wanted)) == wanted
            pings = "routed" in keys.values()
            assert place.reach(who, PING, family, lab.patience(pings)) == pings
        assert place.reach("neighbour", HTTP, family) and place.reach("host", LOCAL, family)
    assert "0123456789abcdef" not in lab.table()
    with place.having(keys):
        for who in everybody:
            assert place.reach(who, HTTP, family)


# --- what each rule is for: a mistake in it is noticed -------------------------------------------------------------

def _rule(chain, comment):
    """The handle of the first rule of a chain with this in its comment."""
    return re.search(rf'{comment}[^"]*" # handle (\d+)', lab.nft("-a", "list", "chain", *TABLE.split(), chain))[1]


def _without(chain, *comments):
    def mistake():
        for comment in comments:
            lab.nft_script(f"delete rule {TABLE} {chain} handle {_rule(chain, comment)}")
    return mistake


def _with(chain, *rules):
    return lambda: lab.nft_script(*(f"insert rule {TABLE} {chain} {rule}" for rule in rules))


def _outgoing_comes_later():
    rules = re.findall(r"(?m)^\t\t((?:oifname|snat).*)$", lab.nft("list", "chain", *TABLE.split(), "outgoing"))
    lab.nft_script(f"delete chain {TABLE} outgoing", f"add chain {TABLE} outgoing {{",
                   "type nat hook postrouting priority srcnat + 1;", *rules, "}")


def _raw_prerouting():
    lab.nft_script("table inet raw {", "chain prerouting { type filter hook prerouting priority raw;",
                   'iifname != "cni0" ip daddr 10.88.0.0/16 drop', 'iifname != "cni0" ip6 daddr fd88::/64 drop', "}; }")


# Each case below is a function of whether the answer should be yes.

@contextlib.contextmanager
def _old_flow(place, family):
    """A UDP flow straight to the container, alive before the policy, ends."""
    with lab.Server("web", place.container, 81, "udp"), \
            lab.Client(place.client, place.ips[family], 81, "udp") as client:
        assert client.ask()
        yield lambda right: client.ask(lab.patience(not right)) is None


@contextlib.contextmanager
def _other_guarded(place, family):
    """A guarded container reaches what another one, in another network, has open."""
    ip = place.stranger.ipv6 if family == 6 else place.stranger.ipv4
    place.call("ADD", place.stranger, MODES[4].keys, [{"hostPort": 80, "containerPort": 80}])
    try:
        with lab.Server("stranger", place.stranger, 80):
            yield lambda right: lab.exchange(place.container, ip, 80, timeout=lab.patience(right))
    finally:
        place.call("DEL", place.stranger, {})


@contextlib.contextmanager
def _out(place, family):
    """The container goes out as itself, though its network masquerades it."""
    yield lambda right: place.out(family, timeout=lab.patience(right)) == place.ips[family]


@contextlib.contextmanager
def _forged(place, family):
    """A packet from the LAN that has a neighbour's address as its source does not arrive."""
    source = place.neighbour.ipv6 if family == 6 else place.neighbour.ipv4
    with lab.Server("web", place.container, 81, "udp") as server:
        def arrives(seconds):
            server.arrivals.clear()
            lab.inject(place.client, "to-lan-client", lab.packet(source, place.ips[family], 81))
            return lab.until(lambda: server.arrivals, seconds)
        yield lambda right: not arrives(lab.patience(not right))


@contextlib.contextmanager
def _forged_by_the_way_out(place, family):
    """Nor one with an address of its network that nobody has, which the default route leads to."""
    source = {4: "10.88.0.99", 6: "fd88::99"}[family]
    route = "default", "via", exposed.LAN[family][1]
    with lab.Server("web", place.container, 81, "udp") as server:
        def arrives(seconds):
            server.arrivals.clear()
            lab.inject(place.client, "to-lan-client", lab.packet(source, place.ips[family], 81))
            return lab.until(lambda: server.arrivals, seconds)
        lab.run("ip", f"-{family}", "route", "add", *route)
        try:
            yield lambda right: not arrives(lab.patience(not right))
        finally:
            lab.run("ip", f"-{family}", "route", "delete", *route)


@contextlib.contextmanager
def _forged_answer(place, family):
    """Nor an answer to a packet that others have sent with the container's address as its source."""
    client, ip, port = exposed.LAN[family][1], place.ips[family], iter(range(40000, 50000))
    with lab.Server("web", place.container, 81, "udp") as server:
        def arrives(seconds):
            server.arrivals.clear()
            mine = next(port)
            for packet in lab.packet(ip, client, mine, source_port=81), *(
                    lab.packet(client, its, 81, source_port=mine) for its in (ip, exposed.LAN[family][0])):
                lab.inject(place.client, "to-lan-client", packet)  # the host masquerades the first, or not
            return lab.until(lambda: server.arrivals, seconds)
        yield lambda right: not arrives(lab.patience(not right))


@contextlib.contextmanager
def _forged_host(place, family):
    """Nor one that is an answer of this host, by its addresses. Of IPv4 the kernel itself refuses it."""
    host, ip, port = exposed.LAN[6][0], place.ips[6], iter(range(40000, 50000))
    with lab.Server("web", place.container, 81, "udp") as server:
        def arrives(seconds):
            server.arrivals.clear()
            mine = next(port)
            for packet in lab.packet(ip, host, mine, source_port=81), lab.packet(host, ip, 81, source_port=mine):
                lab.inject(place.client, "to-lan-client", packet)
            return lab.until(lambda: server.arrivals, seconds)
        yield lambda right: not arrives(lab.patience(not right))


@contextlib.contextmanager
def _forged_redirected(place, family):
    """Nor one that is its answer, where an administrator's rule leads one of its ports to another."""
    host, ip = exposed.LAN[6][0], place.ips[6]
    lab.nft_script("table inet admin {", "chain prerouting { type nat hook prerouting priority dstnat;",
                   f"udp dport 9990 dnat ip6 to [{host}]:9991", "}; }")
    try:
        with lab.Server("web", place.container, 81, "udp") as server:
            def arrives(seconds):
                server.arrivals.clear()
                for packet in lab.packet(ip, host, 9990, source_port=81), lab.packet(host, ip, 81, source_port=9991):
                    lab.inject(place.client, "to-lan-client", packet)
                return lab.until(lambda: server.arrivals, seconds)
            yield lambda right: not arrives(lab.patience(not right))
    finally:
        lab.nft_script("delete table inet admin")


@contextlib.contextmanager
def _forged_to_published(place, family):
    """Nobody sends with the container's address to another's published port, which answers the container."""
    host, ip, free = exposed.LAN[family][0], place.ips[family], iter(range(40000, 50000))
    place.call("ADD", place.stranger, {}, [{"hostPort": 7070, "containerPort": 80, "protocol": "udp"}])
    try:
        with lab.Server("stranger", place.stranger, 80, "udp") as stranger:
            def arrives(seconds):
                stranger.arrivals.clear()
                lab.inject(place.client, "to-lan-client", lab.packet(ip, host, 7070, source_port=next(free)))
                return lab.until(lambda: stranger.arrivals, seconds)
            yield lambda right: not arrives(lab.patience(not right))
    finally:
        place.call("DEL", place.stranger, {})


@contextlib.contextmanager
def _neighbour_sees(place, family):
    """A neighbour sees the container's own address, though others see another."""
    ip = place.neighbour.ipv6 if family == 6 else place.neighbour.ipv4
    with lab.Server("neighbour", place.neighbour, 90):
        def sees_it(right):
            saw = lab.exchange(place.container, ip, 90, timeout=lab.patience(right))
            return saw is not None and saw.peer == place.ips[family]
        yield sees_it


@contextlib.contextmanager
def _other_port(place, family):
    """A trusted interface reaches no port that is not published."""
    yield lambda right: not place.reach(WHO[1], TARGETS[4], family, lab.patience(not right))


@contextlib.contextmanager
def _published(place, family):
    """The LAN reaches the published port."""
    yield lambda right: place.reach(WHO[0], TARGETS[0], family, lab.patience(right))


@contextlib.contextmanager
def _neighbour(place, family):
    """A neighbour reaches each port."""
    yield lambda right: place.reach("neighbour", TARGETS[4], family, lab.patience(right))


@contextlib.contextmanager
def _too_big(place, family):
    """A router's word that a segment of an open connection was too big arrives (path MTU discovery)."""
    router = "2001:db8::99" if family == 6 else "192.0.2.99"
    with place.container:
        kind = socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6
        listener = socket.socket(*(kind if family == 6 else (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)))

    def arrives(right):
        listener.settimeout(lab.patience(right))
        with lab.Client(place.client, place.ips[family], 80) as client:
            assert client.ask()
            lab.inject(place.client, "to-lan-client", lab.too_big(router, place.ips[family], exposed.LAN[family][1],
                                                                  (80, client.port)))
            with contextlib.suppress(TimeoutError):
                while True:
                    data = listener.recv(2048)
                    if data[0 if family == 6 else 20] in (2, 3) and struct.pack("!HH", 80, client.port) in data:
                        return True
            return False
    with listener:
        yield arrives


NAT, DIRECT, TRUSTING, ROUTED, ISOLATED, AS_ADDRESS, AS_ITSELF = (MODES[i].keys for i in (1, 2, 3, 4, 6, 7, 8))
BRIDGE, FILTERED, PTP = SETTINGS
MISTAKES = {
    "ct state established first": (BRIDGE, NAT, _old_flow, _with("direct", "ct state established accept")),
    "no ct direction reply": (BRIDGE, NAT, _other_guarded, _without("direct", "replies to the container")),
    "translated after the network": (BRIDGE, AS_ITSELF, _out, _outgoing_comes_later),
    "dropped before connection tracking": (BRIDGE, AS_ITSELF, _out, _raw_prerouting),
    "neighbours of ptp by address alone": (PTP, NAT, _forged_by_the_way_out, _with(
        "direct", "ip daddr . ip saddr @near4 accept", "ip6 daddr . ip6 saddr @near6 accept")),
    "isolated neighbours of ptp by address alone": (PTP, ISOLATED, _forged, _with(
        "isolated", "ip daddr . ip saddr @near4 accept", "ip6 daddr . ip6 saddr @near6 accept")),
    "isolated neighbours by address alone": (BRIDGE, ISOLATED, _forged, _with(
        "isolated", "oifname . ip saddr @home4 accept", "oifname . ip6 saddr @home6 accept")),
    "translated within its own network": (FILTERED, AS_ADDRESS, _neighbour_sees, _without(
        "outgoing", "within its own", "within its own")),
    "trusted for every port": (BRIDGE, TRUSTING, _other_port, _with("direct", 'iifname "to-lan-trusted" accept')),
    "translated packets are direct": (BRIDGE, NAT, _published, _without("exposure", "this host has")),
    "bridged packets come from outside": (FILTERED, NAT, _neighbour, _without(
        "direct", "own network", "own network")),
    "neighbours of ptp come from outside": (PTP, NAT, _neighbour, _without("direct", "from a neigh", "from a neigh")),
    "isolated neighbours of ptp come from outside": (PTP, ISOLATED, _neighbour, _without(
        "isolated", "between neigh", "between neigh")),
    "neighbours of ptp by the way to them": (PTP, NAT, _forged_by_the_way_out, _with(
        "direct", "ip daddr . ip saddr @near4 fib saddr . iif oif exists accept",
        "ip6 daddr . ip6 saddr @near6 fib saddr . iif oif exists accept")),
    "others send as the container": (BRIDGE, NAT, _forged_answer, _without("exposure", "forged", "forged")),
    "others send as the container, untranslated": (BRIDGE, ROUTED, _forged_answer, _without(
        "exposure", "forged", "forged")),
    "others send as the container of ptp": (PTP, NAT, _forged_answer, _without(
        "exposure", "forged", "forged")),
    "others send as the container to published ports": (BRIDGE, NAT, _forged_to_published, _with(
        "exposure", "ct direction original ct status dnat accept")),
    "others answer as this host, translated": (BRIDGE, NAT, _forged_redirected, _with(
        "exposure", "ct status dnat accept")),
    "others answer as this host": (BRIDGE, NAT, _forged_host, _without("direct", "forged")),
    "errors of open connections": (BRIDGE, DIRECT, _too_big, _without("direct", "ICMP errors", "ICMPv6 errors")),
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", sorted(MISTAKES, key=lambda name: SETTINGS.index(MISTAKES[name][0])))
def test_each_rule_is_needed(places, name, family):
    """As it is, the packets do what they should; with the mistake they do not."""
    setting, keys, case, mistake = MISTAKES[name]
    place = places(setting)
    with case(place, family) as is_right, place.having(keys):
        assert is_right(True)
        with lab.restored_policy():
            mistake()
            assert not is_right(False)


# --- beside others --------------------------------------------------------------------------------------------

def test_what_others_translate_is_not_direct(place):
    """An administrator's or kube-proxy's DNAT reaches a port that is not published, but no isolated container."""
    lab.nft_script("table inet admin {", "chain prerouting { type nat hook prerouting priority dstnat;",
                   f"tcp dport 9999 dnat ip to {place.container.ipv4}:81",
                   f"tcp dport 9999 dnat ip6 to [{place.container.ipv6}]:81", "}; }")
    try:
        for keys, reached in (NAT, True), (ROUTED, True), (ISOLATED, False):
            with place.having(keys):
                for family in 4, 6:
                    saw = lab.exchange(place.client, exposed.LAN[family][0], 9999, timeout=lab.patience(reached))
                    assert bool(saw) == reached
    finally:
        lab.nft_script("delete table inet admin")


@pytest.mark.parametrize("priority", ["filter - 10", "filter + 10"])
def test_beside_another_firewall(place, priority):
    """What another firewall accepts stays closed, and what it drops stays dropped, whichever comes first."""
    for policy, rule in ("accept", "accept"), ("drop", "ct state established accept"):
        lab.nft_script("table inet firewall {", "chain forward {",
                       f"type filter hook forward priority {priority}; policy {policy};", rule, "}; }")
        try:
            with place.having(DIRECT):
                for family in 4, 6:
                    accepts = policy == "accept"
                    assert place.reach(WHO[0], HTTP, family, lab.patience(accepts)) == accepts
                    assert not place.reach(WHO[0], TARGETS[4], family, lab.HASTY)
        finally:
            lab.nft_script("delete table inet firewall")


@pytest.mark.parametrize("family", [4, 6])
def test_sctp(place, family):
    """An SCTP INIT straight to the container arrives where its port is open; this needs no SCTP in the kernel."""
    source, ip = exposed.LAN[family][1], place.ips[family]
    with place.container:
        listener = socket.socket(lab.family_of(ip), socket.SOCK_RAW, lab.NUMBERS["sctp"])
    with listener:
        for source_port, keys, arrives in (40000, DIRECT, True), (40001, ROUTED, True), (40002, NAT, False):
            with place.having(keys, [{"hostPort": 3868, "containerPort": 3868, "protocol": "sctp"}]):
                for port in 3869, 3868:  # the one that may arrive is the last
                    lab.inject(place.client, "to-lan-client", lab.packet(source, ip, port, "sctp", source_port))
                listener.settimeout(lab.patience(arrives))
                found = []
                with contextlib.suppress(TimeoutError):
                    while (source, source_port, 3868) not in found:
                        data, address = listener.recvfrom(2048)
                        found.append((address[0], *struct.unpack_from("!HH", data, 20 if family == 4 else 0)))
            assert found == [(source, source_port, 3868)] * arrives


# --- every verb -----------------------------------------------------------------------------------------------

IPS = ("10.20.0.2/24", "fd20::2/64")
KEYS = {mode.name: mode.keys for mode in MODES[1:]} | {"conditions": {**MODES[4].keys, **CONDITIONS}}


def pod(keys, name="web", ips=IPS, **more):
    """A container whose mode these keys say; an isolated one has no ports."""
    ports = () if "isolated" in keys.values() else ("8080:80", "127.0.0.1:8443:82", "53:53/udp")
    return Pod(name, *ports, ips=ips, **keys, **more)


def elements(*, of=""):
    """The elements of exposure's sets, those with this in their comment."""
    return [line for line in lab.state() if re.match(r"element of \w+[46]:", line) and f'"comment": "{of}' in line]


@pytest.fixture
def wired(host, monkeypatch):
    """A host with an interface that leads to the containers' network; calls are forks, since there are thousands."""
    monkeypatch.setattr(host, "call", lab.fork)
    lab.wire("lan", ("10.20.0.1/24", "fd20::1/64"), ("10.20.0.99/24", "fd20::99/64"))
    return host


@pytest.fixture(params=KEYS)
def keys(request):
    return KEYS[request.param]


def test_del_leaves_nothing(wired, keys):
    """Whatever DEL is told: only what all containers share stays; DEL repeated, and GC, leave the same."""
    other = Pod("other", "9090:80", ips=("10.20.0.3/24",), gatewayModeV4="nat")
    wired.add(other)
    before = lab.state()
    web = pod(keys)
    for bare in web, Pod("web"), Pod("web", ips=()):
        wired.add(web)
        assert not wired.call("CHECK", web).code
        wired.delete(bare, bare)
        assert lab.state() == before
    wired.add(web)
    assert not wired.call("GC", GcCall("net", other)).code
    assert lab.state() == before and not wired.call("CHECK", other).code
    wired.delete(other)
    assert not elements()


def test_without_ports(wired, keys):
    """A container that publishes nothing has its policy, and its owner is found."""
    web = pod(keys).but()
    wired.add(web)
    assert lab.chains() == [web.chain] and not wired.call("CHECK", web).code
    lab.nft_script(f"flush chain {TABLE} exposure")
    reply = wired.call("CHECK", web)
    assert reply.code == 104 and "chain exposure" in reply.msg
    wired.delete(Pod("web"))
    assert not lab.chains()


def test_a_vrf_is_refused(wired):
    """What is forwarded comes in on the VRF, whichever of its ports it is from: a policy could not tell them apart."""
    try:
        lab.run("ip", "link", "add", "blue", "type", "vrf", "table", "10")
    except AssertionError:
        pytest.skip("no VRF in this kernel: modprobe vrf")
    lab.run("ip", "link", "set", "to-lan", "master", "blue")
    reply = wired.call("ADD", pod(MODES[1].keys, link="to-lan"))
    assert reply.code == 7 and "VRF" in reply.msg and not lab.chains()
    wired.add(pod({}, link="to-lan"))


def test_changed_modes(wired, keys):
    """ADD again with other keys leaves what a first ADD with them leaves; with none, nothing of the policy."""
    for after in KEYS.values():
        wired.add(pod(after))
        fresh = lab.state()
        wired.delete(pod({}))
        wired.add(pod(keys), pod(after))
        assert lab.state() == fresh
        wired.delete(pod({}))
    wired.add(pod(keys), pod({}))
    assert not elements() and not wired.call("CHECK", pod({})).code


def test_a_reused_address(wired, keys):
    """The policy follows the address: the next container has its own or none, and the last one's DEL spares it."""
    for its in {}, MODES[1].keys:
        wired.add(pod(keys))
        heir = Pod("heir", "7070:80", ips=IPS, **its)
        wired.add(heir)
        assert not wired.call("CHECK", heir).code
        assert wired.call("CHECK", pod(keys)).code == 104
        assert not elements(of="c/web/") and bool(elements(of="c/heir/")) == bool(its)
        whole = [line for line in lab.state() if "heir" in line]
        wired.delete(pod(keys))
        assert whole == [line for line in lab.state() if "heir" in line]
        wired.delete(heir)
    wired.add(pod(keys))
    lab.nft_script(f"flush chain {TABLE} {pod(keys).chain}")  # and with it the record
    wired.delete(Pod("web"))
    assert not elements() and not lab.chains()


def test_check_sees_each_missing_element(wired, keys):
    """An element that is gone, or another's, is code 104, and its set is named; ADD repairs it."""
    web = pod(keys)
    wired.add(Pod("other", "9090:80", ips=("10.20.0.3/24",), gatewayModeV4="nat"), web)
    whole = lab.state()
    found = [(entry[kind]["name"], kind, each) for entry in lab.listing() for kind in ("set", "map") if kind in entry
             for each in entry[kind].get("elem", ()) if "c/web/eth0" in str(each) and "comment" in str(each)]
    assert len(found) >= 4
    for name, kind, each in found:
        key, value = each if kind == "map" else (each, None)
        text, jump = _text(key["elem"]["val"]), f" : {_text(value)}" if value else ""
        lab.nft_script(f"delete element {TABLE} {name} {{ {text} }}")
        reply = wired.call("CHECK", web)
        assert reply.code == 104 and name in reply.msg, reply
        lab.nft_script(f'add element {TABLE} {name} {{ {text} comment "c/other/eth0"{jump} }}')
        reply = wired.call("CHECK", web)
        assert reply.code == 104 and name in reply.msg, reply
        wired.add(web)
        assert not wired.call("CHECK", web).code and lab.state() == whole


def _text(value):
    """nft's text for a value of its JSON."""
    if isinstance(value, dict) and "concat" in value:
        return " . ".join(map(_text, value["concat"]))
    if isinstance(value, dict) and "range" in value:
        return "-".join(map(_text, value["range"]))
    if isinstance(value, dict) and "prefix" in value:
        return f"{value['prefix']['addr']}/{value['prefix']['len']}"
    if isinstance(value, dict):
        (verdict, its), = value.items()
        return f"{verdict} {its['target']}"
    return f'"{value}"' if re.match("to-|not-", str(value)) else str(value)


@pytest.mark.parametrize("element", ["open4 { 10.20.0.2 . tcp . 81 }", "ping4 { 10.20.0.2 }",
                                     'trusted4 { "eth9" . 10.20.0.2 . tcp . 81 }', 'home4 { "eth9" . 10.20.0.2 }'])
def test_check_sees_what_others_have_opened(wired, element):
    """An element for the container's address that is not of its policy is code 104; ADD removes it."""
    web = pod(MODES[1].keys)
    wired.add(web)
    lab.nft_script(f"add element {TABLE} {element}")
    reply = wired.call("CHECK", web)
    assert reply.code == 104 and element.split()[0] in reply.msg
    wired.add(web)
    assert not wired.call("CHECK", web).code


def _handles(chain):
    return re.findall(r" # handle (\d+)", lab.nft("-a", "list", "chain", *TABLE.split(), chain))[1:]


@pytest.mark.parametrize("chain", ["direct", "isolated", "exposure", "outgoing", "x/web/eth0"])
def test_check_sees_each_rule(wired, chain):
    """Each rule of the chains, missing or behind one of others, is code 104; ADD repairs it."""
    web = pod(KEYS["conditions"])
    wired.add(web)
    whole = lab.state()
    for index in range(len(_handles(chain))):
        lab.nft_script(f"delete rule {TABLE} {chain} handle {_handles(chain)[index]}")
        reply = wired.call("CHECK", web)
        assert reply.code == 104 and f"chain {chain}" in reply.msg
        wired.add(web)
        assert lab.state() == whole
    lab.nft_script(f"insert rule {TABLE} {chain} accept")
    reply = wired.call("CHECK", web)
    assert reply.code == 104 and "foreign" in reply.msg


def test_flush_and_restore(wired, tmp_path, keys):
    """After a flush CHECK says so, without ports too, and `restore` brings the identical ruleset back."""
    cache = Cache(tmp_path)
    pods = [pod(keys), pod(keys, name="empty", ips=("10.20.0.4/24", "fd20::4/64")).but()]
    wired.add(*pods)
    for each in pods:
        cache.write(each)
    before = lab.state()
    lab.nft_script("flush ruleset")
    assert {wired.call("CHECK", each).code for each in pods} == {104}
    assert len(cache.restore(wired)["restored"]) == 2
    assert lab.state() == before
    assert {wired.call("CHECK", each).code for each in pods} == {0}
    again = cache.restore(wired)
    assert not again["restored"] and again["in_place"] == 2
    name = re.match(r"element of (\w+):", elements(of="c/empty/")[0])[1]
    lab.nft_script(f"flush {'map' if name.startswith(('outgoing', 'conditional')) else 'set'} {TABLE} {name}")
    assert cache.restore(wired)["restored"]
    assert lab.state() == before


def test_many_ports_and_a_long_name(wired):
    """1,000 ports that are open, for a container whose name no comment holds: all of them come and go."""
    name = "a" * 200
    long = Pod(name, *(f"{2 * i + 1}:{2 * i + 1}" for i in range(1000)), ips=IPS, gatewayModeV4="routed")
    for _ in range(2):
        wired.add(long)
        assert sum("element of open4" in line for line in lab.state()) == 1000
        assert not wired.call("CHECK", long).code
    wired.delete(Pod(name))
    assert not elements() and json.loads(wired.command("list", "--json")) == []


# --- the command ------------------------------------------------------------------------------------------------

def test_list(wired, keys):
    """`list --exposure` has what the keys say, for each family with a policy; and says where some of it is missing."""
    wired.add(pod(keys), Pod("plain", "9090:90", ips=("10.20.0.5/24",)))
    lines = json.loads(wired.command("list", "--exposure", "--json"))
    modes = {family: keys.get(f"gatewayModeV{family}", "nat-unprotected") for family in (4, 6)}
    assert {line["family"]: line["mode"] for line in lines} == modes
    for line in lines:
        family, mode = line["family"], line["mode"]
        opened = ["53/udp", "80/tcp"] if mode == "routed" or "allowDirectRouting" in keys else []
        trusted = keys.get("trustedHostInterfaces", [])
        assert (line["open"], line["interfaces"]) == (opened, trusted)
        assert line["trusted"] == (["53/udp", "80/tcp"] + ["82/tcp"] * (family == 4) if trusted else [])
        assert line["outgoing"] == keys.get(f"outgoingSourceV{family}", "container" if mode == "routed" else "")
        assert (line["addresses"], line["complete"], line["container_id"], line["network"], line["conditions"]) == \
            ([IPS[family == 6].partition("/")[0]], True, "web", "net", "conditionsV4" in keys)
    assert len(wired.command("list", "--exposure").splitlines()) == 3
    lab.nft_script(f"flush chain {TABLE} outgoing")
    assert {line["complete"] for line in json.loads(wired.command("list", "--exposure", "--json"))} == {False}
    wired.command("list", "--exposure", "--port", 81, status=1)
    assert json.loads(wired.command("list", "--exposure", "--json", "--container", "plain")) == []


def test_list_is_as_shown(wired):
    """The list in docs/exposure.md is what the command prints."""
    lab.add_veth("veth5c1e09d2", "peer")
    wired.add(Pod("6f1c0a2b9d3e", "8080:80", ips=("10.88.0.2/16", "fd88::2/64"), network="web", link="veth5c1e09d2",
                  args="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-7d9f", gatewayModeV4="nat", gatewayModeV6="routed"))
    shown = textwrap.indent(f"# cni-portmap list --exposure\n{wired.command('list', '--exposure')}", "    ")
    assert shown in (lab.ROOT / "docs/exposure.md").read_text(), shown


# --- the agent --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("deletion", ["flush ruleset", f"flush set {TABLE} guarded4", f"flush chain {TABLE} direct",
                                      f"flush map {TABLE} conditional4", f"delete chain {TABLE} exposure"])
def test_the_agent_brings_it_back(wired, deletion):
    """While the agent runs, a policy that somebody deletes is there again at once, whole."""
    web = pod(KEYS["conditions"])
    wired.add(web)
    before = lab.state()
    with Agent(wired.cli):
        lab.nft_script(deletion)
        assert lab.until(lambda: lab.state() == before), deletion
    assert not wired.call("CHECK", web).code
