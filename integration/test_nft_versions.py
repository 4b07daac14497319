"""The plugin with another libnftables: its whole life. CNI_PORTMAP_ROOT names the root folder of another, newer Debian.

One is made by

    debootstrap --variant=minbase --include=nftables,python3-nftables,python3-jsonschema trixie /path/to/root

(the packages debootstrap and debian-archive-keyring; trixie has libnftables 1.1.3, forky 1.1.7). The plugin runs in
that root, with its Python and its libnftables; kernel, other plugins and packets are this host's. Nothing is written
to the folder. The goldens, and all tests of packets and of hardening, then run there as well: what asks for the fixture
`each_bin_dir`.
"""
import os

import lab
import pytest

pytestmark = pytest.mark.skipif("CNI_PORTMAP_ROOT" not in os.environ, reason="no other nft: make a newer Debian with "
                                "python3-nftables and nftables (debootstrap), and name its folder in CNI_PORTMAP_ROOT")


def test_it_is_another_version(other_bin_dir, capsys):
    """The root's nft is not the host's, or all of this proves nothing new."""
    version = lab.nft("--version")
    with capsys.disabled():
        print(f"\nCNI_PORTMAP_ROOT: {version.strip()}")
    assert version != lab.run("nft", "--version")


def test_a_whole_life_with_more_ports_than_one_message_holds(other_bin_dir):
    """STATUS, ADD, ADD, CHECK, GC, CHECK of what is gone, DEL, DEL, of more ports than one message holds."""
    ports = [{"hostPort": 20000 + i, "containerPort": 30000 - i, "protocol": "udp"} for i in range(300)]
    portmap = other_bin_dir / "portmap"
    with lab.fresh_host():
        network = lab.Network(lab.bridge_conflist(version="1.1.0"), other_bin_dir)
        lab.call_plugin(portmap, "STATUS", network.config())
        network = lab.Network(lab.bridge_conflist(version="1.0.0"), other_bin_dir)
        kept = lab.Container(network, "kept", [{"hostPort": 1, "containerPort": 1}])
        stale = lab.Container(network, "stale", ports)
        once = lab.nft("list", "table", "inet", "cni_portmap")
        lab.call_plugin(portmap, "ADD", network.config(ports, stale.result), stale.id, stale.namespace.path)
        assert sorted(lab.nft("list", "table", "inet", "cni_portmap").split()) == sorted(once.split())
        valid = [{"containerID": kept.id, "ifname": "eth0"}]
        collect = {**network.config(), "cniVersion": "1.1.0", "cni.dev/valid-attachments": valid}
        for container in kept, stale:
            container.check()
        lab.call_plugin(portmap, "GC", collect)
        kept.check()
        with pytest.raises(lab.CniFailed, match="is not forwarded to this container"):
            stale.check()
        for container in kept, stale:
            for _ in range(2):
                lab.call_plugin(portmap, "DEL", network.config(), container.id)
            container.remove()
        assert "c/" not in lab.nft("list", "table", "inet", "cni_portmap")
