"""Connections that outlive what they led to: after ADD and DEL conntrack forgets those, and no others."""
import contextlib
import re

import lab
from lab import paths
from lab.libcni_cache import Cache
from lab.site import Site
import pytest
from lab.paths import WEB

from cni_portmap.linux import conntrack, kernel  # as other kernels would have it, see test_older_kernels
from cni_portmap.verbs.delete import delete

PORT = 7500
UDP = [{"hostPort": PORT, "containerPort": WEB, "protocol": "udp"}]
TCP = [{"hostPort": PORT, "containerPort": WEB}]


@pytest.fixture(scope="module")
def site(bin_dir):
    with Site(paths.SETTINGS[0], bin_dir) as built:
        yield built


@pytest.fixture(autouse=True)
def no_flows():
    lab.run("conntrack", "-F")


# who talks to which address
FROM = [("client", "LAN address"), ("client", "second address"), ("stranger", "LAN address"),
        ("host", "LAN address"), ("host", "localhost"),
        ("neighbour", "LAN address"), ("neighbour", "bridge address")]
each_way = pytest.mark.parametrize("who, to, family", [(*way, family) for way in FROM for family in (4, 6)
                                                       if paths.ADDRESSES.get(way[1], "46")[family == 6]])


def udp(site, who, to, family, port=PORT):
    return lab.Client(site.places[who], site.ip(to, family), port, "udp")


@each_way
def test_udp_that_never_stops_moves_to_the_next_container(site, who, to, family):
    """A client that sends all the time while its container is replaced talks to the new one (k8s#58336)."""
    with udp(site, who, to, family) as client, client.chatter():
        for name in "old", "new":
            with site.publish(name, UDP, "udp"):
                assert client.ask_until(name).server == name


@each_way
def test_udp_older_than_the_container_reaches_it(site, who, to, family):
    """A client that has talked to the port since before it was published reaches the container (plugins#123)."""
    with udp(site, who, to, family) as client, client.chatter():
        assert client.ask_until("anybody", 0.05) is None
        with site.publish("web", UDP, "udp"):
            assert client.ask_until("web").server == "web"


@pytest.mark.parametrize("family", [4, 6])
def test_udp_that_never_stops_reaches_what_is_restored(site, family, tmp_path):
    """A client that sends all the time during a firewall's reload is answered after `restore`, as after ADD."""
    with udp(site, "client", "LAN address", family) as client, client.chatter(), \
            site.publish("web", UDP, "udp") as container:
        assert client.ask_until("web").server == "web"
        Cache(tmp_path).remember(container)
        lab.nft_script(f"delete table {lab.TABLE}")
        lab.run("conntrack", "-F")
        assert client.ask_until("anybody", 0.3) is None
        lab.run(site.bin_dir.parent / "sbin/cni-portmap", "restore", "--cache", tmp_path)
        assert client.ask_until("web").server == "web"


@each_way
def test_udp_moves_between_container_and_host(site, who, to, family):
    """A port that a process of the host takes over, and gives back, takes its clients along (plugins#1190)."""
    ip = site.ip(to, family)
    with udp(site, who, to, family) as client, client.chatter():
        for _ in range(2):
            with site.publish("web", UDP, "udp"):
                assert client.ask_until("web").server == "web"
            with lab.Server("host", lab.HOST, PORT, "udp", ip):
                assert client.ask_until("host").server == "host"


@each_way
@pytest.mark.parametrize("leaves", [True, False], ids=["container leaves", "container stays"])
def test_tcp_is_answered_after_the_port_is_gone(site, who, to, family, leaves):
    """A client with an open connection hears that it is over; it is not left to wait."""
    container = lab.Container(lab.Network(site.network.conflist, site.bin_dir), "web", TCP)
    try:
        with lab.Server("web", container, WEB, keep=True), \
                lab.Client(site.places[who], site.ip(to, family), PORT) as client:
            assert client.ask().server == client.ask().server == "web"
            if leaves:
                container.remove()
            else:
                lab.call_plugin(site.bin_dir / "portmap", "DEL", container.network.config(), container.id)
            with pytest.raises(ConnectionResetError):
                client.ask()
    finally:
        if not leaves:
            container.remove()


def test_tcp_lives_on_when_its_container_is_added_again(site):
    """A repeated ADD, as after a firewall's reload, cuts no connection."""
    with site.publish("web", TCP) as container, lab.Server("keep", container, 81, keep=True):
        ports = [*TCP, {"hostPort": PORT + 1, "containerPort": 81}]
        config = container.network.config(ports, container.result)
        clients = []
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                lab.call_plugin(site.bin_dir / "portmap", "ADD", config, container.id, container.namespace.path)
                for who, to in ("client", "LAN address"), ("host", "localhost"):
                    clients.append(stack.enter_context(lab.Client(site.places[who], site.ip(to, 4), PORT + 1)))
                assert [client.ask().server for client in clients] == ["keep"] * len(clients)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ["LAN address", ""], ids=["one address", "every address"])
def test_flows_of_others_live_on(site, name, family):
    """ADD and DEL of a port leave alone: its number on other addresses, protocols and machines, and other ports."""
    second = site.ip("second address", family)
    port = {**UDP[0], "hostIP": site.ip(name, family)} if name else UDP[0]
    others = {**UDP[0], "hostPort": PORT if name else PORT + 1, "hostIP": second}  # no second owner of every address
    with contextlib.ExitStack() as stack:
        def talk(who, ip, port, protocol="udp"):
            client = stack.enter_context(lab.Client(site.places[who], ip, port, protocol))
            assert client.ask()
            return client

        stack.enter_context(site.publish("other", [others], "udp"))
        for place, its_port, protocol, keep in ((lab.HOST, PORT, "tcp", True), (lab.HOST, PORT + 2, "udp", False),
                                                (site.places["neighbour"], PORT, "udp", False),
                                                (site.client, PORT, "udp", False)):
            stack.enter_context(lab.Server("other", place, its_port, protocol, keep=keep))
        talk("client", second, others["hostPort"])
        talk("neighbour", second, others["hostPort"])
        talk("client", site.ip("LAN address", family), PORT + 2)  # the host's own
        talk("client", site.ip("neighbour", family), PORT)  # in transit
        talk("stranger", site.ip("client", family), PORT)
        connection = talk("client", second, PORT, "tcp")  # the host's own
        ports = {PORT, PORT + 2, others["hostPort"]}
        before = {flow for its_port in ports for flow in lab.flows("udp", its_port, family)}
        assert len(before) >= 5
        with site.publish("web", [port], "udp"):
            during = {flow for its_port in ports for flow in lab.flows("udp", its_port, family)}
        after = {flow for its_port in ports for flow in lab.flows("udp", its_port, family)}
        assert during >= before and after >= before
        assert connection.ask()


@pytest.mark.parametrize("family", [4, 6])
def test_flows_around_the_port_live_on(site, family):
    """DEL forgets what came by the published port, and not what talks to the container directly."""
    with site.publish("web", UDP, "udp") as container:
        container_ip = container.ipv4 if family == 4 else container.ipv6
        with lab.Client(site.client, site.ip("LAN address", family), PORT, "udp") as through, \
                lab.Client(site.client, container_ip, WEB, "udp") as direct:
            assert through.ask() and direct.ask()
            lab.call_plugin(site.bin_dir / "portmap", "DEL", container.network.config(), container.id)
            assert not lab.flows("udp", PORT, family)
            assert [flow.source_port for flow in lab.flows("udp", WEB, family)] == [direct.port]


@pytest.mark.parametrize("family", [4, 6])
def test_udp_flows_of_a_range_change_over(site, family):
    """Of 1,000 ports, the flows to the first and the last change over, too."""
    ports = [{"hostPort": 20000 + i, "containerPort": 30000 + i, "protocol": "udp"} for i in range(1000)]
    with contextlib.ExitStack() as stack:
        clients = {port: stack.enter_context(udp(site, "client", "LAN address", family, port))
                   for port in (20000, 20999)}
        for client in clients.values():
            stack.enter_context(client.chatter())
        for name in "old", "new":
            with site.publish(name, ports, "udp") as container:
                for port, client in clients.items():
                    with lab.Server(name, container, port + 10000, "udp"):
                        assert client.ask_until(name) == lab.Saw(name, site.ip("client", family), port + 10000)


@pytest.mark.parametrize("family", [4, 6])
def test_sctp_flows_are_forgotten(site, family):
    """The flows of a published SCTP port are forgotten, too, and those of another are not."""
    client, node = site.ip("client", family), site.ip("LAN address", family)
    for port in PORT, PORT + 1:
        lab.run(*f"conntrack -I -p sctp -s {client} -d {node} --sport 1 --dport {port} --timeout 99 "
                "--state ESTABLISHED --orig-vtag 1 --reply-vtag 2".split())
    with site.publish("web", [{**TCP[0], "protocol": "sctp"}]):
        assert [len(lab.flows("sctp", port, family)) for port in (PORT, PORT + 1)] == [0, 1]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("before_5_8", [False, True], ids=["5.8", "before 5.8"])
def test_older_kernels(site, family, before_5_8, monkeypatch):
    """The same flows are deleted on kernels that cannot filter conntrack deletions, or dumps either."""
    def body(self, family, *_):
        return bytes((lab.family_of(site.ip("client", family)), 0, 0, 0))

    monkeypatch.setattr(conntrack.Conntrack, "delete", lambda *_: False)
    if before_5_8:
        monkeypatch.setattr(conntrack.Conntrack, "_body", body)
    node = site.ip("LAN address", family)
    container = lab.Container(lab.Network(site.network.conflist, site.bin_dir), "web", UDP + TCP)
    try:
        with lab.Server("udp", container, WEB, "udp"), lab.Server("tcp", container, WEB, keep=True), \
                lab.Server("own", lab.HOST, PORT + 1, "udp", node), \
                lab.Client(site.client, node, PORT, "udp") as published, lab.Client(site.client, node, PORT) as tcp, \
                lab.Client(site.client, node, PORT + 1, "udp") as own:
            assert published.ask() and tcp.ask() and own.ask()
            delete(container.id, "eth0", "home", kernel.Kernel())
        assert not lab.flows("udp", PORT, family) and not lab.flows("tcp", PORT, family)
        assert [flow.source_port for flow in lab.flows("udp", PORT + 1, family)] == [own.port]
    finally:
        container.remove()


MANY = 100_000


# on which address, how many ports, the port of the flows, over how many they spread, and how often conntrack may be
# asked to look through all of them (0.3 us each): the times are in scripts/bench
COSTS = [("LAN address", 1, 9, 1, 2), ("LAN address", 1, PORT, 1, 2), ("", 1, 9, 1, 9), ("", 1, PORT, 1, 9),
         ("", 1000, 9, 1, 4), ("", 1000, 20000, 1000, 4)]
CONNTRACK = re.compile(r"nlmsg_type=(?:NFNL_SUBSYS_CTNETLINK<<8\|IPCTNL_MSG_CT_(?:GET|DELETE)|0x10[12]\b)")


@pytest.mark.parametrize("name, count, port, spread, most", COSTS, ids=[
    f"{'one address' if name else 'every address'}, {count}, {'others' if port == 9 else 'its'} flows"
    for name, count, port, *_ in COSTS])
def test_cost_with_many_flows(site, name, count, port, spread, most, tmp_path):
    """With 100,000 tracked flows ADD and DEL walk all of them a few times: not once for each port."""
    first, host_ip = PORT if count == 1 else 20000, site.ip(name, 4) if name else ""
    ports = [{"hostPort": first + i, "containerPort": first + i, "protocol": "udp", "hostIP": host_ip}
             for i in range(count)]
    container = lab.Container(lab.Network(site.network.conflist, site.bin_dir), "web", ports)
    config, trace = container.network.config(ports, container.result), tmp_path / "trace"
    traced = tmp_path / "portmap"
    traced.write_text(f"#!/bin/sh\nexec strace -e trace=sendto -o {trace} {site.bin_dir}/portmap\n")
    traced.chmod(0o755)
    try:
        for verb, target in ("DEL", container.ipv4), ("ADD", ""):
            lab.track(MANY - lab.tracked(), site.ip("LAN address", 4), port, target, spread)
            lab.call_plugin(traced, verb, config, container.id, container.namespace.path)
            looks = [line for line in trace.read_text().splitlines()
                     if CONNTRACK.search(line) and "nla_type=0xc}" not in line]  # CTA_ID: a flow by its name
            print(f"{verb}: {len(looks)}")
            assert 0 < len(looks) <= most, looks
            if port == first:
                assert lab.tracked() < 1000  # they were its own, and are forgotten
    finally:
        container.remove()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_next_owner_of_an_address_gets_nothing_of_the_last(host, protocol, family):
    """Whatever the counters of its rules say when it leaves: they may have been reset, and flows live on."""
    ips, server_ip = ("10.20.0.2/24", "fd20::2/64"), {4: "192.0.2.1", 6: "2001:db8::1"}[family]
    web = lab.wire("web", ("10.20.0.1/24", "fd20::1/64"), ips)
    client = lab.wire("client", ("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
    first, second = lab.Pod("first", f"8080:80/{protocol}", ips=ips), lab.Pod("second", "9090:90", ips=ips)
    host.add(first)
    with lab.Server("first", web, 80, protocol, keep=True) as server, \
            lab.Client(client, server_ip, 8080, protocol) as flow:
        assert flow.ask().server == "first"
        lab.reset_rules()
        host.delete(first)
        server.close()
        host.add(second)
        with lab.Server("second", web, 80, protocol, keep=True) as other:
            for _ in range(3):
                with contextlib.suppress(ConnectionError):
                    assert not flow.ask(0.5)
            assert not other.arrivals
