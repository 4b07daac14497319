"""A table as our processes have written it: fed with the kernel's messages of each transaction, and nothing else.

It is never read from the kernel after a write: a flush in between would empty it for ever. What comes back is the
kernel's own words, so no condition, counter, comment or kind of object can be lost in translation: it knows of no
name in the table but that a chain with a "/" belongs to one owner.

What another process has deleted is `lost`, and stays known; what another has added is not known at all.
Source: include/uapi/linux/netfilter/nf_tables.h; kernel functions nf_tables_fill_rule_info and those beside it.
"""
from collections.abc import Iterator
from struct import Struct

from ..linux.batch import (NFTA_EXPR_DATA, NFTA_EXPR_NAME, NFTA_LOOKUP_SET, NFTA_LOOKUP_SET_ID, NFTA_RULE_POSITION,
                           NFTA_SET_ELEM_LIST_SET_ID, NFTA_SET_ID)
from ..linux.events import (NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, NFT_MSG_NEWTABLE,
                            Message)
from ..linux.netlink import NLM_F_APPEND, NLM_F_CREATE, attribute, attributes, named, nested, text
from ..linux.table import (NFGENMSG, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_LIST_ELEM, NFTA_SET_ELEM_DATA,
                           NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_USERDATA, NFTA_VERDICT_CHAIN,
                           comment_in)
from ..ruleset import LOCALHOST_INTERFACES

NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_DELSET, NFT_MSG_DELSETELEM = (
    10 << 8 | message for message in (2, 5, 8, 11, 14))  # NFNL_SUBSYS_NFTABLES
NFTA_TABLE_HANDLE, NFTA_CHAIN_HANDLE, NFTA_RULE_HANDLE, NFTA_SET_HANDLE = 4, 2, 3, 16
NFTA_CHAIN_NAME, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA = 3, 2, 4, 7
NFTA_SET_NAME, NFTA_SET_FLAGS, NFTA_SET_DATA_TYPE = 2, 3, 6
NFTA_SET_ELEM_FLAGS, NFTA_SET_ELEM_EXPIRATION, NFTA_SET_ELEM_KEY_END = 3, 5, 10
NFTA_SET_ELEM_LIST_SET = 2
NFT_SET_ANONYMOUS = 1
# What is written again of an object: numbers of attributes. The rest is the kernel's (handles, uses).
TABLE_KEPT = frozenset((1, 2, 6))  # NFTA_TABLE_NAME, FLAGS, USERDATA
CHAIN_KEPT = frozenset((1, 3, 4, 5, 7, 10, 12))  # NFTA_CHAIN_TABLE, NAME, HOOK, POLICY, TYPE, FLAGS, USERDATA
RULE_KEPT = frozenset((1, 2, 4, 7))  # NFTA_RULE_TABLE, CHAIN, EXPRESSIONS, USERDATA
# NFTA_SET_TABLE, NAME, FLAGS, KEY_TYPE, KEY_LEN, DATA_TYPE, DATA_LEN, POLICY, DESC, TIMEOUT, GC_INTERVAL, USERDATA,
# OBJ_TYPE, EXPR, EXPRESSIONS
SET_KEPT = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 17, 18))
AT_ONCE = 48 << 10  # bytes of elements in a message: its list ends at 64 KiB

_ATTRIBUTE = Struct("<HH")  # struct nlattr: length and type


def _kept(body: bytes, kept: frozenset[int]) -> bytes:
    """A message's attributes that are written again, each as it is."""
    parts, at, end = [NFGENMSG], 4, len(body)
    while at + 4 <= end:
        size, kind = _ATTRIBUTE.unpack_from(body, at)
        if size < 4:
            break
        size = size + 3 & ~3
        if kind & 0x3fff in kept:
            parts.append(body[at:at + size])
        at += size
    return b"".join(parts)


def _number(found: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), "big")


class Set:
    """A set or map. `handle`: 0 where it is lost; `elements`: by key, raw; `lost`: the keys of those that are.

    `is_map`: whether its elements have data, such as a verdict.
    """

    __slots__ = ("handle", "body", "elements", "lost", "is_map")

    def __init__(self, handle: int, body: bytes, is_map: bool) -> None:
        self.handle, self.body, self.is_map = handle, body, is_map
        self.elements: dict[bytes, bytes] = {}
        self.lost: set[bytes] = set()

    def add(self, body: bytes) -> list[bytes]:
        """Take the elements of a message; their keys."""
        found = dict(elements_in(body))
        self.elements |= found
        self.lost.difference_update(found)
        return [*found]


class Rule:
    """A rule: its message's `body`, and the anonymous sets that only it uses."""

    __slots__ = ("body", "sets")

    def __init__(self, body: bytes, sets: tuple[Set, ...]) -> None:
        self.body, self.sets = body, sets


class Chain:
    """A chain. `handle`: 0 where it is lost; `rules`: by handle, in their order; `lost`: those that are.

    `seen`: where the witness has seen the file of its owner; until then how often it has looked, None for never.
    """

    __slots__ = ("handle", "body", "rules", "lost", "seen")

    def __init__(self, handle: int, body: bytes) -> None:
        self.handle, self.body = handle, body
        self.seen: object = None
        self.rules: dict[int, Rule] = {}
        self.lost: set[int] = set()

    @property
    def first(self) -> int:
        """What `Table.handle` says of it."""
        return next((handle for handle in self.rules if handle not in self.lost), 0)

    @property
    def is_emptied(self) -> bool:
        """Whether all of its rules are lost."""
        return len(self.lost) == len(self.rules)

    def put(self, handle: int, rule: Rule, after: int, is_last: bool) -> None:
        """Put a rule where the kernel has it: after another, at the end, or at the head."""
        same = next((old for old in self.lost if _alike(self.rules[old], rule)), 0)
        if same:  # it is there again, where it was
            self.lost.discard(same)
            self.rules = {handle if old == same else old: rule if old == same else its
                          for old, its in self.rules.items()}
        elif after == next(reversed(self.rules), 0) if after else is_last:
            self.rules[handle] = rule
        else:
            found = [*self.rules.items()]
            at = next((place for place, (old, _) in enumerate(found, 1) if old == after), 0)
            self.rules = dict([*found[:at], (handle, rule), *found[at:]])


class Memory:
    """The table of a name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.changed: set[tuple[str, bytes]] = set()  # see `take_changed`
        self.sets: dict[str, Set] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.handle, self.body = 0, b""  # of the table
        self.changed |= {(name, key) for name, its in self.sets.items() if its.is_map for key in its.elements}
        self.sets = {}
        self.chains: dict[str, Chain] = {}
        self.damaged = False  # whether something was lost since this was last set to False
        # of the transaction that is being applied
        self._healing, self._flags = False, 0
        self._anonymous: dict[bytes, Set] = {}  # until their rule comes
        self._lost_by_owner: dict[str, list[tuple[str, bytes]]] | None = None

    def forget_element(self, name: str, key: bytes) -> None:
        """Forget an element."""
        its = self.sets[name]
        its.lost.discard(key)
        if its.elements.pop(key, None) is not None and its.is_map:
            self.changed.add((name, key))

    def take_changed(self) -> set[tuple[str, bytes]]:
        """The map elements, by set and key, that came, were replaced, or went since the last call."""
        found, self.changed = self.changed, set()
        return found

    def read(self, messages: list[Message]) -> None:
        """Become what the kernel holds."""
        self.clear()
        self.apply(messages, True)

    # --- transactions ---

    def apply(self, messages: list[Message], own: bool, healing: bool = False) -> int:
        """Take in a transaction; of another process, what it deletes is lost. How much of the table that was.

        `healing`: it is one that wrote again what was `missing`.
        """
        deleted, self._healing, self._lost_by_owner = 0, healing, None
        if own:
            self._anonymous = {}
            for kind, self._flags, body in messages:
                take = _OWN.get(kind)
                if take and not (healing and kind in _FOREIGN):  # a heal deletes what others have put in our place
                    take(self, body)
        else:
            for kind, _, body in messages:
                lose = _FOREIGN.get(kind)
                if lose:
                    deleted += lose(self, body)
            self.damaged |= bool(deleted)
        return deleted

    def _new_table(self, body: bytes) -> None:
        self.handle, self.body = _number(dict(attributes(body, 4)), NFTA_TABLE_HANDLE), _kept(body, TABLE_KEPT)

    def _del_table(self, _: bytes) -> None:
        self.clear()

    def _new_set(self, body: bytes) -> None:
        found = dict(attributes(body, 4))
        new = Set(_number(found, NFTA_SET_HANDLE), _kept(body, SET_KEPT), NFTA_SET_DATA_TYPE in found)
        if _number(found, NFTA_SET_FLAGS) & NFT_SET_ANONYMOUS:
            self._anonymous[found[NFTA_SET_NAME]] = new
            return
        name = text(found[NFTA_SET_NAME])
        old = self.sets.get(name)
        if old and old.handle != new.handle:  # it was lost: so its elements still are
            new.elements, new.lost = old.elements, {*old.elements}
        elif old:
            new.elements, new.lost = old.elements, old.lost
        self.sets[name] = new

    def _del_set(self, body: bytes) -> None:
        name = text(dict(attributes(body, 4))[NFTA_SET_NAME])
        for key in [*self.sets[name].elements] if name in self.sets else ():
            self.forget_element(name, key)
        self.sets.pop(name, None)

    def _new_elements(self, body: bytes) -> None:
        name = dict(attributes(body, 4))[NFTA_SET_ELEM_LIST_SET]
        its = self._anonymous.get(name) or self.sets.get(text(name))
        keys = its.add(body) if its else []
        if its and its.is_map and not self._healing and name not in self._anonymous:
            self.changed.update((text(name), key) for key in keys)

    def _del_elements(self, body: bytes) -> None:
        name = text(dict(attributes(body, 4))[NFTA_SET_ELEM_LIST_SET])
        for key, _ in elements_in(body) if name in self.sets else ():
            self.forget_element(name, key)

    def _new_chain(self, body: bytes) -> None:
        found = dict(attributes(body, 4))
        name = text(found[NFTA_CHAIN_NAME])
        new, old = Chain(_number(found, NFTA_CHAIN_HANDLE), _kept(body, CHAIN_KEPT)), self.chains.get(name)
        if old and old.handle == new.handle and not (old.is_emptied and "/" in name):  # it was changed
            new.rules, new.lost, new.seen = old.rules, old.lost, old.seen
        elif old and self._healing:  # all of it follows
            new.seen = old.seen
        elif old and "/" in name:  # an owner comes in place of itself: what it had published before is no more
            self._forget_lost_elements(name)
        elif old:  # what others need of it is still lost; in a new table other rules have those handles
            new.rules = dict(zip(range(-len(old.rules), 0), old.rules.values(), strict=True))
            new.lost = {*new.rules}
        self.chains[name] = new

    def _del_chain(self, body: bytes) -> None:
        self.forget_owner(text(dict(attributes(body, 4))[NFTA_CHAIN_NAME]))

    def forget_owner(self, name: str) -> None:
        """Forget a chain, and lost elements that lead there or name it in their comment."""
        if self.chains.pop(name, None):
            self._forget_lost_elements(name)

    def _forget_lost_elements(self, chain: str) -> None:
        if self._lost_by_owner is None:
            self._lost_by_owner = {}
            for name, its in self.sets.items():
                for key in its.lost if its.handle else its.elements:
                    for owner in owners_of(its.elements[key]):
                        self._lost_by_owner.setdefault(owner, []).append((name, key))
        for name, key in self._lost_by_owner.pop(chain, ()):
            if name in self.sets and (key in self.sets[name].lost or not self.sets[name].handle):
                self.forget_element(name, key)

    def _new_rule(self, body: bytes) -> None:
        found = dict(attributes(body, 4))
        chain = self.chains.get(text(found[NFTA_RULE_CHAIN]))
        if chain is None:
            return
        sets = tuple(self._anonymous.pop(name) for name in _lookups(found.get(NFTA_RULE_EXPRESSIONS, b""))
                     if name in self._anonymous)
        chain.put(_number(found, NFTA_RULE_HANDLE), Rule(_kept(body, RULE_KEPT), sets),
                  _number(found, NFTA_RULE_POSITION), bool(self._flags & NLM_F_APPEND))

    def _del_rule(self, body: bytes) -> None:
        found = dict(attributes(body, 4))
        name = text(found[NFTA_RULE_CHAIN])
        chain = self.chains.get(name)
        if chain:
            chain.rules.pop(_number(found, NFTA_RULE_HANDLE), None)
            chain.lost.discard(_number(found, NFTA_RULE_HANDLE))
            if chain.is_emptied and "/" in name:  # its owner comes in place of itself
                chain.rules.clear()
                chain.lost.clear()
                self._forget_lost_elements(name)

    # --- those of other processes ---

    def _lose_table(self, _: bytes) -> int:
        was = self.handle
        self.handle = 0
        for its in self.sets.values():
            its.handle = 0
        for chain in self.chains.values():
            chain.handle = 0
        return bool(was)

    def _lose_set(self, body: bytes) -> int:
        its = self.sets.get(text(dict(attributes(body, 4))[NFTA_SET_NAME]))
        if not its or not its.handle:
            return 0
        its.handle = 0
        return 1

    def _lose_elements(self, body: bytes) -> int:
        its = self.sets.get(text(dict(attributes(body, 4))[NFTA_SET_ELEM_LIST_SET]))
        if its is None:
            return 0
        gone = {key for key, _ in elements_in(body) if key in its.elements}
        its.lost |= gone
        return len(gone)

    def _lose_chain(self, body: bytes) -> int:
        found = dict(attributes(body, 4))
        chain = self.chains.get(text(found[NFTA_CHAIN_NAME]))
        if not chain or chain.handle != _number(found, NFTA_CHAIN_HANDLE):
            return 0
        chain.handle = 0
        return 1

    def _lose_rule(self, body: bytes) -> int:
        found = dict(attributes(body, 4))
        chain = self.chains.get(text(found[NFTA_RULE_CHAIN]))
        handle = _number(found, NFTA_RULE_HANDLE)
        if not chain or not chain.handle or handle not in chain.rules:
            return 0
        chain.rules[handle].body = _kept(body, RULE_KEPT)  # its last words say what its counter has counted
        chain.lost.add(handle)
        return 1

    # --- what is to be written ---

    def missing(self, shared_only: bool = False) -> "Iterator[Message]":
        """The messages that write again what is lost; `shared_only`: what belongs to no owner."""
        number = iter(range(1, 1 << 31))
        if self.body and not self.handle:
            yield NFT_MSG_NEWTABLE, NLM_F_CREATE, self.body
        for its in self.sets.values():
            if not its.handle:
                yield NFT_MSG_NEWSET, NLM_F_CREATE, its.body + _number_of(NFTA_SET_ID, next(number))
        wanted = {name: chain for name, chain in self.chains.items() if not shared_only or "/" not in name}
        for chain in wanted.values():
            if not chain.handle:
                yield NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain.body
        for chain in wanted.values():
            if not chain.handle:
                for rule in chain.rules.values():
                    yield from _rule(rule, NLM_F_APPEND, 0, number)
            elif chain.lost:
                yield from self._rules_between(chain, number)
        for name, its in self.sets.items():
            if not (shared_only and its.is_map):
                lost = its.elements.values() if not its.handle else [its.elements[key] for key in its.elements
                                                                     if key in its.lost]
                yield from elements_message(self.name, name, [*lost])

    @staticmethod
    def _rules_between(chain: Chain, number: "Iterator[int]") -> "Iterator[Message]":
        """Lost rules among those that are there: each goes after the one that was before it, the last of them first."""
        runs: dict[int, list[Rule]] = {}
        before = 0
        for handle, rule in chain.rules.items():
            if handle in chain.lost:
                runs.setdefault(before, []).append(rule)
            else:
                before = handle
        for before, rules in runs.items():
            for rule in reversed(rules):
                yield from _rule(rule, NLM_F_APPEND if before else 0, before, number)

    def lost_elements(self) -> "Iterator[tuple[str, bytes, bytes]]":
        """Set, key and raw text of each element that is lost, of maps."""
        for name, its in self.sets.items():
            if its.is_map:
                for key in [*(its.lost if its.handle else its.elements)]:
                    yield name, key, its.elements[key]

    def comments(self, chain: str) -> list[str]:
        """The comments of a chain's rules, "" for a rule without one."""
        return [comment_in(dict(attributes(rule.body, 4)).get(NFTA_RULE_USERDATA, b""))
                for rule in self.chains[chain].rules.values()]

    def is_whole(self) -> bool:
        """Whether nothing is lost."""
        return not self.body or (bool(self.handle) and
                                 all(its.handle and not its.lost for its in self.sets.values()) and
                                 all(chain.handle and not chain.lost for chain in self.chains.values()))


def elements_in(body: bytes) -> "Iterator[tuple[bytes, bytes]]":
    """Key and raw text of each element in a message. The key has what makes it one: its end, and if it is one."""
    for kind, listed in attributes(body, 4):
        if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
            for _, raw in attributes(listed):
                found = dict(attributes(raw))
                key = found.get(NFTA_SET_ELEM_KEY, b"") + found.get(NFTA_SET_ELEM_KEY_END, b"") + \
                    found.get(NFTA_SET_ELEM_FLAGS, b"")
                yield key, _kept(NFGENMSG + raw, _ALL_BUT_EXPIRATION)[4:] if NFTA_SET_ELEM_EXPIRATION in found else raw


def owners_of(element: bytes) -> tuple[str, ...]:
    """The chains that an element (raw) leads to, or names in its comment."""
    found = dict(attributes(element))
    data = dict(attributes(found.get(NFTA_SET_ELEM_DATA, b"")))
    chain = dict(attributes(data.get(NFTA_DATA_VERDICT, b""))).get(NFTA_VERDICT_CHAIN)
    comment = comment_in(found.get(NFTA_SET_ELEM_USERDATA, b""))
    return tuple(name for name in (text(chain) if chain else "", comment) if "/" in name)


def noted_in(memory: Memory) -> dict[str, str]:
    """The interfaces that localhost leads through, each with its comment, by a memory of our table."""
    its = memory.sets.get(LOCALHOST_INTERFACES)
    raw = [dict(attributes(each)) for each in its.elements.values()] if its else []
    return {dict(attributes(each[NFTA_SET_ELEM_KEY]))[NFTA_DATA_VALUE].rstrip(b"\0").decode(errors="replace"):
            comment_in(each.get(NFTA_SET_ELEM_USERDATA, b"")) for each in raw}


_ALL_BUT_EXPIRATION = frozenset(range(1, 32)) - {NFTA_SET_ELEM_EXPIRATION}


def elements_message(table: str, name: str, raw: list[bytes], set_id: int = 0) -> "Iterator[Message]":
    """The messages that write elements of a set, as few as can be; `set_id`: of one that has no name yet."""
    head = NFGENMSG + named(1, table) + named(NFTA_SET_ELEM_LIST_SET, name) + \
        (_number_of(NFTA_SET_ELEM_LIST_SET_ID, set_id) if set_id else b"")
    part: list[bytes] = []
    size = 0
    for each in raw:
        part.append(nested(NFTA_LIST_ELEM, each))
        size += len(part[-1])
        if size > AT_ONCE:
            yield NFT_MSG_NEWSETELEM, NLM_F_CREATE, head + nested(NFTA_SET_ELEM_LIST_ELEMENTS, *part)
            part, size = [], 0
    if part:
        yield NFT_MSG_NEWSETELEM, NLM_F_CREATE, head + nested(NFTA_SET_ELEM_LIST_ELEMENTS, *part)


def _number_of(kind: int, number: int) -> bytes:
    return attribute(kind, number.to_bytes(4, "big"))


ANONYMOUS = "__set%d"  # the kernel puts a number in


def _rule(rule: Rule, flags: int, after: int, number: "Iterator[int]") -> "Iterator[Message]":
    """The messages that write a rule, its anonymous sets first: those have a number until the kernel names them."""
    body = rule.body
    if rule.sets:
        numbers: dict[bytes, int] = {}
        for its in rule.sets:
            found = dict(attributes(its.body, 4))
            set_id = numbers[found[NFTA_SET_NAME]] = next(number)
            table = text(found[1])
            its_body = _kept(its.body, SET_KEPT - {NFTA_SET_NAME}) + named(NFTA_SET_NAME, ANONYMOUS)
            yield NFT_MSG_NEWSET, NLM_F_CREATE, its_body + _number_of(NFTA_SET_ID, set_id)
            yield from elements_message(table, ANONYMOUS, [*its.elements.values()], set_id)
        parts = dict(attributes(body, 4))
        body = _kept(body, RULE_KEPT - {NFTA_RULE_EXPRESSIONS}) + \
            nested(NFTA_RULE_EXPRESSIONS, *(_renumbered(each, numbers) for _, each in
                                            attributes(parts[NFTA_RULE_EXPRESSIONS])))
    if after:
        body += attribute(NFTA_RULE_POSITION, after.to_bytes(8, "big"))
    yield NFT_MSG_NEWRULE, NLM_F_CREATE | flags, body


def _renumbered(expression: bytes, numbers: dict[bytes, int]) -> bytes:
    """An expression, raw; where it looks up an anonymous set, by its number."""
    found = dict(attributes(expression))
    data = dict(attributes(found.get(NFTA_EXPR_DATA, b"")))
    number = numbers.get(data.get(NFTA_LOOKUP_SET, b"")) if found.get(NFTA_EXPR_NAME) == b"lookup\0" else None
    if number is None:
        return nested(NFTA_LIST_ELEM, expression)
    rest = (attribute(kind, value) for kind, value in data.items() if kind != NFTA_LOOKUP_SET)
    return nested(NFTA_LIST_ELEM, named(NFTA_EXPR_NAME, "lookup"),
                  nested(NFTA_EXPR_DATA, named(NFTA_LOOKUP_SET, ANONYMOUS), *rest,
                         _number_of(NFTA_LOOKUP_SET_ID, number)))


def _lookups(raw: bytes) -> "Iterator[bytes]":
    """The names of the anonymous sets that a rule's expressions look up."""
    if b"lookup\0" in raw:
        for _, expression in attributes(raw):
            found = dict(attributes(expression))
            if found.get(NFTA_EXPR_NAME) == b"lookup\0":
                yield dict(attributes(found.get(NFTA_EXPR_DATA, b""))).get(NFTA_LOOKUP_SET, b"")


def _alike(one: Rule, other: Rule) -> bool:
    """Whether two rules differ in nothing but their counters and anonymous names. By comment, where they have one."""
    return one.body == other.body or _without_counters(one) == _without_counters(other)


def _without_counters(rule: Rule) -> tuple[object, ...]:
    found = dict(attributes(rule.body, 4))
    its = []
    for _, expression in attributes(found.get(NFTA_RULE_EXPRESSIONS, b"")):
        data = dict(attributes(expression))
        if data.get(NFTA_EXPR_NAME) == b"counter\0":
            its.append(b"counter")
        elif data.get(NFTA_EXPR_NAME) == b"lookup\0" and rule.sets:
            its.append(b"lookup")
        else:
            its.append(expression)
    return (found.get(NFTA_RULE_USERDATA), *its, *(tuple(sorted(each.elements)) for each in rule.sets))


_OWN = {NFT_MSG_NEWTABLE: Memory._new_table, NFT_MSG_DELTABLE: Memory._del_table,
        NFT_MSG_NEWSET: Memory._new_set, NFT_MSG_DELSET: Memory._del_set,
        NFT_MSG_NEWSETELEM: Memory._new_elements, NFT_MSG_DELSETELEM: Memory._del_elements,
        NFT_MSG_NEWCHAIN: Memory._new_chain, NFT_MSG_DELCHAIN: Memory._del_chain,
        NFT_MSG_NEWRULE: Memory._new_rule, NFT_MSG_DELRULE: Memory._del_rule}
_FOREIGN = {NFT_MSG_DELTABLE: Memory._lose_table, NFT_MSG_DELSET: Memory._lose_set,
            NFT_MSG_DELSETELEM: Memory._lose_elements, NFT_MSG_DELCHAIN: Memory._lose_chain,
            NFT_MSG_DELRULE: Memory._lose_rule}
