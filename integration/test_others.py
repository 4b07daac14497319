"""`cni-portmap list --all`: ports that others publish, by the rules that they write, and those that two publish.

The rules of the reference plugin and of Docker are the real ones' (runtimes/); these are as the others' sources have
them.
"""
import json

import lab
import pytest
from lab import Pod

BASE = """*nat
{chains}
-A PREROUTING -m addrtype --dst-type LOCAL -j {first}
-A OUTPUT -m addrtype --dst-type LOCAL -j {first}
{rules}
COMMIT
"""
NETAVARK = BASE.format(
    first="NETAVARK-HOSTPORT-DNAT", chains=":NETAVARK-HOSTPORT-DNAT -\n:NETAVARK-DN-1D8721 -", rules="""
-A NETAVARK-HOSTPORT-DNAT -p tcp -m tcp --dport 8080 -m comment --comment "dnat name: podman" -j NETAVARK-DN-1D8721
-A NETAVARK-DN-1D8721 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.88.0.7:80""")
CRIO = BASE.format(first="KUBE-HOSTPORTS", chains=":KUBE-HOSTPORTS -\n:KUBE-HP-YJ3XFQ -", rules="""
-A KUBE-HOSTPORTS -p udp -m comment --comment "web_default hostport 5353" -m udp --dport 5353 -j KUBE-HP-YJ3XFQ
-A KUBE-HP-YJ3XFQ -p udp -m comment --comment "web hostport 5353" -m udp -j DNAT --to-destination 10.88.0.7:53""")
KUBE_PROXY = BASE.format(first="KUBE-SERVICES", chains="\n".join(f":KUBE-{name} -" for name in (
    "SERVICES", "NODEPORTS", "EXT-A", "SVC-A", "SEP-1", "SEP-2", "MARK-MASQ")), rules="""
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "default/web cluster IP" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/web" -m tcp --dport 30080 -j KUBE-EXT-A
-A KUBE-EXT-A -j KUBE-MARK-MASQ
-A KUBE-EXT-A -j KUBE-SVC-A
-A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-1
-A KUBE-SVC-A -j KUBE-SEP-2
-A KUBE-SEP-1 -s 10.244.0.2/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination 10.244.0.2:80
-A KUBE-SEP-2 -p tcp -m tcp -j DNAT --to-destination 10.244.0.3:80""")
CRIO_NFT = """table ip crio-hostports {
    map hostports { type inet_proto . inet_service : ipv4_addr . inet_service
                    elements = { tcp . 8080 : 10.1.1.2 . 80 }; }
    map hostipports { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
                      elements = { 127.0.0.1 . tcp . 8081 : 10.1.1.2 . 81 }; }
    chain hostports { dnat ip addr . port to ip daddr . meta l4proto . th dport map @hostipports
                      dnat ip addr . port to meta l4proto . th dport map @hostports; }
    chain prerouting { type nat hook prerouting priority -100; fib daddr type local goto hostports; }
}"""
KUBE_PROXY_NFT = """table ip kube-proxy {
    map service-ips { type ipv4_addr . inet_proto . inet_service : verdict
                      elements = { 10.96.0.10 . tcp . 80 : goto service-A }; }
    map service-nodeports { type inet_proto . inet_service : verdict; elements = { tcp . 30080 : goto external-A }; }
    chain endpoint-1 { meta l4proto tcp dnat to 10.244.0.2:80; }
    chain endpoint-2 { meta l4proto tcp dnat to 10.244.0.3:80; }
    chain service-A { numgen random mod 2 vmap { 0 : goto endpoint-1, 1 : goto endpoint-2 }; }
    chain external-A { goto service-A; }
    chain services { ip daddr . meta l4proto . th dport vmap @service-ips
                     fib daddr type local meta l4proto . th dport vmap @service-nodeports; }
    chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
}"""
SOMEBODY = """table inet mine { chain pre { type nat hook prerouting priority -110
    tcp dport { 7000-7002, 7010 } dnat ip to 192.0.2.7
    iifname "lan" ip protocol tcp dnat to 192.0.2.8
    ip daddr 198.51.100.1 tcp dport 25 dnat to 192.0.2.9; }; }"""

NODE_PORTS = {("kube-proxy", "0.0.0.0", 30080, "tcp", f"10.244.0.{last}", 80) for last in (2, 3)}
CASES = {
    "netavark": (NETAVARK, {("netavark", "0.0.0.0", 8080, "tcp", "10.88.0.7", 80)}),
    "CRI-O": (CRIO, {("CRI-O", "0.0.0.0", 5353, "udp", "10.88.0.7", 53)}),
    "kube-proxy": (KUBE_PROXY, NODE_PORTS),
    "CRI-O with nftables": (CRIO_NFT, {("CRI-O", "0.0.0.0", 8080, "tcp", "10.1.1.2", 80),
                                       ("CRI-O", "127.0.0.1", 8081, "tcp", "10.1.1.2", 81)}),
    "kube-proxy with nftables": (KUBE_PROXY_NFT, NODE_PORTS),
    "somebody": (SOMEBODY, {("unknown", "0.0.0.0", port, "tcp", "192.0.2.7", port)
                            for port in (7000, 7001, 7002, 7010)}),
}


def listed(host, *options):
    return json.loads(host.command("list", "--all", "--json", *options))


def load(rules, program="iptables-nft-restore"):
    if rules.startswith("*"):
        lab.run(program, input=rules)
    else:
        lab.nft("-f", "-", input=rules)


@pytest.mark.parametrize("name, program", [
    *((name, program) for name in ("netavark", "CRI-O", "kube-proxy")
      for program in ("iptables-nft-restore", "iptables-legacy-restore")),
    *((name, "nft") for name in ("CRI-O with nftables", "kube-proxy with nftables", "somebody"))])
def test_others_are_listed_with_their_names(host, name, program):
    """By whom, at which address and port, and where it leads; not what is for all ports, or for others' addresses."""
    rules, expected = CASES[name]
    load(rules, program)
    found = listed(host)
    assert {(each["publisher"], each["host_ip"], host_port, each["protocol"], each["container_ip"], container_port)
            for each in found
            for host_port, container_port in zip(each["host_ports"], each["container_ports"], strict=True)} == expected
    assert not any(each["split"] for each in found)
    assert all(("iptables-legacy" in each["rule"]) == (program == "iptables-legacy-restore") for each in found)
    assert host.command("list").count("\n") == 1


def test_a_port_that_two_publish_is_marked(host):
    """On one address that overlaps, of one protocol and family; the exit status says whether anybody has a port."""
    host.add(Pod("web", "8080:80", "127.0.0.1:5353:53/udp", "127.0.0.2:5354:53/udp",
                 ips=("10.20.0.2/24", "fd20::2/64")))
    load(NETAVARK, "iptables-legacy-restore")
    load(CRIO)
    split = {(each["publisher"], each["host_ip"], *each["host_ports"], *each["split"]) for each in listed(host)}
    assert split == {("cni-portmap", "0.0.0.0", 8080, "netavark"), ("netavark", "0.0.0.0", 8080, "cni-portmap"),
                     ("cni-portmap", "::", 8080), ("cni-portmap", "127.0.0.1", 5353, "CRI-O"),
                     ("CRI-O", "0.0.0.0", 5353, "cni-portmap"), ("cni-portmap", "127.0.0.2", 5354)}
    text = host.command("list", "--all", "--port", 8080)
    assert "with netavark" in text and "with cni-portmap" in text and len(text.splitlines()) == 4
    host.command("list", "--all", "--port", 5354)
    host.command("list", "--all", "--port", 1, status=1)


def test_containers_that_share_a_port_are_one_line(host):
    """kube-proxy leads a node port to many: one is shown, and how many more there are."""
    load(KUBE_PROXY)
    assert "10.244.0.2:80 (+1)" in host.command("list", "--all")
