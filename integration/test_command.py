"""cni-portmap, the operator's command, against a lab with known ports."""
import base64
import json
import pathlib
import subprocess

import lab
import pytest

from cni_portmap import ruleset
from cni_portmap.attachment import Address, Attachment, Port

PORTS = [{"hostPort": 8080, "containerPort": 80}, {"hostPort": 8081, "containerPort": 80, "hostIP": "127.0.0.1"},
         {"hostPort": 5353, "containerPort": 53, "protocol": "udp"},
         *({"hostPort": port, "containerPort": port, "protocol": "udp"} for port in range(9000, 9004)),
         *({"hostPort": port, "containerPort": port + 100, "hostIP": "0.0.0.0"} for port in range(7000, 7020))]


def command(bin_dir: pathlib.Path, *arguments: object, status: int = 0) -> str:
    done = subprocess.run([bin_dir.parent / "sbin/cni-portmap", *map(str, arguments)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def network(bin_dir):
    yield lab.Network(lab.bridge_conflist("command", "cmd0"), bin_dir)
    lab.run("nft", "delete", "table", "inet", "cni_portmap", check=False)
    lab.delete_link("cmd0", missing_ok=True)


@pytest.fixture
def web(network):
    container = lab.Container(network, "web", PORTS)
    yield container
    container.remove()


def test_list_has_a_line_for_each_rule(bin_dir, web):
    """Lines are sorted by host port; consecutive ports are ranges; connections are counted."""
    server = lab.Server("web", web, 80)
    for _ in range(3):
        assert lab.exchange(lab.HOST, web.network.results[web.id, "eth0"]["ips"][0]["gateway"], 8080)
    server.close()
    lines = [line.split() for line in command(bin_dir, "list").splitlines()]
    me, net = web.id[:12], "command"
    assert lines == [
        ["HOST", "REACH", "CONTAINER", "NETWORK", "POD", "ID", "INTERFACE", "CONNECTIONS", "OWNER"],
        ["0.0.0.0:5353/udp", "world", f"{web.ipv4}:53", net, "-", me, "eth0", "0", "alive"],
        ["[::]:5353/udp", "world", f"[{web.ipv6}]:53", net, "-", me, "eth0", "0", "alive"],
        # Many ports under another number have one rule, and so one counter.
        ["0.0.0.0:7000-7019,8080/tcp", "world", f"{web.ipv4}:7100-7119,80", net, "-", me, "eth0", "3", "alive"],
        ["[::]:8080/tcp", "world", f"[{web.ipv6}]:80", net, "-", me, "eth0", "0", "alive"],
        ["127.0.0.1:8081/tcp", "localhost", f"{web.ipv4}:80", net, "-", me, "eth0", "0", "alive"],
        ["0.0.0.0:9000-9003/udp", "world", f"{web.ipv4}:9000-9003", net, "-", me, "eth0", "0", "alive"],
        ["[::]:9000-9003/udp", "world", f"[{web.ipv6}]:9000-9003", net, "-", me, "eth0", "0", "alive"]]


@pytest.mark.parametrize(("options", "count"), [
    (["--port", 8080], 2), (["--port", 9002], 2), (["--container", "web-"], 7), (["--container", "x"], 0),
    (["--network", "command"], 7), (["--network", "other"], 0)])
def test_list_filters(bin_dir, web, options, count):
    """Filters narrow the list, and JSON has the same lines."""
    assert len(json.loads(command(bin_dir, "list", "--json", *options))) == count
    assert len(command(bin_dir, "list", *options).splitlines()) == count + 1


def test_watch(bin_dir, web):
    """New connections per second by port: a table a second, or a document a line."""
    server = lab.Server("web", web, 80)
    gateway = web.network.results[web.id, "eth0"]["ips"][0]["gateway"]
    tool = bin_dir.parent / "sbin/cni-portmap"
    process = subprocess.Popen([tool, "list", "--port", "8080", "--json", "--watch", "0.3"], stdout=subprocess.PIPE,
                               text=True)
    assert {line["new_per_second"] for line in json.loads(process.stdout.readline())} == {0}
    assert lab.exchange(lab.HOST, gateway, 8080)
    seen = []

    def counts_it():
        seen.append(json.loads(process.stdout.readline()))
        return max(line["new_per_second"] for line in seen[-1]) > 0
    assert lab.until(counts_it) and all(line["reach"] == "world" for line in seen[-1])
    process.kill()
    process.communicate()
    server.close()
    process = subprocess.Popen([tool, "list", "--watch", "0.2"], stdout=subprocess.PIPE, text=True)
    assert "NEW/S" in process.stdout.readline()
    process.kill()
    process.communicate()


def test_who_has_a_port(bin_dir, web):
    """The exit status says whether a port is published."""
    command(bin_dir, "list", "--port", 8080)
    command(bin_dir, "list", "--port", 8079, status=1)


def test_list_says_what_is_missing(bin_dir, web):
    """A map element whose rule somebody deleted is shown as it is."""
    chain = ruleset.chain_of(web.id, "eth0")
    lab.run("nft", "flush", "chain", "inet", "cni_portmap", chain)
    assert "(no rule)" in command(bin_dir, "list", "--port", 8080)
    assert "unknown" in command(bin_dir, "list", "--port", 8080)


def is_dead_soon(bin_dir, port):
    """Whether the owner of a port is dead, once the kernel has deleted the links of a namespace that is gone."""
    return lab.until(lambda: command(bin_dir, "list", "--port", port).split()[-1] == "dead")


def test_gc_removes_the_dead(bin_dir, network, web):
    """gc removes what belongs to a vanished namespace, after a dry run that removes nothing."""
    with lab.restored_table():
        dead = lab.Container(network, "dead", [{"hostPort": 1, "containerPort": 1}])
        dead.namespace.remove()
        assert is_dead_soon(bin_dir, 1)
        before = lab.table()
        assert "stale attachments: 1 (dry run)" in command(bin_dir, "gc", "--dry-run")
        assert lab.table() == before
        assert [each["container"] for each in json.loads(command(bin_dir, "gc", "--json"))] == [dead.id]
        assert "stale attachments: 0" in command(bin_dir, "gc")


def test_gc_goes_on(bin_dir, network, web):
    """A dead chain that somebody's rule jumps to cannot go; it is named, and the others go."""
    with lab.restored_table():
        for name, port in ("stuck", 1), ("free", 2):
            dead = lab.Container(network, name, [{"hostPort": port, "containerPort": 1}])
            dead.namespace.remove()
            if name == "stuck":
                lab.nft_script("add chain inet cni_portmap theirs",
                               f"add rule inet cni_portmap theirs jump {ruleset.chain_of(dead.id, 'eth0')}")
        assert is_dead_soon(bin_dir, 1) and is_dead_soon(bin_dir, 2)
        assert "stale attachments: 1" in command(bin_dir, "gc", status=1)
        command(bin_dir, "list", "--port", 1)
        command(bin_dir, "list", "--port", 2, status=1)
        lab.nft_script("delete chain inet cni_portmap theirs")
        assert "stale attachments: 1" in command(bin_dir, "gc")


def test_restore_brings_back_what_a_flush_lost(bin_dir, web, tmp_path):
    """Ports that a flush removed come back from libcni's cache, once, and not those of the dead."""
    entry = {"kind": "cniCacheV1", "containerId": web.id, "ifName": "eth0", "networkName": "command",
             "config": base64.b64encode(json.dumps(web.network.conflist).encode()).decode(),
             "capabilityArgs": {"portMappings": PORTS}, "result": web.result}
    (tmp_path / "command-web-eth0").write_text(json.dumps(entry))
    dead = json.loads(json.dumps(entry).replace(web.namespace.path, "/run/netns/nobody"))
    (tmp_path / "command-dead-eth0").write_text(json.dumps({**dead, "containerId": "dead"}))
    (tmp_path / "junk").write_text("{")
    before = lab.table()
    lab.run("nft", "delete", "table", "inet", "cni_portmap")
    options = "--cache", tmp_path
    assert "1 restored" in command(bin_dir, "restore", "--dry-run", *options)
    assert lab.table() == ""
    report = json.loads(command(bin_dir, "restore", "--json", *options))
    assert [each["container"] for each in report["restored"]] == [web.id]
    assert len(report["skipped"]) == 2
    assert lab.table() == before
    assert "0 restored, 1 in place" in command(bin_dir, "restore", *options)
    assert lab.table() == before


def test_restore_base_only(bin_dir, web):
    """The shared chains are repaired, and nothing that a container has lost; without a table nothing is."""
    assert "nothing" in command(bin_dir, "restore", "--base-only")
    before = lab.table()
    lab.run("nft", "delete", "chain", "inet", "cni_portmap", "guard")
    lab.run("nft", "flush", "chain", "inet", "cni_portmap", ruleset.chain_of(web.id, "eth0"))
    damaged = lab.table()
    assert "would repair" in command(bin_dir, "restore", "--base-only", "--dry-run") and lab.table() == damaged
    assert json.loads(command(bin_dir, "restore", "--base-only", "--json")) == {"repaired": True}
    assert "chain guard" in lab.table() and lab.table() != before
    lab.run("nft", "delete", "table", "inet", "cni_portmap")
    assert "nothing" in command(bin_dir, "restore", "--base-only") and lab.table() == ""


def test_teardown_refuses_while_containers_are_published(bin_dir, network, web):
    """It refuses while containers are published, and names them; then it closes, and removes the table."""
    gone = lab.Container(network, "gone", [{"hostPort": 1, "containerPort": 1}])
    gone.namespace.remove()
    assert is_dead_soon(bin_dir, 1)
    before = lab.table()
    refusal = command(bin_dir, "teardown", status=1)
    assert web.id in refusal and "--force" in refusal
    assert [line for line in refusal.splitlines() if "(dead)" in line and gone.id in line]
    report = json.loads(command(bin_dir, "teardown", "--json", status=1))
    assert {each["container"]: each["dead"] for each in report["published"]} == {web.id: False, gone.id: True}
    assert report["refused"]
    report = json.loads(command(bin_dir, "teardown", "--force", "--dry-run", "--json"))
    assert (report["ipv4"], report["ipv6"], report["left_open"]) == (["cmd0"], ["cmd0"], {})
    assert "would close 127.0.0.0/8 on cmd0" in command(bin_dir, "teardown", "--force", "--dry-run")
    assert lab.table() == before
    assert "closed ::1 on cmd0" in command(bin_dir, "teardown", "--force")
    assert lab.table() == "" and "cmd0" not in dict(lab.localhost_routes())
    assert command(bin_dir, "teardown") == ""


def test_ten_thousand_ports(bin_dir, network, tmp_path):
    """Ten thousand containers with a port each are listed by as many questions to the kernel as a thousand are."""
    lab.nft_script(ruleset.base({name: ruleset.shared_rules(name, []) for name in ruleset.SHARED}))
    asked = {}
    for first in range(1, 10_001, 1000):
        attachments = (Attachment(f"{port:064x}", "eth0", "many", netns="/run/netns/none", inode=1, mark_bit=13,
                                  addresses={4: Address(4, "10.88.0.2", "10.88.0.0/16")},
                                  ports=(Port(4, "tcp", "", port, 80),))
                       for port in range(first, first + 1000))
        lab.nft_script("".join(map(ruleset.attach, attachments)))
        if first in (1, 9001):
            lines = lab.run("strace", "-o", tmp_path / "trace", "-e", "trace=sendto",
                            bin_dir.parent / "sbin/cni-portmap", "list").splitlines()
            assert len(lines) == first + 1000
            asked[first] = (tmp_path / "trace").read_text().count("sendto(")
    assert 0 < asked[1] == asked[9001]


CONFLIST = """{"cniVersion": "1.0.0", "name": "web", "plugins": [
  {"type": "bridge"},
  {"type": "portmap", "capabilities": {"portMappings": true}%s}
]}"""


@pytest.mark.parametrize(("extra", "where"), [
    ("", ""), (', "snat": "yes"', "3:71: plugins[1].snat: expected true or false"),
    (', "conditionsV4": ["-p", "tcp"]', "plugins[1].conditionsV4: expected nft match text in place of"),
    (', "markMasqBit": 32', "3:78: plugins[1].markMasqBit: expected the bit"),
    (', "markMasqBit": 3, "externalSetMarkChain": "X"', "3:3: plugins[1]: expected markMasqBit or"),
    (', "snat": tru', "3:71: JSON: expected")])
def test_validate_names_the_place_of_a_mistake(bin_dir, tmp_path, extra, where):
    """A conflist's mistakes are named with line, column, path and expectation."""
    file = tmp_path / "web.conflist"
    file.write_text(CONFLIST % extra)
    said = command(bin_dir, "validate", file, status=1 if where else 0)
    assert where in said.replace(str(file), "")  # the folder has the name of the test, and so of the mistake


def test_help_and_wrong_usage(bin_dir):
    """--help explains each command; wrong usage is status 2."""
    for words in (["--help"], ["list", "--help"], ["restore", "--help"], ["gc", "--help"], ["validate", "--help"]):
        assert "usage:" in command(bin_dir, *words)
    for words in ([], ["nonsense"], ["list", "--port", "x"], ["validate"]):
        command(bin_dir, *words, status=2)
    assert "0.1.0" in command(bin_dir, "version")
