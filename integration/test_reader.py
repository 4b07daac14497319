"""The reader of everybody's rules says what the kernel does: rulesets at random, with real connections.

`integration/measure/rules.py` tries thousands. A difference that it finds becomes a case of `test_found_before`.
"""
import pathlib

import lab
from lab import firewalls
import pytest

SEEDS = 20  # a test


@pytest.fixture(scope="module")
def three(private_host):
    """Client, host and container."""
    with firewalls.Lab() as there:
        yield there


@pytest.mark.parametrize("first", range(0, 100, SEEDS))
@pytest.mark.parametrize("kind", firewalls.KINDS)
def test_verdicts_are_the_kernels(three, kind, first):
    """Lost or not, and who answers, for a client on the LAN and for the host itself; with no MAYBE."""
    found = [result for seed in range(first, first + SEEDS) for result in three.try_one(kind, seed)]
    assert [result for result in found if result is not True] == []
    assert len(found) == 2 * SEEDS


FOUND = {
    "a chain behind nat in the same hook sees the container's port": (
        4, "client", "web", "table ip x { chain c { type filter hook prerouting priority -50; "
        "tcp dport 8080 drop; }; }"),
    "what follows the answer has no SYN": (
        6, "host", "", "table ip6 x { chain c { type filter hook prerouting priority -150; meta l4proto tcp "
        "ct direction reply tcp flags & (syn|ack) == ack drop; }; }"),
    "a goto that falls through ends in the policy": (
        4, "client", "", "table ip x { chain u { counter; }; chain c { type filter hook forward priority 0; "
        "policy drop; goto u; accept; }; }"),
    "ahead of conntrack every packet is invalid": (
        4, "client", "", "table ip x { chain c { type filter hook prerouting priority -250; "
        "ct state invalid drop; }; }"),
    "ahead of conntrack there is no direction": (
        4, "client", "web", "table ip x { chain c { type filter hook prerouting priority -250; "
        "ct direction original drop; }; }"),
    "the client's second packet is established": (
        4, "client", "", "table ip x { chain c { type filter hook forward priority 0; ct state established "
        "ct direction original drop; }; }"),
    "a nat chain of a lower priority is asked first": (
        4, "client", "other", "table ip x { chain c { type nat hook prerouting priority -101; tcp dport 8080 "
        "dnat to 10.88.0.3:80; }; }"),
    "a packet that is not tracked is not translated": (
        4, "client", "host", "table ip x { chain c { type filter hook prerouting priority -300; tcp dport 8080 "
        "notrack; }; }"),
    "a dormant table has no hooks": (
        4, "client", "web", "table ip x { flags dormant; chain c { type filter hook forward priority 0; "
        "policy drop; }; }"),
    "the destination of the original packet is the host's": (
        4, "client", "", "table ip x { chain c { type filter hook forward priority 0; "
        "ct original ip daddr 203.0.113.1 drop; }; }"),
    "a connection of IPv4 has no address of IPv6": (
        4, "client", "", "table inet x { set s { typeof ip6 daddr; }; chain c { type filter hook forward priority 0; "
        "ct original ip6 daddr != @s accept; drop; }; }"),
    "an answer that is not tracked is not translated back": (
        4, "client", "", "table ip x { chain c { type filter hook prerouting priority -300; tcp sport 80 "
        "notrack; }; }"),
    "the input hook sees the answer from the published address": (
        4, "host", "", "table ip x { chain c { type filter hook input priority 150; ip saddr 203.0.113.1 "
        "tcp sport 8080 drop; }; }"),
    "a later packet changes the connection's mark": (
        4, "host", "", "table ip x { chain o { type filter hook output priority 0; tcp flags & (syn|ack) == ack "
        "ct mark set 1; }; chain i { type filter hook input priority 0; ct mark 1 drop; }; }"),
    "of one priority the last one is first": (
        4, "client", "other", "table ip x { chain c { type nat hook prerouting priority -100; tcp dport 8080 "
        "dnat to 10.88.0.3:80; }; }"),
    "of IPv6 this host's own addresses are unicast too": (
        6, "host", "", "*filter\n-A OUTPUT -p tcp -m addrtype --src-type UNICAST -j DROP\nCOMMIT\n"),
    "a name with a wildcard in a set": (
        4, "client", "", "table ip x { set s { typeof iifname; flags interval; elements = { \"lan*\" }; }; "
        "chain c { type filter hook forward priority 0; iifname @s drop; }; }"),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_before(three, name):
    """What the reader, or its prototype, once had wrong."""
    family, path, server, rules = FOUND[name]
    three.clear()
    firewalls.load("nft" if rules.startswith("table") else "iptables-nft", family, rules)
    rulesets, host = firewalls.Rulesets(), firewalls.Host()
    journey = three.journey(rulesets, host, family, path)
    rulesets.close()
    host.close()
    assert three.server_of(journey, family) == server
    assert three.connect(family, path, server) == server


def test_reading_changes_nothing(three):
    """No table of iptables-legacy appears because it was asked for; the ruleset's generation stays."""
    three.clear()
    names = pathlib.Path("/proc/net/ip_tables_names").read_text()
    generation = lab.generation()
    firewalls.Rulesets().close()
    assert pathlib.Path("/proc/net/ip_tables_names").read_text() == names
    assert lab.generation() == generation
    with lab.fresh_host():
        firewalls.Rulesets().close()
        assert pathlib.Path("/proc/net/ip_tables_names").read_text() == ""


PORTS = ((8080, 8080),)
CLAIMS = {
    "iptables-legacy": ("iptables-legacy-restore -n", """*nat
:CNI-DN-1 - [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 8080,9000:9010 -j CNI-DN-1
-A CNI-DN-1 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.88.0.2:80
COMMIT
""", [(4, 6, "", PORTS, "10.88.0.2", 80, "the reference plugin portmap")]),
    "iptables-nft": ("iptables-nft-restore -n", """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER ! -i docker0 -p udp -m udp -d 192.0.2.1 --dport 8080 -j DNAT --to-destination 172.17.0.2:53
COMMIT
""", [(4, 17, "192.0.2.1", PORTS, "172.17.0.2", 53, "Docker")]),
    "ip6tables-legacy": ("ip6tables-legacy-restore -n", """*nat
-A PREROUTING -p tcp -m tcp --dport 1:5 -j DNAT --to-destination [fd88::2]:80
COMMIT
""", [(6, 6, "", ((1, 5),), "fd88::2", 80, "iptables-legacy")]),
    "a verdict map": ("nft -f -", """table ip kube-proxy {
map services { typeof ip daddr . meta l4proto . th dport : verdict; elements = { 10.96.0.1 . tcp . 8080 : goto svc }; }
chain svc { meta l4proto tcp dnat to 10.1.1.1:80; }
chain pre { type nat hook prerouting priority -100; ip daddr . meta l4proto . th dport vmap @services; }
}
""", [(4, 6, "10.96.0.1", PORTS, "10.1.1.1", 80, "kube-proxy")]),
    "sets and ranges": ("nft -f -", """table inet x {
set ports { typeof tcp dport; flags interval; elements = { 1-5, 7 }; }
chain pre { type nat hook prerouting priority -100
  meta nfproto ipv4 tcp dport @ports dnat ip to 10.2.2.2
  ip6 daddr 2001:db8::1 udp dport { 10, 12 } redirect to :100
}
}
""", [(4, 6, "", ((1, 5), (7, 7)), "10.2.2.2", None, ""), (6, 17, "2001:db8::1", ((10, 10), (12, 12)), "", 100, "")]),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_of_others(three, name):
    """Who else publishes which ports is read from the rules of each kind."""
    from socket import AF_INET, AF_INET6, inet_ntop

    from cni_portmap.firewall.claims import claims, publisher
    command, rules, expected = CLAIMS[name]

    def text(ip):
        return inet_ntop(AF_INET if len(ip) == 4 else AF_INET6, ip) if ip else ""
    with lab.fresh_host():
        lab.run(*command.split(), input=rules)
        rulesets = firewalls.Rulesets()
        found = claims(rulesets)
        rulesets.close()
    assert [(each.family, each.protocol, text(each.daddr), each.ports, text(each.target), each.port,
             publisher(each.chain)) for each in found] == expected
