"""cni-portmap agent --forward: what NAT cannot do, and nothing past a condition."""
import contextlib
import os
import resource
import select
import signal
import socket
import threading
import time

import lab
import pytest
from lab.agent import Agent
from lab.forwarding import HOST4, HOST6, Site

from cni_portmap.agent.poll import Poll

PATIENCE = 30  # seconds, for what comes: on a busy host it comes late


@pytest.fixture
def site(host, tmp_path):
    """An IPv4-only container that publishes on every address."""
    with Site(host, tmp_path, "8080:80", "8081:81/udp") as made:
        yield made


@pytest.mark.parametrize("port, inner, protocol", [(8080, 80, "tcp"), (8081, 81, "udp")])
def test_ipv6_to_a_container_without(host, site, port, inner, protocol):
    """From the LAN, and from the host's [::1]; IPv4 goes by NAT, with the client's own address."""
    with lab.Server("box", site.box, inner, protocol):
        assert site.forwards(port), site.agent.log
        for where, ip in ((site.lan, HOST6), (lab.HOST, "::1"), (lab.HOST, HOST6)):
            saw = lab.exchange(where, ip, port, protocol)
            assert saw and saw.server == "box" and saw.peer == "10.88.0.1", (ip, saw, site.agent.log)
        assert lab.exchange(site.lan, HOST4, port, protocol).peer == "192.168.9.2"
    assert f"the agent forwards [::]:{port}/{protocol} to {site.box.ipv4}:{inner}" in host.command("list")


def test_only_where_the_file_says_so(host, tmp_path):
    """hostIP 0.0.0.0 is IPv4 alone; conditions are not gone around; without a file nothing is known."""
    with Site(host, tmp_path, "0.0.0.0:8080:80", "8081:81") as site, lab.Server("box", site.box, 80):
        assert site.forwards(8081)
        assert "[::]:8080" not in lab.run("ss", "-Hlnt")
        assert lab.exchange(site.lan, HOST6, 8080) is None


@pytest.mark.parametrize("config", [
    {"conditionsV4": ["-s", "192.168.9.0/24"]}, {"gatewayModeV4": "nat"}, {"GATEWAYModeV4": "nat"},
    {"gatewayModeV4": "nat", "trustedHostInterfaces": ["to-lan"]}])
def test_never_past_a_condition(host, tmp_path, config):
    """Of a container with conditions or an exposure policy nothing is forwarded."""
    with Site(host, tmp_path, "8080:80", **config) as site, lab.Server("box", site.box, 80):
        assert lab.until(lambda: "0.0.0.0:8080" in lab.run("ss", "-Hlnt"))
        time.sleep(2.5)
        assert "[::]:8080" not in lab.run("ss", "-Hlnt"), site.agent.log
        assert lab.exchange(site.lan, HOST6, 8080) is None


def link_local(device):
    """The link-local addresses of an interface that can be used."""
    words = lab.run("ip", "-6", "address", "show", "dev", device, "-tentative").split()
    return [word for word in words if word.startswith("fe80")]


def test_link_local_clients(host, tmp_path):
    """A client with a link-local address reaches the host's, which NAT cannot do; its table goes with the agent."""
    with Site(host, tmp_path, "8080:80", "8080:80/udp", subnets=("10.88.0.0/16", "fd88::/64")) as site:
        with site.lan:
            index = socket.if_nametoindex("eth0")
            assert lab.until(lambda: link_local("eth0"))
        assert lab.until(lambda: link_local("to-lan"))
        address = link_local("to-lan")[0].partition("/")[0]
        for kind, name in ((socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")):
            # One does not come with the other: the socket for UDP is another one when the file has been read.
            assert lab.until(lambda: f"{name} . 8080" in lab.nft(  # noqa: B023
                "list", "table", "inet", "cni_portmap_agent", check=False)), site.agent.log
            with lab.Server("box", site.box, 80, name), site.lan:
                client = socket.socket(socket.AF_INET6, kind)
                client.settimeout(PATIENCE)
                client.connect((address, 8080, 0, index))
                with client:
                    if name == "udp":
                        client.send(b"?")
                    assert b'"box"' in client.recv(2048), site.agent.log
        assert lab.exchange(site.lan, HOST6, 8080) is None  # nobody listens by now: NAT, and no forwarding
        before = lab.nft("-s", "list", "table", "inet", "cni_portmap_agent")
        lab.nft("delete", "table", "inet", "cni_portmap_agent")
        assert lab.until(lambda: lab.nft("-s", "list", "table", "inet", "cni_portmap_agent", check=False) == before)
        site.agent.stop()
        assert "cni_portmap_agent" not in lab.nft("list", "tables")


def test_localhost_behind_br_netfilter(host, tmp_path):
    """[::1] with br_netfilter on, where NAT cannot serve it; and off, where it does."""
    if not lab.br_netfilter(True):
        pytest.skip("no br_netfilter here")
    with Site(host, tmp_path, "8080:80", subnets=("10.88.0.0/16", "fd88::/64")) as site, \
            lab.Server("box", site.box, 80):
        assert site.forwards(8080)
        assert lab.until(lambda: lab.exchange(lab.HOST, "::1", 8080, timeout=1)), site.agent.log
        assert "redirect" in lab.nft("list", "chain", "inet", "cni_portmap_agent", "output")
        lab.br_netfilter(False)
        assert lab.until(lambda: "redirect" not in lab.nft("list", "chain", "inet", "cni_portmap_agent", "output"))


def connection(site):
    with site.lan:
        return socket.create_connection((HOST6, 8080), PATIENCE)


def listener(site):
    with site.box:
        sock = socket.create_server(("", 80))
    sock.settimeout(PATIENCE)
    return sock


@contextlib.contextmanager
def closed_at_the_end():
    """A list, for sockets. However a test ends, they are in nobody else's way: libnftables has select(2)."""
    found = []
    try:
        yield found
    finally:
        for each in found:
            each.close()


@contextlib.contextmanager
def accepting(site):
    """Accept the container's connections while the block lasts; where they are."""
    with listener(site) as server, closed_at_the_end() as accepted:
        server.settimeout(None)

        def accept():
            with contextlib.suppress(OSError):  # it is shut down
                while True:
                    accepted.append(server.accept()[0])
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield accepted
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_half_close_and_resets(site):
    """Both ways: what one side ends, the other may still answer; a reset is a reset."""
    assert site.forwards(8080)
    with listener(site) as server:
        for near_first in True, False:
            client, (inner, _) = connection(site), server.accept()
            inner.settimeout(PATIENCE)
            one, other = (client, inner) if near_first else (inner, client)
            one.sendall(b"x" * 300000)
            one.shutdown(socket.SHUT_WR)
            received = 0
            while data := other.recv(65536):
                received += len(data)
            other.sendall(b"y" * 1000)
            other.close()
            answer = b""
            while data := one.recv(65536):
                answer += data
            assert (received, len(answer)) == (300000, 1000)
            one.close()
        for near in True, False:
            client, (inner, _) = connection(site), server.accept()
            inner.settimeout(PATIENCE)
            one, other = (client, inner) if near else (inner, client)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            one.close()
            with pytest.raises(ConnectionResetError):
                other.recv(1)
            other.close()


def descriptors(site):
    return len(os.listdir(f"/proc/{site.agent.process.pid}/fd"))


def descriptors_at_rest(site):
    """The agent's descriptors when it holds all that it forwards, and no child works for it."""
    assert site.forwards(8080) and site.forwards(8081), site.agent.log
    assert lab.until(lambda: not site.agent.children())
    return descriptors(site)


def fill(sock):
    """Send as much as the kernel takes now; the number of bytes. The socket does not block."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(1 << 16))
    return sent


def read_all(sock):
    while sock.recv(1 << 20):
        pass


def test_readers_that_stop(site):
    """They hold up nobody, cost no CPU, and all that they had is freed; DEL ends what is open."""
    before = descriptors_at_rest(site)
    with listener(site) as server:
        slow = []
        for _ in range(50):
            client, (inner, _) = connection(site), server.accept()
            inner.setblocking(False)
            fill(inner)
            slow.append((client, inner))
        assert site.agent.comes_to_rest()
        client, (inner, _) = connection(site), server.accept()
        inner.sendall(b"quick")
        assert client.recv(5) == b"quick"
        client.close()
        inner.close()
        for client, inner in slow[:25]:
            client.close()
            inner.close()
        site.network.delete(site.box.id, site.box.namespace.path, site.box.ports)
        assert lab.until(lambda: descriptors(site) <= before + 10), (before, descriptors(site))
        for client, _ in slow[25:]:
            with pytest.raises(ConnectionResetError):
                read_all(client)
            client.close()


def raise_own_limit():
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)


def test_many_connections(site):
    """A thousand cost two descriptors each, and none afterwards."""
    raise_own_limit()
    before = descriptors_at_rest(site)
    with accepting(site) as accepted, closed_at_the_end() as clients:
        for _ in range(1000):
            clients.append(connection(site))
        assert lab.until(lambda: len(accepted) == 1000)
        assert lab.until(lambda: descriptors(site) == before + 2 * 1000), (before, descriptors(site))
        for each in (*clients, *accepted):
            each.sendall(b"!")
        for each in (*clients, *accepted):
            assert each.recv(1) == b"!"
        assert descriptors(site) <= before + 2 * 1000 + 2  # a pipe that was used, and is kept
        for each in (*clients, *accepted):
            each.close()
        assert lab.until(lambda: descriptors(site) <= before + 2), (before, descriptors(site))


def test_a_thousand_slow_readers(site):
    """What waits for them is bounded, next to nothing of it in the agent; others are served; all is freed."""
    raise_own_limit()
    before, rss = descriptors_at_rest(site), site.agent.rss()
    with accepting(site) as accepted, closed_at_the_end() as clients:
        for _ in range(1000):
            with site.lan:
                clients.append(socket.socket(socket.AF_INET6))
            clients[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            clients[-1].settimeout(PATIENCE)
            clients[-1].connect((HOST6, 8080))
        assert lab.until(lambda: len(accepted) == 1000)
        for each in accepted:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            each.setblocking(False)

        def all_wait():
            for each in accepted:
                fill(each)
            return descriptors(site) >= before + 4 * 1000  # each has a pipe
        assert lab.until(all_wait), descriptors(site)
        assert site.agent.rss() - rss < 32 << 20
        assert site.agent.comes_to_rest()
        clients.append(connection(site))
        assert lab.until(lambda: len(accepted) == 1001)
        accepted[-1].sendall(b"quick")
        assert clients[-1].recv(5) == b"quick"
        for each in (*clients, *accepted):
            each.close()
        assert lab.until(lambda: descriptors(site) <= before + 2 * 4), (before, descriptors(site))


def test_a_container_that_does_not_answer(site):
    """Clients that wait for it hold up nobody; those that leave are forgotten at once, others after a while."""
    before = descriptors_at_rest(site)
    with site.box:
        lab.nft_script("add table inet silent; add chain inet silent in { type filter hook input priority 0; }; "
                       "add rule inet silent in tcp dport 80 drop")
    clients = [connection(site) for _ in range(200)]
    assert lab.until(lambda: descriptors(site) == before + 2 * 200), (before, descriptors(site))
    for each in clients[:100]:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        each.close()
    assert lab.until(lambda: descriptors(site) == before + 2 * 100), (before, descriptors(site))  # while others wait
    with lab.Server("box", site.box, 81, "udp"):
        assert lab.exchange(site.lan, HOST6, 8081, "udp").server == "box"
    assert lab.until(lambda: descriptors(site) <= before + 1, 60), (before, descriptors(site))
    for each in clients[100:]:
        with pytest.raises(ConnectionResetError):
            each.recv(1)
        each.close()


def test_half_open_connections(site):
    """A flood of clients that never answer costs no descriptor, and the next client is served."""
    raise_own_limit()
    before = descriptors_at_rest(site)
    with contextlib.ExitStack() as stack, lab.Server("box", site.box, 80):
        with site.lan:
            lab.run("ip", "-6", "address", "add", "fd09::3/64", "dev", "eth0")
            lab.nft_script("table inet deaf { chain in { type filter hook input priority 0;",
                           "ip6 daddr fd09::2 tcp sport 8080 drop; }; }")
            for _ in range(3000):
                sock = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                sock.bind(("fd09::2", 0))
                sock.connect_ex((HOST6, 8080))
        assert len(lab.run("ss", "-Htn6", "state", "syn-recv").splitlines()) > 500
        with site.lan, socket.create_connection((HOST6, 8080), PATIENCE, ("fd09::3", 0)) as client:
            assert b'"box"' in client.recv(2048), site.agent.log
        assert descriptors(site) <= before + 4


def test_a_port_leaves_descriptors_to_others(host, tmp_path):
    """A client that takes all that it can get does not shut out those of another port."""
    with Site(host, tmp_path, "8080:80", "8082:82") as site:
        assert site.forwards(8080) and site.forwards(8082)
        resource.prlimit(site.agent.process.pid, resource.RLIMIT_NOFILE, (256, 256))
        with listener(site), lab.Server("box", site.box, 82):
            clients = []
            for _ in range(150):
                with contextlib.suppress(ConnectionResetError):  # so early that connect(2) says it
                    clients.append(connection(site))
            assert lab.until(lambda: descriptors(site) > 128)
            assert lab.exchange(site.lan, HOST6, 8082).server == "box", site.agent.log
            for each in clients:
                each.close()


def test_more_clients_than_descriptors(site):
    """Those that are too many are reset; some descriptors are left for healing."""
    assert site.forwards(8080)
    resource.prlimit(site.agent.process.pid, resource.RLIMIT_NOFILE, (128, 128))
    with listener(site):
        clients, is_reset = [], False
        for _ in range(120):
            try:
                clients.append(connection(site))
            except ConnectionResetError:  # so early that connect(2) says it
                is_reset = True
        assert lab.until(lambda: descriptors(site) >= 50)
        chains = lab.chains()
        lab.nft_script("flush ruleset")
        assert lab.until(lambda: lab.chains() == chains), site.agent.log
        time.sleep(2)  # an audit
        assert "Too many open files" not in site.agent.log and descriptors(site) < 128
        if not is_reset:
            with pytest.raises(ConnectionResetError):
                clients[-1].recv(1)
        for each in clients:
            each.close()


def test_forged_datagrams(site):
    """A flood from forged sources has at most so many sessions, and the next client is served."""
    before = descriptors_at_rest(site)
    with lab.Server("box", site.box, 81, "udp"):
        with site.lan:
            lab.run("ip", "-6", "address", "add", "fd09::ffff/64", "dev", "eth0")
            for index in range(3000):
                with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
                    sock.bind(("fd09::2", 20000 + index))
                    sock.sendto(b"?", (HOST6, 8081))
        assert lab.until(lambda: lab.exchange(site.lan, HOST6, 8081, "udp")), site.agent.log
        assert descriptors(site) - before <= 1024 + 4


def test_taken_over(host, site, tmp_path):
    """After SIGKILL the next one takes the table over, and forwards."""
    assert site.forwards(8080)
    site.agent.stop(9)
    with Agent(host.cli, "--forward", cache=tmp_path) as again, lab.Server("box", site.box, 80):
        assert site.forwards(8080), again.log
        assert lab.exchange(site.lan, HOST6, 8080).server == "box"


def test_urgent_data(site):
    """It arrives as urgent data, in its place, and what comes after it arrives; waiting for more costs no CPU."""
    assert site.forwards(8080)
    with listener(site) as server:
        for near in True, False:
            for inline, expected in (0, bytes(10) + b"x" * (1 << 20)), (1, bytes(10) + b"U" + b"x" * (1 << 20)):
                client, (inner, _) = connection(site), server.accept()
                one, other = (client, inner) if near else (inner, client)
                inner.settimeout(PATIENCE)
                other.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, inline)
                urgent = select.poll()
                urgent.register(other, select.POLLPRI)
                one.sendall(bytes(10))
                one.send(b"U", socket.MSG_OOB)
                assert urgent.poll(1000 * PATIENCE)
                assert site.agent.comes_to_rest()
                if not inline:
                    assert other.recv(1, socket.MSG_OOB) == b"U"
                sender = threading.Thread(target=lambda one=one: (one.sendall(b"x" * (1 << 20)),
                                                                  one.shutdown(socket.SHUT_WR)))
                sender.start()
                received = b""
                while data := other.recv(1 << 16):
                    received += data
                sender.join()
                assert received == expected, (near, inline, len(received))
                client.close()
                inner.close()


def test_an_early_answer(site):
    """A server that answers and closes while the client still sends: the answer arrives, and then the reset."""
    before = descriptors_at_rest(site)
    with listener(site) as server:
        server.settimeout(None)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    inner, _ = server.accept()
                    inner.recv(1)
                    inner.sendall(b"4" * 1000)
                    inner.close()
        threading.Thread(target=serve, daemon=True).start()
        for _ in range(100):
            client, answer = connection(site), b""
            with contextlib.suppress(ConnectionError):
                for _ in range(40):
                    client.sendall(bytes(1 << 14))
            with contextlib.suppress(ConnectionError):
                while data := client.recv(65536):
                    answer += data
            client.close()
            assert len(answer) == 1000
        assert lab.until(lambda: descriptors(site) <= before + 2 * 4), (before, descriptors(site))
        server.shutdown(socket.SHUT_RDWR)


def test_readers_that_stop_leave_descriptors(host, tmp_path):
    """However many wait for them, other ports are served and heals go on, and each byte arrives in the end."""
    with Site(host, tmp_path, "8080:80", "8082:82") as site:
        assert site.forwards(8080) and site.forwards(8082)
        resource.prlimit(site.agent.process.pid, resource.RLIMIT_NOFILE, (256, 256))
        with accepting(site) as accepted, lab.Server("box", site.box, 82), closed_at_the_end() as clients:
            for _ in range(60):
                clients.append(connection(site))
                assert lab.until(lambda: len(accepted) == len(clients))
            sent = [0] * len(accepted)
            for _ in range(3):
                for index, each in enumerate(accepted):
                    each.setblocking(False)
                    sent[index] += fill(each)
                time.sleep(0.1)
            assert site.agent.comes_to_rest()
            assert descriptors(site) < 256 - 64, descriptors(site)
            assert lab.exchange(site.lan, HOST6, 8082).server == "box", site.agent.log
            chains = lab.chains()
            lab.nft_script("flush ruleset")
            assert lab.until(lambda: lab.chains() == chains), site.agent.log
            assert "Too many open files" not in site.agent.log
            for client, inner, size in zip(clients, accepted, sent, strict=True):
                inner.shutdown(socket.SHUT_WR)
                received = 0
                while data := client.recv(1 << 20):
                    received += len(data)
                assert received == size


def test_keepalive(site):
    """Both ends are asked each minute of silence whether they are there."""
    assert site.forwards(8080)
    with listener(site) as server, connection(site), server.accept()[0]:
        found = [line.partition("timer:(keepalive,")[2] for line in lab.run("ss", "-Htno", "state", "established")
                 .splitlines() if ":8080" in line or "10.88." in line]
        assert len(found) == 2 and all(each.startswith("1min,") or "sec," in each for each in found), found


def test_clients_that_leave_with_the_answer(site):
    """A client's reset and the container's answer, both in one turn: nothing is reported, and the next is served."""
    before = descriptors_at_rest(site)
    with listener(site) as server:
        with site.box:
            lab.nft_script("add table inet silent; add chain inet silent in { type filter hook input priority 0; }; "
                           "add rule inet silent in tcp dport 80 drop")
        clients = [connection(site) for _ in range(60)]
        assert lab.until(lambda: descriptors(site) == before + 2 * 60), (before, descriptors(site))
        with site.box:
            lab.nft_script("delete table inet silent")
        site.agent.pause()
        for each in clients:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            each.close()
        answered = "ss", "-Htn", "state", "established", "dst", site.box.ipv4  # SYN is sent again, each time later
        assert lab.until(lambda: lab.run(*answered).count("\n") == 60), lab.run(*answered)
        site.agent.send(signal.SIGCONT)
        assert lab.until(lambda: descriptors(site) <= before), (before, descriptors(site))
        assert "please report it" not in site.agent.log
        server.close()
    with lab.Server("box", site.box, 80):
        assert lab.exchange(site.lan, HOST6, 8080).server == "box", site.agent.log


def test_a_log_that_is_gone():
    """What fails, and cannot be reported, ends neither the thread nor the wait of who asked for it."""
    def fail(*_):
        raise BrokenPipeError
    poll, done = Poll(lambda: None, fail), []
    poll.do(fail)
    poll.do(done.append, True)
    poll.close()
    assert done == [True]
