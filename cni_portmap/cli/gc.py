"""cni-portmap gc."""
import argparse
import json
import sys

from ..linux.kernel import Kernel
from ..verbs.restore import prune

HELP = "remove rules of containers that are gone"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--dry-run", action="store_true", help="show what would be removed, and write nothing")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Remove what belongs to the dead, and name those that cannot be judged; 1 where some could not be removed."""
    found, refused = prune(kernel, options.dry_run)
    kept = {owner.chain for owner, _ in refused}
    dead = [(owner, why) for owner, (state, why) in found if state == "dead" and owner.chain not in kept]
    unknown = [(owner, why) for owner, (state, why) in found if state == "unknown"]
    for owner, error in refused:
        print(f"cni-portmap: cannot remove {owner}: {error.msg}", file=sys.stderr)
    if options.json:
        print(json.dumps([{"container": owner.container_id, "interface": owner.ifname, "network": owner.network,
                           "netns": owner.netns} for owner, _ in dead], indent=2))
    else:
        for owner, why in dead:
            print(f"{'would remove' if options.dry_run else 'removed'} {owner}: {why}")
        for owner, why in unknown:
            print(f"kept {owner}: {why}")
        print(f"{len(dead)} stale attachments" + (" (dry run)" if options.dry_run else ""))
    return 1 if refused else 0
