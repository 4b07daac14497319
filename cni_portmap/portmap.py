"""The verbs: what happens to an attachment's published ports, and in which order.

State is in the kernel alone. Between reading and writing it a verb holds the lock; a write is one transaction,
so whoever is killed at any instant leaves all of it or nothing.
"""
from _socket import AF_INET, AF_INET6, inet_pton

from . import ruleset
from .cni import (CHECK_FAILED, FOREIGN_TABLE, INVALID_CONFIG, NFT_REFUSED, NOT_AVAILABLE, PORT_IN_USE, PORT_TAKEN,
                  TRY_AGAIN_LATER, CniError, warn)
from .config import DEFAULT_MARK_BIT, Attachment, Port

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .kernel import Kernel
    from .netlink import Flow


def add(attachment: Attachment, kernel: "Kernel") -> None:
    """Publish the ports of an attachment, in place of all that it published before."""
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    attachment.inode = kernel.inode(attachment.netns)
    _try_conditions(attachment, kernel)
    new = ruleset.elements_for(attachment)
    with kernel.lock():
        replaced, elsewhere = _settle(attachment, chain, kernel)
        if kernel.has_chain(chain):
            replaced.append(chain)
        if attachment.refuse_bound:
            _refuse_bound(attachment, kernel)
        owned, targets = kernel.elements_of(replaced), kernel.targets(replaced)
        released = [item for item in owned if item[0] not in new]
        kept_by_none = [item for item in released if item[1] == chain]  # what a dead container had is nobody's
        base = _base([attachment], kernel)
        if base:
            _write_base(base, kernel)
        closed = _closed_to_localhost([attachment], kernel)
        kernel.transact(_detach(replaced, owned, kept_by_none, kernel) + _attach(attachment, elsewhere, kernel) +
                        ruleset.note_opened(closed))
        _open_localhost([attachment], closed, kernel)
    _forget_elsewhere(new, attachment, kernel)
    forget_released(released, targets, kernel)


def delete(container_id: str, ifname: str, kernel: "Kernel") -> None:
    """Remove all that an attachment owns, whatever it was asked to publish; nothing of anybody else."""
    chain = ruleset.chain_of(container_id, ifname)
    if not kernel.has_chain(chain):
        return  # most containers publish nothing, and runtimes repeat DEL
    remove([chain], kernel)


def remove(chains: "Iterable[str]", kernel: "Kernel") -> None:
    """Remove attachments' chains, those that exist, with all that leads to them, in one transaction."""
    with kernel.lock():
        there = [chain for chain in chains if kernel.has_chain(chain)]
        owned, targets = kernel.elements_of(there), kernel.targets(there)
        if there:
            kernel.transact(_detach(there, owned, owned, kernel) + ruleset.forget_opened(kernel.opened_and_gone()))
    forget_released(owned, targets, kernel)


def check(attachment: Attachment, kernel: "Kernel") -> None:
    """Compare the kernel with what ADD would have written: that is written in an empty network namespace.

    Raises CniError(104), naming the first piece that is missing or altered.
    """
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    attachment.inode = kernel.inode(attachment.netns)
    wanted = ruleset.elements_for(attachment)
    names = (*ruleset.BASE, chain)
    with kernel.lock():
        dormant = kernel.is_dormant()
        found = kernel.lookup(wanted)
        real = {name: kernel.picture(name) for name in names}
        references = kernel.references(chain)
    if dormant:
        raise CniError(CHECK_FAILED, f"table {ruleset.TABLE} is dormant", f"wake it: nft add table {ruleset.TABLE}")
    home = _home(found.values(), attachment, kernel)
    for element, port in wanted.items():
        if found.get(element) not in home:
            raise CniError(CHECK_FAILED, f"{port} does not lead to the container: map {element[0]} has "
                           f"{found.get(element) or 'nothing'} for {ruleset.element_of(*element)}", "")
    mirror = kernel.mirror()
    bits = _mark_bits([attachment])
    mirror.transact(ruleset.base(ruleset.BASE, (), bits) + ruleset.attach(attachment))
    for name in names:
        expected = mirror.picture(name)
        if not real[name]:
            raise CniError(CHECK_FAILED, f"chain {name} is missing", "")
        if real[name][0] != expected[0]:
            raise CniError(CHECK_FAILED, f"chain {name} is not hooked as it should be",
                           ruleset.BASE[name][0] if name in ruleset.BASE else "it should not be hooked at all")
        rest = iter(real[name][1:])
        for index, rule in enumerate(expected[1:]):
            if rule not in rest:  # an iterator: `in` also moves past what it finds, so the order counts
                texts = ruleset.rules_of(attachment) if name == chain else \
                    (f"{rule} comment \"{comment}\"" for rule, comment in ruleset.base_rules(name, bits))
                raise CniError(CHECK_FAILED, f"chain {name}: a rule is missing or altered", [*texts][index])
    if references != [*found.values()].count(chain):
        raise CniError(CHECK_FAILED, f"more leads to chain {chain} than was asked for",
                       f"see: nft list table {ruleset.TABLE}")


def gc(network: str, valid: set[tuple[str, str]], kernel: "Kernel") -> None:
    """Remove every attachment of `network` that is not among the `valid` (container ID, interface).

    Goes on after an error, one by one, and raises them all as one.
    """
    stale = [owner for owner in kernel.owners()
             if owner.network == network and (owner.container_id, owner.ifname) not in valid]
    try:
        remove([owner.chain for owner in stale], kernel)
        return
    except CniError as error:
        if error.code == TRY_AGAIN_LATER:
            raise
        code = error.code
    errors = []
    for owner in stale:
        try:
            remove([owner.chain], kernel)
        except CniError as error:
            errors.append(f"{owner}: {error.msg}")
    if errors:
        raise CniError(code, f"{len(errors)} of {len(stale)} stale attachments could not be removed", "; ".join(errors))


def status(kernel: "Kernel") -> None:
    """Raise CniError(50) with the reason if an ADD could not succeed. Writes nothing.

    Where the base stands there is nothing to try: a dry run costs 7 to 16 ms (an RCU grace period in nf_tables_abort).
    """
    try:
        problem = kernel.dry_run(_base([], kernel))
    except CniError as error:
        raise CniError(NOT_AVAILABLE, error.msg, error.details) from None
    if problem:
        raise CniError(NOT_AVAILABLE, f"the kernel does not take our ruleset: {problem}", "see nft list ruleset")


def restore(attachments: "Iterable[Attachment]", kernel: "Kernel", dry_run: bool = False) \
        -> "tuple[list[Attachment], list[tuple[Attachment, CniError]]]":
    """Publish again what of `attachments` the kernel has lost: the base, then all of them in one transaction.

    Returns those that are published again, and those that cannot be, each with the reason. The first of two that
    claim one port gets it. `dry_run`: nothing is written.
    """
    asked: dict[str, tuple[Attachment, dict[tuple[str, bytes], str]]] = {}  # by chain, with where its elements lead
    whole: set[str] = set()
    anew: set[str] = set()
    gone: set[str] = set()  # chains of the dead, and those that are written anew
    refused: list[tuple[Attachment, CniError]] = []
    claimed: dict[tuple[str, bytes], Attachment] = {}
    with kernel.lock():
        for attachment in attachments:
            chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
            if chain in asked:
                continue  # two folders remember it
            ports = ruleset.elements_for(attachment)
            found = kernel.lookup(ports)
            asked[chain] = attachment, found
            if _is_whole(attachment, chain, found, kernel):
                whole.add(chain)
            else:
                try:
                    for element, port in ports.items():
                        _refuse_overlap(element, port, attachment, claimed)
                    gone.update(_settle(attachment, chain, kernel)[0])
                except CniError as error:
                    refused.append((attachment, error))
                    continue
                anew.add(chain)
            claimed = dict.fromkeys(ports, attachment) | claimed
        gone |= anew
        while bereft := {chain for chain in whole - gone if gone.intersection(asked[chain][1].values())}:
            anew |= bereft  # they stand by for a chain that is written anew
            gone |= bereft
        lost = [attachment for chain, (attachment, _) in asked.items() if chain in anew]
        base = _base([asked[chain][0] for chain in whole | anew], kernel) if whole or anew else ""
        replaced = [chain for chain in sorted(gone) if kernel.has_chain(chain)]
        text = _detach(replaced, kernel.elements_of(replaced), (), kernel)
        leads: dict[tuple[str, bytes], str] = {}
        for attachment in lost:
            chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
            leads |= {element: other for element, other in asked[chain][1].items() if other not in gone}
            own = ruleset.elements_for(attachment)
            text += _attach(attachment, {element: leads[element] for element in own if element in leads}, kernel)
            leads = dict.fromkeys(own, chain) | leads
        forgotten = bool(base) and not kernel.notes_opened()  # the table was gone: what is open now, we had opened
        if base and not dry_run:
            _write_base(base, kernel)
        if text and not dry_run:
            closed = _closed_to_localhost(lost, kernel, forgotten)
            kernel.transact(text + ruleset.note_opened(closed))
            _open_localhost(lost, closed, kernel)
    return lost, refused


def repair_base(kernel: "Kernel", dry_run: bool = False) -> bool:
    """Repair what all containers share, where the table exists; whether there was anything to repair."""
    with kernel.lock():
        text = _base([], kernel) if kernel.has_table() else ""
        if text and not dry_run:
            _write_base(text, kernel)
    return bool(text)


# --- the steps ------------------------------------------------------------------------------------------------

def _try_conditions(attachment: Attachment, kernel: "Kernel") -> None:
    """Let nft read the conditions, alone: the one free text of a configuration."""
    for family, text in attachment.conditions.items():
        problem = kernel.dry_run(ruleset.probe(family, text)) if text else ""
        if problem:
            raise CniError(INVALID_CONFIG, f"conditionsV{family}: {text!r} is not nft match text", problem)


def _settle(attachment: Attachment, chain: str, kernel: "Kernel") \
        -> "tuple[list[str], dict[tuple[str, bytes], str]]":
    """Who owns the ports of `attachment` now.

    Returns the chains of dead containers, which give way; and the elements that lead to this container through
    another of its interfaces, which stay, each with the chain that it leads to.

    Raises CniError(101) where the owner is another and lives: a port has one owner, and it overlaps as in bind(2).
    """
    claims: dict[tuple[str, bytes], Port] = {}
    wildcards: dict[str, dict[bytes, Port]] = {}
    for port in attachment.ports:
        key = ruleset.key_of(port)
        claims[ruleset.map_of(port), key] = port
        if port.host_ip:
            claims.setdefault(ruleset.wildcard_of(port), port)
        else:
            wildcards.setdefault(f"hostip{port.family}_hostports", {})[key[-8:]] = port
    leads_to = kernel.lookup(claims)
    taken: dict[str, Port] = {}
    for element, owner in leads_to.items():
        taken.setdefault(owner, claims[element])
    for name, endings in wildcards.items():
        for owner, ending in kernel.claimants(name, endings):
            taken.setdefault(owner, endings[ending])
    taken.pop(chain, None)
    dead, siblings = [], []
    for other, port in taken.items():
        if not other.startswith("c/"):
            raise CniError(FOREIGN_TABLE, f"{port} is taken by a map element that this plugin did not write",
                           f"find it: nft list table {ruleset.TABLE}")
        its_owner = kernel.owner(other)
        if kernel.is_dead(its_owner):
            dead.append(other)
        elif its_owner.container_id == attachment.container_id:
            siblings.append(other)
            warn(f"{port} leads to this container through interface {its_owner.ifname} already; "
                 f"{attachment.ifname} stands by")
        else:
            raise CniError(PORT_TAKEN, f"{port} is already published by {its_owner}",
                           f"its network namespace {its_owner.netns or '(unknown)'} is alive")
    own = ruleset.elements_for(attachment)
    return dead, {element: owner for element, owner in leads_to.items() if owner in siblings and element in own}


def _home(chains: "Iterable[str]", attachment: Attachment, kernel: "Kernel") -> set[str]:
    """Those of `chains` that are of the attachment's container, through whichever interface."""
    own = ruleset.chain_of(attachment.container_id, attachment.ifname)
    return {chain for chain in {*chains}
            if chain == own or kernel.owner(chain).container_id == attachment.container_id}


def _is_whole(attachment: Attachment, chain: str, found: dict[tuple[str, bytes], str], kernel: "Kernel") -> bool:
    """Whether nothing was removed of what `attachment` published. `found`: where its elements lead to."""
    return len(kernel.comments(chain)) >= len([*ruleset.rules_of(attachment)]) and \
        len(found) == len(attachment.ports) and _home(found.values(), attachment, kernel).issuperset(found.values())


def _attach(attachment: Attachment, elsewhere: dict[tuple[str, bytes], str], kernel: "Kernel") -> str:
    """Commands that publish what is not published `elsewhere`, and note who stands by for whom."""
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    notes = (ruleset.stand_by(chain, ifname) for ifname in ruleset.standing_by(kernel.comments(chain)))
    return ruleset.attach(attachment, elsewhere) + "".join(notes) + \
        _stand_by(attachment.ifname, elsewhere.values(), kernel)


def _stand_by(ifname: str, chains: "Iterable[str]", kernel: "Kernel") -> str:
    """Commands that note in `chains` that their container publishes some of their ports on `ifname` too."""
    return "".join(ruleset.stand_by(chain, ifname) for chain in dict.fromkeys(chains)
                   if ifname not in ruleset.standing_by(kernel.comments(chain)))


def _detach(chains: "list[str]", owned: "Iterable[tuple[tuple[str, bytes], str]]",
            released: "Iterable[tuple[tuple[str, bytes], str]]", kernel: "Kernel") -> str:
    """Commands that remove `chains` with all that they own, and let those that stand by have what is `released`."""
    if not chains:
        return ""
    text = ruleset.detach(chains, [element for element, _ in owned])
    for chain in chains:
        owner, heirs = kernel.owner(chain), []
        for ifname in ruleset.standing_by(kernel.comments(chain)):
            heir = ruleset.chain_of(owner.container_id, ifname)
            if heir not in chains and kernel.has_chain(heir):
                heirs.append((heir, ifname, kernel.wanted_by(heir)))
        free = [element for element, its_chain in released if its_chain == chain]
        for heir, ifname, wanted in heirs:
            inherited = [element for element in free if element in wanted]
            free = [element for element in free if element not in wanted]
            text += ruleset.lead(inherited, heir)
            text += "".join(_stand_by(other, [heir], kernel) for _, other, _ in heirs if inherited and other != ifname)
    return text


def _refuse_overlap(element: tuple[str, bytes], port: Port, attachment: Attachment,
                    claimed: dict[tuple[str, bytes], Attachment]) -> None:
    """Raise CniError(101) if another of the attachments that are being restored claims an overlapping port."""
    overlapping = [element, ruleset.wildcard_of(port)] if port.host_ip else \
        [element, *(other for other in claimed if other[0] == f"hostip{port.family}_hostports" and
                    other[1][-8:] == element[1][-8:])]
    for other in overlapping:
        owner = claimed.get(other, attachment)
        if owner.container_id != attachment.container_id:
            raise CniError(PORT_TAKEN, f"{port} is already published by container {owner.container_id}, interface "
                           f"{owner.ifname}, network {owner.network}")


def _mark_bits(attachments: "Iterable[Attachment]") -> set[int]:
    return {DEFAULT_MARK_BIT, *(each.mark_bit for each in attachments if each.mark_bit is not None)}


def _base(attachments: "Iterable[Attachment]", kernel: "Kernel") -> str:
    """Commands that make or repair what `attachments` share; "" where nothing is missing.

    Raises CniError(103) rather than remove a rule that this plugin did not write.
    """
    bits = _mark_bits(attachments)
    missing: list[str] = []
    wrong: list[str] = []
    for chain in ruleset.BASE:
        there = kernel.comments(chain)
        rest = iter(there)  # an iterator: `in` also moves past what it finds, so the order counts
        if all(comment in rest for _, comment in ruleset.base_rules(chain, bits)):
            continue
        (wrong if kernel.has_chain(chain) else missing).append(chain)
        for comment in there:
            if not comment.startswith(ruleset.SIGN):
                raise CniError(FOREIGN_TABLE, f"chain {chain} of table {ruleset.TABLE} must be rebuilt, but has a rule "
                               f"that this plugin did not write", f"see: nft -a list chain {ruleset.TABLE} {chain}")
        if chain == "postrouting":
            bits |= ruleset.bits_of(there)
    if not missing and not wrong and not kernel.is_dormant():
        return ""
    text = ruleset.base(missing, wrong, bits)
    if wrong and not kernel.notes_opened():
        from .localhost import interfaces_of_published
        text += ruleset.note_opened(interfaces_of_published(kernel))
    return text


def _write_base(text: str, kernel: "Kernel") -> None:
    """Write the base, by itself and first: nobody opens localhost without the guard.

    Raises CniError(100) where libnftables has dropped its rules, as it would drop an attachment's.
    """
    kernel.transact(text)
    if kernel.has_chain("guard") and not kernel.comments("guard"):
        raise CniError(NFT_REFUSED, "libnftables is too old: it writes chains without their rules",
                       "1.0.7 is new enough, and Debian's 1.0.6-2+deb12u2")


def _refuse_bound(attachment: Attachment, kernel: "Kernel") -> None:
    """Raise CniError(102) if a process of this host uses one of the ports (hostPortInUse: refuse)."""
    for port in attachment.ports:
        if kernel.is_bound(port.family, port.protocol, port.host_ip, port.host_port):
            raise CniError(PORT_IN_USE, f"{port} is in use by a process of this host",
                           f"see which: ss -lnp sport = :{port.host_port}")


def _closed_to_localhost(attachments: "Iterable[Attachment]", kernel: "Kernel", anyway: bool = False) -> "list[str]":
    """The interfaces that must be opened to 127.0.0.0/8, because `attachments` publish ports there.

    `anyway`: also those that are open.
    """
    found = [kernel.interface_to_open(attachment.addresses[4].ip, anyway) for attachment in attachments
             if _on_localhost(attachment, 4)]
    return [name for name in dict.fromkeys(found) if name]


def _open_localhost(attachments: "Iterable[Attachment]", closed: "Iterable[str]", kernel: "Kernel") -> None:
    """Make this host's localhost able to reach the containers that are published there.

    `closed`: the interfaces that have to be opened. They are noted by now, so what is opened can be closed again.
    """
    for name in closed:
        kernel.set_localnet(name, True)
    for attachment in attachments:
        if _on_localhost(attachment, 6):
            obstacle = kernel.allow_localhost6(attachment.addresses[6].ip)
            if obstacle:
                warn(f"published ports do not answer on [::1]: {obstacle}")


def _on_localhost(attachment: Attachment, family: int) -> bool:
    """Whether an attachment publishes ports on this host's localhost, and replies find back (masquerading)."""
    if attachment.mark_bit is None or (family == 6 and not attachment.localhost6):
        return False
    ips = {port.host_ip for port in attachment.ports if port.family == family}
    return any(not ip or ip == "::1" or ip.startswith("127.") for ip in ips)


# Flows that conntrack still sends where they should not go any more would black-hole a client for as long as it
# keeps sending (k8s#58336, plugins#123, plugins#1190). Here `claims` are, by protocol number, the ports that changed
# hands: (family, port) -> the host addresses it is about, packed; b"" for all of them.

def _claims(elements: "Iterable[tuple[str, bytes]]") -> dict[int, dict[tuple[int, int], set[bytes]]]:
    claims: dict[int, dict[tuple[int, int], set[bytes]]] = {}
    for family, protocol, host, port in map(ruleset.claim_of, elements):
        claims.setdefault(protocol, {}).setdefault((family, port), set()).add(host)
    return claims


def _of_family(family: int, addresses: "Iterable[bytes]") -> "list[bytes]":
    return [address for address in addresses if len(address) == (4 if family == 4 else 16)]


def _forget_elsewhere(elements: "Iterable[tuple[str, bytes]]", attachment: Attachment, kernel: "Kernel") -> None:
    """Forget the flows, of protocols that have no connections, to published ports that lead elsewhere."""
    targets = {inet_pton(AF_INET if family == 4 else AF_INET6, address.ip)
               for family, address in attachment.addresses.items()}
    for protocol, claims in _claims(elements).items():
        if protocol == ruleset.PROTOCOL_NUMBERS["tcp"]:
            continue  # a new connection is a new flow

        def filters(claims: dict[tuple[int, int], set[bytes]] = claims) -> "list[tuple[int, int, bytes, bytes]]":
            return [(family, port, host, b"") for (family, port), hosts in claims.items()
                    for host in (_of_family(family, kernel.local_addresses()) if b"" in hosts else hosts)]

        def is_stale(flow: "Flow", claims: dict[tuple[int, int], set[bytes]] = claims) -> bool:
            hosts = claims.get((flow.family, flow.port), ())
            return flow.target not in targets and \
                (flow.destination in hosts or (b"" in hosts and flow.destination in kernel.local_addresses()))

        kernel.forget(protocol, filters, is_stale)


def forget_released(owned: "Iterable[tuple[tuple[str, bytes], str]]", targets: dict[str, set[bytes]],
                     kernel: "Kernel") -> None:
    """Forget the flows to ports that are not published any more, to the containers that they led to."""
    by_chain: dict[str, list[tuple[str, bytes]]] = {}
    for element, chain in owned:
        by_chain.setdefault(chain, []).append(element)
    for chain, elements in by_chain.items():
        for protocol, claims in _claims(elements).items():

            def filters(claims: dict[tuple[int, int], set[bytes]] = claims,
                        chain: str = chain) -> "list[tuple[int, int, bytes, bytes]]":
                return [(family, port, host, target) for (family, port), hosts in claims.items()
                        for host in hosts for target in _of_family(family, targets[chain])]

            def is_stale(flow: "Flow", claims: dict[tuple[int, int], set[bytes]] = claims, chain: str = chain) -> bool:
                hosts = claims.get((flow.family, flow.port), ())
                return flow.target in targets[chain] and (flow.destination in hosts or b"" in hosts)

            kernel.forget(protocol, filters, is_stale)
