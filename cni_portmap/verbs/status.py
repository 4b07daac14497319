"""STATUS: whether an ADD could succeed."""
from ..cni import NOT_AVAILABLE, CniError
from .steps import shared_chains

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from ..linux.kernel import Kernel


def status(kernel: "Kernel") -> None:
    """Raise CniError(50) with the reason if an ADD could not succeed. Writes nothing.

    Where the base stands there is nothing to try: a dry run costs 7 to 16 ms (an RCU grace period in nf_tables_abort).
    """
    try:
        problem = kernel.dry_run(shared_chains([], kernel))
    except CniError as error:
        raise CniError(NOT_AVAILABLE, error.msg, error.details) from None
    if problem:
        raise CniError(NOT_AVAILABLE, f"the kernel does not take our ruleset: {problem}", "see nft list ruleset")
