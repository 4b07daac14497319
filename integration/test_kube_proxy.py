"""A ruleset of the shape of kube-proxy's nftables mode beside ours: the paths of both, whoever registers hooks last."""
import contextlib

import lab
import pytest
from lab.kube_proxy import Service, ruleset
from lab.paths import EVERY, SETTINGS
from lab.site import Site

PODS = {4: "10.88.0.0/15", 6: "fd88::/15"}  # both bridges' networks
BRIDGE = {4: "10.88.0.1", 6: "fd88::1"}
NODE_PORT = 30080  # of the service "plain"; "local" has the next one
CLUSTER_IP = {4: "10.96.0.{}", 6: "fd96::{}"}
BALANCER = {4: "198.18.0.{}", 6: "2001:db8:18::{}"}


def services(site, family):
    """Services of each kind, with the neighbour of the published container as their endpoint, and one with none."""
    neighbour = site.places["neighbour"]
    endpoint = (neighbour.ipv6 if family == 6 else neighbour.ipv4, 80)
    client = site.ip("client", family)
    return [Service("plain", CLUSTER_IP[family].format(1), 80, endpoint, NODE_PORT),
            Service("local", CLUSTER_IP[family].format(2), 80, endpoint, NODE_PORT + 1, local=True),
            Service("balanced", CLUSTER_IP[family].format(3), 80, endpoint, 0, BALANCER[family].format(3), (client,)),
            Service("closed", CLUSTER_IP[family].format(4), 80, endpoint, 0, BALANCER[family].format(4),
                    ("192.0.3.2",) if family == 4 else ("2001:db8:3::2",)),
            Service("published", CLUSTER_IP[family].format(6), 80, (site.ip("container", family), 80), NODE_PORT + 3),
            # The number of a host port, at another address.
            Service("numbered", CLUSTER_IP[family].format(7), EVERY, endpoint),
            Service("empty", CLUSTER_IP[family].format(5), 80, None, NODE_PORT + 2)]


@pytest.fixture(scope="module", params=["kube-proxy", "ours"])
def site(bin_dir, request):
    """A site with services; the parameter: whose hooks are registered last, so that they come first."""
    with Site(SETTINGS[0], bin_dir) as site, contextlib.ExitStack() as stack:
        for protocol in "tcp", "udp":
            stack.enter_context(lab.Server("service", site.places["neighbour"], 80, protocol))
        for family in 4, 6:
            lab.add_route("default", site.ip("client", family))  # a node has one, also for addresses of services
            names = "LAN address", "second address"
            lab.nft("-f", "-", input=ruleset(services(site, family), [site.ip(name, family) for name in names],
                                             PODS[family]))
        if request.param == "ours":
            lab.register_again()
        site.last = request.param
        yield site


def whom(site, who, ip, port, timeout=lab.PATIENT):
    """Who answers, and whom it sees; None for nobody."""
    saw = lab.exchange(site.places[who], ip, port, timeout=timeout)
    return saw and (saw.server, saw.peer)


def test_our_paths(site):
    """Every path to our ports leads where it should"""
    assert site.differences() == {}


@pytest.mark.parametrize("family", [4, 6])
def test_services(site, family):
    """ClusterIP, NodePort, load balancer with source ranges, externalTrafficPolicy Local: as without us"""
    lan, bridge, client = site.ip("LAN address", family), BRIDGE[family], site.ip("client", family)
    stranger = site.ip("stranger", family)
    for who, sees in ("host", bridge), ("stranger", stranger), ("neighbour", bridge):
        assert whom(site, who, CLUSTER_IP[family].format(1), 80) == ("service", sees)
    for who in "client", "host", "container", "stranger":
        assert whom(site, who, lan, NODE_PORT) == ("service", bridge)
    assert whom(site, "client", lan, NODE_PORT + 1) == ("service", client)
    assert whom(site, "client", BALANCER[family].format(3), 80) == ("service", bridge)
    for who, sees in ("host", bridge), ("stranger", stranger), ("neighbour", bridge):
        assert whom(site, who, CLUSTER_IP[family].format(7), EVERY) == ("service", sees)
    # The endpoint has a host port too.
    for who, sees in ("host", bridge), ("container", bridge), ("stranger", stranger):
        assert whom(site, who, CLUSTER_IP[family].format(6), 80) == ("web", sees)
    assert whom(site, "client", lan, NODE_PORT + 3) == ("web", bridge)
    for who, ip, port in (("client", BALANCER[family].format(4), 80), ("stranger", BALANCER[family].format(3), 80),
                          ("host", CLUSTER_IP[family].format(5), 80), ("client", lan, NODE_PORT + 2)):
        assert whom(site, who, ip, port, lab.HASTY) is None


def test_a_host_port_with_the_number_of_a_node_port(site):
    """Kubernetes does not check that: whose hooks were registered last answers; alone, each answers"""
    lan = site.ip("LAN address", 4)
    with site.publish("hostport", [{"hostPort": NODE_PORT, "containerPort": 80, "protocol": "tcp"}]):
        assert whom(site, "client", lan, NODE_PORT)[0] == ("service" if site.last == "kube-proxy" else "hostport")
        assert whom(site, "host", "127.0.0.1", NODE_PORT)[0] == "hostport"  # node ports do not answer there
    assert whom(site, "client", lan, NODE_PORT)[0] == "service"


def test_kube_proxy_begins_anew(site):
    """Its table is deleted and written again: ours stays as it is, and answers"""
    before = lab.table()
    for family in 4, 6:
        lab.nft("-f", "-", input=ruleset(services(site, family), [site.ip("LAN address", family)], PODS[family]))
    assert lab.table() == before
    assert site.differences() == {}
