"""Take over what the reference plugin has published, and the way back: release what it publishes again.

Ours first, theirs after: there is no instant without an answer, and established flows live on, because both lead to the
same address and connection tracking remembers it.
"""
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .. import ruleset
from ..attachment import Attachment
from ..libcni_cache import Gone, Memory, Skipped
from ..linux.alive import DEAD
from ..linux.kernel import Kernel
from ..reference import Leftover
from .delete import remove_each
from .flows import delete_released_flows
from .leftovers import addresses_elsewhere, element_of, of, released, remove
from .restore import restore


class Adoption(NamedTuple):
    """The result of `adopt`: attachments that are ours now, each with the backends that had published it.

    `removed`: containers that were dead, with what proves it; `left`: those that could not be adopted, with the reason.
    """

    adopted: list[tuple[Attachment, list[str]]]
    removed: list[tuple[Leftover, str]]
    left: list[tuple[Leftover, str]]


def adopt(kernel: Kernel, folders: Sequence[str], plugin: str, dry_run: bool = False) -> Adoption:
    """Publish every live container that the reference plugin has published, and then remove that plugin's rules.

    The attachments are those of libcni's files in `folders`, of the network's plugins that of the type `plugin`. What
    the dead have left goes; what cannot be adopted stays as it is. `dry_run`: nothing is written.
    """
    found = kernel.leftovers(lambda *_: True) if kernel.has_reference() else []
    if not found:
        return Adoption([], [], [])
    memory = Memory(folders, plugin, kernel)
    cached = [each for _, each in memory.found]
    live = [each for each in cached if isinstance(each, Attachment) and any(_is_of(leftover, each)
                                                                          for leftover in found)]
    _, refused = restore(live, kernel, dry_run, memory.is_current, adopting=True)
    reasons = {id(attachment): error.msg for attachment, error in refused}
    mine = [attachment for attachment in live if id(attachment) not in reasons]
    done = Adoption([(attachment, sorted({leftover.backend for leftover in found if _is_of(leftover, attachment)}))
                     for attachment in mine], [], [])
    for leftover in _first_of_each(found):
        its = [attachment for attachment in live if _is_of(leftover, attachment)]
        if not its:
            files = [each for each in cached if each.container_id == leftover.container_id]
            said = [each for each in files if isinstance(each, Skipped)]
            dead = files and all(isinstance(each, Gone) for each in files)
            reason = str(said[0]) if said else f"libcni has no file of it in {', '.join(folders)}"
            (done.removed if dead else done.left).append((leftover, reason))
            continue
        whys = [reasons[id(attachment)] for attachment in its if id(attachment) in reasons]
        networks = [attachment.network for attachment in its if id(attachment) not in reasons]
        if not networks:
            done.left.append((leftover, whys[0]))
        elif _stays(leftover, found, networks, folders):
            whys += [str(each) for each in cached if isinstance(each, Skipped) and
                        each.container_id == leftover.container_id]
            done.left.append((leftover, whys[0] if whys else "its rules lead to another network of it"))
    if not dry_run:
        left = {(leftover.container_id, leftover.network) for leftover, _ in done.left}
        rivals = [each for each in found if (each.container_id, each.network) in left]
        _remove(mine, [leftover.container_id for leftover, _ in done.removed], rivals, folders, kernel)
    return done


def _is_of(leftover: Leftover, attachment: Attachment) -> bool:
    return leftover.container_id == attachment.container_id and leftover.network in ("", attachment.network)


def _stays(first: Leftover, found: Iterable[Leftover], networks: Iterable[str], folders: Sequence[str]) -> bool:
    """Whether something is left of a container that is adopted in some `networks`, but not in all of its own.

    Only with backend nftables, which does not record the network.
    """
    if first.network:
        return False
    elsewhere = frozenset.intersection(*(addresses_elsewhere(first.container_id, network, folders)
                                         for network in networks))
    return any(address in elsewhere for each in found if (each.container_id, each.network) == (first.container_id, "")
               for _, _, address in each.rules)


def _first_of_each(found: Iterable[Leftover]) -> list[Leftover]:
    """One leftover of each container and network."""
    return [*{(leftover.container_id, leftover.network): leftover for leftover in reversed([*found])}.values()]


def _remove(mine: Iterable[Attachment], dead: Sequence[str], rivals: Iterable[Leftover], folders: Sequence[str],
            kernel: Kernel) -> None:
    """Remove the leftovers of attachments that are published here, and of the dead.

    Not those with a port that one of the `rivals`, which stay, has as well: at one priority the hook registered
    last comes first, so where that is the reference plugin's, its oldest rule still decides who has the port.
    """
    contested: dict[tuple[int, int, int], set[str]] = {}
    for rival in rivals:
        for protocol, _, port, _ in rival.forwards:
            contested.setdefault((rival.family, protocol, port), set()).add(rival.container_id)

    def find() -> list[Leftover]:
        its = [leftover for attachment in mine
               if kernel.has_chain(ruleset.own_chain(attachment))
               for leftover in of(attachment.container_id, attachment.network, kernel, folders)
               if not any(contested.get((leftover.family, protocol, port), set()) - {leftover.container_id}
                          for protocol, _, port, _ in leftover.forwards)]
        its += kernel.leftovers(lambda _, container_id: container_id in dead) if dead else []
        return [*{(each.backend, each.family, each.container_id, each.network): each for each in its}.values()]
    with kernel.lock():
        gone = remove(find, kernel)
    delete_released_flows(*released([each for each in gone if each.container_id in dead]), kernel)


# --- the way back ---------------------------------------------------------------------------------------------

class Release(NamedTuple):
    """The result of `release`: owners that are not published here any more, and those that are, each with why."""

    released: list[tuple[ruleset.Owner, str]]
    kept: list[tuple[ruleset.Owner, str]]


def release(kernel: Kernel, prefixes: Sequence[str] = (), force: bool = False, dry_run: bool = False) -> Release:
    """Remove what is published here for containers that the reference plugin publishes too, and for the dead.

    A dead container's ports shadow those of the reference plugin's next ones. A live container stays where that plugin
    lacks one of its ports; not with `force`. `prefixes`: only containers whose ID begins with one of these. `dry_run`:
    nothing is written.
    """
    owners = [owner for owner in kernel.owners() if not prefixes or owner.container_id.startswith(tuple(prefixes))]
    verdicts = kernel.judge(owners)
    theirs: dict[str, set[ruleset.Element]] = {}
    has: dict[ruleset.Element, str] = {}
    for leftover in kernel.leftovers(lambda *_: True) if owners and kernel.has_reference() else []:
        elements = {*map(element_of, leftover.forwards)}
        theirs.setdefault(leftover.container_id, set()).update(elements)
        has |= dict.fromkeys(elements, leftover.container_id)
    done, going_on = Release([], []), set()
    for owner in owners:
        own = [element for element, _ in kernel.owned_elements([owner.chain])]
        published = owner.container_id in theirs
        missing = [element for element in own if element not in theirs.get(owner.container_id, ())]
        going_on |= {*own} - {*missing}
        shadowed = sorted({has[element] for element in own if element in has} - {owner.container_id})
        state, why = verdicts[owner.chain]
        if state == DEAD:
            done.released.append((owner, why))
        elif published and not missing:
            done.released.append((owner, "the reference plugin publishes it"))
        else:
            what = ", ".join(sorted({_text(element) for element in missing})) if published else "this container"
            reason = f"the reference plugin does not publish {what}" + "".join(
                f"; its container {container_id} has a port of these" for container_id in shadowed)
            (done.released if force else done.kept).append((owner, reason))
    if not dry_run:
        refused = remove_each([owner for owner, _ in done.released], kernel, going_on) if done.released else []
        reasons = {owner.chain: error.msg for owner, error in refused}
        done = Release([each for each in done.released if each[0].chain not in reasons],
                       [*done.kept, *((owner, reasons[owner.chain]) for owner, _ in refused)])
    return done


def _text(element: "ruleset.Element") -> str:
    """A port as people write it: "8080/tcp"."""
    _, protocol, _, port = ruleset.claim_of(element)
    return f"{port}/{ruleset.PROTOCOLS.get(protocol, protocol)}"
