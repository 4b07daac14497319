"""podman: rootful, CNI backend, runc."""
import contextlib

import lab
import pytest
from lab.machine import CLIENT_IP, HOST_IP, VERSIONS, Machine, flush_ruleset, shown_in

INSTALL = "scripts/install --bin-dir /usr/local/lib/cni"
COMMANDS = f"""
{INSTALL}
cp conf/podman/web.conflist /etc/cni/net.d/
podman run --detach --name hello --network web -p 8080:80 "$IMAGE"
curl --retry 5 --retry-connrefused http://127.0.0.1:8080/
cni-portmap list
"""
CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_backend = "cni"
"""


class Podman(Machine):
    """A machine with podman, images without a registry, and two networks, of which `dual` is dual-stack."""

    def prepare(self) -> None:
        self.write("/etc/containers/containers.conf", CONF)
        self.load("podman load -i", "localhost/image:latest", "sleep", "100000")
        self.load("podman load -i", "localhost/hello:latest", "httpd", "-f", "-p", "80")
        self.run("podman", "network", "create", "--ipv6", "dual")
        self.run("podman", "network", "create", "other")

    def podman(self, *words: object) -> str:
        return self.run("podman", *words).strip()

    def start(self, *options: str, name: str = "web", network: str = "dual") -> str:
        return self.podman("run", "-d", "--name", name, "--network", network, *options, "image")

    def inside(self, name: str = "web") -> lab.Netns:
        return lab.Netns(self.podman("inspect", "--format", "{{.NetworkSettings.SandboxKey}}", name))

    def answers(self, port: int = 8080, families: tuple[int, ...] = (4, 6), name: str = "web") -> bool:
        """Whether a container's server answers on the host's addresses, and sees the client's own."""
        with lab.Server(name, self.inside(name), 80):
            return [lab.exchange(self.client, HOST_IP[family], port) for family in families] == \
                [lab.Saw(name, CLIENT_IP[family], 80) for family in families]


@pytest.fixture(scope="module")
def podman(need):
    need("podman", "runc", "busybox", "/usr/lib/cni/bridge")
    version = lab.run("podman", "--version").strip()
    if " 4." not in version:
        pytest.skip(f"{version} calls no CNI plugins: Debian 12 has podman 4.3")
    with Podman("podman", INSTALL) as machine:
        VERSIONS[__name__].append(version)
        yield machine


@pytest.fixture
def clean(podman):
    """When a test's containers are removed, nothing of them is left in our table."""
    yield
    podman.podman("pod", "rm", "-af", "-t", "0")
    podman.podman("rm", "-af", "-t", "0")
    assert "c/" not in lab.table()


def test_without_ports(podman, clean):
    """run without -p: no table is made"""
    podman.start()
    assert lab.table() == ""


class TestPaths:
    """One container with every kind of published port."""

    @pytest.fixture(scope="class")
    def gateways(self, podman):
        podman.start("-p", "8080:80", "-p", "127.0.0.1:8081:80", "-p", "[::1]:8082:80", "-p", "9000-9003:9000-9003/udp")
        with contextlib.ExitStack() as stack:
            for port, protocol in (80, "tcp"), (9000, "udp"), (9003, "udp"):
                stack.enter_context(lab.Server("web", podman.inside(), port, protocol))
            yield [subnet["gateway"] for subnet in podman.json("podman", "network", "inspect", "dual")[0]["subnets"]]
        podman.podman("rm", "-f", "-t", "0", "web")

    @pytest.mark.parametrize(("source", "ip", "port", "protocol", "seen"), [
        ("client", HOST_IP[4], 8080, "tcp", CLIENT_IP[4]),
        ("client", HOST_IP[6], 8080, "tcp", CLIENT_IP[6]),
        ("host", HOST_IP[4], 8080, "tcp", HOST_IP[4]),
        ("host", HOST_IP[6], 8080, "tcp", HOST_IP[6]),
        ("host", "127.0.0.1", 8080, "tcp", "gateway"),
        ("host", "::1", 8080, "tcp", "gateway"),
        ("host", "127.0.0.1", 8081, "tcp", "gateway"),
        ("host", "::1", 8082, "tcp", "gateway"),
        ("host", HOST_IP[4], 8081, "tcp", "nobody"),
        ("client", HOST_IP[4], 8081, "tcp", "nobody"),
        ("client", HOST_IP[6], 8082, "tcp", "nobody"),
        ("client", HOST_IP[4], 9000, "udp", CLIENT_IP[4]),
        ("client", HOST_IP[6], 9003, "udp", CLIENT_IP[6]),
        ("client", HOST_IP[4], 9004, "udp", "nobody"),
    ])
    def test_path_leads_where_it_should(self, podman, gateways, source, ip, port, protocol, seen):
        """run -p: whom the server sees"""
        assert podman.whom_server_sees(source, ip, port, protocol) in (gateways if seen == "gateway" else [seen])

    def test_our_dnat(self, podman, gateways):
        """conmon listens on the port, and never hears of a connection: our rule counts it"""
        def counted() -> int:
            return int(podman.json("cni-portmap", "list", "--json", "--port", "8080")[0]["connections"])
        before = counted()
        assert lab.exchange(podman.client, HOST_IP[4], 8080) == lab.Saw("web", CLIENT_IP[4], 80)
        assert counted() == before + 1
        assert "conmon" in podman.run("ss", "-Hltnp", "sport = :8080")


def test_stop_start_restart(podman, clean):
    """stop: nothing is left; start, restart: it answers again"""
    podman.start("-p", "8080:80")
    assert podman.answers()
    podman.podman("stop", "-t", "0", "web")
    assert "c/" not in lab.table()
    podman.podman("start", "web")
    assert podman.answers()
    podman.podman("restart", "-t", "0", "web")
    assert podman.answers()


@pytest.mark.parametrize("command", ["podman network reload web", "cni-portmap restore"])
def test_ports_come_back_after_a_flush(podman, clean, command):
    """nft flush ruleset, then"""
    podman.start("-p", "8080:80")
    before = lab.table()
    flush_ruleset()
    assert not podman.answers()
    podman.run(*command.split())
    assert podman.answers()
    # A flush takes the note that localhost was opened along; only restore knows that it was by this plugin.
    lines = [[line for line in text.splitlines() if "route_localnet" not in line] for text in (before, lab.table())]
    assert len(lines[0]) == len(lines[1])


def test_network_reload_changes_nothing(podman, clean):
    """network reload: it answers as before"""
    podman.start("-p", "8080:80")
    podman.podman("network", "reload", "--all")
    assert podman.answers()


def test_ports_of_a_pod_answer(podman, clean):
    """pod create -p: a container of the pod answers; pod stop, pod start"""
    podman.podman("pod", "create", "--name", "pod", "--network", "dual", "-p", "8080:80", "--infra-image", "image",
                  "--infra-command", "/bin/busybox sleep 100000", "--infra-name", "infra")
    podman.podman("run", "-d", "--pod", "pod", "--name", "web", "image")
    assert podman.answers(name="infra")
    podman.podman("pod", "stop", "-t", "0", "pod")
    assert "c/" not in lab.table()
    podman.podman("pod", "start", "pod")
    assert podman.answers(name="infra")


def test_two_networks(podman, clean):
    """run --network other,dual: both addresses of the container serve one port"""
    podman.start("-p", "8080:80", network="other,dual")
    assert podman.answers()


@pytest.mark.parametrize("leaves", ["other", "dual"])
def test_connect_and_disconnect_keep_the_port(podman, clean, leaves):
    """network connect other: it answers; so it does after network disconnect"""
    podman.start("-p", "8080:80")
    podman.podman("network", "connect", "other", "web")
    assert podman.answers()
    podman.podman("network", "disconnect", leaves, "web")
    with lab.Server("web", podman.inside(), 80):  # the container has no default route left, so from the host
        assert lab.exchange(lab.HOST, "127.0.0.1", 8080)


def test_a_killed_container_frees_its_port(podman, clean):
    """kill -9 of the container: its port is free for another"""
    podman.start("-p", "8080:80")
    podman.run("kill", "-9", podman.podman("inspect", "--format", "{{.State.Pid}}", "web"))
    assert lab.until(lambda: "c/" not in lab.table())
    podman.start("-p", "8080:80", name="next")
    assert podman.answers(name="next")


def test_conmon_killed(podman, clean):
    """kill -9 of conmon and the container: rm -f leaves nothing, the port is free for another"""
    podman.start("-p", "8080:80")
    podman.run("kill", "-9", *podman.podman("inspect", "--format", "{{.State.ConmonPid}} {{.State.Pid}}",
                                            "web").split())
    assert lab.until(
        lambda: not podman.podman("ps", "-aq") or podman.run("podman", "rm", "-f", "-t", "0", "web", check=False))
    assert "c/" not in lab.table()
    podman.start("-p", "8080:80", name="next")
    assert podman.answers(name="next")


def test_a_removed_container_leaves_nothing(podman, clean):
    """rm -f of a running container: nothing is left"""
    podman.start("-p", "8080:80")
    podman.podman("rm", "-f", "-t", "0", "web")
    assert "c/" not in lab.table()


@pytest.mark.parametrize("second", ["8080:80", "127.0.0.1:8080:80"])
def test_a_second_claim_is_refused(podman, clean, second):
    """A second container with the port is refused, with the owner's name; the first is unharmed; the second had -p"""
    owner = podman.start("-p", "8080:80")
    before = lab.table()
    said = podman.fails("podman", "run", "-d", "--network", "dual", "-p", second, "image")
    assert f"is already published by container {owner} (web), interface eth0" in said
    assert lab.table() == before
    assert podman.answers()


def test_random_port(podman, clean):
    """run -p 80: the port that podman chooses answers"""
    podman.start("-p", "80")
    assert podman.answers(int(podman.podman("port", "web", "80").rpartition(":")[2]))


def test_documented_commands(podman, clean):
    """The commands in docs/podman.md"""
    assert "hello\n" in podman.shell(f"IMAGE=hello\n{COMMANDS}")
    assert shown_in("docs/podman.md", COMMANDS)
    assert shown_in("README.md", COMMANDS)
