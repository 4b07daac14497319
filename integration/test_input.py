"""Input that only a real nft, or real packets, can judge: conditions, and networks that have no part in publishing."""
import json

import lab
import pytest
from lab import Pod


@pytest.mark.parametrize(("ports", "condition", "names"), [
    (("8080:80", "5353:53/udp"), "tcp sport 1024-65535", "tcp and udp ports"),
    (("8080:80",), "meta l4proto udp", "tcp ports"), (("9:9/sctp",), "udp sport 1", "sctp ports"),
    (("8080:80",), "ip6 saddr fd00::/8", "tcp ports"), (("8080:80",), "ip saddr nonsense", "conditionsV4"),
    (("8080:80",), "iifname", "tcp ports"),
    (("8080:80",), "iifname http &", "conditionsV4"),  # nft 1.0.6 aborts: evaluate.c, expr_evaluate_binop
    (("192.0.2.1:8080:80/udp",), "tcp dport ssh", "udp ports")])
def test_condition_that_cannot_hold(host, ports, condition, names):
    """One on another protocol than a port's, or that is no match at all, is code 7 before anything is written."""
    reply = host.call("ADD", Pod("web", *ports, conditionsV4=[condition]))
    assert reply.code == 7 and names in reply.msg + reply.details, reply
    assert lab.state() == []


@pytest.mark.parametrize("snat", [True, False])
def test_an_address_of_this_host(host, snat):
    """A result that names one would open the host's own services under the published ports."""
    lab.add_addresses("lo", "10.20.0.2")
    pod = Pod("web", "22:22", snat=snat)
    reply = host.call("ADD", pod)
    assert reply.code == 7 and "10.20.0.2 is an address of this host" in reply.msg, reply
    assert lab.elements() == {}
    assert not host.call("ADD", pod.but()).code  # which publishes nothing


@pytest.mark.parametrize("condition", ["tcp sport ssh", "ip saddr 10.0.0.0/8 tcp sport { ssh, http }", "ct state new",
                                       "fib saddr type unicast", "ip saddr . tcp sport { 10.0.0.1 . ssh }",
                                       'iifname . ip saddr { "eth0" . 10.0.0.1 }', "ip saddr 10.0.0.1-10.0.0.9"])
def test_condition_with_names(host, condition):
    """Names of services, states and interfaces are nft's own, and need no DNS."""
    pod = Pod("web", "8080:80", conditionsV4=[condition])
    host.add(pod)
    assert not host.call("CHECK", pod).code


def test_network_with_a_condition_on_an_address_takes_over(host):
    """The network that stands by has a rule of one address, and its port was asked for on every one."""
    first = Pod("web", "8080:80", network="one")
    second = Pod("web", "8080:80", network="two", ifname="eth1", netns=first.netns, ips=("10.21.0.2/24",),
                 conditionsV4=["ip daddr 192.0.2.1"])
    host.add(first, second)
    host.delete(first)
    assert lab.elements() == {("ipv4", "tcp", "8080"): second.chain}
    assert not host.call("CHECK", second).code
    host.delete(second)
    assert lab.elements() == {} and lab.chains() == []


def test_network_of_one_address_inherits_no_other(host):
    """A port of one address does not become one of every address when the network that had that goes."""
    first = Pod("web", "8080:80", network="one")
    second = Pod("web", "192.0.2.1:8080:80", network="two", ifname="eth1", netns=first.netns, ips=("10.21.0.2/24",))
    host.add(first, second)
    host.delete(first)
    assert lab.elements() == {("192.0.2.1", "tcp", "8080"): second.chain}
    host.add(Pod("other", "192.0.2.2:8080:80"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_network_without_addresses(host, order):
    """Each network of a container gets all port mappings: one without addresses neither fails nor publishes."""
    pods = Pod("web", "8080:80"), Pod("web", "8080:80", network="layer2", ifname="eth1", netns="/run/netns/web", ips=())
    for index in order:
        reply = host.call("ADD", pods[index])
        assert not reply.code and json.loads(reply.document)["interfaces"]
        assert ("no address on eth1" in reply.stderr) == bool(index)
    for pod in pods:
        assert not host.call("CHECK", pod).code
    host.delete(pods[1])
    assert lab.elements() == {("ipv4", "tcp", "8080"): pods[0].chain}
