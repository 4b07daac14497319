"""Exposure beside what others do to the same packets: the reference bridge's ipMasq, firewalld, ufw, Docker."""
import lab
import pytest
from lab import exposed
from lab.docker import Docker
from lab.exposed import MODES, SETTINGS, TARGETS, Place
from lab.firewalld import Firewalld
from lab.machine import NEWER_PLUGINS, UNPACKED, VERSIONS, Userland

NAMED = {mode.name: mode for mode in MODES}


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_the_bridge_plugin_masquerades(need, bin_dir, tmp_path, backend):
    """ipMasq of the reference bridge plugin 1.9: the policy decides as whom the container goes out, and nothing else"""
    need(NEWER_PLUGINS / "bridge", "iptables")
    for plugin in NEWER_PLUGINS.iterdir():
        (tmp_path / plugin.name).symlink_to(bin_dir / "portmap" if plugin.name == "portmap" else plugin)
    with Place(SETTINGS[0], tmp_path, backend) as place:
        for mode in MODES:
            with place.having(mode.keys):
                assert place.table(mode) == place.wanted(mode)


@pytest.fixture(scope="module")
def place(need, bin_dir):
    """A host with a container, which every firewall finds there."""
    need("/usr/lib/cni/bridge")
    with Place(SETTINGS[0], bin_dir) as place:
        yield place


def assert_in_force(place):
    """In each mode nothing is open that should not be, and published ports answer."""
    for name in "nat", "nat, allowDirectRouting", "nat, trustedHostInterfaces", "routed", "isolated":
        with place.having(NAMED[name].keys):
            assert place.too_open(NAMED[name]) == {}


def test_firewalld(need, place):
    """firewalld in its default zone and with trusted interfaces, reloaded, stopped: what it accepts stays closed"""
    need("dbus-daemon", "dbus", "gi", UNPACKED / "firewalld")
    with Userland("exposure-firewalld", "firewalld") as machine, Firewalld(machine) as firewalld:
        VERSIONS[__name__].append(f"firewalld {machine.run('firewall-cmd', '--version').strip()}")
        assert_in_force(place)
        firewalld.command("--zone=trusted", "--change-interface=to-lan-client")
        firewalld.command("--zone=trusted", "--change-interface=cni0")
        assert_in_force(place)
        with place.having(NAMED["nat, allowDirectRouting"].keys):
            assert place.reach("LAN client", TARGETS[2], 4)
            firewalld.command("--reload")
        assert_in_force(place)
        firewalld.stop()
        assert_in_force(place)
        firewalld.start()


def test_ufw(need, place):
    """ufw drops what is forwarded; where it lets all of it through, the policy still stands"""
    need(UNPACKED / "ufw")
    with Userland("exposure-ufw", "ufw") as machine:
        machine.run("sh", "-c", "cp -n /usr/share/ufw/*.rules /usr/share/ufw/*.init /usr/share/ufw/ufw.conf "
                                "/usr/share/ufw/iptables/*.rules /etc/ufw")
        VERSIONS[__name__].append(machine.run("ufw", "--version").splitlines()[0])
        try:
            machine.run("ufw", "--force", "enable")
            with place.having(NAMED["nat, allowDirectRouting"].keys):
                assert not place.reach("LAN client", TARGETS[2], 4, 0.3)
            machine.run("ufw", "default", "allow", "routed")
            assert_in_force(place)
            with place.having(NAMED["nat, allowDirectRouting"].keys):
                assert place.reach("LAN client", TARGETS[2], 4)
        finally:
            machine.run("ufw", "--force", "disable")


def test_docker(need, place):
    """Docker's containers are outside, as any other bridge; ours and Docker's own ports answer"""
    need(UNPACKED / "docker", "containerd", "runc", "busybox", "iptables")
    with Docker("exposure-docker", "docker") as machine:
        VERSIONS[__name__].append(machine.version())
        with lab.Server("docker", machine.start("-p", "8200:80"), 80):
            assert_in_force(place)
            with place.having(NAMED["nat"].keys):
                inside = machine.start(name="other")
                assert lab.exchange(inside, exposed.LAN[4][0], 8080)
                for port in 80, 81, 82:
                    assert lab.exchange(inside, place.ips[4], port, timeout=0.3) is None
                assert lab.exchange(place.client, exposed.LAN[4][0], 8200).server == "docker"
                machine.remove("other")
        machine.remove()
        machine.end()
