"""Does the container answer: its sockets, its interface, its way back. Read inside its network namespace."""
from collections.abc import Iterator

from ...linux.host import RTN_LOCAL, Address, Listener
from .finding import ERROR, INFO, OUTSIDE, WARNING, Check, Finding
from .scene import EXAMPLES, Inside, Scene, Target, Trip, end, packed, shown

GONE = ("owner-dead", "interface-gone", "interface-down", "container-address-changed", "no-bridge")
ANY = {4: bytes(4), 6: bytes(16)}
_APART = "the kernel keeps a parent and what is on it apart"
# By the kind of the container's interface, why this host does not reach it there.
WAYLESS = {"macvlan": _APART, "ipvlan": _APART, "macvtap": _APART, "ipvtap": _APART,
           "tun": "it leads to a program in there"}


def _is_loopback(ip: bytes) -> bool:
    return ip[0] == 127 if len(ip) == 4 else ip == bytes(15) + b"\1" or ip[:13] == bytes(10) + b"\xff\xff\x7f"


def serves(listener: Listener, target: Target) -> bool:
    """Whether a socket gets what is sent to the container's address."""
    ip = packed(target.container_ip)
    if target.family == 4:
        if listener.family == 4:
            return listener.ip in (ip, ANY[4])
        return not listener.only6 and listener.ip in (ANY[6], bytes(10) + b"\xff\xff" + ip)
    return listener.family == 6 and listener.ip in (ip, ANY[6])


def _sockets(scene: Scene, target: Target) -> tuple[Inside, list[Listener]]:
    found = scene.inside(target)
    return found, [each for each in found.listeners.get(target.protocol, ()) if each.port == target.container_port]


def _seen(target: Target, sockets: list[Listener]) -> str:
    listed = ", ".join(dict.fromkeys(end(shown(each.ip), each.port) for each in sockets)) or "none on this port"
    return f"sockets in its network namespace: {target.protocol} {listed}: " \
        f"nsenter --net={target.line.netns} ss -ln{'u' if target.protocol == 'udp' else 't'}"


def _is_looked_at(scene: Scene, target: Target) -> bool:
    """Whether the container's sockets tell anything: its namespace was read, and its program is to answer there."""
    return bool(target.container_ip and scene.inside(target).host) and \
        (target.protocol != "sctp" or bool(scene.inside(target).listeners.get("sctp")))


def _listens_on_localhost(scene: Scene, target: Target) -> Iterator[Finding]:
    if not _is_looked_at(scene, target):
        return
    _, sockets = _sockets(scene, target)
    if sockets and all(_is_loopback(each.ip) for each in sockets):
        yield ON_LOCALHOST.found(
            f"the program in container {target.name} ({target.line.network}, {target.line.ifname}) listens on its own "
            f"localhost only", [_seen(target, sockets), f"packets for {target.label} arrive at "
                                f"{end(target.container_ip, target.container_port)}, where nothing listens"],
            f"let it listen on 0.0.0.0 or [::] port {target.container_port} (most programs: --host or --bind 0.0.0.0)")


def _nobody_listens(scene: Scene, target: Target) -> Iterator[Finding]:
    if not _is_looked_at(scene, target):
        return
    found, sockets = _sockets(scene, target)
    if sockets:
        return
    others = sorted({each.port for each in found.listeners.get(target.protocol, ()) if not _is_loopback(each.ip)})
    has = f"; it listens on {', '.join(map(str, others[:10]))}" if others else ""
    yield NOBODY.found(
        f"nothing in container {target.name} listens on port {target.container_port}/{target.protocol}, which "
        f"{target.label} leads to{has}", [_seen(target, sockets)],
        (f"publish the port that it listens on: -p {target.port}:{others[0]}; or " if others else "")
        + "see whether the program runs, or is still starting, and on which port: it should be "
          f"{target.container_port}")


def _other_address(scene: Scene, target: Target) -> Iterator[Finding]:
    if not _is_looked_at(scene, target):
        return
    _, sockets = _sockets(scene, target)
    same = [each for each in sockets if each.family == target.family or not each.only6]
    if same and not any(serves(each, target) for each in sockets) and \
            not all(_is_loopback(each.ip) for each in sockets) and not _is_other_family(target, sockets):
        yield OTHER_ADDRESS.found(
            f"the program in container {target.name} does not listen on {target.container_ip}, where packets for "
            f"{target.label} arrive, but on another address", [_seen(target, sockets)],
            f"let it listen on 0.0.0.0 or [::] port {target.container_port}, or on {target.container_ip}")


def _is_other_family(target: Target, sockets: list[Listener]) -> bool:
    """Whether all sockets but those on localhost are of the other family, and would serve every address of it."""
    rest = [each for each in sockets if not _is_loopback(each.ip)]
    if target.family == 6:
        return bool(rest) and all(each.family == 4 or each.ip[:12] == bytes(10) + b"\xff\xff" for each in rest)
    return bool(rest) and all(each.family == 6 and (each.only6 or each.ip != ANY[6]) for each in rest)


def _other_family(scene: Scene, target: Target) -> Iterator[Finding]:
    if not _is_looked_at(scene, target):
        return
    _, sockets = _sockets(scene, target)
    if sockets and not any(serves(each, target) for each in sockets) and _is_other_family(target, sockets):
        yield OTHER_FAMILY.found(
            f"the program in container {target.name} listens for IPv{10 - target.family} only: {target.label} does not "
            f"answer over IPv{target.family}", [_seen(target, sockets)],
            f"let it listen on {'[::]' if target.family == 6 else '0.0.0.0'} port {target.container_port} too; or use "
            f"an IPv{10 - target.family} address of this host")


def _waiting(scene: Scene, target: Target) -> Listener | None:
    """The socket that serves the port, where clients wait in its queue."""
    if not _is_looked_at(scene, target):
        return None
    return next((each for each in _sockets(scene, target)[1]
                 if serves(each, target) and each.waiting > 0 and each.protocol != "udp"), None)


def _backlog_full(scene: Scene, target: Target) -> Iterator[Finding]:
    found = _waiting(scene, target)
    if found and 0 <= found.backlog <= found.waiting:
        yield BACKLOG.found(
            f"the program in container {target.name} accepts no connections: its queue of {found.backlog} is full",
            [f"{found.waiting} of {found.backlog} wait for accept(): nsenter --net={target.line.netns} ss -ltn sport = "
             f":{target.container_port} (Recv-Q, Send-Q)"],
            "see what the program does: it hangs, is paused (podman unpause), or is overloaded")


def _not_accepting(scene: Scene, target: Target) -> Iterator[Finding]:
    found = _waiting(scene, target)
    if found and not 0 <= found.backlog <= found.waiting:
        yield NOT_ACCEPTING.found(
            f"{found.waiting} connections to container {target.name} wait for its program to accept them",
            [f"nsenter --net={target.line.netns} ss -ltn sport = :{target.container_port} (Recv-Q)"],
            "look again: if the number stays, the program hangs, or is paused (podman unpause)")


# --- its interface ---------------------------------------------------------------------------------------------

def _interface_gone(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    if host and not host.link(target.line.ifname):
        there = ", ".join(name for name in host.links if name != "lo") or "none but lo"
        yield INTERFACE_GONE.found(
            f"container {target.name} has no interface {target.line.ifname} any more",
            [f"its interfaces: {there}: nsenter --net={target.line.netns} ip link"],
            "start the container again; its runtime makes the interface")


def _interface_down(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    link = host.link(target.line.ifname) if host else None
    if link and not link.is_up:
        yield INTERFACE_DOWN.found(
            f"interface {target.line.ifname} of container {target.name} is down",
            [f"nsenter --net={target.line.netns} ip link show {target.line.ifname}: no UP"],
            f"nsenter --net={target.line.netns} ip link set {target.line.ifname} up; its routes may have gone with "
            "it: then start the container again")


def _address_changed(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    if not host or not target.container_ip or not host.link(target.line.ifname):
        return
    if host.type_of(target.family, packed(target.container_ip)) != RTN_LOCAL:
        now = [shown(each.ip) for each in host.addresses if each.link == target.line.ifname and
               each.family == target.family and not each.is_link_local]
        yield ADDRESS_CHANGED.found(
            f"container {target.name} has not the address {target.container_ip} any more, where {target.label} leads "
            f"to; it has {', '.join(now) or 'none'}",
            [f"nsenter --net={target.line.netns} ip address show {target.line.ifname}"],
            f"nsenter --net={target.line.netns} ip address add {_with_length(scene, target)} dev {target.line.ifname}; "
            "or start the container again, so that its runtime publishes the new address")


def _with_length(scene: Scene, target: Target) -> str:
    way = scene.route(target)
    length = next((each.length for each in scene.host.addresses
                   if each.link == way and each.has(packed(target.container_ip))), 32 if target.family == 4 else 128)
    return f"{target.container_ip}/{length}"


def _no_bridge(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    link = host.link(target.line.ifname) if host else None
    why = WAYLESS.get(link.kind) if link else None
    if link and why and scene.host.link(scene.route(target)) and \
            scene.host.links[scene.route(target)].kind not in ("macvlan", "ipvlan"):
        yield NO_BRIDGE.found(
            f"container {target.name} is on {link.kind}: this host cannot reach it through {target.line.ifname}, since "
            f"{why}",
            [f"nsenter --net={target.line.netns} ip -d link show {target.line.ifname}: {link.kind}"],
            f"clients of the LAN talk to {end(target.container_ip, target.container_port)} itself; or give the "
            "container a bridge network as well, and publish the port there")


def _unreadable(scene: Scene, target: Target) -> Iterator[Finding]:
    found = scene.inside(target)
    if found.error and target.line.owner != "dead":
        yield UNREADABLE.found(
            f"the network namespace of container {target.name} cannot be looked at: {found.error}",
            [f"{target.line.netns or 'its path is not in its record'}: nsenter --net={target.line.netns} ss -ln"],
            "run it as root, in the mount namespace of the runtime; what is inside the container is not judged")


# --- its way back ----------------------------------------------------------------------------------------------

def _clients(scene: Scene, target: Target) -> list[tuple[Trip, bytes]]:
    """Who asks, as the container sees them: --from; or one behind each uplink, and somebody far away."""
    found = []
    for trip in scene.trips(target):
        if trip.path != OUTSIDE or trip.journey.dnat is None:
            continue
        replies = [leg for leg in trip.journey.legs if leg.which == "reply"]
        if replies and replies[0].packet.status & 0x10:  # masqueraded: this host asks, from beside the container
            continue
        if scene.client is not None:
            if scene.client != packed(target.container_ip):  # it has no way back to itself
                found.append((trip, scene.client))
            continue
        near = next((each for each in scene.host.addresses
                     if each.link == trip.packet.iif and each.family == target.family and not each.is_link_local), None)
        if near and near.length < len(near.ip) * 8:
            found.append((trip, _another(near)))
        found.append((trip, EXAMPLES[target.family]))
    return found


def _another(near: Address) -> bytes:
    """Another address of the same network."""
    return near.ip[:-1] + bytes((near.ip[-1] ^ 1 if near.length < len(near.ip) * 8 - 1 else near.ip[-1],))


def _no_way_back(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    if not host or not target.container_ip:
        return
    for _, client in _clients(scene, target):
        route = host.route(target.family, client)
        if not route.link:
            gate = next((shown(each.ip) for each in scene.host.addresses
                         if each.link == scene.route(target) and each.has(packed(target.container_ip))), "")
            yield NO_WAY_BACK.found(
                f"container {target.name} has no route to {shown(client)}: its answers for {target.label} go nowhere",
                [f"nsenter --net={target.line.netns} ip route get {shown(client)}: no route"],
                (f"nsenter --net={target.line.netns} ip -{target.family} route add default via {gate}; and " if gate
                 else "") + "give its network a default route (routes in its IPAM)", (OUTSIDE,))
            return


def _back_elsewhere(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    if not host or not target.container_ip:
        return
    own = next((each.link for each in host.addresses if each.ip == packed(target.container_ip)), target.line.ifname)
    for _, client in _clients(scene, target):
        route = host.route(target.family, client)
        if not route.link or route.link == own:
            continue
        link = host.link(route.link)
        here = scene.host.name_of(link.peer) if link and link.kind in ("veth", "netkit") and link.peer else ""
        see = f"nsenter --net={target.line.netns} ip route get {shown(client)}: dev {route.link}"
        if not here:
            yield BACK_ELSEWHERE.found(
                f"container {target.name} answers {shown(client)} by {route.link}, past this host, which has "
                f"translated what came for {target.label} and does not see the answer", [see],
                f"a route to the clients by {own} in the container, or one network only; or masqAll: true in the "
                "configuration of its network, so that it answers this host", (OUTSIDE,))
            return
        its = scene.host.links[here].master or here
        strict = max(int(scene.sysctl(f"net/ipv4/conf/{name}/rp_filter") or 0) for name in ("all", its)) == 1
        if target.family == 4 and strict and scene.route(target) != its:
            yield BACK_ELSEWHERE.found(
                f"container {target.name} answers by {route.link}: this host gets that on {its}, and drops it, since "
                f"its own route to {target.container_ip} is another",
                [see, f"sysctl net.ipv4.conf.{its}.rp_filter, net.ipv4.conf.all.rp_filter: the greater counts, 1 is "
                      "strict"],
                f"sysctl -w net.ipv4.conf.{its}.rp_filter=2", (OUTSIDE,))
            return


ON_LOCALHOST = Check("listens-on-localhost", ERROR, "The program listens on the container's own localhost. The most "
                     "common one.", "Let it listen on 0.0.0.0 or [::].", _listens_on_localhost, GONE)
NOBODY = Check("nobody-listens", ERROR, "The program is down, still starting, or listens on another port.",
               "Publish the port that it listens on.", _nobody_listens, GONE)
OTHER_ADDRESS = Check("listens-on-other-address", ERROR, "The program listens on another address of the container.",
                      "Let it listen on 0.0.0.0 or [::].", _other_address, GONE)
OTHER_FAMILY = Check("listens-other-family", WARNING, "The program listens for IPv4 only, or for IPv6 only.",
                     "Let it listen for both, or use the other family.", _other_family, GONE)
BACKLOG = Check("backlog-full", ERROR, "The program hangs: the queue of its socket is full.", "Look at the program.",
                _backlog_full, GONE)
NOT_ACCEPTING = Check("not-accepting", WARNING, "Connections wait for the program: it is paused, hangs, or is busy.",
                      "Look again.", _not_accepting, GONE)
INTERFACE_GONE = Check("interface-gone", ERROR, "The container's interface was removed.", "Start the container again.",
                       _interface_gone, ("owner-dead",))
INTERFACE_DOWN = Check("interface-down", ERROR, "The container's interface is down.", "Set it up.", _interface_down,
                       ("owner-dead",))
ADDRESS_CHANGED = Check("container-address-changed", ERROR, "The container has another address than the rules lead to.",
                        "Start the container again.", _address_changed,
                        ("owner-dead", "interface-gone", "interface-down"))
NO_BRIDGE = Check("no-bridge", ERROR, "The container is on macvlan, ipvlan or tap, which this host cannot reach.",
                  "Talk to it directly, or add a bridge network.", _no_bridge)
UNREADABLE = Check("container-unreadable", INFO, "The container's network namespace cannot be looked at.",
                   "Run it as root.", _unreadable)
NO_WAY_BACK = Check("no-way-back", ERROR, "The container has no route to the client.", "Give it a default route.",
                    _no_way_back, (*GONE, "network-without-gateway"))
BACK_ELSEWHERE = Check("way-back-elsewhere", ERROR, "The container has several networks, and answers by another one, "
                       "where the answer is lost.", "One network, masqAll, or rp_filter=2.", _back_elsewhere, GONE)

OF_TARGET = (INTERFACE_GONE, INTERFACE_DOWN, ADDRESS_CHANGED, NO_BRIDGE, ON_LOCALHOST, NOBODY, OTHER_ADDRESS,
             OTHER_FAMILY, BACKLOG, NOT_ACCEPTING, NO_WAY_BACK, BACK_ELSEWHERE, UNREADABLE)
