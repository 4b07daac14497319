"""ADD: publish the ports of an attachment."""
from .. import ruleset
from ..attachment import Attachment
from ..cni import INVALID_ENVIRONMENT, PORT_IN_USE, PORT_TAKEN, CniError
from .steps import (LAST_TRIES, TRIES, Bequeathed, PortTaken, Undecided, Unjudged, attach, changed_each_time, detach,
                    expose, interfaces_to_note, is_flush, judge, open_localhost, refuse_namesake, resolve_conflicts,
                    share_on_link, shared_chains, stale_notes, standby_chains, survey, try_conditions,
                    write_shared_chains)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from ..linux.kernel import Kernel
    from ..ruleset import Element
    from .steps import Judged

# To wait for a living owner: its DEL may be under way, as in Kubernetes. A pod that is deleted by force has two seconds
# to end before it is killed, and the next one does not wait for it.
OWNER_SECONDS = 4
ALL_SECONDS = 6  # for all of them together


def add(attachment: Attachment, kernel: "Kernel") -> None:
    """Publish the ports of an attachment, in place of all that it published before.

    Raises CniError(4) where its container has gone meanwhile, and CniError(101) where a port has an owner that lives,
    and still does after some seconds without the lock. Where that is the last sandbox of the same pod, the attachment
    stands by, and gets the port in the transaction that removes it.
    """
    try_conditions(attachment, kernel)
    judged: Judged = {}
    deaths: dict[str, str] = {}  # by the ID of a container that the reference plugin has published
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
                leads, released, targets = _publish(attachment, rules, judged, deaths, kernel)
            break
        except Unjudged as unjudged:
            judge(unjudged.owners, judged, kernel)
        except Undecided as undecided:
            from .leftovers import ask_libcni
            ask_libcni(undecided.container_ids, deaths, kernel)
        except Bequeathed as left:
            from .delete import remove
            remove([left.owner.chain], kernel, {left.owner.chain: left.owner.handle})
        except PortTaken as taken:
            chain, so_far = taken.owner.chain, waited.get(taken.owner.chain, 0.0)
            seconds = min(OWNER_SECONDS - so_far, ALL_SECONDS - sum(waited.values()))
            if seconds <= 0:
                raise CniError(PORT_TAKEN, f"{taken.msg}; waited {so_far:.0f} s for it", taken.details) from None
            waited[chain] = so_far + taken.wait(kernel, seconds)
            judged.pop((chain, taken.owner.handle), None)  # it may have died meanwhile
            deaths.clear()
        except CniError as error:
            if flushed or not is_flush(error):
                raise
            flushed = True
    if released or any(port.protocol != "tcp" for port in attachment.ports):
        from .flows import delete_flows_elsewhere, delete_released_flows
        delete_flows_elsewhere(attachment, leads, kernel)
        delete_released_flows(released, targets, kernel)


def _publish(attachment: Attachment, rules: str, judged: "Judged", deaths: dict[str, str], kernel: "Kernel") \
        -> "tuple[dict[Element, str], list[tuple[Element, str]], dict[str, set[bytes]]]":
    """Write what `add` is to write, under the lock.

    Returns the elements that were written, each with the chain that it leads to; those that are not published any more,
    each with the chain that it led to, and where those led.
    """
    chain = ruleset.own_chain(attachment)
    new = ruleset.elements_of(attachment)
    leftovers = None
    if kernel.has_reference():
        from .leftovers import released as released_by
        from .leftovers import remove, resolve
        leftovers = resolve(attachment, deaths, kernel)
    generation, left = 0, TRIES
    while True:
        again = kernel.has_chain(chain)
        if again and not generation and left > LAST_TRIES:
            generation = kernel.generation()  # what is replaced must be what is read from here on
        replaced, elsewhere = resolve_conflicts(attachment, chain, kernel, judged)
        if again:
            refuse_namesake(attachment, chain, kernel, judged)
            replaced.append(chain)
        if attachment.refuse_port_in_use:
            _refuse_port_in_use(attachment, kernel)
        base = shared_chains([attachment], kernel)
        if base:
            write_shared_chains(base, kernel)
        if replaced and (base or not generation) and left > LAST_TRIES:
            generation = kernel.generation()
            continue
        owned, targets = kernel.owned_elements(replaced), kernel.targets(replaced)
        released = [item for item in owned if item[0] not in new]
        change = ruleset.Change()  # what a dead container had is free
        detach(change, replaced, owned, [item for item in released if item[1] == chain], kernel)
        mates = dict.fromkeys((*elsewhere.values(), *([chain] if again else ())))
        siblings = dict.fromkeys(other for mate in mates for other in (mate, *standby_chains(mate, kernel).values())
                                 if other not in replaced)
        share_on_link(change, attachment, siblings, kernel)
        attach(change, attachment, elsewhere, kernel, ruleset.rules_text(attachment) if siblings else rules, again)
        for other in dict.fromkeys(elsewhere.values()):
            change.stale_notes += stale_notes(other, attachment, kernel)
        expose(change, [attachment], kernel)
        change.interfaces = interfaces_to_note([attachment], kernel)
        if kernel.write(change, generation):
            break
        generation, left = 0, left - 1
        if not left:
            raise changed_each_time()
    open_localhost([attachment], kernel)
    if leftovers:  # after ours, so that there is no instant without an answer
        elements, its_targets = released_by(remove(leftovers, kernel), new)
        released += elements
        targets |= its_targets
    return change.leads, released, targets


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


def _refuse_port_in_use(attachment: Attachment, kernel: "Kernel") -> None:
    """Raise CniError(102) if a process of this host uses one of the ports (hostPortInUse: refuse)."""
    for port in attachment.ports:
        if kernel.port_in_use(port.family, port.protocol, port.host_ip, port.host_port):
            raise CniError(PORT_IN_USE, f"{port} is in use by a process of this host",
                           f"see which: ss -lnp sport = :{port.host_port}")
