"""Firewalls (firewalld, ufw, nftables' own), with every path to a published port."""
import json
import subprocess

import lab
import pytest
from lab.firewalld import Firewalld
from lab.machine import UNPACKED, VERSIONS, Userland, says, shown_in
from lab.paths import ADDRESSES, EVERY, NOBODY, SETTINGS
from lab.site import Site

DROPPING = """
table inet filter {
    chain forward { type filter hook forward priority filter; policy drop; }
}
"""
ACCEPT = """
nft insert rule inet filter forward ct status dnat accept
"""
STRICT = """
sed -i 's/^StrictForwardPorts=.*/StrictForwardPorts=no/' /etc/firewalld/firewalld.conf
firewall-cmd --reload
"""
ROUTE = """
ufw route allow proto tcp to 10.88.0.0/16 port 80
ufw route allow proto tcp to fd88::/64 port 80
"""
ROUTE_ALL = """
ufw route allow out on cni0
"""


def tcp_alone(site):
    """What is forwarded arrives over TCP."""
    return lambda path, family, protocol: (site.answers if protocol == "tcp" else site.answers_host)(
        path, family, protocol)


def nothing(site):
    """Not even this host reaches itself."""
    return lambda path, family, protocol: NOBODY


def everything(site):
    """Every path leads where it should."""
    return site.answers


def from_the_host(site):
    """Nothing is forwarded."""
    return site.answers_host


@pytest.fixture(scope="module")
def site(need, bin_dir):
    """A host with published containers, which every firewall finds there."""
    need("/usr/lib/cni/bridge")
    with Site(SETTINGS[0], bin_dir) as site:
        yield site


@pytest.fixture(scope="module")
def firewalld(need, site):
    need("dbus-daemon", "dbus", "gi", UNPACKED / "firewalld")
    with Userland("firewalld", "firewalld") as machine, Firewalld(machine) as firewalld:
        VERSIONS[__name__].append(f"firewalld {machine.run('firewall-cmd', '--version').strip()}")
        yield firewalld


def doctors_words(bin_dir):
    """What doctor finds about the port that is published everywhere: cause, and whose rule; infos left out."""
    done = subprocess.run([bin_dir.parent / "sbin/cni-portmap", "doctor", f"{EVERY}/tcp", "--json"],
                          capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return [(each["cause"], each["summary"].partition(" ")[0], each["advice"]) for each in json.loads(done.stdout)
            if each["severity"] != "info" and "localhost" not in each["paths"]]


@pytest.mark.parametrize("command, wanted", [("", everything), ("--reload", everything),
                                             ("--complete-reload", everything), ("--panic-on", nothing),
                                             ("--panic-off", everything)])
def test_firewalld(site, firewalld, command, wanted):
    """firewalld, in its default zone: every path leads where it should; after"""
    before = lab.table()
    if command:
        firewalld.command(command)
    assert site.differences(wanted(site)) == {}
    assert lab.table() == before


def test_ports_published_beside_firewalld(site, firewalld):
    """A container that is published while firewalld runs"""
    with site.publish("later", [{"hostPort": 8090, "containerPort": 80, "protocol": "tcp"}]):
        for family in 4, 6:
            assert lab.exchange(site.client, site.ip("LAN address", family), 8090).server == "later"


def test_doctor_beside_firewalld(site, firewalld, bin_dir):
    """doctor has nothing to say of firewalld's default zone, and names it in panic mode, with the way out"""
    assert doctors_words(bin_dir) == []
    firewalld.command("--panic-on")
    try:
        cause, whose, advice = doctors_words(bin_dir)[0]
        assert (cause, whose, advice) == ("dropped-by-firewall", "firewalld", "firewall-cmd --panic-off")
    finally:
        firewalld.command("--panic-off")


CLIENT = ADDRESSES["client"][0]
POLICY = """
firewall-cmd --permanent --new-policy nothing
firewall-cmd --permanent --policy nothing --add-ingress-zone ANY
firewall-cmd --permanent --policy nothing --add-egress-zone ANY
firewall-cmd --permanent --policy nothing --set-target DROP
firewall-cmd --reload
"""


@pytest.mark.parametrize(("closes", "opens"), [
    ("firewall-cmd --set-default-zone=drop", "firewall-cmd --set-default-zone=public"),
    ("firewall-cmd --set-default-zone=block", "firewall-cmd --set-default-zone=public"),
    ("firewall-cmd --zone=drop --change-interface=to-lan-client", "firewall-cmd --complete-reload"),
    (f"firewall-cmd --zone=drop --add-source={CLIENT}", "firewall-cmd --complete-reload"),
    (f"firewall-cmd --add-rich-rule='rule family=ipv4 source address={CLIENT} drop'", "firewall-cmd --complete-reload"),
    (POLICY, "firewall-cmd --permanent --delete-policy nothing; firewall-cmd --reload")],
    ids=["default zone drop", "default zone block", "zone of the interface", "zone of the source", "rich rule",
         "policy"])
def test_published_ports_stay_open(site, firewalld, closes, opens):
    """What closes this host's own ports does not close published ones; conditions and hostIP do"""
    firewalld.shell(closes)
    try:
        assert site.differences() == {}
        lan = site.ip("LAN address", 4)
        with site.publish("apart", [{"hostPort": 8090, "containerPort": 80, "protocol": "tcp"},
                                    {"hostPort": 8091, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}],
                          conditionsV4=["!", "-s", CLIENT]):
            assert lab.exchange(site.client, lan, 8090, timeout=0.3) is None
            assert lab.exchange(site.places["far client"], lan, 8090).server == "apart"
            assert lab.exchange(site.places["far client"], lan, 8091, timeout=0.3) is None
            assert lab.exchange(lab.HOST, "127.0.0.1", 8091).server == "apart"
    finally:
        firewalld.shell(opens)
    assert says("docs/firewalls.md", "So published ports stay open to clients that you meant to keep out",
                "all but one")


def test_masquerading_in_the_default_zone(site, firewalld):
    """Containers see the bridge's address in place of an IPv4 client's"""
    firewalld.command("--add-masquerade")
    try:
        for family, sees in (4, "bridge address"), (6, "client"):
            saw = lab.exchange(site.client, site.ip("LAN address", family), EVERY)
            assert saw.peer == site.ip(sees, family)
    finally:
        firewalld.command("--remove-masquerade")
    assert says("docs/firewalls.md", "containers see the bridge's address in place of an IPv4 client's own")


def test_firewalld_stops(site, firewalld):
    """firewalld ends and takes its own rules along; started again, it answers"""
    firewalld.stop()
    assert site.differences() == {}
    firewalld.start()
    assert site.differences() == {}


def test_panic_with_the_backend_iptables(need, site, bin_dir):
    """FirewallBackend=iptables: nothing answers, and doctor names firewalld, with the way out"""
    need("dbus-daemon", "dbus", "gi", UNPACKED / "firewalld")
    with Userland("firewalld-iptables", "firewalld") as machine:
        machine.run("sed", "-i", "s/^FirewallBackend=.*/FirewallBackend=iptables/", "/etc/firewalld/firewalld.conf")
        with Firewalld(machine) as firewalld:
            assert site.differences() == {}
            firewalld.command("--panic-on")
            assert site.differences(nothing(site)) == {}
            cause, whose, advice = doctors_words(bin_dir)[0]
            assert (cause, whose, advice) == ("dropped-by-firewall", "firewalld", "firewall-cmd --panic-off")
            machine.shell(advice)
            assert site.differences() == {}


def test_strict_forward_ports(need, site, bin_dir):
    """StrictForwardPorts=yes: nothing answers, by design; with the advice in docs/firewalls.md it does"""
    need("dbus-daemon", "dbus", "gi", UNPACKED / "firewalld-2")
    with Userland("firewalld-2", "firewalld-2") as machine:
        machine.run("sed", "-i", "s/^StrictForwardPorts=.*/StrictForwardPorts=yes/", "/etc/firewalld/firewalld.conf")
        with Firewalld(machine):
            VERSIONS[__name__].append(machine.run("firewall-cmd", "--version").strip())
            assert site.differences(nothing(site)) == {}
            cause, whose, advice = doctors_words(bin_dir)[0]
            assert (cause, whose) == ("dropped-by-firewall", "firewalld") and "StrictForwardPorts=no" in advice
            machine.shell(STRICT)
            assert site.differences() == {}
            assert doctors_words(bin_dir) == []
    assert shown_in("docs/firewalls.md", STRICT)
    assert says("docs/firewalls.md", "firewalld's panic mode and `StrictForwardPorts` close those, too")


def test_a_forward_chain_that_drops(site):
    """A ruleset of nftables that drops what is forwarded; with the advice in docs/firewalls.md it answers"""
    lab.nft("-f", "-", input=DROPPING)
    try:
        assert site.differences(site.answers_host) == {}
        lab.run("sh", "-euc", ACCEPT)
        assert site.differences() == {}
    finally:
        lab.nft("delete", "table", "inet", "filter")
    assert shown_in("docs/firewalls.md", ACCEPT)


@pytest.fixture(scope="module")
def ufw(need, site):
    need(UNPACKED / "ufw")
    with Userland("ufw", "ufw") as machine:
        # As its package does when it is installed.
        machine.run("sh", "-c", "cp -n /usr/share/ufw/*.rules /usr/share/ufw/*.init /usr/share/ufw/ufw.conf "
                                "/usr/share/ufw/iptables/*.rules /etc/ufw")
        VERSIONS[__name__].append(machine.run("ufw", "--version").splitlines()[0])
        yield machine
        machine.run("ufw", "--force", "disable")


@pytest.mark.parametrize("commands, wanted", [
    ("ufw status", everything), ("ufw --force enable", from_the_host), ("ufw reload", from_the_host),
    ("ufw allow 8080/tcp", from_the_host),  # of this host, not of what it forwards
    (ROUTE, tcp_alone), (ROUTE_ALL, everything), ("ufw --force disable", everything)],
    ids=lambda value: value.strip().partition("\n")[0] if isinstance(value, str) else value.__name__)
def test_ufw(site, ufw, commands, wanted, bin_dir):
    """ufw drops what is forwarded; with the advice in docs/firewalls.md it answers; after"""
    before = lab.table()
    ufw.shell(commands)
    assert site.differences(wanted(site)) == {}
    found = doctors_words(bin_dir)
    assert [words[:2] for words in found[:1]] == \
        ([("dropped-by-firewall", "ufw")] if wanted is from_the_host else []), found
    assert all(advice.startswith("ufw route allow proto tcp to ") for _, _, advice in found), found
    assert lab.table() == before
    assert shown_in("docs/firewalls.md", ROUTE)
    assert shown_in("docs/firewalls.md", ROUTE_ALL)
