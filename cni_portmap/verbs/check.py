"""CHECK: compare the kernel with what ADD would have written."""
from .. import ruleset
from ..attachment import Attachment
from ..cni import CHECK_FAILED, CniError
from ..linux.expressions import verdict_of
from .steps import chains_of_container, missing_in_order, survey, try_conditions

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..linux.kernel import Kernel
    from ..ruleset import Owner


def check(attachment: Attachment, kernel: "Kernel") -> None:
    """Compare the kernel with what ADD would have written: that is written in an empty network namespace.

    Raises CniError(104), naming the first piece that is missing or altered.
    """
    try_conditions(attachment, kernel)
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    attachment.inode = kernel.namespace(attachment.netns)
    wanted = ruleset.elements_of(attachment)
    names = (*ruleset.SHARED, chain)
    with kernel.lock():
        dormant = kernel.is_dormant()
        found = kernel.lookup(wanted)
        real = {name: kernel.snapshot(name) for name in names}
        references = kernel.references(chain)
        owner, comments = kernel.owner(chain), kernel.comments(chain)
    if dormant:
        raise CniError(CHECK_FAILED, f"table {ruleset.TABLE} is dormant", f"wake it: nft add table {ruleset.TABLE}")
    _check_owner(attachment, owner, kernel)
    survey(attachment, kernel, quiet=True)
    noted = ruleset.on_link_of(comments)
    needed = [pair for pair in attachment.on_link or () if pair[1] in attachment.prefixes]
    # A chain that names no interface, where one leads there, was written by version 0.1.
    attachment.on_link = tuple(dict.fromkeys((*noted, *needed))) if noted or not needed else None
    attachment.left_alone = ruleset.left_alone_of(comments)
    _check_localhost(attachment, kernel)
    home = chains_of_container(found.values(), attachment, kernel)
    for element, port in wanted.items():
        if found.get(element) not in home:
            raise CniError(CHECK_FAILED, f"{port} is not forwarded to this container: map {element[0]} has "
                           f"{found.get(element) or 'no entry'} for {ruleset.element_text(*element)}", "")
    empty = kernel.enter_empty_namespace()
    shared = {name: ruleset.shared_rules(name, [attachment]) for name in ruleset.SHARED}
    empty.transact(ruleset.base(shared) + ruleset.attach(attachment))
    for name in names:
        texts = [*ruleset.rules_of(attachment)] if name == chain else \
            [f'{rule} comment "{comment}"' for rule, comment in shared[name]]
        _compare(name, texts, empty.snapshot(name), real[name])
    if references != [*found.values()].count(chain):
        raise CniError(CHECK_FAILED, f"unexpected references to chain {chain}",
                       f"see: nft list table {ruleset.TABLE}")


def _check_localhost(attachment: Attachment, kernel: "Kernel") -> None:
    """Look whether this host's localhost still leads through the interfaces that it was opened on."""
    for family, name in attachment.ways.items():
        if family in attachment.left_alone:
            continue
        if family == 4 and not (kernel.is_noted(name) and kernel.localnet(name)):
            raise CniError(CHECK_FAILED, f"127.0.0.0/8 does not lead through {name}, or is not guarded there",
                           f"see: sysctl net.ipv4.conf.{name}.route_localnet; "
                           f"nft list set {ruleset.TABLE} {ruleset.LOCALHOST_INTERFACES}")
        if family == 6 and not kernel.has_localhost6(name):
            raise CniError(CHECK_FAILED, f"::1 does not lead through {name}", "see: ip -6 route show table local ::1")


def _compare(name: str, texts: list[str], expected: "Sequence[object]", found: "Sequence[object]") -> None:
    """Compare two snapshots of a chain; `texts`: of the rules that are expected."""
    if not found:
        raise CniError(CHECK_FAILED, f"chain {name} is missing", "")
    if found[0] != expected[0]:
        hook = ruleset.SHARED[name].hook if name in ruleset.SHARED else ""
        raise CniError(CHECK_FAILED, f"chain {name} has the wrong hook or priority", f"expected: {hook or 'no hook'}")
    index = missing_in_order(expected[1:], found[1:])
    if index is not None:
        raise CniError(CHECK_FAILED, f"chain {name}: a rule is missing or altered", texts[index])
    rest = [*expected[1:]]
    for place, rule in enumerate(found[1:], 1):
        if rest and rule == rest[0]:
            del rest[0]
        elif verdict := verdict_of(rule):
            raise CniError(CHECK_FAILED, f"chain {name}: rule {place} is foreign, and its verdict is {verdict}",
                           f"see: nft -a list chain {ruleset.TABLE} {name}")


def _check_owner(attachment: Attachment, owner: "Owner", kernel: "Kernel") -> None:
    """Compare the recorded owner with the requested one: CniError(104) if it is another, or gone.

    One namespace has many paths (/run and /var/run, /proc/PID/ns/net), so paths are not compared. `attachment` becomes
    what ADD recorded.
    """
    verdict = kernel.glance(owner)
    if verdict and verdict[0] == "dead":
        raise CniError(CHECK_FAILED, f"the container is gone: {verdict[1]}", "")
    if attachment.inode < 0 and not verdict:
        raise CniError(CHECK_FAILED, f"the container is gone: {attachment.netns} leads to no network namespace", "")
    if owner.inode and attachment.inode > 0 and owner.inode != attachment.inode:
        raise CniError(CHECK_FAILED, f"chain {owner.chain} belongs to another network namespace, {owner.netns}", "")
    if owner.netns:
        attachment.netns, attachment.inode = owner.netns, owner.inode
        attachment.link, attachment.pod = owner.link, owner.pod
