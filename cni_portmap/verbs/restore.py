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
from .steps import (Unjudged, attach, chains_of_container, detach, interfaces_to_note, judge, open_localhost,
                    resolve_conflicts, shared_chains, survey, write_shared_chains)

if TYPE_CHECKING:
    from ..linux.alive import Verdict
    from ..ruleset import Element
    from .steps import Judged


def prune(kernel: Kernel, dry_run: bool = False) -> list[tuple[ruleset.Owner, "Verdict"]]:
    """Remove every attachment whose container is gone; what was found of each, also of those that stay.

    `dry_run`: nothing is written.
    """
    handles = kernel.handles()
    owners = kernel.owners()
    verdicts = kernel.judge(owners)
    if not dry_run:
        remove_each([owner for owner in owners if verdicts[owner.chain][0] == DEAD], handles, kernel)
    return [(owner, verdicts[owner.chain]) for owner in owners]


def restore(attachments: Iterable[Attachment], kernel: Kernel, dry_run: bool = False,
            is_current: Callable[[Attachment], bool] = lambda _: True) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    """Publish again what of `attachments` the kernel has lost: the base, then all of them in one transaction.

    Returns those that are published again, and those that cannot be, each with the reason. The first of two that
    claim one port gets it. `dry_run`: nothing is written. `is_current`: asked under the lock whether an attachment has
    not been deleted, or come back by itself, since it was read; one that has is passed over.
    """
    attachments = [*attachments]
    judged: Judged = {}
    while True:
        try:
            return _restore(attachments, kernel, dry_run, is_current, judged)
        except Unjudged as unjudged:
            judge(unjudged.owners, judged, kernel)


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
             is_current: Callable[[Attachment], bool], judged: "Judged") \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    for attachment in attachments:
        survey(attachment, kernel)
    texts = {id(attachment): ruleset.rules_text(attachment) for attachment in attachments}
    with kernel.lock():
        plan = _decide(attachments, kernel, is_current, judged)
        needed = [plan.asked[chain][0] for chain in plan.whole | plan.to_rewrite]
        lost_table = not kernel.has_table()
        exposed = open_interfaces() if lost_table else []  # who opened them the lost table said
        shared = shared_chains(needed, kernel) if needed or exposed else ""
        notes = interfaces_to_note(needed, kernel, opened_by_us=lost_table)
        shared += ruleset.note_interfaces({name: notes.get(name, ruleset.FOUND_OPEN) for name in exposed})
        replaced = [chain for chain in sorted(plan.to_remove) if kernel.has_chain(chain)]
        text = detach(replaced, kernel.owned_elements(replaced), (), kernel)
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
        if dry_run:
            return lost, plan.refused
        if shared:
            write_shared_chains(shared, kernel)
        text += ruleset.note_interfaces(notes)
        if text:
            kernel.transact(text)
        open_localhost(needed, kernel)
    return lost, plan.refused


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
