"""cni-portmap trace: what happens to the packets of a port, told as they pass."""
import argparse
import json
import signal
import sys
from time import monotonic
from typing import Any

from ..firewall.packet import ESTABLISHED, NEW, Packet
from ..linux.kernel import Kernel
from ..linux.rulesets import LEGACY, NF_DROP, NF_QUEUE
from ..linux.tracing import BEGIN, END, Event, Tracing
from .checks.rules import rule_of, whose
from .checks.scene import Scene, Target, end, packed, shown
from .doctor import address, port
from .shared_options import seconds

HELP = "tell what happens to the packets of a port, as they pass: where they go, and who drops them"
SYN, RST, ACK = 0x02, 0x04, 0x10
QUIET = 1.0  # seconds without an event, after which nothing more is expected of a packet


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("port", metavar="PORT[/PROTOCOL]", type=port, help="the host port")
    parser.add_argument("--from", dest="client", metavar="ADDRESS", type=address, help="only packets of this client")
    parser.add_argument("--seconds", metavar="N", type=seconds(0.1, 3600), default=30,
                        help="wait so long for a packet, at most (default: 30)")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Tell the story of one connection; 0 if it was answered."""
    number, protocol = options.port
    scene = Scene(kernel, number, protocol, options.client, None)
    teller = Teller(scene, quiet=options.json)
    with Tracing(_marks(scene)) as tracing:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C: tell what there is
        try:
            if not options.json:
                print(f"waiting for {number}/{scene.protocol}, {options.seconds:g} seconds at most ...", flush=True)
            for event in tracing.events(monotonic() + options.seconds):
                if event is not None:
                    teller.hear(event, tracing.is_own(event))
                elif teller.is_done():
                    break
        except KeyboardInterrupt:
            pass
    teller.finish()
    if options.json:
        print(json.dumps(teller.as_json(), indent=2))
    elif not teller.packets:
        print(f"no packet for {number}/{scene.protocol} came in. They do not reach this host: a router, a cloud's "
              "security group, the client's own route.")
    sys.stdout.flush()
    return 0 if teller.was_answered else 1


def _marks(scene: Scene) -> dict[str, list[str]]:
    """What to tell of: first packets for the port, and what the container answers."""
    protocol = scene.protocol
    first = " tcp flags & (syn | ack) == syn" if protocol == "tcp" else ""
    answer = " tcp flags & (syn | rst) != 0" if protocol == "tcp" else ""
    source, destinations = "", [""]
    if scene.client is not None:
        source, destination = (f"{_ip(scene.client)} {end}addr {shown(scene.client)} " for end in "sd")
        destinations = [destination, "fib daddr type local "]  # of a masqueraded one: the container answers this host
    forward = [f"{source}fib daddr type local {protocol} dport {scene.port}{first}"]
    back = [f"{destination}{_ip(packed(target.container_ip))} saddr {target.container_ip} {protocol} sport "
            f"{target.container_port}{answer}" for target in scene.targets for destination in destinations
            if target.container_ip and (scene.client is None or len(scene.client) == len(packed(target.container_ip)))]
    return {"prerouting": [*forward, *dict.fromkeys(back)], "output": forward}


def _ip(ip: bytes) -> str:
    return "ip" if len(ip) == 4 else "ip6"


class Story:
    """What has been heard of one packet. `at`: the hook and whether it is at its end; `last`: when."""

    def __init__(self, event: Event, is_reply: bool) -> None:
        self.first, self.is_reply = event, is_reply
        self.at, self.is_through, self.last = "", False, 0.0
        self.headers = event
        self.steps: list[dict[str, Any]] = []
        self.ended = ""  # "dropped", "lost", "out", "delivered"


class Teller:
    """Puts events together to stories, and tells them as they go on, unless it is to be quiet."""

    def __init__(self, scene: Scene, quiet: bool) -> None:
        self._scene, self._quiet = scene, quiet
        self.packets: dict[int, Story] = {}
        self.was_answered = False

    # --- hearing ---

    def hear(self, event: Event, is_own: bool) -> None:
        """Take an event in."""
        story = self.packets.get(event.id)
        if story is None:
            if not event.network or not event.transport or not is_own:
                return
            is_reply = self._is_reply(event)
            if is_reply and not self._is_asked_for(event):
                return
            story = self.packets[event.id] = Story(event, is_reply)
        if story.ended:
            return
        story.last = monotonic()
        if is_own and event.network:
            self._checkpoint(story, event)
        elif event.verdict in (NF_DROP, NF_QUEUE) and not is_own:
            self._dropped(story, event)

    def _is_reply(self, event: Event) -> bool:
        source, sport, _, _ = event.ends
        return any(target.container_ip and packed(target.container_ip) == source and target.container_port == sport
                   for target in self._scene.targets)

    def _is_asked_for(self, event: Event) -> bool:
        """Whether a reply is to the client of --from, who may be masqueraded."""
        source, sport, destination, dport = event.ends
        return self._scene.client in (None, destination) or any(
            story.headers.ends == (destination, dport, source, sport) for story in self.packets.values())

    def _checkpoint(self, story: Story, event: Event) -> None:
        at_end = event.chain.startswith(END)
        hook = event.chain.removeprefix(END if at_end else BEGIN)
        if (hook, at_end) == (story.at, story.is_through):
            return
        if not story.at:
            self._begin(story, event, hook)
        elif event.ends != story.headers.ends:
            self._translated(story, event)
        story.at, story.is_through, story.headers = hook, at_end, event
        if hook == "postrouting" and at_end:
            self._step(story, f"went out on {self._name(event.oif)}", interface=self._name(event.oif))
            if event.oif and self._name(event.oif) != "lo":
                story.ended = "out"
                self.was_answered |= story.is_reply and not story.first.flags & RST
        elif hook == "input" and at_end:
            word = "arrived at a process of this host" if not story.is_reply else "arrived at the client, on this host"
            self._step(story, word)
            story.ended = "delivered"
            self.was_answered |= not story.first.flags & RST

    def _begin(self, story: Story, event: Event, hook: str) -> None:
        source, sport, destination, dport = event.ends
        kind = "RST " if event.flags & RST else {SYN: "SYN ", SYN | ACK: "SYN+ACK "}.get(event.flags & (SYN | ACK), "")
        where = f"came in on {self._name(event.iif)}" if hook == "prerouting" else "was sent by this host"
        self._step(story, f"{end(shown(source), sport)} -> {end(shown(destination), dport)} {kind}{where}", head=True,
                   interface=self._name(event.iif))
        if story.is_reply and event.flags & RST:
            self._step(story, "REFUSED: nothing listens on that port of the container", verdict="refused")

    def _translated(self, story: Story, event: Event) -> None:
        source, sport, destination, dport = event.ends
        before = story.headers.ends
        if (destination, dport) != before[2:]:
            target = self._target(destination, dport)
            who = f" by container {target.name}" if target and not story.is_reply else ""
            word = "translated back" if story.is_reply else "translated"
            self._step(story, f"{word} to {end(shown(destination), dport)}{who}",
                       address=shown(destination), port=dport)
        if (source, sport) != before[:2]:
            if story.is_reply:
                self._step(story, f"translated back: {end(shown(source), sport)} -> {end(shown(destination), dport)}")
            else:
                self._step(story, f"masqueraded as {end(shown(source), sport)}")

    def _target(self, ip: bytes, number: int) -> Target | None:
        return next((target for target in self._scene.targets if target.container_ip and
                     (packed(target.container_ip), target.container_port) == (ip, number)), None)

    def _dropped(self, story: Story, event: Event) -> None:
        chain = next((each for each in self._scene.rulesets.chains
                      if (each.family, each.table, each.name) == (event.family, event.table, event.chain)), None)
        rule = next((each for each in chain.rules if each.handle == event.handle), None) if chain else None
        text = f"policy {chain.policy}" if chain and event.is_policy else ""
        who = f"table {event.family} {event.table}"
        if chain and not text:
            from ..firewall.expressions import Verdict
            from ..firewall.walk import End
            last = End(Verdict("drop"), chain, chain, rule, True)
            text = rule_of(self._scene, last, 4 if len(story.headers.ends[0]) == 4 else 6) if rule else "a rule"
            whose_it_is = whose(self._scene, last)
            who += f" ({whose_it_is})" if whose_it_is != who else ""
        word = "QUEUED to a program" if event.verdict == NF_QUEUE else \
            "REJECTED" if "reject" in text.lower() else "DROPPED"
        self._step(story, f"{word} by {who}, chain {event.chain}, rule: {text}", verdict=word.lower().split(" ")[0],
                   table=f"{event.family} {event.table}", chain=event.chain, rule=text, backend="nft")
        story.ended = "dropped"

    # --- the end of a story ---

    def is_done(self) -> bool:
        """Whether the story of one connection is complete."""
        now = monotonic()
        for story in self.packets.values():
            if not story.ended and now - story.last > QUIET:
                self._lost(story)
        ended = [story for story in self.packets.values() if story.ended]
        first = [story for story in ended if not story.is_reply]
        if any(story.ended in ("dropped", "lost") for story in ended) or any(
                story.is_reply or story.ended == "delivered" for story in ended):
            return all(story.ended for story in self.packets.values()) and now - max(
                story.last for story in self.packets.values()) > 0.2
        return bool(first) and now - max(story.last for story in first) > 2 * QUIET

    def finish(self) -> None:
        """Tell what is left to be told."""
        for story in self.packets.values():
            if not story.ended:
                self._lost(story)
        out = [story for story in self.packets.values() if story.ended == "out" and not story.is_reply]
        if out and not any(story.is_reply for story in self.packets.values()):
            self._step(out[-1], "nothing came back from the container: cni-portmap doctor "
                       f"{self._scene.port}/{self._scene.protocol} looks inside", verdict="no answer")

    def _lost(self, story: Story) -> None:
        """Name who has lost a packet that nf_tables has not told the end of."""
        story.ended = "lost"
        if story.is_through and story.at in ("prerouting", "output"):
            self._step(story, "LOST by routing: this host does not forward it (cni-portmap doctor "
                       f"{self._scene.port}/{self._scene.protocol} says why: forwarding, rp_filter, no route)",
                       verdict="lost")
            return
        if story.is_through:
            self._step(story, f"lost behind the hook {story.at}", verdict="lost")
            return
        found = self._legacy(story)
        if found:
            self._step(story, *found[:1], **found[1])
        else:
            self._step(story, f"LOST in the hook {story.at}, and not by nf_tables: a kernel module or iptables-legacy",
                       verdict="lost")

    def _legacy(self, story: Story) -> "tuple[str, dict[str, Any]] | None":
        """The rule of iptables-legacy that drops a packet in a hook, by its own headers."""
        packet = self._packet(story)
        walker = self._scene.walker
        chains = [chain for chain in walker.hooked(story.at, packet.family) if chain.backend == LEGACY]
        for loss in walker.pass_hook(story.at, packet, chains=chains).losses:
            chain, rule = loss.chain, loss.rule
            text = rule_of(self._scene, loss, packet.family)
            program = "ip6tables-legacy" if chain.family == "ip6" else "iptables-legacy"
            which = f"rule {rule.handle} of chain {chain.name}: {text}" if rule else f"chain {chain.name}, {text}"
            word = "REJECTED" if loss.verdict.kind == "reject" else "DROPPED"
            shows = f"{program} -t {chain.table} -S {chain.name}"
            return f"{word} by iptables-legacy, table {chain.table} ({shows}): {which}", {
                "verdict": word.lower(), "table": f"{chain.family} {chain.table}", "chain": chain.name, "rule": text,
                "backend": LEGACY}
        return None

    def _packet(self, story: Story) -> Packet:
        event = story.headers
        source, sport, destination, dport = event.ends
        packet = Packet(4 if len(source) == 4 else 6, event.protocol, source, destination, dport, sport=sport,
                        iif=self._name(event.iif), oif=self._name(event.oif), local=not event.iif)
        packet.flags, packet.reply = event.flags, story.is_reply
        packet.state = ESTABLISHED if story.is_reply or event.state & 2 else NEW
        asked, asked_port = story.first.ends[2:]
        if not story.is_reply:
            packet.original = packet.original._replace(destination=asked, dport=asked_port)
            if (destination, dport) != (asked, asked_port):
                packet.status |= 0x20
        else:
            packet.status |= 0x20
        return packet

    def _name(self, index: int) -> str:
        return self._scene.host.name_of(index)

    def _step(self, story: Story, text: str, head: bool = False, **fields: Any) -> None:
        if not self._quiet:
            between = "\n" if head and len(self.packets) > 1 and not story.is_reply else ""
            print(between + (text if head else f"  {text}"), flush=True)
        story.steps.append({"text": text, "hook": story.at, **fields})

    def as_json(self) -> list[dict[str, Any]]:
        """A list of packets, each with its steps."""
        found = []
        for story in self.packets.values():
            source, sport, destination, dport = story.first.ends
            verdict = next((step["verdict"] for step in reversed(story.steps) if "verdict" in step),
                           "delivered" if story.ended == "delivered" else "forwarded")
            found.append({"from": end(shown(source), sport), "to": end(shown(destination), dport),
                          "direction": "reply" if story.is_reply else "original", "verdict": verdict,
                          "steps": story.steps})
        return found


