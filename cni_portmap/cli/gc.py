"""cni-portmap gc."""
import argparse
import json
import sys

from ..linux.kernel import Kernel
from ..verbs.restore import prune
from .shared_options import add_dry_run

HELP = "remove rules of dead containers"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_dry_run(parser)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Remove the rules of dead owners, and name the owners whose state is unknown; 1 if some could not be removed."""
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
        print(f"stale attachments: {len(dead)}" + (" (dry run)" if options.dry_run else ""))
    return 1 if refused else 0
