"""Reads our nf_tables table, by netlink: chains, rules, elements. `libnftables` writes, and `batch` removes.

Source: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h; the enums' names are the kernel's.
"""

from .. import ruleset
from ..cni import FOREIGN_TABLE, CniError
from . import EINVAL, ENOENT, system_error
from .netlink import NETLINK_NETFILTER, Socket, attribute, attributes, named, nested, text

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..ruleset import Element, Owner
    from .expressions import DnatRule

NFPROTO_INET, NFPROTO_IPV4 = 1, 2
NFGENMSG = bytes((NFPROTO_INET, 0, 0, 0))  # family, version, resource
NFT_MSG_GETTABLE, NFT_MSG_GETCHAIN, NFT_MSG_GETRULE, NFT_MSG_GETSET, NFT_MSG_GETSETELEM, NFT_MSG_GETGEN = (
    10 << 8 | message for message in (1, 4, 7, 10, 13, 16))  # NFNL_SUBSYS_NFTABLES
NFTA_GEN_ID = 1
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS = 1, 2
NFT_TABLE_F_DORMANT, NFT_TABLE_F_OWNER = 1, 2
NFTA_CHAIN_TABLE, NFTA_CHAIN_HANDLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK = 1, 2, 3, 4
NFTA_CHAIN_POLICY, NFTA_CHAIN_USE, NFTA_CHAIN_TYPE = 5, 6, 7
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA = 1, 2, 4, 7
NFTA_SET_TABLE, NFTA_SET_NAME = 1, 2
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_USERDATA = 1, 2, 6
NFTA_LIST_ELEM = 1
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CHAIN = 1, 2, 2
NFTNL_UDATA_COMMENT = 0  # of a rule, and of an element
MANY_PORTS = 100  # above, listing all of the maps is quicker than to ask for each element


class Table:
    """One table of the family `inet`. Raises CniError where it cannot be read."""

    def __init__(self, name: str = ruleset.TABLE_NAME) -> None:
        self._name = name
        self._sockets: list[Socket] = []  # all that are open
        self._asked: Socket | None = None  # the one for questions
        self._kept: dict[str, list[tuple[str, str, bytes]]] | None = None  # rules by chain, see `generation`

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
            return self._netlink().dump(kind, body)
        except OSError as error:
            if error.errno == ENOENT and kind == NFT_MSG_GETSETELEM:
                return []
            raise _reading_failed(error) from None

    def generation(self) -> int:
        """The number of the last transaction that changed the ruleset of this host; never 0.

        From here on the rules of a chain are read once, until `Kernel.remove`: where they have changed it is refused.
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

    def handle(self, chain: str) -> int:
        """The chain's handle, which no other chain has had or will have; 0 for no chain."""
        return _handle(self._chain(chain) or {})

    def handles(self) -> dict[str, int]:
        """The handle of each chain of the table that has a name of ours."""
        chains, names = (dict(attributes(answer, 4)) for answer in self._dump(NFT_MSG_GETCHAIN)), _OwnNames()
        return {names[found[NFTA_CHAIN_NAME]]: _handle(found) for found in chains
                if found.get(NFTA_CHAIN_TABLE) == self._name.encode() + b"\0"}

    def references(self, chain: str) -> int:
        """The number of map elements and rules that refer to `chain` (NFTA_CHAIN_USE less its own rules)."""
        use = (self._chain(chain) or {}).get(NFTA_CHAIN_USE, b"")
        return int.from_bytes(use, "big") - len(self.rules(chain))

    # --- rules ---

    def rules(self, chain: str = "") -> list[tuple[str, str, bytes]]:
        """Chain, comment ("" for none) and expressions (raw) of the rules of `chain`, or of the whole table.

        The chain is "" where its name is not of our own grammar.
        """
        if self._kept is None or not chain:
            return self._read_rules(chain)
        if chain not in self._kept:
            self._kept[chain] = self._read_rules(chain)
        return self._kept[chain]

    def _read_rules(self, chain: str) -> list[tuple[str, str, bytes]]:
        body = NFGENMSG + named(NFTA_RULE_TABLE, self._name) + (named(NFTA_RULE_CHAIN, chain) if chain else b"")
        rules, names = (dict(attributes(answer, 4)) for answer in self._dump(NFT_MSG_GETRULE, body)), _OwnNames()
        return [(names[found.get(NFTA_RULE_CHAIN, b"")], _comment(found.get(NFTA_RULE_USERDATA, b"")),
                 found.get(NFTA_RULE_EXPRESSIONS, b"")) for found in rules]

    def comments(self, chain: str) -> list[str]:
        """The comments of a chain's rules, "" for a rule without one."""
        return [comment for _, comment, _ in self.rules(chain)]

    def owner(self, chain: str) -> "Owner":
        """The owner of an attachment's chain."""
        return ruleset.Owner(chain, record_in(self.comments(chain)))

    def owners(self) -> "list[Owner]":
        """The owner of every attachment's chain. Reads the whole table."""
        found: dict[str, list[str]] = {}
        for chain, comment, _ in self.rules():
            if ruleset.is_attachment_chain(chain):
                found.setdefault(chain, []).append(comment)
        return [ruleset.Owner(chain, record_in(comments)) for chain, comments in found.items()]

    def dnat_rules(self, chain: str) -> "list[DnatRule]":
        """The dnat rules of a chain."""
        from .expressions import DnatRule
        found = (DnatRule(raw, self.set_elements) for _, _, raw in self.rules(chain))
        return [rule for rule in found if rule.target]

    def targets(self, chains: "Iterable[str]") -> dict[str, set[bytes]]:
        """The container addresses, packed, that each chain translates to."""
        return {chain: self._targets(chain) for chain in chains}

    def _targets(self, chain: str) -> set[bytes]:
        from .expressions import target_of
        return {target_of(raw) for _, _, raw in self.rules(chain)} - {b""}

    def snapshot(self, chain: str) -> "list[tuple[object, ...]]":
        """A chain in a form that can be compared with the same chain elsewhere: its hook, then each of its rules.

        Counters have no values in it, and anonymous sets their elements in place of their names. A rule for many ports
        that cni-portmap 0.1 wrote is those that are written now.
        """
        from .expressions import expressions, one_port_each
        found = self._chain(chain)
        if found is None:
            return []
        hook = tuple(found.get(kind) for kind in (NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE))
        return [hook, *((comment, *map(self._comparable, rule)) for _, comment, raw in self.rules(chain)
                        for rule in one_port_each([*expressions(raw)], self.set_elements))]

    def _comparable(self, expression: "tuple[str, dict[int, bytes]]") -> tuple[object, ...]:
        name, found = expression
        if name == "counter":
            return (name,)
        if name == "lookup":
            from .expressions import NFTA_LOOKUP_DREG, NFTA_LOOKUP_FLAGS, NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG
            if found[NFTA_LOOKUP_SET].startswith(b"__"):
                return (name, *sorted(self._raw_elements(text(found[NFTA_LOOKUP_SET]))),
                        *(found.get(kind) for kind in (NFTA_LOOKUP_SREG, NFTA_LOOKUP_DREG, NFTA_LOOKUP_FLAGS)))
        return expression

    # --- sets and maps ---

    def has_set(self, name: str) -> bool:
        """Whether the table has a set or map of that name."""
        answer, = self._ask(NFT_MSG_GETSET, NFGENMSG + named(NFTA_SET_TABLE, self._name) + named(NFTA_SET_NAME, name))
        return answer is not None

    def lookup(self, elements: "Iterable[Element]") -> "dict[Element, str]":
        """The chain that each map element leads to, "" for one that is not ours; what does not exist is left out."""
        wanted = [*elements]
        answers, names = self._ask(NFT_MSG_GETSETELEM, *(self._element(name, key) for name, key in wanted)), _OwnNames()
        return {element: names[chain] for element, answer in zip(wanted, answers, strict=True) if answer is not None
                for raw in _list_elements(answer) for _, chain in _verdict(raw)}

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
        found = (dict(attributes(raw)) for raw in self._raw_elements(text(name)))
        return [(_data(each, NFTA_SET_ELEM_KEY), _data(each, NFTA_SET_ELEM_DATA)) for each in found]

    def has_element(self, name: str, key: bytes) -> bool:
        """Whether a set has an element."""
        answer, = self._ask(NFT_MSG_GETSETELEM, self._element(name, key))
        return answer is not None

    def set_comments(self, name: str) -> "list[tuple[bytes, str]]":
        """Key and comment of each element of a set."""
        found = (dict(attributes(raw)) for raw in self._raw_elements(name))
        return [(_data(each, NFTA_SET_ELEM_KEY), _comment(each.get(NFTA_SET_ELEM_USERDATA, b""))) for each in found]

    def _element(self, name: str, key: bytes) -> bytes:
        return NFGENMSG + named(NFTA_SET_ELEM_LIST_TABLE, self._name) + named(NFTA_SET_ELEM_LIST_SET, name) + \
            nested(NFTA_SET_ELEM_LIST_ELEMENTS,
                   nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key))))

    def _verdicts(self, name: str) -> "Iterator[tuple[bytes, bytes]]":
        for raw in self._raw_elements(name):
            for key, chain in _verdict(raw):
                if len(key) != ruleset.KEY_SIZES[name]:
                    raise _reading_failed(OSError(EINVAL, "the map has another type"))
                yield key, chain

    def _raw_elements(self, name: str) -> "Iterator[bytes]":
        body = NFGENMSG + named(NFTA_SET_ELEM_LIST_TABLE, self._name) + named(NFTA_SET_ELEM_LIST_SET, name)
        for answer in self._dump(NFT_MSG_GETSETELEM, body):
            yield from _list_elements(answer)

    # --- what is whose ---

    def elements_wanted_by(self, chain: str) -> "set[Element]":
        """The map elements that could lead to a chain: its rules have something for them."""
        return {element for rule in self.dnat_rules(chain)
                for element in ruleset.elements_for(rule.target, rule.daddr, rule.protocol, rule.ports)}

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
    return system_error("cannot read nf_tables", error)


def _handle(chain: dict[int, bytes]) -> int:
    return int.from_bytes(chain.get(NFTA_CHAIN_HANDLE, b""), "big")


def _list_elements(answer: bytes) -> "Iterator[bytes]":
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
    data = dict(attributes(found.get(NFTA_SET_ELEM_DATA, b"")))
    if key:
        yield key, dict(attributes(data.get(NFTA_DATA_VERDICT, b""))).get(NFTA_VERDICT_CHAIN, b"")


def _comment(userdata: bytes) -> str:
    """The comment among a rule's or an element's user data (libnftnl's own format: type, length, value)."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == NFTNL_UDATA_COMMENT:
            return userdata[at + 2:at + 1 + length].decode(errors="replace")
        at += 2 + length
    return ""


def record_in(comments: "Iterable[str]") -> str:
    """The owner's record at the head of a chain: the comments up to the first rule without one."""
    record = []
    for comment in comments:
        if not comment:
            break
        record.append(comment)
    return "".join(record)
