"""The verbs: what happens to an attachment's published ports, and in which order.

State is in the kernel alone. Between reading and writing it a verb holds the lock; a write is one transaction,
so whoever is killed at any instant leaves all of it or nothing.
"""
from . import ruleset
from .cni import CHECK_FAILED, FOREIGN_TABLE, INVALID_CONFIG, NOT_AVAILABLE, PORT_TAKEN, CniError
from .config import DEFAULT_MARK_BIT, Attachment, Port

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from .kernel import Kernel


def add(attachment: Attachment, kernel: "Kernel") -> None:
    """Publish the ports of an attachment, in place of all that it published before."""
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    attachment.inode = kernel.inode(attachment.netns)
    _try_conditions(attachment, kernel)
    with kernel.lock():
        replaced = _dead_owners(attachment, chain, kernel)
        if kernel.has_chain(chain):
            replaced.append(chain)
        text = _base(attachment.mark_bit, kernel)
        if replaced:
            text += ruleset.detach(replaced, kernel.elements_of(replaced))
        if attachment.mark_bit is not None and 4 in attachment.addresses:
            kernel.allow_localnet(attachment.addresses[4].ip)
        kernel.transact(text + ruleset.attach(attachment))


def delete(container_id: str, ifname: str, kernel: "Kernel") -> None:
    """Remove all that an attachment owns, whatever it was asked to publish; nothing of anybody else."""
    chain = ruleset.chain_of(container_id, ifname)
    if not kernel.has_chain(chain):
        return  # most containers publish nothing, and runtimes repeat DEL
    with kernel.lock():
        if kernel.has_chain(chain):
            kernel.transact(ruleset.detach([chain], kernel.elements_of([chain])))


def check(attachment: Attachment, kernel: "Kernel") -> None:
    """Compare the kernel with what ADD would have written: that is written in an empty network namespace.

    Raises CniError(104), naming the first piece that is missing or altered.
    """
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    attachment.inode = kernel.inode(attachment.netns)
    wanted = {(ruleset.map_of(port), ruleset.key_of(port)): port for port in attachment.ports}
    names = (*ruleset.BASE, chain)
    with kernel.lock():
        dormant = kernel.is_dormant()
        found = kernel.lookup(wanted)
        real = {name: kernel.picture(name) for name in names}
        references = kernel.references(chain)
    if dormant:
        raise CniError(CHECK_FAILED, f"table {ruleset.TABLE} is dormant", f"wake it: nft add table {ruleset.TABLE}")
    for element in wanted:
        if found.get(element) != chain:
            raise CniError(CHECK_FAILED, f"{wanted[element]} does not lead to the container: map {element[0]} has "
                           f"{found.get(element) or 'nothing'} for {ruleset.element_of(*element)}", "")
    mirror = kernel.mirror()
    bits = {DEFAULT_MARK_BIT, DEFAULT_MARK_BIT if attachment.mark_bit is None else attachment.mark_bit}
    mirror.transact(ruleset.base(ruleset.BASE, (), bits) + ruleset.attach(attachment))
    for name in names:
        expected = mirror.picture(name)
        if not real[name]:
            raise CniError(CHECK_FAILED, f"chain {name} is missing", "")
        if real[name][0] != expected[0]:
            raise CniError(CHECK_FAILED, f"chain {name} is not hooked as it should be: {ruleset.BASE[name][0]}", "")
        rest = iter(real[name][1:])
        for index, rule in enumerate(expected[1:]):
            if rule not in rest:  # an iterator: `in` also moves past what it finds, so the order counts
                texts = ruleset.rules_of(attachment) if name == chain else \
                    (f"{rule} comment \"{comment}\"" for rule, comment in ruleset.base_rules(name, bits))
                raise CniError(CHECK_FAILED, f"chain {name}: a rule is missing or altered", [*texts][index])
    if references != mirror.references(chain):
        raise CniError(CHECK_FAILED, f"chain {chain} has {references} references instead of "
                       f"{mirror.references(chain)}", "a map element that nobody asked for leads to it")


def gc(network: str, valid: set[tuple[str, str]], kernel: "Kernel") -> None:
    """Remove every attachment of `network` that is not among the `valid` (container ID, interface).

    Goes on after an error, and raises the first with all of them in its details.
    """
    errors = []
    for owner in kernel.owners():
        if owner.network == network and (owner.container_id, owner.ifname) not in valid:
            try:
                delete(owner.container_id, owner.ifname, kernel)
            except CniError as error:
                errors.append((owner, error))
    if errors:
        code = errors[0][1].code
        raise CniError(code, f"{len(errors)} stale attachments could not be removed",
                       "; ".join(f"{owner}: {error.msg}" for owner, error in errors))


def status(kernel: "Kernel") -> None:
    """Raise CniError(50) with the reason if an ADD could not succeed. Writes nothing."""
    try:
        problem = kernel.dry_run(_base(None, kernel) or ruleset.base((), ruleset.BASE, [DEFAULT_MARK_BIT]))
    except CniError as error:
        raise CniError(NOT_AVAILABLE, error.msg, error.details) from None
    if problem:
        raise CniError(NOT_AVAILABLE, f"the kernel does not take our ruleset: {problem}", "see nft list ruleset")


# --- the steps ------------------------------------------------------------------------------------------------

def _try_conditions(attachment: Attachment, kernel: "Kernel") -> None:
    """Let nft read the conditions, alone: the one free text of a configuration."""
    for family, text in attachment.conditions.items():
        problem = kernel.dry_run(ruleset.probe(family, text)) if text else ""
        if problem:
            raise CniError(INVALID_CONFIG, f"conditionsV{family}: {text!r} is not nft match text", problem)


def _dead_owners(attachment: Attachment, chain: str, kernel: "Kernel") -> list[str]:
    """The chains that own a port of `attachment` while their container is gone.

    Raises CniError(101) where the owner lives: a port has one owner, and it overlaps as in bind(2).
    """
    claims: dict[tuple[str, bytes], Port] = {}
    wildcards: dict[str, dict[bytes, Port]] = {}
    for port in attachment.ports:
        key = ruleset.key_of(port)
        claims[ruleset.map_of(port), key] = port
        if port.host_ip:
            claims.setdefault(ruleset.wildcard_of(port), port)
        else:
            wildcards.setdefault(f"hostip{port.family}_hostports", {})[key[-8:]] = port
    taken = {owner: claims[element] for element, owner in kernel.lookup(claims).items()}
    for name, endings in wildcards.items():
        for owner, ending in kernel.claimants(name, endings):
            taken.setdefault(owner, endings[ending])
    taken.pop(chain, None)
    for other, port in taken.items():
        if not other.startswith("c/"):
            raise CniError(FOREIGN_TABLE, f"{port} is taken by a map element that this plugin did not write",
                           f"find it: nft list table {ruleset.TABLE}")
        owner = kernel.owner(other)
        if not kernel.is_dead(owner):
            raise CniError(PORT_TAKEN, f"{port} is already published by {owner}",
                           f"its network namespace {owner.netns or '(unknown)'} is alive")
    return [*taken]


def _base(bit: int | None, kernel: "Kernel") -> str:
    """Commands that make or repair what all attachments share; "" where nothing is missing.

    Raises CniError(103) rather than remove a rule that this plugin did not write.
    """
    bits = {DEFAULT_MARK_BIT, DEFAULT_MARK_BIT if bit is None else bit}
    missing, wrong = [], []
    for chain in ruleset.BASE:
        there = kernel.comments(chain)
        rest = iter(there)  # an iterator: `in` also moves past what it finds, so the order counts
        if all(comment in rest for _, comment in ruleset.base_rules(chain, bits)):
            continue
        (wrong if kernel.has_chain(chain) else missing).append(chain)
        for comment in there:
            if not comment.startswith(ruleset.SIGN):
                raise CniError(FOREIGN_TABLE, f"chain {chain} of table {ruleset.TABLE} must be rebuilt, but has a rule "
                               f"that this plugin did not write", f"see: nft -a list chain {ruleset.TABLE} {chain}")
        if chain == "postrouting":
            bits |= ruleset.bits_of(there)
    return ruleset.base(missing, wrong, bits) if missing or wrong else ""
