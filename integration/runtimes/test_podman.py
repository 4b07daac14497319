"""podman: rootful, CNI backend, runc."""
import contextlib
import json
import subprocess

import lab
import pytest
from lab.machine import CLIENT_IP, HOST_IP, flush_ruleset, says, shown_in
from lab.podman import INSTALL, Podman

COMMANDS = f"""
{INSTALL}
cp conf/podman/web.conflist /etc/cni/net.d/
podman run --detach --name hello --network web -p 8080:80 "$IMAGE"
curl --retry 5 --retry-connrefused http://127.0.0.1:8080/
cni-portmap list
"""
FOLDERS = """
mkdir -p /etc/containers/containers.conf.d
printf '%s\\n' '[network]' 'cni_plugin_dirs = ["/usr/local/lib/cni", "/usr/libexec/cni"]' \\
    >/etc/containers/containers.conf.d/cni-portmap.conf
"""
# A network that gives no addresses, as a provider's second one may be.
LAYER2 = {"cniVersion": "0.4.0", "name": "layer2", "plugins": [
    {"type": "bridge", "bridge": "layer2", "ipam": {}},
    {"type": "portmap", "capabilities": {"portMappings": True}}]}


def bridge_conflist(name, bridge, subnet, **changes):
    """A network as podman 4 makes it."""
    first = {"type": "bridge", "bridge": bridge, "isGateway": True, "ipMasq": True, "hairpinMode": True, **changes,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": subnet}]]}}
    if first["isGateway"]:
        first["ipam"]["routes"] = [{"dst": "0.0.0.0/0"}]
    return {"cniVersion": "0.4.0", "name": name, "plugins": [first, LAYER2["plugins"][1]]}


@pytest.fixture(scope="module")
def podman(podman_version):
    with Podman() as machine:
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
        expected = gateways if seen == "gateway" else [seen]
        assert podman.whom_server_sees(source, ip, port, protocol, seen != "nobody") in expected

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
    assert not podman.answers(timeout=lab.HASTY)
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


@pytest.mark.parametrize("networks", ["other,third", "third,other"])
def test_one_of_two_networks_leads(podman, clean, networks):
    """run --network of two: podman says which one leads, cni-portmap list names it, and the other one takes over"""
    podman.write("/etc/cni/net.d/third.conflist", json.dumps(bridge_conflist("third", "third0", "10.66.0.0/24")))
    podman.start("-p", "8080:80", network=networks)

    def leading():
        line, = podman.json("cni-portmap", "list", "--json")
        its = podman.json("podman", "inspect", "web")[0]["NetworkSettings"]["Networks"]
        assert line["container_ip"] == its[line["network"]]["IPAddress"]
        return line["network"]
    first = leading()
    assert podman.answers(families=(4,))
    podman.podman("network", "disconnect", first, "web")
    assert {first, leading()} == {"other", "third"}
    assert says("docs/podman.md",
                "Which one is podman's choice, not that of the command line: `cni-portmap list` names it")


def doctor(podman, *words):
    """What doctor finds, by cause."""
    done = subprocess.run(podman.command("cni-portmap", "doctor", *words, "--json"), text=True, capture_output=True,
                          check=False)
    assert "Traceback" not in done.stderr
    return {each["cause"]: each for each in json.loads(done.stdout)}


@pytest.mark.parametrize("network", ["internal", "nogateway"])
def test_a_network_without_a_gateway(podman, clean, network):
    """network create --internal, "isGateway": false: podman says nothing, doctor says what helps, and it does"""
    if network == "internal":
        podman.run("podman", "network", "create", "--internal", "internal")
    else:
        podman.write("/etc/cni/net.d/nogateway.conflist",
                     json.dumps(bridge_conflist("nogateway", "nogateway0", "10.77.0.0/24", isGateway=False)))
    done = subprocess.run(podman.command("podman", "--log-level", "debug", "run", "-d", "--name", "web", "--network",
                                         network, "-p", "8080:80", "image"), text=True, capture_output=True, check=True)
    assert "no interface of this host" not in done.stdout + done.stderr
    found = doctor(podman, "8080")["network-without-gateway"]
    assert "second network" in found["advice"] and "ip address add" not in found["advice"]
    assert not {"no-route-to-container", "route-elsewhere", "no-way-back"} & {*doctor(podman, "8080")}
    podman.podman("network", "connect", "other", "web")
    with lab.Server("web", podman.inside(), 80):
        assert lab.exchange(lab.HOST, "127.0.0.1", 8080, timeout=0.3) is None  # the first network leads
    podman.podman("rm", "-f", "-t", "0", "web")
    conflist = podman.json("cat", f"/etc/cni/net.d/{network}.conflist")
    conflist["plugins"] = [plugin for plugin in conflist["plugins"] if plugin["type"] != "portmap"]
    podman.write(f"/etc/cni/net.d/{network}.conflist", json.dumps(conflist))
    podman.start("-p", "8080:80", network=f"{network},other")
    assert podman.answers(families=(4,))
    assert says("docs/podman.md", "`podman network create --internal`", '`"isGateway": false`',
                "drops what the plugin says", "remove `portmap` from the conflist of the first")
    assert says("docs/limits.md", "podman drops what plugins say there")


def test_a_removed_container_is_not_its_namesake(podman, clean):
    """rm of one whose rules were flushed: its name is another's now, and doctor tells them apart"""
    first = podman.start("-p", "8080:80")
    flush_ruleset()
    podman.podman("rm", "-f", "-t", "0", "web")
    podman.start(network="other")
    found = doctor(podman, "8080")
    left = [path for path in podman.run("ls", "/var/lib/cni/results").split() if first in path]
    assert [*found] == (["container-stopped"] if left else ["not-published"])
    if left:
        assert f"podman start {first[:12]}" in found["container-stopped"]["advice"]
        assert "another container of the name web is there" in json.dumps(found)
        podman.run("rm", f"/var/lib/cni/results/{left[0]}")


@pytest.fixture
def libexec(podman):
    """The distribution's plugins where Fedora and RHEL have them."""
    podman.run("sh", "-euc", "mkdir /run/machine/libexec; cp -a /usr/libexec/. /run/machine/libexec; "
                             "mkdir -p /run/machine/libexec/cni; cp -L /usr/lib/cni/* /run/machine/libexec/cni; "
                             "mount --bind /run/machine/libexec /usr/libexec")
    yield
    podman.run("sh", "-euc", "umount /usr/libexec; rm -r /run/machine/libexec; rm -f "
                             "/etc/containers/containers.conf.d/*")


def test_plugins_in_usr_libexec(podman, libexec, clean):
    """podman calls the distribution's portmap; doctor says so, and adopt; as documented podman calls ours"""
    assert podman.run("sh", "-c", "ls /usr/libexec/cni/portmap")
    podman.start("-p", "8080:80")
    assert podman.answers() and podman.json("cni-portmap", "list", "--json") == []
    for words in ("8080",), ():
        assert {cause: each["severity"] for cause, each in doctor(podman, *words).items()} == \
            {"published-by-other": "info", "podman-calls-another": "info"}
    assert '["/usr/local/lib/cni", ' in doctor(podman)["podman-calls-another"]["advice"]
    podman.shell(FOLDERS)
    podman.run("cni-portmap", "adopt")
    podman.podman("restart", "-t", "0", "web")
    assert podman.answers() and podman.json("cni-portmap", "list", "--json", "--port", "8080")
    assert not {"published-by-other", "podman-calls-another"} & {*doctor(podman)}
    assert shown_in("docs/podman.md", FOLDERS)


@pytest.mark.parametrize("networks", ["dual,layer2", "layer2,dual"])
def test_a_network_without_addresses(podman, clean, networks):
    """run --network with one that has no IPAM: the port leads through the other"""
    podman.write("/etc/cni/net.d/layer2.conflist", json.dumps(LAYER2))
    podman.start("-p", "8080:80", network=networks)
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
    assert lab.until(lambda: not podman.run("ss", "-Hlnt", "sport = :8080"))  # conmon's own socket goes last
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
    said = podman.refuses("-p", second)
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
