"""Reads a rule back from its expressions, whichever version of libnftables has compiled it.

Source: include/uapi/linux/netfilter/nf_tables.h; the enums' names are the kernel's.
"""
from _struct import Struct

from .netlink import attribute, attributes, text

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Expressions = list[tuple[str, dict[int, bytes]]]
    Elements = Callable[[bytes], Iterable[tuple[bytes, bytes]]]  # keys and values of a set or map, by its name

NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 2
NFTA_DATA_VALUE = 1
NFTA_PAYLOAD_DREG, NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_OFFSET = 1, 2, 3
NFTA_META_DREG, NFTA_META_KEY = 1, 2
NFTA_CMP_SREG, NFTA_CMP_OP, NFTA_CMP_DATA = 1, 2, 3
NFTA_RANGE_SREG, NFTA_RANGE_OP, NFTA_RANGE_FROM_DATA, NFTA_RANGE_TO_DATA, NFT_RANGE_EQ = 1, 2, 3, 4, 0
NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG, NFTA_LOOKUP_DREG, NFTA_LOOKUP_FLAGS = 1, 2, 3, 5
NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA = 1, 2
NFTA_COUNTER_PACKETS = 2
NFTA_NAT_REG_ADDR_MIN, NFTA_NAT_REG_PROTO_MIN = 3, 5
NFTA_DATA_VERDICT, NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN = 2, 1, 2
NFTA_MATCH_NAME = NFTA_TARGET_NAME = 1
NFTA_MATCH_INFO = NFTA_TARGET_INFO = 3
NFTA_TARGET_REV = 2
NFT_REG_VERDICT = bytes(4)
_VERDICTS = {code.to_bytes(4, "big", signed=True): name for code, name in {
    0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return"}.items()}  # NF_DROP, NF_ACCEPT, NFT_JUMP to NFT_RETURN
NFT_CMP_EQ, NFT_CMP_LTE, NFT_CMP_GTE = 0, 3, 5
_META = -1  # in place of a header
_L4PROTO = (_META, 16)  # NFT_META_L4PROTO
_DPORT = (2, 2)  # NFT_PAYLOAD_TRANSPORT_HEADER, offset
_DADDR = {4: (1, 16), 16: (1, 24)}  # size: NFT_PAYLOAD_NETWORK_HEADER, offset
_PORTS = Struct("=4H")  # source and destination ports (from, to) at the head of iptables' matches


def expressions(raw: bytes) -> "Iterator[tuple[str, dict[int, bytes]]]":
    """Name and attributes of each expression of a rule (enum nft_expr_attributes)."""
    for _, expression in attributes(raw):
        if expression not in _read:
            if len(_read) >= MOST_READ:  # counters are another expression each time, and `list --watch` goes on
                _read.clear()
            found = dict(attributes(expression))
            _read[expression] = \
                text(found.get(NFTA_EXPR_NAME, b"")), dict(attributes(found.get(NFTA_EXPR_DATA, b"")))
        yield _read[expression]


MOST_READ = 10_000
_read: "dict[bytes, tuple[str, dict[int, bytes]]]" = {}  # the rules of a thousand ports differ in two expressions each


def target_of(raw: bytes) -> bytes:
    """The address that a rule translates to, packed, b"" for none: `DnatRule.target`, ten times as quick."""
    loaded: dict[bytes, bytes] = {}  # register -> what it is set to
    for name, fields in expressions(raw):
        if name == "immediate":
            loaded[fields[NFTA_IMMEDIATE_DREG]] = fields[NFTA_IMMEDIATE_DATA]
        elif name == "nat":
            return _value(loaded.get(fields.get(NFTA_NAT_REG_ADDR_MIN, b""), b""))
    return b""


def packets_in(raw: bytes) -> int:
    """How many packets a rule's counter has counted, 0 for none."""
    return next((int.from_bytes(fields.get(NFTA_COUNTER_PACKETS, b""), "big") for name, fields in expressions(raw)
                 if name == "counter"), 0)


def one_port_each(rule: "Expressions", elements: "Elements") -> "list[Expressions]":
    """The rules, one for each port, that stand for a rule with a map of ports; any other rule is itself.

    As cni-portmap 0.1 wrote it, it asked for these ports first, in a set of its own.
    """
    if [name for name, _ in rule[-5:]] != ["counter", "immediate", "payload", "lookup", "nat"]:
        return [rule]
    counter, address, (_, port), (_, mapped), nat = rule[-5:]
    pairs = sorted(elements(mapped[NFTA_LOOKUP_SET]))
    name, asked = rule[-6]
    if name == "lookup":
        asked_for = {host for host, _ in elements(asked[NFTA_LOOKUP_SET])}
        head, register = rule[:-6], asked[NFTA_LOOKUP_SREG]
        pairs = [pair for pair in pairs if pair[0] in asked_for]
    elif name == "cmp":
        register = asked[NFTA_CMP_SREG]
        head = [*rule[:-5], ("payload", {**port, NFTA_PAYLOAD_DREG: register})]
    else:
        return [rule]
    return [[*head,
             ("cmp", {NFTA_CMP_SREG: register, NFTA_CMP_OP: NFT_CMP_EQ.to_bytes(4, "big"),
                      NFTA_CMP_DATA: attribute(NFTA_DATA_VALUE, host)}),
             counter, address,
             ("immediate", {NFTA_IMMEDIATE_DREG: mapped[NFTA_LOOKUP_DREG],
                            NFTA_IMMEDIATE_DATA: attribute(NFTA_DATA_VALUE, container)}), nat]
            for host, container in pairs]


def comparisons(found: dict[int, bytes]) -> "Expressions":
    """The comparisons that say the same as a range (its attributes); none for what is not in a range.

    libnftables 1.0 writes these, and 1.1 the range.
    """
    if _number(found.get(NFTA_RANGE_OP, b"")) != NFT_RANGE_EQ:
        return []
    register = found[NFTA_RANGE_SREG]
    return [("cmp", {NFTA_CMP_SREG: register, NFTA_CMP_OP: operator.to_bytes(4, "big"), NFTA_CMP_DATA: found[end]})
            for operator, end in ((NFT_CMP_GTE, NFTA_RANGE_FROM_DATA), (NFT_CMP_LTE, NFTA_RANGE_TO_DATA))]


class DnatRule:
    """A dnat rule, read from its expressions: the ports that it takes, and where they go. See `dnat_rules`.

    `ports`: host port -> container port; `protocol`: a number; `packets`: how many connections were made through it;
    `daddr`: the destination address that it asks for, packed, b"" for none; `target`: the container's address, packed,
    b"" where it is no dnat rule. It reads what `ruleset` lets libnftables compile: comparisons of the destination
    port, immediate addresses and ports; and a map of ports (`elements` fetches it), `mapped`: where that has
    destination addresses too, the ports by these. And what iptables-nft writes: its
    own matches of a port, and target DNAT; `family`: of its table, which that needs.
    """

    __slots__ = ("daddr", "mapped", "packets", "ports", "protocol", "target",
                 "_elements", "_family", "_highest", "_loaded", "_lowest", "_mapped", "_values")

    def __init__(self, raw: bytes, elements: "Elements", family: int = 0) -> None:
        self.packets, self.protocol, self.daddr, self.target = 0, 0, b"", b""
        self.ports: dict[int, int] = {}
        self._elements, self._family = elements, family
        self._loaded: dict[bytes, tuple[int, int]] = {}  # register -> base and offset of the header field in it
        self._values: dict[bytes, bytes] = {}  # register -> what it is set to
        self._lowest, self._highest = 0, 65535
        self._mapped: dict[int, int] | None = None
        self.mapped: dict[bytes, dict[int, int]] = {}
        for name, fields in expressions(raw):
            if name in _READERS:
                _READERS[name](self, fields)

    def _payload(self, fields: dict[int, bytes]) -> None:
        if NFTA_PAYLOAD_DREG in fields:
            self._loaded[fields[NFTA_PAYLOAD_DREG]] = \
                _number(fields[NFTA_PAYLOAD_BASE]), _number(fields[NFTA_PAYLOAD_OFFSET])

    def _meta(self, fields: dict[int, bytes]) -> None:
        if NFTA_META_DREG in fields:
            self._loaded[fields[NFTA_META_DREG]] = _META, _number(fields[NFTA_META_KEY])

    def _cmp(self, fields: dict[int, bytes]) -> None:
        value, operator = _value(fields[NFTA_CMP_DATA]), _number(fields[NFTA_CMP_OP])
        where = self._loaded.get(fields[NFTA_CMP_SREG])
        if where == _DADDR.get(len(value)) and operator == NFT_CMP_EQ:
            self.daddr = self.daddr or value
        elif where == _L4PROTO:
            self.protocol = value[0]
        elif where == _DPORT and len(value) == 2:
            if operator in (NFT_CMP_EQ, NFT_CMP_GTE):
                self._lowest = _number(value)
            if operator in (NFT_CMP_EQ, NFT_CMP_LTE):
                self._highest = _number(value)

    def _range(self, fields: dict[int, bytes]) -> None:
        first, last = _value(fields[NFTA_RANGE_FROM_DATA]), _value(fields[NFTA_RANGE_TO_DATA])
        if self._loaded.get(fields[NFTA_RANGE_SREG]) == _DPORT and len(first) == len(last) == 2:
            self._lowest, self._highest = _number(first), _number(last)

    def _lookup(self, fields: dict[int, bytes]) -> None:
        where = self._loaded.get(fields[NFTA_LOOKUP_SREG])
        if NFTA_LOOKUP_DREG not in fields:
            return
        if where == _DPORT:
            self._mapped = {_number(key[:2]): _number(data[:2])
                            for key, data in self._elements(fields[NFTA_LOOKUP_SET])}
        elif where in _DADDR.values():
            self._mapped = {}
            for key, data in self._elements(fields[NFTA_LOOKUP_SET]):
                self.mapped.setdefault(key[:-4], {})[_number(key[-4:-2])] = _number(data[:2])

    def _immediate(self, fields: dict[int, bytes]) -> None:
        self._values[fields[NFTA_IMMEDIATE_DREG]] = _value(fields[NFTA_IMMEDIATE_DATA])

    def _counter(self, fields: dict[int, bytes]) -> None:
        self.packets = _number(fields[NFTA_COUNTER_PACKETS])

    def _nat(self, fields: dict[int, bytes]) -> None:
        self.target = self._values.get(fields.get(NFTA_NAT_REG_ADDR_MIN, b""), b"")
        self._lead_to(_number(self._values.get(fields.get(NFTA_NAT_REG_PROTO_MIN, b""), b"")[:2]))

    def _lead_to(self, port: int) -> None:
        self.ports = {host: port or host for host in range(self._lowest, self._highest + 1)} \
            if self._mapped is None else self._mapped

    def _match(self, fields: dict[int, bytes]) -> None:
        name, info = fields.get(NFTA_MATCH_NAME), fields.get(NFTA_MATCH_INFO, b"")
        if name in (b"tcp\0", b"udp\0", b"sctp\0") and len(info) >= _PORTS.size:
            ports = _PORTS.unpack_from(info)  # struct xt_tcp and xt_udp; xt_sctp_info has the destination's first
            self._lowest, self._highest = ports[:2] if name == b"sctp\0" else ports[2:]

    def _target(self, fields: dict[int, bytes]) -> None:
        if fields.get(NFTA_TARGET_NAME) == b"DNAT\0":
            info, revision = fields.get(NFTA_TARGET_INFO, b""), _number(fields.get(NFTA_TARGET_REV, b""))
            # struct nf_nat_ipv4_multi_range_compat, revision 0; struct nf_nat_range and nf_nat_range2, later ones
            size, address, port = (4, 8, 16) if not revision else (16 if self._family == 6 else 4, 4, 36)
            self.target = info[address:address + size]
            self._lead_to(_number(info[port:port + 2]))


def dnat_rules(raw: bytes, elements: "Elements") -> "list[DnatRule]":
    """The dnat rules that a rule stands for: one, or one for each destination address that its map has."""
    rule = DnatRule(raw, elements)
    if not rule.mapped:
        return [rule]
    found = []
    for daddr, ports in rule.mapped.items():
        one = DnatRule(b"", elements)
        one.protocol, one.target, one.packets, one.daddr, one.ports = \
            rule.protocol, rule.target, rule.packets, daddr, ports
        found.append(one)
    return found


_READERS = {"payload": DnatRule._payload, "meta": DnatRule._meta, "cmp": DnatRule._cmp, "range": DnatRule._range,
            "lookup": DnatRule._lookup, "immediate": DnatRule._immediate, "counter": DnatRule._counter,
            "nat": DnatRule._nat, "match": DnatRule._match, "target": DnatRule._target}


def jump_of(raw: bytes) -> str:
    """The chain that a rule jumps or goes to, "" for none."""
    for name, fields in expressions(raw):
        if name == "immediate":
            verdict = dict(attributes(dict(attributes(fields[NFTA_IMMEDIATE_DATA])).get(NFTA_DATA_VERDICT, b"")))
            if NFTA_VERDICT_CHAIN in verdict:
                return text(verdict[NFTA_VERDICT_CHAIN])
    return ""


def verdict_of(rule: object) -> str:
    """How a rule of a snapshot (see Table.snapshot) ends a packet's way through its chain, "" where it does not."""
    for name, *fields in rule[1:] if type(rule) is tuple else ():
        if name in ("queue", "reject"):
            return str(name)
        given = fields[0] if fields and type(fields[0]) is dict else {}
        if name == "immediate":
            verdict = dict(attributes(given.get(NFTA_IMMEDIATE_DATA, b""))).get(NFTA_DATA_VERDICT, b"")
            code = dict(attributes(verdict)).get(NFTA_VERDICT_CODE, b"")
            if code in _VERDICTS:
                return _VERDICTS[code]
        if name == "lookup":
            register = given.get(NFTA_LOOKUP_DREG) if given else fields[-2]
            if register == NFT_REG_VERDICT:
                return "vmap"
    return ""


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _value(data: bytes) -> bytes:
    return dict(attributes(data)).get(NFTA_DATA_VALUE, b"")
