"""A ruleset of the shape that kube-proxy's nftables mode writes, made from its documentation; kube-proxy is not run.

Source: pkg/proxy/nftables/README.md in Kubernetes, and the names that it lists. One table a family: vmaps by address,
protocol and port; filter chains just before dstnat that check source ranges; nat chains at dstnat and srcnat; its own
mark for what it masquerades.
"""
from typing import NamedTuple


_SHAPE = """
table {ip} kube-proxy {{
    set cluster-ips {{ type {addr}; elements = {{ {cluster_ips} }} }}
    set nodeport-ips {{ type {addr}; elements = {{ {node_ips} }} }}
    map no-endpoint-services {{ type {addr} . inet_proto . inet_service : verdict; }}
    map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
    map firewall-ips {{ type {addr} . inet_proto . inet_service : verdict; }}
    map service-ips {{ type {addr} . inet_proto . inet_service : verdict; }}
    map service-nodeports {{ type inet_proto . inet_service : verdict; }}

    chain filter-prerouting-pre-dnat {{
        type filter hook prerouting priority -110; policy accept;
        ct state new jump firewall-check
    }}
    chain filter-output-pre-dnat {{
        type filter hook output priority -110; policy accept;
        ct state new jump firewall-check
    }}
    chain filter-input {{
        type filter hook input priority 0; policy accept;
        ct state new jump nodeport-endpoints-check
        ct state new jump service-endpoints-check
    }}
    chain filter-forward {{
        type filter hook forward priority 0; policy accept;
        ct state new jump service-endpoints-check
        ct state new jump cluster-ips-check
    }}
    chain filter-output {{
        type filter hook output priority 0; policy accept;
        ct state new jump service-endpoints-check
        ct state new jump cluster-ips-check
    }}
    chain nat-prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        jump services
    }}
    chain nat-output {{
        type nat hook output priority -100; policy accept;
        jump services
    }}
    chain nat-postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        jump masquerading
    }}
    chain masquerading {{
        meta mark & 0x4000 == 0 return
        meta mark set meta mark ^ 0x4000
        masquerade fully-random
    }}
    chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
    chain reject-chain {{ reject; }}
    chain services {{
        {ip} daddr . meta l4proto . th dport vmap @service-ips
        {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
    }}
    chain firewall-check {{ {ip} daddr . meta l4proto . th dport vmap @firewall-ips; }}
    chain service-endpoints-check {{ {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
    chain nodeport-endpoints-check {{
        {ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
    }}
    chain cluster-ips-check {{ {ip} daddr @cluster-ips reject; }}
}}
"""


class Service(NamedTuple):
    """A Service with one port and at most one endpoint; `local`: externalTrafficPolicy Local."""

    name: str
    cluster_ip: str
    port: int
    endpoint: tuple[str, int] | None
    node_port: int = 0
    balancer_ip: str = ""
    source_ranges: tuple[str, ...] = ()
    local: bool = False
    protocol: str = "tcp"


def ruleset(services: list[Service], node_ips: list[str], pods: str) -> str:
    """The nft commands for services of one family; `node_ips`: where node ports answer; `pods`: the cluster's CIDR."""
    v6 = ":" in pods
    ip, addr = ("ip6", "ipv6_addr") if v6 else ("ip", "ipv4_addr")
    lines = [f"table {ip} kube-proxy", f"delete table {ip} kube-proxy",
             _SHAPE.format(ip=ip, addr=addr, node_ips=", ".join(node_ips),
                           cluster_ips=", ".join(each.cluster_ip for each in services))]
    for each in services:
        lines += _service(each, ip, pods)
    return "\n".join(lines) + "\n"


def _service(service: Service, ip: str, pods: str) -> list[str]:
    table, proto = f"{ip} kube-proxy", service.protocol
    where = f"{proto} . {service.port}"
    frontends = [service.cluster_ip, *[service.balancer_ip] * bool(service.balancer_ip)]
    if not service.endpoint:
        nowhere = [f"add element {table} no-endpoint-services {{ {front} . {where} : goto reject-chain }}"
                   for front in frontends]
        return nowhere + [f"add element {table} no-endpoint-nodeports {{ {proto} . {service.node_port} : "
                          "goto reject-chain }"] * bool(service.node_port)
    inner, outer, endpoint, firewall = (f"{kind}-{service.name}" for kind in (
        "service", "external", "endpoint", "firewall"))
    target, port = service.endpoint
    to = f"[{target}]:{port}" if ip == "ip6" else f"{target}:{port}"
    external = [f"{ip} saddr {pods} goto {inner}", "fib saddr type local jump mark-for-masquerade",
                f"fib saddr type local goto {inner}", f"goto {endpoint}"] if service.local else \
        ["jump mark-for-masquerade", f"goto {inner}"]
    chains = {
        endpoint: [f"{ip} saddr {target} jump mark-for-masquerade", f"meta l4proto {proto} dnat to {to}"],
        inner: [f"{ip} daddr {service.cluster_ip} {proto} dport {service.port} {ip} saddr != {pods} "
                "jump mark-for-masquerade", f"numgen random mod 1 vmap {{ 0 : goto {endpoint} }}"],
        outer: external,
        firewall: [f"{ip} saddr {{ {', '.join(service.source_ranges)} }} return", "drop"]
        if service.source_ranges else [],
    }
    lines = [f"add chain {table} {name}" for name in chains]
    lines += [f"add rule {table} {name} {rule}" for name, rules in chains.items() for rule in rules]
    lines.append(f"add element {table} service-ips {{ {service.cluster_ip} . {where} : goto {inner} }}")
    if service.balancer_ip:
        lines.append(f"add element {table} service-ips {{ {service.balancer_ip} . {where} : goto {outer} }}")
        if service.source_ranges:
            lines.append(f"add element {table} firewall-ips {{ {service.balancer_ip} . {where} : goto {firewall} }}")
    if service.node_port:
        lines.append(f"add element {table} service-nodeports {{ {proto} . {service.node_port} : goto {outer} }}")
    return lines
