"""publish and unpublish: ports on a running container, that its runtime knows nothing of."""
import json
import os
import pathlib

import lab
from lab.clinic import LAN_IP, Clinic
from lab.libcni_cache import Cache
import pytest

CACHE = pathlib.Path("/run/cni/results")


def remember(container):
    """What libcni remembers of a container."""
    CACHE.mkdir(parents=True, exist_ok=True)
    Cache(CACHE).remember(container)


@pytest.fixture
def clinic(bin_dir):
    """A container with a published port, and libcni's cache of it."""
    with Clinic(bin_dir) as there:
        remember(there.web)
        yield there


@pytest.fixture(autouse=True)
def no_cache():
    """No test sees the files of another."""
    yield
    for path in CACHE.iterdir() if CACHE.exists() else ():
        path.unlink()


def published(clinic, *words):
    done = clinic.command("publish", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(clinic, *words, status=1):
    done = clinic.command(*words)
    assert done.returncode == status, done.stdout + done.stderr
    assert not done.stdout
    return done.stderr


def add_again(clinic, ports):
    """Our plugin's ADD, with other ports."""
    config = clinic.network.config(ports, clinic.web.result)
    lab.call_plugin(clinic.network.bin_dir / "portmap", "ADD", config, clinic.web.id, clinic.web.namespace.path)


def test_a_port_on_a_running_container(clinic):
    """It answers at once, from everywhere; what is printed says for how long; list says who did it."""
    text = published(clinic, "web-0123", "9090:80")
    assert "published *:9090/tcp -> port 80 of container" in text and "until the container stops" in text
    assert "publish it again" in text and "but:" not in text
    for family in 4, 6:
        for path in "client", "host", "localhost":
            assert clinic.answers(family, path, 9090), (family, path)
    lines = json.loads(clinic.command("list", "--json").stdout)
    assert {(line["host_ports"][0], line["by"]) for line in lines} == {(8080, "runtime"), (9090, "operator")}
    assert "alive, by operator" in clinic.command("list").stdout
    assert clinic.answers()
    assert clinic.doctor("9090") == ([], 0)


def test_what_the_runtime_does_later(clinic):
    """CHECK passes; a second ADD leaves it; DEL removes it too."""
    published(clinic, "web", "9090:80")
    clinic.web.check()
    add_again(clinic, clinic.web.ports)
    assert clinic.answers(port=9090) and clinic.answers()
    clinic.network.delete(clinic.web.id, clinic.web.namespace.path, clinic.web.ports)
    assert "c/web" not in lab.table() and "p/web" not in lab.table()


def test_container_without_ports(clinic):
    """A container that has published nothing; its DEL, without prevResult, removes it all the same."""
    plain = clinic.container("plain")
    Cache(CACHE).remember(plain)
    clinic.serve(where=plain)
    published(clinic, "plain", "9090:80")
    assert clinic.answers(port=9090)
    lab.call_plugin(clinic.network.bin_dir / "portmap", "DEL", clinic.network.config(), plain.id, "")
    assert "p/plain" not in lab.table()


def test_only_in_our_table(clinic):
    """Without a cache, the record in the table leads to the container."""
    for path in CACHE.iterdir():
        path.unlink()
    published(clinic, "web", "9090:80", "127.0.0.1:9091:80", "5353:53/udp")
    assert clinic.answers(port=9090) and clinic.answers(4, "localhost", 9091)
    assert not clinic.answers(port=9091, timeout=lab.HASTY)


def test_more_ports_and_fewer(clinic):
    """A second publish adds; unpublish removes one, and then all."""
    published(clinic, "web", "9090:80")
    published(clinic, "web", "9091:80")
    assert clinic.answers(port=9090) and clinic.answers(port=9091)
    done = clinic.command("unpublish", "web", "9090:80")
    assert done.returncode == 0 and "removed 9090/tcp" in done.stdout, done.stderr
    assert not clinic.answers(port=9090, timeout=lab.HASTY) and clinic.answers(port=9091)
    assert "was not published by" in refused(clinic, "unpublish", "web", "9999:80")
    assert clinic.command("unpublish", "web").returncode == 0
    assert "p/web" not in lab.table() and clinic.answers()
    assert "nothing of a container web was published" in refused(clinic, "unpublish", "web")


def test_fewer_ports_of_one_interface(clinic):
    """The port goes from the interface that has it, whichever of the container's networks libcni has cached first."""
    published(clinic, "web", "9090:80", "9091:80")
    document = json.loads(next(CACHE.iterdir()).read_text())
    older = CACHE / "another-network"
    ips = [{"address": ip["address"]} for ip in document["result"]["ips"]]
    older.write_text(json.dumps({**document, "ifName": "eth1", "result": {"cniVersion": "1.0.0", "ips": ips}}))
    os.utime(older, (0, 0))
    done = clinic.command("unpublish", "web", "9090:80")
    assert done.returncode == 0, done.stderr
    assert "/eth1 {" not in lab.table()
    assert not clinic.answers(port=9090, timeout=0.3) and clinic.answers(port=9091)


def test_conflicts_are_refused(clinic):
    """Another's port, and the container's own; nothing is written."""
    other = clinic.container("other", [{"hostPort": 9090, "containerPort": 80, "protocol": "tcp"}])
    with lab.restored_table():
        assert "tcp port 9090 on 0.0.0.0 is already published by container other" in refused(
            clinic, "publish", "web", "9090:80")
        assert "already published by this container's runtime" in refused(clinic, "publish", "web", "8080:80")
    assert other.ipv4


def test_the_runtime_comes_first(clinic):
    """What the container's runtime asks for is taken over from the operator."""
    published(clinic, "web", "9090:80")
    ports = [*clinic.web.ports, {"hostPort": 9090, "containerPort": 80, "protocol": "tcp"}]
    add_again(clinic, ports)
    assert clinic.answers(port=9090)
    assert "p/web" not in lab.table()
    clinic.network.check(clinic.web.id, clinic.web.namespace.path, ports)


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("keys", [{"gatewayModeV4": "nat", "gatewayModeV6": "nat"},
                                  {"gatewayModeV4": "nat", "outgoingSourceV6": "container", "allowDirectRouting": True,
                                   "conditionsV4": ["ip saddr 192.0.2.0/24"]}], ids=["closed", "conditions"])
def test_the_policy_of_its_network_stays(bin_dir, keys, is_cached):
    """Who reaches the container's own address is not an operator's to change: CHECK sees it after each command."""
    with Clinic(bin_dir, **keys) as there:
        if is_cached:
            remember(there.web)
        for words in ("publish", "web", "9090:80"), ("publish", "web", "9091:80"), ("unpublish", "web", "9090:80"), \
                ("unpublish", "web"):
            done = there.command(*words)
            assert done.returncode == 0, done.stderr
            there.web.check()
        assert {line["complete"] for line in json.loads(there.command("list", "--exposure", "--json").stdout)} == {True}


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("mode", ["routed", "isolated"])
def test_a_policy_without_host_ports(bin_dir, mode, is_cached):
    """Where the network's mode has no host ports, an operator publishes none, and the policy stays."""
    keys = {"gatewayModeV4": mode, "gatewayModeV6": mode}
    with Clinic(bin_dir, ports=[] if mode == "isolated" else None, **keys) as there:
        if is_cached:
            remember(there.web)
        assert mode in refused(there, "publish", "web", "9090:80")
        there.web.check()


@pytest.mark.parametrize("changes", [{"cniArgs": 5}, {"cniArgs": [[[], 1], ["K8S_POD_NAME", 5]]},
                                     {"config": "no base64"}, {"config": None}, {"netns": "/run/\0"}, {"netns": 7},
                                     {"netns": "\ud800"}, {"containerId": 7}, {"result": [], "cniArgs": None},
                                     {"capabilityArgs": []}], ids=ascii)
def test_a_damaged_cache(clinic, changes):
    """A file that is not as libcni writes it is one sentence, and no other container's matter."""
    other = clinic.container("other-1")
    Cache(CACHE).remember(other, **changes)
    done = clinic.command("publish", str(changes.get("containerId", "other")), "9090:80")
    assert done.returncode == 1 and len(done.stderr.splitlines()) <= 2 or not done.returncode, done.stderr
    published(clinic, "web", "9091:80")


def test_the_default_address_of_its_network(bin_dir):
    """A port without an address is published where the network's are; publish says so, and unpublish finds it."""
    with Clinic(bin_dir, defaultHostIP=["127.0.0.1", "::1"]) as there:
        remember(there.web)
        text = published(there, "web", "9090:80", "9091:80")
        assert "published 127.0.0.1:9090/tcp" in text and "published [::1]:9091/tcp" in text and "*" not in text
        assert there.command("unpublish", "web", "9090:80").returncode == 0
        assert not there.answers(path="localhost", port=9090, timeout=0.3) and there.answers(4, "localhost", 9091)


def test_the_conditions_of_its_network(bin_dir, tmp_path):
    """They hold for an operator's ports as for the runtime's, also for those that stay, wherever libcni's cache is."""
    with Clinic(bin_dir, conditionsV4=["ip saddr 192.0.2.0/24"]) as there:
        Cache(tmp_path).remember(there.web)
        published(there, "--cache", tmp_path, "web", "9090:80", "9091:80")
        assert there.command("unpublish", "--cache", tmp_path, "web", "9090:80").returncode == 0
        assert "ip saddr 192.0.2.0/24 tcp dport 9091" in lab.table() and "dport 9090" not in lab.table()


def test_gc_and_a_dead_container(clinic):
    """gc removes what was published of a container that is gone; teardown names it."""
    plain = clinic.container("plain")
    Cache(CACHE).remember(plain)
    published(clinic, "plain", "9090:80")
    assert "plain" in clinic.command("teardown").stderr
    lab.delete_link(next(interface["name"] for interface in plain.result["interfaces"]
                         if interface["name"].startswith("veth")))
    assert "removed" in clinic.command("gc").stdout
    assert "p/plain" not in lab.table() and clinic.answers()


def test_names(clinic):
    """By the name of its pod; an ambiguous one lists the candidates, with status 2."""
    for name in "twin-a", "twin-b":
        container = clinic.container(name)
        Cache(CACHE).remember(container)
        path = Cache(CACHE)._path(container)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"cniArgs": [
            ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", name.replace("twin", "web")]]}))
        clinic.serve(where=container)
    text = refused(clinic, "publish", "twin", "9090:80", status=2)
    assert "twin-a-0123456789abcdef" in text and "twin-b-0123456789abcdef" in text
    assert "container shop/web-a" in published(clinic, "shop/web-a", "9090:80")
    assert "container shop/web-b" in published(clinic, "web-b", "9091:80")
    assert "no container with a CNI network is called nobody" in refused(clinic, "publish", "nobody", "9092:80")


def test_networks_that_cannot(clinic):
    """Host, none and macvlan each have a word of their own, and nothing is written."""
    path = next(CACHE.iterdir())
    document = json.loads(path.read_text())
    netns = clinic.web.namespace
    path.write_text(json.dumps(document | {"netns": "/proc/self/ns/net"}))
    assert "uses the host's network" in refused(clinic, "publish", "web", "9090:80")
    path.write_text(json.dumps(document))
    lab.run("nsenter", f"--net={netns.path}", "ip", "link", "del", "eth0")
    assert "has no network but its own localhost" in refused(clinic, "publish", "web", "9090:80")
    lab.run("ip", "link", "add", "mv0", "link", "lan0", "type", "macvlan", "mode", "bridge")
    lab.run("ip", "link", "set", "mv0", "netns", netns.name)
    lab.run("nsenter", f"--net={netns.path}", "ip", "link", "set", "mv0", "name", "eth0")
    text = refused(clinic, "publish", "web", "9090:80")
    assert "is on macvlan" in text and "bridge network" in text
    assert "a path does not say which container" in refused(clinic, "publish", netns.path, "9090:80")


def test_programs_that_do_not_listen_there(bin_dir):
    """What cdebug port-forward is used for: a program on the container's own localhost."""
    with Clinic(bin_dir, serve=False) as clinic:
        clinic.serve(ip="127.0.0.1")
        text = published(clinic, "web", "9090:80", "9091:81")
        assert "listens on port 80/tcp of the container's own localhost only" in text and "socat TCP-LISTEN:80" in text
        assert "nothing in the container listens on port 81/tcp yet" in text


@pytest.mark.parametrize("words", ["8080", "0:80", "8080:80/", "8080:80/icmp", "x:80", "1.2.3:1:2", "8080:99999"])
def test_mappings_that_are_none(clinic, words):
    """Wrong usage is status 2, and names the form."""
    assert "expected [HOSTIP:]HOSTPORT:PORT" in refused(clinic, "publish", "web", words, status=2)


def test_an_empty_name_is_refused(clinic):
    """It is the beginning of every ID: what a script gives where a variable is not set."""
    published(clinic, "web", "9090:80")
    for command in "publish", "unpublish":
        assert "beginning of a container's ID" in refused(clinic, command, "", "9091:80", status=2)
    assert clinic.answers(port=9090)


def test_a_port_of_one_family_stays_so(clinic):
    """Whatever is published beside it later; and it is removed with its address, or without."""
    published(clinic, "web", "0.0.0.0:9090:80", "[::]:9092:80")
    published(clinic, "web", "9091:80")
    lines = json.loads(clinic.command("list", "--json").stdout)
    assert {(line["host_ip"], *line["host_ports"]) for line in lines if line["by"] == "operator"} == {
        ("0.0.0.0", 9090), ("0.0.0.0", 9091), ("::", 9091), ("::", 9092)}
    assert "was not published" in refused(clinic, "unpublish", "web", "0.0.0.0:9090:81")
    assert clinic.command("unpublish", "web", "0.0.0.0:9090:80").returncode == 0
    assert clinic.command("unpublish", "web", "9092:80").returncode == 0
    published(clinic, "web", "0.0.0.0:9093:80")
    published(clinic, "web", "9093:80")
    lines = json.loads(clinic.command("list", "--json").stdout)
    assert {(line["host_ip"], *line["host_ports"]) for line in lines if line["by"] == "operator"} == {
        ("0.0.0.0", 9091), ("::", 9091), ("0.0.0.0", 9093), ("::", 9093)}


def test_one_host_port_leads_to_one_port(clinic):
    """Not to the last that is named."""
    assert "9090/tcp is asked for twice" in refused(clinic, "publish", "web", "9090:80", "9090:81")


def test_published_on_one_address(clinic):
    """With a host address, only there."""
    published(clinic, "web", f"{LAN_IP[4]}:9090:80", f"[{LAN_IP[6]}]:9090:80")
    assert clinic.answers(4, port=9090) and clinic.answers(6, port=9090)
    assert not clinic.answers(4, "localhost", 9090, timeout=lab.HASTY)
