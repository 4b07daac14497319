"""The hooks of this host as text: every base chain of everybody, in the order that packets meet them."""
from ... import ruleset
from ...firewall.claims import publisher
from ...firewall.walk import NAT_PRIORITY
from ...linux.rulesets import LEGACY, Chain, Rulesets

HOOKS = ("ingress", "prerouting", "input", "forward", "output", "postrouting", "egress")
WAYS = {"prerouting": "packets that come in", "input": "to this host", "forward": "to containers, and from them",
        "output": "packets of this host", "postrouting": "packets that go out", "ingress": "before all else, by device",
        "egress": "after all else, by device"}


def drawing(rulesets: Rulesets) -> str:
    """A picture of all hooks."""
    lines = ["    in -> prerouting -+-> forward -+-> postrouting -> out",
             "                      |            |",
             "                    input        output    (this host)", ""]
    for hook in HOOKS:
        chains = [chain for chain in rulesets.chains if chain.hook == hook and chain.family != "arp"]
        if not chains:
            continue
        lines.append(f"{hook}  ({WAYS[hook]})")
        rows = [_row(chain) for chain in sorted(chains, key=_place)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                  for row in rows]
    if len(lines) == 4:
        lines.append("no chain is hooked anywhere")
    return "\n".join(lines)


def _place(chain: Chain) -> tuple[int, int]:
    return (NAT_PRIORITY.get(chain.hook, chain.priority) if chain.kind == "nat" else chain.priority), chain.priority


def _row(chain: Chain) -> tuple[str, ...]:
    ours = (chain.family, chain.table) == ("inet", ruleset.TABLE_NAME)
    policy = "policy drop" if chain.policy == "drop" else ""
    whose = "<- cni-portmap" if ours else publisher(chain).replace(LEGACY, "")
    device = f"dev {','.join(chain.devices)}" if chain.devices else ""
    return (f"{chain.priority:>6}", chain.kind,
            f"{'legacy ' if chain.backend == LEGACY else ''}{chain.family} {chain.table}", chain.name,
            f"{len(chain.rules)} rules", " ".join(filter(None, (policy, device, whose))))
