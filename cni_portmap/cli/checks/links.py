"""Does this host lead there: links, bridges, routes, forwarding."""
from collections.abc import Iterator

from ...linux.host import BR_STATE_DISABLED, BR_STATE_FORWARDING, IFF_RUNNING, NUD_FAILED, RTN_LOCAL, Link
from .container import GONE
from .finding import ERROR, INFO, OUTSIDE, WARNING, Check, Finding
from .scene import Scene, Target, packed, shown

LINKS = ("host-veth-down", "bridge-down", "not-on-bridge")
STATES = {0: "disabled", 1: "listening", 2: "learning", 4: "blocking"}


def _bridge_of(scene: Scene, target: Target) -> Link | None:
    """The bridge that the container's link is a port of."""
    near = scene.host_end(target)
    return scene.host.link(near.master) if near and near.master else None


def _veth_down(scene: Scene, target: Target) -> Iterator[Finding]:
    near = scene.host_end(target)
    if near and not near.is_up:
        yield VETH_DOWN.found(
            f"{near.name}, this host's end of the link to container {target.name}, is down",
            [f"ip link show {near.name}: no UP"], f"ip link set {near.name} up")


def _bridge_down(scene: Scene, target: Target) -> Iterator[Finding]:
    bridge = _bridge_of(scene, target)
    if bridge and not bridge.is_up:
        yield BRIDGE_DOWN.found(
            f"bridge {bridge.name}, which container {target.name} is on, is down",
            [f"ip link show {bridge.name}: no UP"],
            f"ip link set {bridge.name} up; its addresses stay, routes by gateways are to be added again")


def _port_blocked(scene: Scene, target: Target) -> Iterator[Finding]:
    near = scene.host_end(target)
    if near and near.master and near.is_up and near.flags & IFF_RUNNING and near.state != BR_STATE_FORWARDING and \
            near.state != BR_STATE_DISABLED:
        yield PORT_BLOCKED.found(
            f"bridge {near.master} does not forward on its port {near.name}, which leads to container {target.name}: "
            f"it is {STATES.get(near.state, near.state)}",
            [f"bridge link show dev {near.name}: state {STATES.get(near.state, near.state)}"],
            f"wait 30 seconds if it has just come up; else ip link set {near.master} type bridge stp_state 0 && bridge "
            f"link set dev {near.name} state 3")


def _not_on_bridge(scene: Scene, target: Target) -> Iterator[Finding]:
    near, way = scene.host_end(target), scene.host.link(scene.route(target))
    if near and not near.master and way and way.kind == "bridge":
        yield NOT_ON_BRIDGE.found(
            f"{near.name}, this host's end of the link to container {target.name}, is not on bridge {way.name}, where "
            f"{target.container_ip} is looked for", [f"ip link show {near.name}: no master",
                                                     f"ip route get {target.container_ip}: dev {way.name}"],
            f"ip link set {near.name} master {way.name}; and keep NetworkManager or systemd-networkd from taking it")


def _no_gateway(scene: Scene, target: Target) -> Iterator[Finding]:
    bridge = _bridge_of(scene, target)
    if not bridge or not target.container_ip or scene.route(target) == bridge.name:
        return
    config = scene.connector(target)
    if config.get("type") == "bridge" and not config.get("isGateway") and not config.get("isDefaultGateway"):
        yield NO_GATEWAY.found(
            f"bridge {bridge.name} of container {target.name} has no address in the container's network, and the "
            f"network {target.line.network} asks for none: nothing that is published there can answer",
            [f"isGateway is not set in the configuration of network {target.line.network}, as podman network create "
             "--internal makes it", f"ip address show {bridge.name}: no address of the container's network"],
            "if the network is meant to be apart, leave it so: remove portmap from its configuration, and give the "
            "container a second network, which publishes the port; if not, set isGateway in its configuration, and "
            "start the container again")


def _no_route(scene: Scene, target: Target) -> Iterator[Finding]:
    if target.container_ip and not scene.route(target):
        bridge = _bridge_of(scene, target)
        yield NO_ROUTE.found(
            f"this host has no route to container {target.name} ({target.container_ip})" +
            (f": {bridge.name} has no address in the container's network" if bridge else ""),
            [f"ip route get {target.container_ip}: no route"] + ([f"ip address show {bridge.name}"] if bridge else []),
            _gateway_advice(scene, target, bridge.name) if bridge else "look at what connects the container, the first "
            f"plugin of network {target.line.network}: it leaves the way there to another machine, or to you")


def _gateway_advice(scene: Scene, target: Target, name: str) -> str:
    """How the bridge gets its address: that which the container, or else its runtime, knows as gateway."""
    host = scene.inside(target).host
    gate = host.route(target.family, EXAMPLE[target.family]).gateway if host else ""
    gate = gate or _gateway_in_result(scene, target)
    if not gate:
        return f"start container {target.name} again: its network's plugin gives {name} the address that it should have"
    addresses = host.addresses if host else []
    length = next((each.length for each in addresses if each.ip == packed(target.container_ip)), 24)
    return f"ip address add {gate}/{length} dev {name}, the address that the container has as its gateway"


def _gateway_in_result(scene: Scene, target: Target) -> str:
    """The gateway that libcni remembers beside the container's address, "" for none."""
    try:
        found = next((entry.get("gateway") for entry in scene.remembered(target)["result"]["ips"]
                      if packed(entry["address"].partition("/")[0]) == packed(target.container_ip)), "")
        return shown(packed(found)) if found else ""
    except (AttributeError, LookupError, TypeError, ValueError):
        return ""


EXAMPLE = {4: packed("192.0.2.1"), 6: packed("2001:db8:ffff::1")}


def _is_local(scene: Scene, target: Target) -> Iterator[Finding]:
    if target.container_ip and scene.host.type_of(target.family, packed(target.container_ip)) == RTN_LOCAL:
        link = next((each.link for each in scene.host.addresses if each.ip == packed(target.container_ip)), "")
        yield IS_LOCAL.found(
            f"{target.container_ip}, the address of container {target.name}, is one of this host's own",
            [f"ip address show to {target.container_ip}: dev {link}"], f"ip address delete {target.container_ip}/"
            f"{next(each.length for each in scene.host.addresses if each.ip == packed(target.container_ip))} dev "
            f"{link}")


def _route_elsewhere(scene: Scene, target: Target) -> Iterator[Finding]:
    way, near = scene.route(target), scene.host_end(target)
    if not way or not near or scene.host.type_of(target.family, packed(target.container_ip)) == RTN_LOCAL:
        return
    if way not in (near.name, near.master) and not (not near.master and scene.host.links[way].kind == "bridge"):
        yield ELSEWHERE.found(
            f"this host sends packets for container {target.name} ({target.container_ip}) by {way}, and the container "
            f"is behind {near.master or near.name}", [f"ip route get {target.container_ip}: dev {way}"],
            f"{_route_advice(scene, target, near)}; two networks with one subnet, or a VPN, take it there")


def _route_advice(scene: Scene, target: Target, near: Link) -> str:
    behind = near.master or near.name
    host = scene.inside(target).host
    gate = host.route(target.family, EXAMPLE[target.family]).gateway if host else ""
    if near.master and gate and (gate, behind) not in {(shown(each.ip), each.link) for each in scene.host.addresses}:
        return _gateway_advice(scene, target, behind)
    bits = 32 if target.family == 4 else 128
    return f"ip -{target.family} route replace {target.container_ip}/{bits} dev {behind}"


def _address_twice(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    link = host.link(target.line.ifname) if host else None
    if not link or not target.container_ip:
        return
    for near in scene.host.neighbours(packed(target.container_ip)):
        if near.link == scene.route(target) and near.mac and near.mac != link.mac and not near.state & NUD_FAILED:
            yield TWICE.found(
                f"{target.container_ip} is answered by {near.mac}, which is not container {target.name} ({link.mac}): "
                "another machine or container has the same address",
                [f"ip neighbour show {target.container_ip}: {near.mac} on {near.link}"],
                f"find who has {near.mac} (bridge fdb show | grep {near.mac}) and give it another address; then: ip "
                f"neighbour flush to {target.container_ip} dev {near.link}")


def _no_arp_answer(scene: Scene, target: Target) -> Iterator[Finding]:
    if not target.container_ip:
        return
    for near in scene.host.neighbours(packed(target.container_ip)):
        if near.link == scene.route(target) and near.state & NUD_FAILED:
            yield NO_ANSWER.found(
                f"container {target.name} ({target.container_ip}) has not answered when this host asked for its "
                "hardware address", [f"ip neighbour show {target.container_ip}: FAILED"],
                f"ip neighbour flush to {target.container_ip} dev {near.link}, and try again: it may be an old entry; "
                "else look at VLANs, isolation and ebtables on the bridge")


def _forwarding_off(scene: Scene, target: Target) -> Iterator[Finding]:
    if not target.container_ip or (target.is_localhost):
        return
    if target.family == 6:
        names = ["net.ipv6.conf.all.forwarding"]
    elif scene.sysctl("net/ipv4/ip_forward") == "0":
        names = ["net.ipv4.ip_forward"]
    else:
        sides = dict.fromkeys([*(name for name, _ in scene.ways_in(target)), scene.route(target)])
        names = [f"net.ipv4.conf.{name}.forwarding" for name in sides if name]
    off = [name for name in names if scene.sysctl(_path(name)) == "0"]
    if off and (scene.ways_in(target) or scene.client is None):
        yield FORWARDING.found(
            f"this host does not forward IPv{target.family}: packets from other machines for {scene.subject(target)} "
            "are dropped",
            [f"sysctl {name}: 0" for name in off],
            " && ".join(f"sysctl -w {name}=1" for name in off) + "; for good in a file of /etc/sysctl.d", (OUTSIDE,))


def _path(name: str) -> str:
    """The path of a sysctl, whose interface may have dots in its name."""
    head, conf, rest = name.partition(".conf.")
    if not conf:
        return name.replace(".", "/")
    interface, _, key = rest.rpartition(".")
    return f"{head.replace('.', '/')}/conf/{interface}/{key}"


def _ra_ignored(scene: Scene, target: Target) -> Iterator[Finding]:
    if scene.sysctl("net/ipv6/conf/all/forwarding") != "1" or scene.host.route(6, EXAMPLE[6]).link:
        return
    for name in dict.fromkeys(each.link for each in scene.host.addresses
                              if each.family == 6 and each.is_dynamic and not each.is_link_local):
        if scene.sysctl(f"net/ipv6/conf/{name}/accept_ra") == "1":
            yield RA.found(
                "this host has no default route for IPv6: it forwards, and so does not heed the router's "
                f"announcements on {name}",
                [f"sysctl net.ipv6.conf.{name}.accept_ra: 1; net.ipv6.conf.all.forwarding: 1",
                 "ip -6 route show default: nothing"],
                f"sysctl -w net.ipv6.conf.{name}.accept_ra=2", (OUTSIDE,))


def _rp_filter(scene: Scene, target: Target) -> Iterator[Finding]:
    if scene.client is None or target.family != 4 or len(scene.client) != 4:
        return
    for name, _ in scene.ways_in(target):
        values = {which: int(scene.sysctl(f"net/ipv4/conf/{which}/rp_filter") or 0) for which in (name, "all")}
        way = scene.host.route(4, scene.client).link
        if max(values.values()) == 1 and way != name:
            yield RP_FILTER.found(
                f"this host drops packets from {shown(scene.client)} on {name}: its own route there leads "
                f"{f'by {way}' if way else 'nowhere'}",
                [f"sysctl net.ipv4.conf.{name}.rp_filter: {values[name]}, net.ipv4.conf.all.rp_filter: "
                 f"{values['all']} (the greater counts; 1 is strict)",
                 f"ip route get {shown(scene.client)}: {f'dev {way}' if way else 'no route'}"],
                f"sysctl -w net.ipv4.conf.{name}.rp_filter=2; or a route to the client by {name}, or policy routing",
                (OUTSIDE,))


def _link_local(scene: Scene, target: Target) -> Iterator[Finding]:
    client = scene.client
    if client is not None and len(client) == 16 and client[0] == 0xfe and client[1] & 0xc0 == 0x80 and \
            target.family == 6 and not target.is_localhost:
        yield LINK_LOCAL.found(
            f"{shown(client)} is link-local: the container cannot answer it, and the kernel forwards nothing "
            "from there",
            ["RFC 4291, 2.5.6: routers must not forward packets with link-local addresses: ip -6 address show scope "
             "link"],
            "let the client use an address of global or unique local scope (ip -6 address), or IPv4", (OUTSIDE,))


def _mtu(scene: Scene, target: Target) -> Iterator[Finding]:
    host = scene.inside(target).host
    link = host.link(target.line.ifname) if host else None
    if scene.port is None or not link:
        return
    less = [scene.host.links[name] for name, _ in scene.ways_in(target) if scene.host.links[name].mtu < link.mtu]
    if less:
        yield MTU.found(
            f"container {target.name} sends packets of {link.mtu} bytes, and {less[0].name} takes {less[0].mtu}",
            [f"ip link show {less[0].name}: mtu {less[0].mtu}; nsenter --net={target.line.netns} ip link show "
             f"{link.name}: mtu {link.mtu}"],
            f"if large answers hang, and small ones do not: nsenter --net={target.line.netns} ip link set {link.name} "
            f"mtu {less[0].mtu}; for good the mtu of its network")


VETH_DOWN = Check("host-veth-down", ERROR, "This host's end of the container's link is down.", "Set it up.", _veth_down)
BRIDGE_DOWN = Check("bridge-down", ERROR, "The container's bridge is down.", "Set it up.", _bridge_down)
PORT_BLOCKED = Check("bridge-port-blocked", ERROR, "Spanning tree blocks the container's port of the bridge.",
                     "Wait for 30 seconds, or switch it off.", _port_blocked, (*LINKS, "interface-down"))
NOT_ON_BRIDGE = Check("not-on-bridge", ERROR, "NetworkManager or another program took the container's link from its "
                      "bridge.", "Put it back.", _not_on_bridge)
NO_GATEWAY = Check("network-without-gateway", ERROR, "The network gives its bridge no address, as `podman network "
                   "create --internal` makes it.", "Publish in another network.", _no_gateway, (*LINKS, *GONE))
NO_ROUTE = Check("no-route-to-container", ERROR, "The bridge has lost its address.", "Give it back.", _no_route,
                 (*LINKS, *GONE, "network-without-gateway"))
IS_LOCAL = Check("container-address-is-local", ERROR, "This host has the container's address itself.",
                 "Remove it here.", _is_local)
ELSEWHERE = Check("route-elsewhere", ERROR, "Two bridges have one subnet, the bridge has lost its address, or a VPN "
                  "takes the subnet.", "A route to the container.", _route_elsewhere,
                  (*LINKS, *GONE, "network-without-gateway"))
TWICE = Check("address-twice", ERROR, "Two machines have the container's address.", "Find the other one.",
              _address_twice, ("container-address-changed", "interface-gone"))
NO_ANSWER = Check("no-arp-answer", WARNING, "The container did not answer ARP, or neighbour discovery.",
                  "Try again, then look at the bridge.", _no_arp_answer,
                  (*LINKS, *GONE, "bridge-port-blocked", "route-elsewhere", "address-twice"))
FORWARDING = Check("forwarding-off", ERROR, "IP forwarding is off, after a reload of sysctls or a restart of the "
                   "network.", "`sysctl -w net.ipv4.ip_forward=1`", _forwarding_off)
RA = Check("ra-ignored", WARNING, "This host forwards IPv6, and so does not accept its own default route.",
           "`sysctl -w net.ipv6.conf.DEV.accept_ra=2`", _ra_ignored)
RP_FILTER = Check("rp-filter", ERROR, "The client comes in on another interface than this host would answer by "
                  "(`--from`).", "`rp_filter=2`, or a route.", _rp_filter)
LINK_LOCAL = Check("client-link-local", ERROR, "The client has a link-local address (`--from`).",
                   "Use another of its addresses.", _link_local)
MTU = Check("mtu", INFO, "The container's MTU is larger than that of an interface that clients come in on.",
            "The same MTU.", _mtu)

OF_HOST = (RA,)
OF_TARGET = (VETH_DOWN, BRIDGE_DOWN, PORT_BLOCKED, NOT_ON_BRIDGE, IS_LOCAL, NO_GATEWAY, NO_ROUTE, ELSEWHERE, TWICE,
             NO_ANSWER, FORWARDING, LINK_LOCAL, RP_FILTER, MTU)
