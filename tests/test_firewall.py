"""The reader of rules where not everything is known: what is certain, what may be. With real packets: test_reader."""
from types import SimpleNamespace

from cni_portmap.firewall.expressions import bounds, equal
from cni_portmap.firewall.journey import FIRST, Traveller
from cni_portmap.firewall.packet import MAYBE, NO, YES, Packet
from cni_portmap.firewall.walk import Walker
from cni_portmap.linux.host import Link, Route
from cni_portmap.linux.netlink import attribute, nested
from cni_portmap.linux.rulesets import NFT, Chain, Element, Rule, Set
import pytest

LAN, CONTAINER, CLIENT = b"\xcb\0\x71\1", b"\x0a\x58\0\2", b"\xcb\0\x71\2"
VERDICTS = {"drop": 0, "accept": 1, "jump": -3, "goto": -4, "return": -5}


def number(value, size=4):
    return value.to_bytes(size, "big", signed=value < 0)


def verdict(word):
    """An immediate verdict: "drop", "jump user"."""
    name, _, chain = word.partition(" ")
    inner = attribute(1, number(VERDICTS[name])) + (attribute(2, chain.encode() + b"\0") if chain else b"")
    return "immediate", {1: number(0), 2: nested(2, inner)}


def load(base, offset, size):
    return "payload", {1: number(1), 2: number(base), 3: number(offset), 4: number(size)}


def compare(value, operator=0):
    return "cmp", {1: number(1), 2: number(operator), 3: attribute(1, value)}


def source(address, *rest):
    """A rule for one client."""
    return [load(1, 12, 4), compare(address), *rest]


def dport(port, *rest):
    return [load(2, 2, 2), compare(number(port, 2)), *rest]


def mark(value):
    return [("immediate", {1: number(1), 2: attribute(1, value.to_bytes(4, "little"))}),
            ("meta", {2: number(3), 3: number(1)})]


def marked(value, *rest):
    return [("meta", {1: number(1), 2: number(3)}), compare(value.to_bytes(4, "little")), *rest]


DNAT = [("immediate", {1: number(1), 2: attribute(1, CONTAINER)}),
        ("immediate", {1: number(2), 2: attribute(1, b"\0P")}),
        ("nat", {1: number(1), 2: number(2), 3: number(1), 5: number(2)})]


def chain(*rules, name="c", hook="", priority=0, policy="accept", kind="filter"):
    return Chain(NFT, "ip", "t", name, hook, priority, kind, policy, (),
                 [Rule(index, "", rule) for index, rule in enumerate(rules, 1)])


class Host:
    """A host with lan0 and cni0."""

    addresses = ()

    def link(self, name):
        return Link(1, name)

    def type_of(self, family, ip, link=""):
        return 2 if ip == LAN else 1

    def route_to(self, family, ip, mark=0):
        return self.route(family, ip).link

    def route(self, family, ip, mark=0):
        return Route(1, "cni0" if ip == CONTAINER else "lan0")

    def address_of(self, link, family):
        return LAN


def journey(*chains, source=None, sets=()):
    """A connection to LAN:8080 from a client that is not known, unless `source` says who."""
    every = [chain(dport(8080, *DNAT), name="pre", hook="prerouting", priority=-100, kind="nat"), *chains]
    rulesets = SimpleNamespace(
        chains=every, chain=lambda beside, name: next((its for its in every if its.name == name), None),
        set_of=lambda beside, name: dict(sets)[name])
    return Traveller(Walker(rulesets, Host()), Host()).travel(Packet(4, 6, source, LAN, 8080, iif="lan0"))


def lost(*chains, **more):
    """Whether the first packet of that connection is lost in the forward hook."""
    return next(leg.passage.lost for leg in journey(*chains, **more).legs if leg.hook == "forward")


def forward(*rules, policy="accept"):
    return chain(*rules, name="fwd", hook="forward", policy=policy)


DROP, ACCEPT = [verdict("drop")], [verdict("accept")]
CASES = {
    "a drop for everybody": ([forward(DROP)], YES),
    "a policy": ([forward(policy="drop")], YES),
    "a drop for one client": ([forward(source(CLIENT, verdict("drop")))], MAYBE),
    "a drop of localhost's addresses": ([forward(source(b"\x7f\0\0\1", verdict("drop")))], NO),
    "all but one client": ([forward(source(CLIENT, verdict("accept")), DROP)], MAYBE),
    "a drop after a drop for one client": ([forward(source(CLIENT, verdict("drop")), DROP)], YES),
    "a jump for one client that ends in a drop": (
        [forward(source(CLIENT, verdict("jump user")), ACCEPT), chain(DROP, name="user")], MAYBE),
    "a jump for one client that returns": (
        [forward(source(CLIENT, verdict("jump user")), DROP), chain([verdict("return")], name="user")], YES),
    "a goto for one client that falls through to the policy": (
        [forward(source(CLIENT, verdict("goto user")), DROP), chain(name="user")], MAYBE),
    "a goto that falls through to the policy": (
        [forward([verdict("goto user")], ACCEPT, policy="drop"), chain(name="user")], YES),
    "a drop behind a return for one client": (
        [forward([verdict("jump user")], ACCEPT), chain(source(CLIENT, verdict("return")), DROP, name="user")], MAYBE),
    "two chains, the second drops all": ([forward(ACCEPT), forward(DROP)], YES),
    "a mark that is certain": ([forward(mark(1), marked(1, verdict("drop")))], YES),
    "a mark for one client": ([forward(source(CLIENT, *mark(1)), marked(1, verdict("drop")))], MAYBE),
    "an expression that nobody knows": ([forward([("xyzzy", {}), verdict("drop")])], MAYBE),
    "the container's port": ([forward(dport(80, verdict("drop")))], YES),
    "the host's port, behind translation": ([forward(dport(8080, verdict("drop")))], NO),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_certain(name):
    """The first packet of anybody's connection is lost, is not lost, or may be."""
    chains, expected = CASES[name]
    assert lost(*chains) == expected


def test_the_answer_is_another_packet():
    """A rule that lets one client in does not let the container's answer out."""
    only = forward(source(CLIENT, verdict("accept")), DROP)
    assert lost(only) == MAYBE
    assert journey(only).lost == YES


def test_a_known_client():
    """Where the client is known, the rules for one client are certain."""
    rules = source(CLIENT, verdict("drop"))
    assert lost(forward(rules), source=CLIENT) == YES
    assert lost(forward(rules), source=b"\xcb\0\x71\3") == NO


def test_who_drops_it():
    """A loss names the packet, the hook, the chain and the rule."""
    user = chain(dport(80, verdict("drop")), name="user")
    leg, = journey(forward([verdict("jump user")]), user).where
    end, = leg.passage.losses
    assert (leg.which, leg.hook, end.base.name, end.chain.name, end.rule, end.sure) == \
        (FIRST, "forward", "fwd", "user", user.rules[0], True)


def lookup(name, *rest):
    return [("lookup", {1: name, 2: number(1)}), *rest]


@pytest.mark.parametrize("elements, expected", [
    ([(0, False), (100, True)], YES), ([(0, False), (80, True)], NO), ([(80, False), (81, True)], YES),
    ([(81, False)], NO), ([(0, False)], YES), ([], NO),
    ([(10, False), (80, True), (80, False), (90, True)], YES)])
def test_intervals(elements, expected):
    """Of a set of ranges: each begins, and ends before its end."""
    ports = Set(True, (), [Element(number(port, 2), None, end, b"", None) for port, end in elements])
    rule = [load(2, 2, 2), *lookup(b"s\0", verdict("drop"))]
    assert lost(forward(rule), sets=[(b"s\0", ports)]) == expected


def test_a_set_of_clients():
    """A set that may have the client, one that is empty, and the catch-all."""
    def with_keys(*keys):
        clients = Set(False, (), [Element(key, None, False, b"", None) for key in keys])
        return lost(forward([load(1, 12, 4), *lookup(b"s\0", verdict("drop"))]), sets=[(b"s\0", clients)])
    assert [with_keys(CLIENT), with_keys(), with_keys(None)] == [MAYBE, NO, YES]


def test_a_masked_byte_is_known():
    """What a mask takes away needs not be known; of the rest, the known bytes decide."""
    assert equal([1, None], b"\2\0") == NO
    assert equal([1, None], b"\1\0") == MAYBE
    assert bounds([1, None]) == (b"\1\0", b"\1\xff")
    rule = [load(0, 0, 6), ("bitwise", {1: number(1), 2: number(1), 3: number(6), 4: attribute(1, bytes(6)),
                                        5: attribute(1, bytes(6))}), compare(bytes(6)), verdict("drop")]
    assert lost(forward(rule)) == YES
