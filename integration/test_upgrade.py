"""A table of cni-portmap 0.1 lives on under this version: maps declared with `type`, a map in a rule for many ports."""
import itertools
import os
import pathlib
import re
import threading
import time
from collections.abc import Iterator

import lab
import pytest
from lab import TABLE, GcCall, Host, Pod
from lab.libcni_cache import Cache

NUMBERS = 9, 30  # of ports under another number: those that have a rule each now, and those that have a map
ON_ADDRESSES = Pod("specific", "192.0.2.1:7080:80", "[::1]:7080:80/udp", ips=("10.20.0.3/24", "fd20::3/64"))
TYPES = {"meta nfproto": "nf_proto", "ip daddr": "ipv4_addr", "ip6 daddr": "ipv6_addr"}
SHIFTED = re.compile(r"\n\s*(?P<match>[^\n]* tcp dport) (80\d\d)(?P<to> counter [^\n]* to [0-9.]+):(\d+)(?=\n)")
MAPPED = re.compile(r"\n\s*(?P<match>[^\n]*) meta l4proto tcp(?P<to> counter [^\n]* to [0-9.]+):tcp dport map @[^\n]*")
MAP = re.compile(r"\tmap c/many/eth0/1 {.*?\n\t}\n", re.DOTALL)


def many(number: int) -> Pod:
    """A container that publishes many ports under another number."""
    return Pod("many", *(f"{8000 + n}:{80 + n}" for n in range(number)), "443:443",
               conditionsV4=["ip saddr 10.0.0.0/8"])


def as_of_0_1(table: str, number: int) -> str:
    """A listing as 0.1 would have written it."""
    table, maps = re.subn(r"typeof ((?:meta nfproto|ip6? daddr)) \. meta l4proto \. th dport",
                          lambda found: f"type {TYPES[found[1]]} . inet_proto . inet_service", table)
    rules = [*SHIFTED.finditer(table)]
    pairs = {rule[2]: rule[4] for rule in rules}
    match = rules[0]["match"] if rules else ""
    if not rules:
        pairs = dict(re.findall(r"(80\d\d) : (\d+)", MAP.search(table)[0]))
        table, rules = MAP.sub("", table), [*MAPPED.finditer(table)]
        match = f"{rules[0]['match']} tcp dport"
    one = f"{match} {{ {', '.join(pairs)} }}{rules[0]['to']}:tcp dport map " \
          f"{{ {', '.join(f'{host} : {container}' for host, container in pairs.items())} }}"
    assert (maps, len(pairs)) == (3, number)
    return SHIFTED.sub("", table.replace(rules[0][0], f"\n{one}"))


@pytest.fixture(params=NUMBERS)
def old(request, bin_dir, each_bin_dir) -> Iterator[Host]:
    """A host, and `many` on it, whose table is what 0.1 would have written for two containers, with this host's nft.

    That nft reads what a newer one has written for this version.
    """
    with lab.fresh_host():
        host = Host(each_bin_dir / "portmap")
        host.cli = Host(bin_dir / "portmap").cli
        host.many = many(request.param)
        host.add(host.many, ON_ADDRESSES)
        old = as_of_0_1(lab.run("nft", "list", "table", *TABLE.split()), request.param)
        lab.run("nft", "-f", "-", input=f"delete table {TABLE}\n{old}")
        found = lab.run("nft", "list", "ruleset")
        assert "type nf_proto" in found and "dport map {" in found and "typeof meta" not in found
        yield host


def test_all_verbs(old):
    """CHECK, STATUS, `list` and nft's own listings; then ADD beside it, ADD again, GC and DEL."""
    for pod in old.many, ON_ADDRESSES:
        assert not old.call("CHECK", pod).code
    assert not old.call("STATUS", GcCall("net")).code
    last = len(old.many.ports) - 2
    line = rf"0\.0\.0\.0:8000-{8000 + last}/tcp +world +10\.20\.0\.2:80-{80 + last} "
    assert re.search(line, old.command("list", "--port", 8008))
    before = lab.state()
    old.add(Pod("new", "9090:90", "192.0.2.1:9091:91"))
    assert {*before} < {*lab.state()}
    assert old.call("ADD", Pod("rival", "8008:80")).code == 101
    for pod in old.many, ON_ADDRESSES:
        assert not old.call("CHECK", pod).code
    old.add(old.many)
    assert not old.call("CHECK", old.many).code and "dport map {" not in lab.nft("list", "ruleset")
    assert not old.call("GC", GcCall("net", old.many, ON_ADDRESSES)).code
    assert lab.chains() == sorted((old.many.chain, ON_ADDRESSES.chain))
    old.delete(old.many, ON_ADDRESSES)
    assert not lab.chains() and not lab.elements()


def test_check_notices_what_is_missing(old):
    """A map in a rule is compared port by port."""
    reply = old.call("CHECK", old.many.but("8000:80", "8001:8001"))
    assert reply.code == 104 and "tcp dport 8001 counter dnat" in reply.details, reply
    other = [f"{8000 + n}:{80 + n}" for n in range(len(old.many.ports) - 2)]
    reply = old.call("CHECK", old.many.but(*other, f"{8000 + len(other)}:1", "443:443"))
    assert reply.code == 104 and "counter dnat" in reply.details, reply


def test_removal(old):
    """DEL and GC remove what 0.1 has written."""
    old.delete(old.many)
    assert lab.chains() == [ON_ADDRESSES.chain]
    assert not old.call("GC", GcCall("net")).code
    assert not lab.chains() and not lab.elements()


# --- the shared chains ----------------------------------------------------------------------------------------

WEB = Pod("web", "8080:80", "[::1]:7070:70/udp", "9000:90/udp", "9001:91/udp", ips=("10.20.0.2/24", "fd20::2/64"),
          link="to-web")
OLD = pathlib.Path(__file__).with_name("old")  # by version: the table that it wrote for WEB, as nft 1.0.6 lists it


def connect_all_the_time(client: lab.Namespace, stop: threading.Event, lost: list[int]) -> None:
    for number in itertools.count():
        if stop.wait(0.005):
            return
        if not lab.exchange(client, "192.0.2.1", 8080, timeout=30):
            lost.append(number)


@pytest.mark.parametrize("published", [True, False], ids=["published", "gone"])
@pytest.mark.parametrize("how", ["scripts/install", "ADD of another", "restore"])
@pytest.mark.parametrize("version", ["0.1.0", "0.1.1"])
def test_no_gap_in_the_guard(host, version, how, published, tmp_path):
    """A table of 0.1 gets the new shared chains: not a frame to localhost slips through, not a connection is lost.

    Nor later, through an interface that an old version opened for a container that is gone by now.
    """
    web = lab.wire("web", ("10.20.0.1/24", "fd20::1/64"), ("10.20.0.2/24", "fd20::2/64"))
    client = lab.wire("client", ("192.0.2.1/24",), ("192.0.2.2/24",))
    lab.nft("-f", "-", input=(OLD / f"{version}.nft").read_text().replace("INODE", str(os.stat(web.path).st_ino)))
    lab.sysctl("net.ipv4.conf.to-web.route_localnet", 1)
    lab.run(*"ip -6 route add local ::1 dev to-web table local proto static metric 4096".split())
    if published:
        Cache(tmp_path).write(WEB)
    else:
        host.delete(WEB)
    stop, lost = threading.Event(), []
    clients = threading.Thread(target=connect_all_the_time, args=(client, stop, lost))
    frame = lab.packet("10.20.0.2", "127.0.0.1", 9090)
    with lab.Server("web", web, 80), lab.Server("own", lab.HOST, 9090, "udp", "127.0.0.1") as own:
        with lab.flood(web, "to-web", frame):
            if published:
                clients.start()
            if how == "ADD of another":
                host.add(Pod("new", "9999:90", ips=("10.21.0.2/24",)))
            else:
                host.command("restore", *(["--base-only"] if how == "scripts/install" else ["--cache", tmp_path]))
            time.sleep(0.1)
        stop.set()
        if published:
            clients.join()
            assert not host.call("CHECK", WEB).code
        assert "localhost_interfaces" in lab.table()
        assert not own.arrivals and not lost
        lab.nft_script(f"delete table {TABLE}")
        lab.inject(web, "to-web", frame)
        assert lab.until(lambda: own.arrivals), "no frame would have arrived anyway"
