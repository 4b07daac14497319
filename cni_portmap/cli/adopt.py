"""cni-portmap adopt."""
import argparse
import json

from ..libcni_cache import CACHE_DIRS
from ..linux.kernel import Kernel
from ..reference import Leftover
from ..verbs.adopt import adopt
from .shared_options import add_cache, add_dry_run, add_plugin

HELP = "take over the containers that the reference plugin portmap has published"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_dry_run(parser)
    add_cache(parser)
    add_plugin(parser)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Publish what the reference plugin has published, then remove its rules; 1 if some of them are left."""
    done = adopt(kernel, options.cache or CACHE_DIRS, options.plugin, options.dry_run)
    if options.json:
        print(json.dumps({
            "adopted": [{"container": each.container_id, "interface": each.ifname, "network": each.network,
                         "ports": len(each.ports), "backends": backends} for each, backends in done.adopted],
            "removed": [_entry(*each) for each in done.removed], "left": [_entry(*each) for each in done.left]},
            indent=2))
        return 1 if done.left else 0
    would = "would be " if options.dry_run else ""
    for each, backends in done.adopted:
        print(f"{would}adopted: container {each.container_id}, interface {each.ifname}, network {each.network}: "
              f"{len(each.ports)} ports ({', '.join(backends)})")
    for leftover, why in done.removed:
        print(f"{would}removed: {leftover} ({leftover.backend}): {why}")
    for leftover, why in done.left:
        print(f"left as it is: {leftover} ({leftover.backend}): {why}")
    print(f"{len(done.adopted)} adopted, {len(done.removed)} removed, {len(done.left)} left" +
          (" (dry run)" if options.dry_run else ""))
    return 1 if done.left else 0


def _entry(leftover: Leftover, reason: str) -> dict[str, str]:
    return {"container": leftover.container_id, "network": leftover.network, "backend": leftover.backend,
            "reason": reason}
