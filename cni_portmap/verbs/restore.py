"""The repairs of the operator's command: ports that a flush has removed, and stale rules of dead containers.

After `nft flush ruleset` or a firewall's reload the kernel has lost every published port, while the containers live
on and no runtime calls again. No call of a runtime needs any of this.
"""
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from .. import ruleset
from ..attachment import Attachment, Port
from ..cni import PORT_TAKEN, CniError
from ..linux.alive import DEAD
from ..linux.kernel import Kernel
from ..linux.localhost import open_bridges, open_interfaces
from .delete import remove_each
from .flows import delete_flows_elsewhere, delete_released_flows
from .steps import (Bequeathed, PortTaken, Unjudged, attach, chains_of_container, changed_each_time, detach, every_way,
                    expose, interfaces_to_note, judge, name_by_index, open_localhost, resolve_conflicts, share_on_link,
                    shared_chains, standby_chains, survey, write_shared_chains)

if TYPE_CHECKING:
    from ..linux.alive import Verdict
    from ..ruleset import Element
    from .steps import Judged

EMPTY: Mapping[str, str] = {}


def prune(kernel: Kernel, dry_run: bool = False, among: dict[str, int] | None = None) \
        -> tuple[list[tuple[ruleset.Owner, "Verdict"]], list[tuple[ruleset.Owner, CniError]]]:
    """Remove every attachment whose container is gone, each by itself where not all of them can go.

    Returns what was found of each, also of those that stay; and those that could not be removed, with the reason.
    `dry_run`: nothing is written. `among`: only these chains, where they still have these handles.
    """
    owners = [owner for owner in kernel.owners() if among is None or among.get(owner.chain) == owner.handle]
    verdicts = kernel.judge(owners)
    dead = [owner for owner in owners if verdicts[owner.chain][0] == DEAD]
    refused = [] if dry_run else remove_each(dead, kernel)
    return [(owner, verdicts[owner.chain]) for owner in owners], refused


def restore(attachments: Iterable[Attachment], kernel: Kernel, dry_run: bool = False,
            is_current: Callable[[Attachment], bool] = lambda _: True, *, adopting: bool = False,
            noted: Mapping[str, str] = EMPTY) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    """Publish again what of `attachments` the kernel has lost: the base, then all of them in one transaction.

    Where that is refused, each by itself: one that nft does not take keeps no other away. Returns those that are
    published again, and those that cannot be, each with the reason. The first of two that claim one port gets it.
    What a dead sandbox has left goes to the next one of its pod. `dry_run`: nothing is written. `is_current`: asked
    under the lock whether an attachment has not been deleted, or come back by itself, since it was read; one that has
    is passed over. `adopting`: so are, without this, those that the reference plugin publishes: nothing of them is
    lost. `noted`: interfaces that the table noted when it was last seen, with their comments.
    """
    attachments = [*attachments]
    if not adopting and kernel.has_reference():
        from .leftovers import not_theirs
        attachments = not_theirs(attachments, kernel)
    judged: Judged = {}
    try:
        return _restore_together(attachments, kernel, dry_run, is_current, judged, noted=noted)
    except _Refused as why:
        forgotten = why.forgotten
    lost: list[Attachment] = []
    refused: list[tuple[Attachment, CniError]] = []
    for attachment in attachments:
        try:
            its_lost, its_refused = _restore_together([attachment], kernel, dry_run, is_current, judged, forgotten,
                                                      noted)
            lost += its_lost
            refused += its_refused
        except _Refused as why:
            refused.append((attachment, why.error))
    return lost, refused


class _Refused(Exception):
    """The attachments, but not what they share, could not be written. `forgotten`: see `_restore`."""

    def __init__(self, error: CniError, forgotten: bool) -> None:
        super().__init__()
        self.error, self.forgotten = error, forgotten


def _restore_together(attachments: list[Attachment], kernel: Kernel, dry_run: bool,
                      is_current: Callable[[Attachment], bool], judged: "Judged", forgotten: bool = False,
                      noted: Mapping[str, str] = EMPTY) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    left_by_dead: set[Element] = set()
    while True:
        try:
            lost, refused, leads, released, targets = _restore(attachments, kernel, dry_run, is_current, judged,
                                                               forgotten, noted)
            break
        except Unjudged as unjudged:
            judge(unjudged.owners, judged, kernel)
        except Bequeathed as left:
            left_by_dead.update(element for element, _ in kernel.owned_elements([left.owner.chain]))
            stays = remove_each([left.owner], kernel)
            if stays:
                raise _Refused(stays[0][1], forgotten) from None
    if not dry_run:
        for attachment in lost:
            delete_flows_elsewhere(attachment, leads, kernel)
        delete_released_flows(released, targets, kernel)
    heirs = {*kernel.lookup(left_by_dead).values()} if left_by_dead else ()
    return [*lost, *(each for each in attachments if each not in lost and ruleset.own_chain(each) in heirs)], refused


class _Plan:
    """The changes for the attachments that libcni has cached, by their chains.

    `asked`: each with where its elements lead now; `whole`: those that have lost nothing; `to_rewrite`: those that
    have; `to_remove`: the chains of the dead, and those that are written again; `refused`: with the reason.
    """

    def __init__(self) -> None:
        self.asked: dict[str, tuple[Attachment, dict[Element, str]]] = {}
        self.whole: set[str] = set()
        self.to_rewrite: set[str] = set()
        self.to_remove: set[str] = set()
        self.refused: list[tuple[Attachment, CniError]] = []


def _restore(attachments: list[Attachment], kernel: Kernel, dry_run: bool,
             is_current: Callable[[Attachment], bool], judged: "Judged", forgotten: bool,
             noted: Mapping[str, str]) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]], dict["Element", str],
                 list[tuple["Element", str]], dict[str, set[bytes]]]:
    """What is restored, what is refused, and as in ADD: where elements lead, which are released, where those led.

    `forgotten`: whether the table was gone until now, so that what is open had been opened by this plugin. `noted`: see
    `restore`. Raises _Refused where the attachments could not be written.
    """
    attachments, unreachable = _survey_each(attachments, kernel)
    _share_on_link(attachments)
    texts = {id(attachment): ruleset.rules_text(attachment) for attachment in attachments}
    with kernel.lock():
        plan = _decide(attachments, kernel, dry_run, is_current, judged)
        needed = [plan.asked[chain][0] for chain in plan.whole | plan.to_rewrite]
        lost_table = not kernel.has_table()
        # Who opened them the lost table said. An ADD may have made another since, and noted its own interface.
        exposed = open_interfaces() if lost_table else \
            [name for name in dict.fromkeys((*open_bridges(), *filter(kernel.localnet, noted)))
             if not kernel.is_noted(name)]
        shared = shared_chains(needed, kernel) if needed or exposed or not lost_table else ""
        notes = interfaces_to_note(needed, kernel, opened_by_us=forgotten or lost_table)
        shared += ruleset.note_interfaces({name: notes.get(name) or noted.get(name) or ruleset.FOUND_OPEN
                                          for name in exposed})
        replaced = [chain for chain in sorted(plan.to_remove) if kernel.has_chain(chain)]
        owned, targets = kernel.owned_elements(replaced), kernel.targets(replaced)
        change = ruleset.Change()
        detach(change, replaced, owned, (), kernel)
        lost = [attachment for chain, (attachment, _) in plan.asked.items() if chain in plan.to_rewrite]
        leads_to: dict[Element, str] = {}
        for attachment in lost:
            chain = ruleset.own_chain(attachment)
            leads_to |= {element: other for element, other in plan.asked[chain][1].items()
                         if other not in plan.to_remove}
            own = ruleset.elements_of(attachment)
            elsewhere = {element: leads_to[element] for element in own if element in leads_to}
            whole = [other for other in dict.fromkeys(elsewhere.values()) if other not in plan.to_rewrite]
            share_on_link(change, attachment, whole, kernel)
            rules = ruleset.rules_text(attachment) if whole else texts[id(attachment)]
            attach(change, attachment, elsewhere, kernel, rules)
            for element in own:
                leads_to.setdefault(element, chain)
        expose(change, lost, kernel)
        refused = [*unreachable, *plan.refused]
        if not dry_run:
            if shared:
                write_shared_chains(shared, kernel)
            try:
                change.interfaces = notes
                if (lost or replaced or notes) and not kernel.write(change):
                    raise changed_each_time()
            except CniError as error:
                raise _Refused(error, forgotten or lost_table) from None
            open_localhost(needed, kernel)
    return lost, refused, change.leads, [item for item in owned if item[0] not in leads_to], targets


def _survey_each(attachments: list[Attachment], kernel: Kernel) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    """Survey attachments; those that can be published, and those that cannot, each with the reason."""
    good, refused = [], []
    for attachment in attachments:
        try:
            name_by_index(attachment, kernel)
            survey(attachment, kernel)
            good.append(attachment)
        except CniError as error:
            refused.append((attachment, error))
    return good, refused


def _share_on_link(attachments: list[Attachment]) -> None:
    """Let those of one container that publish the same masquerade whom the others make neighbours, as ADD does."""
    by_container: dict[str, list[Attachment]] = {}
    for attachment in attachments:
        by_container.setdefault(attachment.container_id, []).append(attachment)
    for its in by_container.values():
        if len(its) > 1:
            elements = [ruleset.elements_of(each).keys() for each in its]
            ways = [[way for each, theirs in zip(its, elements, strict=True) if theirs & own
                     for way in each.on_link or ()] for own in elements]
            for each, on_link in zip(its, ways, strict=True):
                if each.on_link:
                    each.on_link = every_way((*each.on_link, *on_link))


def _decide(attachments: list[Attachment], kernel: Kernel, dry_run: bool, is_current: Callable[[Attachment], bool],
            judged: "Judged") -> _Plan:
    """What is to be written. Raises Unjudged; and Bequeathed, but not for a `dry_run`."""
    plan = _Plan()
    claimed: dict[Element, dict[str, Attachment]] = {}  # by container ID; by a key's ending, too
    unjudged: list[ruleset.Owner] = []
    for attachment in attachments:
        chain = ruleset.own_chain(attachment)
        if chain in plan.asked or not is_current(attachment):
            continue  # two folders remember it, or none does any more
        ports = ruleset.elements_of(attachment)
        found = kernel.lookup(ports)
        plan.asked[chain] = attachment, found
        try:
            is_whole = _is_whole(attachment, chain, found, kernel, judged)
        except Unjudged as its:
            unjudged += its.owners
            continue
        if is_whole:
            plan.whole.add(chain)
        else:
            try:
                for element, port in ports.items():
                    _refuse_overlap(element, port, attachment, claimed)
                plan.to_remove.update(resolve_conflicts(attachment, chain, kernel, judged)[0])
            except Unjudged as its:
                unjudged += its.owners
            except CniError as error:
                if isinstance(error, Bequeathed) and not dry_run:
                    raise
                if not _is_by_last_sandbox(error, attachment, chain, plan, kernel):
                    plan.refused.append((attachment, error))
                    continue
            plan.to_rewrite.add(chain)
        for name, key in ports:
            for claim in (name, key), (name, key[ruleset.PROTOCOL_AND_PORT]):
                claimed.setdefault(claim, {}).setdefault(attachment.container_id, attachment)
    if unjudged:
        raise Unjudged(unjudged)
    plan.to_remove |= plan.to_rewrite
    while orphaned := {chain for chain in plan.whole - plan.to_remove
                       if plan.to_remove.intersection(plan.asked[chain][1].values())}:
        plan.to_rewrite |= orphaned  # they stand by for a chain that is written again
        plan.to_remove |= orphaned
    return plan


def _is_by_last_sandbox(error: CniError, attachment: Attachment, chain: str, plan: _Plan, kernel: Kernel) -> bool:
    """Whether what refuses an attachment is its pod's last sandbox, which gets its lost record again, or which died."""
    last = error.owner.chain if isinstance(error, PortTaken) else ""
    return chain in standby_chains(last, kernel).values() if isinstance(error, Bequeathed) else \
        last in plan.to_rewrite and ruleset.is_next_sandbox(attachment, plan.asked[last][0])


def _is_whole(attachment: Attachment, chain: str, found: "dict[Element, str]", kernel: Kernel, judged: "Judged") \
        -> bool:
    """Whether nothing was removed of what `attachment` published. `found`: where its elements lead to.

    And whether somebody is left whom they lead to. Raises Unjudged.
    """
    if attachment.exposure:
        from .expose import is_whole
        if not is_whole(attachment, kernel):
            return False
    maps = ruleset.port_maps_of(attachment)
    comments = kernel.comments(chain)
    return len(comments) - len(ruleset.standby_notes(comments)) >= len([*ruleset.rules_of(attachment)]) and \
        all(len([*kernel.raw_elements(name)]) == len(pairs) for pairs, name in maps.items()) and \
        len(found) == len(attachment.ports) and \
        chains_of_container(found.values(), attachment, kernel, judged).issuperset(found.values())


def _refuse_overlap(element: "Element", port: Port, attachment: Attachment,
                    claimed: "dict[Element, dict[str, Attachment]]") -> None:
    """Raise CniError(101) if another of the attachments that are being restored claims an overlapping port."""
    overlapping = ruleset.wildcard_of(port) if port.host_ip else \
        (ruleset.HOSTIP_HOSTPORTS[port.family], element[1][ruleset.PROTOCOL_AND_PORT])
    for other in element, overlapping:
        for container_id, owner in claimed.get(other, {}).items():
            if container_id != attachment.container_id and not ruleset.is_next_sandbox(attachment, owner):
                raise CniError(PORT_TAKEN, f"{port} is already published by container {container_id}, interface "
                               f"{owner.ifname}, network {owner.network}")
