"""The verbs: what happens to an attachment's published ports, and in which order.

State is in the kernel alone. Between reading and writing it a verb holds the lock; a write is one transaction,
so whoever is killed at any instant leaves all of it or nothing.
"""
from _socket import AF_INET, AF_INET6, inet_pton

from . import ruleset
from .cni import (CHECK_FAILED, FOREIGN_TABLE, INVALID_CONFIG, INVALID_ENVIRONMENT, NFT_REFUSED, NOT_AVAILABLE,
                  PORT_IN_USE, PORT_TAKEN, TRY_AGAIN_LATER, CniError, warn)
from .config import DEFAULT_MARK_BIT, Attachment, Port

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .alive import Verdict
    from .kernel import Kernel
    from .netlink import Flow
    from .ruleset import Owner

    Judged = dict[tuple[str, int], Verdict]  # by chain and handle


STRANGER_SECONDS = 2  # to wait for a living owner: its DEL may be under way, as in Kubernetes
PREDECESSOR_SECONDS = 10  # where it is the same pod, with another sandbox


class Unjudged(Exception):
    """Owners of whom nothing is known yet: they are judged without the lock, and then it is tried again."""

    def __init__(self, owners: "list[Owner]") -> None:
        super().__init__()
        self.owners = owners


class PortTaken(CniError):
    """A port has an owner that lives, or cannot be judged. `handle`: of the owner's chain."""

    def __init__(self, msg: str, details: str, owner: "Owner", handle: int) -> None:
        super().__init__(PORT_TAKEN, msg, details)
        self.owner, self.handle = owner, handle


def add(attachment: Attachment, kernel: "Kernel") -> None:
    """Publish the ports of an attachment, in place of all that it published before.

    Raises CniError(4) where its container has gone meanwhile, and CniError(101) where a port has an owner that lives,
    and still does after some seconds without the lock.
    """
    _try_conditions(attachment, kernel)
    new = ruleset.elements_for(attachment)
    judged: Judged = {}
    waited, flushed = 0.0, False
    while True:
        _look_at(attachment, kernel)
        rules = ruleset.rules_text(attachment)
        try:
            with kernel.lock() as late:
                if attachment.link or late:
                    _look_again_at(attachment, kernel)
                released, targets = _publish(attachment, rules, judged, kernel)
            break
        except Unjudged as unjudged:
            _judge(unjudged.owners, judged, kernel)
        except PortTaken as taken:
            left = _patience(attachment, taken.owner) - waited
            if left <= 0:
                raise CniError(PORT_TAKEN, f"{taken.msg}; waited {waited:.0f} s for it to go", taken.details) from None
            waited += kernel.wait_for(taken.owner, taken.handle, left)
        except CniError as error:
            if flushed or not _is_flush(error):
                raise
            flushed = True
    _forget_elsewhere(new, attachment, kernel)
    forget_released(released, targets, kernel)


def _publish(attachment: Attachment, rules: str, judged: "Judged", kernel: "Kernel") \
        -> "tuple[list[tuple[tuple[str, bytes], str]], dict[str, set[bytes]]]":
    """Write what `add` is to write, under the lock.

    Returns the elements that are not published any more, each with the chain that it led to, and where those led.
    """
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    replaced, elsewhere = _settle(attachment, chain, kernel, judged)
    again = kernel.has_chain(chain)
    if again:
        _refuse_namesake(attachment, chain, kernel, judged)
        replaced.append(chain)
    if attachment.refuse_bound:
        _refuse_bound(attachment, kernel)
    new = ruleset.elements_for(attachment)
    owned, targets = kernel.elements_of(replaced), kernel.targets(replaced)
    released = [item for item in owned if item[0] not in new]
    kept_by_none = [item for item in released if item[1] == chain]  # what a dead container had is nobody's
    base = _base([attachment], kernel)
    if base:
        _write_base(base, kernel)
    closed = _closed_to_localhost([attachment], kernel)
    kernel.transact(_detach(replaced, owned, kept_by_none, kernel) +
                    _attach(attachment, elsewhere, kernel, rules, again) + ruleset.note_opened(closed))
    _open_localhost([attachment], closed, kernel)
    return released, targets


def _is_flush(error: CniError) -> bool:
    """Whether a transaction failed because what had been read was gone: somebody flushed the ruleset in between."""
    return error.code == NFT_REFUSED and "No such file or directory" in error.msg


def delete(container_id: str, ifname: str, kernel: "Kernel") -> None:
    """Remove all that an attachment owns, whatever it was asked to publish; nothing of anybody else."""
    chain = ruleset.chain_of(container_id, ifname)
    if not kernel.has_chain(chain):
        return  # most containers publish nothing, and runtimes repeat DEL
    remove([chain], kernel)


def remove(chains: "Iterable[str]", kernel: "Kernel", handles: "dict[str, int] | None" = None) -> None:
    """Remove attachments' chains, those that exist, with all that leads to them, in one transaction.

    `handles`: what was judged; a chain with another handle was written meanwhile, and stays.
    """
    chains = [*chains]
    try:
        _remove(chains, kernel, handles)
    except CniError as error:
        if not _is_flush(error):
            raise
        _remove(chains, kernel, handles)


def _remove(chains: "list[str]", kernel: "Kernel", handles: "dict[str, int] | None") -> None:
    with kernel.lock():
        there = [chain for chain in chains if (kernel.has_chain(chain) if handles is None else
                                               kernel.handle(chain) == handles.get(chain))]
        owned, targets = kernel.elements_of(there), kernel.targets(there)
        if there:
            kernel.transact(_detach(there, owned, owned, kernel) + ruleset.forget_opened(kernel.opened_and_gone()))
    forget_released(owned, targets, kernel)


def check(attachment: Attachment, kernel: "Kernel") -> None:
    """Compare the kernel with what ADD would have written: that is written in an empty network namespace.

    Raises CniError(104), naming the first piece that is missing or altered.
    """
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    attachment.inode = kernel.namespace(attachment.netns)
    wanted = ruleset.elements_for(attachment)
    names = (*ruleset.BASE, chain)
    with kernel.lock():
        dormant = kernel.is_dormant()
        found = kernel.lookup(wanted)
        real = {name: kernel.picture(name) for name in names}
        references = kernel.references(chain)
        owner = kernel.owner(chain)
    if dormant:
        raise CniError(CHECK_FAILED, f"table {ruleset.TABLE} is dormant", f"wake it: nft add table {ruleset.TABLE}")
    _check_owner(attachment, owner, kernel)
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
    """Remove every attachment of `network` that is not among the `valid` (container ID, interface)."""
    handles = kernel.handles()
    _sweep([owner for owner in kernel.owners()
            if owner.network == network and (owner.container_id, owner.ifname) not in valid], handles, kernel)


def _sweep(stale: "list[Owner]", handles: dict[str, int], kernel: "Kernel") -> None:
    """Remove the chains of these owners, but those that were written anew since their `handles` were read.

    Goes on after an error, one by one, and raises them all as one.
    """
    try:
        remove([owner.chain for owner in stale], kernel, handles)
        return
    except CniError as error:
        if error.code == TRY_AGAIN_LATER:
            raise
        code = error.code
    errors = []
    for owner in stale:
        try:
            remove([owner.chain], kernel, handles)
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


# Who lives is looked for without the lock, and looked at again under it by what cannot hang. What was found is kept by
# chain and handle: a chain that was written anew meanwhile has another handle, and is judged anew.

def _look_at(attachment: Attachment, kernel: "Kernel") -> None:
    """Note by what the container will be known to live, its link and its namespace. Raises CniError(4) if it is gone.

    The namespace is not kept open: that would keep it alive, and its link.
    """
    attachment.link = kernel.link(attachment.links) if attachment.links else ""
    inode = kernel.namespace(attachment.netns)
    if inode < 0 and not attachment.link:
        raise _gone(attachment)
    attachment.inode = max(inode, 0)  # with a link it lives, though its path is not seen from here


def _look_again_at(attachment: Attachment, kernel: "Kernel") -> None:
    """Raise CniError(4) if the container has gone since `_look_at`. It cannot hang."""
    if not kernel.has_link(attachment.link) if attachment.link else kernel.namespace_soon(attachment.netns) < 0:
        raise _gone(attachment)


def _gone(attachment: Attachment) -> CniError:
    return CniError(INVALID_ENVIRONMENT, f"CNI_NETNS: {attachment.netns} leads to no network namespace",
                    "the container has ended; nothing was published")


def _judge(owners: "list[Owner]", judged: "Judged", kernel: "Kernel") -> None:
    """Judge these owners, as they are now. Not under the lock."""
    handles = {owner.chain: kernel.handle(owner.chain) for owner in owners}
    verdicts = kernel.judge([kernel.owner(chain) for chain in handles])
    judged |= {(chain, handles[chain]): verdict for chain, verdict in verdicts.items()}


def _verdict(owner: "Owner", attachment: Attachment, judged: "Judged", kernel: "Kernel") -> "Verdict | None":
    """Who lives, as far as it is known under the lock, where an owner meets `attachment`, which lives."""
    seen = kernel.glance(owner)
    another = owner.container_id != attachment.container_id
    if seen:
        return ("dead", "its link is another's") if another and owner.link == attachment.link else seen
    if owner.inode and owner.inode == attachment.inode:
        if another and owner.ifname == attachment.ifname:
            return "dead", "its interface is another's"  # one of a name in a namespace; its number may be used again
        return "alive", f"its network namespace {owner.netns} is alive"
    return judged.get((owner.chain, kernel.handle(owner.chain)))


def _patience(attachment: Attachment, owner: "Owner") -> float:
    """For how many seconds an attachment waits for an owner that lives."""
    same_pod = "/" in attachment.pod and attachment.pod == owner.pod and attachment.container_id != owner.container_id
    return PREDECESSOR_SECONDS if same_pod else STRANGER_SECONDS


def _refuse_namesake(attachment: Attachment, chain: str, kernel: "Kernel", judged: "Judged") -> None:
    """Raise CniError(101) if the attachment's own chain belongs to a namesake: in another network, and it lives.

    Runtimes that share a host may use one container ID twice; network, ID and interface together are unique.
    """
    owner = kernel.owner(chain)
    if owner.network in ("", attachment.network) or (owner.inode and owner.inode == attachment.inode) or \
            (owner.link and owner.link == attachment.link):
        return
    verdict = _verdict(owner, attachment, judged, kernel)
    if verdict is None:
        raise Unjudged([owner])
    if verdict[0] != "dead":
        raise PortTaken(f"this container ID and interface are already published: {owner}", verdict[1], owner,
                        kernel.handle(chain))


def _check_owner(attachment: Attachment, owner: "Owner", kernel: "Kernel") -> None:
    """Compare who is recorded with who is asked for: CniError(104) if that is another, or gone.

    One namespace has many paths (/run and /var/run, /proc/PID/ns/net), so paths are not compared. `attachment` becomes
    what ADD recorded.
    """
    verdict = kernel.glance(owner)
    if verdict and verdict[0] == "dead":
        raise CniError(CHECK_FAILED, f"the container is gone: {verdict[1]}", "")
    if attachment.inode < 0 and not verdict:
        raise CniError(CHECK_FAILED, f"the container is gone: {attachment.netns} leads to no network namespace", "")
    if owner.inode and attachment.inode > 0 and owner.inode != attachment.inode:
        raise CniError(CHECK_FAILED, f"chain {owner.chain} belongs to another network namespace, {owner.netns}", "")
    if owner.netns:
        attachment.netns, attachment.inode = owner.netns, owner.inode
        attachment.link, attachment.pod = owner.link, owner.pod


def _settle(attachment: Attachment, chain: str, kernel: "Kernel", judged: "Judged") \
        -> "tuple[list[str], dict[tuple[str, bytes], str]]":
    """Who owns the ports of `attachment` now.

    Returns the chains of dead containers, which give way; and the elements that lead to this container through
    another of its interfaces, which stay, each with the chain that it leads to.

    Raises PortTaken where the owner is another and lives: a port has one owner, and it overlaps as in bind(2); and
    Unjudged where that is not known yet.
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
    for other, port in taken.items():
        if not other.startswith("c/"):
            raise CniError(FOREIGN_TABLE, f"{port} is taken by a map element that this plugin did not write",
                           f"find it: nft list table {ruleset.TABLE}")
    owners = {other: kernel.owner(other) for other in taken}
    verdicts = {other: _verdict(owner, attachment, judged, kernel) for other, owner in owners.items()}
    unjudged = [owner for other, owner in owners.items() if verdicts[other] is None]
    if unjudged:
        raise Unjudged(unjudged)
    dead, siblings = [], []
    for other, port in taken.items():
        state, why = verdicts[other] or ("", "")
        if state == "dead":
            dead.append(other)
        elif owners[other].container_id == attachment.container_id:
            siblings.append(other)
            warn(f"{port} leads to this container through interface {owners[other].ifname} already; "
                 f"{attachment.ifname} stands by")
        else:
            raise PortTaken(f"{port} is already published by {owners[other]}", why, owners[other],
                            kernel.handle(other))
    own = ruleset.elements_for(attachment)
    return dead, {element: owner for element, owner in leads_to.items() if owner in siblings and element in own}


def _home(chains: "Iterable[str]", attachment: Attachment, kernel: "Kernel") -> set[str]:
    """Those of `chains` that are of the attachment's container, through whichever interface."""
    own = ruleset.chain_of(attachment.container_id, attachment.ifname)
    return {chain for chain in {*chains}
            if chain == own or kernel.owner(chain).container_id == attachment.container_id}


def _attach(attachment: Attachment, elsewhere: dict[tuple[str, bytes], str], kernel: "Kernel", rules: str,
            again: bool = True) -> str:
    """Commands that publish what is not published `elsewhere`, and note who stands by for whom.

    `again`: whether there may be a chain, with such notes, that is replaced.
    """
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    noted = ruleset.standing_by(kernel.comments(chain)) if again else []
    notes = (ruleset.stand_by(chain, ifname) for ifname in noted)
    return ruleset.attach(attachment, elsewhere, rules) + "".join(notes) + \
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
    free_of: dict[str, list[tuple[str, bytes]]] = {}
    for element, chain in released:
        free_of.setdefault(chain, []).append(element)
    going = frozenset(chains)
    for chain in chains:
        owner, heirs = kernel.owner(chain), []
        for ifname in ruleset.standing_by(kernel.comments(chain)):
            heir = ruleset.chain_of(owner.container_id, ifname)
            if heir not in going and kernel.has_chain(heir):
                heirs.append((heir, ifname, kernel.wanted_by(heir)))
        free = free_of.get(chain, [])
        for heir, ifname, wanted in heirs:
            inherited = [element for element in free if element in wanted]
            free = [element for element in free if element not in wanted]
            text += ruleset.lead(inherited, heir)
            text += "".join(_stand_by(other, [heir], kernel) for _, other, _ in heirs if inherited and other != ifname)
    return text


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
