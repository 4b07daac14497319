"""GC: remove stale attachments, which the runtime does not list."""
from ..cni import CniError
from .delete import remove_each

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from ..linux.kernel import Kernel


def gc(network: str, valid: set[tuple[str, str]], kernel: "Kernel") -> None:
    """Remove every attachment of `network` that is not among the `valid` (container ID, interface).

    Those that the reference plugin has left, too.

    Goes on after an error, one by one, and raises them all as one.
    """
    stale = [owner for owner in kernel.owners()
             if owner.network == network and (owner.container_id, owner.ifname) not in valid]
    refused = remove_each(stale, kernel)
    found = [f"{owner}: {error.msg}" for owner, error in refused]
    try:
        if kernel.has_reference():
            from .leftovers import gc as gc_leftovers
            gc_leftovers(network, {container_id for container_id, _ in valid}, kernel)
    except CniError as error:
        if not refused:
            raise
        found.append(error.msg)
    if refused:
        raise CniError(refused[0][1].code, f"{len(refused)} of {len(stale)} stale attachments could not be removed",
                       "; ".join(found))
