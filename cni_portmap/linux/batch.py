"""A transaction that removes, by netlink: DEL, GC, and an ADD that replaces need no libnftables for it.

For a deletion libnftables lists every set of the host: with somebody's large one that takes seconds
(nftables-geoip#8), and one that another version has written may end the process (kubernetes#136786). What comes in the
same transaction has been written elsewhere, as nft text, and is copied as the kernel has it there.

Source: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h; kernel function nfnetlink_rcv_batch.
"""
from .. import ruleset
from .netlink import (NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLMSG_ERROR, Socket, attribute, attributes, error_of,
                      named, nested, text)
from .table import (NFGENMSG, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_LIST_ELEM,
                    NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_HANDLE, NFTA_RULE_TABLE, NFTA_RULE_USERDATA,
                    NFTA_SET_ELEM_DATA, NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_KEY_END, NFTA_SET_ELEM_LIST_ELEMENTS,
                    NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_USERDATA, NFTA_SET_NAME,
                    NFTA_SET_TABLE, NFTA_TABLE_NAME, NFTA_VERDICT_CHAIN, NFTNL_UDATA_COMMENT)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from ..ruleset import Change, Element, Member
    from .table import Table

    Command = tuple[int, int, bytes, str]  # type, flags and body of a message, and what it does, for errors

NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID = 16, 17, 1
NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_DELCHAIN, NFT_MSG_NEWRULE, NFT_MSG_DELRULE, NFT_MSG_NEWSET, \
    NFT_MSG_DELSET, NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM = (
        10 << 8 | message for message in (2, 3, 5, 6, 8, 9, 11, 12, 14))  # NFNL_SUBSYS_NFTABLES
_BATCH = bytes((0, 0, 0, 10))  # nfgenmsg: no family, and the subsystem as resource
NLM_F_EXCL = 0x200
NFTA_VERDICT_CODE, NFT_JUMP, NFT_GOTO, NFT_CONTINUE = 1, -3, -4, -1
NFTA_EXPR_NAME, NFTA_EXPR_DATA, NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA = 1, 2, 1, 2
NFT_REG_VERDICT = 0
NFTA_RULE_POSITION = 6
NFTA_SET_KEY_LEN, NFTA_SET_DATA_LEN = 5, 7
NFTA_SET_ID, NFTA_SET_ELEM_LIST_SET_ID, NFTA_LOOKUP_SET, NFTA_LOOKUP_SET_ID = 10, 4, 1, 4
# What makes a set what it is: flags, types and lengths of key and data, policy, description, user data, expressions.
_SET_ATTRIBUTES = (3, 4, 5, 6, 7, 8, 9, 13)
_ELEMENT_ATTRIBUTES = (1, 2, 3, 6, 10)  # key, data, flags, user data, end of the key's range
ANONYMOUS = b"__set%d\0"  # the kernel gives it its number
LIST_MAX = 60000  # bytes of elements in a message: an attribute ends at 64 KiB
_COUNTER, _LOOKUP = (named(NFTA_EXPR_NAME, name) for name in ("counter", "lookup"))  # begin such an expression


def commands(generation: int, change: "Change", created: "Iterable[Command]" = (),
             kept: "Container[str]" = ()) -> "list[Command]":
    """The messages of a change, see `Kernel.write`. An element goes before the chain that it leads to.

    `created`: those of `copies`, for the rules that it has. `kept`: of the chains that go and come again, those that
    get other rules, and keep what leads there. So a packet meets the old rules or the new ones: one that was under way
    before the commit would find a new chain empty (kernel function nft_do_chain: its generation is that of its start).
    Elements that stay are added all the same, for somebody may have deleted them meanwhile.
    """
    forgotten = [(ruleset.LOCALHOST_INTERFACES, ruleset.key_of_interface(name)) for name in change.forgotten]
    staying = {element for element, chain in change.elements.items()
               if chain in kept and change.leads.get(element) == chain}
    members = {member for member, comment in change.removed.items() if change.created.get(member) == comment and
               (not isinstance(member[3], str) or member[3] in kept)}
    going = [element for element in change.elements if element not in staying]
    found = [begin(generation),
             *_elements(NFT_MSG_DELSETELEM, 0, [*going, *forgotten], "delete element"),
             *_members(NFT_MSG_DELSETELEM, 0, {member: "" for member in change.removed if member not in members},
                       "delete element"),
             *(_chain(NFT_MSG_DELCHAIN, 0, chain, "delete") for chain in change.chains if chain not in kept),
             *(_delete_map(name) for name in change.maps if name.rpartition("/")[0] not in kept), *created]
    for chain in dict.fromkeys(change.leads.values()):
        its = [element for element, its_chain in change.leads.items() if its_chain == chain]
        for flags, stays in (NLM_F_CREATE, True), (NLM_F_CREATE | NLM_F_EXCL, False):
            some = [element for element in its if (element in staying) == stays]
            found += _elements(NFT_MSG_NEWSETELEM, flags, some, "create element",
                               nested(NFTA_SET_ELEM_DATA, _verdict(NFT_GOTO, named(NFTA_VERDICT_CHAIN, chain))))
    for name, comment in change.interfaces.items():
        element = ruleset.LOCALHOST_INTERFACES, ruleset.key_of_interface(name)
        found += _elements(NFT_MSG_NEWSETELEM, NLM_F_CREATE, [element], "add element",
                           attribute(NFTA_SET_ELEM_USERDATA, _comment(comment)))
    for flags, stays in (NLM_F_CREATE, True), (NLM_F_CREATE | NLM_F_EXCL, False):
        comments = {member: comment for member, comment in change.created.items() if (member in members) == stays}
        found += _members(NFT_MSG_NEWSETELEM, flags, comments, "create element")
    found += (_delete_rule(chain, handle.to_bytes(8, "big")) for chain, handle in change.stale_notes)
    return [*found, *(_note(*note) for note in change.notes), END]


def begin(generation: int) -> "Command":
    """The first message of a transaction: where the ruleset is not of this generation (0: any), nothing is done."""
    return NFNL_MSG_BATCH_BEGIN, 0, _BATCH + attribute(NFNL_BATCH_GENID, generation.to_bytes(4, "big")), "begin"


END: "Command" = (NFNL_MSG_BATCH_END, 0, _BATCH, "commit")  # the last one


def delete_table(name: str) -> "Command":
    """A table goes, with all that is in it."""
    return NFT_MSG_DELTABLE, 0, NFGENMSG + named(NFTA_TABLE_NAME, name), f"delete table inet {name}"


def copies(written: "Table", there: "Table", places: "Mapping[str, bytes]", kept: "Container[str]" = ()) \
        -> "Iterator[Command]":
    """Commands that create what somebody has `written` apart, as `Change.apart` says it: chains with their rules.

    `there`: the table where they come; `places`: of chains that rules are inserted into, the handle of the rule that
    they come before; `kept`: as in `commands`. Of a chain that is kept, equal rules stay, with their sets, and so does
    a map of ports. A set that comes or goes lacks elements for a packet that is under way during the commit: that of a
    new rule may be filled after it, and a map that goes is emptied before (kernel functions nft_set_commit_update,
    nft_map_deactivate).
    """
    sets = 0
    chains: dict[str, list[dict[int, bytes]]] = {}
    for rule in written.rule_attributes(""):
        chains.setdefault(text(rule[NFTA_RULE_CHAIN]), []).append(rule)
    for chain, rules in chains.items():
        theirs = there.rule_attributes(chain) if chain in kept else []
        staying: dict[int, int] = {}
        place = b""
        if chain in places:
            place = attribute(NFTA_RULE_POSITION, places[chain])
        elif chain in kept:
            yield _chain(NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain, "add")  # the agent learns that its owner comes
            staying = _staying([_comparable(rule, there) for rule in theirs],
                               [_comparable(rule, written) for rule in rules])
            stay = {*staying.values()}
            yield from (_delete_rule(chain, rule[NFTA_RULE_HANDLE]) for index, rule in enumerate(theirs)
                        if index not in stay)
        else:
            yield _chain(NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, chain, "create")
        yield from _port_maps(chain, written, there, there.port_maps([chain]) if chain in kept else ())
        coming = []
        for index in reversed(range(len(rules))):
            if index in staying:
                place = attribute(NFTA_RULE_POSITION, theirs[staying[index]][NFTA_RULE_HANDLE])
            else:
                coming.append((rules[index], place))
        for rule, place in reversed(coming):
            expressions = []
            for _, raw in attributes(rule.get(NFTA_RULE_EXPRESSIONS, b"")):
                name = _anonymous_set(raw)
                if name:
                    sets += 1
                    yield from _copy_of_set(written, name, sets)
                expressions.append(nested(NFTA_LIST_ELEM, _lookup_in(sets, raw) if name else raw))
            yield _rule(chain, b"".join(expressions), rule.get(NFTA_RULE_USERDATA, b""), place)


def _comparable(rule: dict[int, bytes], table: "Table") -> "tuple[object, ...]":
    """What equal rules have in common: not what counters say, nor how the kernel has named a set; () for a comment."""
    found: list[object] = []
    for _, raw in attributes(rule.get(NFTA_RULE_EXPRESSIONS, b"") if NFTA_RULE_USERDATA not in rule else b""):
        name = _anonymous_set(raw)
        found += [_lookup_in(0, raw), *sorted(table.raw_elements(name))] if name else \
            [_COUNTER if raw.startswith(_COUNTER) else raw]
    return tuple(found)


def _staying(old: "Sequence[tuple[object, ...]]", new: "Sequence[tuple[object, ...]]") -> dict[int, int]:
    """The places of the `new` rules that are among the `old` in the same order, each with its place there."""
    places = {rule: place for place, rule in reversed([*enumerate(old)]) if rule}
    found: dict[int, int] = {}
    last = -1
    for place, rule in enumerate(new):
        if places.get(rule, -1) > last:
            found[place] = last = places[rule]
    return found


def _port_maps(chain: str, written: "Table", there: "Table", old: "Sequence[str]") -> "Iterator[Command]":
    """The maps of ports of a chain, in place of the `old` ones that are there: of the same sizes they stay."""
    names = written.port_maps([chain])
    staying = [name for name in old if name in names and _sizes(name, there) == _sizes(name, written)]
    yield from (_delete_map(name) for name in old if name not in staying)
    for name in names:
        if name not in staying:
            yield from _copy_of_set(written, name)
            continue
        old_elements, elements = ({*table.raw_elements(name)} for table in (there, written))
        for kind, flags, some in ((NFT_MSG_DELSETELEM, 0, old_elements - elements),
                                  (NFT_MSG_NEWSETELEM, NLM_F_CREATE, elements - old_elements)):
            verb = "add" if flags else "delete"
            yield from _raw_elements(kind, flags, {name: [*map(_copy_of_element, sorted(some))]}, f"{verb} element")


def _sizes(name: str, table: "Table") -> "list[bytes | None]":
    found = table.set_attributes(name) or {}
    return [found.get(kind) for kind in (NFTA_SET_KEY_LEN, NFTA_SET_DATA_LEN)]


def _anonymous_set(expression: bytes) -> str:
    """The name that the kernel gave to a set without one, such as __set0, that an expression looks up; or ""."""
    if not expression.startswith(_LOOKUP):
        return ""
    name = text(dict(attributes(dict(attributes(expression))[NFTA_EXPR_DATA]))[NFTA_LOOKUP_SET])
    return name if name.startswith("__") else ""


def _lookup_in(number: int, expression: bytes) -> bytes:
    """The same expression, in the set with that number in this transaction (NFTA_SET_ID)."""
    data = dict(attributes(dict(attributes(expression))[NFTA_EXPR_DATA]))
    data |= {NFTA_LOOKUP_SET: ANONYMOUS, NFTA_LOOKUP_SET_ID: number.to_bytes(4, "big")}
    return named(NFTA_EXPR_NAME, "lookup") + \
        nested(NFTA_EXPR_DATA, *(attribute(kind, value) for kind, value in data.items()))


def _copy_of_set(written: "Table", name: str, number: int = 0) -> "Iterator[Command]":
    """`number`: of a set without a name of its own."""
    found = written.set_attributes(name) or {}
    head = NFGENMSG + named(NFTA_SET_TABLE, ruleset.TABLE_NAME) + \
        (attribute(NFTA_SET_NAME, ANONYMOUS) if number else named(NFTA_SET_NAME, name))
    what = "of a rule" if number else f"{ruleset.TABLE} {name}"
    body = b"".join(attribute(kind, found[kind]) for kind in _SET_ATTRIBUTES if kind in found)
    yield NFT_MSG_NEWSET, NLM_F_CREATE, head + body + attribute(NFTA_SET_ID, number.to_bytes(4, "big")), \
        f"add set {what}"
    for some in _pieces(map(_copy_of_element, written.raw_elements(name))):
        yield NFT_MSG_NEWSETELEM, NLM_F_CREATE, head + \
            attribute(NFTA_SET_ELEM_LIST_SET_ID, number.to_bytes(4, "big")) + \
            nested(NFTA_SET_ELEM_LIST_ELEMENTS, some), f"add elements {what}"


def _copy_of_element(element: bytes) -> bytes:
    return nested(NFTA_LIST_ELEM, *(attribute(kind, value) for kind, value in attributes(element)
                                    if kind in _ELEMENT_ATTRIBUTES))


def _delete_map(name: str) -> "Command":
    body = NFGENMSG + named(NFTA_SET_TABLE, ruleset.TABLE_NAME) + named(NFTA_SET_NAME, name)
    return NFT_MSG_DELSET, 0, body, f"delete map {ruleset.TABLE} {name}"


def _chain(kind: int, flags: int, chain: str, verb: str) -> "Command":
    """A chain without a hook. If it goes, its rules go with it."""
    body = NFGENMSG + named(NFTA_CHAIN_TABLE, ruleset.TABLE_NAME) + named(NFTA_CHAIN_NAME, chain)
    return kind, flags, body, f"{verb} chain {ruleset.TABLE} {chain}"


def _elements(kind: int, flags: int, elements: "Sequence[Element]", command: str, data: bytes = b"") \
        -> "Iterator[Command]":
    """Messages for elements of sets and maps, all with the same `data`."""
    raw: dict[str, list[bytes]] = {}
    for name, key in elements:
        raw.setdefault(name, []).append(
            nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key)), data))
    return _raw_elements(kind, flags, raw, command)


def _members(kind: int, flags: int, members: "Mapping[Member, str]", command: str) -> "Iterator[Command]":
    """Messages for elements of the sets of `exposure`, each with its comment."""
    raw: dict[str, list[bytes]] = {}
    for (name, key, end, value), comment in members.items():
        data = _verdict(NFT_JUMP, named(NFTA_VERDICT_CHAIN, value)) if isinstance(value, str) else \
            attribute(NFTA_DATA_VALUE, value)
        raw.setdefault(name, []).append(nested(
            NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key)),
            nested(NFTA_SET_ELEM_KEY_END, attribute(NFTA_DATA_VALUE, end)) if end else b"",
            nested(NFTA_SET_ELEM_DATA, data) if value else b"",
            attribute(NFTA_SET_ELEM_USERDATA, _comment(comment)) if comment else b""))
    return _raw_elements(kind, flags, raw, command)


def _raw_elements(kind: int, flags: int, elements: "Mapping[str, Sequence[bytes]]", command: str) \
        -> "Iterator[Command]":
    for name, its in elements.items():
        head = NFGENMSG + named(NFTA_SET_ELEM_LIST_TABLE, ruleset.TABLE_NAME) + named(NFTA_SET_ELEM_LIST_SET, name)
        for some in _pieces(its):
            yield kind, flags, head + nested(NFTA_SET_ELEM_LIST_ELEMENTS, some), f"{command} {ruleset.TABLE} {name}"


def _pieces(raw: "Iterable[bytes]") -> "Iterator[bytes]":
    """Raw elements, as many together as fit a message."""
    some: list[bytes] = []
    size = 0
    for each in raw:
        if size + len(each) > LIST_MAX:
            yield b"".join(some)
            some, size = [], 0
        some.append(each)
        size += len(each)
    if some:
        yield b"".join(some)


def _verdict(code: int, chain: bytes = b"") -> bytes:
    return nested(NFTA_DATA_VERDICT, attribute(NFTA_VERDICT_CODE, code.to_bytes(4, "big", signed=True)), chain)


def _rule(chain: str, expressions: bytes, userdata: bytes, place: bytes = b"") -> "Command":
    body = NFGENMSG + named(NFTA_RULE_TABLE, ruleset.TABLE_NAME) + named(NFTA_RULE_CHAIN, chain) + \
        nested(NFTA_RULE_EXPRESSIONS, expressions) + place + \
        (attribute(NFTA_RULE_USERDATA, userdata) if userdata else b"")
    return NFT_MSG_NEWRULE, NLM_F_CREATE | (0 if place else NLM_F_APPEND), body, f"add rule {ruleset.TABLE} {chain}"


def _delete_rule(chain: str, handle: bytes) -> "Command":
    body = NFGENMSG + named(NFTA_RULE_TABLE, ruleset.TABLE_NAME) + named(NFTA_RULE_CHAIN, chain) + \
        attribute(NFTA_RULE_HANDLE, handle)
    return NFT_MSG_DELRULE, 0, body, f"delete rule {ruleset.TABLE} {chain}"


def _note(chain: str, ifname: str, container_id: str) -> "Command":
    """The rule of `ruleset.standby_note`."""
    going_on = nested(NFTA_EXPR_DATA, attribute(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT.to_bytes(4, "big")),
                      nested(NFTA_IMMEDIATE_DATA, _verdict(NFT_CONTINUE)))
    return _rule(chain, nested(NFTA_LIST_ELEM, named(NFTA_EXPR_NAME, "immediate"), going_on),
                 _comment(ruleset.standby_comment(ifname, container_id)))


def _comment(comment: str) -> bytes:
    """A comment as user data."""
    raw = comment.encode() + b"\0"
    return bytes((NFTNL_UDATA_COMMENT, len(raw))) + raw


def send(netlink: Socket, messages: "Sequence[Command]") -> tuple[int, str]:
    """Send a transaction; errno and command of what the kernel refuses of it first, (0, "") where all is committed.

    The last command before the end asks for an acknowledgement: the end itself is only acknowledged since Linux 6.10.
    The kernel tells errors in their order, after it has committed or forgotten all.
    """
    last = len(messages) - 2
    first = netlink.send([(kind, flags | (NLM_F_ACK if index == last else 0), body)
                          for index, (kind, flags, body, _) in enumerate(messages)])
    while True:
        for answer, kind, _, sequence in netlink.receive(first):
            code = error_of(answer)
            if kind == NLMSG_ERROR and (code or sequence == first + last):
                return code, messages[sequence - first][3] if code else ""
