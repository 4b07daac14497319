"""The way of a packet through hooks and chains.

The kernel asks the base chains of a hook by priority. Here a rule whose match is a MAYBE lets the packet go both ways,
so a hook has one or more ends, and is certain of what all of them say. Chains of the kind nat are asked at one place
(priority -100 or 100), whatever their own priority, one after another until one translates; and only for the first
packet of a connection: for later ones connection tracking translates there by itself.

Source: kernel net/netfilter/core.c (nf_hook_entries_grow), nf_tables_core.c (nft_do_chain), nf_nat_core.c
(nf_nat_inet_fn); include/uapi/linux/netfilter_ipv4.h (NF_IP_PRI_*).
"""
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..linux.rulesets import LEGACY, Chain, Rule, Rulesets
from .expressions import (ACCEPT, DNAT, DROP, GOTO, JUMP, MASQUERADE, QUEUE, REDIRECT, REJECT, RETURN, SNAT, STOLEN,
                          Context, Verdict, evaluate)
from .packet import MAYBE, NEW, NO, UNTRACKED, YES, Facts, Packet

FAMILIES = {4: ("ip", "inet"), 6: ("ip6", "inet")}
NAT_PRIORITY = {"prerouting": -100, "output": -100, "input": 100, "postrouting": 100}
LOSSES = (DROP, REJECT, QUEUE, STOLEN)
TRANSLATIONS = (DNAT, SNAT, MASQUERADE, REDIRECT)
DEEPEST = 16  # NFT_JUMP_STACK_SIZE; iptables-legacy forbids circles


class End(NamedTuple):
    """An end of a packet's way through a base chain: by a `rule`, or by the chain's policy (None).

    `base`: the base chain, `chain`: the one that the rule is in. `sure`: whether every packet like it ends here;
    `rest`: whether all do that no rule before has taken.
    """

    verdict: Verdict
    base: Chain
    chain: Chain
    rule: Rule | None
    sure: bool
    rest: bool = False


class Passage(NamedTuple):
    """What happens to a packet at a hook: `ends`, those with a loss or a translation, in their order.

    `lost`: YES, NO or MAYBE. `untracked`: the rules that may let it pass connection tracking by.
    """

    lost: str
    ends: list[End]

    @property
    def losses(self) -> list[End]:
        """The ends where it is lost."""
        return [end for end in self.ends if end.verdict.kind in LOSSES]

    @property
    def translations(self) -> list[End]:
        """The ends where its connection is translated."""
        return [end for end in self.ends if end.verdict.kind in TRANSLATIONS]


class Walker:
    """Lets packets walk through everybody's rules."""

    def __init__(self, rulesets: Rulesets, facts: Facts) -> None:
        self._rulesets, self._facts = rulesets, facts

    def hooked(self, hook: str, family: int) -> list[Chain]:
        """The base chains of a hook in the order of the kernel.

        Of equal priorities the one that was registered last comes first. When that was cannot be read: here it is the
        one whose table was made last, and iptables-legacy is older than all: wrong where a chain was made again.
        """
        found = [(_place(chain), chain.priority, chain.backend == LEGACY, -index, chain)
                 for index, chain in enumerate(self._rulesets.chains)
                 if chain.hook == hook and chain.family in FAMILIES[family]]
        return [chain for *_, chain in sorted(found, key=lambda each: each[:4])]

    def pass_hook(self, hook: str, packet: Packet, translate: Callable[[Packet], None] | None = None,
                  chains: list[Chain] | None = None) -> Passage:
        """Let a packet pass a hook, and change it as its rules do.

        `translate`: what connection tracking does to it there, at the place of the nat chains, without asking them.
        `chains`: these, in place of those of the hook.
        """
        ends: list[End] = []
        lost = NO
        translated = False
        waiting = translate
        for chain in self.hooked(hook, packet.family) if chains is None else chains:
            if waiting and _place(chain) >= NAT_PRIORITY.get(hook, 1 << 31):
                if packet.state != UNTRACKED:
                    waiting(packet)
                waiting = None
            if chain.kind == "nat":
                if packet.state != NEW or translated or translate:
                    continue
                its = [*self._pass(chain, packet)]
                translating = [end for end in its if end.verdict.kind in TRANSLATIONS]
                translated = len(translating) == len(its) > 0
                if len(its) == 1 and translated:
                    self._translate(packet, its[0].verdict)
            else:
                its = [*self._pass(chain, packet)]
            losing = [end.verdict.kind in LOSSES for end in its]
            lost = YES if all(losing) else MAYBE if any(losing) else lost
            sure = all(losing) or len(its) == 1
            ends += [end._replace(sure=sure) for end in its if end.verdict.kind != ACCEPT]
            if lost == YES:
                break
        if waiting and packet.state != UNTRACKED:
            waiting(packet)
        return Passage(lost, ends)

    def _translate(self, packet: Packet, verdict: Verdict) -> None:
        """Translate the first packet of a connection: what comes next in the hook sees it so."""
        if verdict.kind == DNAT:
            packet.translate(verdict.address or packet.destination, verdict.port or packet.dport)
        elif verdict.kind == REDIRECT:
            own = self._facts.address_of("lo" if packet.local else packet.iif, packet.family)
            packet.translate(own, verdict.port or packet.dport)
        else:
            address = verdict.address if verdict.kind == SNAT else self._facts.address_of(packet.oif, packet.family)
            packet.hide(address)

    def _pass(self, base: Chain, packet: Packet) -> Iterator[End]:
        """The ends of a packet's way through a base chain, at least one."""
        context = Context(self._rulesets, self._facts, packet, base, _place(base))
        ends: list[End] = []
        goes_on = self._walk(base, base, context, ends, (True,))
        if goes_on or not ends:
            ends.append(End(Verdict(base.policy), base, base, None, False, True))
        yield from ends

    def _walk(self, base: Chain, chain: Chain, context: Context, ends: list[End], jumps: tuple[bool, ...]) -> bool:
        """Walk a chain; whether a packet may come out at its end, to go on behind where it came from.

        `jumps`: whether each jump on the way here was certain.
        """
        if len(jumps) > DEEPEST:
            return True
        sure, returns = context.sure, False
        for rule in chain.rules:
            context.chain = chain
            match, verdicts = evaluate(rule, context)
            if match == NO or not verdicts:
                continue
            stays = match == MAYBE or any(taken == MAYBE for taken, _ in verdicts)
            for taken, verdict in verdicts:
                if verdict.kind == RETURN:
                    returns = True
                elif verdict.kind in (JUMP, GOTO):
                    other = self._rulesets.chain(chain, verdict.chain)
                    context.sure = sure and taken == YES
                    comes_out = other is None or self._walk(base, other, context, ends, (*jumps, taken == YES))
                    if verdict.kind == GOTO:
                        returns |= comes_out
                    else:
                        stays |= comes_out
                else:
                    ends.append(End(verdict, base, chain, rule, False, taken == YES and all(jumps)))
            if not stays:
                context.sure = sure
                return returns
            sure = sure and not returns and all(end.verdict.kind in LOSSES for end in ends)
            context.sure = sure
        return True


def _place(chain: Chain) -> int:
    """Where a base chain is asked: those of the kind nat at the place of nat."""
    return NAT_PRIORITY[chain.hook] if chain.kind == "nat" and chain.hook in NAT_PRIORITY else chain.priority
