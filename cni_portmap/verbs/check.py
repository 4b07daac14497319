"""CHECK: compare the kernel with what ADD would have written."""
from .. import ruleset
from ..attachment import Attachment
from ..cni import CHECK_FAILED, CniError
from ..linux.expressions import verdict_of
from .steps import (Unjudged, base, chains_of_container, judge, known_chains, missing_in_order, survey,
                    try_conditions)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..linux.kernel import Kernel
    from ..ruleset import Member, Owner
    from .steps import Judged


def check(attachment: Attachment, kernel: "Kernel") -> None:
    """Compare the kernel with what ADD would have written: that is written in an empty network namespace.

    Raises CniError(104), naming the first piece that is missing or altered.
    """
    try_conditions(attachment, kernel)
    chain = ruleset.own_chain(attachment)
    attachment.inode = kernel.namespace(attachment.netns)
    wanted = ruleset.elements_of(attachment)
    known = known_chains([attachment], kernel) if attachment.exposure else ruleset.SHARED
    conditional = _conditional(attachment, chain)
    names = (*known, *conditional, chain)
    with kernel.lock():
        dormant = kernel.is_dormant()
        found = kernel.lookup(wanted)
        real = {name: kernel.snapshot(name) for name in names}
        references = kernel.references(chain)
        members = _members(attachment, kernel)
        owner, comments = kernel.owner(chain), kernel.comments(chain)
        has_reference = kernel.has_reference()
    if has_reference and not real[chain]:  # what both have answers
        from .leftovers import refuse_published
        refuse_published(attachment, kernel)
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
    home = _home(found.values(), attachment, kernel)
    for element, port in wanted.items():
        if found.get(element) not in home:
            raise CniError(CHECK_FAILED, f"{port} is not forwarded to this container: map {element[0]} has "
                           f"{found.get(element) or 'no entry'} for {ruleset.element_text(*element)}", "")
    if members is not None:
        from .expose import check as check_exposure
        check_exposure(attachment, members)
    shared = {name: ruleset.shared_rules(name, [attachment], (), known) for name in known}
    with kernel.empty_namespace() as empty:
        empty.transact(base(shared, (), known) + ruleset.attach(attachment) +
                       "".join(ruleset.created(*each) for each in conditional.items()))
        expected = {name: empty.snapshot(name) for name in names}
    for name in names:
        texts = [f'{rule} comment "{comment}"' for rule, comment in shared[name]] if name in known else \
            conditional.get(name) or [*ruleset.rules_of(attachment)]
        if name == chain and missing_in_order(expected[name][1:], real[name][1:]) is not None:
            ports = empty.snapshot(name, True), kernel.snapshot(name, True)
            if missing_in_order(ports[0][1:], ports[1][1:]) is None:  # as version 0.1 wrote many
                expected[name], real[name] = ports
        _compare(name, texts, expected[name], real[name], known[name].hook if name in known else "")
    if references != [*found.values()].count(chain):
        raise CniError(CHECK_FAILED, f"unexpected references to chain {chain}",
                       f"see: nft list table {ruleset.TABLE}")


def _home(chains: "Iterable[str]", attachment: Attachment, kernel: "Kernel") -> set[str]:
    """See `steps.chains_of_container`. Not under the lock: who else may have the ports is judged."""
    judged: Judged = {}
    while True:
        try:
            return chains_of_container(chains, attachment, kernel, judged)
        except Unjudged as unjudged:
            judge(unjudged.owners, judged, kernel)


def _conditional(attachment: Attachment, chain: str) -> dict[str, list[str]]:
    """The chain that judges by conditions who reaches the container directly, with its rules; nothing for none."""
    if not any(each.conditions for each in attachment.exposure):
        return {}
    from ..exposure import conditional_rules
    return {ruleset.chain_of_conditions(chain): conditional_rules(attachment)}


def _members(attachment: Attachment, kernel: "Kernel") -> "dict[Member, str] | None":
    """The elements of exposure's sets for the addresses of an attachment, with their comments; None for no sets."""
    if not attachment.exposure and not kernel.has_set(ruleset.EXPOSED):
        return None
    from .expose import addresses_of, members_at
    return members_at(addresses_of(attachment), kernel)


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


def _compare(name: str, texts: list[str], expected: "Sequence[object]", found: "Sequence[object]", hook: str) -> None:
    """Compare two snapshots of a chain; `texts`: of the rules that are expected; `hook`: "" for none."""
    if not found:
        raise CniError(CHECK_FAILED, f"chain {name} is missing", "")
    if found[0] != expected[0]:
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
        raise CniError(CHECK_FAILED, f"chain {owner.chain} belongs to another network namespace, {owner.path}", "")
    if owner.netns:
        attachment.netns, attachment.inode = owner.netns, owner.inode
        attachment.link, attachment.pod = owner.link, owner.pod
