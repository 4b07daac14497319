"""Every path to a published port, with real packets: who reaches the container, and whom it sees. See paths.py."""
import contextlib
import socket

import lab
from lab import paths
from lab.libcni_cache import Cache
import pytest

CASES = [(setting, path, family, protocol) for setting in paths.SETTINGS for path in paths.PATHS for family in (4, 6)
         for protocol in ("tcp", "udp") if paths.exists(path, setting, family)]


@pytest.mark.parametrize("setting, path, family, protocol", CASES,
                         ids=[f"{case[0].name}-{case[1]}-ipv{case[2]}-{case[3]}" for case in CASES])
def test_path_leads_where_it_should(sites, setting, path, family, protocol):
    """The path leads to the container, or to nobody, and the container sees whom it should."""
    sees = paths.expected(path, setting, family)
    assert sites(setting).try_path(path, family, protocol, lab.patience(sees)) == sees


@pytest.fixture
def site(sites):
    """The site of the first setting: a bridge, dual stack."""
    return sites(paths.SETTINGS[0])


NEIGHBOURS = [path for path in paths.PATHS if path.who in ("neighbour", "stranger", "container") and path.sees]
BY_NAME = {setting.name: setting for setting in paths.SETTINGS}


def answers(site):
    """Whom the container sees of those who are, or may be, in one of its networks."""
    return {(path, family): site.try_path(path, family, "tcp", lab.patience(paths.expected(path, site.setting, family)))
            for path in NEIGHBOURS for family in (4, 6) if paths.exists(path, site.setting, family)}


@pytest.mark.parametrize("lost", ["both", "the first", "the second", "both, beside one that nft refuses"])
def test_a_second_network_is_answered_after_restore_too(sites, lost, tmp_path):
    """What ADD masquerades for a container's other network, restore does, whichever chain was lost."""
    site = sites(BY_NAME["two networks"])
    before, container = answers(site), site.container
    cache = Cache(tmp_path)
    for attachment in container, site.second:
        cache.remember(attachment)
    if "both" in lost:
        lab.nft_script(f"delete table {lab.TABLE}")
    else:
        lab.nft_script(f"flush chain {lab.TABLE} c/{container.id}/{'eth0' if lost == 'the first' else 'eth1'}")
    if "refuses" in lost:  # so each is restored by itself
        cache.write(lab.Pod("refused", "7000:80", netns=container.namespace.path, conditionsV4=["ip saddr @gone"]))
    lab.run(site.bin_dir.parent / "sbin/cni-portmap", "restore", "--cache", tmp_path, check=False)
    assert answers(site) == before
    container.check()
    site.second.check()


@pytest.mark.parametrize("family", [4, 6])
def test_a_gateway_in_the_lan_takes_masqall(sites, family):
    """Where the container's gateway is not this host, clients that it routes for are answered with masqAll."""
    site = sites(BY_NAME["bridge with the uplink, another gateway"])
    with site.publish("all", [{"hostPort": 7001, "containerPort": paths.WEB}], masqAll=True):
        saw = lab.exchange(site.places["far client"], site.ip("LAN address", family), 7001)
    assert saw == lab.Saw("all", site.ip("LAN address", family), paths.WEB)


MANY = 1000


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("first, target", [(20000, 20000), (20000, 30000)], ids=["same", "shifted"])
def test_each_port_of_a_range_leads_to_its_own(site, first, target, protocol, family):
    """Of a range of 1,000 ports, each leads to its own port of the container, and the next after it to nobody."""
    ports = [{"hostPort": first + i, "containerPort": target + i, "protocol": protocol} for i in range(MANY)]
    with site.publish("ranged", ports) as container:
        for index in 0, MANY // 2, MANY - 1, MANY:
            with lab.Server("ranged", container, target + index, protocol):
                saw = lab.exchange(site.client, site.ip("LAN address", family), first + index, protocol,
                                   timeout=lab.patience(index < MANY))
            assert saw == (lab.Saw("ranged", site.ip("client", family), target + index) if index < MANY else None)


@pytest.mark.parametrize("family", [4, 6])
def test_one_port_on_many_host_ips(site, family):
    """Kubernetes' conformance test: localhost/tcp, node/tcp and node/udp have one port number and three owners."""
    localhost, node = site.ip("localhost", family), site.ip("LAN address", family)
    with contextlib.ExitStack() as stack:
        for name, ip, protocol in ("pod1", localhost, "tcp"), ("pod2", node, "tcp"), ("pod3", node, "udp"):
            port = {"hostPort": 54323, "containerPort": paths.WEB, "hostIP": ip, "protocol": protocol}
            stack.enter_context(site.publish(name, [port], protocol))
        assert lab.exchange(lab.HOST, localhost, 54323, source=node) == lab.Saw("pod1", node, paths.WEB)
        for where, ip in (lab.HOST, node), (site.client, site.ip("client", family)):
            assert lab.exchange(where, node, 54323) == lab.Saw("pod2", ip, paths.WEB)
            assert lab.exchange(where, node, 54323, "udp") == lab.Saw("pod3", ip, paths.WEB)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("setting", [paths.SETTINGS[0], paths.SETTINGS[3]], ids=lambda setting: setting.name)
def test_localhost_leads_to_each_of_several_interfaces(sites, setting, family):
    """Containers on different interfaces of the host (bridges, or a veth each) all answer on localhost."""
    site = sites(setting)
    localhost = site.ip("localhost", family)
    port = {"hostPort": 7000, "containerPort": paths.WEB}
    with site.publish("first", [port]), site.publish("second", [{**port, "hostPort": 7001}], network=site.far):
        for name, port in ("first", 7000), ("second", 7001):
            assert lab.exchange(lab.HOST, localhost, port).server == name
        assert site.try_path(paths.Path("host", "localhost", ""), family, "tcp") == "bridge address"


@pytest.mark.parametrize("family", [4, 6])
def test_sctp_reaches_the_container(site, family):
    """An SCTP INIT reaches the container, its source and checksum right; this needs no SCTP in the kernel."""
    source, node = site.ip("client", family), site.ip("LAN address", family)
    with site.container:
        listener = socket.socket(lab.family_of(node), socket.SOCK_RAW, lab.NUMBERS["sctp"])
    with listener:
        listener.settimeout(lab.PATIENT)
        lab.inject(site.client, "to-lan-client", lab.packet(source, node, paths.EVERY, "sctp", 40000))
        data, address = listener.recvfrom(2048)
    sent = lab.packet(source, site.ip("container", family), paths.WEB, "sctp", 40000)
    assert address[0] == source
    assert data[20:] == sent[20:] if family == 4 else data == sent[40:]


def test_the_family_that_a_container_lacks_is_the_hosts(site):
    """The host's own server keeps the IPv6 port of a container that has IPv4 only."""
    network = lab.Network(lab.bridge_conflist("only4", "cni4", ("10.90.0.0/16",)), site.bin_dir)
    container = lab.Container(network, "only4", [{"hostPort": 7000, "containerPort": 80}])
    with lab.Server("only4", container, 80), lab.Server("host", lab.HOST, 7000):
        answers = [lab.exchange(site.client, site.ip("LAN address", family), 7000) for family in (4, 6)]
    container.remove()
    assert answers == [lab.Saw("only4", site.ip("client", 4), 80), lab.Saw("host", site.ip("client", 6), 7000)]


@pytest.mark.parametrize("family", [4, 6])
def test_without_masquerading_localhost_is_the_hosts(site, family):
    """With `snat: false` no reply would come back to localhost, so a service of the host there is not hidden."""
    network = lab.Network(lab.bridge_conflist("plain", "cni5", ("10.91.0.0/16", "fd91::/64"), snat=False), site.bin_dir)
    container = lab.Container(network, "plain", [{"hostPort": 7000, "containerPort": 80}])
    with lab.Server("plain", container, 80), lab.Server("host", lab.HOST, 7000):
        answers = [lab.exchange(*ends, 7000).server for ends in
                   ((site.client, site.ip("LAN address", family)), (lab.HOST, site.ip("localhost", family)))]
    container.remove()
    assert answers == ["plain", "host"]


# configuration, who connects from where: whom the container sees
CONFIGURED = [
    ({"snat": False}, "client", "", "client"),
    ({"snat": False}, "host", "LAN address", "LAN address"),
    ({"snat": False}, "stranger", "", "stranger"),
    ({"snat": False}, "host", "second address", "second address"),
    ({"masqAll": True}, "client", "", "bridge address"),
    ({"masqAll": True}, "stranger", "", "bridge address"),
    ({"masqAll": True}, "host", "second address", "bridge address"),
    ({"masqAll": True, "snat": False}, "client", "", "client"),
    ({"masqAll": True, "markMasqBit": 5}, "client", "", "bridge address"),
    ({"markMasqBit": 31}, "neighbour", "", "bridge address"),
    ({"conditionsV4": ["ip saddr 192.0.2.0/24"], "conditionsV6": ["ip6 saddr 2001:db8::/64"]}, "client", "", "client"),
    ({"conditionsV4": ["ip saddr 192.0.2.0/24"], "conditionsV6": ["ip6 saddr 2001:db8::/64"]}, "stranger", "", ""),
    ({"conditionsV4": ["!", "-s", "192.0.2.2"], "conditionsV6": ["!", "-s", "2001:db8::2"]}, "client", "", ""),
    ({"conditionsV4": ["-i", "cni1"], "conditionsV6": ["-i", "cni1"]}, "stranger", "", "stranger"),
]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("config, who, source, sees", CONFIGURED)
def test_configuration_decides_whom_the_container_sees(site, config, who, source, sees, family):
    """The configuration of sources applies to this container, and to no other."""
    source = site.ip(source, family) if source else ""
    with site.publish("configured", [{"hostPort": 7001, "containerPort": paths.WEB}], **config):
        saw = lab.exchange(site.places[who], site.ip("LAN address", family), 7001, source=source,
                           timeout=lab.patience(sees))
        assert saw == (lab.Saw("configured", site.ip(sees, family), paths.WEB) if sees else None)
        assert site.try_path(paths.PATHS[0], family, "tcp") == "client"
