"""cni-portmap teardown."""
import argparse
import json
import sys

from ..linux.kernel import Kernel
from ..ruleset import TABLE
from ..verbs.teardown import teardown

HELP = "close localhost and remove the whole table, before an uninstallation"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--force", action="store_true", help="also while containers are published: their ports stop "
                        "answering")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Close and remove; 1 where containers are published."""
    done = teardown(kernel, options.force, options.dry_run)
    published = [{"container": owner.container_id, "interface": owner.ifname, "network": owner.network, "dead": dead}
                 for owner, dead in done.published]
    if options.json:
        print(json.dumps({"published": published, "refused": done.refused, "table": done.table,
                          **done.closing._asdict()}, indent=2))
        return 1 if done.refused else 0
    for owner, dead in done.published:
        print(f"published: {owner}" + (", whose network namespace is gone" if dead else ""),
              file=sys.stderr if done.refused else sys.stdout)
    if done.refused:
        print("cni-portmap: nothing was removed, because these containers are published\n"
              "  stop them (cni-portmap gc: those that are gone), or say --force: their ports stop answering",
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
        print(f"{'would remove' if options.dry_run else 'removed'} table {TABLE}")
    return 0
