"""An attacker on each wire of a host, with frames made by hand; and the reference plugin's containers on one bridge."""
import concurrent.futures
import contextlib

import lab
import pytest
from lab import paths
from lab.paths import EVERY, LOCAL, OWN, WEB

# Bridges and routed veths, the uplink as a port of the bridge, both states of br_netfilter, opened by somebody else.
WIRES = [setting for setting in paths.SETTINGS if setting.families == (4, 6) and not setting.ip_masq]


@pytest.mark.parametrize("setting", WIRES, ids=lambda setting: setting.name)
def test_an_attacker_on_each_wire(sites, setting):
    """Nobody on a wire reaches localhost, or poses as it, but where somebody else has opened the wire.

    There the host's own services answer, as before the first ADD, and what is published on localhost does not.
    Whoever is on the container's interface with a source of its network is masqueraded; a source that is forged on
    another wire is not, so it does not pass for the host.
    """
    site = sites(setting)
    wrong, near = [], {site.devices[who] for who in ("container", *["stranger"] * setting.second_network)}
    for who, device in site.devices.items():
        for family in 4, 6:
            lan, localhost, own = (site.ip(name, family) for name in ("LAN address", "localhost", who))
            if not own:
                continue
            opened = family == 4 and device not in near and \
                (device == "loopback0" or setting.localnet in ("all", device))
            in_its_network = site.ip("hostile neighbour", family)
            sources = [own, in_its_network, localhost, *["127.7.7.7"] * (family == 4)]
            for source in dict.fromkeys(sources):
                for to, port in (lan, EVERY), (localhost, EVERY), (localhost, LOCAL), (localhost, OWN):
                    sees = ""
                    if to == lan and source in (own, in_its_network):
                        sees = site.ip("bridge address", family) if device in near else source
                    elif port == OWN and opened and source != localhost:  # Linux itself takes none from its own address
                        sees = source
                    if (saw := site.arrival(who, source, to, port, sees)) != sees:
                        wrong.append((who, source, to, port, saw, sees))
    assert not wrong


THEIRS, OURS = 8090, 8091


def answers(places, containers, port, before=None):
    """By (who, to, family): the container that answers on a port, and whom it sees. Who had no answer `before`, if that
    is known, is not waited for so long."""
    addresses = {4: ("192.0.2.1", "127.0.0.1"), 6: ("2001:db8::1",)}
    asked = {(who, to, family): place for who, place in (places | containers).items()
             for family, tos in addresses.items() for to in tos if to != "127.0.0.1" or who == "host"}
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as side_by_side:
        saw = side_by_side.map(lambda case: lab.exchange(
            asked[case], case[1], port, timeout=lab.patience(before is None or before[case])), asked)
        return dict(zip(asked, saw))


@pytest.mark.parametrize("br_netfilter", [False, True], ids=["", "br_netfilter"])
@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_beside_the_reference_plugin_on_one_bridge(bin_dir, reference, backend, br_netfilter):
    """Its containers answer whom they did before our first ADD, and until our teardown; ours answer everybody.

    What a wire sends to 127.0.0.1 reaches theirs no more, while our guard is there.
    """
    with lab.fresh_host(), contextlib.ExitStack() as stack:
        if not lab.br_netfilter(br_netfilter):
            pytest.skip("no br_netfilter in this kernel: modprobe br_netfilter")
        lan = lab.wire("lan", ("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
        places = {"host": lab.HOST, "client": lan}
        conflist = lab.bridge_conflist("beside", "cni0", backend=backend)
        their_network, our_network = (lab.Network(conflist, folder) for folder in (reference, bin_dir))
        containers = {}
        for name, network, port in ("theirs", their_network, THEIRS), ("other", their_network, 0):
            mappings = [{"hostPort": port, "containerPort": WEB, "protocol": protocol}
                        for protocol in ("tcp", "udp") if port]
            containers[name] = lab.Container(network, name, mappings)
            stack.callback(containers[name].remove)
        datagrams = stack.enter_context(lab.Server("theirs", containers["theirs"], WEB, "udp"))
        stack.enter_context(lab.Server("theirs", containers["theirs"], WEB))
        before = answers(places, containers, THEIRS)
        assert before["client", "192.0.2.1", 4] == lab.Saw("theirs", "192.0.2.2", WEB)
        assert before["host", "127.0.0.1", 4].server == "theirs"
        ours = lab.Container(our_network, "ours", [{"hostPort": OURS, "containerPort": WEB}])
        stack.enter_context(lab.Server("ours", ours, WEB))
        assert answers(places, containers, THEIRS, before) == before
        for (who, to, family), saw in answers(places, {**containers, "ours": ours}, OURS).items():
            bridge, client = ("10.88.0.1", "192.0.2.2") if family == 4 else ("fd88::1", "2001:db8::2")
            sees = bridge if to == "127.0.0.1" else {"host": to, "client": client}.get(who, bridge)
            assert saw == lab.Saw("ours", sees, WEB), (who, to)
        lab.inject(containers["other"], "cni0", lab.packet("10.88.0.3", "127.0.0.1", THEIRS))
        assert lab.exchange(lan, "192.0.2.1", THEIRS, "udp")
        assert {saw.peer for saw in datagrams.arrivals} == {"192.0.2.2"}
        ours.remove()
        assert answers(places, containers, THEIRS, before) == before
        lab.run(bin_dir.parent / "sbin/cni-portmap", "teardown")
        assert not lab.table() and answers(places, containers, THEIRS, before) == before
