"""An ADD that replaces, the attachment's own rules or a dead owner's: one transaction, which no one else pays for."""

import lab
import pytest
from lab import TABLE, Pod

from cni_portmap import ruleset
from cni_portmap.linux.kernel import Kernel
from cni_portmap.verbs import steps

BOTH = "10.20.0.2/24", "fd20::2/64"
PODS = {
    "nothing special": Pod("web", "8080:80", "127.0.0.1:7070:70/udp", "[fd20::9]:53:53/sctp", ips=BOTH),
    "ranges and many": Pod("web", *(f"{port}:{port}" for port in range(9000, 9100)),
                           *(f"{port}:{port - 900}" for port in range(1000, 1100)), ips=BOTH),
    "conditions": Pod("web", "8080:80", ips=BOTH, conditionsV4=["! -s 10.0.0.0/8 -i eth+"],
                      conditionsV6=['ct state new meta mark & 0xff != 0x1']),
    "conditions with sets": Pod("web", "8080:80", "8081:81", ips=BOTH,
                                conditionsV4=["-s 10.0.0.0/8,192.168.0.0/16,192.0.2.1"],
                                conditionsV6=["ip6 saddr . tcp sport { fd00::1 . 1024, fd00::2 . 1025-2048 }"]),
    "an interface by its index": Pod("web", "8080:80", ips=BOTH, conditionsV4=['iif != "to-web"'],
                                     conditionsV6=["iif {lo, to-web } oifname != to-web"]),
    "a map of ports": Pod("web", *(f"{port}:{port + 1}/udp" for port in range(1, 1500)), "0.0.0.0:5000:1", ips=BOTH),
    "many addresses": Pod("web", "8080:80", *(f"192.0.2.{n}:8081:{80 + n}" for n in range(1, 120)),
                          *(f"[2001:db8::{n:x}]:8081:8081/udp" for n in range(1, 120)), "192.0.2.1:7000:7000",
                          ips=BOTH),
    "everybody is masqueraded": Pod("web", "8080:80", ips=BOTH, masqAll=True, markMasqBit=7),
}


@pytest.mark.parametrize("name", PODS)
@pytest.mark.parametrize("how", ["again", "takeover"])
def test_it_is_what_a_first_add_writes(host, name, how):
    """The rules that come in place of others are those of a first ADD, though another way leads there."""
    lab.wire("web", ("10.20.0.1/24", "fd20::1/64"), BOTH)
    host.add(Pod("other", "1:1"), PODS[name])
    first = lab.state(), sorted(lab.nft("-s", "list", "table", *TABLE.split()).split())
    host.delete(PODS[name])
    if how == "again":
        host.add(PODS[name].but("8080:8080", "5:5"))
    else:
        lab.add_veth("dead0", "dead1")
        host.add(Pod("dead", "8080:80", "9000:1", "1001:1001/udp", ips=BOTH, link="dead0"))
        lab.delete_link("dead0")
    host.add(PODS[name])
    assert (lab.state(), sorted(lab.nft("-s", "list", "table", *TABLE.split()).split())) == first
    assert not host.call("CHECK", PODS[name]).code
    host.delete(PODS[name])
    assert lab.chains() == ["c/other/eth0"]


def handles(kind, *name):
    """Each line of a listing that has a handle -> that."""
    lines = lab.nft("-s", "-a", "list", kind, *TABLE.split(), *name).splitlines()
    return dict(line.strip().split(" # handle ") for line in lines if " # handle " in line)


SHIFTED = [f"{8000 + n}:{80 + n}/udp" for n in range(20)]


@pytest.mark.parametrize("before, after", [(["8080:80"], ["8080:80", "9090:80/udp", "9000:9000"]),
                                           (["8080:80", "9000:9000"], ["1:1/udp", "8080:80"]),
                                           (SHIFTED, ["8080:80", *SHIFTED[:-1], "8999:80/udp"]),
                                           ([f"192.0.2.{n}:53:{80 + n}/udp" for n in range(1, 120)],
                                            [f"192.0.2.{n}:53:{80 + n}/udp" for n in range(2, 121)])])
def test_what_is_the_same_stays(host, before, after):
    """What is published again keeps its chain, the rules that are the same, with their sets, and its map of ports.

    A new chain is empty for a packet that looks a port up while the transaction is committed: the kernel shows it the
    rules of before. So is a map that is deleted, and the set of a new rule may be. It is one of some 200,000 packets,
    but a UDP flow that begins so never reaches the container. The record is new: its handle says that the owner came.
    """
    conditions = {"conditionsV4": ["-s 10.0.0.0/8,192.0.2.0/24"]}
    lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
    pods = [Pod("web", *ports, **conditions) for ports in (before, after)]
    host.add(pods[1])
    wanted = lab.state()
    host.delete(pods[1])
    host.add(pods[0])
    old = handles("chain", "c/web/eth0")
    maps = {line: its for line, its in handles("table").items() if "map c/" in line}
    host.add(pods[1])
    new = handles("chain", "c/web/eth0")
    assert lab.state() == wanted and not host.call("CHECK", pods[1]).code
    rules = [line for line in new if "comment" not in line]
    assert {line: new[line] for line in rules if line in old} == {line: old[line] for line in rules if line in old}
    assert any("saddr {" in line and line in old for line in rules)
    assert not {*old.values()} & {handle for line, handle in new.items() if "comment" in line}
    assert maps == {line: its for line, its in handles("table").items() if "map c/" in line}
    assert bool(maps) == (len(before) > 10)


@pytest.mark.parametrize("damage", [f"delete element {TABLE} hostports {{ ipv4 . tcp . 8080 }}",
                                    f"flush map {TABLE} hostports\ndelete chain {TABLE} c/web/eth0"])
def test_what_stays_is_there(host, damage):
    """Also where somebody deletes it between reading and writing: the same transaction adds it."""
    lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
    pod = Pod("web", "8080:80", "9090:90")
    host.add(pod)
    before = lab.elements()
    kernel, change = Kernel(), ruleset.Change()
    owned = kernel.owned_elements([pod.chain])
    steps.detach(change, [pod.chain], owned, (), kernel)
    change.rules[pod.chain] = ruleset.created(pod.chain, ['counter comment "other"'])
    change.leads |= owned
    lab.nft_script(damage)
    assert kernel.write(change)
    assert lab.elements() == before and "other" in lab.table()


def test_a_client_notices_nothing(host):
    """A port answers at each instant of 40 repeated ADDs: each is one transaction."""
    where = lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
    client = lab.wire("client", ("192.0.2.1/24",), ("192.0.2.2/24",))
    lab.sysctl("net.ipv4.ip_forward", 1)
    pods = Pod("web", "8080:80"), Pod("web", "8080:80", "9090:80/udp", "9000:9000")
    host.add(pods[0])
    with lab.Server("web", where, 80), lab.connecting(client, 8080, "192.0.2.1"):
        for index in range(40):
            host.add(pods[index % 2])


# --- the map of many ports under other numbers ------------------------------------------------------------------

MANY = Pod("web", *(f"{8000 + n}:{80 + n}" for n in range(20)))


@pytest.mark.parametrize("damage", [
    f"delete element {TABLE} {MANY.chain}/1 {{ 8003 }}", f"flush map {TABLE} {MANY.chain}/1",
    f"flush chain {TABLE} {MANY.chain}",
    f"flush map {TABLE} hostports\ndelete chain {TABLE} {MANY.chain}"], ids=["an element", "the map", "rules", "chain"])
@pytest.mark.parametrize("heal", ["ADD", "DEL"])
def test_a_damaged_map_of_ports(host, damage, heal):
    """CHECK notices it, the next ADD writes it again, and DEL leaves none where there is still a chain."""
    host.add(MANY)
    whole = lab.state()
    assert not host.call("CHECK", MANY).code
    lab.nft_script(damage)
    assert host.call("CHECK", MANY).code == 104
    if heal == "DEL":
        host.delete(MANY)
        assert f"{MANY.chain}/1" not in lab.table() or "delete chain" in damage
    host.add(MANY)
    assert lab.state() == whole and not host.call("CHECK", MANY).code
    host.delete(MANY)
    assert MANY.chain not in lab.table()


def test_both_families_and_protocols_share_a_map(host):
    """It has each port once; a map with other ports is another."""
    host.add(Pod("web", *(f"{port}:{port + 1}/{protocol}" for port in range(1, 20) for protocol in ("tcp", "udp")),
                 *(f"127.0.0.1:{port}:{port + 2}/sctp" for port in range(30, 50)), ips=BOTH))
    text = lab.table()
    assert [text.count(f"map c/web/eth0/{number} {{") for number in (1, 2, 3)] == [1, 1, 0]
    assert [text.count(f"dport map @c/web/eth0/{number}\n") for number in (1, 2)] == [1, 4]


@pytest.mark.parametrize("family", [4, 6])
def test_ports_of_many_addresses_lead_to_their_own(host, family):
    """More than a hundred addresses share a map, by address and port; others of the host have what is everybody's."""
    prefix = {4: "192.0.2.", 6: "2001:db8::"}[family]
    ips = [f"{prefix}{n}" for n in range(1, 121)]
    where = lab.wire("web", ("10.20.0.1/24", "fd20::1/64"), BOTH)
    client = lab.wire("client", ("198.51.100.1/24", "2001:db8:1::1/64"), ("198.51.100.2/24", "2001:db8:1::2/64"))
    lab.add_addresses("to-client", *(f"{ip}/{32 if family == 4 else 128}" for ip in ips))
    shown = [f"[{ip}]" if family == 6 else ip for ip in ips]
    pod = Pod("web", *(f"{ip}:8080:{8000 + n}" for n, ip in enumerate(shown)), "9000:90", ips=BOTH)
    host.add(pod)
    assert not host.call("CHECK", pod).code and lab.table().count(" dnat ip") == 3
    for n, ip in (0, ips[0]), (119, ips[119]):
        with lab.Server("web", where, 8000 + n), lab.Server("other", where, 8060):
            assert lab.exchange(client, ip, 8080).port == 8000 + n
    with lab.Server("web", where, 90), lab.Server("host", lab.HOST, 8080):
        assert lab.exchange(client, ips[3], 9000).port == 90
        assert lab.exchange(client, {4: "198.51.100.1", 6: "2001:db8:1::1"}[family], 8080).server == "host"
    assert host.command("list").count(":8080/tcp") == 120
    host.add(pod)
    host.delete(pod)
    assert pod.chain not in lab.table()
