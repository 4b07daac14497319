"""cni-portmap agent --reserve: sockets for what is published, seen as virtual machines' port forwarders look."""
import contextlib
import os
import pathlib
import signal
import socket
import time

import lab
import pytest
from lab import Pod
from lab.agent import Agent

LISTEN, UNCONNECTED = 10, 7  # enum tcp state, as Lima and WSL2 look for them


@pytest.fixture
def agent(host):
    with Agent(host.cli, "--reserve") as running:
        yield running


def seen():
    """What /proc/net shows that a forwarder takes for a service: (file, address, port). Rancher Desktop, older Lima."""
    found = set()
    for name, state in (("tcp", LISTEN), ("tcp6", LISTEN), ("udp", UNCONNECTED), ("udp6", UNCONNECTED)):
        for line in pathlib.Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if int(fields[3], 16) == state:
                found.add((name, address.strip("0") and address, int(port, 16)))
    return found


def by_sock_diag():
    """The same as the kernel's sock_diag tells it (`ss`), as Lima and WSL2 ask."""
    lines = lab.run("ss", "-Hlntu").splitlines()
    return {(line.split()[0], line.split()[4]) for line in lines}


PODS = Pod("web", "8080:80", "8080:80/udp", "127.0.0.1:9000:90", ips=("10.20.0.2/24", "fd20::2/64"))
EXPECTED = {("tcp", "", 8080), ("tcp6", "", 8080), ("udp", "", 8080), ("udp6", "", 8080), ("tcp", "0100007F", 9000)}


def test_forwarders_see_it(host, agent):
    """A TCP socket listens, a UDP one is bound and not connected, for each family; freed with DEL and at the end."""
    began = time.monotonic()
    host.add(PODS)
    assert lab.until(lambda: seen() == EXPECTED), (seen(), agent.log)
    assert time.monotonic() - began > 3  # podman's conmon binds after ADD
    assert {("tcp", "0.0.0.0:8080"), ("tcp", "[::]:8080"), ("udp", "0.0.0.0:8080")} <= by_sock_diag()
    host.delete(PODS)
    assert lab.until(lambda: not seen())
    host.add(PODS)
    assert lab.until(lambda: seen() == EXPECTED)
    assert agent.stop() == 0 and not seen()


def test_those_that_were_there(host):
    """At its start it holds what is published at once; one that was killed leaves nothing behind."""
    host.add(PODS)
    with Agent(host.cli, "--reserve") as agent:
        assert lab.until(lambda: seen() == EXPECTED), agent.log
        agent.stop(signal.SIGKILL)
    assert lab.until(lambda: not seen())


def test_clients_that_nat_does_not_take(host, agent):
    """They are accepted and reset, and do not hang; and clients that it takes see nothing of the socket."""
    host.add(Pod("web", "8080:80", conditionsV4=["-s", "192.0.2.0/24"]))
    assert lab.until(lambda: ("tcp", "", 8080) in seen())
    for _ in range(50):
        with contextlib.suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", 8080), 30) as client:
            assert client.recv(1) == b""
    assert len(os.listdir(f"/proc/{agent.process.pid}/fd")) < 40


def test_whoever_has_it_keeps_it(host, agent):
    """A port that is in use, as by podman's conmon, is left alone; and taken when it is free."""
    with socket.create_server(("", 8080)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("", 8081))
        host.add(Pod("web", "8080:80", "8081:81/udp", "8082:82"))
        assert lab.until(lambda: ("tcp", "", 8082) in seen())
        time.sleep(0.3)
    with socket.create_server(("", 8080)):
        pass
    assert agent.process.poll() is None


def test_an_owner_is_replaced(host, agent):
    """An ADD in place of a dead owner finds the port free for conmon; hostPortInUse: refuse does not mean the agent."""
    host.add_without_link(Pod("dead", "8080:80"))
    assert lab.until(lambda: ("tcp", "", 8080) in seen())
    host.add(Pod("web", "8080:80", hostPortInUse="refuse"))
    agent.pause()  # else it would be free for three seconds only
    assert not seen()
    with socket.create_server(("", 8080)):
        agent.send(signal.SIGCONT)
        reply = host.call("ADD", Pod("web", "8080:80", hostPortInUse="refuse"))
        assert reply.code == 102, reply
    assert lab.until(lambda: ("tcp", "", 8080) in seen(), 60)  # it is tried every 20 seconds


def test_it_keeps_the_port(host, agent):
    """A service with SO_REUSEADDR does not get a port that is published."""
    host.add(Pod("web", "8080:80", "8080:80/udp"))
    assert lab.until(lambda: {("tcp", "", 8080), ("udp", "", 8080)} <= seen())
    for kind in socket.SOCK_STREAM, socket.SOCK_DGRAM:
        with socket.socket(socket.AF_INET, kind) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("", 8080))


def test_a_flush(host, agent):
    """A heal changes no socket."""
    host.add(PODS)
    assert lab.until(lambda: seen() == EXPECTED)
    before = lab.run("ss", "-Hlntupe")
    lab.nft_script("flush ruleset")
    assert agent.logs("restored")
    time.sleep(0.3)
    assert lab.run("ss", "-Hlntupe") == before


def test_soft_limit(host):
    """The agent raises its own soft limit of files."""
    ports = [f"{10000 + i}:{10000 + i}" for i in range(1500)]
    with Agent(host.cli, "--reserve", within=("prlimit", "--nofile=1024:8192")):
        host.add(Pod("many", *ports))
        assert lab.until(lambda: len(seen()) == 1500)


def test_more_ports_than_descriptors(host):
    """Some are left for healing, and for the look at what was deleted meanwhile."""
    host.add(Pod("web", *(f"{8000 + i}:80" for i in range(100))))
    host.add_without_link(Pod("db", "5432:5432"))
    with Agent(host.cli, "--reserve", within=("prlimit", "--nofile=128:128")) as agent:
        assert lab.until(lambda: len(os.listdir(f"/proc/{agent.process.pid}/fd")) >= 60)
        with lab.held_lock():
            lab.nft_script("flush ruleset")
            time.sleep(0.1)
            host.delete(Pod("db", "5432:5432"))
        assert agent.logs("removed"), agent.log
        assert lab.chains() == [Pod("web").chain] and "Too many open files" not in agent.log
