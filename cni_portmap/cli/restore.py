"""cni-portmap restore."""
import argparse
import json

from ..attachment import Attachment
from ..cni import tell
from ..libcni_cache import CACHE_DIRS, Memory
from ..linux.kernel import Kernel
from ..verbs.restore import restore
from ..verbs.steps import repair_shared_chains
from .shared_options import add_cache, add_dry_run, add_plugin

HELP = "re-create rules lost in a firewall reload"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_dry_run(parser)
    add_cache(parser)
    add_plugin(parser)
    parser.add_argument("--base-only", action="store_true", help="repair only the chains that all containers share, "
                        "such as the localhost guard")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Publish lost ports again; 1 if some could not be published."""
    live: list[Attachment] = []
    skipped: list[dict[str, str]] = []
    if options.base_only:
        return _repair_base(options, kernel)
    memory = Memory(options.cache or CACHE_DIRS, options.plugin, kernel)
    for path, found in memory.found:
        if isinstance(found, Attachment):
            live.append(found)
        else:
            skipped.append({"file": str(path), "reason": str(found)})
    lost, refused = restore(live, kernel, options.dry_run, memory.is_current)
    tell()
    report = {"restored": [_name(each) for each in lost],
              "refused": [{**_name(each), "reason": error.msg} for each, error in refused],
              "in_place": len(live) - len(lost) - len(refused), "skipped": skipped}
    if options.json:
        print(json.dumps(report, indent=2))
        return 1 if refused else 0
    for each in lost:
        print(f"{'would restore' if options.dry_run else 'restored'} container {each.container_id}, interface "
              f"{each.ifname}, network {each.network}: {len(each.ports)} ports")
    for each, error in refused:
        print(f"cannot restore container {each.container_id}: {error.msg}")
    print(f"{len(lost)} restored, {len(live) - len(lost) - len(refused)} in place, {len(refused)} refused, "
          f"{len(skipped)} skipped" + (" (dry run)" if options.dry_run else ""))
    return 1 if refused else 0


def _name(attachment: Attachment) -> dict[str, object]:
    return {"container": attachment.container_id, "interface": attachment.ifname, "network": attachment.network,
            "ports": len(attachment.ports)}


def _repair_base(options: argparse.Namespace, kernel: Kernel) -> int:
    repaired = repair_shared_chains(kernel, options.dry_run)
    if options.json:
        print(json.dumps({"repaired": repaired}))
    else:
        print(("would repair" if options.dry_run else "repaired") + " the shared chains" if repaired else
              "nothing to repair")
    return 0
