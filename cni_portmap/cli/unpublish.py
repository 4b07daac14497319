"""cni-portmap unpublish."""
import argparse
import json

from ..cni import INVALID_ENVIRONMENT, CniError
from ..libcni_cache import CACHE_DIRS, with_mappings
from ..linux.kernel import Kernel
from ..verbs.publish import operators_ports, owners_of, publish, unpublish
from .publish import Mapping, ambiguous, container, document_of, mapping, mappings_of
from .shared_options import add_cache, add_plugin

HELP = "remove ports that cni-portmap publish has published"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("container", metavar="CONTAINER", type=container,
                        help="the beginning of its ID, the name of its pod, or its own")
    parser.add_argument("ports", metavar="[HOSTIP:]HOSTPORT:PORT[/PROTOCOL]", nargs="*", type=mapping,
                        help="only these (default: all)")
    add_cache(parser)
    add_plugin(parser)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Remove them; 2 if more than one container fits."""
    owners = [owner for owner in owners_of(kernel, options.container) if owner.is_by_operator]
    if not owners:
        raise CniError(INVALID_ENVIRONMENT, f"nothing of a container {options.container} was published by cni-portmap "
                       "publish", "see: cni-portmap list")
    owners = [owner for owner in owners if owner.container_id == options.container] or owners
    if len({owner.container_id for owner in owners}) > 1:
        return ambiguous(options, {(owner.container_id, owner.ifname): {} for owner in owners})
    removed = []
    for owner in owners:
        there = mappings_of(operators_ports(kernel, owner.container_id, owner.ifname))
        going = [each for each in there if not options.ports or any(_is_of(each, asked) for asked in options.ports)]
        rest = [each for each in there if each not in going]
        removed += going
        if not rest:
            unpublish(owner, kernel)
        elif going:
            document = document_of(owner, options.cache or CACHE_DIRS, options.plugin)
            publish(with_mappings(document, rest, options.plugin, kernel), kernel)
    missing = [asked for asked in options.ports if not any(_is_of(each, asked) for each in removed)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"host port {missing[0]['hostPort']}/{missing[0]['protocol']} of container "
                       f"{options.container} was not published by cni-portmap publish", "see: cni-portmap list")
    if options.json:
        print(json.dumps({"container": owners[0].container_id, "ports": removed}, indent=2))
    else:
        for each in removed:
            print(f"removed {each['hostPort']}/{each['protocol']} of container "
                  f"{owners[0].pod or owners[0].container_id}")
    return 0


def _is_of(each: Mapping, asked: Mapping) -> bool:
    """Whether what is published is what is asked for; without an address it is that on whichever."""
    return each == {**asked, "hostIP": asked["hostIP"] or each["hostIP"]}
