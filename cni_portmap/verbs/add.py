"""ADD: publish the ports of an attachment."""
from .. import ruleset
from ..attachment import Attachment
from ..cni import INVALID_ENVIRONMENT, PORT_IN_USE, PORT_TAKEN, CniError
from .steps import (PortTaken, Unjudged, attach, detach, interfaces_to_note, is_flush, judge, open_localhost,
                    refuse_namesake, resolve_conflicts, share_on_link, shared_chains, survey, try_conditions,
                    write_shared_chains)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from ..linux.kernel import Kernel
    from ..ruleset import Element, Owner
    from .steps import Judged

STRANGER_SECONDS = 2  # to wait for a living owner: its DEL may be under way, as in Kubernetes
PREDECESSOR_SECONDS = 10  # where it is the same pod, with another sandbox
ALL_SECONDS = 12  # for all of them together


def add(attachment: Attachment, kernel: "Kernel") -> None:
    """Publish the ports of an attachment, in place of all that it published before.

    Raises CniError(4) where its container has gone meanwhile, and CniError(101) where a port has an owner that lives,
    and still does after some seconds without the lock.
    """
    try_conditions(attachment, kernel)
    judged: Judged = {}
    waited: dict[str, float] = {}  # by the owner's chain
    flushed = False
    while True:
        _look_at(attachment, kernel)
        survey(attachment, kernel)
        rules = ruleset.rules_text(attachment)
        try:
            with kernel.lock() as late:
                if attachment.link or late:
                    _look_again_at(attachment, kernel)
                released, targets = _publish(attachment, rules, judged, kernel)
            break
        except Unjudged as unjudged:
            judge(unjudged.owners, judged, kernel)
        except PortTaken as taken:
            chain, so_far = taken.owner.chain, waited.get(taken.owner.chain, 0.0)
            left = min(_patience(attachment, taken.owner) - so_far, ALL_SECONDS - sum(waited.values()))
            if left <= 0:
                raise CniError(PORT_TAKEN, f"{taken.msg}; waited {so_far:.0f} s for it", taken.details) from None
            waited[chain] = so_far + kernel.wait_for(taken.owner, taken.handle, left)
            judged.pop((chain, taken.handle), None)  # it may have died meanwhile
        except CniError as error:
            if flushed or not is_flush(error):
                raise
            flushed = True
    if released or any(port.protocol != "tcp" for port in attachment.ports):
        from .flows import delete_flows_elsewhere, delete_released_flows
        delete_flows_elsewhere(attachment, kernel)
        delete_released_flows(released, targets, kernel)


def _publish(attachment: Attachment, rules: str, judged: "Judged", kernel: "Kernel") \
        -> "tuple[list[tuple[Element, str]], dict[str, set[bytes]]]":
    """Write what `add` is to write, under the lock.

    Returns the elements that are not published any more, each with the chain that it led to, and where those led.
    """
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    replaced, elsewhere = resolve_conflicts(attachment, chain, kernel, judged)
    again = kernel.has_chain(chain)
    if again:
        refuse_namesake(attachment, chain, kernel, judged)
        replaced.append(chain)
    if attachment.refuse_port_in_use:
        _refuse_port_in_use(attachment, kernel)
    new = ruleset.elements_of(attachment)
    owned, targets = kernel.owned_elements(replaced), kernel.targets(replaced)
    released = [item for item in owned if item[0] not in new]
    released_by_us = [item for item in released if item[1] == chain]  # what a dead container had is free
    base = shared_chains([attachment], kernel)
    if base:
        write_shared_chains(base, kernel)
    siblings = [*elsewhere.values(), *(_standby_chains(chain, attachment, kernel) if again else ())]
    shared = share_on_link(attachment, siblings, kernel)
    if siblings:
        rules = ruleset.rules_text(attachment)
    kernel.transact(detach(replaced, owned, released_by_us, kernel) +
                    attach(attachment, elsewhere, kernel, rules, again) + shared +
                    ruleset.note_interfaces(interfaces_to_note([attachment], kernel)))
    open_localhost([attachment], kernel)
    return released, targets


def _standby_chains(chain: str, attachment: Attachment, kernel: "Kernel") -> list[str]:
    """The chains of the container's other interfaces that stand by for `chain`, which is about to be replaced."""
    names = (ruleset.chain_of(attachment.container_id, ifname)
             for ifname in ruleset.standby_interfaces(kernel.comments(chain)))
    return [name for name in names if kernel.has_chain(name)]


def _look_at(attachment: Attachment, kernel: "Kernel") -> None:
    """Record the link and the namespace that prove the container alive. Raises CniError(4) if it is gone.

    The namespace is not kept open: that would keep it alive, and its link.
    """
    attachment.link = kernel.link(attachment.links) if attachment.links else ""
    inode = kernel.namespace(attachment.netns)
    if inode < 0 and not attachment.link:
        raise _gone(attachment)
    attachment.inode = max(inode, 0)  # with a link it lives, though its path is not seen from here


def _look_again_at(attachment: Attachment, kernel: "Kernel") -> None:
    """Raise CniError(4) if the container has gone since `_look_at`. It cannot hang."""
    if kernel.has_link(attachment.link) is False if attachment.link else kernel.namespace_soon(attachment.netns) < 0:
        raise _gone(attachment)


def _gone(attachment: Attachment) -> CniError:
    if attachment.link:
        return CniError(INVALID_ENVIRONMENT, f"the container has ended: its interface "
                        f"{attachment.link.rpartition('#')[0]} on this host is gone", "nothing was published")
    return CniError(INVALID_ENVIRONMENT, f"CNI_NETNS: {attachment.netns} leads to no network namespace",
                    "the container has ended, or its path is not there for this process; nothing was published")


def _patience(attachment: Attachment, owner: "Owner") -> float:
    """For how many seconds an attachment waits for an owner that lives."""
    same_pod = "/" in attachment.pod and attachment.pod == owner.pod and attachment.container_id != owner.container_id
    return PREDECESSOR_SECONDS if same_pod else STRANGER_SECONDS


def _refuse_port_in_use(attachment: Attachment, kernel: "Kernel") -> None:
    """Raise CniError(102) if a process of this host uses one of the ports (hostPortInUse: refuse)."""
    for port in attachment.ports:
        if kernel.port_in_use(port.family, port.protocol, port.host_ip, port.host_port):
            raise CniError(PORT_IN_USE, f"{port} is in use by a process of this host",
                           f"see which: ss -lnp sport = :{port.host_port}")
