"""The DNAT rules of everybody: who else publishes ports of this host, with nft, iptables-nft or iptables-legacy.

Read from the rules as they stand, not by a packet: so it lists what there is, where the walker says what one packet
meets. Conditions are gathered along the jumps from a base chain of the kind nat. What this module does not know of a
rule is left out, so a claim may be wider than the rule, and never narrower.
"""
from collections.abc import Iterator
from struct import unpack_from
from typing import NamedTuple

from ..linux.expressions import NFT_REG_VERDICT
from ..linux.netlink import attributes
from ..linux.rulesets import LEGACY, NFT_GOTO, NFT_JUMP, Chain, Element, Rule, Rulesets, verdict_in
from .xtables import translation

DEEPEST = 8
ANY = ((0, 65535),)
_FIELDS = {(0, 16): "l4proto", (0, 15): "nfproto", (1, 16, 4): "daddr", (1, 24, 16): "daddr", (2, 2, 2): "dport"}
_PROTOCOLS = (6, 17, 132)
_CONDITIONS = ("cmp", "lookup", "match", "legacy")


class Claim(NamedTuple):
    """Ports that a rule translates the destination of.

    `family`: 4 or 6; `protocol`: a number, 0 for any; `daddr`: packed, b"" for every address; `ports`: ranges, the ends
    included, ANY for all. `target`: packed, None where it is chosen or not known; `port`: None where it stays.
    """

    family: int
    protocol: int
    daddr: bytes
    ports: tuple[tuple[int, int], ...]
    target: bytes | None
    port: int | None
    base: Chain
    chain: Chain
    rule: Rule

    def has(self, family: int, protocol: int, port: int) -> bool:
        """Whether it is for a port."""
        return self.family == family and self.protocol in (0, protocol) and \
            any(first <= port <= last for first, last in self.ports)


class _Known(NamedTuple):
    """What is known of a packet that comes to a rule."""

    family: int
    protocol: int = 0
    daddr: bytes = b""
    ports: tuple[tuple[int, int], ...] = ANY

    def narrowed(self, **fields: object) -> "_Known | None":
        """With more conditions; None where they contradict."""
        for name, value in fields.items():
            known = getattr(self, name)
            if name == "ports":
                ports = tuple((max(first, low), min(last, high)) for first, last in self.ports
                              for low, high in value)  # type: ignore[attr-defined]
                fields[name] = tuple(pair for pair in ports if pair[0] <= pair[1])
                if not fields[name]:
                    return None
            elif known and known != value:
                return None
        return self._replace(**fields)  # type: ignore[arg-type]


def claims(rulesets: Rulesets, skip: tuple[str, str] = ("", "")) -> list[Claim]:
    """All claims, of tables but `skip` (family, name)."""
    found = []
    for base in rulesets.chains:
        if base.kind == "nat" and base.hook in ("prerouting", "output") and (base.family, base.table) != skip:
            for family in (4, 6) if base.family == "inet" else (4,) if base.family == "ip" else (6,):
                found += [*_of_chain(rulesets, base, base, _Known(family), 0)]
    # A chain may be reached by several ways, such as prerouting and output.
    return [*{(str(claim.chain), claim.rule.handle, claim[:6]): claim for claim in reversed(found)}.values()][::-1]


def _of_chain(rulesets: Rulesets, base: Chain, chain: Chain, known: _Known, depth: int) -> Iterator[Claim]:
    for rule in chain.rules:
        for its, (kind, name, target, port) in _Reader(rulesets, chain, rule, known).ends():
            if kind == "dnat":
                yield Claim(*its, target, port, base, chain, rule)
            elif depth < DEEPEST and (other := rulesets.chain(chain, name)):
                yield from _of_chain(rulesets, base, other, its, depth + 1)


_End = tuple[str, str, "bytes | None", "int | None"]


class _Reader:
    """Reads one rule: its conditions, and where it leads."""

    def __init__(self, rulesets: Rulesets, chain: Chain, rule: Rule, known: _Known) -> None:
        self._rulesets, self._chain, self._rule, self._known = rulesets, chain, rule, known
        self._fields: dict[int, str] = {}  # place in the registers -> what has been loaded there
        self._values: dict[int, bytes] = {}

    def ends(self) -> Iterator[tuple[_Known, _End]]:
        """Where the rule leads, with what is known there."""
        known: _Known | None = self._known
        for index, (name, fields) in enumerate(self._rule.expressions):
            if known is None:
                return
            if name == "payload" and 5 not in fields:
                key = _number(fields, 2), _number(fields, 3), _number(fields, 4)
                self._load(_number(fields, 1), _FIELDS.get(key, ""))
            elif name == "meta" and 3 not in fields:
                self._load(_number(fields, 1), _FIELDS.get((0, _number(fields, 2)), ""))
            elif name == "lookup" and fields.get(3) == NFT_REG_VERDICT:
                yield from self._by_map(fields, known)
                return
            elif name == "lookup" and 3 in fields:
                yield from self._by_data(fields, known, index)
                return
            elif name in _CONDITIONS:
                known = self._narrowed(name, fields, known)
            else:
                end = self._end(name, fields, known)
                if end:
                    yield known, end
                    return

    def _narrowed(self, name: str, fields: dict[int, bytes], known: _Known) -> _Known | None:
        if name == "cmp":
            return self._compared(fields, known)
        if name == "lookup":
            return known if _number(fields, 5) else self._in_set(fields, known)
        return _matched(name, fields, known)

    def _end(self, name: str, fields: dict[int, bytes], known: _Known) -> _End | None:
        if name == "immediate":
            verdict = verdict_in(dict(attributes(fields.get(2, b""))))
            if verdict:
                return ("jump", verdict[1], None, None) if verdict[0] in (NFT_JUMP, NFT_GOTO) else None
            self._values[_place(_number(fields, 1))] = _data(fields, 2)
        elif name == "nat" and _number(fields, 1) == 1 and _number(fields, 2) != (10 if known.family == 4 else 2):
            target = self._values.get(_place(_number(fields, 3))) if 3 in fields else None
            return "dnat", "", target, self._port(fields, 5)
        elif name == "redir":
            return "dnat", "", None, self._port(fields, 1)
        elif name == "target" and fields.get(1, b"")[:-1] in (b"DNAT", b"REDIRECT"):
            kind = fields[1][:-1].decode()
            return "dnat", "", *translation(fields.get(3, b""), _number(fields, 2), known.family, kind)
        return None

    def _port(self, fields: dict[int, bytes], kind: int) -> int | None:
        port = self._values.get(_place(_number(fields, kind)), b"")[:2] if kind in fields else b""
        return int.from_bytes(port, "big") if port else None

    def _load(self, register: int, field: str) -> None:
        self._fields[_place(register)] = field

    def _compared(self, fields: dict[int, bytes], known: _Known) -> _Known | None:
        value, operator = _data(fields, 3), _number(fields, 2)
        field = self._fields.get(_place(_number(fields, 1)), "")
        if field == "dport" and operator in (3, 5) and len(value) == 2:  # a range
            limit = int.from_bytes(value, "big")
            return known.narrowed(ports=((0, limit),) if operator == 3 else ((limit, 65535),))
        return _having(known, field, value) if operator == 0 else known

    def _in_set(self, fields: dict[int, bytes], known: _Known) -> _Known | None:
        """A rule for some ports, or for some addresses: of those only ports are told."""
        if self._fields.get(_place(_number(fields, 2))) != "dport":
            return known
        found = self._rulesets.set_of(self._chain, fields.get(1, b""))
        keys = sorted((element.key or b"", element.is_end) for element in found.elements if element.key)
        if not found.is_interval:
            ports = tuple((int.from_bytes(key[:2], "big"),) * 2 for key, _ in keys)
        else:
            ports = tuple((int.from_bytes(key[:2], "big"), int.from_bytes(keys[index + 1][0][:2], "big") - 1
                           if index + 1 < len(keys) else 65535) for index, (key, end) in enumerate(keys) if not end)
        return known.narrowed(ports=ports)

    def _by_map(self, fields: dict[int, bytes], known: _Known) -> Iterator[tuple[_Known, _End]]:
        for element, its in self._elements(fields, known):
            if element.verdict and element.verdict[0] in (NFT_JUMP, NFT_GOTO):
                yield its, ("jump", element.verdict[1], None, None)

    def _by_data(self, fields: dict[int, bytes], known: _Known, index: int) -> Iterator[tuple[_Known, _End]]:
        """Where the rest of the rule, behind the expression with this index, leads with each element of a map."""
        rest = self._rule._replace(expressions=self._rule.expressions[index + 1:])
        first, size = _place(_number(fields, 3)), 4 if known.family == 4 else 16
        for element, its in self._elements(fields, known):
            reader = _Reader(self._rulesets, self._chain, rest, its)
            reader._values = {**self._values, first: element.data[:size], first + size: element.data[size:]}
            yield from reader.ends()

    def _elements(self, fields: dict[int, bytes], known: _Known) -> Iterator[tuple[Element, _Known]]:
        """The elements of a map that may be met, each with what is known where it is; not those of ranges."""
        found = self._rulesets.set_of(self._chain, fields.get(1, b""))
        first = _place(_number(fields, 2))
        for element in found.elements if not found.is_interval else ():
            its: _Known | None = known
            at = 0
            while its is not None and at < len(element.key or b""):
                field = self._fields.get(first + at, "")
                size = {"daddr": 4 if known.family == 4 else 16, "dport": 2}.get(field, 1)
                its = _having(its, field, (element.key or b"")[at:at + size])
                at += size + -size % 4
            if its is not None:
                yield element, its


def _having(known: _Known, field: str, value: bytes) -> _Known | None:
    """With one condition more."""
    if field == "dport" and len(value) == 2:
        port = int.from_bytes(value, "big")
        return known.narrowed(ports=((port, port),))
    if field == "l4proto":
        return known.narrowed(protocol=value[0]) if value[0] in _PROTOCOLS else None
    if field == "nfproto":
        return known if value[0] == (2 if known.family == 4 else 10) else None
    if field == "daddr":
        return known.narrowed(daddr=value) if len(value) == (4 if known.family == 4 else 16) else None
    return known


def _matched(name: str, fields: dict[int, bytes], known: _Known) -> _Known | None:
    """With what a match of iptables, or the header of an entry of iptables-legacy, asks for."""
    if name == "legacy":
        header = fields[1]
        size = 4 if len(header) == 84 else 16
        protocol, = unpack_from("=H", header, 4 * size + 64)
        inverse = header[83] if size == 4 else header[132]
        its: _Known | None = known
        if protocol and not inverse & 0x40:
            its = known.narrowed(protocol=protocol) if protocol in _PROTOCOLS else None
        if its and header[3 * size:4 * size] == b"\xff" * size and not inverse & 0x10:
            its = its.narrowed(daddr=header[size:2 * size])
        return its
    kind, data = fields.get(1, b"")[:-1], fields.get(3, b"")
    if kind in (b"tcp", b"udp") and len(data) > 8 and not data[11 if kind == b"tcp" else 8] & 2:
        its = known.narrowed(protocol=6 if kind == b"tcp" else 17)
        return its.narrowed(ports=(unpack_from("=HH", data, 4),)) if its else None
    if kind == b"multiport" and len(data) >= 48 and data[0] == 1 and not data[47]:
        ports, at = [], 0
        values = unpack_from("=15H", data, 2)
        while at < min(data[1], 15):
            first = at
            at += 1 if data[32 + at] else 0
            ports.append((values[first], values[min(at, 14)]))
            at += 1
        return known.narrowed(ports=tuple(ports))
    return known


def _number(fields: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(fields.get(kind, b""), "big")


def _data(fields: dict[int, bytes], kind: int) -> bytes:
    return dict(attributes(fields.get(kind, b""))).get(1, b"")


def _place(register: int) -> int:
    return (register - 1) * 16 if register < 8 else (register - 8) * 4


# --- whose they are -------------------------------------------------------------------------------------------

# By the names of tables and chains, the first that fits.
REFERENCE = "the reference plugin portmap"
PUBLISHERS = (("cni_hostport", "", REFERENCE), ("", "CNI-DN-", REFERENCE), ("", "CNI-HOSTPORT-", REFERENCE),
              ("", "DOCKER", "Docker"),
              ("docker-bridges", "", "Docker"), ("", "NETAVARK-", "netavark"), ("netavark", "", "netavark"),
              ("", "KUBE-HP-", "CRI-O"), ("", "KUBE-HOSTPORTS", "CRI-O"), ("crio-hostports", "", "CRI-O"),
              ("", "KUBE-", "kube-proxy"), ("kube-proxy", "", "kube-proxy"), ("", "LIBVIRT_", "libvirt"),
              ("firewalld", "", "firewalld"))


def publisher(chain: Chain) -> str:
    """Who has written a chain, by its name; "" where that does not tell."""
    return next((who for table, prefix, who in PUBLISHERS
                 if (not table or chain.table == table) and chain.name.startswith(prefix)),
                "iptables-legacy" if chain.backend == LEGACY else "")
