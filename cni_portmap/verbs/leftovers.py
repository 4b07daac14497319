"""What the reference plugin has left, as the verbs see it: whose it is, whether it goes, and which flows go with it.

Nothing of it is loaded where that plugin never was, see `Kernel.has_reference`.
"""
from .. import ruleset
from ..attachment import Attachment
from ..cni import CHECK_FAILED, TRY_AGAIN_LATER, CniError
from ..reference import NFTABLES, Leftover
from .flows import delete_released_flows
from .steps import LAST_TRIES, TRIES, PortTaken, Undecided

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from ..linux.kernel import Kernel
    from ..reference import Forward
    from ..ruleset import Element

    Deaths = dict[str, str]  # by container ID: what proves it dead, "" for nothing


class PortTakenByReference(PortTaken):
    """A port that a container has through the reference plugin, and no proof that it is dead."""

    def __init__(self, port: str, leftover: Leftover) -> None:
        owner = ruleset.Owner(f"reference/{leftover.container_id}", "")
        owner.container_id, owner.network = leftover.container_id, leftover.network
        super().__init__(f"{port} is already published by the reference plugin portmap for {leftover}",
                         "to take its containers over: cni-portmap adopt", owner)
        self.leftover = leftover

    def wait(self, kernel: "Kernel", seconds: float) -> float:
        """Wait until the rules have gone."""
        return kernel.wait_for_leftover(self.leftover, seconds)


def of(container_id: str, network: str, kernel: "Kernel", folders: "Sequence[str]" = ()) -> list[Leftover]:
    """What the reference plugin has left of a container in a network; all of it where `network` is "".

    `folders`: those of libcni's files, where they are not the usual ones.
    """
    def wanted(its_network: str, its_id: str) -> bool:
        return its_id == container_id and (not network or its_network in ("", network))
    found = kernel.leftovers(wanted, (network, container_id) if network else ("", ""))
    if network and any(leftover.backend == NFTABLES for leftover in found):
        elsewhere = addresses_elsewhere(container_id, network, folders)
        found = [leftover.without(elsewhere) for leftover in found]
    return [leftover for leftover in found if leftover.rules or leftover.chains]


def _of_network(leftover: Leftover, network: str) -> Leftover | None:
    """The part of a leftover that GC may take in a network; None for nothing."""
    if leftover.backend != NFTABLES:
        return leftover
    from ..libcni_cache import addresses_of
    known = addresses_of(leftover.container_id)
    if known and network not in known:
        return None
    part = leftover.without(addresses_elsewhere(leftover.container_id, network))
    return part if part.rules else None


def addresses_elsewhere(container_id: str, network: str, folders: "Sequence[str]" = ()) -> frozenset[bytes]:
    """A container's addresses in other networks than `network`, which a rule of backend nftables does not record."""
    from ..libcni_cache import addresses_of
    known = addresses_of(container_id, folders) if folders else addresses_of(container_id)
    own = known.pop(network, set())
    return frozenset(address for addresses in known.values() for address in addresses) - own


def delete(container_id: str, network: str, kernel: "Kernel") -> None:
    """Remove what the reference plugin has left of a container in a network, and the flows that it led there."""
    if of(container_id, network, kernel):
        gone = _remove(lambda: of(container_id, network, kernel), kernel)
        delete_released_flows(*released(gone), kernel)


def not_theirs(attachments: "list[Attachment]", kernel: "Kernel") -> "list[Attachment]":
    """The attachments that the reference plugin does not publish, or this one as well."""
    found = kernel.leftovers(lambda *_: True)
    theirs = {(leftover.container_id, leftover.network) for leftover in found}
    return [each for each in attachments if not theirs & {(each.container_id, ""), (each.container_id, each.network)}
            or kernel.has_chain(ruleset.chain_of(each.container_id, each.ifname))]


def refuse_published(attachment: Attachment, kernel: "Kernel") -> None:
    """Raise CniError(104) if the reference plugin has published the attachment's container."""
    found = of(attachment.container_id, attachment.network, kernel)
    if found:
        raise CniError(CHECK_FAILED, "the reference plugin portmap has published this container (backend "
                       f"{found[0].backend})", "take it over: cni-portmap adopt; or start the container again")


def gc(network: str, valid: "Collection[str]", kernel: "Kernel") -> None:
    """Remove what the reference plugin has left of containers of a network that are not among the `valid` (IDs).

    Its backend nftables records no network: a container that libcni knows in another network only stays.
    """
    def stale() -> list[Leftover]:
        found = kernel.leftovers(lambda its_network, its_id: its_network in ("", network) and its_id not in valid)
        return [leftover for each in found if (leftover := _of_network(each, network))]
    if stale():
        gone = _remove(stale, kernel)
        delete_released_flows(*released(gone), kernel)


def _remove(find: "Callable[[], list[Leftover]]", kernel: "Kernel") -> list[Leftover]:
    """Remove what `find` finds under the lock; what that was."""
    with kernel.lock():
        return remove(find, kernel)


def remove(find: "Callable[[], list[Leftover]]", kernel: "Kernel") -> list[Leftover]:
    """Remove what `find` finds, in one transaction; what that was. The lock is held."""
    for left in range(TRIES, 0, -1):
        generation = kernel.generation() if left > LAST_TRIES else 0
        found = find()
        if not found or kernel.remove_leftovers(generation, found):
            return found
    raise CniError(TRY_AGAIN_LATER, "the reference plugin's rules changed each time between reading and writing",
                   "they were left; see who changes them: nft monitor")


def released(gone: "Iterable[Leftover]", kept: "Collection[Element]" = ()) \
        -> "tuple[list[tuple[Element, str]], dict[str, set[bytes]]]":
    """What is not published any more, as `delete_released_flows` takes it; but the elements that are `kept`."""
    elements: list[tuple[Element, str]] = []
    targets: dict[str, set[bytes]] = {}
    for leftover in gone:
        for forward in leftover.forwards:
            name = f"reference/{leftover.container_id}/{forward[3].hex()}"
            targets[name] = {forward[3]}
            element = element_of(forward)
            if element not in kept:
                elements.append((element, name))
    return elements, targets


def element_of(forward: "Forward") -> "Element":
    """The map element that would publish what a rule of the reference plugin forwards."""
    protocol, host, port, target = forward
    element, *_ = ruleset.elements_for(target, host, protocol, [port])
    return element


def resolve(attachment: Attachment, deaths: "Deaths", kernel: "Kernel") -> "Callable[[], list[Leftover]]":
    """Find who has the ports of `attachment` through the reference plugin. The lock is held.

    Returns a function that finds what is to go once they are published here: what that plugin has left of this
    container in this network, and of the dead. Raises PortTakenByReference, and Undecided where libcni's files were
    not asked yet. What an operator publishes comes beside what the runtime has published, so that stays.
    """
    def may_conflict(_: str, its_id: str) -> bool:
        return attachment.by_operator or its_id != attachment.container_id
    claims = _Claims(attachment)
    others = {leftover.container_id: (port, leftover)
              for leftover in kernel.leftovers(may_conflict)
              for forward in leftover.forwards if (port := claims.overlapping(forward))}
    unknown = [container_id for container_id in others if container_id not in deaths]
    if unknown:
        raise Undecided(unknown)
    for container_id, (port, leftover) in others.items():
        if not deaths[container_id]:
            raise PortTakenByReference(port, leftover)

    def find() -> list[Leftover]:
        dead = kernel.leftovers(lambda _, its_id: its_id in others) if others else []
        return dead if attachment.by_operator else of(attachment.container_id, attachment.network, kernel) + dead
    return find


class _Claims:
    """The ports of an attachment, to be compared with what others forward, as bind(2) does."""

    def __init__(self, attachment: Attachment) -> None:
        self._ports: dict[tuple[int, int, int], list[tuple[bytes, str]]] = {}
        for element, port in ruleset.elements_of(attachment).items():
            family, protocol, host, number = ruleset.claim_of(element)
            self._ports.setdefault((family, protocol, number), []).append((host, str(port)))

    def overlapping(self, forward: "Forward") -> str:
        """The port that overlaps with what is forwarded, as a message names it; "" for none."""
        protocol, host, number, target = forward
        for its_host, port in self._ports.get((4 if len(target) == 4 else 6, protocol, number), ()):
            if not host or not its_host or host == its_host:
                return port
        return ""


def ask_libcni(container_ids: "Iterable[str]", deaths: "Deaths", kernel: "Kernel") -> None:
    """Ask libcni's files for these containers. Not under the lock."""
    from ..libcni_cache import proof_of_death
    deaths |= {container_id: proof_of_death(container_id, kernel) for container_id in container_ids}
