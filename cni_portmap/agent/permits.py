"""Which connections the agent may forward: only what NAT cannot do, and only where libcni's file says so.

The kernel's table cannot tell hostIP "" from "0.0.0.0" for a container without IPv6; the file can. A container with
conditions, or with an exposure policy, is never forwarded to: that would be a way around them.
"""
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from ..cni import CniError, as_go_reads
from ..config import exposure_keys
from ..libcni_cache import Skipped, configs_of, load, parsed
from .reserve import KINDS, Claim

WILDCARDS = {4: ("", "0.0.0.0"), 6: ("", "::")}  # hostIP that publishes on each address of a family


class Permit(NamedTuple):
    """Where the connections of a claim may be forwarded to; `cross`: the container has no address of that family.

    Without it NAT serves all clients, but those of fe80::, and ::1 behind br_netfilter.
    """

    ip: str
    port: int
    cross: bool


def permits_in(files: Iterable[tuple[str, str]]) -> dict[str, list[tuple[Claim, Permit]] | None]:
    """The permits of attachments: chain and path of each, see `Witness`. Files that say nothing give none.

    None for one that is no document: libcni writes a file in its place, and the rest of it may be still to come.
    """
    found: dict[str, list[tuple[Claim, Permit]] | None] = {}
    for chain, path in files:
        document = load(path)
        if isinstance(document, Skipped):
            found[chain] = None
            continue
        try:
            found[chain] = [*_permits(document)]
        except (Skipped, CniError, LookupError, TypeError, ValueError, AttributeError):
            found[chain] = []
    return found


def _permits(document: Any) -> Iterable[tuple[Claim, Permit]]:
    attachment = parsed(document, "portmap")
    forbidding = (*exposure_keys(), "conditionsV4", "conditionsV6")  # of any entry: each of them publishes
    if any(attachment.conditions.values()) or attachment.exposure or asks_for(document, forbidding):
        return
    addresses = {family: address.ip for family, address in attachment.addresses.items()}
    for mapping in configs_of(document, "portmap")[0]["runtimeConfig"]["portMappings"]:
        its = {key.lower(): value for key, value in mapping.items()}
        host_ip, protocol = its.get("hostip") or "", (its.get("protocol") or "tcp").lower()
        if protocol not in KINDS or not its.get("hostport"):
            continue
        for family, other in (6, 4), (4, 6):
            if host_ip in WILDCARDS[family] and family not in addresses and other in addresses:
                yield (family, protocol, "", its["hostport"]), Permit(addresses[other], its["containerport"], True)
        if 6 in addresses and host_ip in ("", "::", "::1"):
            ip = "::1" if host_ip == "::1" else ""
            yield (6, protocol, ip, its["hostport"]), Permit(addresses[6], its["containerport"], False)


def asks_for(document: Any, keys: Collection[str]) -> bool:
    """Whether the plugin's part of a file has a value for one of these keys, in whatever case."""
    found = (as_go_reads(config, keys) for config in configs_of(document, "portmap"))
    return any(config.get(key) for config in found for key in keys)
