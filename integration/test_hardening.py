"""Packets that must not arrive, and settings that must not change: each proven by a case where it would."""
import contextlib
import json
import pathlib
import socket

import lab
from lab import paths
from lab.libcni_cache import Cache
from lab.site import Site
import pytest
from lab.paths import EVERY, LOCAL, OWN, WEB

NEIGHBOUR, MACHINE = "hostile neighbour", "client"
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


def is_right(site, datagram, comes):
    """Whether a datagram made by hand reaches the server of its port, if it should, and else nobody."""
    return bool(site.arrival(*datagram, comes)) == comes


@pytest.mark.parametrize("forged", FORGED, ids=lambda forged: f"{forged[0]} {forged[1]} to {forged[2]} {forged[3]}")
def test_forged_packets_do_not_pass(site, forged):
    """No other machine or container reaches the host's localhost, or poses as it; the guard counts what it drops."""
    *datagram, when = forged
    before = guard_drops()
    assert is_right(site, datagram, when == ALWAYS)
    # It guards the containers' interfaces. IPv6 itself refuses ::1 on a wire before it, but not before br_netfilter.
    seen = forged[0] == NEIGHBOUR and (":" not in forged[1] or site.setting.br_netfilter)
    dropped = before + (when != ALWAYS and seen)
    assert lab.until(lambda: guard_drops() >= dropped) and guard_drops() == dropped


def test_a_vanished_guard_is_noticed_and_repaired(site):
    """Without the guard CHECK fails and forged datagrams arrive; the next ADD of any container ends that."""
    for how in "delete", "flush":
        for chain in "guard", "guard_input":
            lab.nft(how, "chain", "inet", "cni_portmap", chain)
        with pytest.raises(lab.CniFailed, match="guard"):
            site.container.check()
        for *datagram, when in FORGED:
            assert is_right(site, datagram, when in (UNGUARDED, ALWAYS)), datagram
        with site.publish("next", [{"hostPort": 7100, "containerPort": WEB}]):
            site.container.check()
            for *datagram, when in FORGED:
                assert is_right(site, datagram, when == ALWAYS), datagram


def test_source_routes_lead_nobody_to_localhost(site):
    """Nor does a packet that asks the host to send it on to 127.0.0.1, where the host does that."""
    source, host, localhost = (site.ip(name, 4) for name in (NEIGHBOUR, "bridge address", "localhost"))
    server = site.servers[OWN, 4, "udp"]
    for which in "all", "cni0":
        lab.sysctl(f"net.ipv4.conf.{which}.accept_source_route", 1)
    for guarded in True, False:
        if not guarded:
            lab.nft("flush", "chain", "inet", "cni_portmap", "guard_input")
        data = lab.question()
        lab.inject(site.places[NEIGHBOUR], "cni0", lab.source_routed(source, host, localhost, OWN, data))
        if not guarded:
            assert lab.until(lambda: server.saw(data))  # noqa: B023
        assert lab.exchange(lab.HOST, localhost, OWN, "udp") and bool(server.saw(data)) != guarded
    lab.sysctl("net.ipv4.conf.all.accept_source_route", 0)
    lab.run(site.bin_dir.parent / "sbin/cni-portmap", "restore", "--base-only")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_administrators_own_way_to_localhost(site, protocol):
    """Rules of others may lead containers to a service on localhost, as proxies of a cloud's metadata do."""
    with lab.Server("proxy", lab.HOST, 8181, protocol, "127.0.0.1"):
        lab.nft_script("table ip proxy { chain prerouting { type nat hook prerouting priority -110;",
                       f"iifname cni0 ip daddr 169.254.169.254 {protocol} dport 80 dnat to 127.0.0.1:8181; }}; }}")
        try:
            assert lab.exchange(site.places[NEIGHBOUR], "169.254.169.254", 80, protocol).server == "proxy"
        finally:
            lab.nft_script("delete table ip proxy")


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


@pytest.mark.parametrize("setting", ["net.bridge.bridge-nf-call-ip6tables", "net.ipv6.conf.cni9.seg6_enabled",
                                     "net.ipv6.conf.cni9.rpl_seg_enabled"])
def test_ipv6_localhost_that_cannot_be_opened_is_said(site, setting):
    """With br_netfilter it cannot work, with source routes not be guarded: ADD says so in one line, and succeeds."""
    network = lab.Network(lab.bridge_conflist("fresh", "cni9", ("fd99::/64",)), site.bin_dir)
    container = lab.Container(network, "fresh")  # makes the bridge
    settings = {*(setting.replace("cni9", which) for which in ("cni9", "all"))}
    try:
        before = lab.localhost_routes()
        if not all(pathlib.Path("/proc/sys", each.replace(".", "/")).exists() for each in settings):
            pytest.skip(f"no {setting} in this kernel: modprobe br_netfilter; CONFIG_IPV6_SEG6_LWTUNNEL, _RPL_LWTUNNEL")
        lab.br_netfilter(False)
        for each in settings:
            lab.sysctl(each, 1)
        config = network.config([{"hostPort": 7100, "containerPort": WEB}], container.result)
        done = lab.call_process(site.bin_dir / "portmap", "ADD", config, container.id, container.namespace.path)
        assert done.returncode == 0 and json.loads(done.stdout)["ips"]
        assert done.stderr.count("\n") == 1 and setting.rpartition(".")[2] in done.stderr
        assert lab.localhost_routes() == before
    finally:
        for each in settings:
            with contextlib.suppress(OSError):
                lab.sysctl(each, 0)
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


@pytest.mark.parametrize("ip", ["127.0.0.53", "127.0.0.54"])
def test_the_hosts_resolver_keeps_its_port(site, ip):
    """A port published on all addresses leaves systemd-resolved's to it (k3s#1640), unless a hostIP asks for them."""
    with lab.Server("resolver", lab.HOST, 7200, "udp", ip):
        with site.publish("dns", [{"hostPort": 7200, "containerPort": WEB, "protocol": "udp"}], "udp"):
            assert lab.exchange(lab.HOST, ip, 7200, "udp").server == "resolver"
            for other in "127.0.0.1", "127.0.0.52", site.ip("LAN address", 4):
                assert lab.exchange(lab.HOST, other, 7200, "udp").server == "dns"
        port = {"hostPort": 7200, "containerPort": WEB, "protocol": "udp", "hostIP": ip}
        with site.publish("dns", [port], "udp"):
            assert lab.exchange(lab.HOST, ip, 7200, "udp").server == "dns"


def test_ipv6_localhost_that_cannot_work_is_the_hosts(site):
    """With br_netfilter the host's own service on [::1] keeps a port that is published on all addresses."""
    with lab.Server("own", lab.HOST, 7200, "tcp", "::1"), \
            site.publish("web", [{"hostPort": 7200, "containerPort": WEB}]):
        server = "own" if site.setting.br_netfilter else "web"
        assert lab.exchange(lab.HOST, "::1", 7200).server == server
        assert lab.exchange(lab.HOST, "127.0.0.1", 7200).server == "web"


# what somebody does, and what CHECK says then
CLOSED = [
    (["sysctl", "-w", "net.ipv4.conf.cni9.route_localnet=0"], "127.0.0.0/8 does not lead through cni9"),
    (["nft", "flush", "set", "inet", "cni_portmap", "localhost_interfaces"], "is not guarded"),
    (["ip", "-6", "route", "flush", "table", "local", "::1", "dev", "cni9"], "::1 does not lead through cni9"),
    (["ip", "link", "set", "cni9", "down"], "::1 does not lead through cni9"),
]


@pytest.mark.parametrize("command, says", CLOSED, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_localhost_that_somebody_closed(site, command, says, tmp_path):
    """CHECK says so; restore, and the next ADD, open it again."""
    if site.setting.br_netfilter:
        pytest.skip("[::1] is closed with br_netfilter: tried without it")
    network = lab.Network(lab.bridge_conflist("fresh", "cni9", ("10.99.0.0/16", "fd99::/64")), site.bin_dir)
    container = lab.Container(network, "fresh", [{"hostPort": 7100, "containerPort": WEB, "protocol": "tcp"}])
    cache = Cache(tmp_path)
    cache.remember(container)
    with contextlib.ExitStack() as stack:
        stack.callback(lab.delete_link, "cni9")
        stack.callback(container.remove)
        stack.enter_context(lab.Server("fresh", container, WEB))

        def answers():
            return [lab.exchange(lab.HOST, ip, 7100) for ip in ("127.0.0.1", "::1")]
        before = answers()
        assert all(before)
        for mend in "restore", "ADD":
            lab.nft(*command[1:]) if command[0] == "nft" else lab.run(*command)
            if "down" in command:
                lab.bring_up("cni9", "fd99::1/64")
            with pytest.raises(lab.CniFailed, match=says):
                container.check()
            if mend == "restore":
                lab.run(site.bin_dir.parent / "sbin/cni-portmap", "restore", "--cache", tmp_path)
            else:
                lab.call_plugin(site.bin_dir / "portmap", "ADD", network.config(container.ports, container.result),
                                container.id, container.namespace.path)
            container.check()
            assert answers() == before


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
        destination, data = site.ip("client", 6 if ":" in source else 4), lab.question()
        lab.inject(site.places[NEIGHBOUR], "cni0", lab.packet(source, destination, 7300, data=data))
        if source == site.ip("LAN address", 4):  # a host accepts its own from no link
            assert lab.exchange(lab.HOST, destination, 7300, "udp") and not server.saw(data)
        else:
            assert lab.until(lambda: server.saw(data)) and server.saw(data).peer == source


@pytest.mark.parametrize("family", [4, 6])
def test_a_mark_of_somebody_else_has_no_effect(site, family):
    """Connections that were not translated are not masqueraded, even if something gave them our mark."""
    second = site.ip("second address", family)
    with lab.Server("client", site.client, 7400, "udp") as server, \
            socket.socket(lab.family_of(second), socket.SOCK_DGRAM) as marked:
        marked.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1 << 13)
        marked.settimeout(lab.PATIENT)
        marked.bind((second, 0))
        marked.sendto(b"who am I?", (site.ip("client", family), 7400))
        marked.recv(2048)
    assert [saw.peer for saw in server.arrivals] == [second]


# --- which interface is opened --------------------------------------------------------------------------------

def opened():
    """The interfaces whose route_localnet is 1, and those with a route for ::1, but loopback."""
    ipv4 = {path.parent.name for path in pathlib.Path("/proc/sys/net/ipv4/conf").glob("*/route_localnet")
            if path.read_text() == "1\n"}
    return ipv4, {device for device, _ in lab.localhost_routes()} - {"lo"}


def uplink():
    """A router, to which the default routes lead."""
    lan = lab.wire("lan", ("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
    for gateway in "192.0.2.2", "2001:db8::2":
        lab.add_route("default", gateway)
    return lan


@pytest.mark.parametrize("link", ["", "to-web"])
def test_the_uplink_is_not_opened(host, link):
    """A container whose route has gone (it exits) has the default route: nothing is opened for it."""
    uplink()
    if link:
        lab.add_veth(link, "web0")
    web = lab.Pod("web", "8080:80", ips=("10.66.0.2/32", "fd66::2/128"), link=link)
    for _ in range(2):
        reply = host.call("ADD", web)
        assert not reply.code and reply.stderr and opened() == (set(), set())
    with lab.Server("own", lab.HOST, 8080):
        for ip in "127.0.0.1", "::1":
            assert lab.exchange(lab.HOST, ip, 8080).server == "own"  # left to it


def test_the_parent_of_a_macvlan_is_not_opened(host):
    """What this host sends out there never comes to the container."""
    uplink()
    web = lab.Namespace("web")
    lab.run("ip", "link", "add", "eth0", "link", "to-lan", "netns", "web", "type", "macvlan", "mode", "bridge")
    with web:
        lab.bring_up("eth0", "192.0.2.50/24", "2001:db8::50/64")
    reply = host.call("ADD", lab.Pod("web", "8080:80", ips=("192.0.2.50/24", "2001:db8::50/64")))
    assert not reply.code and "to-lan" in reply.stderr and opened() == (set(), set())


@pytest.mark.parametrize("open_for_all", [False, True])
def test_read_only_sysctls(host, open_for_all):
    """They cost localhost, with a warning, and not the container; nothing where all.route_localnet=1 allows it."""
    client = lab.wire("client", ("192.0.2.1/24",), ("192.0.2.2/24",))
    container = lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
    lab.sysctl("net.ipv4.conf.all.route_localnet", int(open_for_all))
    read_only = lab.in_own_mounts("mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys")
    web = lab.Pod("web", "8080:80", link="to-web")
    reply = host.call("ADD", web, *read_only)
    assert not reply.code and ("cannot publish on 127.0.0.1" in reply.stderr) == (not open_for_all)
    assert not host.call("CHECK", web, *read_only).code
    with lab.Server("web", container, 80), lab.Server("own", lab.HOST, 8080, ip="127.0.0.1"):
        assert lab.exchange(client, "192.0.2.1", 8080) == lab.Saw("web", "192.0.2.2", 80)
        assert lab.exchange(lab.HOST, "127.0.0.1", 8080).server == ("web" if open_for_all else "own")
    assert opened() == ({"all"} if open_for_all else set(), set())
