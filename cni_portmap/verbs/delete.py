"""DEL: remove what an attachment owns; for GC and the command, remove many."""
from .. import ruleset
from ..cni import TRY_AGAIN_LATER, CniError
from .steps import inheritance

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..linux.kernel import Kernel
    from ..ruleset import Owner


# How often to read again what somebody else's transaction may have changed before ours. Where others write all the
# time, to whatever tables, the last tries mind only what is gone: between our own calls there is the lock.
TRIES, LAST_TRIES = 10, 5


def delete(container_id: str, ifname: str, kernel: "Kernel") -> None:
    """Remove all that an attachment owns, whatever it was asked to publish, and nothing else."""
    chain = ruleset.chain_of(container_id, ifname)
    if not kernel.has_chain(chain):
        return  # most containers publish nothing, and runtimes repeat DEL
    remove([chain], kernel)


def remove(chains: "Iterable[str]", kernel: "Kernel", handles: "dict[str, int] | None" = None) -> None:
    """Remove attachments' chains, those that exist, with all that leads to them, in one transaction.

    `handles`: what was judged; a chain with another handle was written meanwhile, and stays.
    """
    chains = [*chains]
    with kernel.lock():
        for left in range(TRIES, 0, -1):
            generation = kernel.generation() if left > LAST_TRIES else 0
            there = [chain for chain in chains if (kernel.has_chain(chain) if handles is None else
                                                   kernel.handle(chain) == handles.get(chain))]
            owned, targets = kernel.owned_elements(there), kernel.targets(there)
            if not there or kernel.remove(generation, there, [element for element, _ in owned],
                                          *inheritance(there, owned, kernel), kernel.noted_and_gone()):
                break
        else:
            raise CniError(TRY_AGAIN_LATER, f"table {ruleset.TABLE} changed each time between reading and writing",
                           "no changes were made; see who changes it: nft monitor")
    if owned:
        from .flows import delete_released_flows
        delete_released_flows(owned, targets, kernel)


def remove_each(stale: "list[Owner]", handles: dict[str, int], kernel: "Kernel") -> "list[tuple[Owner, CniError]]":
    """Remove the chains of these owners, but not those that were rewritten since their `handles` were read.

    After an error it goes on one by one; returns those that could not be removed, each with the reason.
    """
    try:
        remove([owner.chain for owner in stale], kernel, handles)
        return []
    except CniError as error:
        if error.code == TRY_AGAIN_LATER:
            raise
    refused = []
    for owner in stale:
        try:
            remove([owner.chain], kernel, handles)
        except CniError as error:
            if error.code == TRY_AGAIN_LATER:
                raise
            refused.append((owner, error))
    return refused
