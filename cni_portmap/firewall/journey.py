"""A connection from its first packet to its later ones, through all hooks of this host, in both directions.

The first packet meets the nat chains; what follows, in both directions, is translated by connection tracking alone. A
rule may drop any of it (one may ask for flags of TCP), so each kind is led through the hooks by itself.
"""
from collections.abc import Callable
from typing import NamedTuple

from ..linux.host import RTN_LOCAL, Host
from .expressions import DNAT, REDIRECT
from .packet import ACK, ESTABLISHED, MAYBE, NO, SYN, TCP, UNTRACKED, YES, Packet
from .walk import End, Passage, Walker

FIRST, REPLY, LATER = "first", "reply", "later"


class Leg(NamedTuple):
    """A packet's passage through a hook: which `packet` of the connection it is, and how it looked as it came there."""

    which: str
    hook: str
    packet: Packet
    passage: Passage


class Journey(NamedTuple):
    """What happens to a connection. `dnat`: the end that translates its destination; `maybe_dnat`: those that may.

    `local`: whether it is led to a process of this host; `out`: the interface that its packets leave on, "" where there
    is no route, or it does not come that far. `state`: of the first packet at the end, UNTRACKED without connection
    tracking.
    """

    legs: list[Leg]
    dnat: End | None
    maybe_dnat: list[End]
    destination: tuple[bytes | None, int]
    local: bool
    out: str
    state: str

    @property
    def lost(self) -> str:
        """Whether it is lost: YES if any of its packets is for certain."""
        return all_lost(self.legs)

    @property
    def where(self) -> list[Leg]:
        """The legs with losses, in their order."""
        return [leg for leg in self.legs if leg.passage.losses]


def all_lost(legs: list[Leg]) -> str:
    """YES if a packet is lost on one of the legs for certain, MAYBE if it may be."""
    found = {leg.passage.lost for leg in legs}
    return YES if YES in found else MAYBE if MAYBE in found else NO


class Traveller:
    """Leads connections through this host."""

    def __init__(self, walker: Walker, host: Host) -> None:
        self._walker, self._host = walker, host

    def travel(self, packet: Packet) -> Journey:
        """Lead a connection, by its first packet as it comes in on `packet.iif`, or from this host (`packet.local`)."""
        legs: list[Leg] = []
        first = packet.copy()
        hook = "output" if first.local else "prerouting"
        if first.local:
            first.oif = self._out(first)
        passage = self._leg(legs, FIRST, hook, first)
        dnat, others = _translation(passage)
        destination = first.destination, first.dport
        state = first.state
        if all_lost(legs) == YES or first.destination is None:
            return Journey(legs, dnat, others, destination, False, "", state)
        local = self._host.type_of(first.family, first.destination) == RTN_LOCAL
        out = "lo" if local else self._out(first)
        if local and not first.local:
            self._leg(legs, FIRST, "input", first)
            return Journey(legs, dnat, others, destination, True, "", state)
        if not out:
            return Journey(legs, dnat, others, destination, local, "", state)
        first.oif = out
        if not first.local:
            self._leg(legs, FIRST, "forward", first)
        self._leg(legs, FIRST, "postrouting", first)
        if local:
            incoming = first.copy()
            incoming.iif, incoming.oif, incoming.local = "lo", "", False
            self._leg(legs, FIRST, "input", incoming)
        elif all_lost(legs) != YES and first.state != UNTRACKED:
            self._reply(legs, first, SYN | ACK)
            self._later(legs, packet, first)
            if first.protocol == TCP:
                self._reply(legs, first, ACK)
            if first.state == UNTRACKED and dnat is not None:
                state = UNTRACKED  # not the first packet, but one that is to be translated too
        return Journey(legs, dnat, others, destination, local, out, state)

    def _leg(self, legs: list[Leg], which: str, hook: str, packet: Packet,
             translate: Callable[[Packet], None] | None = None) -> Passage:
        before = packet.copy()
        passage = self._walker.pass_hook(hook, packet, translate)
        legs.append(Leg(which, hook, before, passage))
        return passage

    def _out(self, packet: Packet) -> str:
        if packet.destination is None:
            return ""
        route = self._host.route(packet.family, packet.destination, mark=packet.mark or 0)
        return route.link

    def _reply(self, legs: list[Leg], first: Packet, flags: int) -> None:
        """The answer of the container: the hooks see its own address, until connection tracking translates it back."""
        reply = first.copy()
        reply.source, reply.sport = first.replies.source, first.replies.sport
        reply.destination, reply.dport = first.replies.destination, first.replies.dport
        reply.iif, reply.oif, reply.local, reply.reply, reply.state = first.oif, "", False, True, ESTABLISHED
        reply.flags, reply.mark = flags, 0

        def back(packet: Packet) -> None:
            packet.destination, packet.dport = first.original.source, first.original.sport
        self._leg(legs, REPLY, "prerouting", reply, translate=back)

        def as_published(packet: Packet) -> None:
            packet.source, packet.sport = first.original.destination, first.original.dport
        if first.local:
            self._leg(legs, REPLY, "input", reply, translate=as_published)
        else:
            reply.oif = first.iif
            self._leg(legs, REPLY, "forward", reply)
            self._leg(legs, REPLY, "postrouting", reply, translate=as_published)
        self._remember(first, reply)

    @staticmethod
    def _remember(first: Packet, packet: Packet) -> None:
        """What a packet has changed of its connection: its mark; and that one was not tracked."""
        first.ct_mark = packet.ct_mark
        if packet.state == UNTRACKED:
            first.state = UNTRACKED

    def _later(self, legs: list[Leg], packet: Packet, first: Packet) -> None:
        later = packet.copy()
        later.state, later.flags, later.mark = ESTABLISHED, ACK, 0
        later.status, later.replies, later.ct_mark = first.status, first.replies, first.ct_mark
        later.oif = ""

        def again(packet: Packet) -> None:
            packet.destination, packet.dport = first.destination, first.dport
        if later.local:
            later.oif = self._out(later)
            self._leg(legs, LATER, "output", later, translate=again)
            later.oif = first.oif
        else:
            self._leg(legs, LATER, "prerouting", later, translate=again)
            later.oif = first.oif
            self._leg(legs, LATER, "forward", later)

        def hidden(packet: Packet) -> None:
            packet.source = first.source
        self._leg(legs, LATER, "postrouting", later, translate=hidden)
        self._remember(first, later)


def _translation(passage: Passage) -> tuple[End | None, list[End]]:
    """The end that translates the destination for certain, and those that may."""
    found = [end for end in passage.translations if end.verdict.kind in (DNAT, REDIRECT)]
    certain = next((end for end in found if end.sure), None)
    return certain, [end for end in found if end is not certain]
