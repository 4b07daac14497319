"""Packets that must not arrive, and settings that must not change: each proven by a case where it would."""
import json
import pathlib
import socket

import lab
from lab import paths
from lab.site import Site
import pytest
from lab.paths import EVERY, LOCAL, OWN, WEB

NEIGHBOUR, MACHINE = "hostile neighbour", "client"
DEVICES = {NEIGHBOUR: "cni0", MACHINE: "to-lan-client"}  # the host's end of their wires
# When a datagram arrives. What never does, Linux refuses by itself, since nothing translates what a wire sends to
# localhost, and nothing masquerades what comes from there.
UNGUARDED, NEVER, ALWAYS = "without the guard", "never", "always"

# Datagrams made by hand: who sends, with which source and destination, to which port; when it arrives.
FORGED = [
    (MACHINE, "192.0.2.2", "192.0.2.1", EVERY, ALWAYS),
    (MACHINE, "192.0.2.2", "127.0.0.1", EVERY, NEVER),
    (MACHINE, "192.0.2.2", "127.0.0.1", LOCAL, NEVER),
    (MACHINE, "192.0.2.2", "127.0.0.1", OWN, NEVER),
    (MACHINE, "127.7.7.7", "192.0.2.1", EVERY, NEVER),
    (MACHINE, "127.0.0.1", "127.0.0.1", LOCAL, NEVER),
    (NEIGHBOUR, "10.88.0.4", "127.0.0.1", EVERY, NEVER),
    (NEIGHBOUR, "10.88.0.4", "127.0.0.1", LOCAL, NEVER),
    (NEIGHBOUR, "10.88.0.4", "127.0.0.1", OWN, UNGUARDED),
    (NEIGHBOUR, "127.7.7.7", "192.0.2.1", EVERY, NEVER),
    (NEIGHBOUR, "127.7.7.7", "127.0.0.1", OWN, UNGUARDED),
    (NEIGHBOUR, "127.0.0.1", "127.0.0.1", OWN, NEVER),
    (MACHINE, "2001:db8::2", "2001:db8::1", EVERY, ALWAYS),
    (MACHINE, "2001:db8::2", "::1", EVERY, NEVER),
    (MACHINE, "2001:db8::2", "::1", LOCAL, NEVER),
    (MACHINE, "2001:db8::2", "::1", OWN, NEVER),
    (MACHINE, "::1", "2001:db8::1", EVERY, NEVER),
    (MACHINE, "::1", "::1", LOCAL, NEVER),
    (NEIGHBOUR, "fd88::4", "::1", EVERY, NEVER),
    (NEIGHBOUR, "fd88::4", "::1", LOCAL, NEVER),
    (NEIGHBOUR, "fd88::4", "::1", OWN, NEVER),
    (NEIGHBOUR, "::1", "2001:db8::1", EVERY, NEVER),
    (NEIGHBOUR, "::1", "::1", LOCAL, NEVER),
]


@pytest.fixture(scope="module", params=paths.SETTINGS[:2], ids=lambda setting: setting.name)
def site(each_bin_dir, request):
    if not lab.br_netfilter(request.param.br_netfilter):
        pytest.skip("no br_netfilter in this kernel: modprobe br_netfilter")
    with Site(request.param, each_bin_dir) as built:
        yield built


def guard_drops():
    rules = json.loads(lab.nft("-j", "list", "chain", "inet", "cni_portmap", "guard"))["nftables"]
    counters = (part["counter"]["packets"] for rule in rules if "rule" in rule for part in rule["rule"]["expr"]
                if "counter" in part)
    return sum(counters)


def arrives(site, who, source, destination, port):
    """Whether a datagram made by hand reaches the server of its port; one that follows it tells when to look."""
    family, own = 6 if ":" in destination else 4, OWN if port == OWN else EVERY
    server = site.servers[own, family, "udp"]
    before = len(server.arrivals)
    lab.inject(site.places[who], DEVICES[who], lab.packet(source, destination, port))
    assert lab.exchange(lab.HOST, site.ip("localhost" if own == OWN else "LAN address", family), own, "udp")
    return len(server.arrivals) - before == 2


@pytest.mark.parametrize("forged", FORGED, ids=lambda forged: f"{forged[0]} {forged[1]} to {forged[2]} {forged[3]}")
def test_forged_packets_do_not_pass(site, forged):
    """No other machine or container reaches the host's localhost, or poses as it; the guard counts what it drops."""
    *datagram, when = forged
    before = guard_drops()
    assert arrives(site, *datagram) == (when == ALWAYS)
    # It guards the containers' interfaces. IPv6 itself refuses ::1 on a wire before it, but not before br_netfilter.
    seen = forged[0] == NEIGHBOUR and (":" not in forged[1] or site.setting.br_netfilter)
    assert guard_drops() - before == (when != ALWAYS and seen)


def test_a_vanished_guard_is_noticed_and_repaired(site):
    """Without the guard CHECK fails and forged datagrams arrive; the next ADD of any container ends that."""
    for how in "delete", "flush":
        for chain in "guard", "guard_input":
            lab.nft(how, "chain", "inet", "cni_portmap", chain)
        with pytest.raises(lab.CniFailed, match="guard"):
            site.container.check()
        for *datagram, when in FORGED:
            assert arrives(site, *datagram) == (when in (UNGUARDED, ALWAYS)), datagram
        with site.publish("next", [{"hostPort": 7100, "containerPort": WEB}]):
            site.container.check()
            for *datagram, when in FORGED:
                assert arrives(site, *datagram) == (when == ALWAYS), datagram


# how a container is published: whether the bridge's route_localnet is needed, and whether the route for ::1
OPENED = [
    ({}, "", True, True),
    ({"snat": False}, "", False, False),
    ({"localhostIPv6": False}, "", True, False),
    ({}, "127.0.0.1", True, False),
    ({}, "::1", False, True),
    ({}, "192.0.2.1", False, False),
    ({}, "2001:db8::1", False, False),
]


@pytest.mark.parametrize("config, host_ip, ipv4, ipv6", OPENED)
def test_localhost_is_opened_on_one_interface_and_where_needed(site, config, host_ip, ipv4, ipv6):
    """route_localnet and the route for ::1 are on the container's bridge alone, and where localhost is published."""
    ipv6 = ipv6 and not site.setting.br_netfilter
    before = {path: path.read_text() for path in pathlib.Path("/proc/sys/net/ipv4/conf").glob("*/route_localnet")}
    routes = lab.localhost_routes()
    network = lab.Network(lab.bridge_conflist("fresh", "cni9", ("10.99.0.0/16", "fd99::/64"), **config), site.bin_dir)
    container = lab.Container(network, "fresh", [{"hostPort": 7100, "containerPort": WEB, "hostIP": host_ip}])
    try:
        own = pathlib.Path("/proc/sys/net/ipv4/conf/cni9/route_localnet")
        assert own.read_text().strip() == str(int(ipv4))
        assert {path: path.read_text() for path in before} == before
        assert lab.localhost_routes() == routes + ([("cni9", 4096)] if ipv6 else [])
        lab.call_plugin(site.bin_dir / "portmap", "ADD", network.config(container.ports, container.result),
                        container.id, container.namespace.path)
        assert len(lab.localhost_routes()) == len(routes) + ipv6
    finally:
        container.remove()
        lab.delete_link("cni9")
    assert lab.localhost_routes() == routes


def test_ipv6_localhost_that_cannot_work_is_said(site):
    """With br_netfilter on a bridge, ADD adds no route for ::1, says why in one line, and succeeds."""
    if not lab.br_netfilter(True):
        pytest.skip("no br_netfilter in this kernel: modprobe br_netfilter")
    network = lab.Network(lab.bridge_conflist("fresh", "cni9", ("fd99::/64",)), site.bin_dir)
    container = lab.Container(network, "fresh")
    try:
        before = lab.localhost_routes()
        config = network.config([{"hostPort": 7100, "containerPort": WEB}], container.result)
        done = lab.call_process(site.bin_dir / "portmap", "ADD", config, container.id, container.namespace.path)
        assert done.returncode == 0 and json.loads(done.stdout)["ips"]
        assert done.stderr.count("\n") == 1 and "bridge-nf-call-ip6tables" in done.stderr
        assert lab.localhost_routes() == before
    finally:
        lab.br_netfilter(site.setting.br_netfilter)
        container.remove()
        lab.delete_link("cni9")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("ports, protocol", [
    ([{"hostPort": 7201, "containerPort": WEB}], "tcp"),
    ([{"hostPort": 7200, "containerPort": WEB}], "udp"),
    ([{"hostPort": 7200, "containerPort": WEB, "protocol": "udp"}], "tcp"),
    ([{"hostPort": 7200, "containerPort": WEB, "hostIP": ip} for ip in paths.ADDRESSES["second address"]], "tcp"),
    ([{"hostPort": 7200, "containerPort": WEB, "hostIP": ip} for ip in paths.ADDRESSES["localhost"]], "tcp"),
], ids=["another port", "udp beside tcp", "tcp beside udp", "another address", "localhost"])
def test_host_services_keep_what_is_not_published(site, ports, protocol, family):
    """A server of the host keeps its port where another port, protocol or address is published."""
    node = site.ip("LAN address", family)
    with site.publish("published", ports), lab.Server("own", lab.HOST, 7200, protocol, node):
        for name in "client", "neighbour", "stranger":
            assert lab.exchange(site.places[name], node, 7200, protocol) == lab.Saw("own", site.ip(name, family), 7200)
        assert lab.exchange(lab.HOST, node, 7200, protocol) == lab.Saw("own", node, 7200)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_transit_is_untouched(site, protocol, family):
    """Transit to the same port of another machine or container arrives there, its source kept."""
    transits = [("client", "neighbour"), ("container", "neighbour"), ("stranger", "neighbour"),
                ("neighbour", "client"), ("stranger", "client"), ("neighbour", "container")]
    for who, to in transits:
        with lab.Server(to, site.places[to], EVERY, protocol):
            saw = lab.exchange(site.places[who], site.ip(to, family), EVERY, protocol)
        assert saw == lab.Saw(to, site.ip(who, family), EVERY)
    with lab.Server("neighbour", site.places["neighbour"], EVERY, protocol):
        saw = lab.exchange(lab.HOST, site.ip("neighbour", family), EVERY, protocol)
    assert saw == lab.Saw("neighbour", site.ip("bridge address", family), EVERY)


@pytest.mark.parametrize("source", ["10.88.7.7", "192.0.2.1", "198.51.100.7", "fd88::77", "2001:db8::77"])
def test_a_forged_source_is_not_masqueraded_elsewhere(site, source):
    """A container's packets to anything but a published port keep their source, even a forged one."""
    with lab.Server("client", site.client, 7300, "udp") as server:
        destination = site.ip("client", 6 if ":" in source else 4)
        lab.inject(site.places[NEIGHBOUR], "cni0", lab.packet(source, destination, 7300))
        lab.exchange(lab.HOST, destination, 7300, "udp")
    peers = {saw.peer for saw in server.arrivals[:-1]}
    assert peers == ({source} if source != site.ip("LAN address", 4) else set())  # a host accepts its own from no link


@pytest.mark.parametrize("family", [4, 6])
def test_a_mark_of_somebody_else_has_no_effect(site, family):
    """Connections that were not translated are not masqueraded, even if something gave them our mark."""
    second = site.ip("second address", family)
    with lab.Server("client", site.client, 7400, "udp") as server, \
            socket.socket(lab.family_of(second), socket.SOCK_DGRAM) as marked:
        marked.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1 << 13)
        marked.settimeout(1)
        marked.bind((second, 0))
        marked.sendto(b"who am I?", (site.ip("client", family), 7400))
        marked.recv(2048)
    assert [saw.peer for saw in server.arrivals] == [second]
