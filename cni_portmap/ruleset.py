"""The ruleset, as nft text: Attachment -> commands. Pure, and the only module that knows the names in our table.

One table holds everything, and no state is kept anywhere else:

- Verdict maps lead from (address, protocol, port) to the chain of the attachment that owns the port, so that a
  new connection costs the same with one port published as with ten thousand.
- An attachment's chain is named after its owner. What the chain owns is what the maps say leads to it: the kernel
  ignores the value when it deletes a map element, so DEL asks it first which elements are the chain's.
- Elements are created, never added: the kernel itself refuses a second owner of a key.
- Conditions and masquerading are in the attachment's own chain, so that no container's setting is another's.
- What is shared is SHARED. Its rules carry comments, by which `verbs` and the reader recognise them.

It does not flush anything that a container owns, touch another table, or read rules back: see `linux.table`.
Source: nft(8).
"""
from _socket import inet_ntop, inet_pton

from .attachment import AF, DEFAULT_MARK_BIT, Attachment, Port
from .cni import is_ifname, is_name

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    Element = tuple[str, bytes]  # of a map: the map's name, and the key as the kernel has it
    Rule = tuple[str, str]  # its text, and what its comment says

TABLE_NAME = "cni_portmap"
TABLE = f"inet {TABLE_NAME}"
COMMENT_PREFIX = "cni-portmap "  # begins the comment of each rule of SHARED, with
BASE_VERSION = 3  # which goes up whenever SHARED changes
COMMENT_MAX = 128  # bytes, NFTNL_UDATA_COMMENT_MAXLEN
NAME_MAX = 255  # bytes, NFT_NAME_MAXLEN less the final NUL

HOSTPORTS = "hostports"  # the map of ports that are published on every address
HOSTIP_HOSTPORTS = {4: "hostip4_hostports", 6: "hostip6_hostports"}  # by family: those of one address
# By name: what they look up. Sets and maps are declared with `typeof`, never with `type`, and no rule has a map of its
# own: written by nft 1.1.2 or newer, either makes an older nft on the same host crash (kubernetes#136786).
MAPS = {
    HOSTPORTS: "meta nfproto . meta l4proto . th dport",
    HOSTIP_HOSTPORTS[4]: "ip daddr . meta l4proto . th dport",
    HOSTIP_HOSTPORTS[6]: "ip6 daddr . meta l4proto . th dport",
}
KEY_SIZES = {HOSTPORTS: 12, HOSTIP_HOSTPORTS[4]: 12, HOSTIP_HOSTPORTS[6]: 24}  # bytes
PROTOCOL_AND_PORT = slice(-8, None)  # of a key

# The interfaces that this host's localhost leads through; the comment says whether this plugin has opened them, so that
# it can close them again.
LOCALHOST_INTERFACES = "localhost_interfaces"
OPENED, WAS_OPEN, FOUND_OPEN = "route_localnet was 0", "route_localnet was 1", "found open"

PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
PROTOCOLS = {number: name for name, number in PROTOCOL_NUMBERS.items()}
_NFPROTO = {4: 2, 6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6
_IP = {4: "ip", 6: "ip6"}


class Shared:
    """A chain that all attachments share: its `hook` ("" for none), its `rules`, and those that `varies` adds.

    `varies(attachments, comments)`: the rules that these attachments need, and those that others have needed before,
    by the comments of the chain as it is.
    """

    __slots__ = ("hook", "rules", "varies")

    def __init__(self, hook: str, *rules: "Rule",
                 varies: "Callable[[Iterable[Attachment], Iterable[str]], list[Rule]] | None" = None) -> None:
        self.hook, self.rules, self.varies = hook, rules, varies


def _masquerade(bit: int) -> "Rule":
    # `ct status dnat` keeps a mark that something else has set from having any effect here.
    mark = f"{1 << bit:#x}"
    return f"meta mark & {mark} == {mark} ct status dnat masquerade fully-random", f"markMasqBit {bit}"


def _masquerades(attachments: "Iterable[Attachment]", comments: "Iterable[str]") -> "list[Rule]":
    """The rule of each mark bit in use, see `_marks`, and always that of the default."""
    bits = {DEFAULT_MARK_BIT, *(each.mark_bit for each in attachments if each.mark_bit is not None)}
    prefix = _masquerade(0)[1][:-1]
    noted = (comment.rpartition(prefix)[2] for comment in comments if prefix in comment)
    bits.update(int(bit) for bit in noted if bit in _BITS)
    return [_masquerade(bit) for bit in sorted(bits)]


_BITS = frozenset(map(str, range(32)))

# By name. `dispatch` first: others lead to it.
SHARED = {
    "dispatch": Shared(
        "",
        ("ip daddr . meta l4proto . th dport vmap @hostip4_hostports", "published on one IPv4 address"),
        ("ip6 daddr . meta l4proto . th dport vmap @hostip6_hostports", "published on one IPv6 address"),
        ("ip daddr 127.0.0.53-127.0.0.54 return", "the host's own resolver (systemd-resolved)"),
        ("meta nfproto . meta l4proto . th dport vmap @hostports", "published on every address")),
    "guard": Shared(
        "type filter hook prerouting priority raw; policy accept;",
        ("ip daddr 127.0.0.0/8 iifname @localhost_interfaces counter drop",
         "drop external packets to 127.0.0.0/8 (CVE-2020-8558)"),
        ("ip saddr 127.0.0.0/8 iifname @localhost_interfaces counter drop", "drop external packets from 127.0.0.0/8"),
        # The kernel's own check of ::1 comes after prerouting where br_netfilter runs that hook on the bridge.
        ("ip6 daddr ::1 iiftype != loopback counter drop", "drop external packets to ::1"),
        ("ip6 saddr ::1 iiftype != loopback counter drop", "drop external packets from ::1")),
    "guard_input": Shared(
        "type filter hook input priority raw; policy accept;",
        ("ip daddr 127.0.0.0/8 ct direction reply return", "replies to this host's localhost"),
        ("ip daddr 127.0.0.0/8 iifname @localhost_interfaces counter drop",
         "drop what source routes lead to 127.0.0.0/8"),
        ("ip6 daddr ::1 ct direction reply return", "replies to this host's localhost"),
        ("ip6 daddr ::1 iiftype != loopback counter drop", "drop what source routes lead to ::1")),
    "prerouting": Shared(
        "type nat hook prerouting priority dstnat; policy accept;",
        ("ip daddr 127.0.0.0/8 return", "external packets to 127.0.0.0/8 are never forwarded"),
        ("ip6 daddr ::1 return", "external packets to ::1 are never forwarded"),
        ("fib daddr type local goto dispatch", "from the network and from containers")),
    "output": Shared("type nat hook output priority -100; policy accept;",
                     ("fib daddr type local goto dispatch", "from this host")),
    "postrouting": Shared("type nat hook postrouting priority srcnat; policy accept;", varies=_masquerades),
}


# --- names ----------------------------------------------------------------------------------------------------

_HASHED = frozenset("@+~=,")  # in the name of an interface: nft cannot hold it
_HEX = frozenset("0123456789abcdef")


def chain_of(container_id: str, ifname: str) -> str:
    """The chain of an attachment. What nft cannot hold as a name is hashed; its record then names it in full."""
    name = f"c/{container_id}/{ifname}"
    if len(name) <= NAME_MAX and _HASHED.isdisjoint(ifname):
        return name
    from hashlib import sha256  # 4 ms, for names that hardly anybody has
    return f"c/{container_id[:64]}/hash/{sha256(name.encode()).hexdigest()[:32]}"


def is_attachment_chain(name: str) -> bool:
    """Whether a chain of our table is an attachment's: its name is one that `chain_of` gives."""
    kind, _, rest = name.partition("/")
    container_id, _, end = rest.partition("/")
    if kind != "c" or len(name) > NAME_MAX or not is_name(container_id):
        return False
    hashed, _, digest = end.partition("/")
    if digest:
        return hashed == "hash" and len(digest) == 32 and _HEX.issuperset(digest)
    return is_ifname(end) and _HASHED.isdisjoint(end)


def is_own_chain(name: str) -> bool:
    """Whether a chain's name is of our own grammar. Others write to our table, and no other name gets into nft text."""
    return name in SHARED or is_attachment_chain(name)


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-/:@+,~")


def _escape(value: str) -> str:
    if _SAFE.issuperset(value):
        return value
    return "".join(c if c in _SAFE else "".join(f"%{byte:02x}" for byte in c.encode(errors="replace")) for c in value)


def _unescape(value: str) -> str:
    first, *rest = value.encode().split(b"%")
    try:
        return (first + b"".join(bytes((int(part[:2], 16),)) + part[2:] for part in rest)).decode(errors="replace")
    except ValueError:
        return value  # not written by us


class Owner:
    """The owner of an attachment's chain, from the chain's record; `inode` 0 if it was not known.

    `link`: the host's end of its link as name#index, `pod`: what people call it; "" where that is not known. What this
    plugin could not have written is not known either: others may write into its chains.
    """

    __slots__ = ("chain", "container_id", "ifname", "network", "netns", "inode", "link", "pod")

    def __init__(self, chain: str, record: str) -> None:
        fields = dict(field.partition("=")[::2] for field in record.split(" "))
        container_id, _, ifname = chain.partition("/")[2].partition("/")
        full = fields.get("id", ""), _unescape(fields.get("if", ""))
        if is_name(full[0]) and is_ifname(full[1]) and chain_of(*full) == chain:
            container_id, ifname = full
        netns, _, inode = fields.get("netns", "").partition("#")
        network, pod = fields.get("net", ""), _unescape(fields.get("pod", ""))
        self.chain, self.container_id, self.ifname = chain, container_id, ifname
        self.network = network if is_name(network) else ""
        self.netns = _unescape(netns)
        self.inode = int(inode) if _is_number(inode, 64) else 0
        name, _, index = fields.get("link", "").partition("#")
        self.link = f"{name}#{index}" if is_ifname(name) and _is_number(index, 31) else ""
        self.pod = pod if pod.count("/") < 2 and all(map(is_name, pod.split("/"))) else ""

    @classmethod
    def of_namespace(cls, chain: str, netns: str) -> "Owner":
        """Somebody of whom nothing is known but the path of its network namespace."""
        owner = cls(chain, "")
        owner.netns = netns
        return owner

    def __str__(self) -> str:
        pod = f"pod {self.pod}, " if "/" in self.pod else ""
        name = f" ({self.pod})" if self.pod and not pod else ""
        return f"{pod}container {self.container_id}{name}, interface {self.ifname}, network {self.network or 'unknown'}"


def _is_number(text: str, bits: int) -> bool:
    """Whether a record's number is one that this plugin could have written: not of more than so many bits."""
    return text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 1 << bits


def record_of(attachment: Attachment) -> list[str]:
    """The owner's record as comments; more than one where it is too long for the kernel."""
    chain = chain_of(attachment.container_id, attachment.ifname)
    fields = [f"net={attachment.network}", f"netns={_escape(attachment.netns)}#{attachment.inode or ''}"]
    if attachment.link:
        fields.append(f"link={attachment.link}")
    if attachment.pod:
        fields.append(f"pod={attachment.pod}")
    if chain != f"c/{attachment.container_id}/{attachment.ifname}":
        fields += [f"id={attachment.container_id}", f"if={_escape(attachment.ifname)}"]
    record = " ".join(fields)
    return [record[at:at + COMMENT_MAX] for at in range(0, len(record), COMMENT_MAX)]


# --- map elements ---------------------------------------------------------------------------------------------

def map_of(port: Port) -> str:
    """The verdict map that holds `port`."""
    return HOSTIP_HOSTPORTS[port.family] if port.host_ip else HOSTPORTS


def key_of(port: Port) -> bytes:
    """The key of `port` in its map, as the kernel has it: each field padded to 32 bits, in network order."""
    first = inet_pton(AF[port.family], port.host_ip) if port.host_ip else bytes((_NFPROTO[port.family], 0, 0, 0))
    return first + bytes((PROTOCOL_NUMBERS[port.protocol], 0, 0, 0)) + port.host_port.to_bytes(2, "big") + b"\0\0"


def elements_of(attachment: Attachment) -> "dict[Element, Port]":
    """The elements that publish the ports of `attachment`, each with its port."""
    return {(map_of(port), key_of(port)): port for port in attachment.ports}


def element_text(map_name: str, key: bytes) -> str:
    """nft's text for a key, such as "ipv4 . tcp . 8080"."""
    first = key[:-8]
    if map_name == HOSTPORTS:
        address = {2: "ipv4", 10: "ipv6"}.get(first[0], str(first[0]))
    else:
        address = inet_ntop(AF[4 if len(first) == 4 else 6], first)
    return f"{address} . {PROTOCOLS.get(key[-8], key[-8])} . {int.from_bytes(key[-4:-2], 'big')}"


def wildcard_of(port: Port) -> "Element":
    """The element that would publish a specific address' port on every address."""
    return _wildcard(port.family, key_of(port))


def wildcard_of_element(element: "Element") -> "Element":
    """The same for the element of a specific address."""
    return _wildcard(_FAMILIES[element[0]], element[1])


def _wildcard(family: int, key: bytes) -> "Element":
    return HOSTPORTS, bytes((_NFPROTO[family], 0, 0, 0)) + key[PROTOCOL_AND_PORT]


_FAMILIES = {name: family for family, name in HOSTIP_HOSTPORTS.items()}


def claim_of(element: "Element") -> tuple[int, int, bytes, int]:
    """The claim of an element: family, protocol number, host address (packed, b"" for all), host port."""
    name, key = element
    family, host = (4 if key[0] == _NFPROTO[4] else 6, b"") if name == HOSTPORTS else (_FAMILIES[name], key[:-8])
    return family, key[-8], host, int.from_bytes(key[-4:-2], "big")


def elements_for(target: bytes, host: bytes, protocol: int, ports: "Iterable[int]") -> "Iterator[Element]":
    """The elements that may lead to a dnat rule: to an address `target`, for `host` (both packed; b"" for every).

    With a `host` two for each port: it may be a condition that asks for an address, in a rule of every address.
    """
    family = 4 if len(target) == 4 else 6
    for port in ports:
        ending = bytes((protocol, 0, 0, 0)) + port.to_bytes(2, "big") + b"\0\0"
        if host:
            yield HOSTIP_HOSTPORTS[family], host + ending
        yield _wildcard(family, ending)


# A container may publish one port on several networks (podman does). Its element leads to one of its chains, where a
# rule without effect names the interfaces of those that stand by: when that chain goes, the next takes its place.

_STANDBY = "also on "


def standby_note(chain: str, ifname: str) -> str:
    """The command that notes in `chain` that the same container publishes some of its ports on `ifname` too."""
    return "\n".join(_chain(chain, [f'continue comment "{standby_comment(ifname)}"'])) + "\n"


def standby_comment(ifname: str) -> str:
    """The comment of that note."""
    return f"{_STANDBY}{ifname}"


def standby_interfaces(comments: "Iterable[str]") -> list[str]:
    """The interfaces that the rules of a chain, by their comments, note with `standby_note`."""
    names = (comment[len(_STANDBY):] for comment in comments if comment.startswith(_STANDBY))
    return [name for name in names if is_ifname(name)]


# --- commands -------------------------------------------------------------------------------------------------

def shared_rules(name: str, attachments: "Iterable[Attachment]", comments: "Iterable[str]" = ()) -> "list[Rule]":
    """The rules of a chain of SHARED, as these attachments need it; `comments`: of the rules that it has."""
    shared = SHARED[name]
    rules = (*shared.rules, *(shared.varies(attachments, comments) if shared.varies else ()))
    return [(rule, f"{COMMENT_PREFIX}{BASE_VERSION}: {comment}") for rule, comment in rules]


# Rules are written with their chain, and elements with their map, as nft lists them: for "add rule" and
# "create element" libnftables 1.0 would first list all chains of the host (2 us each). "create chain" must be alone:
# 1.0.6 forgets its rules.

def _chain(chain: str, lines: "Iterable[str]") -> list[str]:
    return [f"add chain {TABLE} {chain} {{", *lines, "}"]


def _map(name: str, elements: str = "") -> str:
    return f"add map {TABLE} {name} {{ typeof {MAPS[name]} : verdict; {elements}}}"


def _set(elements: str = "") -> str:
    return f"add set {TABLE} {LOCALHOST_INTERFACES} {{ typeof iifname; {elements}}}"


def note_interfaces(interfaces: "Mapping[str, str]") -> str:
    """The command that notes interfaces (names) that localhost leads through, each with its comment."""
    notes = ", ".join(f'"{name}" comment "{comment}"' for name, comment in interfaces.items())
    return _set(f"elements = {{ {notes} }}; ") + "\n" if notes else ""


def key_of_interface(name: str) -> bytes:
    """The key of an interface in that set, as the kernel has it."""
    return name.encode().ljust(16, b"\0")


def base(chains: "Mapping[str, Iterable[Rule]]", replaced: "Container[str]" = ()) -> str:
    """Commands that make the table and some of its SHARED chains, each with its rules; `replaced`: those that exist.

    A hooked chain is replaced, because another version may have hooked it elsewhere; what leads to `dispatch`
    forbids that there.
    """
    lines = [f"add table {TABLE}", *(_map(name) for name in MAPS), _set()]
    for name in (name for name in SHARED if name in chains):
        hook = SHARED[name].hook
        if name in replaced:
            lines.append(f"{'delete' if hook else 'flush'} chain {TABLE} {name}")
        rules = (f'{rule} comment "{comment}"' for rule, comment in chains[name])
        lines += _chain(name, [hook, *rules] if hook else rules)
    return "\n".join(lines) + "\n"


def attach(attachment: Attachment, elsewhere: "Container[Element]" = (), rules: str = "") -> str:
    """Commands that publish the ports of `attachment`: its chain, and the elements that lead there.

    `elsewhere`: the elements that lead to the container through another of its interfaces, and stay.
    `rules`: what `rules_text` has said before.
    """
    own = [element for element in elements_of(attachment) if element not in elsewhere]
    return (rules or rules_text(attachment)) + map_elements(own, chain_of(attachment.container_id, attachment.ifname))


def rules_text(attachment: Attachment) -> str:
    """Commands that create the chain of `attachment`, with its rules: to be built before the lock is taken."""
    chain = chain_of(attachment.container_id, attachment.ifname)
    return "\n".join((f"create chain {TABLE} {chain}", *_chain(chain, rules_of(attachment)))) + "\n"


def map_elements(elements: "Sequence[Element]", chain: str) -> str:
    """Commands that make elements lead to a chain; the kernel refuses those that lead to another."""
    text = ""
    for name in MAPS:
        keys = ", ".join(f"{element_text(name, key)} : goto {chain}" for its_map, key in elements if its_map == name)
        if keys:
            text += _map(name, f"elements = {{ {keys} }}; ") + "\n"
    return text


def detach(chains: "Iterable[str]", elements: "Iterable[Element]") -> str:
    """Commands that remove the chains of attachments, and the `elements` that lead there."""
    by_map: dict[str, list[str]] = {}
    for name, key in elements:
        by_map.setdefault(name, []).append(element_text(name, key))
    lines = [f"delete element {TABLE} {name} {{ {', '.join(keys)} }}" for name, keys in by_map.items()]
    lines += (f"delete chain {TABLE} {chain}" for chain in chains)
    return "\n".join(lines) + "\n"


def inherit(inherited: "Mapping[Element, str]", notes: "Iterable[tuple[str, str]]") -> str:
    """Commands that make elements lead to other chains, and note (chain, interface) who stands by there."""
    text = "".join(map_elements([element for element, its in inherited.items() if its == heir], heir)
                   for heir in dict.fromkeys(inherited.values()))
    return text + "".join(standby_note(*note) for note in notes)


def probe(family: int, conditions: str, protocols: "Iterable[str]") -> str:
    """Commands, for a dry run, that show whether nft takes `conditions` as a match for ports of these protocols."""
    table = f"inet {TABLE_NAME}_probe"
    rules = (f"meta nfproto ipv{family} {conditions} {protocol} dport 1" for protocol in protocols)
    return "\n".join((f"add table {table}", f"add chain {table} probe {{", *rules, "}")) + "\n"


def rules_of(attachment: Attachment) -> "Iterator[str]":
    """The rules of an attachment's chain, in their order: the record, who is masqueraded, what is published."""
    for index, part in enumerate(record_of(attachment)):
        yield f'{"continue" if index else "counter"} comment "{part}"'
    yield from _marks(attachment)
    for family in sorted(attachment.left_alone):
        yield f'{_IP[family]} daddr {LOCALHOST[family]} return comment "{_LEFT_ALONE} (IPv{family})"'
    for family, address in sorted(attachment.addresses.items()):
        groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for port in attachment.ports:
            if port.family == family:
                groups.setdefault((port.host_ip, port.protocol), []).append((port.host_port, port.container_port))
        for (host_ip, protocol), pairs in sorted(groups.items(), reverse=True):
            pairs.sort()
            match = f"{_IP[family]} daddr {host_ip}" if host_ip else f"meta nfproto ipv{family}"
            if attachment.conditions.get(family):
                match += f" {attachment.conditions[family]}"
            yield from _dnat(f"{match} {protocol} dport", f"dnat {_IP[family]} to", address.ip, pairs)


def _marks(attachment: Attachment) -> "Iterator[str]":
    """The rules that mark for masquerading: clients whose replies would bypass this host, or all (masqAll)."""
    if attachment.mark_bit is None:
        return
    mark = f"meta mark set meta mark | {1 << attachment.mark_bit:#x}"
    if attachment.masq_all:
        yield mark
        return
    for family, address in sorted(attachment.addresses.items()):
        if attachment.on_link is None:  # as before 0.2
            yield f"{_IP[family]} saddr {LOCALHOST[family]} {mark}"
            yield f"{_IP[family]} saddr {address.network} {mark}"
        else:
            yield f"oiftype loopback {_IP[family]} saddr {LOCALHOST[family]} {mark}"  # from this host's localhost
    if attachment.on_link is None:
        return
    for interface, prefix in attachment.on_link:
        yield on_link_rule(interface, prefix, attachment.mark_bit)
    for family, address in sorted(attachment.addresses.items()):
        if not any((":" in prefix) == (family == 6) for _, prefix in attachment.on_link):
            yield f"{_IP[family]} saddr {address.ip} {mark}"  # no interface leads there (yet); the container itself


LOCALHOST = {4: "127.0.0.0/8", 6: "::1"}
_ON_LINK, _LEFT_ALONE = "on-link ", "localhost is left to this host"


def on_link_rule(interface: str, prefix: str, mark_bit: int) -> str:
    """The rule that masquerades those whom the container answers without this host: by interface and source."""
    ip = "ip6" if ":" in prefix else "ip"
    return f'iifname "{interface}" {ip} saddr {prefix} meta mark set meta mark | {1 << mark_bit:#x} ' \
        f'comment "{_ON_LINK}{interface} {prefix}"'


def on_link_of(comments: "Iterable[str]") -> tuple[tuple[str, str], ...]:
    """The (interface, prefix) of a chain's rules, by their comments; only what this plugin could have written."""
    pairs = (comment[len(_ON_LINK):].partition(" ")[::2] for comment in comments if comment.startswith(_ON_LINK))
    return tuple((name, prefix) for name, prefix in pairs if is_ifname(name) and _PREFIX.issuperset(prefix))


_PREFIX = frozenset("0123456789abcdef.:/")


def left_alone_of(comments: "Iterable[str]") -> frozenset[int]:
    """The families whose localhost a chain leaves alone, by the comments of its rules."""
    return frozenset(family for family in (4, 6) if f"{_LEFT_ALONE} (IPv{family})" in {*comments})


def share_on_link(chain: str, comments: "list[str]", pairs: "Iterable[tuple[str, str]]", mark_bit: int) -> str:
    """Commands that let a chain with these comments masquerade these, too: of the container's other interfaces."""
    known = on_link_of(comments)
    if not known:
        return ""
    at = next(index for index, comment in enumerate(comments) if comment.startswith(_ON_LINK))
    return "".join(f"insert rule {TABLE} {chain} index {at} {on_link_rule(*pair, mark_bit)}\n"
                   for pair in pairs if pair not in known)


def _dnat(match: str, dnat: str, ip: str, pairs: "Sequence[tuple[int, int]]") -> "Iterator[str]":
    """Rules for `pairs` (host port, container port; sorted): consecutive ports that keep their number share one."""
    same = [host for host, container in pairs if host == container]
    target = f"[{ip}]:" if ":" in ip else f"{ip}:"
    first = last = 0
    for port in (*same, 0):
        if port == last + 1 and first:
            last = port
            continue
        if first:
            ports, to = (f"{first}-{last}", ip) if first < last else (str(first), f"{target}{first}")
            yield f"{match} {ports} counter {dnat} {to}"
        first = last = port
    for host, container in pairs:
        if host != container:
            yield f"{match} {host} counter {dnat} {target}{container}"
