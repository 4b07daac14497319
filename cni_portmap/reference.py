"""The reference plugin portmap, as far as this one must know it: where it writes, and whose its rules are. Pure.

A node may change from that plugin to this one while containers run, and back. Its backend `iptables` writes to table
`nat` a chain for each container, and `nftables` to tables of its own a rule for each port, with a comment.

Source: containernetworking/plugins, plugins/meta/portmap/portmap_iptables.go and portmap_nftables.go, and
pkg/utils/utils.go (FormatChainNameWithPrefix). The same in 1.1.1, 1.6.2 and 1.9.1.
"""
try:
    from _sha512 import sha512  # type: ignore[import-not-found]  # hashlib takes 3 ms
except ImportError:  # since Python 3.12
    from _sha2 import sha512  # type: ignore[import-not-found]

from .cni import is_name

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    # Protocol (a number), host address (packed, b"" for all), host port, container address (packed).
    Forward = tuple[int, bytes, int, bytes]

NAT = "nat"  # iptables' table
ENTRIES = ("CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-SETMARK", "CNI-HOSTPORT-SNAT")  # its chains that have rules of containers
HOSTPORT = "cni_hostport"  # the table of its backend nftables
RULES = ("hostports", "hostip_hostports", "masquerading")  # its chains that have rules of containers
IPTABLES, LEGACY, NFTABLES = "iptables", "iptables-legacy", "nftables"
_HASH = 21  # hex digits: a chain's name has 28 characters at most


class Leftover:
    """What the reference plugin has written for one container, in one family, by one backend.

    `network`: "" with nftables, where it is not recorded. `forwards`: what is forwarded. `rules`: (chain, handle,
    address that it is about, packed, b"" for none); with iptables-legacy the rule's text is the handle. `chains`: the
    container's own.
    """

    __slots__ = ("backend", "family", "container_id", "network", "forwards", "rules", "chains")

    def __init__(self, backend: str, family: int, container_id: str, network: str = "") -> None:
        self.backend, self.family, self.container_id, self.network = backend, family, container_id, network
        self.forwards: list[Forward] = []
        self.rules: list[tuple[str, int | str, bytes]] = []
        self.chains: list[str] = []

    def __str__(self) -> str:
        return f"container {self.container_id}, network {self.network or 'unknown'}"

    def without(self, addresses: "frozenset[bytes]") -> "Leftover":
        """The same but what is about one of `addresses`; chains of its own are about one container's network."""
        if self.backend != NFTABLES or not addresses:
            return self
        rest = Leftover(self.backend, self.family, self.container_id, self.network)
        rest.forwards = [forward for forward in self.forwards if forward[3] not in addresses]
        rest.rules = [rule for rule in self.rules if rule[2] not in addresses]
        return rest


def chains_of(network: str, container_id: str) -> tuple[str, str]:
    """The chains of a container in table `nat`: that of today, and one for SNAT that versions before 0.8 had too."""
    digits: str = sha512(f"{network}{container_id}".encode()).hexdigest()[:_HASH]
    return f"CNI-DN-{digits}", f"CNI-SN-{digits}"


def owner_in(comment: str) -> tuple[str, str]:
    """Network and container ID in the comment of a rule in ENTRIES, ("", "") for another comment."""
    words = comment.split('"')
    if len(words) == 5 and words[0].endswith("nat name: ") and words[2] == " id: " and \
            is_name(words[1]) and is_name(words[3]):
        return words[1], words[3]
    return "", ""
