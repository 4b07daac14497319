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
    """Commands that give the table other rules, for IPv6 claims; `localhost`: see `needs_localhost`.

    It is flushed: for a deletion libnftables 1.0 lists every set of the host, see `linux.batch`.
    """
    def rule(match: str, ports: set[tuple[str, int]]) -> str:
        listed = ", ".join(f"{protocol} . {port}" for protocol, port in sorted(ports))
        return f"{match} meta l4proto . th dport {{ {listed} }} redirect;" if listed else ""
    everywhere = {(protocol, port) for family, protocol, host_ip, port in claims if family == 6 and not host_ip}
    local = everywhere | {(protocol, port) for family, protocol, host_ip, port in claims
                          if family == 6 and host_ip == "::1"}
    lines = [f"add table {TABLE}", f"flush table {TABLE}",
             f"add chain {TABLE} prerouting {{", "type nat hook prerouting priority -101; policy accept;",
             rule("ip6 saddr fe80::/10 fib daddr type local", everywhere), "}",
             f"add chain {TABLE} output {{", "type nat hook output priority -101; policy accept;",
             rule("ip6 saddr ::1 ip6 daddr ::1", local) if localhost else "", "}"]
    return "\n".join(filter(None, lines)) + "\n"
