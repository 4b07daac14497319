"""What others wrote into our table is neither run nor trusted nor counted to; CHECK names what is in the way."""
import subprocess

import lab
import pytest
from lab import TABLE, GcCall, Pod
from lab.poison import chain, rule, write

WEB = Pod("web", "8080:80", "5353:53/udp")


def goes_on(host: lab.Host) -> None:
    """Every call and command ends well, or says why; nothing of a foreign name has been run."""
    assert host.call("ADD", WEB).code == 0
    assert host.call("CHECK", WEB).code == 0
    for arguments in ("list", "--json"), ("gc", "--dry-run"), ("gc",):
        host.command(*arguments)
    assert not host.call("GC", GcCall("net", WEB)).code
    host.delete(WEB)
    assert "pwned" not in lab.nft("list", "tables")


@pytest.mark.parametrize("name", ["c/x/y; add table ip pwned; add chain ip pwned y", "c/web/eth0; add table ip pwned",
                                  "c/x y/eth0", "c/x/\n add table ip pwned", "c//", "c/", "mine; add table ip pwned"])
def test_a_name_is_no_command(host, name):
    """A chain that looks nearly like a dead container's is not ours, whoever's name it bears."""
    host.add(WEB)
    write(chain(name), rule(name, "net=net netns=/nonexistent#5"))
    goes_on(host)


def test_a_note_is_no_command(host):
    """The names of those who stand by are in comments, and lead to chains: only those of interfaces are read."""
    host.add(WEB)
    evil = "x; add table ip pwned; add chain ip pwned y"
    write(chain(f"c/web/{evil}"), rule(WEB.chain, f"also on {evil}"))
    host.delete(WEB)
    assert "pwned" not in lab.nft("list", "tables") and WEB.chain not in lab.chains()


@pytest.mark.parametrize("record", [
    "net=net netns=/nonexistent#" + "9" * 100, "netns=/n#\u00b2", "link=veth0#" + "9" * 90,
    "net=net; netns=/n#1 pod=a\\b",
    "also on \u00b2", "id=web if=eth0 net=net netns=/n#5", "pod=%ff%zz%", "netns=%00#7", "link=#1"])
def test_a_record_that_nobody_wrote(host, record):
    """Absurd numbers and broken records are survived; who cannot be judged stays."""
    host.add(Pod("other", "1000:80"))
    write(chain("c/dead/eth0"), rule("c/dead/eth0", record))
    goes_on(host)


def test_a_terminal_gets_plain_text(host):
    """A record may hold any bytes, escaped; what tells of its owner has none that a terminal would obey."""
    host.add(WEB)
    write(chain("c/dead/eth0"), rule("c/dead/eth0", "net=net netns=%1b[2J%0a/x#5"))
    said = host.command("gc", "--dry-run") + host.command("list")
    assert "%1b" in said and "\x1b" not in said


def test_a_protocol_that_is_none_of_ours(host):
    """An element for a protocol without a name here is no reason for doctor to end in a traceback."""
    host.add(WEB)
    lab.nft_script(f"add element {TABLE} hostports {{ ipv4 . 200 . 80 : goto {WEB.chain} }}")
    done = subprocess.run([host.cli, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr


def test_more_ports_than_there_are(host):
    """A rule that compares four bytes from the port on has 65,536 ports, not four billion."""
    host.add(WEB)
    lab.nft_script(f"add rule {TABLE} {WEB.chain} meta l4proto tcp @th,16,32 < 0xfffffff0 dnat ip to 10.20.0.9")
    host.command("list")
    host.delete(WEB)


@pytest.mark.parametrize("kind", ["inet_service", "ipv4_addr . inet_service"])
@pytest.mark.parametrize("name", ["hostports", "hostip4_hostports", "hostip6_hostports"])
def test_a_map_of_another_type(host, name, kind):
    """It is named by everybody who needs it, and nobody breaks."""
    key = "80" if kind == "inet_service" else "10.0.0.1 . 80"
    lab.nft_script(f"table {TABLE} {{ chain c/dead/eth0 {{ counter; }}; map {name} {{ type {kind} : verdict; "
                   f"elements = {{ {key} : goto c/dead/eth0 }}; }}; }}")
    assert host.call("ADD", WEB).code in (100, 103)
    done = subprocess.run([host.cli, "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"table {TABLE} has a foreign set or map" in done.stderr
    host.command("gc", "--dry-run")
    assert host.call("GC", GcCall("net")).code in (0, 103)


VERDICTS = {"accept": "ip saddr 127.0.0.1 accept", "drop": "tcp dport 1 drop", "jump": "tcp dport 1 jump theirs",
            "goto": "tcp dport 1 goto theirs", "return": "return", "vmap": "tcp dport vmap { 1 : accept, 2 : drop }",
            "reject": "tcp dport 1 counter reject"}


@pytest.mark.parametrize(("name", "says"), [
    (name, says) for name in ("guard", "dispatch", "prerouting", "output", "postrouting", WEB.chain)
    for says in VERDICTS if (name, says) != ("postrouting", "reject")])  # which the kernel does not take
def test_a_foreign_verdict(host, name, says):
    """CHECK names one in front of our rules or behind them; other rules of others disturb nobody."""
    host.add(WEB)
    lab.nft_script(f"add chain {TABLE} theirs", f"add rule {TABLE} theirs counter",
                   f"insert rule {TABLE} {name} tcp dport 1 counter meta mark set 1")
    assert not host.call("CHECK", WEB).code
    lab.nft(f"insert rule {TABLE} {name} {VERDICTS[says]}")
    reply = host.call("CHECK", WEB)
    assert reply.code == 104 and f"chain {name}: rule 1 is foreign" in reply.msg and says in reply.msg, reply
