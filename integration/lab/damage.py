"""The pieces of our table that somebody may remove, each with what CHECK must then name."""
import re
from collections.abc import Callable

from .calls import Pod
from .tables import TABLE, nft, nft_script


def _delete_rule(chain: str, index: int) -> Callable[[], None]:
    def damage() -> None:
        handles = re.findall(r" # handle (\d+)", nft("-a", "list", "chain", *TABLE.split(), chain))
        nft_script(f"delete rule {TABLE} {chain} handle {handles[1:][index]}")
    return damage


def _script(*commands: str) -> Callable[[], None]:
    return lambda: nft_script(*commands)


BASE = {"guard": 4, "guard_input": 6, "prerouting": 3, "output": 1, "dispatch": 4, "postrouting": 1}  # chain: its rules
_OWN_RULES = (0, 1, 2, 3, 4, 7, 8)  # the record, four marks, v4 and v6; not two that leave localhost alone
OTHER = Pod("other", "9090:80")
BOTH = Pod("web", "8080:80", ips=("10.20.0.2/24", "fd20::2/64"))

# what is done, and what CHECK must name
DAMAGES: dict[str, tuple[Callable[[], None], str]] = {
    "ruleset flushed": (_script("flush ruleset"), "tcp port 8080 on 0.0.0.0"),
    "table deleted": (_script(f"delete table {TABLE}"), "tcp port 8080 on 0.0.0.0"),
    "table flushed": (_script(f"flush table {TABLE}"), "chain dispatch"),
    "table dormant": (_script(f"add table {TABLE} {{ flags dormant; }}"), "dormant"),
    "element deleted": (_script(f"delete element {TABLE} hostports {{ ipv6 . tcp . 8080 }}"), "tcp port 8080 on ::"),
    "map flushed": (_script(f"flush map {TABLE} hostports"), "tcp port 8080 on 0.0.0.0"),
    "element stolen": (_script(f"delete element {TABLE} hostports {{ ipv4 . tcp . 8080 }}",
                            f"create element {TABLE} hostports {{ ipv4 . tcp . 8080 : goto {OTHER.chain} }}"),
                       "tcp port 8080 on 0.0.0.0"),
    "own chain flushed": (_script(f"flush chain {TABLE} {BOTH.chain}"), f"chain {BOTH.chain}"),
    "own chain deleted": (_script(f"delete element {TABLE} hostports {{ ipv4 . tcp . 8080, ipv6 . tcp . 8080 }}",
                               f"delete chain {TABLE} {BOTH.chain}"), "tcp port 8080 on 0.0.0.0"),
    "led elsewhere": (_script(f"flush chain {TABLE} {BOTH.chain}",
                           f"add rule {TABLE} {BOTH.chain} meta nfproto ipv4 tcp dport 8080 dnat ip to 10.20.0.66:80"),
                      f"chain {BOTH.chain}"),
    **{f"own rule {index} deleted": (_delete_rule(BOTH.chain, index), f"chain {BOTH.chain}")
       for index in _OWN_RULES},
    **{f"{chain} flushed": (_script(f"flush chain {TABLE} {chain}"), f"chain {chain}") for chain in BASE},
    **{f"{chain} deleted": (_script(f"delete chain {TABLE} {chain}"), f"chain {chain}")
       for chain in BASE if chain != "dispatch"},
    **{f"rule {index} of {chain} deleted": (_delete_rule(chain, index), f"chain {chain}")
       for chain, rules in BASE.items() for index in range(rules)},
}
