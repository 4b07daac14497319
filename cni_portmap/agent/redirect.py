"""The agent's own table: leads to its sockets whom NAT cannot serve. What has been translated once, later chains leave.

::1 to ::1 only while br_netfilter translates the replies before they are routed; else NAT has it.
"""
from collections.abc import Iterable

from ..linux import read
from ..ruleset import TABLE_NAME
from .reserve import Claim

NAME = f"{TABLE_NAME}_agent"
TABLE = f"inet {NAME}"


def needs_localhost() -> bool:
    """Whether br_netfilter keeps NAT from serving ::1."""
    return read("/proc/sys/net/bridge/bridge-nf-call-ip6tables") == b"1"


def text(claims: Iterable[Claim], localhost: bool) -> str:
    """Commands that make the table anew, for IPv6 claims; `localhost`: see `needs_localhost`."""
    def elements(ports: set[tuple[str, int]]) -> str:
        listed = ", ".join(f"{protocol} . {port}" for protocol, port in sorted(ports))
        return f" elements = {{ {listed} }};" if listed else ""
    everywhere = {(protocol, port) for family, protocol, host_ip, port in claims if family == 6 and not host_ip}
    local = everywhere | {(protocol, port) for family, protocol, host_ip, port in claims
                          if family == 6 and host_ip == "::1"}
    lines = [f"add table {TABLE}", f"delete table {TABLE}", f"add table {TABLE} {{",
             f"set ports {{ typeof meta l4proto . th dport;{elements(everywhere)} }}",
             f"set localhost_ports {{ typeof meta l4proto . th dport;{elements(local)} }}",
             "chain prerouting { type nat hook prerouting priority -101; policy accept;",
             "ip6 saddr fe80::/10 fib daddr type local meta l4proto . th dport @ports redirect; }",
             "chain output { type nat hook output priority -101; policy accept;",
             "ip6 saddr ::1 ip6 daddr ::1 meta l4proto . th dport @localhost_ports redirect;" if localhost else "", "}",
             "}"]
    return "\n".join(filter(None, lines)) + "\n"
