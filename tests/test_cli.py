"""The command, against a kernel that answers from memory: what it prints, and how it ends."""
import argparse
import json
import os
import re
import subprocess
import sys
import types

import pytest
from helpers import ROOT, attachment, elements, verdicts

from cni_portmap import ruleset
from cni_portmap.cli import main as cli
from cni_portmap.cli.checks.probe import probes
from cni_portmap.cli.doctor import address
from cni_portmap.cli.publish import mapping
from cni_portmap.cni import CniError
from cni_portmap.config import KEYS
from cni_portmap.verbs.published import published, ranges

RUNTIMES = {"name", "cniVersion", "prevResult", "runtimeConfig", "type", "capabilities"}  # not the plugin's own


class Rule:
    def __init__(self, protocol, target, daddr, packets, ports):
        self.protocol, self.target, self.daddr, self.packets, self.ports = protocol, target, daddr, packets, ports


@pytest.fixture
def host(monkeypatch):
    """A host with two containers: web has 8080 and 9000 to 9002, db has 5432."""
    pods = {name: attachment(*({"hostPort": port, "containerPort": to} for port, to in ports), environ={
        "CNI_CONTAINERID": name, "CNI_NETNS": f"/run/netns/{name}", "CNI_IFNAME": "eth0"},
        prevResult={"ips": [{"address": "10.88.0.2/16"}]})
        for name, ports in (("web", [(8080, 80), (9000, 9000), (9001, 9001), (9002, 9002)]), ("db", [(5432, 5432)]))}
    rules, found = [], []
    for name, pod in pods.items():
        chain = ruleset.chain_of(name, "eth0")
        rules.append((chain, ruleset.record_of(pod)[0], b"", 1))
        ports = {port.host_port: port.container_port for port in pod.ports}
        groups = ({8080: 80}, {9000: 9000, 9001: 9001, 9002: 9002}) if name == "web" else (ports,)
        rules += [(chain, "", json.dumps(group).encode() + b"nat\0", 2) for group in groups]
        found += [(element, chain) for element in elements(pod)]

    def dnat_rule(raw, _):
        ports = {int(host): to for host, to in json.loads(raw.removesuffix(b"nat\0")).items()}
        return Rule(6, b"\x0a\x58\0\2", b"", 3, ports)
    monkeypatch.setattr("cni_portmap.verbs.published.dnat_rules", lambda *given: [dnat_rule(*given)])
    kernel = types.SimpleNamespace(rules=lambda: rules, elements=lambda: found, set_elements=None, leave=lambda: None,
                                   judge=lambda owners: verdicts(owners, "alive"))
    monkeypatch.setattr(cli, "Kernel", lambda: kernel)
    return kernel


def test_published_ports_are_those_of_the_rule_that_has_them(host):
    """Ports of one chain belong to different rules; each line has the ports of its own."""
    lines = {line.host_ports: line.container_ports for line in published(host)}
    assert lines == {(5432,): (5432,), (8080,): (80,), (9000, 9001, 9002): (9000, 9001, 9002)}


@pytest.mark.parametrize("arguments, lines, status", [
    ([], 3, 0), (["--port", "8080"], 1, 0), (["--port", "9001"], 1, 0), (["--port", "81"], 0, 1),
    (["--container", "we"], 2, 0), (["--container", "nobody"], 0, 0), (["--network", "lab"], 3, 0),
    (["--network", "other"], 0, 0)])
def test_list_ends_with_1_where_the_port_is_not_published(host, capsys, arguments, lines, status):
    """Scripts ask with --port; other filters that find nothing are no failure."""
    assert cli.main(["list", *arguments]) == status
    assert len(capsys.readouterr().out.splitlines()) == 1 + lines
    assert cli.main(["list", "--json", *arguments]) == status
    assert len(json.loads(capsys.readouterr().out)) == lines


def test_a_rule_that_is_missing_is_said(host, capsys):
    """An element that leads to a chain without a rule for it."""
    rules = host.rules()
    host.rules = lambda: [rule for rule in rules if not rule[2]]
    assert cli.main(["list", "--port", "8080"]) == 0
    assert "(no rule)" in capsys.readouterr().out


def test_an_error_is_json_too(host, capsys):
    """A CniError is words on standard error; with --json also a document."""
    def fail():
        raise CniError(5, "cannot read nf_tables", "run it as root")
    host.rules = fail
    assert cli.main(["list", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"code": 5, "msg": "cannot read nf_tables", "details": "run it as root"}
    assert err == "cni-portmap: cannot read nf_tables\n  run it as root\n"


@pytest.mark.parametrize("error, words", [
    (OSError(1, "Operation not permitted"), "the system: Operation not permitted\n"),
    (OSError(2, "No such file or directory", "/proc/modules"), "/proc/modules: No such file or directory\n"),
    (OSError("bad address"), "the system: bad address\n"), (MemoryError(), "there is not enough memory\n")], ids=str)
def test_what_the_system_refuses_is_said(host, capsys, error, words):
    """One sentence, wherever it comes from, and no traceback."""
    def fail():
        raise error
    host.rules = fail
    assert cli.main(["list", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"cni-portmap: {words}") and json.loads(out)["code"] == 5


@pytest.mark.parametrize("command, status", [("version", 0), ("validate --json /nonexistent", 1)])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_without_an_output(command, status, closed):
    """Who closes standard output or standard error wants to read nothing there, and no traceback."""
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} -m cni_portmap {command} {closed}"], capture_output=True,
                          text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("closed", ["", "2>&-"])
def test_nobody_reads_on(closed):
    """`cni-portmap completion bash | head`: no word of it on standard error, where there is one."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(["sh", "-c", f"exec {sys.executable} -m cni_portmap completion bash {closed}"], cwd=ROOT,
                          stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("command", [["version"], ["list", "--json"], ["completion", "bash"]])
def test_a_full_disk(command):
    """Standard output that takes nothing is one sentence, once."""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "cni_portmap", *command], stdout=full, stderr=subprocess.PIPE,
                              text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1 and done.stderr.startswith("cni-portmap: ") and "Traceback" not in done.stderr
    assert "ignored" not in done.stderr and len(done.stderr.splitlines()) < 3


@pytest.mark.parametrize("arguments", [["list", "--watch", "nan"], ["list", "--watch", "inf"], ["list", "--watch", "0"],
                                       ["trace", "80", "--seconds", "nan"], ["agent", "--gc-seconds", "-1"],
                                       ["list", "--watch", "--all"], ["list", "--exposure", "--watch"],
                                       ["list", "--exposure", "--all"], ["agent", "--buffer", "\u00b2"],
                                       ["agent", "--metrics", "localhost:\u00b2"]], ids=" ".join)
def test_options_that_cannot_be(host, capsys, arguments):
    """Wrong usage says what is expected; what cannot go together is refused, and not left out in silence."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert re.search("expected|not allowed with", capsys.readouterr().err)


def test_a_probe_that_cannot_be_sent(host, capsys, monkeypatch):
    """Without the capability, or with lo down, doctor goes on, and says so."""
    def probe(*_):
        raise OSError(101, "Network is unreachable")
    monkeypatch.setattr("cni_portmap.cli.checks.probe.probe", probe)
    target = types.SimpleNamespace(protocol="tcp", port=80)
    packet = types.SimpleNamespace(source=b"\x7f\0\0\1", destination=b"\x7f\0\0\1")
    trip = types.SimpleNamespace(path="localhost", packet=packet)
    scene = types.SimpleNamespace(targets=[target], trips=lambda _: [trip])
    assert [*probes(scene)] == ["probe of 127.0.0.1:80/tcp from this host: not possible: Network is unreachable"]


@pytest.mark.parametrize("content, words", [(None, "cannot read {}: No such file or directory"),
                                            (b"\xff{}", "{} is not UTF-8: invalid start byte at byte 0")])
def test_validate_of_a_file_that_cannot_be_read(host, capsys, tmp_path, content, words):
    """It is said, with --json as a document too."""
    path = tmp_path / "x.conflist"
    if content is not None:
        path.write_bytes(content)
    assert cli.main(["validate", "--json", str(path)]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["msg"] == words.format(path) and err == f"cni-portmap: {words.format(path)}\n"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' + "9" * 5000 + "}", "{", "[]", '{"plugins":{}}',
                                  '{"cniVersion":[],"plugins":[1,{"type":{}},{"type":"portmap","name":1}]}'])
def test_validate_of_any_file(host, capsys, tmp_path, text):
    """Each is a finding."""
    (tmp_path / "x.conflist").write_text(text)
    assert cli.main(["validate", str(tmp_path / "x.conflist")]) == 1
    assert "expected" in capsys.readouterr().out


def test_validate_reads_keys_as_the_plugin_does(host, capfd, tmp_path):
    """A key in another case is checked, and told."""
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "ConditionsV4": ["ip saddr shop"]}
    (tmp_path / "x.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": "x", "plugins": [{}, portmap]}))
    assert cli.main(["validate", str(tmp_path / "x.conflist")]) == 1
    out, err = capfd.readouterr()
    assert "conditionsV4: expected an address in place of shop" in out and '"ConditionsV4" as conditionsV4' in err


def test_gc_names_what_cannot_be_removed(host, capsys, monkeypatch):
    """It ends with 1 then, and says what it has removed all the same."""
    web, db = (ruleset.Owner(ruleset.chain_of(name, "eth0"), "net=lab") for name in ("web", "db"))
    monkeypatch.setattr("cni_portmap.cli.gc.prune", lambda kernel, dry_run: (
        [(web, ("dead", "gone")), (db, ("dead", "gone"))], [(db, CniError(100, "busy"))]))
    assert cli.main(["gc"]) == 1
    out, err = capsys.readouterr()
    assert f"removed {web}: gone" in out and "container db" not in out and "stale attachments: 1" in out
    assert err == f"cni-portmap: cannot remove {db}: busy\n"
    assert cli.main(["gc", "--json"]) == 1
    assert [each["container"] for each in json.loads(capsys.readouterr().out)] == ["web"]


@pytest.mark.parametrize("ports, text", [((80,), "80"), ((80, 9000, 9001, 9002), "80,9000-9002"), ((1, 2), "1-2")])
def test_ranges(ports, text):
    """Consecutive ports are a range."""
    assert ranges(ports) == text


def test_completion_knows_every_command_and_option(host, capsys):
    """It is generated from the parser, and so has what --help has."""
    cli.main(["completion", "bash"])
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert '        validate) options="--help --json --plugin" ;;' in script
    assert '        completion) options="bash --help --json" ;;' in script


def test_keys_and_schema_agree():
    """The parser's keys are the schema's; test_docs.py compares the schema with the documentation."""
    schema = json.loads((ROOT / "cni_portmap/portmap.schema.json").read_text())
    keys = {key for key in schema["properties"] if not key.startswith("cni.dev/")} - RUNTIMES
    assert {*KEYS} == keys


@pytest.mark.parametrize("text, ip", [
    ("9090:80", ""), ("127.0.0.1:9090:80", "127.0.0.1"), ("[::1]:9090:80/udp", "::1"), ("::1:9090:80", "::1"),
    ("[::ffff:192.0.2.1]:9090:80", "192.0.2.1"), ("[2001:DB8::0]:9090:80", "2001:db8::")])
def test_a_mapping_as_people_write_it(text, ip):
    """Its address is as the plugin reads it: IPv4-mapped IPv6 is IPv4."""
    assert mapping(text) == {"hostIP": ip, "hostPort": 9090, "containerPort": 80,
                             "protocol": "udp" if text.endswith("/udp") else "tcp"}


@pytest.mark.parametrize("text", ["80", "a:80", ":80:80x", "0:80", "80:65536", "80:80/", "80:80/icmp", "x:80:80",
                                  "[fe80::1%eth0]:80:80", "1.2.3:80:80"])
def test_what_is_no_mapping(text):
    """It is refused with what is expected, before anything is looked for."""
    with pytest.raises(argparse.ArgumentTypeError, match="expected "):
        mapping(text)


@pytest.mark.parametrize("text, packed", [("192.0.2.2", b"\xc0\0\2\2"), ("::ffff:192.0.2.2", b"\xc0\0\2\2"),
                                          ("[fe80::1%eth0]", b"\xfe\x80" + bytes(13) + b"\1")])
def test_an_address_as_people_write_it(text, packed):
    """A server of both families logs IPv4 clients as IPv4-mapped: doctor looks at the ways of IPv4."""
    assert address(text) == packed
