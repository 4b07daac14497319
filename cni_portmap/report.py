"""What is published, read back from nft's JSON: for people and their scripts, not for the plugin."""
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from .kernel import Kernel
from .ruleset import Owner


class Published(NamedTuple):
    """One rule of a container: host ports that lead to container ports, as many and in the same order.

    `connections`: how many were made through it so far; None where the rule is missing. `owner`: "alive", "dead",
    or "unknown" where its network namespace cannot be judged.
    """

    family: int
    protocol: str
    host_ip: str
    host_ports: tuple[int, ...]
    container_ip: str
    container_ports: tuple[int, ...]
    network: str
    container_id: str
    ifname: str
    connections: int | None
    owner: str
    netns: str


class _Rule:
    """A dnat rule: which ports of which address it takes, and where they go."""

    def __init__(self, expressions: list[dict[str, Any]]) -> None:
        self.packets, self.addresses, self.protocol, self.ports = 0, [], "", {}
        self.ip, target, hosts = "", None, []
        for expression in expressions:
            match, dnat = expression.get("match"), expression.get("dnat")
            if match and "payload" in match["left"]:
                payload, right = match["left"]["payload"], match["right"]
                if payload.get("field") == "daddr":
                    self.addresses.append(right)
                elif payload.get("field") == "dport":
                    self.protocol, hosts = payload["protocol"], [*_ports(right)]
            elif expression.get("counter"):
                self.packets = expression["counter"]["packets"]
            elif dnat:
                self.ip, target = dnat["addr"], dnat.get("port")
        if isinstance(target, dict):
            self.ports = {int(host): int(container) for host, container in target["map"]["data"]["set"]}
        else:
            self.ports = {host: host if target is None else int(target) for host in hosts}
        self.family = 6 if ":" in self.ip else 4

    def takes(self, family: int, protocol: str, host_ip: str, port: int) -> bool:
        return (self.family, self.protocol) == (family, protocol) and port in self.ports and \
            (host_ip in self.addresses if host_ip else True)


def _ports(right: Any) -> Iterator[int]:
    if isinstance(right, int):
        yield right
    elif isinstance(right, dict) and "range" in right:
        yield from range(right["range"][0], right["range"][1] + 1)
    elif isinstance(right, dict) and "set" in right:
        for item in right["set"]:
            yield from _ports(item)


def published(kernel: Kernel) -> list[Published]:
    """All published ports, by host port. They are what the verdict maps hold: a rule that no element leads to
    does nothing."""
    records: dict[str, list[str]] = {}
    rules: dict[str, list[_Rule]] = {}
    elements = []
    for item in json.loads(kernel.listing() or '{"nftables": []}')["nftables"]:
        rule, verdicts = item.get("rule"), item.get("map")
        if rule and rule["chain"].startswith("c/"):
            if "comment" in rule and rule["chain"] not in rules:
                records.setdefault(rule["chain"], []).append(rule["comment"])
            elif any("dnat" in expression for expression in rule["expr"]):
                rules.setdefault(rule["chain"], []).append(_Rule(rule["expr"]))
        elif verdicts:
            for key, verdict in verdicts.get("elem", ()):
                elements.append((key["concat"], verdict.get("goto", {}).get("target", "")))
    owners = {chain: Owner(chain, "".join(records.get(chain, []))) for _, chain in elements}
    states = {chain: _state(owner, kernel) for chain, owner in owners.items()}
    found: dict[tuple[Any, ...], dict[int, int]] = {}
    for (first, protocol, port), chain in elements:
        wildcard = first in ("ipv4", "ipv6")
        family = (4 if first == "ipv4" else 6) if wildcard else 6 if ":" in first else 4
        host_ip = ("0.0.0.0" if family == 4 else "::") if wildcard else first
        rule = next((each for each in rules.get(chain, ())
                     if each.takes(family, protocol, "" if wildcard else first, port)), None)
        key = (family, protocol, host_ip, chain, id(rule), rule.ip if rule else "", rule.packets if rule else None)
        found.setdefault(key, {})[port] = rule.ports[port] if rule else 0
    lines = []
    for (family, protocol, host_ip, chain, _, ip, packets), ports in found.items():
        owner, hosts = owners[chain], tuple(sorted(ports))
        lines.append(Published(family, protocol, host_ip, hosts, ip, tuple(ports[host] for host in hosts),
                               owner.network, owner.container_id, owner.ifname, packets, states[chain], owner.netns))
    return sorted(lines, key=lambda line: (line.host_ports[0], line.protocol, line.family, line.host_ip))


def _state(owner: Owner, kernel: Kernel) -> str:
    if not owner.inode:
        return "unknown"
    return "dead" if kernel.is_dead(owner) else "alive"


def ranges(ports: tuple[int, ...]) -> str:
    """Ports as people write them: (80, 9000, 9001, 9002) is "80,9000-9002"."""
    parts: list[list[int]] = []
    for port in ports:
        if parts and port == parts[-1][-1] + 1:
            parts[-1][1:] = [port]
        else:
            parts.append([port])
    return ",".join("-".join(map(str, part)) for part in parts)
