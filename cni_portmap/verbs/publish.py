"""Ports that an operator publishes on a container that runs, beside what its runtime has published.

They are in a chain of their own, p/<container ID>/<interface>, with the same record and rules, and their elements are
in the same maps: so a conflict is refused as ever, the runtime's DEL and GC remove them, and its CHECK does not mind.
What the runtime asks for later comes first.
"""
from .. import ruleset
from ..attachment import Attachment
from ..cni import PORT_TAKEN, CniError
from ..linux.kernel import Kernel
from ..ruleset import Owner
from .add import add
from .delete import remove
from .published import Published, published


def owners_of(kernel: Kernel, name: str) -> list[Owner]:
    """The owners whose container ID begins with `name`, or whose pod or container is called so."""
    return [owner for owner in kernel.owners()
            if owner.container_id.startswith(name) or name in (owner.pod, owner.pod.rpartition("/")[2])]


def operators_ports(kernel: Kernel, container_id: str, ifname: str) -> list[Published]:
    """What an operator has published of an attachment."""
    return [line for line in published(kernel)
            if (line.container_id, line.ifname, line.by) == (container_id, ifname, "operator")]


def publish(attachment: Attachment, kernel: Kernel) -> None:
    """Publish the ports of `attachment`, in place of all that an operator has published of it before.

    Raises CniError(101) where a port has an owner, the container's own runtime too.
    """
    attachment.by_operator = True
    own = ruleset.chain_of(attachment.container_id, attachment.ifname)
    for element, chain in kernel.lookup(ruleset.elements_of(attachment)).items():
        if chain == own:
            port = ruleset.elements_of(attachment)[element]
            raise CniError(PORT_TAKEN, f"{port} is already published by this container's runtime",
                           "nothing was published; see: cni-portmap list")
    add(attachment, kernel)


def unpublish(owner: Owner, kernel: Kernel) -> None:
    """Remove all that an operator has published of an attachment."""
    remove([ruleset.chain_of(owner.container_id, owner.ifname, ruleset.BY_OPERATOR)], kernel)
