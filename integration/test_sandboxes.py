"""The next sandbox of a pod comes before the last one has gone, as a kubelet edits a static pod: it stands by.

Nobody waits and nobody is refused; the port changes hands in the transaction that removes the last one.
"""
import json
import pathlib

import lab
import pytest
from cni_portmap.linux.kernel import Kernel
from cni_portmap.verbs.restore import prune
from lab import TABLE, GcCall, Host, Pod
from lab.libcni_cache import Cache

POD = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID="
HTTP, DNS, NEW = ("ipv4", "tcp", "8080"), ("ipv4", "udp", "8053"), ("ipv4", "tcp", "9090")


class Sandbox(Pod):
    """One of pod shop/web, with a wire of its own; `number` is its address."""

    def __init__(self, name: str, *ports: str, number: int = 2, args: str = POD, **options: str) -> None:
        self.wire = lab.wire(name, (f"10.20.{number}.1/24",), (f"10.20.{number}.2/24",))
        super().__init__(name, *ports, ips=(f"10.20.{number}.2/24",), link=self.wire.host_device,
                         args=f"{args}{number}", **options)

    def end(self, host: Host | None = None) -> None:
        """It ends without DEL. On a `host` that knows no link of it, only the number of its namespace."""
        if host:
            self.link = ""
            host.add_for_nobody(self)
        lab.delete_link(self.wire.host_device)
        lab.delete_namespace(pathlib.Path(self.netns).name)


def two(*ports: str) -> tuple[Sandbox, Sandbox]:
    return Sandbox("last", "8080:80"), Sandbox("next", *ports or ("8080:80",), number=3)


def leads_to(*pods: Pod) -> bool:
    """Whether these, and nobody else, are published on port 8080."""
    return [chain for key, chain in lab.elements().items() if key == HTTP] == [pod.chain for pod in pods]


def of(container_id: str) -> list[str]:
    """What the table holds of a container, sorted."""
    return sorted(line for line in lab.state() if f"c/{container_id}/" in line)


def checks(host: Host, *pods: Pod) -> list[int]:
    return [host.call("CHECK", pod).code for pod in pods]


def test_hand_over(host):
    """A pod is edited: the old container answers until its DEL, and the new one from then on; not one client is lost.

    What the old sandbox does not have is published at once, and what the new one does not want goes with the old one.
    """
    client = lab.wire("client", ("192.0.2.1/24",), ("192.0.2.2/24",))
    last, following = Sandbox("last", "8080:80", "8053:53/udp", "7070:80"), \
        Sandbox("next", "8080:81", "8053:54/udp", "9090:81", number=3)
    with lab.Server("last", last.wire, 80), lab.Server("next", following.wire, 81), \
            lab.Server("last", last.wire, 53, "udp"), lab.Server("next", following.wire, 54, "udp"):
        host.add(last)
        with lab.Client(client, "192.0.2.1", 8053, "udp") as datagrams, lab.connecting(client, 8080, "192.0.2.1"):
            assert datagrams.ask() == lab.Saw("last", "192.0.2.2", 53)
            reply = host.call("ADD", following)
            assert not reply.code and "next will take over" in reply.stderr and leads_to(last)
            assert datagrams.ask() == lab.Saw("last", "192.0.2.2", 53)
            assert lab.exchange(client, "192.0.2.1", 8080) == lab.Saw("last", "192.0.2.2", 80)
            assert lab.exchange(client, "192.0.2.1", 9090) == lab.Saw("next", "192.0.2.2", 81)
            assert checks(host, last, following) == [0, 0]
            generation = lab.generation()
            host.delete(last)
            assert lab.generation() == generation + 1
            assert lab.exchange(client, "192.0.2.1", 8080) == lab.Saw("next", "192.0.2.2", 81)
            assert datagrams.ask() == lab.Saw("next", "192.0.2.2", 54)
    assert lab.elements() == dict.fromkeys((HTTP, DNS, NEW), following.chain)
    assert checks(host, last, following) == [104, 0]
    host.delete(last, following)
    assert not lab.chains() and not lab.elements()


@pytest.mark.parametrize("args", [
    "K8S_POD_NAMESPACE=other;K8S_POD_NAME=web;K8S_POD_UID=", "K8S_POD_NAME=web;K8S_POD_UID=", ""])
def test_another_pod_is_refused(host, args):
    """Another namespace, a name alone: these are strangers, who wait and are refused."""
    last = Sandbox("last", "8080:80")
    host.add(last)
    before = lab.state()
    stranger = Sandbox("stranger", "8080:80", number=3, args=args)
    reply = host.call("ADD", stranger)
    assert reply.code == 101 and "waited " in reply.msg and "pod shop/web" in reply.msg and lab.state() == before


@pytest.mark.parametrize("args", [
    "K8S_POD_NAMESPACE=web;K8S_POD_NAME=web;K8S_POD_UID=;K8S_POD_INFRA_CONTAINER_ID=",  # podman 3
    "K8S_POD_NAMESPACE=web;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=",  # podman 2
    "K8S_POD_NAME=web;MAC=", "NERDCTL_CNI_DHCP_HOSTNAME=web;MAC="])  # podman 4, nerdctl
def test_containers_of_one_name_are_no_pod(host, args):
    """Two containers with one name, as of two stores of podman, are strangers, however the runtime writes the name."""
    host.add(Sandbox("one", "8080:80", args=args))
    before = lab.state()
    reply = host.call("ADD", Sandbox("other", "8080:80", number=3, args=args))
    assert reply.code == 101 and "container one (web)" in reply.msg and lab.state() == before


def test_another_network(host):
    """The next sandbox may be in another network, as after an edit, or on a node whose network has been replaced."""
    last, following = Sandbox("last", "8080:80"), Sandbox("next", "8080:80", number=3, network="other")
    host.add(last, following)
    assert leads_to(last) and checks(host, last, following) == [0, 0]
    host.delete(last)
    assert leads_to(following) and checks(host, following) == [0]


@pytest.mark.parametrize("order", [1, -1])
def test_two_networks(host, tmp_path, order):
    """A pod has its port on two networks: nobody is refused of its next sandbox, and its first network gets the port.

    So it is when all was lost in between. In the end nothing tells that there was another sandbox before.
    """
    cache = Cache(tmp_path)
    first, third = two()
    second, fourth = (Sandbox(f"{pod.id}-b", "8080:80", number=number, network="b") for pod, number in
                      ((first, 4), (third, 5)))
    for pod, mate in (first, second), (third, fourth):
        mate.id, mate.ifname, mate.netns, mate.chain = pod.id, "eth1", pod.netns, f"c/{pod.id}/eth1"
    host.add(third, fourth)
    alone = of("next")
    host.delete(third, fourth)
    for pod in first, second, third, fourth:
        host.add(pod)
        cache.write(pod)
    before = sorted(lab.state())
    assert leads_to(first) and checks(host, first, second, third, fourth) == [0, 0, 0, 0]
    lab.nft_script("flush ruleset")
    assert cache.restore(host)["refused"] == []
    assert sorted(lab.state()) == before
    host.delete(*(first, second)[::order])
    assert leads_to(third) and checks(host, third, fourth) == [0, 0] and of("next") == alone
    host.delete(third)
    assert leads_to(fourth) and checks(host, fourth) == [0]


def test_who_stands_by_is_shown(host):
    """`list` says of each port who gets it from its owner, and doctor why another sandbox has it, or nobody alive."""
    last, following = Sandbox("last", "8080:80", "7070:70"), Sandbox("next", "8080:80", "9090:90", number=3)
    second = Pod("last", "8080:80", ips=("10.21.0.2/24",), ifname="eth1", network="b", args=POD)
    host.add(last, following, second)
    listed = {line["host_ports"][0]: line["standby"] for line in json.loads(host.command("list", "--json"))}
    assert listed == {7070: [], 8080: ["next/eth0", "last/eth1"], 9090: []}
    shown = {line.split()[0]: line.rpartition("  ")[2] for line in host.command("list").splitlines()}
    assert shown["0.0.0.0:8080/tcp"] == "alive, next stands by, eth1 stands by" and shown["0.0.0.0:7070/tcp"] == "alive"
    host.delete(second)
    for cause in "next-sandbox-stands-by", "owner-dead":
        found = {each["cause"]: each for each in json.loads(host.command("doctor", "8080", "--json", status=1))}
        assert "container next of the same pod stands by" in found[cause]["summary"]
        if cause != "owner-dead":
            last.end()


def test_a_stranger_gets_nothing(host):
    """While one sandbox has the port and the next stands by, another container is refused, whoever goes meanwhile."""
    last, following = two()
    host.add(last, following)

    def wait_for_the_last() -> None:
        wait = Kernel.wait_for
        Kernel.wait_for = lambda kernel, owner, seconds: \
            wait(kernel, owner, 60 if owner.chain == last.chain else seconds)
    stranger = lab.start_fork("ADD", Pod("stranger", "8080:80"), prepare=wait_for_the_last)
    host.delete(last)
    reply = stranger.answer()
    assert reply.code == 101 and "container next" in reply.msg and leads_to(following)


def test_the_next_one_goes_first(host):
    """The next sandbox fails to start, and the one after it stands by; notes of those that failed do not pile up."""
    last, following = two()
    host.add(last, following)
    host.delete(following)
    assert leads_to(last) and lab.chains() == [last.chain]
    third = Sandbox("third", "8080:80", number=4)
    host.add(third)
    comments = Kernel().comments(last.chain)
    assert comments.count("also on eth0 of third") == 1 and "also on eth0 of next" not in comments
    assert checks(host, last, third) == [0, 0]
    host.delete(last)
    assert leads_to(third)


def test_it_comes_again(host):
    """The same sandbox is removed and added again, as by restore: it still is noted."""
    last, following = two()
    host.add(last, following)
    before = lab.state()
    host.delete(following)
    host.add(following)
    assert lab.state() == before
    host.delete(last)
    assert leads_to(following)


def test_the_newest_inherits(host):
    """Of two that stand by the newest gets the port; the other one stands by for that."""
    last, following = two()
    third = Sandbox("third", "8080:80", number=4)
    host.add(last, following, third)
    host.delete(last)
    assert leads_to(third) and checks(host, following, third) == [0, 0]
    host.delete(third)
    assert leads_to(following) and checks(host, following) == [0]


@pytest.mark.parametrize("who", ["DEL", "gc", "GC", "third"])
@pytest.mark.parametrize("newest_is_dead", [True, False])
def test_a_dead_one_inherits_last(host, who, newest_is_dead):
    """One that stands by has died, and another lives: that gets the port, which is never without an answer."""
    last, following = two()
    third = Sandbox("third", "8080:80", number=4)
    host.add(last, following, third)
    dead, alive = (third, following) if newest_is_dead else (following, third)
    dead.end()
    if who == "DEL":
        host.delete(last)
    elif who == "GC":
        assert not host.call("GC", GcCall("net", following, third)).code
    else:
        last.end()
        if who == "gc":
            prune(Kernel())
        else:
            host.add(Sandbox("fourth", "8080:80", number=5))
    assert leads_to(alive) and checks(host, dead, alive) == [104, 0]


@pytest.mark.parametrize("who", ["gc", "GC", "next", "third", "stranger"])
@pytest.mark.parametrize("has_link", [True, False])
def test_the_last_one_dies(host, who, has_link):
    """No DEL comes: CHECK of the next one says so, and whoever comes along hands the port over to it."""
    last, following = two()
    host.add(last, following)
    last.end(None if has_link else host)
    reply = host.call("CHECK", following)
    assert reply.code == 104 and last.chain in reply.msg
    if who == "gc":
        prune(Kernel())
    elif who == "GC":
        assert not host.call("GC", GcCall("net", following)).code
    elif who == "stranger":
        reply = host.call("ADD", Pod("stranger", "8080:80"))
        assert reply.code == 101 and "container next" in reply.msg
    else:
        host.add(following if who == "next" else Sandbox("third", "8080:80", number=4))
    assert leads_to(following) and last.chain not in lab.chains() and checks(host, following) == [0]
    host.delete(last)
    assert leads_to(following)


def test_both_die(host):
    """A stranger takes over from a pod of which nothing lives any more."""
    last, following = two()
    host.add(last, following)
    last.end()
    following.end()
    stranger = Pod("stranger", "8080:80")
    host.add(stranger)
    assert leads_to(stranger) and lab.chains() == [stranger.chain]


@pytest.mark.parametrize("old, new, before, after", [
    ("8080:80", "192.0.2.1:8080:80", "last", "next"), ("192.0.2.1:8080:80", "8080:80", "last", "next"),
    ("192.0.2.1:8080:80", "127.0.0.1:8080:80", "last", None)])
def test_another_address(host, old, new, before, after):
    """The edit changes the port's address: what both claim is never without an answer."""
    client = lab.wire("client", ("192.0.2.1/24",), ("192.0.2.2/24",))
    last, following = Sandbox("last", old), Sandbox("next", new, number=3)
    with lab.Server("last", last.wire, 80), lab.Server("next", following.wire, 80):
        host.add(last)
        answer = lab.exchange(client, "192.0.2.1", 8080)
        assert answer and answer.server == before
        host.add(following)
        assert lab.exchange(client, "192.0.2.1", 8080)
        assert checks(host, following) == [0]
        host.delete(last)
        answer = lab.exchange(client, "192.0.2.1", 8080, timeout=lab.patience(after))
        assert (answer.server if answer else None) == after
    assert checks(host, following) == [0]


@pytest.mark.parametrize("verb", ["ADD", "DEL"])
def test_killed_anywhere(host, verb):
    """The ADD that stands by, and the DEL that hands over, are all or nothing, killed at any system call."""
    last, following = two()
    host.add(last)
    if verb == "DEL":
        host.add(following)
    who, call_again = (following, host.add) if verb == "ADD" else (last, host.delete)
    before = after = lab.state()
    instant = 0
    while after == before:
        assert leads_to(last)
        lab.start_fork(verb, who, stop_at=instant).answer()
        after, instant = lab.state(), instant + 1
    assert instant > 10 and leads_to(last if verb == "ADD" else following)
    call_again(who)
    assert lab.state() == after


@pytest.mark.parametrize("damage", ["flush ruleset", f"flush chain {TABLE} c/last/eth0",
                                    f"flush chain {TABLE} c/next/eth0",
                                    f"delete element {TABLE} hostports {{ ipv4 . tcp . 8080 }}"])
def test_restore(host, tmp_path, damage):
    """Both live when everything is lost: the port comes back to the one that had it, and the other one stands by."""
    cache = Cache(tmp_path)
    last, following = two()
    for pod in last, following:
        host.add(pod)
        cache.write(pod)
    before = lab.state()
    lab.nft_script(damage)
    assert cache.restore(host)["refused"] == []
    assert lab.state() == before and not cache.restore(host)["restored"]
    assert leads_to(last) and checks(host, last, following) == [0, 0]
    host.delete(last)
    assert leads_to(following)


def test_restore_of_several(host, tmp_path):
    """The chains of two that stand by are deleted: both come back, and both stand by."""
    cache = Cache(tmp_path)
    last, following = two()
    third = Sandbox("third", "8080:80", number=4)
    for pod in last, following, third:
        host.add(pod)
        cache.write(pod)
    before = lab.state()
    lab.nft_script(*(f"delete chain {TABLE} {pod.chain}" for pod in (following, third)))
    cache.restore(host)
    assert sorted(lab.state()) == sorted(before) and checks(host, last, following, third) == [0, 0, 0]


@pytest.mark.parametrize("has_link", [True, False])
@pytest.mark.parametrize("damage", ["", f"flush chain {TABLE} c/next/eth0"])
def test_restore_beside_one_that_died(host, tmp_path, has_link, damage):
    """The last sandbox died: restore gives what it left to the next one, as gc does, and says so; so would a dry run.
    """
    cache = Cache(tmp_path)
    last, following = two()
    host.add(last, following)
    cache.write(following)
    last.end(None if has_link else host)
    lab.nft_script(damage)
    dead = lab.state()
    would = cache.restore(host, "--dry-run")
    assert [each["container"] for each in would["restored"]] == ["next"] and lab.state() == dead
    assert cache.restore(host) == would
    assert leads_to(following) and last.chain not in lab.chains() and checks(host, following) == [0]
    assert cache.restore(host)["in_place"] == 1


def test_restore_where_the_dead_cannot_go(host, tmp_path):
    """Somebody's rule holds what a dead sandbox has left: the next one is refused, and all the others come back."""
    cache = Cache(tmp_path)
    last, following = two()
    other = Pod("other", "9090:80", ips=("10.20.9.2/24",))
    host.add(last, following, other)
    for pod in following, other:
        cache.write(pod)
    last.end()
    lab.nft_script(f"add chain {TABLE} foreign", f"add rule {TABLE} foreign jump {last.chain}",
                   f"delete element {TABLE} hostports {{ ipv4 . tcp . 9090 }}", f"delete chain {TABLE} {other.chain}")
    report = cache.restore(host, status=1)
    assert [each["container"] for each in report["refused"]] == ["next"] and checks(host, other) == [0]


def test_exposure(host):
    """A policy is that of each sandbox's own address; where both have one address, the next one's is in force."""
    last = Sandbox("last", "8080:80", gatewayModeV4="nat")
    following = Sandbox("next", "8080:80", number=3, gatewayModeV4="nat")
    host.add(last, following)
    listed = json.loads(host.command("list", "--exposure", "--json"))
    assert {each["container_id"]: each["complete"] for each in listed} == {"last": True, "next": True}
    assert checks(host, last, following) == [0, 0]
    host.delete(last)
    assert checks(host, following) == [0]
    again = Pod("again", "8080:80", ips=following.ips, args=following.args, gatewayModeV4="nat")
    host.add(again)
    assert checks(host, again) == [0]
    host.delete(following)
    assert checks(host, again) == [0] and leads_to(again)


# --- what an attack has found --------------------------------------------------------------------------------------

@pytest.mark.parametrize("ports", [("8080:80", "192.0.2.1:8080:81"),
                                   ("[::]:8080:80", "8080:80", "127.0.0.1:8080:81")])
def test_every_address_and_one(host, ports):
    """A pod has a port on every address, and another on one of them: the next sandbox gets both."""
    client = lab.wire("client", ("198.51.100.1/24",), ("198.51.100.2/24",))
    lab.wire("other", ("192.0.2.1/24",), ("192.0.2.2/24",))
    last, following = Sandbox("last", *ports), Sandbox("next", *ports, number=3)
    with lab.Server("last", last.wire, 80), lab.Server("next", following.wire, 80):
        host.add(last, following)
        assert lab.exchange(client, "198.51.100.1", 8080) == lab.Saw("last", "198.51.100.2", 80)
        host.delete(last)
        assert lab.exchange(client, "198.51.100.1", 8080) == lab.Saw("next", "198.51.100.2", 80)
    assert checks(host, following) == [0]


def test_every_address_and_one_on_two_networks(host):
    """So does the second network of a container, when it leaves the first."""
    ports = "8080:80", "127.0.0.1:8080:81"
    first, second = Pod("web", *ports), Pod("web", *ports, ips=("10.21.0.2/24",), ifname="eth1", network="b")
    host.add(first, second)
    host.delete(first)
    assert len(lab.elements()) == 2 and checks(host, second) == [0]


def test_restore_of_a_rule_beside_a_note(host, tmp_path):
    """`restore` sees that the last sandbox lacks a rule: a note of who stands by does not count as one."""
    cache = Cache(tmp_path)
    last, following = two()
    for pod in last, following:
        host.add(pod)
        cache.write(pod)
    rules = json.loads(lab.nft("-a", "-j", "list", "chain", *TABLE.split(), last.chain))["nftables"]
    handle, = (rule["rule"]["handle"] for rule in rules if "dnat" in str(rule.get("rule")))
    lab.nft_script(f"delete rule {TABLE} {last.chain} handle {handle}")
    cache.restore(host)
    assert checks(host, last, following) == [0, 0]


def test_refused_in_another_port(host):
    """An ADD that is refused does not say that it will take over."""
    host.add(Sandbox("last", "8080:80"), Sandbox("stranger", "9090:80", number=4, args=""))
    reply = host.call("ADD", Sandbox("next", "8080:80", "9090:90", number=3))
    assert reply.code == 101 and "will take over" not in reply.stderr
