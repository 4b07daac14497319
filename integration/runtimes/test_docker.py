"""Docker Engine beside the plugin: each publishes containers of its own on one host."""
import contextlib
import json

import lab
import pytest
from lab.docker import Docker
from lab.machine import UNPACKED, VERSIONS, says, shown_in
from lab.paths import SETTINGS
from lab.site import Site

PORT = 8300
ACCEPT = """
iptables -I DOCKER-USER -m conntrack --ctstate DNAT -j ACCEPT
"""
ACCEPT6 = """
ip6tables -I FORWARD -m conntrack --ctstate DNAT -j ACCEPT
"""
UNIT = "/etc/systemd/system/docker.service.d/forward.conf"
KEEP = f"""
mkdir -p /etc/systemd/system/docker.service.d
cat >{UNIT} <<'END'
[Service]
ExecStartPost={ACCEPT.strip()}
ExecStartPost={ACCEPT6.strip()}
END
"""
IPV6 = "--experimental", "--ip6tables", "--ipv6", "--fixed-cidr-v6", "fd77::/64"
NO_PROXY = ("--userland-proxy=false",)
BRIDGE = "10.88.0.1"  # the host's address on our bridge; Docker masquerades what leaves its own


@pytest.fixture(scope="module")
def site(need, bin_dir):
    """A host with published containers, before Docker comes."""
    need("/usr/lib/cni/bridge", "iptables")
    with Site(SETTINGS[0], bin_dir) as site:  # a bridge, dual stack
        yield site


@pytest.fixture(scope="module")
def docker(need, site):
    need(UNPACKED / "docker", "containerd", "runc", "busybox")
    with Docker("docker", "docker") as machine:
        VERSIONS[__name__].append(machine.version())
        yield machine
        machine.end()


@pytest.fixture
def container(docker):
    """A container that Docker publishes, with a server, and its namespace."""
    inside = docker.start("-p", "8200:80", "-p", "127.0.0.1:8201:80")
    with lab.Server("docker", inside, 80):
        yield inside
    docker.remove()


def test_our_ports_answer_beside_docker(site, docker, container):
    """Every path to our ports leads where it should, while Docker publishes a container"""
    assert site.differences() == {}


def test_docker_answers_beside_us(site, docker, container):
    """Docker's port: from the LAN, the host, localhost, and our containers"""
    lan = site.ip("LAN address", 4)
    for name in "client", "host", "container", "neighbour", "stranger":
        assert lab.exchange(site.places[name], lan, 8200).server == "docker", name
    for port in 8200, 8201:
        assert lab.exchange(lab.HOST, "127.0.0.1", port).server == "docker"
    assert lab.exchange(site.client, lan, 8201, timeout=0.3) is None


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_docker_reaches_our_ports(site, docker, container, protocol):
    """From Docker's container to the host's addresses, on our ports"""
    for ip in site.ip("LAN address", 4), "172.17.0.1", BRIDGE:
        assert lab.exchange(container, ip, 8080, protocol) == lab.Saw("web", BRIDGE, 80)


def test_docker_restarts(site, docker):
    """dockerd ends, and starts again: our ports answer meanwhile and afterwards; our table stays as it is"""
    before = lab.table()
    docker.end()
    assert site.differences() == {}
    docker.begin()
    assert site.differences() == {}
    assert lab.table() == before


def whom(site, port):
    """Who answers on a port: on the LAN's addresses, whoever asks, and on localhost."""
    machines = [site.places[name] for name in ("client", "host", "container", "stranger")]
    found = {f"IPv{family}": {lab.exchange(where, site.ip("LAN address", family), port).server for where in machines}
             for family in (4, 6)}
    return found | {ip: {lab.exchange(lab.HOST, ip, port).server} for ip in ("127.0.0.1", "::1")}


def all_but(server, **others):
    """The same where a server answers but for some `others`: ipv4, ipv6, localhost."""
    names = {"IPv4": "ipv4", "IPv6": "ipv6", "127.0.0.1": "localhost", "::1": "localhost6"}
    return {where: {others.get(name, server)} for where, name in names.items()}


def forget_rules():
    """As a host is before Docker has started."""
    for family in "ip", "ip6":
        for table in "filter", "nat":
            lab.nft("-f", "-", input=f"add table {family} {table}\ndelete table {family} {table}\n")


def published(site):
    """Who publishes the port, as `cni-portmap list --all` says it: family, publisher, and with whom it is split."""
    found = json.loads(lab.run(site.bin_dir.parent / "sbin/cni-portmap", "list", "--all", "--json", "--port", PORT))
    return {(str(each["family"]), each["publisher"], ", ".join(each["split"])) for each in found}


def register_last(docker, last):
    """Let the chains of one of the two be registered after the other's: at one priority the last one comes first."""
    if last == "ours":
        lab.register_again()
    else:
        begin_anew(docker)


def begin_anew(docker, *options):
    """Start Docker where it has never been."""
    docker.end()
    forget_rules()
    docker.begin(*options)


@pytest.mark.parametrize("first", ["docker", "ours"])
@pytest.mark.parametrize("last", ["docker", "ours"])
def test_one_port_with_two_owners(site, docker, first, last):
    """Neither sees the other: over IPv4 whose chain was registered last answers, elsewhere we do [last, first claim]"""
    register_last(docker, last)
    ours = site.publish("ours", [{"hostPort": PORT, "containerPort": 80, "protocol": "tcp"}])
    with contextlib.ExitStack() as stack:
        if first == "ours":
            stack.enter_context(ours)
        stack.enter_context(lab.Server("docker", docker.start("-p", f"{PORT}:80"), 80))
        if first == "ours":
            assert whom(site, PORT) == all_but("ours", ipv4=last)
            assert published(site) == {("4", "cni-portmap", "Docker"), ("4", "Docker", "cni-portmap"),
                                       ("6", "cni-portmap", "")}
            docker.remove()
            assert published(site) == {("4", "cni-portmap", ""), ("6", "cni-portmap", "")}
            assert whom(site, PORT) == all_but("ours")
            return
        stack.callback(docker.remove)
        with ours:
            assert whom(site, PORT) == all_but("ours", ipv4=last)
        assert whom(site, PORT) == all_but("docker")
    assert says("docs/docker.md", "on IPv4 addresses of the host, whoever registered its chains last answers",
                "over IPv6, cni-portmap answers", "on localhost, cni-portmap answers")


@pytest.mark.parametrize(("options", "theirs", "sentence"), [
    (NO_PROXY, {"ipv4": "docker", "localhost": "docker"},
     "With `--userland-proxy=false`, 127.0.0.1 is like the other IPv4 addresses."),
    (IPV6, {"ipv4": "docker", "ipv6": "docker"},
     "unless Docker writes rules for IPv6 (`--ip6tables` and an IPv6 network)"),
], ids=["without its proxy", "with IPv6"])
def test_one_port_with_two_owners_and_settings(site, docker, options, theirs, sentence):
    """Docker's settings decide where it stands in our way: where its chains are registered last, it answers"""
    begin_anew(docker, *options)
    with site.publish("ours", [{"hostPort": PORT, "containerPort": 80, "protocol": "tcp"}]), \
            lab.Server("docker", docker.start("-p", f"{PORT}:80"), 80):
        assert whom(site, PORT) == all_but("ours", **theirs)
        lab.register_again()
        lab.run("sh", "-euc", ACCEPT6)  # for IPv6, Docker drops what it does not forward itself
        assert whom(site, PORT) == all_but("ours")
        docker.remove()
    begin_anew(docker)
    assert says("docs/docker.md", sentence)


def test_a_docker_without_rules(site, docker):
    """--iptables=false: its proxy answers alone, and list --all does not know of it; beside us, we answer"""
    begin_anew(docker, "--iptables=false")
    command = site.bin_dir.parent / "sbin/cni-portmap", "list", "--all", "--json", "--port", PORT
    with lab.Server("docker", docker.start("-p", f"{PORT}:80"), 80):
        assert whom(site, PORT) == all_but("docker")
        assert json.loads(lab.run(*command, check=False)) == []
        assert "docker-proxy" in docker.run("ss", "-Hltnp", f"sport = :{PORT}")
        with site.publish("ours", [{"hostPort": PORT, "containerPort": 80, "protocol": "tcp"}]):
            assert whom(site, PORT) == all_but("ours")
        docker.remove()
    begin_anew(docker)
    assert says("docs/docker.md", "of a Docker with `--iptables=false`, whose proxy does all, it shows nothing")


def test_hostportinuse_refuses_dockers_port(site, docker):
    """hostPortInUse: docker-proxy holds the port, so "refuse" refuses it"""
    docker.start("-p", f"{PORT}:80")
    with pytest.raises(lab.CniFailed, match=f"tcp port {PORT} on 0.0.0.0 is in use by a process of this host"), \
            site.publish("ours", [{"hostPort": PORT, "containerPort": 80, "protocol": "tcp"}],
                         hostPortInUse="refuse"):
        pass
    docker.remove()


def test_fresh_host(site, docker):
    """Docker switches forwarding on, and drops what it does not forward itself; the cure in docs/docker.md"""
    docker.end()
    forget_rules()
    lab.sysctl("net.ipv4.ip_forward", 0)
    docker.begin()
    assert site.differences(lambda path, family, protocol: (
        site.answers_host if family == 4 else site.answers)(path, family, protocol)) == {}
    lab.run("sh", "-euc", ACCEPT)
    assert site.differences() == {}
    assert shown_in("docs/docker.md", ACCEPT)
    docker.end()
    docker.begin()
    assert site.differences() == {}
    assert says("docs/docker.md", "Both rules outlive a restart of Docker")


@pytest.mark.parametrize("forwarded", [0, 1])
def test_fresh_host_with_ipv6(site, docker, forwarded):
    """The same with Docker's rules for IPv6, whether the host forwarded IPv6 before; its service keeps the cure"""
    docker.end()
    forget_rules()
    lab.sysctl("net.ipv4.ip_forward", 0)
    lab.sysctl("net.ipv6.conf.all.forwarding", forwarded)
    docker.begin(*IPV6)
    lab.sysctl("net.ipv6.conf.all.forwarding", 1)
    assert site.differences(site.answers_host) == {}
    docker.shell(KEEP)
    for line in docker.run("cat", UNIT).splitlines():
        if line.startswith("ExecStartPost="):
            lab.run(*line.partition("=")[2].split())
    assert site.differences() == {}
    docker.run("rm", UNIT)
    docker.end()
    docker.begin()
    assert shown_in("docs/docker.md", ACCEPT6)
    assert shown_in("docs/docker.md", KEEP)


def test_our_end_leaves_dockers_localhost_open(site, docker, bin_dir):
    """A Docker network on our bridge, without docker-proxy: its localhost answers after our last DEL, and teardown"""
    docker.end()
    docker.begin("--userland-proxy=false")
    docker.run("docker", "network", "create", "--opt", "com.docker.network.bridge.name=cni1", "--subnet",
               "10.89.0.0/16", "--gateway", "10.89.0.1", "--ip-range", "10.89.128.0/17", "shared")
    with lab.Server("docker", docker.start("--network", "shared", "-p", "127.0.0.1:8400:80"), 80):
        with site.publish("ours", [{"hostPort": 8402, "containerPort": 80, "protocol": "tcp"}], network=site.far):
            assert lab.exchange(lab.HOST, "127.0.0.1", 8402).server == "ours"
            assert lab.exchange(lab.HOST, "127.0.0.1", 8400).server == "docker"
        assert lab.exchange(lab.HOST, "127.0.0.1", 8400).server == "docker"
        said = lab.run(bin_dir.parent / "sbin/cni-portmap", "teardown", "--force")
        assert lab.exchange(lab.HOST, "127.0.0.1", 8400).server == "docker"
    assert "127.0.0.0/8 stays open on cni1" in said
    docker.remove()
