"""DEL: remove what an attachment owns; and what GC and the command need, to remove many."""
from .. import ruleset
from ..cni import TRY_AGAIN_LATER, CniError
from .steps import detach, is_flush

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..linux.kernel import Kernel
    from ..ruleset import Owner


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
        if not is_flush(error):
            raise
        _remove(chains, kernel, handles)


def _remove(chains: "list[str]", kernel: "Kernel", handles: "dict[str, int] | None") -> None:
    with kernel.lock():
        there = [chain for chain in chains if (kernel.has_chain(chain) if handles is None else
                                               kernel.handle(chain) == handles.get(chain))]
        owned, targets = kernel.owned_elements(there), kernel.targets(there)
        if there:
            kernel.transact(detach(there, owned, owned, kernel) + ruleset.forget_opened(kernel.opened_and_gone()))
    if owned:
        from .flows import delete_released_flows
        delete_released_flows(owned, targets, kernel)


def remove_each(stale: "list[Owner]", handles: dict[str, int], kernel: "Kernel") -> "list[tuple[Owner, CniError]]":
    """Remove the chains of these owners, but those that were written anew since their `handles` were read.

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
