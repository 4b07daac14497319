"""The cost of a call, counted and not timed: its messages to the kernel, and its system calls, by strace.

Bounds have some room, for other versions of Python and libnftables; what must be none or one has none. The times are
in scripts/bench.
"""
import collections
import pathlib
import re
import socket

import lab
import pytest
from cni_portmap import ruleset
from cni_portmap.attachment import Address, Attachment, Port
from lab import Pod

# nf_tables' messages in their order (enum nf_tables_msg_types): strace does not know a socket's protocol before its
# first message has left, and prints that one's number.
NAMES = ("NEWTABLE GETTABLE DELTABLE NEWCHAIN GETCHAIN DELCHAIN NEWRULE GETRULE DELRULE NEWSET GETSET DELSET "
         "NEWSETELEM GETSETELEM DELSETELEM NEWGEN GETGEN").split()
TYPE = re.compile(r"nlmsg_type=(?:NFNL_SUBSYS_NFTABLES<<8\|NFT_MSG_(\w+)|0xa(\w\w)\b|(\w+))")
CROWD = 500
OLD = sorted(pathlib.Path(__file__).with_name("old").glob("*.nft"))
NOBODY, ONE, UDP = Pod("nobody"), Pod("one", "8080:80"), Pod("udp", "8080:80/udp")
SPECIFIC, MANY = Pod("specific", "192.0.2.1:8080:80"), Pod("many", *(f"{port}:{port}" for port in range(9000, 9100)))


class Trace:
    """A call under strace. Counted by message: `wrote` in transactions, `asked` by our reads, `listed` by libnftables.

    `read`: how many bytes our own reads got; `refused`: answers to libnftables that are errors; `system_calls` by name.
    """

    def __init__(self, host: lab.Host, verb: str, pod: Pod, log: pathlib.Path) -> None:
        reply = host.call(verb, pod, "strace", "-f", "-s", "2000", "-o", log)
        assert not reply.code, reply
        self.system_calls, self.wrote, self.asked, self.listed = (collections.Counter[str]() for _ in range(4))
        self.transactions = self.read = self.refused = 0
        for line in log.read_text().splitlines():
            call = re.match(r"\d+ +(\w+)\(", line)
            if not call:
                continue
            self.system_calls[call[1]] += 1
            messages = [name or other or dict(enumerate(NAMES)).get(int(number, 16), number)
                        for name, number, other in TYPE.findall(line)]
            begins = messages[:1] in (["NFNL_MSG_BATCH_BEGIN"], ["0x10"])  # the number: in CHECK's namespace
            if begins or (call[1] == "sendmsg" and messages):
                self.transactions += begins
                self.wrote.update(messages)
            elif call[1] == "sendto":  # without an address it is ours
                (self.asked if "NULL, 0) =" in line else self.listed).update(messages)
            elif call[1] == "recvfrom":
                self.read += int(line.rpartition("= ")[2])
            elif call[1] == "recvmsg":
                self.refused += line.count("error=-")


@pytest.fixture
def trace(host, tmp_path):
    """Traces calls on a node that others use, too: a container, a hundred connections."""
    host.add(Pod("other", "1:1"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink, \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
        sink.bind(("0.0.0.0", 9))
        for number in range(100):
            source.sendto(b"", (f"127.0.1.{number}", 9))
    return lambda verb, pod: Trace(host, verb, pod, tmp_path / "strace")


def crowd(*places):
    """Publish a port each of many others, in bulk, as ADD writes it."""
    lab.nft_script("".join(ruleset.attach(Attachment(
        f"crowd{number}", "eth0", "net", netns="/run/netns/crowd", inode=1, mark_bit=13,
        addresses={4: Address(4, "10.20.0.3", "10.20.0.0/24")},
        ports=(Port(4, "tcp", ip, port, 80),))) for number, (ip, port) in enumerate(places)))


@pytest.mark.parametrize("verb, pod, transactions, asked, system_calls", [
    ("VERSION", NOBODY, 0, 0, 450),
    ("ADD", NOBODY, 0, 0, 450),
    ("CHECK", NOBODY, 0, 0, 450),
    ("DEL", NOBODY, 0, 6, 550),
    ("STATUS", NOBODY, 0, 8, 900),
    ("ADD", ONE, 1, 17, 900),
    ("ADD", UDP, 1, 20, 900),
    ("ADD", SPECIFIC, 1, 17, 900),
    ("ADD", MANY, 1, 117, 1000),
    ("CHECK", ONE, 1, 41, 950),
    ("CHECK", MANY, 1, 139, 1050),
    ("DEL", ONE, 1, 15, 900),
    ("DEL", UDP, 1, 15, 900),
    ("DEL", SPECIFIC, 1, 16, 900),
    ("DEL", MANY, 1, 114, 1000)], ids=lambda value: getattr(value, "id", None))
def test_a_call_asks_little(host, trace, verb, pod, transactions, asked, system_calls):
    """A call asks little, sends one transaction at most, is refused nothing, and starts no process and no thread."""
    if verb in ("CHECK", "DEL"):
        host.add(pod)
    before = lab.generation()
    seen = trace(verb, pod)
    assert seen.transactions == transactions
    assert lab.generation() - before == (transactions if verb in ("ADD", "DEL") else 0)
    assert seen.asked.total() <= asked, seen.asked
    assert seen.system_calls.total() <= system_calls, seen.system_calls
    assert not seen.refused
    assert not {"clone", "clone3", "fork", "vfork"} & {*seen.system_calls}
    assert seen.system_calls["execve"] == 1


@pytest.mark.parametrize("pod", [ONE, UDP, SPECIFIC, MANY], ids=lambda pod: pod.id)
def test_add_takes_nothing_away(trace, pod):
    """A plain ADD's transaction only adds: after one that deletes, closing the socket takes 11 ms. Before it
    libnftables lists nothing but tables."""
    seen = trace("ADD", pod)
    assert {*seen.wrote} == {"NFNL_MSG_BATCH_BEGIN", "NEWCHAIN", "NEWRULE", "NEWSET", "NEWSETELEM",
                             "NFNL_MSG_BATCH_END"}
    assert {*seen.listed} <= {"GETGEN", "GETTABLE"}


@pytest.mark.parametrize("pod", [ONE, UDP, SPECIFIC, MANY], ids=lambda pod: pod.id)
def test_delete_lists_nothing_of_others(host, trace, pod):
    """DEL names what it removes, a message a map and one for the chain: libnftables would list every set of the host.
    """
    host.add(pod)
    seen = trace("DEL", pod)
    assert seen.wrote == {"NFNL_MSG_BATCH_BEGIN": 1, "DELSETELEM": 1, "DELCHAIN": 1, "NFNL_MSG_BATCH_END": 1}
    assert not seen.listed


@pytest.mark.parametrize("pod", [ONE, UDP, SPECIFIC, MANY], ids=lambda pod: pod.id)
def test_add_again_lists_nothing_of_others(host, trace, pod):
    """An ADD that replaces is one transaction here, and one elsewhere, where its rules are written first: what
    libnftables lists before a deletion is every set of the host. What leads to its chain stays."""
    host.add(pod)
    before = lab.generation()
    seen = trace("ADD", pod)
    assert (seen.transactions, lab.generation() - before) == (2, 1)
    assert {"DELRULE", "NEWCHAIN", "NEWRULE"} <= {*seen.wrote} and not {"DELSETELEM", "DELCHAIN"} & {*seen.wrote}
    assert {*seen.listed} <= {"GETGEN", "GETTABLE"} and not seen.refused


@pytest.mark.parametrize("table", ["", *OLD], ids=lambda path: getattr(path, "stem", "another mark bit"))
def test_a_repair_lists_nothing_of_others(host, trace, table):
    """Shared chains get other rules, and keep their hooks: also those of an older table, with which an ADD begins."""
    if table:
        lab.nft_script(f"delete table {lab.TABLE}", table.read_text().replace("INODE", "1"))
    seen = trace("ADD", Pod("one", "8080:80", markMasqBit=7))
    assert "DELRULE" in seen.wrote
    assert {*seen.listed} <= {"GETGEN", "GETTABLE"} and not seen.refused


@pytest.mark.parametrize("ports", [("8080:80",), tuple(f"{port}:{port + 1000}" for port in range(9000, 9020))], ids=len)
def test_a_hand_over_reads_what_it_needs_once(host, trace, ports):
    """DEL of a pod's last sandbox reads the rules of both sandboxes once, and their map of many ports."""
    args = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"
    last, following = Pod("last", *ports, args=args), Pod("next", *ports, ips=("10.20.0.3/24",), args=args)
    host.add(last, following)
    seen = trace("DEL", last)
    assert not host.call("CHECK", following).code
    assert seen.asked["GETRULE"] == 2
    assert seen.asked["GETSETELEM"] <= 2 * len(ports) + 3  # the ports of both, and their maps


def alone_and_among(host, trace, verb, pod, *ips):
    """The traces of a call: with one other container there, and with hundreds that publish a port on one of `ips`."""
    seen = []
    for places in (), [(ips[number % len(ips)], 10000 + number) for number in range(CROWD)]:
        crowd(*places)
        if verb in ("CHECK", "DEL"):
            host.add(pod)
        seen.append(trace(verb, pod))
        if verb in ("ADD", "CHECK"):
            host.delete(pod)
    return seen


@pytest.mark.parametrize("verb", ["ADD", "CHECK", "DEL"])
@pytest.mark.parametrize("pod", [ONE, UDP, SPECIFIC], ids=lambda pod: pod.id)
def test_others_cost_nothing(host, trace, verb, pod):
    """With hundreds of others there, a call asks and reads as much as with one."""
    alone, among = alone_and_among(host, trace, verb, pod, "")
    assert among.asked == alone.asked
    assert among.read == alone.read
    assert among.listed == alone.listed and not {"GETCHAIN", "GETRULE", "GETSETELEM"} & {*among.listed}


@pytest.mark.parametrize("verb, pod, grows", [("ADD", ONE, True), ("CHECK", ONE, False), ("DEL", ONE, False),
                                              ("ADD", SPECIFIC, False), ("DEL", SPECIFIC, False)],
                         ids=lambda value: getattr(value, "id", str(value)))
def test_others_on_an_address_each(host, trace, verb, pod, grows):
    """Only ADD of a port on every address reads all those on one address, in one listing: any of them may overlap."""
    alone, among = alone_and_among(host, trace, verb, pod, *(f"192.0.3.{last}" for last in range(250)))
    assert among.asked == alone.asked
    assert 0 < (among.read - alone.read) / CROWD < 150 if grows else among.read == alone.read
