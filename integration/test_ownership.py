"""One owner for each host port: who is refused, who is replaced, and who is left alone."""
import pathlib
import socket

import lab
import pytest
from cni_portmap import ruleset
from cni_portmap.linux.kernel import Kernel
from lab import Pod

BOTH = "10.20.0.2/24", "fd20::2/64"
ONLY_V6 = ("fd20::2/64",)


# --- who conflicts --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("first", "second", "who"), [
    ("8080:80", "8080:81", "tcp port 8080 on "),
    ("8080:80/udp", "8080:80/udp", "udp port 8080 on "),
    ("8080:80/sctp", "8080:80/sctp", "sctp port 8080 on "),
    ("8080:80", "192.0.2.1:8080:80", "tcp port 8080 on 192.0.2.1"),
    ("192.0.2.1:8080:80", "8080:80", "tcp port 8080 on 0.0.0.0"),
    ("0.0.0.0:8080:80", "127.0.0.1:8080:80", "tcp port 8080 on 127.0.0.1"),
    ("192.0.2.1:8080:80", "192.0.2.1:8080:80", "tcp port 8080 on 192.0.2.1"),
    ("[::]:8080:80", "[2001:db8::1]:8080:80", "tcp port 8080 on 2001:db8::1"),
    ("[2001:db8::1]:8080:80", "[::]:8080:80", "tcp port 8080 on ::"),
    ("[::1]:8080:80/udp", "8080:80/udp", "udp port 8080 on ::"),
    ("192.0.2.1:8080:80", "[::ffff:192.0.2.1]:8080:80", "tcp port 8080 on 192.0.2.1"),
])
def test_second_claim(host, first, second, who):
    """A port that overlaps with another container's is refused, by name, before anything is written."""
    owner = Pod("first", first, ips=BOTH, network="blue", ifname="net7")
    host.add(owner)
    before, generation = lab.state(), lab.generation()
    reply = host.call("ADD", Pod("second", "7070:70", second, ips=BOTH, network="red"))
    assert reply.code == 101
    assert who in reply.msg and "container first, interface net7, network blue" in reply.msg
    assert lab.state() == before and lab.generation() == generation
    assert not host.call("CHECK", owner).code
    host.delete(owner)
    host.add(Pod("second", "7070:70", second, ips=BOTH, network="red"))


@pytest.mark.parametrize(("first", "second"), [
    ("8080:80", "8081:80"),
    ("8080:80", "8080:80/udp"),
    ("8080:80/udp", "8080:80/sctp"),
    ("192.0.2.1:8080:80", "192.0.2.2:8080:80"),
    ("192.0.2.1:8080:80", "127.0.0.1:8080:80"),
    ("0.0.0.0:8080:80", "[::]:8080:80"),
    ("192.0.2.1:8080:80", "[::]:8080:80"),
    ("0.0.0.0:8080:80", "[2001:db8::1]:8080:80"),
])
def test_no_conflict(host, first, second):
    """Ports, protocols, families and specific addresses that differ do not conflict."""
    pods = Pod("first", first, ips=BOTH), Pod("second", second, ips=BOTH)
    host.add(*pods)
    for pod in pods:
        assert not host.call("CHECK", pod).code
    assert {*lab.elements().values()} == {pod.chain for pod in pods}


def test_a_family_that_a_container_lacks_is_free(host):
    """A container publishes in its own families only, so one with IPv4 and one with IPv6 can share a port."""
    host.add(Pod("four", "8080:80"), Pod("six", "8080:80", ips=ONLY_V6))
    assert lab.elements() == {("ipv4", "tcp", "8080"): "c/four/eth0", ("ipv6", "tcp", "8080"): "c/six/eth0"}


@pytest.mark.parametrize("name", ["x" * 300, "a.b-c_d", "7" * 64])
@pytest.mark.parametrize("ifname", ["eth0", "a@b+c~d=e,f"])
def test_names_that_nft_cannot_hold(host, name, ifname):
    """An owner is named in full, however long its names are and whatever they contain, and can leave."""
    owner = Pod(name, "8080:80", ifname=ifname, network="n" * 200)
    host.add(owner)
    reply = host.call("ADD", Pod("second", "8080:80"))
    assert reply.code == 101
    assert f"container {name}, interface {ifname}, network {'n' * 200}" in reply.msg
    host.delete(owner)
    assert not lab.chains()


# --- who is dead ----------------------------------------------------------------------------------------------

def _gone(namespace: lab.Namespace) -> None:
    namespace.remove()


def _another_namespace(namespace: lab.Namespace) -> None:
    another = lab.Namespace("another")  # made before, or the kernel might give the same inode again
    namespace.remove()
    pathlib.Path(namespace.path).touch()
    lab.run("mount", "--bind", another.path, namespace.path)


def _unmounted(namespace: lab.Namespace) -> None:
    lab.run("umount", namespace.path)  # leaves an empty file


def _replaced_by_a_folder(namespace: lab.Namespace) -> None:
    namespace.remove()
    pathlib.Path(namespace.path).mkdir()


@pytest.mark.parametrize("die", [_gone, _another_namespace, _unmounted, _replaced_by_a_folder])
@pytest.mark.parametrize("port", ["8080:80", "192.0.2.1:8080:80"])
def test_dead_owner_gives_way(host, die, port):
    """A claim on one port of a dead container removes all that it owned, in the same transaction."""
    namespace = lab.Namespace("dead")
    dead = Pod("dead", "8080:80", "9090:90/udp", "127.0.0.1:7070:70")
    bystander = Pod("bystander", "1000:80")
    host.add(bystander)
    host.add_for_nobody(dead)
    die(namespace)
    generation = lab.generation()
    heir = Pod("heir", port)
    host.add(heir)
    assert lab.generation() == generation + 1
    assert {*lab.elements().values()} == {heir.chain, bystander.chain}
    assert lab.chains() == [bystander.chain, heir.chain]
    after = lab.state()
    host.delete(dead)  # comes late
    host.delete(dead)
    assert lab.state() == after
    for pod in heir, bystander:
        assert not host.call("CHECK", pod).code


def test_dead_owners_are_many(host):
    """One claim can replace several dead owners, and only those whose ports it claims."""
    dead = [Pod(f"dead{i}", f"192.0.2.{i}:8080:80", f"{9000 + i}:80", netns="/run/netns/dead") for i in range(1, 4)]
    namespace = lab.Namespace("dead")
    other = Pod("other", "7070:70", netns="/run/netns/dead")
    host.add_for_nobody(*dead, other)
    namespace.remove()
    generation = lab.generation()
    host.add(Pod("heir", "8080:80"))
    assert lab.generation() == generation + 1
    assert lab.chains() == ["c/heir/eth0", "c/other/eth0"]


def test_one_living_owner_protects_the_dead(host):
    """A claim that a living owner refuses does not remove a dead one."""
    namespace = lab.Namespace("dead")
    host.add_for_nobody(Pod("dead", "8080:80"))
    host.add(Pod("alive", "9090:90"))
    namespace.remove()
    before = lab.state()
    assert host.call("ADD", Pod("heir", "8080:80", "9090:90")).code == 101
    assert lab.state() == before


def test_unknown_namespace_is_alive(host):
    """An owner whose namespace could not be seen when it came is alive while its path cannot be followed."""
    first = Pod("first", "8080:80", netns="/run/loop", gone=True)
    loop = pathlib.Path(first.netns)
    loop.symlink_to(loop)
    host.add(first)
    assert host.call("ADD", Pod("second", "8080:80")).code == 101
    loop.unlink()
    host.add(Pod("second", "8080:80"))


def test_unreadable_namespace_is_alive(host):
    """An owner whose namespace's path cannot be followed is alive for as long as its namespace is found elsewhere."""
    path, elsewhere = pathlib.Path(lab.Namespace("first").path), pathlib.Path("/run/elsewhere")
    host.add(Pod("first", "8080:80"))
    elsewhere.touch()
    lab.run("mount", "--bind", path, elsewhere)
    lab.run("umount", path)
    path.unlink()
    path.symlink_to(path)
    assert host.call("ADD", Pod("second", "8080:80")).code == 101


def test_owner_without_a_record_is_alive(host):
    """An owner whose record somebody removed is alive, is named as far as it is known, and can leave or come again."""
    first = Pod("first", "8080:80")
    host.add(first)
    lab.nft_script(f"flush chain {lab.TABLE} {first.chain}")
    reply = host.call("ADD", Pod("second", "8080:80"))
    assert reply.code == 101 and "container first, interface eth0, network unknown" in reply.msg
    host.add(first)
    assert not host.call("CHECK", first).code
    host.delete(first)
    host.add(Pod("second", "8080:80"))


def test_dead_sibling_gives_way(host):
    """A stale claim of the same container on another interface does not keep the port."""
    namespace = lab.Namespace("old")
    host.add_for_nobody(Pod("web", "8080:80", ifname="eth0", netns="/run/netns/old"))
    namespace.remove()
    lab.Namespace("new")
    reborn = Pod("web", "8080:80", ifname="net1", netns="/run/netns/new", ips=("10.20.0.3/24",))
    host.add(reborn)
    assert lab.elements() == {("ipv4", "tcp", "8080"): reborn.chain}


@pytest.mark.parametrize("order", [("eth0", "eth1"), ("eth1", "eth0")])
def test_dead_container_on_two_networks(host, order):
    """A port that a dead container published on two networks goes from both, where it overlaps with the claim."""
    namespace = lab.Namespace("dead")
    host.add_for_nobody(*(Pod("dead", "8080:80", "9090:90", ifname=ifname, network=ifname) for ifname in order))
    namespace.remove()
    heir = Pod("heir", "192.0.2.1:8080:80")
    host.add(heir)
    assert lab.elements() == {("192.0.2.1", "tcp", "8080"): heir.chain} | \
        {element: chain for element, chain in lab.elements().items() if element[2] == "9090"}
    assert not host.call("CHECK", heir).code
    host.add(Pod("second", "9090:80", "192.0.2.2:8080:80"))


# --- who is left alone ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("late", ["DEL", "GC"])
@pytest.mark.parametrize("port", ["8080:80", "9090:80"])
def test_address_used_again(host, late, port):
    """A-B-A: the late end of a container takes nothing from the next one with its address, on its port or another."""
    namespace = lab.Namespace("old")
    old, new = Pod("old", "8080:80", "7070:70"), Pod("new", port)
    host.add_for_nobody(old)
    namespace.remove()
    host.add(new)
    if late == "DEL":
        host.delete(old)
    else:
        assert not host.call("GC", lab.GcCall("net", new)).code
    assert {*lab.elements().values()} == {new.chain} and lab.chains() == [new.chain]
    assert not host.call("CHECK", new).code


def test_same_attachment_again(host):
    """ADD again with other ports replaces all of the old ones, in one transaction."""
    host.add(Pod("web", "8080:80", "9090:90/udp"))
    generation = lab.generation()
    host.add(Pod("web", "8080:81", "127.0.0.1:7070:70"))
    assert lab.generation() == generation + 1
    assert {key[2] for key in lab.elements()} == {"8080", "7070"}


def test_attachments_of_one_container(host):
    """A container's attachments to several networks come, are collected and go separately."""
    lan, backup, storage = (Pod("web", f"{port}:80", ifname=ifname, network=network, ips=(ip,)) for
                            port, ifname, network, ip in (("8080", "eth0", "lan", "10.20.0.2/24"),
                                                          ("8081", "net1", "backup", "10.21.0.2/24"),
                                                          ("8082", "net2", "storage", "10.22.0.2/24")))
    host.add(lan, backup, storage)
    host.delete(backup)
    assert lab.chains() == [lan.chain, storage.chain]
    host.delete(backup)
    assert not host.call("GC", lab.GcCall("lan")).code
    assert lab.chains() == [storage.chain]
    assert not host.call("CHECK", storage).code


def test_one_port_on_two_networks(host):
    """A container that publishes one port on two networks (podman) keeps it until its last attachment leaves."""
    first = Pod("web", "8080:80", ifname="eth0", network="lan", ips=("10.20.0.2/24",))
    second = Pod("web", "8080:80", ifname="eth1", network="wan", ips=("10.21.0.2/24",))
    for early, late in (first, second), (second, first):
        host.add(first, second)
        for pod in first, second:
            assert not host.call("CHECK", pod).code
        assert host.call("ADD", Pod("other", "8080:80")).code == 101
        host.delete(early)
        assert lab.elements() == {("ipv4", "tcp", "8080"): late.chain}
        assert not host.call("CHECK", late).code
        host.delete(late)
        assert not lab.elements() and not lab.chains()


def test_heir_of_another_address(host):
    """An attachment inherits only what it publishes itself, not all addresses where it has one."""
    lan = Pod("web", "0.0.0.0:8080:80", ifname="eth0", network="lan")
    wan = Pod("web", "0.0.0.0:8080:80", ifname="eth1", network="wan", ips=("10.21.0.2/24",))
    host.add(wan, lan, lan.but("127.0.0.1:8080:80"))
    host.delete(wan)
    assert lab.elements() == {("127.0.0.1", "tcp", "8080"): lan.chain}
    assert not host.call("CHECK", lan.but("127.0.0.1:8080:80")).code


def test_heirs_stand_by_for_one_another(host):
    """The first of three leaves: the second gets its port, with a note that the third stands by, as ADD writes it."""
    pods = [Pod("web", "8080:80", ifname=f"eth{index}", network=f"net{index}", ips=(f"10.2{index}.0.2/24",))
            for index in range(3)]
    host.add(*pods)
    host.delete(pods[0])
    assert lab.elements() == {("ipv4", "tcp", "8080"): pods[1].chain}
    lab.nft_script(ruleset.standby_note(pods[1].chain, "eth2"))
    ours, theirs = (rule[:3] for rule in Kernel().rules(pods[1].chain)[-2:])
    assert ours == theirs and ours[1] == "also on eth2"
    host.delete(pods[1])
    assert lab.elements() == {("ipv4", "tcp", "8080"): pods[2].chain}


def test_many_ports_leave_at_once(host):
    """What is removed may be larger than a socket sends by itself (net.core.wmem_default); it is one transaction."""
    many = Pod("many", *(f"{port}:{port}" for port in range(1001, 11001)))
    host.add(many)
    before = lab.generation()
    host.delete(many)
    assert not lab.chains() and not lab.elements() and lab.generation() == before + 1


# --- processes of the host ------------------------------------------------------------------------------------

@pytest.mark.parametrize(("listener", "port", "refused"), [
    (("0.0.0.0", "tcp"), "8080:80", True),
    (("::", "tcp"), "8080:80", True),  # dual stack
    (("127.0.0.1", "tcp"), "8080:80", True),
    (("127.0.0.1", "tcp"), "127.0.0.1:8080:80", True),
    (("::1", "tcp"), "[::1]:8080:80", True),
    (("0.0.0.0", "udp"), "8080:80/udp", True),
    (("127.0.0.1", "tcp"), "192.0.2.1:8080:80", False),
    (("0.0.0.0", "udp"), "8080:80", False),
    (("0.0.0.0", "tcp"), "8081:80", False),
    (("::1", "tcp"), "0.0.0.0:8080:80", False),
])
def test_host_port_in_use(host, listener, port, refused):
    """With hostPortInUse: refuse, a port that a process of the host uses is refused with code 102; else it is not."""
    ip, protocol = listener
    careful = Pod("careful", port, ips=BOTH, hostPortInUse="refuse")
    lab.add_addresses("lo", "192.0.2.1")
    with socket.socket(lab.family_of(ip), lab.KINDS[protocol]) as process:
        process.bind((ip, 8080))
        if protocol == "tcp":
            process.listen()
        before = lab.state()
        reply = host.call("ADD", careful)
        if refused:
            assert reply.code == 102 and f"{protocol} port 8080 on " in reply.msg
            assert lab.state() == before
            host.add(Pod("easy", port, ips=BOTH))  # the default
            host.delete(Pod("easy"))
        else:
            assert not reply.code
    host.add(careful)
    host.add(careful)  # its own published port is no process
