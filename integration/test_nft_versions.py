"""The plugin with another libnftables: its whole life, every golden, and a short version of the matrix of paths.

Needs the root folder of another, newer Debian in the environment variable CNI_PORTMAP_ROOT. One is made by

    debootstrap --variant=minbase \\
        --include=nftables,python3-nftables,python3-jsonschema,python3-pyroute2 trixie /path/to/root

(the packages debootstrap and debian-archive-keyring; trixie has libnftables 1.1.3, forky 1.1.7). The plugin runs in
that root, with its Python and its libnftables; kernel, other plugins and packets are this host's. Nothing is written
to the folder.
"""
import os

import lab
import paths
import pytest
import test_goldens
from test_hardening import (  # noqa: F401
    test_a_vanished_guard_is_noticed_and_repaired,
    test_localhost_is_opened_on_one_interface_and_where_needed,
)
from test_packets import (  # noqa: F401
    site,
    sites,
    test_configured,
    test_localhost_leads_to_each_of_several_interfaces,
    test_one_port_on_many_host_ips,
    test_range,
    test_sctp,
)

ROOT = os.environ.get("CNI_PORTMAP_ROOT", "")
pytestmark = pytest.mark.skipif(not ROOT, reason="no other nft: make a newer Debian with python3-nftables and nftables "
                                                      "(debootstrap), and name its folder in CNI_PORTMAP_ROOT")


@pytest.fixture(scope="module")
def bin_dir(tmp_path_factory):
    with lab.other_root(ROOT):
        yield lab.install_in_other_root(tmp_path_factory.mktemp("other") / "bin")


def test_it_is_another_version(bin_dir, capsys):
    """The root's nft is not the host's, or all of this proves nothing new."""
    version = lab.nft("--version")
    with capsys.disabled():
        print(f"\nCNI_PORTMAP_ROOT: {version.strip()}")
    assert version != lab.run("nft", "--version")


@pytest.mark.parametrize("name", test_goldens.GOLDENS)
def test_golden(bin_dir, name):
    """Every golden loads and lists there, too."""
    test_goldens.test_golden(name)


SHORT = [(setting, path) for setting in paths.SETTINGS[:4] for path in paths.PATHS if path.sees]


@pytest.mark.parametrize("setting, path", SHORT, ids=[f"{setting.name}-{path}" for setting, path in SHORT])
def test_path(sites, setting, path):  # noqa: F811
    """The path works as it does with this host's libnftables, over TCP."""
    for family in 4, 6:
        if paths.exists(path, setting, family):
            assert sites(setting).try_path(path, family, "tcp") == paths.expected(path, setting, family)


def test_verbs(bin_dir):
    """STATUS, ADD, ADD, CHECK, GC, CHECK of what is gone, DEL, DEL, of more ports than one message holds."""
    ports = [{"hostPort": 20000 + i, "containerPort": 30000 - i, "protocol": "udp"} for i in range(300)]
    with lab.fresh_host():
        network = lab.Network(lab.bridge_conflist(version="1.1.0"), bin_dir)
        lab.call_plugin(bin_dir / "portmap", "STATUS", network.config())
        network = lab.Network(lab.bridge_conflist(version="1.0.0"), bin_dir)
        kept = lab.Container(network, "kept", [{"hostPort": 1, "containerPort": 1}])
        stale = lab.Container(network, "stale", ports)
        once = lab.nft("list", "table", "inet", "cni_portmap")
        lab.call_plugin(bin_dir / "portmap", "ADD", network.config(ports, stale.result), stale.id, stale.namespace.path)
        assert sorted(lab.nft("list", "table", "inet", "cni_portmap").split()) == sorted(once.split())
        valid = [{"containerID": kept.id, "ifname": "eth0"}]
        collect = {**network.config(), "cniVersion": "1.1.0", "cni.dev/valid-attachments": valid}
        for container in kept, stale:
            container.check()
        lab.call_plugin(bin_dir / "portmap", "GC", collect)
        kept.check()
        with pytest.raises(lab.CniFailed, match="is not forwarded to this container"):
            stale.check()
        for container in kept, stale:
            for _ in range(2):
                lab.call_plugin(bin_dir / "portmap", "DEL", network.config(), container.id)
            container.remove()
        assert "c/" not in lab.nft("list", "table", "inet", "cni_portmap")
