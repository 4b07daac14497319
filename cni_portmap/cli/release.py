"""cni-portmap release."""
import argparse
import json
import sys

from ..cni import INVALID_ENVIRONMENT, CniError
from ..linux.kernel import Kernel
from ..ruleset import Owner
from ..verbs.adopt import release
from .shared_options import add_dry_run

HELP = "remove what the reference plugin portmap publishes again, on the way back to it"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("container", metavar="CONTAINER", nargs="*", help="only containers whose ID begins with this")
    parser.add_argument("--force", action="store_true", help="also live containers that only this plugin publishes: "
                        "their ports stop answering")
    add_dry_run(parser)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Remove the rules of containers that are dead, or that the reference plugin publishes too; 1 if some are kept."""
    unknown = [prefix or '""' for prefix in options.container  # an unset variable of a script is not everybody
               if not prefix or not any(owner.container_id.startswith(prefix) for owner in kernel.owners())]
    if unknown:
        raise CniError(INVALID_ENVIRONMENT, f"no container with this ID is published: {', '.join(unknown)}",
                       "see: cni-portmap list")
    done = release(kernel, options.container, options.force, options.dry_run)
    if options.json:
        print(json.dumps({"released": [_entry(*each) for each in done.released],
                          "kept": [_entry(*each) for each in done.kept]}, indent=2))
        return 1 if done.kept else 0
    for owner, why in done.released:
        print(f"{'would release' if options.dry_run else 'released'} {owner}: {why}")
    for owner, why in done.kept:
        print(f"kept {owner}: {why}")
    print(f"{len(done.released)} released, {len(done.kept)} kept" + (" (dry run)" if options.dry_run else ""))
    if done.kept:
        print("cni-portmap: start these containers again with the reference plugin in place, and release them then; "
              "or use --force: their ports stop answering", file=sys.stderr)
    return 1 if done.kept else 0


def _entry(owner: Owner, reason: str) -> dict[str, str]:
    return {"container": owner.container_id, "interface": owner.ifname, "network": owner.network, "reason": reason}
