"""The steps that verbs share: what is written, and what has to be there before.

Functions that fill a change or return commands write nothing; a verb makes one transaction of it.
"""
from .. import ruleset
from ..attachment import Attachment, Port, is_localhost
from ..cni import FOREIGN_TABLE, INVALID_CONFIG, IO_FAILURE, NFT_REFUSED, PORT_TAKEN, TRY_AGAIN_LATER, CniError, warn

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..linux.alive import Verdict
    from ..linux.kernel import Kernel
    from ..ruleset import Change, Element, Owner, Rule, Shared

    Judged = dict[tuple[str, int], Verdict]  # by chain and handle


def try_conditions(attachment: Attachment, kernel: "Kernel") -> None:
    """Let nft read the conditions, alone: the one free text of a configuration. Raises CniError(7)."""
    name_by_index(attachment, kernel)
    for family, text in attachment.conditions.items():
        protocols = sorted({port.protocol for port in attachment.ports if port.family == family}.union(
            protocol for each in attachment.exposure if each.family == family
            for protocol, _ in (*each.opened, *each.trusted)))
        problem = kernel.dry_run_apart(ruleset.probe(family, text, protocols)) if text and protocols else ""
        if problem:
            raise CniError(INVALID_CONFIG, f"conditionsV{family}: {text!r} is not nft match text for "
                           f"{' and '.join(protocols)} ports", problem)


def name_by_index(attachment: Attachment, kernel: "Kernel") -> None:
    """Let conditions have an interface's index where nft compares that: rules are written where there are no others."""
    for each in attachment.exposure:
        each.conditions = ruleset.with_indexes(each.conditions, kernel.index_of)
    for family, text in attachment.conditions.items():
        attachment.conditions[family] = ruleset.with_indexes(text, kernel.index_of)


def chains_of_container(chains: "Iterable[str]", attachment: Attachment, kernel: "Kernel", judged: "Judged") \
        -> set[str]:
    """The chains among `chains` that belong to the attachment's container, on any interface.

    And those of its pod's last sandbox that it stands by for, as long as that is not dead. Raises Unjudged where that
    is not known yet.
    """
    own = ruleset.own_chain(attachment)
    home, unjudged = set(), []
    for chain in filter(ruleset.is_attachment_chain, {*chains}):
        owner = kernel.owner(chain) if chain != own else None
        if owner is None or owner.container_id == attachment.container_id:
            home.add(chain)
        elif ruleset.is_next_sandbox(attachment, owner) and own in standby_chains(chain, kernel).values():
            verdict = verdict_on(owner, attachment, judged, kernel)
            if verdict is None:
                unjudged.append(owner)
            elif verdict[0] != "dead":
                home.add(chain)
    if unjudged:
        raise Unjudged(unjudged)
    return home


def attach(change: "Change", attachment: Attachment, elsewhere: "dict[Element, str]", kernel: "Kernel", rules: str,
           again: bool = True) -> None:
    """Publish what is not published `elsewhere`, and note there that this attachment stands by.

    `rules`: its `rules_text`. `again`: whether there may be a chain, with such notes, that is replaced.
    """
    chain = ruleset.own_chain(attachment)
    change.rules[chain] = rules
    if not again and "\nadd map " in rules:
        change.maps += kernel.port_maps([chain])  # of a chain that somebody has deleted without it
    change.leads |= {element: chain for element in ruleset.elements_of(attachment) if element not in elsewhere}
    noted = ruleset.standby_notes(kernel.comments(chain)) if again else []
    change.notes += ((chain, *note) for note in noted)
    for other in dict.fromkeys(elsewhere.values()):
        change.notes += _new_note(other, attachment.ifname, attachment.container_id, kernel)


def _new_note(chain: str, ifname: str, container_id: str, kernel: "Kernel") -> list[tuple[str, str, str]]:
    """The note in `chain` that another attachment stands by; nothing where it is there already."""
    if kernel.owner(chain).container_id == container_id:
        container_id = ""
    known = (ifname, container_id) in ruleset.standby_notes(kernel.comments(chain))
    return [] if known else [(chain, ifname, container_id)]


def stale_notes(chain: str, attachment: Attachment, kernel: "Kernel") -> list[tuple[str, int]]:
    """The notes in `chain` of sandboxes that are gone: where one after the other fails to start, they would pile up.

    But not that of `attachment`, which comes.
    """
    notes = [note for note in ruleset.standby_notes(kernel.comments(chain))
             if note[1] not in ("", attachment.container_id)]
    gone = {ruleset.standby_comment(*note) for note in notes if not kernel.has_chain(ruleset.chain_of(*note[::-1]))}
    return [(chain, handle) for _, comment, _, handle in (kernel.rules(chain) if gone else ()) if comment in gone]


def detach(change: "Change", chains: "list[str]", owned: "Iterable[tuple[Element, str]]",
           released: "Iterable[tuple[Element, str]]", kernel: "Kernel") -> None:
    """Delete `chains` with all that they own, and give what is `released` to the standby chains."""
    change.chains += chains
    change.elements |= owned
    change.maps += kernel.port_maps(chains)
    inherited, notes = inheritance(chains, released, kernel)
    change.leads |= inherited
    change.notes += notes


def inheritance(chains: "list[str]", released: "Iterable[tuple[Element, str]]", kernel: "Kernel") \
        -> "tuple[dict[Element, str], list[tuple[str, str, str]]]":
    """Who gets what `chains` have `released`, as they go: those that stand by for it.

    Returns where each element is to lead to, and the notes of who stands by there.
    """
    inherited: dict[Element, str] = {}
    notes = []
    free_of: dict[str, list[Element]] = {}
    for element, chain in released:
        free_of.setdefault(chain, []).append(element)
    going = frozenset(chains)
    for chain in chains:
        heirs = {who: heir for who, heir in standby_chains(chain, kernel).items() if heir not in going}
        if not heirs:
            continue
        free = free_of.get(chain, [])
        for who in _in_turn(heirs, kernel.owner(chain).container_id, kernel):
            heir = heirs[who]
            wanted = _may_inherit(heir, free, kernel)
            its = [element for element in free if element in wanted]
            free = [element for element in free if element not in wanted]
            inherited.update(dict.fromkeys(its, heir))
            if its:
                notes += [note for other in heirs if other != who for note in _new_note(heir, *other, kernel)]
    return inherited, [*dict.fromkeys(notes)]


def _in_turn(heirs: "dict[tuple[str, str], str]", container_id: str, kernel: "Kernel") -> list[tuple[str, str]]:
    """Those that stand by for a container, who inherits first comes first.

    First its other interfaces, in their order; then the pod's next sandboxes, the newest first: if one came after
    another, that has failed. Those whose link has gone come last.
    """
    if len(heirs) < 2:
        return [*heirs]
    ages = {who: age for age, (_, who) in enumerate(reversed(heirs))}  # a container has that of its first interface
    return sorted(heirs, key=lambda who: (_is_known_dead(heirs[who], kernel), who[1] != container_id, ages[who[1]]))


def _is_known_dead(chain: str, kernel: "Kernel") -> bool:
    """Whether a chain's owner is dead, as far as its link tells."""
    return (kernel.glance(kernel.owner(chain)) or ("", ""))[0] == "dead"


def standby_chains(chain: str, kernel: "Kernel") -> dict[tuple[str, str], str]:
    """Who stands by for `chain`, the oldest first: interface and container ID, with the chain; those that are there."""
    notes = ruleset.standby_notes(kernel.comments(chain))
    own = kernel.owner(chain).container_id if notes else ""
    chains = {(ifname, container_id or own): ruleset.chain_of(container_id or own, ifname)
              for ifname, container_id in notes}
    return {who: its for who, its in chains.items() if kernel.has_chain(its)}


def _may_inherit(heir: str, free: "Iterable[Element]", kernel: "Kernel") -> "set[Element]":
    """What of the elements that an heir wants it may have: not a port of every address in place of that of one.

    `free`: those that it is offered. A rule for one address may have come of a port of every address and a condition:
    then it has none of that address.
    """
    wanted = kernel.elements_wanted_by(heir)
    has = {element for element, chain in kernel.lookup(wanted).items() if chain == heir}.union(
        element for element in free if element in wanted)
    hidden = {ruleset.wildcard_of_element(element) for element in has if element[0] != ruleset.HOSTPORTS}
    return {element for element, surely in wanted.items() if surely or element not in hidden}


def known_chains(attachments: "Iterable[Attachment]", kernel: "Kernel") -> "Mapping[str, Shared]":
    """The shared chains that are to be there: those of exposure, too, where somebody needs or has needed them."""
    if any(attachment.exposure for attachment in attachments) or kernel.has_set(ruleset.EXPOSED):
        from ..exposure import SHARED
        return {**ruleset.SHARED, **SHARED}
    return ruleset.SHARED


def base(chains: "Mapping[str, list[Rule]]", flushed: "Sequence[str]", known: "Mapping[str, Shared]",
         deleted: "Sequence[str]" = ()) -> str:
    """Commands that make the table, with all sets that the `known` chains need; see `ruleset.base`."""
    if known is ruleset.SHARED:
        return ruleset.base(chains, flushed, deleted=deleted)
    from ..exposure import declarations
    return ruleset.base(chains, flushed, known, declarations(), deleted)


def expose(change: "Change", attachments: "Sequence[Attachment]", kernel: "Kernel") -> None:
    """Add to a change what goes from the sets of exposure with its chains, and what comes with `attachments`."""
    if any(attachment.exposure for attachment in attachments) or kernel.has_set(ruleset.EXPOSED):
        from .expose import fill
        fill(change, attachments, kernel)


def shared_chains(attachments: "Sequence[Attachment]", kernel: "Kernel") -> str:
    """Commands that make or repair what `attachments` share; "" where nothing is missing.

    Raises CniError(103) rather than remove a rule that this plugin did not write.
    """
    chains: dict[str, list[Rule]] = {}
    flushed: list[str] = []
    deleted: list[str] = []
    known = known_chains(attachments, kernel)
    for name in known:
        there = kernel.comments(name)
        if missing_in_order([comment for _, comment in ruleset.shared_rules(name, attachments, (), known)],
                            there) is None:
            continue
        chains[name] = ruleset.shared_rules(name, attachments, there, known)
        if kernel.has_chain(name):
            hook = ruleset.hook_of(known[name].hook)
            (deleted if hook and kernel.hook(name) != hook else flushed).append(name)
        for comment in there:
            if not comment.startswith(ruleset.COMMENT_PREFIX):
                raise CniError(FOREIGN_TABLE, f"cannot rebuild chain {name} of table {ruleset.TABLE}: it has a "
                               f"foreign rule", f"see: nft -a list chain {ruleset.TABLE} {name}")
    if not chains and not kernel.is_dormant():
        return ""
    text = base(chains, flushed, known, deleted)
    if "guard" in (*flushed, *deleted):  # an older one guarded every interface; what is open must not lose its guard
        from ..linux.localhost import interfaces_of_published, open_interfaces
        if kernel.notes_interfaces():
            notes = dict.fromkeys(interfaces_of_published(kernel), ruleset.WAS_OPEN)
        else:  # 0.1.0 did not note what it had opened, for containers that may be gone by now
            notes = {**dict.fromkeys(open_interfaces(), ruleset.FOUND_OPEN),
                     **dict.fromkeys(interfaces_of_published(kernel), ruleset.OPENED)}
        text += ruleset.note_interfaces(notes)
    return text


def missing_in_order(expected: "Iterable[object]", found: "Iterable[object]") -> int | None:
    """The place of the first of `expected` that is not among `found`, after the one before it; None if all are."""
    rest = iter(found)
    for index, item in enumerate(expected):
        if item not in rest:  # an iterator: `in` also moves past what it finds
            return index
    return None


def write_shared_chains(text: str, kernel: "Kernel") -> None:
    """Write the shared chains alone and first: localhost must not be opened before the guard exists.

    Raises CniError(100) where libnftables has dropped its rules, as it would drop an attachment's.
    """
    kernel.transact(text)
    if kernel.is_empty("guard"):  # not one that others have deleted since, and the agent may restore
        raise CniError(NFT_REFUSED, "unsupported libnftables: it drops the rules of new chains",
                       "required: 1.0.7, or Debian's 1.0.6-2+deb12u2")


def repair_shared_chains(kernel: "Kernel", dry_run: bool = False) -> bool:
    """Repair what all containers share, where the table exists; whether there was anything to repair."""
    with kernel.lock():
        text = shared_chains([], kernel) if kernel.has_table() else ""
        if text and not dry_run:
            write_shared_chains(text, kernel)
    return bool(text)


# --- this host's localhost, and who is masqueraded --------------------------------------------------------------

def survey(attachment: Attachment, kernel: "Kernel", quiet: bool = False) -> None:
    """Find out how this host leads to a container: `ways`, `on_link` and `left_alone` of `attachment`.

    Where nothing here leads to it, or localhost cannot, that is one line on stderr, and localhost is left to this host.
    Raises CniError(5) where a port is published there alone, and the system does not let it; not if `quiet`. And
    CniError(7) where the address is this host's own: its services would answer in the container's place.
    """
    if attachment.exposure:
        from .expose import survey as survey_exposure
        survey_exposure(attachment, kernel)
    attachment.ways, attachment.on_link, left_alone = {}, (), set()
    on_link: dict[tuple[str, str], None] = {}
    for family, address in attachment.addresses.items():
        name, leads, own = kernel.way_to(family, address.ip, attachment.links)
        if name == "lo" and any(port.family == family for port in attachment.ports):
            raise CniError(INVALID_CONFIG, f"prevResult: {address.ip} is an address of this host, not of a container",
                           "nothing was published; see: ip address")
        if attachment.mark_bit is None:  # no reply would come back through this host
            if publishes_on_localhost(attachment, family):
                wanted = _is_wanted_on_localhost(attachment, family)
                if wanted and not quiet:
                    warn(f"cannot publish on {'127.0.0.1' if family == 4 else '[::1]'}: snat is false")
                if not wanted:
                    left_alone.add(family)
            continue
        prefixes = [prefix for prefix in attachment.prefixes if (":" in prefix) == (family == 6)]
        on_link |= {(name, prefix): None for prefix in (*prefixes, *own) if name}
        if not name and not quiet and any(port.family == family for port in attachment.ports):
            warn(f"no interface of this host leads to {address.ip}, as with macvlan or a bridge without a gateway: its "
                 "ports do not answer, unless a router leads there")
        if not publishes_on_localhost(attachment, family):
            continue
        if family == 6 and not attachment.localhost6:
            left_alone.add(family)
            continue
        obstacle = kernel.localhost_obstacle(family, name) if leads else \
            f"{name} leads to {address.ip}, but not to containers alone"
        if not obstacle:
            attachment.ways[family] = name
            continue
        host = "127.0.0.1" if family == 4 else "[::1]"
        if quiet:
            continue
        if leads and family == 4 and any(port.host_ip.startswith("127.") for port in attachment.ports):
            raise CniError(IO_FAILURE, f"cannot publish on {host}: {obstacle}",
                           "run it as root, where /proc/sys is writable; or publish on another address")
        if name:
            warn(f"cannot publish on {host}: {obstacle}")
        if not _is_wanted_on_localhost(attachment, family):  # else from other sources than localhost it may work
            left_alone.add(family)
    attachment.on_link, attachment.left_alone = tuple(on_link), frozenset(left_alone)


def publishes_on_localhost(attachment: Attachment, family: int) -> bool:
    """Whether an attachment publishes ports on this host's localhost, alone or with all addresses."""
    ips = {port.host_ip for port in attachment.ports if port.family == family}
    return any(not ip or is_localhost(ip) for ip in ips)


def _is_wanted_on_localhost(attachment: Attachment, family: int) -> bool:
    """Whether a port names an address of localhost."""
    return any(is_localhost(port.host_ip) for port in attachment.ports if port.family == family)


def interfaces_to_note(attachments: "Iterable[Attachment]", kernel: "Kernel", opened_by_us: bool = False) \
        -> dict[str, str]:
    """The interfaces that localhost leads through and that are not noted yet, each with its comment.

    `opened_by_us`: the table that would say so was lost; what is open to `attachments` counts as opened by this plugin.
    """
    names = dict.fromkeys(attachment.ways[4] for attachment in attachments if 4 in attachment.ways)
    return {name: ruleset.WAS_OPEN if kernel.localnet(name) and not opened_by_us else ruleset.OPENED
            for name in names if not kernel.is_noted(name)}


def open_localhost(attachments: "Iterable[Attachment]", kernel: "Kernel") -> None:
    """Let this host's localhost reach the containers that are published there, through what is noted by now."""
    for attachment in attachments:
        if 4 in attachment.ways and not kernel.localnet(attachment.ways[4]):
            kernel.set_localnet(attachment.ways[4], True)
        if 6 in attachment.ways:
            obstacle = kernel.allow_localhost6(attachment.ways[6])
            if obstacle:
                warn(f"cannot publish on [::1]: {obstacle}")


def share_on_link(change: "Change", attachment: Attachment, siblings: "Iterable[str]", kernel: "Kernel") -> None:
    """Let the chains of a container's other interfaces masquerade whom this one makes neighbours.

    And `attachment` those of the others: a client may ask through one network, and be answered through another.
    """
    if attachment.mark_bit is None or not attachment.on_link:
        return
    known = {chain: kernel.comments(chain) for chain in siblings
             if kernel.owner(chain).container_id == attachment.container_id}
    if known:
        theirs = (pair for comments in known.values() for pair in ruleset.on_link_of(comments))
        attachment.on_link = every_way((*attachment.on_link, *theirs))
    for chain, comments in known.items():
        place, rules = ruleset.share_on_link(comments, attachment.on_link, attachment.mark_bit)
        if rules:
            change.inserted[chain] = place, rules


def every_way(on_link: "Iterable[tuple[str, str]]") -> tuple[tuple[str, str], ...]:
    """Each interface of a container with each of its networks: it answers all of them without this host."""
    pairs = [*on_link]
    return tuple(dict.fromkeys((name, prefix) for name, _ in pairs for _, prefix in pairs))


# How often to read again what somebody else's transaction may have changed before ours. Where others write all the
# time, to whatever tables, the last tries mind only what is gone: between our own calls there is the lock.
TRIES, LAST_TRIES = 10, 5


def changed_each_time() -> CniError:
    """The error after so many tries."""
    return CniError(TRY_AGAIN_LATER, f"table {ruleset.TABLE} changed each time between reading and writing",
                    "no changes were made; see who changes it: nft monitor")


def is_flush(error: CniError) -> bool:
    """Whether a transaction failed because what had been read was gone: somebody flushed the ruleset in between."""
    return error.code == NFT_REFUSED and "No such file or directory" in error.msg


# --- conflicts: one owner a port --------------------------------------------------------------------------------

# Owners are judged without the lock, and checked again under it by what cannot hang. The verdicts are kept by
# chain and handle: a chain that was rewritten meanwhile has another handle, and is judged again.

class Unjudged(Exception):
    """Owners without a verdict yet: they are judged without the lock, and then the call is tried again."""

    def __init__(self, owners: "list[Owner]") -> None:
        super().__init__()
        self.owners = owners


class Undecided(Exception):
    """Containers of the reference plugin (IDs) that libcni was not asked for yet: not done under the lock, either."""

    def __init__(self, container_ids: "list[str]") -> None:
        super().__init__()
        self.container_ids = container_ids


class PortTaken(CniError):
    """A port has an owner that is alive or unknown."""

    def __init__(self, msg: str, details: str, owner: "Owner") -> None:
        super().__init__(PORT_TAKEN, msg, details)
        self.owner = owner

    def wait(self, kernel: "Kernel", seconds: float) -> float:
        """Wait until the owner's chain has changed, or it has ended, not longer than `seconds`; how long that took."""
        return kernel.wait_for(self.owner, seconds)


class Bequeathed(PortTaken):
    """A port has an owner that is dead, and another container stands by for it: that gets it, when the owner goes."""


def resolve_conflicts(attachment: Attachment, chain: str, kernel: "Kernel", judged: "Judged") \
        -> "tuple[list[str], dict[Element, str]]":
    """Find the present owners of the ports of `attachment`.

    Returns the chains of dead containers, which are replaced; and the elements that lead to this container through
    another of its interfaces, or to the last sandbox of its pod, which stay, each with the chain that it leads to.

    Raises PortTaken where the owner is another and lives: a port has one owner, and it overlaps as in bind(2);
    Bequeathed where it is dead, and another stands by; and Unjudged where that is not known yet.
    """
    claims: dict[Element, Port] = {}
    wildcards: dict[str, dict[bytes, Port]] = {}
    for port in attachment.ports:
        key = ruleset.key_of(port)
        claims[ruleset.map_of(port), key] = port
        if port.host_ip:
            claims.setdefault(ruleset.wildcard_of(port), port)
        else:
            wildcards.setdefault(ruleset.HOSTIP_HOSTPORTS[port.family], {})[key[ruleset.PROTOCOL_AND_PORT]] = port
    leads_to = kernel.lookup(claims)
    taken: dict[str, Port] = {}
    for element, owner in leads_to.items():
        taken.setdefault(owner, claims[element])
    for name, endings in wildcards.items():
        for owner, ending in kernel.owners_of_port(name, endings):
            taken.setdefault(owner, endings[ending])
    taken.pop(chain, None)
    for other, port in taken.items():
        if not ruleset.is_attachment_chain(other):
            raise CniError(FOREIGN_TABLE, f"{port} is already used by a foreign map element",
                           f"find it: nft list table {ruleset.TABLE}")
    owners = {other: kernel.owner(other) for other in taken}
    verdicts = {other: verdict_on(owner, attachment, judged, kernel) for other, owner in owners.items()}
    unjudged = [owner for other, owner in owners.items() if verdicts[other] is None]
    if unjudged:
        raise Unjudged(unjudged)
    dead, siblings, lines = [], [], []
    for other, port in taken.items():
        state, why = verdicts[other] or ("", "")
        if state == "dead" and any(who != owners[other].container_id for _, who in standby_chains(other, kernel)):
            raise Bequeathed(f"{port} is still published by {owners[other]}, which is dead, and its pod's next sandbox "
                             "stands by", "remove what is dead: cni-portmap gc", owners[other])
        if state == "dead" or (owners[other].is_by_operator and not attachment.by_operator and
                               owners[other].container_id == attachment.container_id):
            dead.append(other)  # what its runtime asks for comes before what an operator has published
        elif owners[other].container_id == attachment.container_id and _same_namespace(owners[other], attachment):
            siblings.append(other)
            lines.append(f"{port} is already published through {owners[other].ifname} of this container; "
                         f"{attachment.ifname} will take over when {owners[other].ifname} is removed")
        elif ruleset.is_next_sandbox(attachment, owners[other]):
            siblings.append(other)
            lines.append(f"{port} is still published by container {owners[other].container_id}, this pod's last "
                         f"sandbox; {attachment.container_id} will take over when that is removed")
        else:
            raise PortTaken(f"{port} is already published by {owners[other]}", why, owners[other])
    for line in lines:
        warn(line)
    own = ruleset.elements_of(attachment)
    return dead, {element: owner for element, owner in leads_to.items() if owner in siblings and element in own}


def _same_namespace(owner: "Owner", attachment: Attachment) -> bool:
    """Whether two interfaces may be in one network namespace, as those of one container are."""
    return not owner.inode or not attachment.inode or owner.inode == attachment.inode


def refuse_namesake(attachment: Attachment, chain: str, kernel: "Kernel", judged: "Judged") -> None:
    """Raise CniError(101) if the attachment's own chain belongs to a namesake: in another network, and it lives.

    Runtimes that share a host may use one container ID twice; network, ID and interface together are unique.
    """
    owner = kernel.owner(chain)
    if owner.network in ("", attachment.network) or (owner.inode and owner.inode == attachment.inode) or \
            (owner.link and owner.link == attachment.link):
        return
    verdict = verdict_on(owner, attachment, judged, kernel)
    if verdict is None:
        raise Unjudged([owner])
    if verdict[0] != "dead":
        raise PortTaken(f"this container ID and interface are already published: {owner}", verdict[1], owner)


def judge(owners: "list[Owner]", judged: "Judged", kernel: "Kernel") -> None:
    """Judge these owners, as they are now. Not under the lock."""
    now = [kernel.owner(owner.chain) for owner in owners]
    for owner, before in zip(now, owners, strict=True):
        owner.link = owner.link if before.link else ""
    verdicts = kernel.judge(now)
    judged |= {(owner.chain, owner.handle): verdicts[owner.chain] for owner in now}


def verdict_on(owner: "Owner", attachment: Attachment, judged: "Judged", kernel: "Kernel") -> "Verdict | None":
    """The verdict on an owner that conflicts with `attachment`, which lives; None if it is not known under the lock."""
    seen = kernel.glance(owner)
    another = owner.container_id != attachment.container_id
    if another and owner.link and owner.link == attachment.link:
        owner.link = ""  # one of the two does not own it: it is no witness
    elif seen:
        return seen
    if owner.inode and owner.inode == attachment.inode:
        if another and owner.ifname == attachment.ifname:
            return "dead", "its interface is another's"  # one of a name in a namespace; its number may be used again
        return "alive", f"its network namespace {owner.path} is alive"
    return judged.get((owner.chain, owner.handle))
