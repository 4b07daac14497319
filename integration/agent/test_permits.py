"""cni-portmap agent --forward: to whom, while files come late, the table is read again, and ports change hands."""
import contextlib
import pathlib
import signal
import socket
import time

import lab
import pytest
from lab.calls import mapping
from lab.forwarding import HOST6, Site
from lab.libcni_cache import Cache


@pytest.fixture
def site(host, tmp_path):
    """An IPv4-only container that publishes on every address."""
    with Site(host, tmp_path, "8080:80") as made:
        yield made


@contextlib.contextmanager
def another(site, tmp_path, port, has_file=True):
    """A container that comes later, with libcni's file or without."""
    box = lab.Container(site.network, f"box{port}", [mapping(f"{port}:80")])
    try:
        if has_file:
            Cache(tmp_path).remember(box)
        yield box
    finally:
        box.remove()


def reader(agent):
    """The agent's child that reads files, 0 for none."""
    for pid in agent.children():
        with contextlib.suppress(OSError):
            if pathlib.Path(f"/proc/{pid}/comm").read_text().startswith("cni-portmap/for"):
                return int(pid)
    return 0


def test_one_that_comes_while_files_are_read(site, tmp_path):
    """It is not forgotten. The child that reads is held, so that this instant is met."""
    assert site.forwards(8080)
    path, = tmp_path.glob("labnet-*")
    with contextlib.ExitStack() as later:
        with site.agent.held_at(path):
            site.agent.send(signal.SIGHUP)
            assert lab.until(lambda: reader(site.agent)), site.agent.log
            later.enter_context(another(site, tmp_path, 8090))
            site.agent.catch_up()
            assert reader(site.agent)
        assert site.forwards(8090), site.agent.log
        assert site.forwards(8080), site.agent.log


def test_one_without_a_file_holds_up_nobody(site, tmp_path):
    """Later containers are forwarded to as soon as others, while the agent still looks for its file."""
    assert site.forwards(8080)
    with another(site, tmp_path, 8100, has_file=False):
        time.sleep(17)  # its next look is a minute later
        with another(site, tmp_path, 8200):
            assert site.forwards(8200), site.agent.log
        assert not site.forwards(8100, 0)


def test_a_file_that_is_being_written(site, tmp_path):
    """The agent, which looks at it in the fourth second after ADD, looks again."""
    with another(site, tmp_path, 8090):
        path, = tmp_path.glob("labnet-box8090-*")
        text = path.read_text()
        path.write_text(text[:-1])
        time.sleep(5)
        path.write_text(text)
        assert site.forwards(8090), site.agent.log


def test_connections_outlive_a_reload(site):
    """What the files permit is the same as before, so nothing ends."""
    assert site.forwards(8080)
    with site.box:
        server = socket.create_server(("", 80))
    with site.lan:
        client = socket.create_connection((HOST6, 8080), 30)
    server.settimeout(30)
    with server, client, server.accept()[0] as inner:
        inner.settimeout(30)
        site.agent.send(signal.SIGHUP)
        site.agent.wait_for("READY=1")
        time.sleep(5)  # it reads the files 3 seconds later
        client.sendall(b"?")
        assert inner.recv(1) == b"?"
        inner.sendall(b"!")
        assert client.recv(1) == b"!"


def test_a_port_that_was_somebody_elses_for_a_while(host, site, tmp_path):
    """A container with IPv6 has [::]:8080 while it is there, and then the other one is forwarded to again."""
    assert site.forwards(8080)
    six = lab.Network(lab.bridge_conflist(name="six", bridge="br6", subnets=("fd99::/64",)), host.executable.parent)
    with lab.Server("box", site.box, 80):
        assert lab.exchange(site.lan, HOST6, 8080).server == "box"
        other = lab.Container(six, "six", [{**mapping("8080:80"), "hostIP": "::"}])
        try:
            with lab.Server("six", other, 80):
                assert lab.exchange(site.lan, HOST6, 8080).server == "six"
        finally:
            other.remove()
        assert lab.until(lambda: getattr(lab.exchange(site.lan, HOST6, 8080), "server", "") == "box"), \
            site.agent.log


def test_a_service_of_the_host_is_not_led_to(host, tmp_path):
    """Where somebody else has the socket, link-local clients are not led to him; once the agent has it, they are."""
    own = socket.socket(socket.AF_INET6)
    own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    own.bind(("::", 8080))
    own.listen(8)

    def table():
        return lab.nft("list", "table", "inet", "cni_portmap_agent", check=False)
    with Site(host, tmp_path, "8080:80", "8082:80", subnets=("10.88.0.0/16", "fd88::/64")) as site:
        with own:
            assert lab.until(lambda: "8082" in table()), site.agent.log
            assert "8080" not in table()
        assert lab.until(lambda: "8080" in table(), 60), site.agent.log  # it is tried every 20 seconds
