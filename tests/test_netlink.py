"""Netlink messages as bytes: what is asked, and that whatever answers come are read, refused, or left alone."""
import contextlib
import itertools
import socket
import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from cni_portmap import ruleset
from cni_portmap.cni import CniError
from cni_portmap.linux import batch, conntrack, expressions, netlink, table
from cni_portmap.linux.kernel import Kernel
from cni_portmap.linux.netlink import attribute, attributes, nested

EPERM, ENOENT, ESRCH, EINTR, EBUSY, EEXIST, EINVAL = 1, 2, 3, 4, 16, 17, 22
ERROR, DONE, MULTI, INTERRUPTED = 2, 3, 2, 0x10


LAST = 0xffffffff  # a sequence number: an answer to the last question


def message(kind, body=b"", flags=0, sequence=LAST):
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def error(code, sequence=LAST):
    return message(ERROR, struct.pack("=i", -code), sequence=sequence)


DONE_MESSAGE = message(DONE, bytes(4))


class Wire:
    """A socket whose other end is a list of datagrams; `sent` are the messages, as (kind, flags, body).

    `datagrams_sent`: in how many. `options`: those that were set; `denied`: those that are refused.
    """

    def __init__(self, datagrams):
        self.datagrams, self.sent, self.datagrams_sent = list(datagrams), [], 0
        self.options, self.denied = {}, set()

    def setsockopt(self, _, option, value):
        if option in self.denied:
            raise PermissionError(EPERM, "")
        self.options[option] = value

    def __call__(self, *_):
        return self

    def close(self):
        self.datagrams = []

    def send(self, data):
        self.datagrams_sent += 1
        while data:
            length, kind, flags, _, _ = struct.unpack_from("=IHHII", data)
            self.sent.append((kind, flags, data[16:length]))
            data = data[length + 3 & ~3:]

    def recv(self, _):
        if not self.datagrams:
            raise OSError(11, "nothing more comes")
        return self.datagrams.pop(0)


@pytest.fixture
def wire(monkeypatch):
    """Make netlink's sockets talk to these datagrams."""
    def connect(*datagrams):
        found = Wire(datagrams)
        monkeypatch.setattr(netlink, "socket", found)
        return found
    return connect


def name(kind, text):
    return attribute(kind, text.encode() + b"\0")


def element(key, chain):
    """A map element as the kernel lists it: its key, and its verdict."""
    verdict = nested(2, attribute(1, struct.pack(">i", -4)), *([name(2, chain)] if chain else []))
    return nested(1, nested(1, attribute(1, key)), nested(2, verdict))


def rule(chain, userdata=b"", expressions=b""):
    return bytes(4) + name(1, "cni_portmap") + name(2, chain) + nested(4, expressions) + attribute(7, userdata)


# --- attributes -----------------------------------------------------------------------------------------------

ATTRIBUTES = st.lists(st.tuples(st.integers(0, 0x3fff), st.binary(max_size=20)), max_size=8)


@hypothesis.given(ATTRIBUTES)
def test_attributes_round_trip(found):
    """Attributes that are written are read back."""
    assert [*attributes(b"".join(attribute(*each) for each in found))] == found
    [(kind, inner)] = attributes(nested(5, *(attribute(*each) for each in found)))
    assert kind == 5 and [*attributes(inner)] == found


@hypothesis.given(st.binary(max_size=100), st.integers(0, 20))
def test_attributes_of_anything(data, at):
    """Any bytes end, in pieces of them."""
    for kind, payload in attributes(data, at):
        assert 0 <= kind <= 0x3fff and payload in data


@hypothesis.given(st.binary(max_size=60))
def test_comment_of_anything(data):
    """Any user data has a comment, or none."""
    assert type(table.comment_in(data)) is str


@pytest.mark.parametrize("userdata, comment", [
    (b"", ""), (b"\0\x04abc\0", "abc"), (b"\x01\x02xy\0\x04abc\0", "abc"), (b"\0\x04abc\0\0\x02d\0", "abc"),
    (b"\0\x7fabc", "abc"), (b"\0", ""), (b"\0\0", ""), (b"\0\x01\0", ""), (b"\0\x03\xff\xfe\0", "\ufffd\ufffd"),
    (b"\x05\xff", "")])
def test_comment(userdata, comment):
    """libnftnl's type, length, value; the first comment counts, and what is cut short ends where it ends."""
    assert table.comment_in(userdata) == comment


# --- questions and answers ------------------------------------------------------------------------------------

def test_ask(wire):
    """One question, its answers, and the kernel's acknowledgement."""
    there = wire(message(26, b"abcd"), error(0))
    assert netlink.Socket(0).ask(26, b"body") == [b"abcd"]
    assert there.sent == [(26, 0x5, b"body")]  # NLM_F_REQUEST | NLM_F_ACK


@pytest.mark.parametrize("code", [EPERM, ENOENT, EINVAL, 105])
@pytest.mark.parametrize("ask", [lambda found: found.ask(1, b""), lambda found: found.dump(1, b"")])
def test_errors(wire, ask, code):
    """A refusal is an OSError with the kernel's number."""
    wire(message(1, b"abcd") + error(code))
    with pytest.raises(OSError, match="netlink") as caught:
        ask(netlink.Socket(0))
    assert caught.value.errno == code


def test_answers_to_an_earlier_question(wire):
    """Late answers to a question that ended with an error are not taken for answers to the next."""
    wire(error(EPERM, 1) + message(1, b"late", sequence=2), message(1, b"more", sequence=3) + error(0, 3),
         message(1, b"aaaa", sequence=4), message(1, b"bbbb", sequence=5))
    found = netlink.Socket(0)
    with pytest.raises(PermissionError):
        found.ask_each(1, [b"", b"", b""])
    assert found.ask_each(1, [b"", b""]) == [b"aaaa", b"bbbb"]
    wire(message(1, b"aaaa", MULTI) + error(EPERM), message(1, b"late", MULTI, 1), message(1, b"bbbb", MULTI, 2) +
         message(DONE, bytes(4), sequence=2))
    found = netlink.Socket(0)
    with pytest.raises(PermissionError):
        found.dump(1, b"")
    assert found.dump(1, b"") == [b"bbbb"]


def test_dump(wire):
    """A dump comes in many datagrams, and ends with one that says so; an error in it counts."""
    there = wire(message(1, b"aaaa", MULTI) + message(1, b"bb", MULTI), message(1, b"cccc", MULTI), DONE_MESSAGE)
    assert netlink.Socket(0).dump(1, b"") == [b"aaaa", b"bb", b"cccc"] and there.sent == [(1, 0x301, b"")]
    wire(message(1, b"aaaa", MULTI), message(DONE, struct.pack("=i", -EPERM)))
    with pytest.raises(PermissionError):
        netlink.Socket(0).dump(1, b"")


def test_dump_interrupted(wire):
    """A dump that somebody changed in between is asked for again, and not for ever."""
    changed = message(1, b"aaaa", MULTI | INTERRUPTED) + DONE_MESSAGE
    there = wire(changed, changed, message(1, b"bbbb", MULTI) + DONE_MESSAGE)
    assert netlink.Socket(0).dump(1, b"") == [b"bbbb"] and len(there.sent) == 3
    wire(*[changed] * 1000)
    with pytest.raises(InterruptedError):
        netlink.Socket(0).dump(1, b"")


def test_ask_each(wire):
    """Questions go in batches that the socket's buffer holds; who is not there is None."""
    bodies = [bytes([number]) for number in range(150)]
    answers = [error(ENOENT) if number % 3 else message(1, bytes([number])) for number in range(150)]
    there = wire(b"".join(answers[:64]), b"".join(answers[64:100]), b"".join(answers[100:128]), *answers[128:])
    assert netlink.Socket(0).ask_each(1, bodies) == [None if number % 3 else bytes([number]) for number in range(150)]
    assert [body for _, _, body in there.sent] == bodies
    wire(error(0), error(EPERM))
    with pytest.raises(PermissionError):
        netlink.Socket(0).ask_each(1, bodies[:2], 4)


@hypothesis.example(bytes(16))  # a length of nothing
@hypothesis.example(b"\x04" + bytes(40))
@hypothesis.given(st.binary(max_size=80))
def test_any_datagram(data):
    """Any datagram ends, in messages of its bytes or an OSError."""
    found = netlink.Socket.__new__(netlink.Socket)
    found._socket, found._sequence = Wire([data]), 0
    with contextlib.suppress(OSError):
        assert len([*itertools.islice(found.receive(0), 100)]) <= len(data)


@pytest.mark.parametrize("datagram", [
    b"", b"\x10" * 15, message(ERROR), message(ERROR, b"\1"), message(DONE), message(DONE, b"\1\2"),
    b"\x30" + message(1, b"abcd")[1:], message(1)])
@pytest.mark.parametrize("ask", [lambda found: found.ask(1, b""), lambda found: found.dump(1, b""),
                                 lambda found: found.ask_each(1, [b"", b""])])
def test_odd_answer(wire, ask, datagram):
    """An answer that is cut short is an answer, or an OSError."""
    wire(datagram)
    with contextlib.suppress(OSError):
        assert type(ask(netlink.Socket(0))) is list


# --- nf_tables ------------------------------------------------------------------------------------------------

KEY = bytes((2, 0, 0, 0, 6, 0, 0, 0, 0x1f, 0x90, 0, 0))
OTHER = bytes((10, 0, 0, 0, 6, 0, 0, 0, 0x1f, 0x90, 0, 0))


@pytest.mark.parametrize("answer, flags", [
    (error(ENOENT), None), (message(1, bytes(4) + attribute(2, b"\0\0\0\1")), 1),
    (message(1, bytes(4) + attribute(2, bytes(4))), 0), (message(1, bytes(4)), 0)])
def test_table_flags(wire, answer, flags):
    """A table's flags; None without a table."""
    there = wire(answer)
    assert table.Table()._flags() == flags
    assert there.sent == [(0xa01, 1, b"\1\0\0\0" + name(1, "cni_portmap"))]


def test_chain(wire):
    """A chain's attributes; None without a chain."""
    there = wire(message(1, bytes(4) + name(3, "output") + attribute(7, b"nat\0")))
    assert table.Table("t")._chain("output") == {3: b"output\0", 7: b"nat\0"}
    assert there.sent == [(0xa04, 1, b"\1\0\0\0" + name(1, "t") + name(3, "output"))]
    wire(error(ENOENT))
    assert table.Table("t")._chain("output") is None


def test_rules(wire):
    """Rules with their chain, comment and expressions; of one chain, or of all."""
    first, second = (message(6, rule(*fields), MULTI)
                     for fields in (("guard", b"\0\x02x\0"), ("c/b/eth0", b"", b"raw!")))
    there = wire(first + second + DONE_MESSAGE, DONE_MESSAGE)
    tables = table.Table("t")
    assert tables.rules() == [("guard", "x", b"", 0), ("c/b/eth0", "", b"raw!", 0)]
    assert tables.rules("c") == []
    named = b"\1\0\0\0" + name(1, "t")
    assert [body for _, _, body in there.sent] == [named, named + name(2, "c")]


def test_lookup(wire):
    """Each element that exists, with its chain; "" for a verdict that leads to none."""
    wanted = [("hostports", KEY), ("hostports", OTHER), ("hostip4_hostports", KEY)]
    found = [message(1, bytes(4) + nested(3, element(KEY, chain))) for chain in ("c/a/eth0", "")]
    there = wire(found[0] + error(ENOENT) + found[1])
    assert table.Table("t").lookup(wanted) == {wanted[0]: "c/a/eth0", wanted[2]: ""}
    key = nested(3, nested(1, nested(1, attribute(1, KEY))))
    assert there.sent[0] == (0xa0d, 1, b"\1\0\0\0" + name(1, "t") + name(2, "hostports") + key)


def test_elements(wire):
    """All elements of a map, in as many messages as they come; none without the map."""
    parts = [message(1, bytes(4) + name(1, "t") + nested(3, element(key, chain)), MULTI)
             for key, chain in ((KEY, "a"), (OTHER, "b"))]
    wire(b"".join(parts), DONE_MESSAGE)
    assert [*table.Table("t")._verdicts("hostports")] == [(KEY, b"a\0"), (OTHER, b"b\0")]
    wire(error(ENOENT))
    assert [*table.Table("t")._verdicts("hostports")] == []
    wire(error(EPERM))
    with pytest.raises(CniError, match="not permitted"):
        [*table.Table("t")._verdicts("hostports")]


def test_catchall(wire):
    """`add element inet cni_portmap hostports { * : drop }` has no key; it breaks nothing."""
    catchall = nested(1, attribute(3, b"\0\0\0\2"), nested(2, nested(2, attribute(1, bytes(4)))))
    wire(message(1, bytes(4) + nested(3, catchall, element(KEY, "a")), MULTI) + DONE_MESSAGE)
    assert (KEY, b"a\0") in [*table.Table("t")._verdicts("hostports")]


FOREIGN = ["mine", "c/x/y; add table ip pwned", "c/x", "c/x/y z", "c//eth0", "c/x/", "c/x/hash/1", "d/x/eth0"]


def test_names_that_are_not_ours_are_not_read(wire):
    """Chains that others made, and elements that lead there, have no name here: none gets into nft text."""
    chains = [name for other in FOREIGN for name in (other, "c/x/eth0")]
    many = b"".join(message(1, bytes(4) + nested(3, element(bytes((index, 0, 0, 0)) + KEY[4:], chain)), MULTI)
                    for index, chain in enumerate(chains)) + DONE_MESSAGE
    wire(many, many, DONE_MESSAGE, many)
    tables = table.Table("t")
    ours = ["", "c/x/eth0"] * len(FOREIGN)
    assert [chain for _, chain in tables.elements()] == ours * 2
    assert [chain for chain, _ in tables.owners_of_port("hostports", [KEY[-8:]])] == ours
    wire(b"".join(message(6, rule(chain), MULTI) for chain in chains) + DONE_MESSAGE)
    assert [chain for chain, *_ in table.Table("t").rules()] == ours
    wire(b"".join(message(6, rule(chain) + attribute(3, bytes((0, 0, 0, handle))), MULTI)
                  for handle, chain in enumerate(chains, 7)) + DONE_MESSAGE)
    assert [(owner.chain, owner.handle) for owner in table.Table("t").owners()] == [("c/x/eth0", 8)]
    wire(message(1, bytes(4) + nested(3, element(KEY, FOREIGN[1]))))
    assert table.Table("t").lookup([("hostports", KEY)]) == {("hostports", KEY): ""}


def test_map_of_another_type(wire):
    """A map of our name that somebody else has made has keys of another size: it is named, and nothing breaks."""
    wire(message(1, bytes(4) + nested(3, element(bytes(4), "c/x/eth0")), MULTI) + DONE_MESSAGE)
    with pytest.raises(CniError, match="foreign set or map") as caught:
        table.Table("t").elements()
    assert caught.value.code == 103


def test_foreign_names(wire):
    """Names that other programs may give, as bytes that are no text, break nothing."""
    odd = bytes(4) + attribute(1, b"t\0") + attribute(2, b"\xff\xfe\0")
    wire(message(6, odd, MULTI) + DONE_MESSAGE)
    assert len(table.Table("t").rules()) == 1


def test_expressions():
    """Name and attributes of each expression."""
    raw = nested(1, name(1, "counter"), nested(2, attribute(1, bytes(8)))) + nested(1, name(1, "masq"))
    assert [*expressions.expressions(raw)] == [("counter", {1: bytes(8)}), ("masq", {})]


def expression(kind, *fields):
    """An expression and its fields 1, 2, ...: an integer is 32 bits in network order, bytes are data, None is none."""
    packed = {int: lambda value: value.to_bytes(4, "big"), bytes: lambda value: attribute(1, value),
              str: lambda value: value.encode() + b"\0"}
    return nested(1, name(1, kind), nested(2, *(attribute(number, packed[type(value)](value))
                                                for number, value in enumerate(fields, 1) if value is not None)))


L4PROTO = expression("meta", 1, 16) + expression("cmp", 1, 0, b"\x06")
DPORT = expression("payload", 1, 2, 2, 2)
DADDR = expression("payload", 1, 1, 16, 4) + expression("cmp", 1, 0, b"\xc0\0\2\1")
TO = expression("immediate", 1, b"\x0a\x58\0\2")
NAT, NAT_TO_2 = expression("nat", 1, 2, 1), expression("nat", 1, 2, 1, None, 2)
TO_80 = TO + expression("immediate", 2, b"\0\x50") + NAT_TO_2


def dport(operator, port):
    return expression("cmp", 1, operator, struct.pack(">H", port))


def test_verdicts():
    """How a rule ends a packet's way; what only looks, counts or marks does not."""
    def verdict(code, chain=""):
        return nested(1, name(1, "immediate"), nested(2, attribute(1, bytes(4)), nested(2, nested(
            2, attribute(1, code.to_bytes(4, "big", signed=True)), *([name(2, chain)] if chain else [])))))
    for code, said in (0, "drop"), (1, "accept"), (-1, ""), (-3, "jump"), (-4, "goto"), (-5, "return"), (7, ""):
        assert said_of(DPORT, verdict(code, "x" if code < -2 else "")) == said
    assert said_of(nested(1, name(1, "queue")), b"") == "queue"
    assert said_of(L4PROTO, expression("counter", 1), TO, NAT) == ""
    assert said_of(nested(1, name(1, "lookup"), nested(2, name(1, "blocked"), attribute(2, b"abcd"),
                                                       attribute(3, bytes(4))))) == "vmap"
    assert said_of(nested(1, name(1, "lookup"), nested(2, name(1, "blocked"), attribute(2, b"abcd")))) == ""
    assert expressions.verdict_of(("comment", ("lookup", b"element", b"sreg", bytes(4), None))) == "vmap"
    assert expressions.verdict_of(("comment", ("lookup", b"element", b"sreg", None, None))) == ""


def said_of(*raw):
    """The verdict of a rule of these expressions, in the form of a snapshot."""
    return expressions.verdict_of(("comment", *expressions.expressions(b"".join(raw))))


@pytest.mark.parametrize("raw", [
    expression("payload", 1, 2, 2, 4) + expression("cmp", 1, 3, b"\xff" * 4),
    expression("payload", 1, 2, 2, 16) + expression("cmp", 1, 5, b"\xff" * 16),
    expression("payload", 1, 2, 2, 4) + expression("range", 1, 0, bytes(4), b"\xff" * 4)])
def test_a_foreign_rule_cannot_have_more_ports_than_there_are(raw):
    """Somebody compares more than the port, as one number: nobody counts to that."""
    assert len(expressions.DnatRule(L4PROTO + raw + TO + NAT, lambda _: []).ports) == 65536


@pytest.mark.parametrize("raw, daddr, ports", [
    (L4PROTO + DPORT + dport(0, 8080) + TO_80, b"", {8080: 80}),
    (DADDR + L4PROTO + DPORT + dport(0, 8080) + TO_80, b"\xc0\0\2\1", {8080: 80}),
    (L4PROTO + DPORT + dport(5, 9000) + dport(3, 9002) + TO + NAT, b"", {9000: 9000, 9001: 9001, 9002: 9002}),
    (L4PROTO + DPORT + expression("range", 1, 0, b"\x23\x28", b"\x23\x29") + TO + NAT, b"", {9000: 9000, 9001: 9001}),
    (L4PROTO + DPORT + expression("lookup", "__set0", 1) + TO + DPORT + expression("lookup", "__map0", 1, 2) + NAT_TO_2,
     b"", {8000: 80, 8001: 81})])
def test_dnat_rule(raw, daddr, ports):
    """A dnat rule's address, protocol, target, and where each of its ports goes; with its counter."""
    sets = {b"__map0\0": [(b"\x1f\x40\0\0", b"\0\x50\0\0"), (b"\x1f\x41\0\0", b"\0\x51\0\0")]}
    counter = nested(1, name(1, "counter"), nested(2, attribute(1, bytes(8)), attribute(2, bytes(7) + b"\5")))
    found = expressions.DnatRule(counter + raw, lambda its_name: sets[its_name])
    assert (found.daddr, found.ports, found.protocol) == (daddr, ports, 6)
    assert (found.target, found.packets) == (b"\x0a\x58\0\2", 5)


def test_a_rule_of_0_1_for_many_ports():
    """It stands for the rules, a port each, that are written now; any other rule stands for itself."""
    counter, head = expression("counter", 0, 0), DADDR + L4PROTO + DPORT
    old = head + expression("lookup", "__set0", 1) + counter + TO + DPORT + expression("lookup", "__map0", 1, 2) + \
        NAT_TO_2
    sets = {b"__set0\0": [(b"\x1f\x41", b""), (b"\x1f\x40", b"")],
            b"__map0\0": [(b"\x1f\x41", b"\0\x51"), (b"\x1f\x42", b"\0\x52"), (b"\x1f\x40", b"\0\x50")]}
    rules = expressions.one_port_each([*expressions.expressions(old)], lambda its_name: sets[its_name])
    assert rules == [[*expressions.expressions(
        head + dport(0, host) + counter + TO + expression("immediate", 2, struct.pack(">H", container)) + NAT_TO_2)]
        for host, container in ((8000, 80), (8001, 81))]
    other = [*expressions.expressions(head + dport(0, 1) + counter + TO + NAT)]
    assert expressions.one_port_each(other, lambda _: []) == [other]


@pytest.mark.parametrize("raw", [b"", expression("counter", 0, 0), L4PROTO + DPORT + dport(0, 80),
                                 DADDR + expression("immediate", 0, b"")])
def test_no_dnat_rule(raw):
    """A rule that translates nothing has no target and no ports."""
    found = expressions.DnatRule(raw, lambda _: [])
    assert (found.target, found.ports) == (b"", {})


# --- transactions that remove ---------------------------------------------------------------------------------

WEB4, WEB6 = ("hostports", KEY), ("hostip6_hostports", bytes(range(24)))
NEWCHAIN, DELCHAIN, NEWRULE, DELRULE, NEWSETELEM, DELSETELEM = 0xa03, 0xa05, 0xa06, 0xa08, 0xa0c, 0xa0e


def change(chains=(), elements=(), leads=None, notes=(), forgotten=(), stale_notes=()):
    """A change that removes."""
    found = ruleset.Change()
    found.chains, found.elements, found.leads = [*chains], dict.fromkeys(elements, "c/a/eth0"), leads or {}
    found.notes, found.forgotten, found.stale_notes = [*notes], [*forgotten], [*stale_notes]
    return found


REMOVAL = change(["c/a/eth0", "c/b/eth0"], [WEB4, WEB6], {WEB4: "c/a/eth1"}, [("c/a/eth1", "eth2", "")], ["veth9"]), 7


def tree(data, at=0):
    """Attributes as (type, content), content being attributes where the type says that they are nested."""
    found = []
    while at < len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        payload = data[at + 4:at + length]
        found.append((kind & 0x3fff, tree(payload) if kind & 0x8000 else payload))
        at += length + 3 & ~3
    return found


def test_removal(wire):
    """One datagram: elements go before their chain, and what is inherited comes after it. With another generation
    than this the kernel refuses it."""
    there = wire(error(0, 8))
    assert Kernel().write(*REMOVAL) and there.datagrams_sent == 1
    begin, *commands, end = there.sent
    assert begin == (0x10, 1, bytes((0, 0, 0, 10)) + attribute(1, bytes((0, 0, 0, 7))))
    assert end == (0x11, 1, bytes((0, 0, 0, 10)))
    assert {body[:4] for _, _, body in commands} == {bytes((1, 0, 0, 0))}
    ours = (1, b"cni_portmap\0")
    goto = (2, [(2, [(1, b"\xff\xff\xff\xfc"), (2, b"c/a/eth1\0")])])
    going_on = (2, [(1, bytes(4)), (2, [(2, [(1, b"\xff\xff\xff\xff")])])])
    assert [(kind, flags, tree(body, 4)) for kind, flags, body in commands] == [
        (DELSETELEM, 1, [ours, (2, b"hostports\0"), (3, [(1, [(1, [(1, WEB4[1])])])])]),
        (DELSETELEM, 1, [ours, (2, b"hostip6_hostports\0"), (3, [(1, [(1, [(1, WEB6[1])])])])]),
        (DELSETELEM, 1, [ours, (2, b"localhost_interfaces\0"), (3, [(1, [(1, [(1, b"veth9" + bytes(11))])])])]),
        (DELCHAIN, 1, [ours, (3, b"c/a/eth0\0")]), (DELCHAIN, 1, [ours, (3, b"c/b/eth0\0")]),
        (NEWSETELEM, 0x601, [ours, (2, b"hostports\0"), (3, [(1, [(1, [(1, WEB4[1])]), goto])])]),
        (NEWRULE, 0xc05, [ours, (2, b"c/a/eth1\0"), (4, [(1, [(1, b"immediate\0"), going_on])]),
                          (7, b"\0\x0dalso on eth2\0")])]


def test_what_stays():
    """A chain that comes again gets other rules, and what leads there stays, in the maps and in the sets of exposure;
    but not what led elsewhere, is another's, or leads to a chain that is made anew. What stays may be there."""
    again = change(["c/a/eth0", "c/b/eth0"], [WEB4, WEB6], {WEB4: "c/a/eth0", WEB6: "c/a/eth0"})
    again.elements[WEB6] = "c/b/eth0"
    same, others, jump, new_jump = [("guarded4", bytes(3) + bytes((n,)), b"", value)
                                    for n, value in enumerate((b"", b"", "c/a/eth0", "c/b/eth0"))]
    again.removed = {same: "mine", others: "another's", jump: "mine", new_jump: "mine"}
    again.created = {same: "mine", others: "mine", jump: "mine", new_jump: "mine"}
    found = [(kind, flags & 0x200, tree(body, 4))
             for kind, flags, body, _ in batch.commands(7, again, kept={"c/a/eth0"})][1:-1]
    keys = {about: [element[0][1][0][1] for *its, parts in found if (*its,) == about for _, element in parts[2][1]]
            for about in ((DELSETELEM, 0), (NEWSETELEM, 0x200), (NEWSETELEM, 0))}  # NLM_F_EXCL
    come = [WEB6[1], others[1], new_jump[1]]
    assert [*keys.values()] == [come, come, [WEB4[1], same[1], jump[1]]]
    ours = (1, b"cni_portmap\0")
    assert [(kind, parts) for kind, _, parts in found if kind not in (DELSETELEM, NEWSETELEM)] == [
        (DELCHAIN, [ours, (3, b"c/b/eth0\0")])]


def test_notes_of_sandboxes(wire):
    """A rule that notes a sandbox that is gone goes by its handle, and one that notes the next comes."""
    there = wire(error(0, 3))
    notes = change(notes=[("c/a/eth0", "eth0", "b")], stale_notes=[("c/a/eth0", 9)])
    assert notes.removes() and Kernel().write(notes)
    _, (kind, flags, body), (added, _, its), _ = there.sent
    assert (kind, flags, tree(body, 4)) == (
        DELRULE, 1, [(1, b"cni_portmap\0"), (2, b"c/a/eth0\0"), (3, bytes((0, 0, 0, 0, 0, 0, 0, 9)))])
    assert added == NEWRULE and tree(its, 4)[-1] == (7, b"\0\x12also on eth0 of b\0")
    assert "delete rule inet cni_portmap c/a/eth0 handle 9\n" in notes.text()


@pytest.mark.parametrize("code, sequence, says", [
    (EBUSY, 5, "Device or resource busy, in: delete chain inet cni_portmap c/a/eth0"),
    (EINVAL, 2, "Invalid argument, in: delete element inet cni_portmap hostports"),
    (EEXIST, 7, "File exists, in: create element inet cni_portmap hostports"),
    (EPERM, 1, "Operation not permitted, in: begin")])
def test_removal_refused(wire, code, sequence, says):
    """The kernel's word on the first message that it refuses, and what that was to do."""
    wire(error(code, sequence) + error(ENOENT, 8), error(0, 8), message(0xa00, bytes(4)))
    with pytest.raises(CniError) as caught:
        Kernel().write(*REMOVAL)
    assert (caught.value.code, caught.value.args[0]) == (100, f"nftables rejected the transaction: {says}")
    assert ("root" in caught.value.details) == (code == EPERM)


@pytest.mark.parametrize("code, sequence", [(85, 1), (ENOENT, 2), (ENOENT, 8)])  # ERESTART: another generation
def test_removal_is_stale(wire, code, sequence):
    """Where the ruleset is not the one that was read, nothing is written, and that is no error."""
    there = wire(error(code, sequence))
    assert not Kernel().write(*REMOVAL)
    assert there.datagrams == []


def test_removal_cannot_be_sent(wire):
    """What the socket itself refuses is an error of its own."""
    def send(_):
        raise OSError(90, "too long")
    wire().send = send
    with pytest.raises(CniError, match="cannot write nf_tables: Message too long") as caught:
        Kernel().write(*REMOVAL)
    assert caught.value.code == 5


@pytest.mark.parametrize("denied", [False, True])
def test_removal_of_every_port(wire, denied):
    """65,535 ports are one datagram, for which the socket's buffer is made large enough; each list fits its attribute.
    """
    there = wire(error(0, 29))
    there.denied = {netlink.SO_SNDBUFFORCE} if denied else set()  # in a user namespace it is
    keys = [("hostports", KEY[:8] + struct.pack(">HH", port, 0)) for port in range(1, 65536)]
    assert Kernel().write(change(["c/a/eth0"], keys), 1)
    assert (there.datagrams_sent, len(there.sent)) == (1, 1 + 27 + 1 + 1)
    found = [element for kind, _, body in there.sent if kind == DELSETELEM for element in tree(body, 4)[2][1]]
    assert found == [(1, [(1, [(1, key)])]) for _, key in keys]
    size = sum(16 + len(body) for _, _, body in there.sent)
    assert there.options == {socket.SO_SNDBUF if denied else netlink.SO_SNDBUFFORCE: size}


def test_generation(wire):
    """The number of the last transaction; what is read after it is read once, until something is removed."""
    generation = message(0xa0f, bytes(4) + attribute(1, bytes((0, 1, 0, 2))))
    rules = [message(6, rule(f"c/{name}/eth0", b"", b"raw!"), MULTI) + DONE_MESSAGE
             for name in "abaa"]
    there = wire(generation, rules[0], rules[1], error(85, 4), *rules[2:], generation, rules[0])
    kernel = Kernel()
    assert kernel.generation() == 65538
    assert there.sent == [(0xa10, 1, bytes(4))]
    first, second = "c/a/eth0", "c/b/eth0"
    asked = [first, second, first, second]
    assert [kernel.rules(chain)[0][0] for chain in asked] == asked and len(there.sent) == 3
    assert not kernel.write(change([first]), 65538)
    for _ in range(2):
        assert kernel.rules(first)[0][0] == first
    assert kernel.generation() == 65538 and kernel.rules(first) and there.datagrams == []


# --- netlink, addresses, links ---------------------------------------------------------------------------------

def test_route_interface(wire):
    """The interface that a route leads to; 0 if it leads to none or to a gateway; an OSError without a route."""
    for ip, family, size, packed in (("10.0.0.1", socket.AF_INET, 32, b"\x0a\0\0\1"),
                                     ("fd::1", socket.AF_INET6, 128, socket.inet_pton(socket.AF_INET6, "fd::1"))):
        there = wire(message(24, bytes(12) + attribute(4, struct.pack("=I", 7))) + error(0))
        assert netlink.route_interface(4 if size == 32 else 6, ip) == 7
        assert there.sent == [(26, 5, bytes((family, size)) + bytes(10) + attribute(1, packed))]
    gateway = attribute(4, struct.pack("=I", 7)) + attribute(5, b"\x0a\0\0\2")
    for route in b"", gateway, attribute(4, struct.pack("=I", 7)) + attribute(18, bytes(18)):
        wire(message(24, bytes(12) + route) + error(0))
        assert netlink.route_interface(4, "10.0.0.1") == 0
    wire(error(101))
    with pytest.raises(OSError, match="netlink"):
        netlink.route_interface(4, "10.0.0.1")


def test_add_local_route(wire):
    """A route that is there already is fine; any other refusal is not."""
    for code in 0, EEXIST:
        there = wire(error(code))
        netlink.add_local_route("::1", 7, 4096)
        kind, flags, body = there.sent[0]
        assert (kind, flags, body[:12]) == (24, 0xc05, bytes((socket.AF_INET6, 128, 0, 0, 255, 4, 0, 2, 0, 0, 0, 0)))
        assert dict(attributes(body, 12)) == {1: bytes(15) + b"\1", 4: struct.pack("=I", 7), 6: struct.pack("=I", 4096)}
    wire(error(EPERM))
    with pytest.raises(PermissionError):
        netlink.add_local_route("::1", 7, 4096)


def test_delete_local_route(wire):
    """The same route; one that is gone is fine."""
    for code in 0, ESRCH:
        there = wire(error(code))
        netlink.delete_local_route("::1", 7, 4096)
        assert there.sent[0][0] == 25
        assert there.sent[0][2] == netlink._local_route("::1", 7, 4096)
    wire(error(EPERM))
    with pytest.raises(PermissionError):
        netlink.delete_local_route("::1", 7, 4096)


def test_local_routes(wire):
    """Ours are known by table, protocol, type, address and metric; the kernel's own and everybody else's are not."""
    ours = netlink._local_route("::1", 7, 4096)
    others = [netlink._local_route("::1", 8, 0), netlink._local_route("fd::1", 9, 4096),
              ours[:5] + b"\2" + ours[6:], ours[:4] + b"\xfe" + ours[5:], ours[:12]]
    wire(b"".join(message(24, route, MULTI) for route in (*others, ours)), DONE_MESSAGE)
    assert netlink.local_routes("::1", 4096) == [7]


def test_translations(wire):
    """Table, chain and expressions of the families that translate IPv4; not of ip6, bridge or netdev."""
    found = [bytes((family,)) + rule("x", b"", b"raw!")[1:] for family in (1, 2, 5, 7, 10)]
    wire(b"".join(message(10 << 8 | 6, each, MULTI) for each in found), DONE_MESSAGE)
    assert [*table.translations()] == [("cni_portmap", "x", b"raw!")] * 2


def test_has_set(wire):
    """A set that is there, and one that is not."""
    for answer, there in (message(10 << 8 | 9, bytes(4)), True), (error(ENOENT, 1), False):
        wire(answer)
        assert table.Table().has_set("x") == there


def test_local_addresses(wire):
    """IFA_LOCAL where there is one (the near end of a point-to-point link), else IFA_ADDRESS."""
    link = message(20, bytes(8) + attribute(1, b"peer") + attribute(2, b"near"), MULTI)
    wire(link + message(20, bytes(8) + attribute(1, bytes(16)), MULTI), DONE_MESSAGE)
    assert netlink.local_addresses() == {b"near", bytes(16)}


@pytest.mark.parametrize("info, kind", [(nested(18, name(1, "bridge")), "bridge"),
                                        (nested(18, name(1, "veth"), nested(2)), "veth"), (b"", "")])
def test_link_kind(wire, info, kind):
    """IFLA_INFO_KIND; "" for what has none, such as a real network card."""
    wire(message(16, bytes(16) + name(3, "cni0") + info) + error(0))
    assert netlink.link_kind(7) == kind


# --- conntrack ------------------------------------------------------------------------------------------------

def conntrack_of(protocol):
    return conntrack.Conntrack(protocol, lambda: netlink.Socket(netlink.NETLINK_NETFILTER))


def direction(kind, source, target, port):
    family = 0 if "." in source else 2
    packed = [socket.inet_pton(socket.AF_INET6 if family else socket.AF_INET, ip) for ip in (source, target)]
    return nested(kind, nested(1, attribute(1 + family, packed[0]), attribute(2 + family, packed[1])),
                  nested(2, attribute(1, b"\x11"), attribute(2, b"\x12\x34"), attribute(3, struct.pack(">H", port))))


@pytest.mark.parametrize("client, host, container",
                         [("192.0.2.2", "192.0.2.1", "10.88.0.2"), ("2001:db8::2", "2001:db8::1", "fd88::2")])
def test_flows(wire, client, host, container):
    """A flow is what its first packet asked for, and who answers."""
    directions = direction(1, client, host, 8080) + direction(2, container, client, 99)
    there = wire(message(1, bytes(4) + directions + attribute(12, b"\0\0\0\7"), MULTI), DONE_MESSAGE)
    family = 4 if "." in host else 6
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    connections = conntrack_of(17)
    [flow] = connections.flows(family, 8080)
    assert (flow.family, flow.port) == (family, 8080)
    assert (flow.destination, flow.target) == (socket.inet_pton(kind, host), socket.inet_pton(kind, container))
    [(kind_asked, flags, body)] = there.sent
    assert (kind_asked, flags, body[:4]) == (0x101, 0x301, bytes((kind, 1, 0, 0))) and b"\x1f\x90" in body
    assert dict(attributes(dict(attributes(body, 4))[25])) == {1: b"\x28\0\0\0"}
    there.datagrams = [error(ENOENT)]
    connections.delete_each([flow])
    assert there.sent[-1][0] == 0x102 and {1, 12} == {each for each, _ in attributes(there.sent[-1][2], 4)}


def test_delete_none(wire):
    """With nothing to forget nothing is asked."""
    there = wire()
    conntrack_of(17).delete_each([])
    assert there.sent == []


@pytest.mark.parametrize("destination, target, flags", [
    (b"", b"", {1: 0x28}), (b"\xc0\0\2\1", b"", {1: 0x2a}), (b"", b"\x0a\x58\0\2", {1: 0x28, 2: 1}),
    (b"\xc0\0\2\1", b"\x0a\x58\0\2", {1: 0x2a, 2: 1})])
def test_delete_asks(wire, destination, target, flags):
    """The filter names protocol and port, the destination and who answers where they are given; IPv4 alone."""
    there = wire(error(0))
    assert conntrack_of(17).delete(8080, destination, target)
    [(kind, asked, body)] = there.sent
    found = dict(attributes(body, 4))
    original, reply = dict(attributes(found[1])), dict(attributes(found.get(2, b"")))
    assert (kind, asked, body[:4]) == (0x102, 5, bytes((socket.AF_INET, 1, 0, 0)))
    assert dict(attributes(original[2])) == {1: b"\x11", 3: b"\x1f\x90"}
    assert dict(attributes(original.get(1, b""))) == ({2: destination} if destination else {})
    assert dict(attributes(reply.get(1, b""))) == ({1: target} if target else {})
    assert {side: int.from_bytes(value, "little") for side, value in attributes(found[25])} == flags


@pytest.mark.parametrize("code, answer", [(0, True), (ENOENT, True), (EINVAL, False)])
def test_delete(wire, code, answer):
    """None of that kind is fine; a kernel that can't choose says so; any other refusal is an OSError."""
    wire(error(code))
    assert conntrack_of(17).delete(8080, b"", b"") is answer
    wire(error(EPERM))
    with pytest.raises(PermissionError):
        conntrack_of(17).delete(8080, b"", b"")


def test_delete_sctp(wire):
    """The kernel's filter knows no ports of SCTP, so it isn't asked."""
    there = wire()
    assert conntrack_of(132).delete(8080, b"", b"") is False and there.sent == []


def test_what_is_remembered_of_rules_has_an_end():
    """A counter is another expression each time it is read, and `list --watch` reads it once a second."""
    for packets in range(2 * expressions.MOST_READ):
        counter = nested(1, netlink.named(1, "counter"), nested(2, attribute(2, packets.to_bytes(8, "big"))))
        assert expressions.packets_in(counter) == packets
    assert len(expressions._read) <= expressions.MOST_READ
