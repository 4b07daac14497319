"""podman of an ordinary user: CNI backend, slirp4netns, runc."""
import lab
import pytest
from lab.machine import CLIENT_IP, HOST_IP, says, shown_in
from lab.podman import RootlessPodman

COMMANDS = """
podman unshare --rootless-netns cni-portmap list
podman unshare --rootless-netns cni-portmap restore
"""
SLIRP = "10.0.2.100"  # the address of the user's network


@pytest.fixture(scope="module")
def podman(podman_version, need):
    need("slirp4netns", "newuidmap", "/dev/net")
    with RootlessPodman("rootless") as machine:
        yield machine
    assert lab.table() == ""  # the host's own rules stay as they are


@pytest.fixture
def clean(podman):
    """When a test's containers are removed, nothing of them is left in the user's table."""
    yield
    podman.podman("rm", "-af", "-t", "0")
    assert "c/" not in podman.within("nft", "list", "ruleset")


def ports_of(podman):
    """What is published, as cni-portmap list says it."""
    return {line.split()[0] for line in podman.within("cni-portmap", "list").splitlines()[1:]}


def test_paths(podman, clean):
    """run -p: it answers from the LAN and the host, through podman's forwarder; in the user's network through us"""
    podman.start("-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "5353:53/udp")
    podman.start(name="other")
    inside, other, network = podman.inside(), podman.inside("other"), podman.network()
    with lab.Server("web", inside, 80), lab.Server("web", inside, 53, "udp"):
        for where, ip in (podman.client, HOST_IP[4]), (podman.client, HOST_IP[6]), (lab.HOST, "127.0.0.1"):
            for port, protocol in (8080, "tcp"), (5353, "udp"):
                saw = lab.exchange(where, ip, port, protocol)
                assert saw.server == "web" and saw.peer not in (*CLIENT_IP.values(), *HOST_IP.values(), "127.0.0.1")
        assert lab.exchange(podman.client, HOST_IP[4], 8081, timeout=0.3) is None
        gateway = lab.exchange(network, "127.0.0.1", 8080).peer
        for where, ip, port, protocol, sees in (
                (network, "127.0.0.1", 8081, "tcp", gateway), (network, SLIRP, 8080, "tcp", SLIRP),
                (network, SLIRP, 5353, "udp", SLIRP), (other, gateway, 8080, "tcp", gateway),
                (inside, gateway, 8080, "tcp", gateway)):
            saw = lab.exchange(where, ip, port, protocol)
            assert (saw.server, saw.peer) == ("web", sees)
        assert lab.exchange(network, SLIRP, 8081, timeout=0.3) is None
    assert says("docs/podman.md", "so the container does not see the client's address, with any plugin")


def test_stop_start_restart(podman, clean):
    """stop: nothing is left; start, restart: it is published again"""
    podman.start("-p", "8080:80")
    before = ports_of(podman)
    assert before == {"0.0.0.0:8080/tcp", "[::]:8080/tcp"}
    podman.podman("stop", "-t", "0", "web")
    assert ports_of(podman) == set()
    podman.podman("start", "web")
    assert ports_of(podman) == before
    podman.podman("restart", "-t", "0", "web")
    assert ports_of(podman) == before


def test_a_second_claim_is_refused(podman, clean):
    """A second container with the port is refused, with the owner's name; the first is unharmed"""
    owner = podman.start("-p", "8080:80")
    before = ports_of(podman)
    assert f"is already published by container {owner} (web), interface eth0" in podman.refuses("-p", "8080:80")
    assert ports_of(podman) == before


def test_ports_come_back_after_a_flush(podman, clean):
    """nft flush ruleset in the user's network, then cni-portmap restore there"""
    podman.start("-p", "8080:80")
    before = ports_of(podman)
    podman.within("nft", "flush", "ruleset")
    assert ports_of(podman) == set()
    assert "1 restored" in podman.run(*podman.as_user, "sh", "-euc", COMMANDS)
    assert ports_of(podman) == before
    with lab.Server("web", podman.inside(), 80):
        assert lab.exchange(podman.network(), "127.0.0.1", 8080)
    assert shown_in("docs/podman.md", COMMANDS)


@pytest.mark.parametrize(("shift", "number"), [(0, 800), (1, 700)], ids=["to themselves", "to others"])
def test_many_ports(podman, clean, shift, number):
    """run -p of a range, where socket buffers cannot be raised; they lead"""
    podman.start("-p", f"{11000 - number}-10999:{11000 - number + shift}-{10999 + shift}")
    with lab.Server("web", podman.inside(), 10999 + shift):
        assert lab.exchange(podman.network(), "127.0.0.1", 10999)


@pytest.mark.parametrize("shift", [0, 1], ids=["to themselves", "to others"])
def test_too_many_ports_are_refused_with_advice(podman, clean, shift):
    """A thousand, over IPv4 and IPv6, do not fit into a socket buffer that cannot be raised."""
    said = podman.refuses("-p", f"10000-10999:{10000 + shift}-{10999 + shift}")
    assert "too many ports" in said and "net.core.wmem_max" in said
