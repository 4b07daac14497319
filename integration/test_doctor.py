"""doctor names the right cause first in each broken lab, no other error beside it, and none in a healthy one.

Where a lab can follow the advice, it is followed, and the port answers.
"""
import contextlib
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import time
import types

import lab
from lab import TABLE
from lab.libcni_cache import Cache
from lab.clinic import CLIENT_IP, LAN_IP, Clinic
from lab.servers import exchange
from lab.links import add_addresses, add_route, delete_link, flush_addresses, have_settled
import pytest

from cni_portmap.cli.checks import CHECKS
from cni_portmap.linux import probe


def nft(text):
    lab.nft("-f", "-", input=text)


def ip(*words):
    lab.run("ip", *words)


def inside(clinic, *words):
    lab.run("nsenter", f"--net={clinic.web.namespace.path}", *words)


def sysctl(name, value):
    lab.sysctl(name, value)


# Ports that are not published here: doctor looks at the namespaces of all processes, so at those of tests beside these.
NOBODYS, ELSEWHERES, CONTAINERS_OWN, DOCKERS, PROCESSES = random.sample(range(20000, 30000), 5)


# --- what breaks it --------------------------------------------------------------------------------------------

DNAT = "table ip foreign { chain c { type nat hook prerouting priority %d; %s tcp dport 8080 dnat to 10.88.0.9:80; }; }"


def drop(hook, rule, family="inet", priority=0, policy="accept"):
    return lambda clinic: nft(f"table {family} foreign {{ chain c {{ type filter hook {hook} priority {priority}; "
                              f"policy {policy}; {rule}; }}; }}\n")


def iptables(*lines, program="iptables-legacy"):
    def break_it(clinic):
        for line in lines:
            lab.run(program, *line.split())
    return break_it


def only_localhost(clinic):
    clinic.serve(ip="127.0.0.1")
    clinic.serve(ip="::1")


def other_port(clinic):
    clinic.serve(port=8000)


def fill_queue(clinic):
    with clinic.web:
        listener = socket.socket(socket.AF_INET6)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::", 80))
        listener.listen(1)
    clients = []
    for _ in range(3):
        client = socket.socket()
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((clinic.web.ipv4, 80))
        clients.append(client)
    clinic.kept = listener, clients
    lab.until(lambda: "2" in lab.run("nsenter", f"--net={clinic.web.namespace.path}", "ss", "-Hltn").split()[1])


def host_end():
    return next(name for _, name in socket.if_nameindex() if name.startswith("veth"))


def second_uplink(clinic):
    """The client comes in on lan0, and this host's own route to it leads by up2."""
    clinic.machine("upstream", "up2", ("198.51.100.1/24",), ("198.51.100.2/24",))
    ip("addr", "add", "10.9.9.9/32", "dev", "up2")
    add_route("203.0.113.0/24", "198.51.100.2")
    sysctl("net.ipv4.conf.lan0.rp_filter", 1)


def second_network(clinic):
    """The container's default route leads by another network."""
    other = lab.Network(lab.bridge_conflist("othernet", "cni1", ("10.99.0.0/16",)), clinic._bin_dir)
    other.conflist["plugins"] = other.conflist["plugins"][:1]
    other.add(clinic.web.id, clinic.web.namespace.path, ifname="eth1")
    sysctl("net.ipv4.conf.cni1.rp_filter", 1)
    inside(clinic, "ip", "route", "replace", "default", "via", "10.99.0.1", "dev", "eth1")


def lose_container(clinic):
    delete_link(host_end())


RESULTS = pathlib.Path("/run/cni/results")  # one of libcni's folders, here the lab's own


@contextlib.contextmanager
def remembered(clinic, *args):
    RESULTS.mkdir(parents=True, exist_ok=True)
    cache = Cache(RESULTS)
    cache.remember(clinic.web, cniArgs=args)
    clinic._stack.callback(cache.forget, clinic.web)
    yield


def flush_with_cache(clinic):
    with remembered(clinic):
        lab.nft("flush", "ruleset")


def stop_with_cache(clinic):
    with remembered(clinic):
        delete_link(host_end())
        clinic.web.namespace.remove()
        lab.nft("flush", "ruleset")


def replace_with_cache(clinic):
    """The container was removed, and one that publishes nothing has its name."""
    with remembered(clinic, ["K8S_POD_NAME", "shop"]):
        delete_link(host_end())
        clinic.web.namespace.remove()
        lab.nft("flush", "ruleset")
    other = clinic.container("other")
    cache = Cache(RESULTS)
    cache.remember(other, cniArgs=[["K8S_POD_NAME", "shop"]])
    clinic._stack.callback(cache.forget, other)


def without_gateway(clinic, **changes):
    """The network asks for no address on its bridge, as libcni remembers it, and there is none."""
    first = clinic.network.conflist["plugins"][0]
    first |= {"isGateway": False, **changes}
    with remembered(clinic):
        flush_addresses("cni0")
    inside(clinic, "ip", "route", "del", "default")


def serve_here(clinic):
    clinic._stack.enter_context(lab.Server("host", lab.HOST, PROCESSES))


def publish_elsewhere(clinic):
    """Another namespace, as RootlessKit's, where the port is published."""
    other = lab.Namespace("rootless")
    clinic._stack.callback(other.remove)
    with other:
        lab.nft("-f", "-", input="table inet cni_portmap { map hostports { "
                "typeof meta nfproto . meta l4proto . th dport : verdict; }; "
                "map hostip4_hostports { typeof ip daddr . meta l4proto . th dport : verdict; }; "
                "map hostip6_hostports { typeof ip6 daddr . meta l4proto . th dport : verdict; }; "
                "chain c/rootless1/eth0 { }; }; "
                f"add element inet cni_portmap hostports {{ ipv4 . tcp . {ELSEWHERES} : goto c/rootless1/eth0 }}")
    process = subprocess.Popen(["nsenter", f"--net={other.path}", "sleep", "60"])
    clinic._stack.callback(process.wait)
    clinic._stack.callback(process.kill)
    lab.until(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != os.readlink("/proc/self/ns/net"))


def macvlan(clinic):
    """The container's interface is on the uplink, as macvlan makes it."""
    inside(clinic, "ip", "link", "del", "eth0")
    ip("link", "add", "mv0", "link", "lan0", "type", "macvlan", "mode", "bridge")
    ip("link", "set", "mv0", "netns", clinic.web.namespace.name)
    inside(clinic, "ip", "link", "set", "mv0", "name", "eth0")
    publish_on_eth0(clinic)


def tap(clinic):
    """The container's interface is one of a program."""
    inside(clinic, "ip", "link", "del", "eth0")
    inside(clinic, "ip", "tuntap", "add", "dev", "eth0", "mode", "tap")
    publish_on_eth0(clinic)


def publish_on_eth0(clinic):
    """The plugin publishes on an interface that is on no bridge."""
    netns = clinic.web.namespace
    inside(clinic, "ip", "addr", "add", "192.0.2.50/24", "dev", "eth0")
    inside(clinic, "ip", "link", "set", "eth0", "up")
    clinic.network.conflist["plugins"][:-1] = []
    result = {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": netns.path}],
              "ips": [{"address": "192.0.2.50/24", "interface": 0}]}
    config = clinic.network.config(clinic.ports, result)
    lab.call_plugin(clinic.network.bin_dir / "portmap", "DEL", config, clinic.web.id, netns.path)
    lab.call_plugin(clinic.network.bin_dir / "portmap", "ADD", config, clinic.web.id, netns.path)


def second_owner(clinic):
    """Another machine on the bridge answers for the container's address."""
    other = clinic.container("twin")
    with other:
        add_addresses("eth0", f"{clinic.web.ipv4}/32")
        ip("link", "set", "eth0", "address", "02:00:00:00:00:77")
    ip("neigh", "replace", clinic.web.ipv4, "lladdr", "02:00:00:00:00:77", "dev", "cni0", "nud", "stale")


def stale_udp(clinic):
    """A flow of UDP to the host's port that was translated to somebody else before."""
    clinic.serve(protocol="udp")
    nft((DNAT % (-150, "")).replace("foreign", "before").replace("tcp", "udp").replace("0.9:", "0.99:"))
    with clinic.client:
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.connect((LAN_IP[4], 8080))
        sender.send(b"x")
    clinic.kept = sender
    lab.until(lambda: "10.88.0.99" in lab.run("conntrack", "-L", "-p", "udp", check=False))
    lab.nft("delete", "table", "ip", "before")


def stand_by(clinic):
    """A next sandbox of the container's pod, as ADD leaves it, and the note of it."""
    lab.nft_script(f"add chain {TABLE} c/next/eth0",
                   f"add rule {TABLE} c/next/eth0 tcp dport 8080 counter dnat ip to 10.88.0.99:80",
                   f'add rule {TABLE} c/{clinic.web.id}/eth0 continue comment "also on eth0 of next"')


class Case:
    """A broken lab: `does` breaks it. `cause`: what is named first; `severity`; `words`: of doctor; `names`: what the
    finding has to name. `cured`: the way that answers once the advice is followed, None where no lab can follow it.
    """

    def __init__(self, cause, does=lambda clinic: None, words=("8080",), severity="error", names=(), cured=None,
                 beside=(), **clinic):
        self.cause, self.does, self.words, self.severity, self.names = cause, does, words, severity, names
        self.cured, self.beside, self.clinic = cured, {*beside}, clinic


CASES = {
    "not published": Case("not-published", words=(f"{NOBODYS}",), names=[f"{NOBODYS}/tcp"]),
    "udp asked": Case("published-other-protocol", words=("8080/udp",), names=["udp", "tcp"]),
    "container's port asked": Case(
        "container-port-asked", words=(f"{CONTAINERS_OWN}",), names=[f"{CONTAINERS_OWN}", "8080"],
        ports=[{"hostPort": 8080, "containerPort": CONTAINERS_OWN, "protocol": "tcp"}], serve=False),
    "Docker publishes it": Case(
        "published-by-other", iptables("-t nat -N DOCKER", "-t nat -A PREROUTING -j DOCKER",
                                       f"-t nat -A DOCKER -p tcp --dport {DOCKERS} -j DNAT "
                                       "--to-destination 172.17.0.2:80",
                                       program="iptables-nft"), (f"{DOCKERS}",), names=["Docker", "172.17.0.2"]),
    "localhost only": Case("listens-on-localhost", only_localhost, serve=False, names=["labnet, eth0"]),
    "another port": Case("nobody-listens", other_port, serve=False, names=["8000", "80/tcp"]),
    "nobody": Case("nobody-listens", serve=False),
    "another address": Case("listens-on-other-address", lambda clinic: (
        inside(clinic, "ip", "addr", "add", "10.77.0.1/24", "dev", "eth0"), clinic.serve(ip="10.77.0.1")), serve=False,
        subnets=("10.88.0.0/16",)),
    "IPv4 only": Case("listens-other-family", lambda clinic: clinic.serve(ip="0.0.0.0"), serve=False,
                      severity="warning", names=["IPv6"]),
    "queue full": Case("backlog-full", fill_queue, serve=False),
    "address changed": Case("container-address-changed", lambda clinic: (
        inside(clinic, "ip", "addr", "del", f"{clinic.web.ipv4}/16", "dev", "eth0"),
        inside(clinic, "ip", "addr", "add", "10.88.200.77/16", "dev", "eth0"),
        inside(clinic, "ip", "route", "add", "default", "via", "10.88.0.1")),
        names=["10.88.200.77"], cured="client", subnets=("10.88.0.0/16",)),
    "interface gone": Case("owner-dead", lose_container, beside=["lost-from-kernel"]),
    "a sandbox stands by": Case("next-sandbox-stands-by", stand_by, severity="info", names=["container next"]),
    "interface down": Case("interface-down", lambda clinic: inside(clinic, "ip", "link", "set", "eth0", "down"),
                           names=["eth0"]),
    "no way back": Case("no-way-back", lambda clinic: inside(clinic, "ip", "route", "del", "default"),
                        subnets=("10.88.0.0/16",), cured="client"),
    "back by another network": Case("way-back-elsewhere", second_network, names=["cni1", "rp_filter"], cured="client",
                                    subnets=("10.88.0.0/16",)),
    "veth down": Case("host-veth-down", lambda clinic: ip("link", "set", host_end(), "down"), cured="client"),
    "bridge down": Case("bridge-down", lambda clinic: ip("link", "set", "cni0", "down"), names=["cni0"],
                        cured="client"),
    "bridge port blocked": Case("bridge-port-blocked", lambda clinic: (
        ip("link", "set", "cni0", "type", "bridge", "stp_state", "1", "forward_delay", "1500"),
        ip("link", "set", host_end(), "nomaster"), ip("link", "set", host_end(), "master", "cni0")),
        names=["cni0", "listening"], cured="client"),
    "not on the bridge": Case("not-on-bridge", lambda clinic: ip("link", "set", host_end(), "nomaster"),
                              names=["cni0"], cured="client"),
    "no route": Case("no-route-to-container", lambda clinic: (flush_addresses("cni0"), ip("route", "del", "default")),
                     names=["cni0"], cured="client", subnets=("10.88.0.0/16",)),
    "route elsewhere": Case("route-elsewhere", lambda clinic: flush_addresses("cni0"), names=["lan0", "cni0"],
                            cured="client", subnets=("10.88.0.0/16",)),
    "container's address is local": Case("container-address-is-local", lambda clinic: ip(
        "addr", "add", f"{clinic.web.ipv4}/32", "dev", "lan0"), cured="client", subnets=("10.88.0.0/16",)),
    "forwarding off": Case("forwarding-off", lambda clinic: sysctl("net.ipv4.ip_forward", 0),
                           names=["net.ipv4.ip_forward"], cured="client"),
    "forwarding off on a link": Case("forwarding-off", lambda clinic: sysctl("net.ipv4.conf.lan0.forwarding", 0),
                                     names=["net.ipv4.conf.lan0.forwarding"], cured="client"),
    "IPv6 forwarding off": Case("forwarding-off", lambda clinic: sysctl("net.ipv6.conf.all.forwarding", 0),
                                names=["net.ipv6.conf.all.forwarding"], cured="client6"),
    "reverse path": Case("rp-filter", second_uplink, ("8080", "--from", "203.0.113.9", "--to", LAN_IP[4]),
                         names=["lan0", "up2"]),
    "policy drop": Case("dropped-by-firewall", drop("forward", "counter", policy="drop"),
                        names=["policy drop", "inet foreign"], cured="client"),
    "a rule": Case("dropped-by-firewall", drop("forward", "tcp dport 80 drop"), names=["tcp dport 80 drop"],
                   cured="client"),
    "before translation": Case("dropped-by-firewall", drop("prerouting", "tcp dport 8080 drop", priority=-300),
                               names=["prerouting", "tcp dport 8080"], cured="client"),
    "replies": Case("dropped-by-firewall", drop("forward", "tcp sport 80 drop"), names=["replies"], cured="client"),
    "replies before conntrack": Case("dropped-by-firewall", drop("prerouting", "tcp sport 80 drop", priority=-300),
                                     names=["replies"], cured="client"),
    "later packets": Case("dropped-by-firewall", drop("forward", "ct state established ct direction original drop"),
                          names=["later packets"], cured="client"),
    "reject": Case("dropped-by-firewall", drop("forward", "iifname lan0 reject"), names=["rejects"], cured="client"),
    "output": Case("dropped-by-firewall", drop("output", "tcp dport 80 drop", priority=0), names=["from this host"],
                   cured="host"),
    "a jump": Case("dropped-by-firewall", lambda clinic: nft(
        "table ip foreign { chain user { tcp dport 80 drop; }; chain c { type filter hook forward priority 0; "
        "iifname lan0 jump user; }; }"), names=["chain user"], cured="client"),
    "iptables-legacy": Case("dropped-by-firewall", iptables("-N BLOCK", "-A FORWARD -j BLOCK",
                                                            "-A BLOCK -p tcp --dport 80 -j DROP"),
                            names=["iptables-legacy", "BLOCK", "--dport 80"], cured="client"),
    "iptables-legacy policy": Case("dropped-by-firewall", iptables("-P FORWARD DROP"), names=["policy drop"],
                                   cured="client"),
    "iptables-legacy raw": Case("dropped-by-firewall", iptables("-t raw -A PREROUTING -p tcp --dport 8080 -j DROP"),
                                names=["raw", "PREROUTING"], cured="client"),
    "iptables-nft": Case("dropped-by-firewall", iptables("-A FORWARD -p tcp -m conntrack --ctstate NEW -j REJECT",
                                                         program="iptables-nft"),
                         names=["--ctstate NEW"], cured="client"),
    "ip6tables-legacy": Case("dropped-by-firewall", iptables("-P FORWARD DROP", program="ip6tables-legacy"),
                             names=["policy drop"], cured="client6"),
    "Docker's policy": Case("dropped-by-firewall", iptables(
        "-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-A FORWARD -j DOCKER-USER", "-P FORWARD DROP",
        program="iptables-nft"), names=["Docker"], cured="client"),
    "one client": Case("maybe-dropped", drop("forward", f"ip saddr {CLIENT_IP[4]} drop"), severity="info"),
    "one client, known": Case("dropped-by-firewall", drop("forward", f"ip saddr {CLIENT_IP[4]} drop"),
                              ("8080", "--from", CLIENT_IP[4]), cured="client"),
    "all but one client": Case("maybe-dropped", drop(
        "forward", "ip saddr 192.0.2.99 accept; ct direction original drop", family="ip"), severity="warning"),
    "taken before": Case("taken-by-other", lambda clinic: nft(
        DNAT % (-150, "")), names=["10.88.0.9"], cured="client"),
    "taken at our priority": Case("taken-by-other", lambda clinic: nft(
        DNAT % (-100, "")), names=["registered last"], cured="client"),
    "taken by iptables-legacy": Case("taken-by-other", iptables(
        "-t nat -A PREROUTING -p tcp --dport 8080 -j DNAT --to-destination 10.88.0.9:80"), cured="client",
        names=["iptables-legacy"]),
    "taken from some": Case("maybe-taken", lambda clinic: nft(
        DNAT % (-150, "ip saddr 192.0.2.9")), severity="warning"),
    "notrack": Case("notrack", drop("prerouting", "tcp dport 8080 notrack", priority=-300), cured="client"),
    "notrack by iptables-legacy": Case("notrack", iptables(
        "-t raw -A PREROUTING -p tcp --dport 8080 -j CT --notrack"), cured="client"),
    "notrack for some": Case("maybe-notrack", drop("prerouting", "ip saddr 192.0.2.9 tcp dport 8080 notrack",
                                                   priority=-300), severity="warning"),
    "dormant": Case("table-dormant", lambda clinic: lab.nft("add", "table", "inet", "cni_portmap",
                                                            "{ flags dormant; }"), cured="client"),
    "rules flushed": Case("table-damaged", lambda clinic: lab.nft("flush", "chain", "inet", "cni_portmap", "dispatch"),
                          cured="client"),
    "rule deleted": Case("table-damaged", lambda clinic: lab.nft(
        "flush", "chain", "inet", "cni_portmap", f"c/{clinic.web.id}/eth0")),
    "address left": Case("hostip-not-here", lambda clinic: (ip("addr", "del", "192.0.2.77/24", "dev", "lan0")),
                         names=["192.0.2.77"], subnets=("10.88.0.0/16",),
                         ports=[{"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.77"}]),
    "another address asked": Case("published-on-other-address", words=("8080", "--to", LAN_IP[4]), names=[LAN_IP[4]],
                                  subnets=("10.88.0.0/16",), ports=[
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.77"}]),
    "published on localhost": Case("published-on-localhost", words=("8080", "--from", CLIENT_IP[4]),
                                   subnets=("10.88.0.0/16",), ports=[
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]),
    "conditions": Case("excluded-by-condition", words=("8080", "--from", CLIENT_IP[4]), names=["conditionsV4"],
                       conditionsV4=["-s", "192.0.2.200"], subnets=("10.88.0.0/16",)),
    "route_localnet": Case("route-localnet-off", lambda clinic: sysctl("net.ipv4.conf.cni0.route_localnet", 0),
                           severity="warning", names=["net.ipv4.conf.cni0.route_localnet"], cured="localhost"),
    "route_localnet alone": Case("route-localnet-off", lambda clinic: sysctl("net.ipv4.conf.cni0.route_localnet", 0),
                                 subnets=("10.88.0.0/16",), cured="localhost", ports=[
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]),
    "route for ::1": Case("localhost6-route-missing", lambda clinic: ip("-6", "route", "del", "local", "::1", "dev",
                                                                        "cni0", "table", "local"),
                          severity="warning", names=["cni0"], cured="localhost6"),
    "lost from the kernel": Case("lost-from-kernel", flush_with_cache, cured="client"),
    "container stopped": Case("container-stopped", stop_with_cache),
    "container replaced": Case("container-stopped", replace_with_cache,
                               names=["podman start web", "another container"]),
    "no gateway asked for": Case("network-without-gateway", without_gateway, names=["cni0", "second network"],
                                 subnets=("10.88.0.0/16",)),
    "no gateway asked for, no default route": Case(
        "network-without-gateway", lambda clinic: (without_gateway(clinic), ip("route", "del", "default")),
        names=["cni0", "second network"], subnets=("10.88.0.0/16",)),
    "host's process": Case("host-process", serve_here, (f"{PROCESSES}",), severity="info"),
    "published elsewhere": Case("published-in-other-namespace", publish_elsewhere, (f"{ELSEWHERES}",),
                                names=["sleep", "rootless1"]),
    "macvlan": Case("no-bridge", macvlan, names=["macvlan"], subnets=("10.88.0.0/16",), beside=["forwarding-off"]),
    "tap": Case("no-bridge", tap, names=["a program"], subnets=("10.88.0.0/16",)),
    "one address twice": Case("address-twice", second_owner, names=["02:00:00:00:00:77"], subnets=("10.88.0.0/16",)),
    "no answer to ARP": Case("no-arp-answer", lambda clinic: ip(
        "neigh", "replace", clinic.web.ipv4, "dev", "cni0", "nud", "failed"), severity="warning"),
    "an old flow": Case("stale-flow", stale_udp, ("8080/udp",), names=["10.88.0.99"], subnets=("10.88.0.0/16",),
                        ports=[{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}], serve=False,
                        cured="udp"),
    "container's namespace unreadable": Case("container-unreadable", lambda clinic: (
        clinic.web.namespace.path and lab.delete_namespace("web")), severity="info"),
    "MTU": Case("mtu", lambda clinic: ip("link", "set", "lan0", "mtu", "1400"), severity="info", names=["1400"]),
    "IPv4 only container": Case("only-ipv4", severity="info", subnets=("10.88.0.0/16",)),
    "a host's process on the same port": Case("host-process-shadowed", lambda clinic: clinic._stack.enter_context(
        lab.Server("host", lab.HOST, 8080)), severity="info"),
    "no hairpin": Case("no-hairpin", lambda clinic: (lab.br_netfilter(True), ip(
        "link", "set", host_end(), "type", "bridge_slave", "hairpin", "off")), severity="info", names=["hairpin"]),
    "localhost6 with br_netfilter": Case("localhost6-br-netfilter", lambda clinic: lab.br_netfilter(True),
                                         severity="info"),
    "closed by exposure": Case("closed-by-exposure", words=("80", "--from", CLIENT_IP[4], "--to", "10.88.0.2"),
                               gatewayModeV4="nat", names=["port 8080 of this host", "allowDirectRouting"]),
    "closed by exposure, by the way": Case("closed-by-exposure", gatewayModeV4="nat", severity="info"),
    "link-local client": Case("client-link-local", words=("8080", "--from", "fe80::1")),
}


@pytest.fixture(scope="module")
def bin_dir_here(bin_dir):
    return bin_dir


@pytest.mark.parametrize("name", CASES)
def test_right_cause_first(bin_dir, name):
    """Named first, with no other error beside it, evidence and advice; once that is followed, the port answers."""
    case = CASES[name]
    if name == "address left" or name == "another address asked":
        context = WithAddress(bin_dir, case)
    else:
        context = Clinic(bin_dir, **case.clinic)
    with context as clinic:
        case.does(clinic)
        found, status = clinic.doctor(*case.words)
        assert found, "nothing found"
        if case.severity == "info":  # they have no order that matters
            found.sort(key=lambda each: each["cause"] != case.cause)
        assert (found[0]["cause"], found[0]["severity"]) == (case.cause, case.severity), found
        assert [each["cause"] for each in found if each["severity"] == "error" and each["cause"] != case.cause
                and each["cause"] not in case.beside] == [], found
        assert status == (0 if case.severity == "info" else 1)
        told = json.dumps(found[0])
        for word in case.names:
            assert word in told, (word, told)
        for each in found:
            assert each["evidence"] and each["advice"] and each["summary"]
        if case.cured:
            way, family = case.cured.removesuffix("6"), 6 if case.cured.endswith("6") else 4
            if way == "udp":
                clinic.follow(found[0]["advice"])
                assert clinic.answers(4, protocol="udp")
                return
            assert not clinic.answers(family, way, timeout=lab.HASTY)
            clinic.follow(found[0]["advice"])
            if not clinic.answers(family, way, timeout=2.5):  # IPv4 and IPv6, or two hooks, may each need it
                again, _ = clinic.doctor(*case.words)
                for each in again:
                    if each["severity"] != "info":
                        clinic.follow(each["advice"])
            assert clinic.answers(family, way)


class WithAddress(Clinic):
    """A clinic with another address of its LAN, before the container comes."""

    def __init__(self, bin_dir, case):
        super().__init__(bin_dir, **case.clinic)

    def machine(self, *words):
        machine = super().machine(*words)
        add_addresses("lan0", "192.0.2.77/24")
        return machine


@pytest.mark.parametrize("knows", [True, False], ids=["libcni knows the gateway", "nobody knows it"])
def test_a_gateway_that_is_not_known_is_no_placeholder(bin_dir, knows):
    """The bridge has lost its address, and the container has no default route: what is advised can be typed as it is"""
    with Clinic(bin_dir, subnets=("10.88.0.0/16",)) as clinic:
        if knows:
            with remembered(clinic):
                pass
        flush_addresses("cni0")
        ip("route", "del", "default")
        inside(clinic, "ip", "route", "del", "default")
        advice = {each["cause"]: each["advice"] for each in clinic.doctor("8080")[0]}
        assert advice["no-route-to-container"].startswith(
            "ip address add 10.88.0.1/16 dev cni0," if knows else "start container web")
        assert "GATEWAY" not in json.dumps(advice) and "give its network a default route" in advice["no-way-back"]


# --- healthy ones ----------------------------------------------------------------------------------------------

def allow_all_others(clinic):
    nft("table inet good { chain c { type filter hook forward priority 0; policy drop; ct status dnat accept; "
        "ct state established,related accept; }; chain i { type filter hook input priority 0; policy drop; "
        "iifname lo accept; ct state established,related accept; meta l4proto { icmp, ipv6-icmp } accept; }; }")


def docker_cured(clinic):
    CASES["Docker's policy"].does(clinic)
    lab.run("iptables-nft", "-I", "DOCKER-USER", "-m", "conntrack", "--ctstate", "DNAT", "-j", "ACCEPT")


KEYS = {"a policy of exposure": {"gatewayModeV4": "nat", "gatewayModeV6": "nat", "allowDirectRouting": True}}
HEALTHY = {
    "a policy of exposure": lambda clinic: None,
    "as it is": lambda clinic: None,
    "a firewall that lets it pass": allow_all_others,
    "Docker with its cure": docker_cured,
    "drops of other ports": drop("forward", "tcp dport { 22, 443 } drop"),
    "a loose filter and two uplinks": lambda clinic: (
        clinic.machine("upstream", "up2", ("198.51.100.1/24",), ("198.51.100.2/24",)),
        sysctl("net.ipv4.conf.lan0.rp_filter", 1), sysctl("net.ipv4.conf.up2.rp_filter", 1)),
    "another's DNAT for another port": lambda clinic: nft((DNAT % (-150, "")).replace("8080", "9999")),
    "another's DNAT at a later priority": lambda clinic: nft(DNAT % (-50, "")),
    "a neighbour without ports": lambda clinic: clinic.container("neighbour"),
    "a client that a rate limit of a set knows": lambda clinic: (nft(
        "table inet foreign { set s { type ipv4_addr; flags dynamic; size 9; }; chain c { type filter hook prerouting "
        "priority 0; ip saddr @s drop; add @s { ip saddr limit rate over 1000/second } drop; }; }"), clinic.answers()),
    "masquerading of what goes out": lambda clinic: nft(
        "table ip foreign { chain c { type nat hook postrouting priority 100; ip saddr 10.88.0.0/16 oifname lan0 "
        "masquerade; }; }"),
    "a dormant table that drops": lambda clinic: nft(
        "table inet foreign { flags dormant; chain c { type filter hook forward priority 0; policy drop; }; }"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_no_false_alarm(bin_dir, name):
    """Where the port answers, nothing but infos."""
    with Clinic(bin_dir, **KEYS.get(name, {})) as clinic:
        HEALTHY[name](clinic)
        assert clinic.answers() and clinic.answers(6) and clinic.answers(4, "host") and clinic.answers(6, "localhost")
        for words in ("8080",), (), ("8080", "--from", CLIENT_IP[4]), ("8080", "--to", LAN_IP[4]):
            found, status = clinic.doctor(*words)
            assert [each for each in found if each["severity"] != "info"] == []
            assert status == 0


CONTAINERS = {"itself": lambda clinic: clinic.web, "another": lambda clinic: clinic.container("other")}


@pytest.mark.parametrize("who", CONTAINERS)
def test_a_container_asks_on_its_own_bridge(bin_dir, who):
    """Not from outside: what is dropped or filtered there is nothing to a container, what is between containers is."""
    with Clinic(bin_dir) as clinic:
        asking = CONTAINERS[who](clinic)
        sysctl("net.ipv4.conf.all.rp_filter", 1)
        drop("forward", "iifname lan0 drop")(clinic)
        for client, to in (asking.ipv4, LAN_IP[4]), (asking.ipv6, LAN_IP[6]):
            assert exchange(asking, to, 8080, "tcp") is not None
            for words in ("--from", client), ("--from", client, "--to", to):
                assert clinic.doctor("8080", *words) == ([], 0)
        nft("flush chain inet foreign c; add rule inet foreign c iifname cni0 oifname cni0 drop")
        assert exchange(asking, LAN_IP[4], 8080, "tcp", timeout=lab.HASTY) is None
        found, _ = clinic.doctor("8080", "--from", asking.ipv4)
        assert [each["cause"] for each in found] == ["dropped-by-firewall"]


@pytest.mark.parametrize("client", ["127.0.0.1", "::1", *LAN_IP.values()])
def test_this_host_asks(bin_dir, client):
    """Nothing comes in from outside then."""
    with Clinic(bin_dir) as clinic:
        drop("forward", "iifname lan0 drop")(clinic)
        assert clinic.answers(4, "host") and clinic.answers(6, "localhost")
        assert not clinic.answers(timeout=lab.HASTY)
        assert clinic.doctor("8080", "--from", client) == ([], 0)


def test_an_address_that_is_not_of_this_host(bin_dir):
    """A cloud's public address: perhaps it leads here, and the rest is judged as if it did."""
    with Clinic(bin_dir) as clinic:
        for words in ("--to", "203.0.113.9"), ("--to", "203.0.113.9", "--from", CLIENT_IP[4]):
            found, status = clinic.doctor("8080", *words)
            assert [(each["cause"], each["severity"]) for each in found] == [("published-on-other-address", "warning")]
            assert status == 1
        drop("forward", "iifname lan0 drop")(clinic)
        assert clinic.doctor("8080", "--to", "203.0.113.9")[0][0]["cause"] == "dropped-by-firewall"


@pytest.mark.parametrize("words", [("--from", "0.0.0.0"), ("--from", "ff02::1"), ("--to", "255.255.255.255"),
                                   ("--from", "192.0.2.2", "--to", "2001:db8::1")], ids=" ".join)
def test_addresses_that_nobody_can_ask_with(bin_dir, words):
    """Refused, since nothing can be said."""
    with Clinic(bin_dir, serve=False) as clinic:
        done = clinic.command("doctor", "8080", *words)
        assert done.returncode in (1, 2) and not done.stdout
        assert "one machine" in done.stderr or "different families" in done.stderr


@pytest.mark.parametrize("others", [
    [{"hostPort": port, "containerPort": 80} for port in range(8081, 8100)],
    [{"hostPort": 8080, "containerPort": 80, "hostIP": f"203.0.113.{number}"} for number in range(1, 120)]],
    ids=["under other numbers", "on many addresses"])
def test_no_false_alarm_about_a_map_of_ports(bin_dir, others):
    """A rule that many ports share is read as theirs."""
    own = [{"hostPort": 8080, "containerPort": 80, "hostIP": ip} for ip in LAN_IP.values()]
    with Clinic(bin_dir, [*own, *others]) as clinic:
        add_addresses("lan0", *(f"203.0.113.{number}/32" for number in range(1, 120)))
        assert "dport map @c/" in lab.table() and clinic.answers()
        for words in ("8080",), ():
            found, status = clinic.doctor(*words)
            assert [each for each in found if each["severity"] != "info"] == []
            assert status == 0


def everything():
    """All that doctor might change: rules, sysctls, links, addresses, routes, neighbours, modules."""
    commands = ["nft list ruleset", "sysctl -a -r ^net", "ip -d link", "ip address", "ip route show table all",
                "ip -6 route show table all", "ip neigh"]
    found = {command: lab.run(*command.split(), check=False) for command in commands}
    names = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names", "/proc/modules")
    found |= {name: pathlib.Path(name).read_text() for name in names if pathlib.Path(name).exists()}
    counted = re.compile(r"(packets|bytes|expires|used|\w+_lft|\w+_timer) +\S+|nf_conntrack_count = \d+")
    return {name: sorted(counted.sub("", text).splitlines()) if name.startswith("sysctl") else counted.sub("", text)
            for name, text in found.items()}


@pytest.mark.parametrize("words", [(), ("8080",), ("8080/udp",), ("18473",), ("8080", "--from", CLIENT_IP[4])],
                         ids=lambda words: " ".join(words) or "host")
def test_doctor_changes_nothing(bin_dir, words):
    """Not a rule, sysctl, link, route, table of iptables-legacy or module; whatever it looks at."""
    with Clinic(bin_dir) as clinic:
        iptables("-A FORWARD -p tcp --dport 22 -j DROP")(clinic)
        assert lab.until(have_settled)
        before, generation = everything(), lab.generation()
        clinic.doctor(*words)
        assert lab.generation() == generation
        assert everything() == before


def test_text(bin_dir):
    """A sentence, what was seen, what to do; infos are folded away; no colour but on a terminal."""
    with Clinic(bin_dir) as clinic:
        drop("forward", "tcp dport 80 drop")(clinic)
        lab.run("ip", "link", "set", "lan0", "mtu", "1400")
        text = clinic.command("doctor", "8080").stdout
        assert "FOUND: table inet foreign drops packets from outside on lan0 for 8080/tcp   [dropped-by-f" in text
        assert "do:   nft insert rule inet foreign c ct status dnat accept" in text
        assert "[mtu]" not in text and "--verbose" in text and "\033" not in text
        assert "[mtu]" in clinic.command("doctor", "8080", "--verbose").stdout
        host = clinic.command("doctor").stdout
        assert "0.0.0.0:8080/tcp -> " in host and "forward" in host and "inet foreign" in host
        order = [line.split()[2:4] for line in host.splitlines() if "<- cni-portmap" in line or "inet foreign" in line]
        assert ["inet", "cni_portmap"] in order and ["inet", "foreign"] in order


def test_probe(bin_dir):
    """A half-open connection tells an answer from a refusal and from nothing; the program sees no connection."""
    with Clinic(bin_dir, serve=False) as clinic:
        assert "refused" in clinic.command("doctor", "8080", "--probe").stdout
        server = clinic.serve()
        assert clinic.command("doctor", "8080", "--probe").stdout.count("the container answered") == 4
        assert server.arrivals == []
        drop("output", "tcp dport 80 drop")(clinic)
        assert "does not let it out" in clinic.command("doctor", "8080", "--probe").stdout


def test_a_probe_that_looks_late(bin_dir, monkeypatch):
    """On a busy host the process may go on only when its time is over: what has come by then counts."""
    def late():
        time.sleep(1.2)
        return time.monotonic()
    monkeypatch.setattr(probe, "time", types.SimpleNamespace(monotonic=late))
    with Clinic(bin_dir) as clinic:
        source, container = (socket.inet_aton(address) for address in ("10.88.0.1", clinic.web.ipv4))
        assert probe.probe(source, container, 80) == probe.ANSWERED
        assert probe.probe(source, container, 81) == probe.REFUSED


def test_many_containers_are_examined_by_their_kinds(bin_dir):
    """The host in general: a finding for each thing that is wrong, not for each of the containers that it concerns."""
    with Clinic(bin_dir) as clinic:
        for number in range(3):
            clinic.container(f"more{number}", [{"hostPort": 8090 + number, "containerPort": 80, "protocol": "tcp"}])
        sysctl("net.ipv4.ip_forward", 0)
        found, status = clinic.doctor()
        assert status == 1
        assert [each["cause"] for each in found].count("forwarding-off") == 1
        assert [each["cause"] for each in found].count("nobody-listens") == 3


def test_every_check_has_a_lab():
    """Each slug of the catalogue is the cause of a lab, or says here why it is not."""
    without = {
        "conntrack-full": "the limit is the machine's", "ra-ignored": "no router in a lab", "not-accepting":
        "a moment of backlog-full", "interface-gone": "the link goes with its other end", "only-ipv6": "as only-ipv4",
        "legacy-unreadable": "needs a host without rights", "no-forward-route": "what no lab could make",
        "owner-dead": "", "podman-calls-another": "runtimes/test_podman.py has it"}
    assert {check.slug for check in CHECKS} - {case.cause for case in CASES.values()} <= {*without}
