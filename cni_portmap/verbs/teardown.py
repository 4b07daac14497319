"""Close localhost and delete the whole table, as an uninstallation needs it."""
from typing import NamedTuple

from .. import ruleset
from ..linux.kernel import Kernel
from ..linux.localhost import Closing, close
from .flows import delete_released_flows


class Teardown(NamedTuple):
    """The result of `teardown`: the `published` attachments, each with whether it is dead, and the `closing`.

    `refused`: no changes were made, because of those. `table`: whether there was one to delete.
    """

    published: list[tuple[ruleset.Owner, bool]]
    refused: bool
    table: bool
    closing: Closing


def teardown(kernel: Kernel, force: bool = False, dry_run: bool = False) -> Teardown:
    """Close localhost and remove our table, with all that is in it; `force`: also while containers are published.

    A call killed in between leaves localhost closed, or the guard in place.
    """
    verdicts = kernel.judge(kernel.owners())
    with kernel.lock():
        published = [(owner, verdicts.get(owner.chain, ("", ""))[0] == "dead") for owner in kernel.owners()]
        if published and not force:
            return Teardown(published, True, True, Closing([], [], {}))
        chains = [owner.chain for owner, _ in published]
        owned, targets = kernel.owned_elements(chains), kernel.targets(chains)
        closing, table = close(kernel, dry_run), kernel.has_table()
        if table and not dry_run:
            kernel.delete_table()
    if not dry_run:
        delete_released_flows(owned, targets, kernel)
    return Teardown(published, False, table, closing)
