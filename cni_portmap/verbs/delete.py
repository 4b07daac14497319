"""DEL: remove what an attachment owns; for GC and the command, remove many."""
from .. import ruleset
from ..cni import TRY_AGAIN_LATER, CniError
from .steps import LAST_TRIES, TRIES, changed_each_time, detach, expose

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from ..linux.kernel import Kernel
    from ..ruleset import Element, Owner


def delete(container_id: str, ifname: str, network: str, kernel: "Kernel") -> None:
    """Remove all that an attachment owns, whatever it was asked to publish, and nothing else.

    And what the reference plugin has left of it, if that was in this one's place when the container was started.
    """
    both = (ruleset.chain_of(container_id, ifname, by) for by in (ruleset.BY_RUNTIME, ruleset.BY_OPERATOR))
    chains = [chain for chain in both if kernel.has_chain(chain)]
    if chains:  # most containers publish nothing, and runtimes repeat DEL
        remove(chains, kernel)
    if kernel.has_reference():
        from .leftovers import delete as delete_leftovers
        delete_leftovers(container_id, network, kernel)


def remove(chains: "Iterable[str]", kernel: "Kernel", handles: "dict[str, int] | None" = None,
           going_on: "Container[Element]" = ()) -> None:
    """Remove attachments' chains, those that exist, with all that leads to them, in one transaction.

    `handles`: what was judged; a chain with another handle was written meanwhile, and stays. `going_on`: elements that
    another plugin publishes for the same container, so that their flows go on.
    """
    chains = [*chains]
    with kernel.lock():
        for left in range(TRIES, 0, -1):
            generation = kernel.generation() if left > LAST_TRIES else 0
            there = [chain for chain in chains if (kernel.has_chain(chain) if handles is None else
                                                   kernel.owner(chain).handle == handles.get(chain))]
            owned, targets = kernel.owned_elements(there), kernel.targets(there)
            change = ruleset.Change()
            detach(change, there, owned, owned, kernel)
            if there:
                expose(change, (), kernel)
                change.forgotten = kernel.noted_and_gone()
            if not there or kernel.write(change, generation):
                break
        else:
            raise changed_each_time()
    released = [item for item in owned if item[0] not in going_on]
    if released:
        from .flows import delete_released_flows
        delete_released_flows(released, targets, kernel)


def remove_each(stale: "list[Owner]", kernel: "Kernel", going_on: "Container[Element]" = ()) \
        -> "list[tuple[Owner, CniError]]":
    """Remove the chains of these owners, but not those that were rewritten since they were read.

    After an error it goes on one by one; returns those that could not be removed, each with the reason.
    """
    try:
        remove([owner.chain for owner in stale], kernel, {owner.chain: owner.handle for owner in stale}, going_on)
        return []
    except CniError as error:
        if error.code == TRY_AGAIN_LATER:
            raise
    refused = []
    for owner in stale:
        try:
            remove([owner.chain], kernel, {owner.chain: owner.handle}, going_on)
        except CniError as error:
            if error.code == TRY_AGAIN_LATER:
                raise
            refused.append((owner, error))
    return refused
