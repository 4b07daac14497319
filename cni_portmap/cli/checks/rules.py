"""Whose rules drop it, or lead it elsewhere: firewalls, other publishers, connection tracking."""
from collections.abc import Iterator
from typing import NamedTuple

from ...firewall.claims import publisher
from ...firewall.expressions import DNAT, REDIRECT, REJECT, Verdict
from ...firewall.journey import FIRST, LATER, REPLY, Leg
from ...firewall.packet import MAYBE, UNTRACKED, YES
from ...firewall.text import is_iptables, text_of
from ...firewall.walk import End
from ...linux.conntrack import Conntrack
from ...linux.host import can_ask, rule_texts
from ...linux.rulesets import LEGACY, Chain
from .container import GONE
from .finding import ERROR, HOST, INFO, LOCALHOST, OUTSIDE, WARNING, Check, Finding
from .links import LINKS
from .scene import Scene, Target, Trip, packed, shown

BUILTIN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
IPTABLES = ("filter", "nat", "mangle", "raw", "security")
ROUTES = (*LINKS, "network-without-gateway", "no-route-to-container", "route-elsewhere", "container-address-is-local")


class Loss(NamedTuple):
    """A packet of some connection that is lost at some rule, for certain or perhaps."""

    trip: Trip
    leg: Leg
    end: End
    is_certain: bool

    @property
    def packet(self) -> str:
        """Which packet it is, in words."""
        if self.leg.which == REPLY:
            return "replies of the container"
        which = "later packets" if self.leg.which == LATER else "packets"
        return f"{which} {self.trip}"


def _losses(scene: Scene, target: Target) -> Iterator[Loss]:
    for trip in scene.trips(target):
        for leg in trip.journey.legs:
            certain = leg.passage.lost == YES
            ends = [end for end in leg.passage.losses if end.sure] if certain else leg.passage.losses
            for end in ends[-1:] if certain else ends:
                if not scene.is_ours(end.chain):
                    yield Loss(trip, leg, end, certain)
            if certain:
                break  # nothing of the connection comes further


# --- in words --------------------------------------------------------------------------------------------------

def rule_of(scene: Scene, end: End, family: int) -> str:
    """A rule's text, or the policy, as its own program writes it."""
    if end.rule is None:
        return f"policy {end.base.policy}"
    if end.chain.backend == LEGACY:
        return text_of(end.rule, family)
    key = end.chain.family, end.chain.table, end.chain.name
    if key not in scene.texts:
        scene.texts[key] = rule_texts(*key)
    found = scene.texts[key].get(end.rule.handle, "")
    if is_iptables(end.rule):
        own = text_of(end.rule, family)
        found = f"{found}  ({own})" if found else own
    return found or f"rule with handle {end.rule.handle}"


def listing(chain: Chain, handle: bool = False) -> str:
    """The command that shows a chain."""
    if chain.backend == LEGACY:
        return f"{_program(chain)} -t {chain.table} -S {chain.name}"
    return f"nft {'-a ' if handle else ''}list chain {chain.family} {chain.table} {chain.name}"


def _program(chain: Chain) -> str:
    prefix = "ip6tables" if chain.family == "ip6" else "iptables"
    return f"{prefix}-legacy" if chain.backend == LEGACY else prefix


def _has_chain(scene: Scene, beside: Chain, prefix: str) -> bool:
    return any(each.name.startswith(prefix) for each in scene.rulesets.chains
               if (each.backend, each.family, each.table) == (beside.backend, beside.family, beside.table))


def whose(scene: Scene, end: End) -> str:
    """Whose rule it is: a firewall by its name, or its table."""
    chain = end.chain
    if chain.table == "firewalld" or chain.table.startswith("firewalld_"):
        return "firewalld"
    if chain.table in IPTABLES:
        if chain.name.startswith("ufw") or _has_chain(scene, chain, "ufw"):
            return "ufw"
        if _has_chain(scene, chain, "DOCKER-USER") and end.base.hook == "forward":
            return "Docker"
        if end.rule is None and _has_chain(scene, chain, f"{chain.name}_direct"):
            return "firewalld"
    if chain.backend == LEGACY:
        return "iptables-legacy"
    return f"table {chain.family} {chain.table}"


def _advice(scene: Scene, target: Target, loss: Loss) -> str:
    """The command that lets the packet pass where it is lost."""
    end, who = loss.end, whose(scene, loss.end)
    chain = end.chain
    if who == "firewalld":
        return _firewalld(scene, target, loss)
    if who == "ufw" and end.base.hook == "forward":
        return f"ufw route allow proto {target.protocol} to {target.container_ip} port {target.container_port}"
    if who == "Docker":
        return f"{_program(chain)} -I DOCKER-USER -m conntrack --ctstate DNAT -j ACCEPT"
    translated = _is_translated(loss)
    if chain.table in IPTABLES and (chain.backend == LEGACY or chain.name in BUILTIN or _is_builtin(end.base)):
        match = "-m conntrack --ctstate DNAT" if translated else _iptables_match(target, loss)
        return f"{_program(chain)} -t {chain.table} -I {chain.name} {match} -j ACCEPT"
    match = "ct status dnat" if translated else _nft_match(target, loss)
    return f"nft insert rule {chain.family} {chain.table} {chain.name} {match} accept"


def _is_builtin(base: Chain) -> bool:
    return base.table in IPTABLES and base.name in BUILTIN


def _is_translated(loss: Loss) -> bool:
    """Whether the packet has a translated connection there: conntrack has seen it, and so have the nat chains."""
    hook, priority = loss.end.base.hook, loss.end.base.priority
    if hook in ("prerouting", "output") and priority <= -200:
        return False
    if loss.leg.which != FIRST:
        return True
    return hook not in ("prerouting", "output") or priority > -100


def _iptables_match(target: Target, loss: Loss) -> str:
    packet = loss.leg.packet
    if loss.leg.which == REPLY:
        return f"-s {target.container_ip} -p {target.protocol} --sport {target.container_port}"
    return f"-d {shown(packet.destination)} -p {target.protocol} --dport {packet.dport}"


def _nft_match(target: Target, loss: Loss) -> str:
    packet, ip = loss.leg.packet, "ip" if target.family == 4 else "ip6"
    if loss.leg.which == REPLY:
        return f"{ip} saddr {target.container_ip} {target.protocol} sport {target.container_port}"
    return f"{ip} daddr {shown(packet.destination)} {target.protocol} dport {packet.dport}"


def _firewalld(scene: Scene, target: Target, loss: Loss) -> str:
    text = rule_of(scene, loss.end, target.family)
    if loss.end.chain.table == "firewalld_policy_drop" or loss.end.chain.table in IPTABLES:  # with either backend
        return "firewall-cmd --panic-off"
    if "fib saddr" in text:
        return "IPv6_rpfilter=loose (or no) in /etc/firewalld/firewalld.conf, and firewall-cmd --reload"
    if loss.end.base.hook == "forward" and "ct status dnat" not in text and loss.end.verdict.kind == REJECT:
        return "StrictForwardPorts=no in /etc/firewalld/firewalld.conf, and firewall-cmd --reload; or: firewall-cmd " \
            f"--permanent --zone=public --add-forward-port=port={target.port}:proto={target.protocol}:toport=" \
            f"{target.container_port}:toaddr={target.container_ip}"
    way = scene.route(target) or "the container's bridge"
    return f"firewall-cmd --permanent --zone=trusted --add-interface={way} && firewall-cmd --reload"


# --- dropped ---------------------------------------------------------------------------------------------------

def _evidence(scene: Scene, target: Target, loss: Loss) -> tuple[str, ...]:
    end = loss.end
    counted = end.rule.packets if end.rule else end.base.counted
    seen = f" ({counted} packets so far)" if counted is not None else ""
    packet = loss.leg.packet
    at = f"{shown(packet.destination) or 'the client'}, port {packet.dport}"
    return (f"{end.chain}: {rule_of(scene, end, target.family)}{seen}: {listing(end.chain, True)}",
            f"hook {end.base.hook}, priority {end.base.priority}: {loss.packet}, by then to {at}: "
            f"{listing(end.base)}")


def _verb(loss: Loss) -> str:
    return "rejects" if loss.end.verdict.kind == REJECT else "drops" if loss.end.verdict.kind == "drop" else "takes"


def _finding(check: Check, scene: Scene, target: Target, loss: Loss, severity: str, summary: str) -> Finding:
    chain = loss.end.chain
    return check.found(summary, _evidence(scene, target, loss), _advice(scene, target, loss), (loss.trip.path,),
                       severity)._replace(table=f"{chain.family} {chain.table}", chain=chain.name,
                                          backend=chain.backend)


def _dropped(scene: Scene, target: Target) -> Iterator[Finding]:
    for loss in _losses(scene, target):
        if loss.is_certain:
            severity = WARNING if loss.trip.path == LOCALHOST and not target.is_localhost else ERROR
            yield _finding(DROPPED, scene, target, loss, severity,
                           f"{whose(scene, loss.end)} {_verb(loss)} {loss.packet} for {scene.subject(target)}")


def _maybe_dropped(scene: Scene, target: Target) -> Iterator[Finding]:
    for loss in _losses(scene, target):
        if not loss.is_certain:
            rest = loss.end.rest
            some = "" if rest else "some "
            unless = ", unless a rule before lets them through" if rest else ""
            yield _finding(MAYBE_DROPPED, scene, target, loss, WARNING if rest else INFO,
                           f"{whose(scene, loss.end)} {_verb(loss)} {some}{loss.packet} for "
                           f"{scene.subject(target)}{unless}")


# --- led elsewhere ---------------------------------------------------------------------------------------------

def _takers(scene: Scene, target: Target) -> Iterator[tuple[Trip, End, str]]:
    """Others' translations at our priority, or before it: which comes first at ours cannot be read."""
    for trip in scene.trips(target):
        hook = "output" if trip.packet.local else "prerouting"
        for chain in scene.walker.hooked(hook, target.family):
            if chain.kind != "nat" or scene.is_ours(chain) or chain.priority > -100:
                continue
            passage = scene.walker.pass_hook(hook, trip.packet.copy(), chains=[chain])
            ends = [end for end in passage.translations if end.verdict.kind in (DNAT, REDIRECT)]
            for end in ends:
                where = end.verdict.address
                if where and target.container_ip and where == packed(target.container_ip) and \
                        end.verdict.port in (None, target.container_port):
                    continue  # to the same place
                yield trip, end, YES if end.sure else MAYBE


def _taken(scene: Scene, target: Target, certain: str) -> Iterator[Finding]:
    for trip, end, its in _takers(scene, target):
        if its != certain:
            continue
        chain = end.chain
        who = publisher(chain) or f"table {chain.family} {chain.table}"
        where = f"{shown(end.verdict.address) or 'another address'}" + (
            f", port {end.verdict.port}" if end.verdict.port else "")
        first = "before cni-portmap's" if end.base.priority < -100 else \
            "at the same priority as cni-portmap's: of the two, the one that was registered last takes it"
        check = TAKEN if certain == YES else MAYBE_TAKEN
        some = "" if certain == YES else "some "
        yield check.found(
            f"{who} leads {some}packets {trip} for {target.label} to {where}",
            [f"{chain}: {rule_of(scene, end, target.family)}: {listing(chain, True)}",
             f"hook {end.base.hook}, priority {end.base.priority}, {first}: cni-portmap list --port {target.port}"],
            f"publish one of the two on another port; or remove that rule: {_removal(end)}", (trip.path,))._replace(
                table=f"{chain.family} {chain.table}", chain=chain.name, backend=chain.backend)


def _removal(end: End) -> str:
    chain, rule = end.chain, end.rule
    if chain.backend == LEGACY or _is_builtin(end.base):
        return f"{_program(chain)} -t {chain.table} -D {chain.name} {_number_in(chain, end)}"
    return f"nft delete rule {chain.family} {chain.table} {chain.name} handle {rule.handle if rule else 0}"


def _number_in(chain: Chain, end: End) -> int:
    return next((index for index, rule in enumerate(chain.rules, 1) if rule is end.rule), 0)


def _taken_by_other(scene: Scene, target: Target) -> Iterator[Finding]:
    yield from _taken(scene, target, YES)


def _maybe_taken(scene: Scene, target: Target) -> Iterator[Finding]:
    yield from _taken(scene, target, MAYBE)


# --- connection tracking ---------------------------------------------------------------------------------------

def _untracking(scene: Scene, target: Target) -> "tuple[Chain, str, str] | None":
    """The chain and rule that let packets pass connection tracking by, among those before it."""
    for chain in scene.rulesets.chains:
        for rule in chain.rules:
            for name, fields in rule.expressions:
                if name == "notrack" or (name == "target" and fields.get(1, b"")[:-1] in (b"CT", b"NOTRACK") and
                                         (fields.get(3, b"\1")[0] & 1)):
                    end = End(Verdict(""), chain, chain, rule, True)
                    if chain.family in ("inet", "ip" if target.family == 4 else "ip6"):
                        return chain, rule_of(scene, end, target.family), _removal(end._replace(
                            base=chain._replace(name="PREROUTING") if chain.table in IPTABLES else chain))
    return None


def _notrack(scene: Scene, target: Target) -> Iterator[Finding]:
    yield from _passed_by(NOTRACK, "packets", ", so they", scene, target, [
        trip for trip in scene.trips(target) if trip.journey.state == UNTRACKED])


def _maybe_notrack(scene: Scene, target: Target) -> Iterator[Finding]:
    yield from _passed_by(MAYBE_NOTRACK, "some packets", ": those", scene, target, [
        trip for trip in scene.trips(target) if trip.journey.state != UNTRACKED and
        any(leg.packet.may_be_untracked for leg in trip.journey.legs)])


def _passed_by(check: Check, packets: str, those: str, scene: Scene, target: Target, trips: list[Trip]) \
        -> Iterator[Finding]:
    """The rule that lets the packets of these trips pass connection tracking by."""
    found = _untracking(scene, target) if trips else None
    if found:
        chain, text, removal = found
        yield check.found(
            f"a rule lets {packets} {trips[0]} for {target.label} pass connection tracking by{those} are not "
            "translated", [f"{chain}: {text}: {listing(chain, True)}"], removal,
            tuple(dict.fromkeys(trip.path for trip in trips)))._replace(
                table=f"{chain.family} {chain.table}", chain=chain.name, backend=chain.backend)


def _no_forward_route(scene: Scene, target: Target) -> Iterator[Finding]:
    for trip in scene.trips(target):
        if trip.journey.dnat and not trip.journey.local and not trip.journey.out and trip.journey.lost != YES:
            where = shown(trip.journey.destination[0]) or "an address that a rule chooses"
            yield NO_FORWARD_ROUTE.found(
                f"packets {trip} for {target.label} go to {where}, and this host cannot say by which way",
                [f"ip route get {where}"], f"ip route get {where}, and see that it leads to the container",
                (trip.path,))
            return


def _stale_flow(scene: Scene, target: Target) -> Iterator[Finding]:
    if target.protocol == "tcp" or not target.container_ip or not can_ask("nf_conntrack_netlink"):
        return
    others = {packed(line.container_ip) for line in scene.lines if line.container_ip and target.port in line.host_ports}
    ip = packed(target.container_ip)
    try:
        for flow in Conntrack(target.number, scene.kernel.open_socket).flows(target.family, target.port):
            mine = target.is_wildcard or flow.destination == packed(target.host_ip)
            if flow.family == target.family and flow.port == target.port and mine and \
                    flow.target not in {ip, *others} and scene.host.type_of(target.family, flow.destination) == 2:
                host = shown(flow.destination)
                yield STALE.found(
                    f"connection tracking still sends packets of a client for {target.label} to {shown(flow.target)}, "
                    "which had the port, or none, before",
                    [f"conntrack -L -p {target.protocol} --orig-port-dst {target.port}"],
                    f"conntrack -D -p {target.protocol} --orig-dst {host} --orig-port-dst {target.port}",
                    (OUTSIDE, HOST))
                return
    except OSError:
        return


def _conntrack_full(scene: Scene, target: Target) -> Iterator[Finding]:
    count, most = (int(scene.sysctl(f"net/netfilter/nf_conntrack_{name}") or 0) for name in ("count", "max"))
    if most and count * 100 >= most * 95:
        yield FULL.found(
            f"the table of tracked connections is {'full' if count >= most else 'nearly full'}: {count} of {most}; "
            "new ones are dropped",
            [f"sysctl net.netfilter.nf_conntrack_count: {count}, net.netfilter.nf_conntrack_max: {most}"],
            f"sysctl -w net.netfilter.nf_conntrack_max={most * 2}; and see who makes so many: conntrack -L",
            severity=ERROR if count >= most else WARNING)


def _legacy_unreadable(scene: Scene, target: Target) -> Iterator[Finding]:
    if scene.rulesets.unreadable:
        yield LEGACY_UNREADABLE.found(
            f"the rules of iptables-legacy cannot be read: {scene.rulesets.unreadable}",
            ["/proc/net/ip_tables_names names its tables: iptables-legacy -S"],
            "run it as root; a drop by iptables-legacy is not found")


def _closed_by_exposure(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if not any(scene.is_ours(chain) and chain.name == "exposure" for chain in scene.rulesets.chains):
        return
    asked = scene.asks_container
    if scene.port is None or bool(asked) != (target is None) or (target and not target.container_ip):
        return
    number, ip = (target.container_port, target.container_ip) if target else (scene.port, asked)
    way = next((f"port {line.host_ports[line.container_ports.index(number)]} of this host" for line in scene.lines
                if line.container_ip == ip and number in line.container_ports), "a published port of this host")
    for trip in scene.direct(target, number):
        for leg in trip.journey.where:
            end = next((end for end in leg.passage.losses if scene.is_ours(end.chain)), None)
            if end is None or leg.passage.lost != YES:
                continue
            text = rule_of(scene, end, trip.packet.family)
            yield CLOSED.found(
                f"packets {trip} to {ip}, the container's own address, are dropped by the policy of its network",
                [f"{end.chain}: {text}: {listing(end.chain, True)}",
                 "gatewayModeV4 or gatewayModeV6 in its configuration: cni-portmap list --exposure"],
                f"connect to {way}; or open it: allowDirectRouting or trustedHostInterfaces, see docs/exposure.md",
                (OUTSIDE,), ERROR if asked else INFO)._replace(
                    table=f"{end.chain.family} {end.chain.table}", chain=end.chain.name, backend=end.chain.backend)
            return


PATHLESS = (*GONE, *ROUTES)
DROPPED = Check("dropped-by-firewall", ERROR, "A rule or policy drops or rejects new packets, replies or later "
                "packets: firewalld, ufw, Docker, nft, iptables-nft or iptables-legacy.",
                "Let translated connections pass there: `ct status dnat accept`; ufw: `ufw route allow`; Docker: "
                "`iptables -I DOCKER-USER -m conntrack --ctstate DNAT -j ACCEPT`; firewalld: `StrictForwardPorts=no`.",
                _dropped)
MAYBE_DROPPED = Check("maybe-dropped", WARNING, "A rule drops packets, but for those that a rule before lets through "
                      "(a warning); or those of some clients only (an info). `--from` tells.", "As above.",
                      _maybe_dropped)
TAKEN = Check("taken-by-other", ERROR, "Another program's DNAT rule takes the port first, or would after its next "
              "restart.", "Publish one of the two on another port.", _taken_by_other)
MAYBE_TAKEN = Check("maybe-taken", WARNING, "Another program's DNAT rule takes some packets for the port.",
                    "Publish one of the two on another port.", _maybe_taken)
NOTRACK = Check("notrack", ERROR, "A rule of the raw table exempts the packets from connection tracking.",
                "Remove it.", _notrack)
MAYBE_NOTRACK = Check("maybe-notrack", WARNING, "Such a rule exempts some packets.", "Remove it.", _maybe_notrack,
                      ("notrack",))
NO_FORWARD_ROUTE = Check("no-forward-route", WARNING, "Where a translated packet goes cannot be said.",
                         "Look at the route.", _no_forward_route, (*PATHLESS, "taken-by-other"))
STALE = Check("stale-flow", ERROR, "UDP: a flow from before still leads elsewhere.", "`conntrack -D`", _stale_flow)
FULL = Check("conntrack-full", ERROR, "The table of tracked connections is full; a warning at 95 %.",
             "`sysctl -w net.netfilter.nf_conntrack_max=…`", _conntrack_full)
LEGACY_UNREADABLE = Check("legacy-unreadable", INFO, "iptables-legacy has rules that cannot be read.",
                          "Run it as root.", _legacy_unreadable)

CLOSED = Check("closed-by-exposure", INFO, "A policy of the container's network (gatewayMode) closes its own address. "
               "An error with `--to` that address.", "Use the published port, or `allowDirectRouting`.",
               _closed_by_exposure)

OF_HOST = (CLOSED, FULL, LEGACY_UNREADABLE)
OF_TARGET = (TAKEN, NOTRACK, DROPPED, MAYBE_TAKEN, MAYBE_NOTRACK, MAYBE_DROPPED, NO_FORWARD_ROUTE, STALE)
ALSO_OF_TARGET = (CLOSED,)  # and of the port: where the container's own address is asked
