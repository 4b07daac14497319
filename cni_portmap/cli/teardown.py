"""cni-portmap teardown."""
import argparse
import json
import sys

from ..linux.kernel import Kernel
from ..ruleset import TABLE
from ..verbs.teardown import teardown
from .shared_options import add_dry_run

HELP = "close the host's localhost and delete the table, as an uninstallation does"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--force", action="store_true", help="even while containers are published: their ports "
                        "stop answering")
    add_dry_run(parser)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Close localhost and delete the table; 1 if containers are published, without --force."""
    done = teardown(kernel, options.force, options.dry_run)
    published = [{"container": owner.container_id, "interface": owner.ifname, "network": owner.network, "dead": dead}
                 for owner, dead in done.published]
    if options.json:
        print(json.dumps({"published": published, "refused": done.refused, "table": done.table,
                          **done.closing._asdict()}, indent=2))
        return 1 if done.refused else 0
    for owner, dead in done.published:
        print(f"published: {owner}" + (" (dead)" if dead else ""),
              file=sys.stderr if done.refused else sys.stdout)
    if done.refused:
        print("cni-portmap: no changes were made, because these containers are published\n"
              "  stop them, run cni-portmap gc for dead ones, or use --force: then their ports stop answering",
              file=sys.stderr)
        return 1
    would = "would close" if options.dry_run else "closed"
    for name in done.closing.ipv4:
        print(f"{would} 127.0.0.0/8 on {name}")
    for name in done.closing.ipv6:
        print(f"{would} ::1 on {name}")
    for name, reason in done.closing.left_open.items():
        print(f"127.0.0.0/8 stays open on {name}, without a guard: {reason}")
    if done.table:
        print(f"{'would delete' if options.dry_run else 'deleted'} table {TABLE}")
    return 0
