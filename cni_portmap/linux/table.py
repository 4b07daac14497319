"""Reads our nf_tables table, by netlink: chains, rules, elements. `libnftables` writes, and `batch` removes.

Source: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h; the enums' names are the kernel's.
"""

from .. import ruleset
from ..cni import FOREIGN_TABLE, TRY_AGAIN_LATER, CniError
from . import EINTR, EINVAL, ENOENT, system_error
from .netlink import NETLINK_NETFILTER, NLM_F_DUMP, Socket, attribute, attributes, named, nested, text

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..ruleset import Element, Member, Owner
    from .expressions import DnatRule

    Rule = tuple[str, str, bytes, int]  # chain, comment ("" for none), expressions (raw), handle

NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
NFGENMSG = bytes((NFPROTO_INET, 0, 0, 0))  # family, version, resource
NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN, NFT_MSG_GETRULE, NFT_MSG_GETSET, NFT_MSG_GETSETELEM, NFT_MSG_GETGEN = (
    10 << 8 | message for message in (1, 4, 7, 10, 13, 16))  # NFNL_SUBSYS_NFTABLES
NFTA_GEN_ID = 1
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS = 1, 2
NFT_TABLE_F_DORMANT, NFT_TABLE_F_OWNER = 1, 2
NFTA_CHAIN_TABLE, NFTA_CHAIN_HANDLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK = 1, 2, 3, 4
NFTA_CHAIN_POLICY, NFTA_CHAIN_USE, NFTA_CHAIN_TYPE = 5, 6, 7
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_HANDLE, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA = 1, 2, 3, 4, 7
NFTA_SET_TABLE, NFTA_SET_NAME = 1, 2
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_USERDATA, NFTA_SET_ELEM_KEY_END = 1, 2, 6, 10
NFTA_LIST_ELEM = 1
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CHAIN = 1, 2, 2
NFTNL_UDATA_COMMENT = 0  # of a rule, and of an element
_OF_A_RULE = "__", "c/"  # begin the names of sets without one of their own, and of an attachment's maps of ports
MANY_PORTS = 100  # above, listing all of the maps is quicker than to ask for each element


class Table:
    """One table of the family `inet`. Raises CniError where it cannot be read."""

    def __init__(self, name: str = ruleset.TABLE_NAME) -> None:
        self._name = name
        self._sockets: list[Socket] = []  # all that are open
        self._asked: Socket | None = None  # the one for questions
        self._kept: dict[str, list[Rule]] | None = None  # by chain, see `generation`

    # --- asking ---

    def _netlink(self) -> Socket:
        if self._asked is None:
            self._asked = self.open_socket()
        return self._asked

    def open_socket(self) -> Socket:
        """A socket of NETLINK_NETFILTER that is open until `close`."""
        self._sockets.append(Socket(NETLINK_NETFILTER))
        return self._sockets[-1]

    def close(self) -> None:
        """Close what was opened; the next question opens it again."""
        self._asked = None
        while self._sockets:
            self._sockets.pop().close()

    def _ask(self, kind: int, *bodies: bytes) -> list[bytes | None]:
        """One answer for each message, None where there is nothing of that name."""
        try:
            return self._netlink().ask_each(kind, bodies)
        except OSError as error:
            raise _reading_failed(error) from None

    def _dump(self, kind: int, body: bytes = NFGENMSG) -> list[bytes]:
        """All objects of a kind; none where the set or table that was named does not exist."""
        try:
            netlink = self._netlink()
            return dump_elements(netlink, body) if kind == NFT_MSG_GETSETELEM else netlink.dump(kind, body)
        except OSError as error:
            if error.errno == ENOENT and kind == NFT_MSG_GETSETELEM:
                return []
            raise _reading_failed(error) from None

    def generation(self) -> int:
        """The number of the last transaction that changed the ruleset of this host; never 0.

        From here on the rules of a chain are read once, until `Kernel.write`: where they have changed it is refused.
        """
        self._kept = {}
        answer, = self._ask(NFT_MSG_GETGEN, bytes(4))
        return int.from_bytes(dict(attributes(answer or b"", 4)).get(NFTA_GEN_ID, b""), "big")

    # --- the table ---

    def has_table(self) -> bool:
        """Whether the table is there."""
        return self._flags() is not None

    def is_dormant(self) -> bool:
        """Whether somebody put the table to sleep: `add table inet cni_portmap { flags dormant; }`."""
        return bool((self._flags() or 0) & NFT_TABLE_F_DORMANT)

    def is_owned(self) -> bool:
        """Whether another program owns the table; False where that cannot be read."""
        try:
            return bool((self._flags() or 0) & NFT_TABLE_F_OWNER)
        except CniError:
            return False

    def _flags(self) -> int | None:
        """The table's flags (enum nft_table_flags), None where there is no such table."""
        answer, = self._ask(NFT_MSG_GETTABLE, NFGENMSG + named(NFTA_TABLE_NAME, self._name))
        if answer is None:
            return None
        return int.from_bytes(dict(attributes(answer, 4)).get(NFTA_TABLE_FLAGS, b"\0"), "big")

    # --- chains ---

    def _chain(self, chain: str) -> dict[int, bytes] | None:
        """A chain's attributes (enum nft_chain_attributes), None where there is no such chain."""
        answer, = self._ask(NFT_MSG_GETCHAIN, NFGENMSG + named(NFTA_CHAIN_TABLE, self._name) +
                            named(NFTA_CHAIN_NAME, chain))
        return None if answer is None else dict(attributes(answer, 4))

    def has_chain(self, chain: str) -> bool:
        """Whether the table has such a chain."""
        return self._chain(chain) is not None

    def is_empty(self, chain: str) -> bool:
        """Whether the table has such a chain, without rules, and without references to it: by one look."""
        found = self._chain(chain)
        return found is not None and not any(found.get(NFTA_CHAIN_USE, b""))

    def hook(self, chain: str) -> tuple[str, int, int] | None:
        """Type, hook and priority of a chain, see `ruleset.hook_of`; None where it hangs on no hook."""
        found = self._chain(chain) or {}
        if NFTA_CHAIN_HOOK not in found:
            return None
        hook = dict(attributes(found[NFTA_CHAIN_HOOK]))
        number, priority = (int.from_bytes(hook.get(kind, b""), "big", signed=True) for kind in (1, 2))
        return text(found.get(NFTA_CHAIN_TYPE, b"")), number, priority  # NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY

    def handle(self, chain: str) -> int:
        """The handle of a chain's first rule as it is now, see `Owner`; 0 for none."""
        return next((handle for *_, handle in self._read_rules(chain)), 0)

    def references(self, chain: str) -> int:
        """The number of map elements and rules that refer to `chain` (NFTA_CHAIN_USE less its own rules)."""
        use = (self._chain(chain) or {}).get(NFTA_CHAIN_USE, b"")
        return int.from_bytes(use, "big") - len(self.rules(chain))

    # --- rules ---

    def rules(self, chain: str = "") -> "list[Rule]":
        """The rules of `chain`, or of the whole table.

        The chain is "" where its name is not of our own grammar.
        """
        if self._kept is None or not chain:
            return self._read_rules(chain)
        if chain not in self._kept:
            self._kept[chain] = self._read_rules(chain)
        return self._kept[chain]

    def rule_attributes(self, chain: str) -> list[dict[int, bytes]]:
        """The attributes (enum nft_rule_attributes) of each rule of `chain`, or of the whole table."""
        body = NFGENMSG + named(NFTA_RULE_TABLE, self._name) + (named(NFTA_RULE_CHAIN, chain) if chain else b"")
        return [dict(attributes(answer, 4)) for answer in self._dump(NFT_MSG_GETRULE, body)]

    def _read_rules(self, chain: str) -> "list[Rule]":
        rules, names = self.rule_attributes(chain), _OwnNames()
        return [(names[found.get(NFTA_RULE_CHAIN, b"")], comment_in(found.get(NFTA_RULE_USERDATA, b"")),
                 found.get(NFTA_RULE_EXPRESSIONS, b""), int.from_bytes(found.get(NFTA_RULE_HANDLE, b""), "big"))
                for found in rules]

    def comments(self, chain: str) -> list[str]:
        """The comments of a chain's rules, "" for a rule without one."""
        return [comment for _, comment, *_ in self.rules(chain)]

    def owner(self, chain: str) -> "Owner":
        """The owner of an attachment's chain."""
        return owner_in(chain, self.rules(chain))

    def owners(self) -> "list[Owner]":
        """The owner of every attachment's chain. Reads the whole table."""
        found: dict[str, list[Rule]] = {}
        for rule in self.rules():
            if ruleset.is_attachment_chain(rule[0]):
                found.setdefault(rule[0], []).append(rule)
        return [owner_in(*item) for item in found.items()]

    def dnat_rules(self, chain: str) -> "list[DnatRule]":
        """The dnat rules of a chain."""
        from .expressions import dnat_rules
        rules = (rule for _, _, raw, _ in self.rules(chain) for rule in dnat_rules(raw, self.set_elements))
        return [rule for rule in rules if rule.target]

    def targets(self, chains: "Iterable[str]") -> dict[str, set[bytes]]:
        """The container addresses, packed, that each chain translates to."""
        return {chain: self._targets(chain) for chain in chains}

    def _targets(self, chain: str) -> set[bytes]:
        from .expressions import target_of
        return {target_of(raw) for _, _, raw, _ in self.rules(chain)} - {b""}

    def snapshot(self, chain: str, each_port: bool = False) -> "list[tuple[object, ...]]":
        """A chain in a form that can be compared with the same chain elsewhere: its hook, then each of its rules.

        Counters have no values in it, sets and maps of a rule have their elements in place of names, and a range is two
        comparisons, as libnftables 1.0 writes it. `each_port`: a rule for many ports is a rule for each; that of
        cni-portmap 0.1 had another form.
        """
        from .expressions import expressions, one_port_each
        found = self._chain(chain)
        if found is None:
            return []
        hook = tuple(found.get(kind) for kind in (NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE))
        rules = ((comment, rule) for _, comment, raw, _ in self.rules(chain) for rule in (
            one_port_each([*expressions(raw)], self.set_elements) if each_port else [expressions(raw)]))
        return [hook, *((comment, *(part for each in rule for part in self._comparable(each)))
                        for comment, rule in rules)]

    def _comparable(self, expression: "tuple[str, dict[int, bytes]]") -> "Iterator[tuple[object, ...]]":
        from .expressions import NFTA_LOOKUP_DREG, NFTA_LOOKUP_FLAGS, NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG, comparisons
        name, found = expression
        if name == "counter":
            yield (name,)
        elif name == "lookup" and text(found[NFTA_LOOKUP_SET]).startswith(_OF_A_RULE):
            yield (name, *sorted(self.raw_elements(text(found[NFTA_LOOKUP_SET]))),
                   *(found.get(kind) for kind in (NFTA_LOOKUP_SREG, NFTA_LOOKUP_DREG, NFTA_LOOKUP_FLAGS)))
        elif name == "range":
            yield from comparisons(found) or [expression]
        else:
            yield expression

    # --- sets and maps ---

    def has_set(self, name: str) -> bool:
        """Whether the table has a set or map of that name."""
        return self.set_attributes(name) is not None

    def set_attributes(self, name: str) -> dict[int, bytes] | None:
        """The attributes of a set or map (enum nft_set_attributes), None where there is no such set."""
        answer, = self._ask(NFT_MSG_GETSET, NFGENMSG + named(NFTA_SET_TABLE, self._name) + named(NFTA_SET_NAME, name))
        return None if answer is None else dict(attributes(answer, 4))

    def port_maps(self, chains: "Iterable[str]") -> list[str]:
        """The names of the maps of ports that are there of these chains."""
        found, chains, number = [], [*chains], 1
        while chains:
            names = [ruleset.port_map_of(chain, number) for chain in chains]
            there = self._ask(NFT_MSG_GETSET, *(NFGENMSG + named(NFTA_SET_TABLE, self._name) +
                                                named(NFTA_SET_NAME, name) for name in names))
            found += [name for name, answer in zip(names, there, strict=True) if answer is not None]
            chains = [chain for chain, answer in zip(chains, there, strict=True) if answer is not None]
            number += 1
        return found

    def lookup(self, elements: "Iterable[Element]") -> "dict[Element, str]":
        """The chain that each map element leads to, "" for one that is not ours; what does not exist is left out."""
        wanted = [*elements]
        if len(wanted) > MANY_PORTS:
            listed: dict[Element, str] = {}
            for name in ruleset.MAPS:
                its = {element for element in wanted if element[0] == name}
                few = self._few_elements(name, len(its)) if its else {}
                listed |= few if few is not None else self._lookup([*its])
            return {element: listed[element] for element in wanted if element in listed}
        return self._lookup(wanted)

    def _few_elements(self, name: str, most: int) -> "dict[Element, str] | None":
        """All elements of a map; None where it has more than `most`, and it is quicker to ask for each."""
        netlink, names = self.open_socket(), _OwnNames()
        found: dict[Element, str] = {}
        listed = 0
        try:
            for answer in netlink.stream(NFT_MSG_GETSETELEM, self._list_of(name), NLM_F_DUMP):
                some = {(name, key): names[chain] for key, chain in self._verdicts(name, list_elements(answer))}
                found |= some
                listed += len(some)
                if len(found) > most or len(found) < listed:  # one came twice: see dump_elements
                    return None
        except OSError as error:
            return {} if error.errno == ENOENT else None
        finally:
            self._sockets.remove(netlink)
            netlink.close()
        return found

    def _lookup(self, wanted: "list[Element]") -> "dict[Element, str]":
        answers, names = self._ask(NFT_MSG_GETSETELEM, *(self._element(name, key) for name, key in wanted)), _OwnNames()
        return {element: names[chain] for element, answer in zip(wanted, answers, strict=True) if answer is not None
                for raw in list_elements(answer) for _, chain in _verdict(raw)}

    def elements(self) -> "list[tuple[Element, str]]":
        """All map elements, each with the chain that it leads to, "" for one that is not ours."""
        names = _OwnNames()
        return [((name, key), names[chain]) for name in ruleset.MAPS for key, chain in self._verdicts(name)]

    def owners_of_port(self, name: str, endings: "Iterable[bytes]") -> list[tuple[str, bytes]]:
        """Chain and ending of each element of a map whose key ends like one of `endings` (protocol and port)."""
        wanted, names = frozenset(endings), _OwnNames()
        return [(names[chain], key[ruleset.PROTOCOL_AND_PORT]) for key, chain in self._verdicts(name)
                if key[ruleset.PROTOCOL_AND_PORT] in wanted]

    def set_elements(self, name: bytes) -> "list[tuple[bytes, bytes]]":
        """Key and value of each element of a set or map (a name as the kernel has it)."""
        found = (dict(attributes(raw)) for raw in self.raw_elements(text(name)))
        return [(_data(each, NFTA_SET_ELEM_KEY), _data(each, NFTA_SET_ELEM_DATA)) for each in found]

    def has_element(self, name: str, key: bytes) -> bool:
        """Whether a set has an element."""
        answer, = self._ask(NFT_MSG_GETSETELEM, self._element(name, key))
        return answer is not None

    def set_comments(self, name: str) -> "list[tuple[bytes, str]]":
        """Key and comment of each element of a set."""
        found = (dict(attributes(raw)) for raw in self.raw_elements(name))
        return [(_data(each, NFTA_SET_ELEM_KEY), comment_in(each.get(NFTA_SET_ELEM_USERDATA, b""))) for each in found]

    def members(self, name: str) -> "list[tuple[Member, str]]":
        """All elements of a set of `exposure`, each with its comment; none where there is no such set."""
        found, names = (dict(attributes(raw)) for raw in self.raw_elements(name)), _OwnNames()
        return [((name, _data(each, NFTA_SET_ELEM_KEY), _data(each, NFTA_SET_ELEM_KEY_END),
                  names[chain] if (chain := _chain_in(each)) else _data(each, NFTA_SET_ELEM_DATA)),
                 comment_in(each.get(NFTA_SET_ELEM_USERDATA, b""))) for each in found]

    def element_comments(self, elements: "Iterable[Element]") -> "dict[Element, str]":
        """The comment of each element of a set or map; what does not exist is left out."""
        wanted = [*elements]
        answers = self._ask(NFT_MSG_GETSETELEM, *(self._element(*element) for element in wanted))
        return {element: comment_in(dict(attributes(raw)).get(NFTA_SET_ELEM_USERDATA, b""))
                for element, answer in zip(wanted, answers, strict=True) if answer is not None
                for raw in list_elements(answer)}

    def _element(self, name: str, key: bytes) -> bytes:
        return NFGENMSG + named(NFTA_SET_ELEM_LIST_TABLE, self._name) + named(NFTA_SET_ELEM_LIST_SET, name) + \
            nested(NFTA_SET_ELEM_LIST_ELEMENTS,
                   nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key))))

    def _verdicts(self, name: str, elements: "Iterable[bytes] | None" = None) -> "Iterator[tuple[bytes, bytes]]":
        for raw in self.raw_elements(name) if elements is None else elements:
            for key, chain in _verdict(raw):
                if len(key) != ruleset.KEY_SIZES[name]:
                    raise _reading_failed(OSError(EINVAL, "the map has another type"))
                yield key, chain

    def raw_elements(self, name: str) -> "Iterator[bytes]":
        """The elements of a set or map, each raw (enum nft_set_elem_attributes)."""
        for answer in self._dump(NFT_MSG_GETSETELEM, self._list_of(name)):
            yield from list_elements(answer)

    def _list_of(self, name: str) -> bytes:
        return NFGENMSG + named(NFTA_SET_ELEM_LIST_TABLE, self._name) + named(NFTA_SET_ELEM_LIST_SET, name)

    # --- what is whose ---

    def elements_wanted_by(self, chain: str) -> "dict[Element, bool]":
        """The map elements that could lead to a chain: its rules have something for them.

        Each with whether it surely does: it is of every address, and a rule without any address has made it.
        """
        found: dict[Element, bool] = {}
        for rule in self.dnat_rules(chain):
            for element in ruleset.elements_for(rule.target, rule.daddr, rule.protocol, rule.ports):
                found[element] = found.get(element, False) or not rule.daddr
        return found

    def owned_elements(self, chains: "Iterable[str]") -> "list[tuple[Element, str]]":
        """The map elements that lead to one of `chains`, each with its chain: what they own."""
        owned = []
        unknown = set()
        for chain in chains:
            references = self.references(chain)
            found = self.lookup(self.elements_wanted_by(chain)) if references <= MANY_PORTS else {}
            its = [(element, chain) for element, its_chain in found.items() if its_chain == chain]
            owned += its
            if len(its) != references:  # many, or the chain's rules do not tell: the maps do
                unknown.add(chain)
        if unknown:
            owned = [item for item in owned if item[1] not in unknown]
            owned += [item for item in self.elements() if item[1] in unknown]
        return owned


def translations() -> "Iterator[tuple[str, str, bytes]]":
    """Table, chain and expressions (raw) of the rules of every table that may translate IPv4 (families ip and inet)."""
    netlink = Socket(NETLINK_NETFILTER)
    try:
        for answer in netlink.dump(NFT_MSG_GETRULE, bytes(4)):
            if answer[0] in (NFPROTO_INET, NFPROTO_IPV4):
                found = dict(attributes(answer, 4))
                yield text(found.get(NFTA_RULE_TABLE, b"")), text(found.get(NFTA_RULE_CHAIN, b"")), \
                    found.get(NFTA_RULE_EXPRESSIONS, b"")
    finally:
        netlink.close()


def _reading_failed(error: OSError) -> CniError:
    if error.errno == EINVAL:
        return CniError(FOREIGN_TABLE, f"table {ruleset.TABLE} has a foreign set or map",
                        f"the maps of this plugin are {', '.join(ruleset.MAPS)}; see: nft list table {ruleset.TABLE}")
    if error.errno == EINTR:
        return CniError(TRY_AGAIN_LATER, "cannot read nf_tables: it kept changing",
                        "no changes were made; see who changes it: nft monitor")
    return system_error("cannot read nf_tables", error)


def dump_elements(netlink: "Socket", body: bytes, key: "Callable[[bytes], object]" = bytes) -> list[bytes]:
    """The bodies of the messages that list a set's elements; asked again where one element is listed twice.

    Then others were left out: while the kernel's hash table grows, some milliseconds after a large transaction, each
    part of a dump skips as many as there were before it, in another order. `key` tells elements apart, by default all
    of one. Raises OSError. Source: kernel function nft_rhash_walk.
    """
    for _ in range(100):
        answers = netlink.dump(NFT_MSG_GETSETELEM, body)
        if len(answers) == 1:
            return answers
        found = [key(element) for answer in answers for element in list_elements(answer)]
        if len({*found}) == len(found):
            return answers
    raise OSError(EINTR, "the elements kept changing during the dump")


def list_elements(answer: bytes) -> "Iterator[bytes]":
    """The elements in a message that lists some, each raw (enum nft_set_elem_attributes)."""
    for kind, found in attributes(answer, 4):
        if kind == NFTA_SET_ELEM_LIST_ELEMENTS:
            for _, element in attributes(found):
                yield element


def _data(element: dict[int, bytes], kind: int) -> bytes:
    return dict(attributes(element.get(kind, b""))).get(NFTA_DATA_VALUE, b"")


class _OwnNames(dict[bytes, str]):
    """Names of chains as the kernel has them -> the same as text; "" for those that are not of our own grammar."""

    def __missing__(self, raw: bytes) -> str:
        name = text(raw)
        self[raw] = name if ruleset.is_own_chain(name) else ""
        return self[raw]


def _verdict(element: bytes) -> "Iterator[tuple[bytes, bytes]]":
    """Key and chain of a verdict map's element; none for a catch-all element, which has no key."""
    found = dict(attributes(element))
    key = _data(found, NFTA_SET_ELEM_KEY)
    if key:
        yield key, _chain_in(found)


def _chain_in(element: dict[int, bytes]) -> bytes:
    """The chain that an element leads to, as the kernel has it; b"" for one without a verdict."""
    data = dict(attributes(element.get(NFTA_SET_ELEM_DATA, b"")))
    return dict(attributes(data.get(NFTA_DATA_VERDICT, b""))).get(NFTA_VERDICT_CHAIN, b"")


def comment_in(userdata: bytes) -> str:
    """The comment among a rule's or an element's user data (libnftnl's own format: type, length, value)."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == NFTNL_UDATA_COMMENT:
            return userdata[at + 2:at + 1 + length].decode(errors="replace")
        at += 2 + length
    return ""


def owner_in(chain: str, rules: "Iterable[Rule]") -> "Owner":
    """The owner of an attachment's chain with these rules."""
    rules = [*rules]
    return ruleset.Owner(chain, record_in(comment for _, comment, *_ in rules), rules[0][3] if rules else 0)


def record_in(comments: "Iterable[str]") -> str:
    """The owner's record at the head of a chain: comments as long as may be, and the first that is shorter."""
    record = []
    for comment in comments:
        if not comment or ruleset.is_comment_of_rule(comment):
            break
        record.append(comment)
        if len(comment) < ruleset.COMMENT_MAX:
            break
    return "".join(record)
