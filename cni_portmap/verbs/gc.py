"""GC: remove stale attachments, which the runtime does not list."""
from .delete import remove_each

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from ..linux.kernel import Kernel


def gc(network: str, valid: set[tuple[str, str]], kernel: "Kernel") -> None:
    """Remove every attachment of `network` that is not among the `valid` (container ID, interface)."""
    handles = kernel.handles()
    remove_each([owner for owner in kernel.owners()
            if owner.network == network and (owner.container_id, owner.ifname) not in valid], handles, kernel)
