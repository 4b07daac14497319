"""What the reference plugin has left: reads and removes its rules, in nf_tables and in iptables-legacy.

In nf_tables that is one netlink batch, as for our own rules; iptables-nft and nft see the change as any other. What
iptables-legacy has only its own program can change.

Source: include/uapi/linux/netfilter/nf_tables.h, nf_tables_compat.h, xt_comment.h.
"""
import posix

from ..cni import NFT_REFUSED, CniError, is_name
from ..reference import ENTRIES, HOSTPORT, IPTABLES, LEGACY, NAT, NFTABLES, RULES, Leftover, chains_of, owner_in
from . import EBUSY, ENOENT, ERESTART
from .batch import END, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, begin, send
from .expressions import NFTA_MATCH_INFO, NFTA_MATCH_NAME, DnatRule, expressions, jump_of
from .kernel import legacy_may_have
from .netlink import Socket, attribute, attributes, named
from .table import (NFPROTO_IPV4, NFPROTO_IPV6, NFT_MSG_GETCHAIN, NFT_MSG_GETRULE, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE,
                    NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_HANDLE, NFTA_RULE_TABLE, NFTA_RULE_USERDATA,
                    comment_in)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .batch import Command

    Wanted = Callable[[str, str], bool]  # of a container's network ("" where it is not recorded) and ID

NFPROTO = {4: NFPROTO_IPV4, 6: NFPROTO_IPV6}


def leftovers(netlink: Socket, wanted: "Wanted", own: tuple[str, str] = ("", "")) -> list[Leftover]:
    """What the reference plugin has written for the containers that are `wanted`. Raises OSError, CniError.

    `own`: network and ID of a container that is, whatever the comments of its rules say.
    """
    found: list[Leftover] = []
    for family in 4, 6:
        found += _in_nat(netlink, family, wanted, own)
        found += _in_hostport(netlink, family, wanted)
        if legacy_may_have(family):
            from .legacy import in_nat
            found += in_nat(family, wanted, own)
    return found


def _in_nat(netlink: Socket, family: int, wanted: "Wanted", own: tuple[str, str]) -> list[Leftover]:
    """Of backend iptables: the rules that lead to a container's chains, and those."""
    found: dict[tuple[str, str], Leftover] = {}
    owns = chains_of(*own)
    for entry in ENTRIES:
        for handle, comment, raw in _rules(netlink, family, NAT, entry):
            chain = jump_of(raw)
            owner = own if chain in owns else owner_in(comment or _xt_comment(raw))
            if owner[1] and (owner == own or wanted(*owner)) and (chain in chains_of(*owner) or entry != ENTRIES[0]):
                leftover = found.setdefault(owner, Leftover(IPTABLES, family, owner[1], owner[0]))
                leftover.rules.append((entry, handle, b""))
    if own[1]:  # also where nothing leads to them (any more)
        found.setdefault(own, Leftover(IPTABLES, family, own[1], own[0]))
    for owner, leftover in found.items():
        names = chains_of(*owner)
        there = netlink.ask_each(NFT_MSG_GETCHAIN, [_head(family) + named(NFTA_CHAIN_TABLE, NAT) +
                                                    named(NFTA_CHAIN_NAME, name) for name in names])
        leftover.chains = [name for name, answer in zip(names, there, strict=True) if answer is not None]
        for chain in leftover.chains:
            for _, _, raw in _rules(netlink, family, NAT, chain):
                _add_forwards(leftover, raw)
    return [leftover for leftover in found.values() if leftover.rules or leftover.chains]


def _in_hostport(netlink: Socket, family: int, wanted: "Wanted") -> list[Leftover]:
    """Of backend nftables: rules with the container's ID as their comment."""
    found: dict[str, Leftover] = {}
    for chain in RULES:
        for handle, container_id, raw in _rules(netlink, family, HOSTPORT, chain):
            if is_name(container_id) and wanted("", container_id):
                leftover = found.setdefault(container_id, Leftover(NFTABLES, family, container_id))
                rule = _add_forwards(leftover, raw)
                leftover.rules.append((chain, handle, rule.target or rule.daddr))
    return [*found.values()]


def _add_forwards(leftover: Leftover, raw: bytes) -> DnatRule:
    rule = DnatRule(raw, lambda _: (), leftover.family)
    if rule.target:
        leftover.forwards += [(rule.protocol, rule.daddr, port, rule.target) for port in rule.ports]
    return rule


def _rules(netlink: Socket, family: int, table: str, chain: str) -> "Iterator[tuple[int, str, bytes]]":
    """Handle, comment and expressions (raw) of the rules of a chain; none where it is not there."""
    body = _head(family) + named(NFTA_RULE_TABLE, table) + named(NFTA_RULE_CHAIN, chain)
    try:
        answers = netlink.dump(NFT_MSG_GETRULE, body)
    except OSError as error:
        if error.errno != ENOENT:
            raise
        return
    for answer in answers:
        found = dict(attributes(answer, 4))
        yield int.from_bytes(found.get(NFTA_RULE_HANDLE, b""), "big"), \
            comment_in(found.get(NFTA_RULE_USERDATA, b"")), found.get(NFTA_RULE_EXPRESSIONS, b"")


def _xt_comment(raw: bytes) -> str:
    """The text of iptables' match `comment` (struct xt_comment_info), "" for none."""
    for name, fields in expressions(raw):
        if name == "match" and fields.get(NFTA_MATCH_NAME) == b"comment\0":
            return fields.get(NFTA_MATCH_INFO, b"").partition(b"\0")[0].decode(errors="replace")
    return ""


def _head(family: int) -> bytes:
    return bytes((NFPROTO[family], 0, 0, 0))  # nfgenmsg


def is_there(netlink: Socket, leftover: Leftover) -> bool:
    """Whether the first rule of a leftover still is."""
    if leftover.backend == LEGACY:
        from .legacy import in_nat
        return bool(in_nat(leftover.family, lambda *owner: owner == (leftover.network, leftover.container_id)))
    answer, = netlink.ask_each(NFT_MSG_GETRULE, [_rule(leftover, *leftover.rules[0][:2])])
    return answer is not None


def _rule(leftover: Leftover, chain: str, handle: int | str) -> bytes:
    return _head(leftover.family) + named(NFTA_RULE_TABLE, HOSTPORT if leftover.backend == NFTABLES else NAT) + \
        named(NFTA_RULE_CHAIN, chain) + attribute(NFTA_RULE_HANDLE, int(handle).to_bytes(8, "big"))


def remove(netlink: Socket, generation: int, found: "Sequence[Leftover]") -> bool:
    """Remove these leftovers, those in nf_tables as one transaction. Raises OSError, CniError.

    False, and nothing is removed, where the ruleset is not that of `generation` (0: whichever) any more, or something
    of it is gone.
    """
    here = [leftover for leftover in found if leftover.backend != LEGACY]
    code, command = send(netlink, _removal(generation, here, True)) if here else (0, "")
    if code == EBUSY:  # somebody's rule jumps to a container's chain: without its rules that leads nowhere
        code, command = send(netlink, _removal(generation, here, False))
    if code in (ERESTART, ENOENT):
        return False
    if code:
        raise CniError(NFT_REFUSED, f"nftables rejected the transaction: {posix.strerror(code)}, in: {command}",
                       "rules of the reference plugin are left")
    if len(here) < len(found):
        from .legacy import remove as remove_legacy
        remove_legacy([leftover for leftover in found if leftover.backend == LEGACY])
    return True


def _removal(generation: int, found: "Sequence[Leftover]", whole: bool) -> "list[Command]":
    """The messages; `whole`: with the chains, not only their rules."""
    commands = [begin(generation)]
    for leftover in found:
        table = f"{'ip' if leftover.family == 4 else 'ip6'} {HOSTPORT if leftover.backend == NFTABLES else NAT}"
        commands += [(NFT_MSG_DELRULE, 0, _rule(leftover, chain, handle), f"delete rule {table} {chain}")
                     for chain, handle, _ in leftover.rules]
        for chain in leftover.chains:
            names = named(NFTA_RULE_TABLE, NAT) + named(NFTA_RULE_CHAIN, chain)
            commands.append((NFT_MSG_DELRULE, 0, _head(leftover.family) + names, f"flush chain {table} {chain}"))
        if whole:
            commands += [(NFT_MSG_DELCHAIN, 0, _head(leftover.family) + named(NFTA_CHAIN_TABLE, NAT) +
                          named(NFTA_CHAIN_NAME, chain), f"delete chain {table} {chain}") for chain in leftover.chains]
    return [*commands, END]
