"""Everybody's rules: all nf_tables and iptables-legacy tables of this network namespace, in one form.

Read by netlink and getsockopt(2), so no program has to be there, and none of another version can misread what it finds.
Reading changes nothing: only those tables of iptables-legacy are asked for that exist (/proc/net/ip_tables_names);
asking for another would create it.

A chain of iptables-legacy has the form of one of nf_tables: its matches and targets are the expressions `match` and
`target` that iptables-nft writes, its header is an expression `legacy`, and a verdict one of `immediate`.

Source: include/uapi/linux/netfilter/nf_tables.h, x_tables.h; netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h.
"""
import ctypes
import os
from collections.abc import Callable, Iterator
from socket import AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_RAW, SOCK_RAW, socket
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from . import ENOENT, system_error
from .expressions import (NFT_REG_VERDICT, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_EXPR_NAME, NFTA_IMMEDIATE_DATA,
                          NFTA_IMMEDIATE_DREG, NFTA_VERDICT_CODE, expressions)
from .netlink import NETLINK_NETFILTER, Socket, attribute, attributes, named, text
from .table import (NFT_MSG_GETCHAIN, NFT_MSG_GETRULE, NFT_MSG_GETSET, NFT_MSG_GETTABLE,
                    NFT_TABLE_F_DORMANT, NFTA_CHAIN_HANDLE, NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME, NFTA_CHAIN_POLICY,
                    NFTA_CHAIN_TABLE, NFTA_CHAIN_TYPE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE,
                    NFTA_RULE_USERDATA, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_LIST_SET,
                    NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_NAME, NFTA_SET_TABLE, NFTA_TABLE_FLAGS, NFTA_TABLE_NAME,
                    NFTA_VERDICT_CHAIN, comment_in, dump_elements, list_elements)

if TYPE_CHECKING:
    from .expressions import Expressions

NFT, LEGACY = "nft", "iptables-legacy"
FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_*
INET_HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress")  # NF_INET_*; bridge: the same
NETDEV_HOOKS = ("ingress", "egress")
NFTA_RULE_HANDLE = 3
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY, NFTA_HOOK_DEV, NFTA_HOOK_DEVS = 1, 2, 3, 4
NFTA_SET_FLAGS, NFTA_SET_DESC, NFTA_SET_DESC_CONCAT, NFTA_SET_FIELD_LEN = 3, 9, 2, 1
NFTA_SET_ELEM_FLAGS, NFTA_SET_ELEM_EXPR, NFTA_SET_ELEM_KEY_END, NFTA_SET_ELEM_EXPRESSIONS = 3, 7, 10, 11
ALWAYS = ("counter", "last")  # expressions of an element that match each packet
NFT_SET_INTERVAL = 4
NFT_SET_ELEM_INTERVAL_END, NFT_SET_ELEM_CATCHALL = 1, 2
NF_DROP, NF_ACCEPT, NF_QUEUE, NFT_CONTINUE, NFT_JUMP, NFT_GOTO, NFT_RETURN = 0, 1, 3, -1, -3, -4, -5
NFTA_COUNTER_PACKETS = 2


class Rule(NamedTuple):
    """A rule: its `handle`, or its number in the chain of iptables-legacy; `comment`: nft's own; its expressions."""

    handle: int
    comment: str
    expressions: "Expressions"

    @property
    def packets(self) -> int | None:
        """How many packets it has counted; None where it does not count."""
        for name, fields in self.expressions:
            if name == "counter" and NFTA_COUNTER_PACKETS in fields:
                return int.from_bytes(fields[NFTA_COUNTER_PACKETS], "big")
        return None


class Chain(NamedTuple):
    """A chain with its rules. `backend`: NFT (iptables-nft too) or LEGACY; `family`: as nft writes it.

    `hook`: "" where it has none, and in a dormant table; `kind`: "filter", "nat", "route", or "". `policy`: "accept" or
    "drop"; `counted`: packets that met the policy, None where that is not counted. `devices`: of netdev and ingress.
    """

    backend: str
    family: str
    table: str
    name: str
    hook: str
    priority: int
    kind: str
    policy: str
    devices: tuple[str, ...]
    rules: list[Rule]
    counted: int | None = None
    handle: int = 0

    def __str__(self) -> str:
        return f"{self.backend} table {self.family} {self.table}, chain {self.name}"


class Element(NamedTuple):
    """An element of a set or map: `key`, None for the catch-all; `last`: the end of its range, inclusive, or None.

    `is_end`: it is no element, but the end (exclusive) of the range before it. `data`: of a map. `verdict`: (code,
    chain) of a verdict map. `is_limited`: it may not match: it has a limit, a quota or a number of connections.
    """

    key: bytes | None
    last: bytes | None
    is_end: bool
    data: bytes
    verdict: tuple[int, str] | None
    is_limited: bool = False


class Set(NamedTuple):
    """A set or map. `fields`: the lengths in bytes of what a concatenation consists of, () for one value."""

    is_interval: bool
    fields: tuple[int, ...]
    elements: list[Element]


class Rulesets:
    """All chains, and the sets that their rules ask for, read when they are first asked for.

    `unreadable`: why iptables-legacy could not be read, "" if it could, or is not there.
    """

    def __init__(self) -> None:
        self.unreadable = ""
        try:
            self._netlink = Socket(NETLINK_NETFILTER)
            self.chains = [*self._nft_chains()]
        except OSError as error:
            raise system_error("cannot read nf_tables", error) from None
        try:
            self.chains += _legacy_chains()
        except OSError as error:
            self.unreadable = os.strerror(error.errno or 0)
        self._sets: dict[tuple[str, str, str], Set] = {}
        self._by_name = {(chain.backend, chain.family, chain.table, chain.name): chain for chain in self.chains}

    def chain(self, beside: Chain, name: str) -> Chain | None:
        """The chain of a name in the same table."""
        return self._by_name.get((beside.backend, beside.family, beside.table, name))

    def set_of(self, beside: Chain, name: bytes) -> Set:
        """A set or map (its name as the kernel has it) of a chain's table; an empty one where there is none."""
        key = beside.family, beside.table, text(name)
        if key not in self._sets:
            try:
                self._sets[key] = self._read_set(*key)
            except OSError as error:
                raise system_error(f"cannot read the set {key[2]} of table {key[0]} {key[1]}", error) from None
        return self._sets[key]

    def close(self) -> None:
        """Close what it reads by."""
        self._netlink.close()

    def _nft_chains(self) -> Iterator[Chain]:
        dump = self._netlink.dump
        dormant = set()
        for answer in dump(NFT_MSG_GETTABLE, bytes(4)):
            found = dict(attributes(answer, 4))
            if int.from_bytes(found.get(NFTA_TABLE_FLAGS, b""), "big") & NFT_TABLE_F_DORMANT:
                dormant.add((answer[0], found[NFTA_TABLE_NAME]))
        rules: dict[tuple[int, bytes, bytes], list[Rule]] = {}
        for answer in dump(NFT_MSG_GETRULE, bytes(4)):
            found = dict(attributes(answer, 4))
            rule = Rule(_number(found.get(NFTA_RULE_HANDLE, b"")), comment_in(found.get(NFTA_RULE_USERDATA, b"")),
                        [*expressions(found.get(NFTA_RULE_EXPRESSIONS, b""))])
            rules.setdefault((answer[0], found[NFTA_RULE_TABLE], found[NFTA_RULE_CHAIN]), []).append(rule)
        for answer in dump(NFT_MSG_GETCHAIN, bytes(4)):
            found = dict(attributes(answer, 4))
            table, name = found[NFTA_CHAIN_TABLE], found[NFTA_CHAIN_NAME]
            hook = {} if (answer[0], table) in dormant else dict(attributes(found.get(NFTA_CHAIN_HOOK, b"")))
            names = NETDEV_HOOKS if answer[0] == 5 else INET_HOOKS
            number = _number(hook.get(NFTA_HOOK_HOOKNUM, b""))
            yield Chain(NFT, FAMILIES.get(answer[0], str(answer[0])), text(table), text(name),
                        names[number] if hook and number < len(names) else "",
                        int.from_bytes(hook.get(NFTA_HOOK_PRIORITY, b""), "big", signed=True),
                        text(found.get(NFTA_CHAIN_TYPE, b"\0")),
                        "drop" if hook and found.get(NFTA_CHAIN_POLICY) == bytes(4) else "accept",
                        tuple(_devices(hook)), rules.get((answer[0], table, name), []),
                        handle=_number(found.get(NFTA_CHAIN_HANDLE, b"")))

    def _read_set(self, family: str, table: str, name: str) -> Set:
        number = next(number for number, its in FAMILIES.items() if its == family)
        head = bytes((number, 0, 0, 0))
        answer, = self._netlink.ask_each(NFT_MSG_GETSET, [head + named(NFTA_SET_TABLE, table) +
                                                          named(NFTA_SET_NAME, name)])
        if answer is None:
            return Set(False, (), [])
        about = dict(attributes(answer, 4))
        description = dict(attributes(about.get(NFTA_SET_DESC, b"")))
        fields = tuple(_number(dict(attributes(field)).get(NFTA_SET_FIELD_LEN, b""))
                       for _, field in attributes(description.get(NFTA_SET_DESC_CONCAT, b"")))
        elements: list[Element] = []
        body = head + named(NFTA_SET_ELEM_LIST_TABLE, table) + named(NFTA_SET_ELEM_LIST_SET, name)
        try:
            for answer in dump_elements(self._netlink, body, _parsed):
                elements += map(_parsed, list_elements(answer))
        except OSError as error:
            if error.errno != ENOENT:
                raise
        interval = bool(_number(about.get(NFTA_SET_FLAGS, b"")) & NFT_SET_INTERVAL)
        return Set(interval, fields if len(fields) > 1 else (), elements)


def _devices(hook: dict[int, bytes]) -> Iterator[str]:
    if NFTA_HOOK_DEV in hook:
        yield text(hook[NFTA_HOOK_DEV])
    elif NFTA_HOOK_DEVS in hook:
        for _, name in attributes(hook[NFTA_HOOK_DEVS]):
            yield text(name)


def _parsed(raw: bytes) -> Element:
    found = dict(attributes(raw))
    flags = _number(found.get(NFTA_SET_ELEM_FLAGS, b""))
    data = dict(attributes(found.get(NFTA_SET_ELEM_DATA, b"")))
    more = dict(attributes(found.get(NFTA_SET_ELEM_EXPR, b"")))
    names = [text(more[NFTA_EXPR_NAME])] if more else \
        [name for name, _ in expressions(found.get(NFTA_SET_ELEM_EXPRESSIONS, b""))]
    return Element(None if flags & NFT_SET_ELEM_CATCHALL else _value(found.get(NFTA_SET_ELEM_KEY, b"")),
                   _value(found[NFTA_SET_ELEM_KEY_END]) if NFTA_SET_ELEM_KEY_END in found else None,
                   bool(flags & NFT_SET_ELEM_INTERVAL_END), data.get(NFTA_DATA_VALUE, b""), verdict_in(data),
                   any(name not in ALWAYS for name in names))


def verdict_in(data: dict[int, bytes]) -> tuple[int, str] | None:
    """The verdict among data (enum nft_data_attributes): its code, and the chain of a jump or goto."""
    if NFTA_DATA_VERDICT not in data:
        return None
    verdict = dict(attributes(data[NFTA_DATA_VERDICT]))
    return int.from_bytes(verdict.get(NFTA_VERDICT_CODE, b""), "big", signed=True), \
        text(verdict.get(NFTA_VERDICT_CHAIN, b"\0"))


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _value(data: bytes) -> bytes:
    return dict(attributes(data)).get(NFTA_DATA_VALUE, b"")


# --- iptables-legacy ------------------------------------------------------------------------------------------

SO_GET_INFO, SO_GET_ENTRIES = 64, 65  # IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES; ip6tables has the same numbers
_INFO = Struct("=32sI5I5III")  # ipt_getinfo: name, valid_hooks, hook_entry, underflow, num_entries, size
_ENTRIES = Struct("=32sI4x")  # ipt_get_entries, with the padding before its entries
_OFFSETS, _COUNTER = Struct("=HH"), Struct("=Q")  # of an entry: target_offset and next_offset; packets
_PART = Struct("=H29sB")  # xt_entry_match and xt_entry_target: size, name, revision
_FAMILIES = (("ip", AF_INET, IPPROTO_IP, "/proc/net/ip_tables_names", 84),
             ("ip6", AF_INET6, IPPROTO_IPV6, "/proc/net/ip6_tables_names", 136))
_LEGACY_HOOKS = {"PREROUTING": "prerouting", "INPUT": "input", "FORWARD": "forward", "OUTPUT": "output",
                 "POSTROUTING": "postrouting"}
_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0, "security": 50}
_NAT_PRIORITIES = {"PREROUTING": -100, "OUTPUT": -100, "POSTROUTING": 100, "INPUT": 100}
XT_RETURN = -5  # -NF_REPEAT - 1


def _legacy_chains() -> list[Chain]:
    found: list[Chain] = []
    for family, domain, level, path, header in _FAMILIES:
        try:
            with open(path) as names:
                tables = names.read().split()
        except FileNotFoundError:  # this kernel has no iptables-legacy, or nobody has used it since the boot
            continue
        if not tables:
            continue
        with socket(domain, SOCK_RAW, IPPROTO_RAW) as raw:
            for table in tables:
                if table in _PRIORITIES or table == "nat":
                    found += _legacy_table(_get(raw, level), family, table, header)
    return found


def _get(raw: socket, level: int) -> Callable[[int, bytes], bytes]:
    """getsockopt(2) that hands over what it is given: Python's own hands over nothing."""
    libc = ctypes.CDLL(None, use_errno=True)

    def get(option: int, given: bytes) -> bytes:
        buffer = ctypes.create_string_buffer(given, len(given))
        size = ctypes.c_uint32(len(given))
        if libc.getsockopt(raw.fileno(), level, option, buffer, ctypes.byref(size)):
            raise OSError(ctypes.get_errno(), "getsockopt")
        return buffer.raw[:size.value]
    return get


def _legacy_table(get: Callable[[int, bytes], bytes], family: str, table: str, header: int) -> list[Chain]:
    for _ in range(100):  # EAGAIN: it has changed in between
        info = _INFO.unpack(get(SO_GET_INFO, table.encode().ljust(_INFO.size, b"\0")))
        valid, hooks, underflow, size = info[1], info[2:7], info[7:12], info[13]
        request = _ENTRIES.pack(table.encode(), size) + bytes(size)
        try:
            blob = get(SO_GET_ENTRIES, request)[_ENTRIES.size:]
            break
        except BlockingIOError:
            continue
    else:
        raise OSError(11, "iptables-legacy changed each time between two questions")
    starts = {hooks[number]: name for number, name in enumerate(_LEGACY_HOOKS) if valid >> number & 1}
    policies = {underflow[number] for number in range(5) if valid >> number & 1}
    return [*_chains_in(blob, family, table, header, starts, policies)]


class _Entry(NamedTuple):
    """An entry of a table: its offset and the next one's, its header, its matches, its target, its counter."""

    at: int
    after: int
    header: bytes
    matches: "Expressions"
    target: tuple[str, int, bytes]  # name, revision, data
    packets: int


def _entries(blob: bytes, header: int) -> Iterator[_Entry]:
    at, first = 0, header + 12 + (-(header + 12) % 8) + 16  # the counters are aligned to eight bytes
    while at + first <= len(blob):
        target_offset, next_offset = _OFFSETS.unpack_from(blob, at + header + 4)
        packets, = _COUNTER.unpack_from(blob, at + first - 16)
        matches: Expressions = []
        part = at + first
        while part < at + target_offset:
            size, name, revision = _PART.unpack_from(blob, part)
            matches.append(("match", _part(name, revision, blob[part + 32:part + size])))
            part += max(size, 32)
        size, name, revision = _PART.unpack_from(blob, part)
        yield _Entry(at, at + next_offset, blob[at:at + header], matches,
                     (name.split(b"\0")[0].decode(errors="replace"), revision, blob[part + 32:part + size]), packets)
        if not next_offset:
            return
        at += next_offset


def _chains_in(blob: bytes, family: str, table: str, header: int, starts: dict[int, str], policies: set[int]) \
        -> Iterator[Chain]:
    """The chains of a table: `starts`: where the built-in ones begin; `policies`: where those end."""
    entries = [*_entries(blob, header)]
    # A chain of a user begins with an ERROR that holds its name; jumps lead behind that. So does the end of the table.
    named_at = starts | {entry.after: entry.target[2].split(b"\0")[0].decode(errors="replace") for entry in entries
                         if entry.target[0] == "ERROR"}
    rules: list[Rule] = []
    chain = ""
    policy, counted = None, None
    for entry in entries:
        if entry.at in starts:
            chain, rules = starts[entry.at], []
        if entry.target[0] == "ERROR":
            if chain and policy is None:
                yield _legacy_chain(family, table, chain, rules, None, None)
            chain, rules, policy = named_at[entry.after], [], None
        elif entry.at in policies:
            policy, counted = _standard(entry.target[2]), entry.packets
            yield _legacy_chain(family, table, chain, rules, policy, counted)
            chain, policy = "", None
        else:
            rules.append(Rule(len(rules) + 1, "", [
                ("legacy", {1: entry.header}), *entry.matches,
                ("counter", {NFTA_COUNTER_PACKETS: entry.packets.to_bytes(8, "big")}), *_target(entry, named_at)]))


def _legacy_chain(family: str, table: str, name: str, rules: list[Rule], policy: int | None, counted: int | None) \
        -> Chain:
    hook = _LEGACY_HOOKS[name] if policy is not None else ""
    priority = _NAT_PRIORITIES.get(name, 0) if table == "nat" else _PRIORITIES[table]
    return Chain(LEGACY, family, table, name, hook, priority if hook else 0, "nat" if table == "nat" else "filter",
                 "drop" if policy == -NF_DROP - 1 else "accept", (), rules, counted)


def _target(entry: _Entry, named_at: dict[int, str]) -> "Expressions":
    name, revision, data = entry.target
    if name:
        return [("target", _part(name.encode(), revision, data))]
    verdict = _standard(data)
    if verdict == entry.after:  # a rule without a target
        return []
    if verdict < 0:
        code = {XT_RETURN: NFT_RETURN, -NF_DROP - 1: NF_DROP, -NF_ACCEPT - 1: NF_ACCEPT}.get(verdict, NF_QUEUE)
        return [_verdict(code)]
    flags, goto = (entry.header[82], 0x02) if len(entry.header) == 84 else (entry.header[131], 0x04)  # IP(6)T_F_GOTO
    return [_verdict(NFT_GOTO if flags & goto else NFT_JUMP, named_at.get(verdict, ""))]


def _part(name: bytes, revision: int, data: bytes) -> dict[int, bytes]:
    """Of a match or target, as nf_tables has it: NFTA_MATCH_NAME, NFTA_MATCH_REV, NFTA_MATCH_INFO."""
    return {1: name.split(b"\0")[0] + b"\0", 2: revision.to_bytes(4, "big"), 3: data}


def _standard(data: bytes) -> int:
    return int.from_bytes(data[:4], "little", signed=True)


def _verdict(code: int, chain: str = "") -> "tuple[str, dict[int, bytes]]":
    inner = attribute(NFTA_VERDICT_CODE, code.to_bytes(4, "big", signed=True))
    if chain:
        inner += named(NFTA_VERDICT_CHAIN, chain)
    return "immediate", {NFTA_IMMEDIATE_DREG: NFT_REG_VERDICT,
                         NFTA_IMMEDIATE_DATA: attribute(NFTA_DATA_VERDICT, inner)}
