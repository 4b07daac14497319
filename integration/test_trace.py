"""trace tells the story of live packets, in both directions, and leaves nothing behind."""
import json
import pathlib
import socket
import subprocess

import lab
from lab.clinic import CLIENT_IP, LAN_IP, Clinic
from lab.links import delete_link
from lab.servers import exchange
import pytest


def drop(clinic, hook, rule, priority=0, policy="accept"):
    lab.nft("-f", "-", input=f"table inet foreign {{ chain c {{ type filter hook {hook} priority {priority}; "
            f"policy {policy}; {rule}; }}; }}\n")


def connect(clinic):
    """Send a packet for the port, whatever becomes of it."""
    clinic.answers(timeout=1)


class Trace:
    """The command, under way: it waits for a packet."""

    def __init__(self, clinic, bin_dir, *words, seconds=60):
        command = [bin_dir.parent / "sbin/cni-portmap", "trace", "8080", "--seconds", str(seconds), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if "--json" in words:
            assert lab.until(lambda: self.table() in lab.nft("list", "tables"))
        else:
            assert self.process.stdout.readline().startswith("waiting for 8080/tcp")

    def table(self):
        return f"cni_portmap_trace_{self.process.pid}"

    def story(self):
        out, err = self.process.communicate(timeout=60)
        assert not err, err
        return out


def iptables(*lines):
    return lambda clinic: [lab.run("iptables-legacy", *line.split()) for line in lines]


WENT = ["SYN came in on lan0", "translated to 10.88.0.", "by container web-", "went out on cni0"]
CASES = {
    "answered": (lambda clinic: None, [*WENT, "SYN+ACK came in on cni0",
                                       "translated back: 192.0.2.1:8080 -> 192.0.2.2:", "went out on lan0"], 0),
    "policy": (lambda clinic: drop(clinic, "forward", "counter", policy="drop"), [
        "DROPPED by table inet foreign, chain c, rule: policy drop"], 1),
    "reject": (lambda clinic: drop(clinic, "forward", "iifname lan0 reject"), [
        "REJECTED by table inet foreign, chain c, rule: iifname \"lan0\" reject"], 1),
    "before translation": (lambda clinic: drop(clinic, "prerouting", "tcp dport 8080 drop", -300), [
        "SYN came in on lan0", "DROPPED by table inet foreign, chain c, rule: tcp dport 8080 drop"], 1),
    "answers": (lambda clinic: drop(clinic, "forward", "tcp sport 80 drop"), [
        *WENT, "SYN+ACK came in on cni0", "DROPPED by table inet foreign, chain c, rule: tcp sport 80 drop"], 1),
    "iptables-legacy": (iptables("-N BLOCK", "-A FORWARD -j BLOCK", "-A BLOCK -p tcp --dport 80 -j REJECT"), [
        "REJECTED by iptables-legacy, table filter", "-S BLOCK", "rule 1 of chain BLOCK"], 1),
    "iptables-legacy raw": (iptables("-t raw -A PREROUTING -p tcp --dport 8080 -j DROP"), [
        "DROPPED by iptables-legacy, table raw", "PREROUTING"], 1),
    "forwarding": (lambda clinic: lab.sysctl("net.ipv4.ip_forward", 0), ["LOST by routing", "cni-portmap doctor"], 1),
    "no way back": (lambda clinic: lab.run("nsenter", f"--net={clinic.web.namespace.path}", "ip", "route", "del",
                                           "default"), [*WENT, "nothing came back from the container"], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_story(bin_dir, name):
    """Each step of a packet's way in its order, and who drops it; the status says whether it was answered."""
    does, told, status = CASES[name]
    with Clinic(bin_dir, subnets=("10.88.0.0/16",)) as clinic:
        does(clinic)
        trace = Trace(clinic, bin_dir)
        connect(clinic)
        story = trace.story()
        at = 0
        for words in told:
            assert words in story[at:], (words, story)
            at = story.index(words, at)
        assert trace.process.returncode == status
        assert "cni_portmap_trace" not in lab.nft("list", "tables")


def test_refused(bin_dir):
    """Where nothing listens, the container refuses."""
    with Clinic(bin_dir, serve=False) as clinic:
        trace = Trace(clinic, bin_dir)
        connect(clinic)
        assert "REFUSED: nothing listens on that port of the container" in trace.story()


def test_from_this_host_and_its_localhost(bin_dir):
    """Packets of the host's own are masqueraded where they come from localhost."""
    with Clinic(bin_dir) as clinic:
        for path in "host", "localhost":
            trace = Trace(clinic, bin_dir)
            assert clinic.answers(4, path)
            story = trace.story()
            assert "was sent by this host" in story and "arrived at the client, on this host" in story
            assert ("masqueraded as" in story) == (path == "localhost")


@pytest.mark.parametrize("who", ["another container", "localhost"])
def test_from_a_client_that_is_masqueraded(bin_dir, who):
    """Its answer goes to this host's own address first; the answers to others are not told."""
    with Clinic(bin_dir) as clinic:
        other = clinic.container("other")
        trace = Trace(clinic, bin_dir, "--from", other.ipv4 if who == "another container" else "127.0.0.1")
        assert clinic.answers()
        if who == "localhost":
            assert exchange(other, LAN_IP[4], 8080, "tcp") and clinic.answers(path="localhost")
        else:
            assert clinic.answers(path="localhost") and exchange(other, LAN_IP[4], 8080, "tcp")
        story = trace.story()
        assert story.count("SYN+ACK came in on cni0") == 1 and "nothing came back" not in story
        assert story.count("masqueraded as") == 1 and trace.process.returncode == 0


def test_nothing_came(bin_dir):
    """No packet within the time; of another client than --from says, none either."""
    with Clinic(bin_dir) as clinic:
        trace = Trace(clinic, bin_dir, "--from", "192.0.2.200", seconds=1)
        connect(clinic)
        assert "no packet for 8080/tcp came in" in trace.story()
        assert trace.process.returncode == 1


def test_json(bin_dir):
    """A list of packets, each with its steps and its end."""
    with Clinic(bin_dir) as clinic:
        drop(clinic, "forward", "tcp dport 80 drop")
        trace = Trace(clinic, bin_dir, "--json")
        connect(clinic)
        packet, *_ = json.loads(trace.story())
        assert packet["to"] == "192.0.2.1:8080" and packet["from"].startswith(CLIENT_IP[4])
        assert (packet["direction"], packet["verdict"]) == ("original", "dropped")
        assert packet["steps"][-1] | {"table": "inet foreign", "chain": "c", "backend": "nft"} == packet["steps"][-1]


def test_udp(bin_dir):
    """A datagram's way, and the answer's."""
    with Clinic(bin_dir, ports=[{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}], serve=False) as clinic:
        clinic.serve(protocol="udp")
        process = subprocess.Popen([bin_dir.parent / "sbin/cni-portmap", "trace", "8080", "--seconds", "60"],
                                   stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().startswith("waiting for 8080/udp")
        assert clinic.answers(protocol="udp")
        story = process.communicate()[0]
        assert "went out on cni0" in story and "went out on lan0" in story


def test_its_table_goes_with_it(bin_dir):
    """After kill -9 at once; nobody else can delete it, and a flush of the ruleset leaves it."""
    with Clinic(bin_dir) as clinic:
        trace = Trace(clinic, bin_dir)
        assert trace.table() in lab.nft("list", "tables")
        done = subprocess.run(["nft", "delete", "table", "inet", trace.table()], capture_output=True, text=True,
                              check=False)
        assert "not permitted" in done.stderr
        lab.nft("flush", "ruleset")
        assert trace.table() in lab.nft("list", "tables")
        trace.process.kill()
        trace.process.wait()
        assert lab.until(lambda: trace.table() not in lab.nft("list", "tables"))


def test_interrupted(bin_dir):
    """Ctrl-C ends it with what it has, and removes its table."""
    with Clinic(bin_dir) as clinic:
        trace = Trace(clinic, bin_dir)
        trace.process.send_signal(2)
        assert "no packet" in trace.story()
        assert trace.table() not in lab.nft("list", "tables")


def listens(pid):
    """Whether the netlink socket of a process is in a group: the columns are the socket, protocol, port, groups."""
    sockets = [line.split() for line in pathlib.Path("/proc/net/netlink").read_text().splitlines()[1:]]
    return any(port == str(pid) and int(groups, 16) for _, _, port, groups, *_ in sockets)


def test_others_are_left_alone(bin_dir, tmp_path):
    """Only packets of the port are marked: the kernel tells of no other."""
    with Clinic(bin_dir) as clinic:
        trace = Trace(clinic, bin_dir)
        told = tmp_path / "told"
        with told.open("w") as file:
            monitor = subprocess.Popen(["stdbuf", "-oL", "nft", "monitor", "trace"], stdout=file)
        assert lab.until(lambda: listens(monitor.pid))
        with lab.Server("other", lab.HOST, 9999):
            for _ in range(20):
                assert lab.exchange(clinic.client, "192.0.2.1", 9999)
        assert clinic.answers()
        trace.story()
        assert lab.until(lambda: "dport 8080" in told.read_text())
        monitor.terminate()
        monitor.wait()
        assert "9999" not in told.read_text()


def test_container_that_is_gone(bin_dir):
    """A port whose container has gone is told of, too: its packets get lost on the way."""
    with Clinic(bin_dir, subnets=("10.88.0.0/16",)) as clinic:
        delete_link(next(name for _, name in socket.if_nameindex() if name.startswith("veth")))
        trace = Trace(clinic, bin_dir)
        connect(clinic)
        assert "nothing came back from the container" in trace.story()


