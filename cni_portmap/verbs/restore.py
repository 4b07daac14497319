"""The repairs of the operator's command: ports that a flush has removed, and stale rules of dead containers.

After `nft flush ruleset` or a firewall's reload the kernel has lost every published port, while the containers live
on and no runtime calls again. No call of a runtime needs any of this.
"""
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .. import ruleset
from ..attachment import Attachment, Port
from ..cni import PORT_TAKEN, CniError
from ..linux.alive import DEAD
from ..linux.kernel import Kernel
from ..linux.localhost import open_interfaces
from .delete import remove_each
from .flows import delete_flows_elsewhere, delete_released_flows
from .steps import (Unjudged, attach, chains_of_container, detach, interfaces_to_note, judge, open_localhost,
                    resolve_conflicts, shared_chains, survey, write_shared_chains)

if TYPE_CHECKING:
    from ..linux.alive import Verdict
    from ..ruleset import Element
    from .steps import Judged


def prune(kernel: Kernel, dry_run: bool = False) \
        -> tuple[list[tuple[ruleset.Owner, "Verdict"]], list[tuple[ruleset.Owner, CniError]]]:
    """Remove every attachment whose container is gone, each by itself where not all of them can go.

    Returns what was found of each, also of those that stay; and those that could not be removed, with the reason.
    `dry_run`: nothing is written.
    """
    handles = kernel.handles()
    owners = kernel.owners()
    verdicts = kernel.judge(owners)
    dead = [owner for owner in owners if verdicts[owner.chain][0] == DEAD]
    refused = [] if dry_run else remove_each(dead, handles, kernel)
    return [(owner, verdicts[owner.chain]) for owner in owners], refused


def restore(attachments: Iterable[Attachment], kernel: Kernel, dry_run: bool = False,
            is_current: Callable[[Attachment], bool] = lambda _: True) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    """Publish again what of `attachments` the kernel has lost: the base, then all of them in one transaction.

    Where that is refused, each by itself: one that nft does not take keeps no other away. Returns those that are
    published again, and those that cannot be, each with the reason. The first of two that claim one port gets it.
    `dry_run`: nothing is written. `is_current`: asked under the lock whether an attachment has not been deleted, or
    come back by itself, since it was read; one that has is passed over.
    """
    attachments = [*attachments]
    judged: Judged = {}
    try:
        return _restore_together(attachments, kernel, dry_run, is_current, judged)
    except _Refused as why:
        forgotten = why.forgotten
    lost: list[Attachment] = []
    refused: list[tuple[Attachment, CniError]] = []
    for attachment in attachments:
        try:
            its_lost, its_refused = _restore_together([attachment], kernel, dry_run, is_current, judged, forgotten)
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
                      is_current: Callable[[Attachment], bool], judged: "Judged", forgotten: bool = False) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    while True:
        try:
            lost, refused, released, targets = _restore(attachments, kernel, dry_run, is_current, judged, forgotten)
            break
        except Unjudged as unjudged:
            judge(unjudged.owners, judged, kernel)
    if not dry_run:
        for attachment in lost:
            delete_flows_elsewhere(attachment, kernel)
        delete_released_flows(released, targets, kernel)
    return lost, refused


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
             is_current: Callable[[Attachment], bool], judged: "Judged", forgotten: bool) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]], list[tuple["Element", str]],
                 dict[str, set[bytes]]]:
    """What is restored, what is refused, and as in ADD: the elements that are released, and where those led.

    `forgotten`: whether the table was gone until now, so that what is open had been opened by this plugin. Raises
    _Refused where the attachments could not be written.
    """
    attachments, unreachable = _survey_each(attachments, kernel)
    texts = {id(attachment): ruleset.rules_text(attachment) for attachment in attachments}
    with kernel.lock():
        plan = _decide(attachments, kernel, is_current, judged)
        needed = [plan.asked[chain][0] for chain in plan.whole | plan.to_rewrite]
        lost_table = not kernel.has_table()
        exposed = open_interfaces() if lost_table else []  # who opened them the lost table said
        shared = shared_chains(needed, kernel) if needed or exposed else ""
        notes = interfaces_to_note(needed, kernel, opened_by_us=forgotten or lost_table)
        shared += ruleset.note_interfaces({name: notes.get(name, ruleset.FOUND_OPEN) for name in exposed})
        replaced = [chain for chain in sorted(plan.to_remove) if kernel.has_chain(chain)]
        owned, targets = kernel.owned_elements(replaced), kernel.targets(replaced)
        text = detach(replaced, owned, (), kernel)
        lost = [attachment for chain, (attachment, _) in plan.asked.items() if chain in plan.to_rewrite]
        leads_to: dict[Element, str] = {}
        for attachment in lost:
            chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
            leads_to |= {element: other for element, other in plan.asked[chain][1].items()
                         if other not in plan.to_remove}
            own = ruleset.elements_of(attachment)
            elsewhere = {element: leads_to[element] for element in own if element in leads_to}
            text += attach(attachment, elsewhere, kernel, texts[id(attachment)])
            for element in own:
                leads_to.setdefault(element, chain)
        refused = [*unreachable, *plan.refused]
        if not dry_run:
            if shared:
                write_shared_chains(shared, kernel)
            try:
                text += ruleset.note_interfaces(notes)
                if text:
                    kernel.transact(text)
            except CniError as error:
                raise _Refused(error, forgotten or lost_table) from None
            open_localhost(needed, kernel)
    return lost, refused, [item for item in owned if item[0] not in leads_to], targets


def _survey_each(attachments: list[Attachment], kernel: Kernel) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    """Survey attachments; those that can be published, and those that cannot, each with the reason."""
    good, refused = [], []
    for attachment in attachments:
        try:
            survey(attachment, kernel)
            good.append(attachment)
        except CniError as error:
            refused.append((attachment, error))
    return good, refused


def _decide(attachments: list[Attachment], kernel: Kernel, is_current: Callable[[Attachment], bool],
            judged: "Judged") -> _Plan:
    plan = _Plan()
    claimed: dict[Element, dict[str, Attachment]] = {}  # by container ID; by a key's ending, too
    unjudged: list[ruleset.Owner] = []
    for attachment in attachments:
        chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
        if chain in plan.asked or not is_current(attachment):
            continue  # two folders remember it, or none does any more
        ports = ruleset.elements_of(attachment)
        found = kernel.lookup(ports)
        plan.asked[chain] = attachment, found
        if _is_whole(attachment, chain, found, kernel):
            plan.whole.add(chain)
        else:
            try:
                for element, port in ports.items():
                    _refuse_overlap(element, port, attachment, claimed)
                plan.to_remove.update(resolve_conflicts(attachment, chain, kernel, judged)[0])
            except Unjudged as its:
                unjudged += its.owners
            except CniError as error:
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


def _is_whole(attachment: Attachment, chain: str, found: "dict[Element, str]", kernel: Kernel) -> bool:
    """Whether nothing was removed of what `attachment` published. `found`: where its elements lead to."""
    return len(kernel.comments(chain)) >= len([*ruleset.rules_of(attachment)]) and \
        len(found) == len(attachment.ports) and \
        chains_of_container(found.values(), attachment, kernel).issuperset(found.values())


def _refuse_overlap(element: "Element", port: Port, attachment: Attachment,
                    claimed: "dict[Element, dict[str, Attachment]]") -> None:
    """Raise CniError(101) if another of the attachments that are being restored claims an overlapping port."""
    overlapping = ruleset.wildcard_of(port) if port.host_ip else \
        (ruleset.HOSTIP_HOSTPORTS[port.family], element[1][ruleset.PROTOCOL_AND_PORT])
    for other in element, overlapping:
        for container_id, owner in claimed.get(other, {}).items():
            if container_id != attachment.container_id:
                raise CniError(PORT_TAKEN, f"{port} is already published by container {container_id}, interface "
                               f"{owner.ifname}, network {owner.network}")
