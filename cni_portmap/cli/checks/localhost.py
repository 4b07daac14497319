"""What only this host's own localhost, or the container itself, needs."""
from collections.abc import Iterator

from ...linux.kernel import LOCALHOST_METRIC
from .container import GONE
from .finding import ERROR, INFO, ITSELF, LOCALHOST, WARNING, Check, Finding
from .rules import ROUTES
from .scene import Scene, Target


def _way(scene: Scene, target: Target) -> str:
    """The interface that localhost has to lead through, "" where the port is not published there."""
    wanted = target.is_wildcard or target.is_localhost
    if not wanted or not target.container_ip or scene.leaves_localhost_alone(target) or (
            scene.client is not None and not scene.is_own(scene.client)):
        return ""
    return scene.route(target)


def _localnet_off(scene: Scene, target: Target) -> Iterator[Finding]:
    way = _way(scene, target) if target.family == 4 else ""
    if way and all(scene.sysctl(f"net/ipv4/conf/{name}/route_localnet") == "0" for name in (way, "all")):
        yield LOCALNET.found(
            f"127.0.0.1:{target.port} does not answer on this host: packets from localhost are not routed to {way}",
            [f"sysctl net.ipv4.conf.{way}.route_localnet: 0; net.ipv4.conf.all.route_localnet: 0"],
            f"sysctl -w net.ipv4.conf.{way}.route_localnet=1 (cni-portmap guards 127.0.0.0/8 there), or cni-portmap "
            "restore", (LOCALHOST,), ERROR if target.is_localhost else WARNING)


def _localhost6_missing(scene: Scene, target: Target) -> Iterator[Finding]:
    way = _way(scene, target) if target.family == 6 else ""
    if way and not _is_bridged(scene, way, 6) and not scene.kernel.has_localhost6(way):
        yield LOCALHOST6.found(
            f"[::1]:{target.port} does not answer on this host: there is no local route for ::1 on {way}",
            [f"ip -6 route show table local ::1: nothing on {way}"],
            f"ip -6 route add local ::1 dev {way} table local proto static metric {LOCALHOST_METRIC}, or cni-portmap "
            "restore", (LOCALHOST,), ERROR if target.is_localhost else WARNING)


def _is_bridged(scene: Scene, way: str, family: int) -> bool:
    link = scene.host.link(way)
    name = "iptables" if family == 4 else "ip6tables"
    return bool(link and link.kind == "bridge" and scene.sysctl(f"net/bridge/bridge-nf-call-{name}") == "1")


def _br_netfilter(scene: Scene, target: Target) -> Iterator[Finding]:
    way = _way(scene, target) if target.family == 6 else ""
    if way and _is_bridged(scene, way, 6):
        yield BR_NETFILTER.found(
            f"[::1]:{target.port} cannot answer on this host while br_netfilter is on: it translates the reply before "
            "it is routed", ["sysctl net.bridge.bridge-nf-call-ip6tables: 1"],
            "connect to 127.0.0.1, or to another address of this host; or sysctl -w "
            "net.bridge.bridge-nf-call-ip6tables=0, where nothing (Kubernetes) needs it", (LOCALHOST,),
            ERROR if target.is_localhost else INFO)


def _no_hairpin(scene: Scene, target: Target) -> Iterator[Finding]:
    near = scene.host_end(target)
    if scene.port is not None and near and near.master and not near.hairpin and \
            _is_bridged(scene, near.master, target.family) and not target.is_localhost:
        yield HAIRPIN.found(
            f"container {target.name} does not reach {target.label}, its own published port, itself",
            [f"bridge -d link show dev {near.name}: hairpin off; br_netfilter is on"],
            f"bridge link set dev {near.name} hairpin on; for good hairpinMode: true in the bridge plugin's "
            "configuration",
            (ITSELF,))


BROKEN = (*GONE, *ROUTES, "bridge-port-blocked", "nobody-listens", "listens-on-localhost", "published-on-localhost")
LOCALNET = Check("route-localnet-off", WARNING, "`sysctl --system` or a new bridge: 127.0.0.1 does not lead to the "
                 "container. An error where the port is published on localhost only.",
                 "`sysctl -w net.ipv4.conf.DEV.route_localnet=1`", _localnet_off, BROKEN)
LOCALHOST6 = Check("localhost6-route-missing", WARNING, "The local route for ::1 on the container's interface is gone. "
                   "An error where the port is published on ::1 only.", "`cni-portmap restore`", _localhost6_missing,
                   BROKEN)
BR_NETFILTER = Check("localhost6-br-netfilter", INFO, "::1 cannot lead over a bridge with br_netfilter. An error where "
                     "the port is published on ::1 only.", "Use 127.0.0.1.", _br_netfilter, BROKEN)
HAIRPIN = Check("no-hairpin", INFO, "br_netfilter is on, and the container's port of the bridge sends nothing back "
                "where it came from.", "`bridge link set dev DEV hairpin on`", _no_hairpin, BROKEN)

OF_TARGET = (LOCALNET, LOCALHOST6, BR_NETFILTER, HAIRPIN)
