"""A table of cni-portmap 0.1 lives on under this version: maps declared with `type`, a map in a rule for many ports."""
import re
from collections.abc import Iterator

import lab
import pytest
from lab import TABLE, GcCall, Host, Pod

MANY = Pod("many", *(f"{8000 + n}:{80 + n}" for n in range(9)), "443:443", conditionsV4=["ip saddr 10.0.0.0/8"])
ON_ADDRESSES = Pod("specific", "192.0.2.1:7080:80", "[::1]:7080:80/udp", ips=("10.20.0.3/24", "fd20::3/64"))
TYPES = {"meta nfproto": "nf_proto", "ip daddr": "ipv4_addr", "ip6 daddr": "ipv6_addr"}
SHIFTED = re.compile(r"\n\s*(?P<match>[^\n]* tcp dport) (80\d\d)(?P<to> counter [^\n]* to [0-9.]+):(\d+)(?=\n)")


def as_of_0_1(table: str) -> str:
    """A listing as 0.1 would have written it."""
    table, maps = re.subn(r"typeof ((?:meta nfproto|ip6? daddr)) \. meta l4proto \. th dport",
                          lambda found: f"type {TYPES[found[1]]} . inet_proto . inet_service", table)
    rules = [*SHIFTED.finditer(table)]
    pairs = {rule[2]: rule[4] for rule in rules}
    one = f"{rules[0]['match']} {{ {', '.join(pairs)} }}{rules[0]['to']}:tcp dport map " \
          f"{{ {', '.join(f'{host} : {container}' for host, container in pairs.items())} }}"
    assert (maps, len(pairs)) == (3, len(MANY.ports) - 1)
    return SHIFTED.sub("", table.replace(rules[0][0], f"\n{one}"))


@pytest.fixture
def old(bin_dir, each_bin_dir) -> Iterator[Host]:
    """A host whose table is what 0.1 would have written for two containers, with this host's nft.

    That nft reads what a newer one has written for this version.
    """
    with lab.fresh_host():
        host = Host(each_bin_dir / "portmap")
        host.cli = Host(bin_dir / "portmap").cli
        host.add(MANY, ON_ADDRESSES)
        old = as_of_0_1(lab.run("nft", "list", "table", *TABLE.split()))
        lab.run("nft", "-f", "-", input=f"delete table {TABLE}\n{old}")
        found = lab.run("nft", "list", "ruleset")
        assert "type nf_proto" in found and "dport map {" in found and "typeof meta" not in found
        yield host


def test_all_verbs(old):
    """CHECK, STATUS, `list` and nft's own listings; then ADD beside it, ADD again, GC and DEL."""
    for pod in MANY, ON_ADDRESSES:
        assert not old.call("CHECK", pod).code
    assert not old.call("STATUS", GcCall("net")).code
    assert re.search(r"0\.0\.0\.0:8000-8008/tcp +10\.20\.0\.2:80-88 ", old.command("list", "--port", 8008))
    before = lab.state()
    old.add(Pod("new", "9090:90", "192.0.2.1:9091:91"))
    assert {*before} < {*lab.state()}
    assert old.call("ADD", Pod("rival", "8008:80")).code == 101
    for pod in MANY, ON_ADDRESSES:
        assert not old.call("CHECK", pod).code
    old.add(MANY)
    assert not old.call("CHECK", MANY).code and "dport map {" not in lab.nft("list", "ruleset")
    assert not old.call("GC", GcCall("net", MANY, ON_ADDRESSES)).code
    assert lab.chains() == sorted((MANY.chain, ON_ADDRESSES.chain))
    old.delete(MANY, ON_ADDRESSES)
    assert not lab.chains() and not lab.elements()


def test_check_notices_what_is_missing(old):
    """A map in a rule is compared port by port."""
    reply = old.call("CHECK", MANY.but("8000:80", "8001:8001"))
    assert reply.code == 104 and "tcp dport 8001 counter dnat" in reply.details, reply


def test_removal(old):
    """DEL and GC remove what 0.1 has written."""
    old.delete(MANY)
    assert lab.chains() == [ON_ADDRESSES.chain]
    assert not old.call("GC", GcCall("net")).code
    assert not lab.chains() and not lab.elements()
