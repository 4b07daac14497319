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
    # Of a set: its name, the key, the end of the key's range or b""; of a map also its value, or the chain that it is.
    Member = tuple[str, bytes, bytes, bytes | str]
    Rule = tuple[str, str]  # its text, and what its comment says
    _Shift = tuple[str, int, int]  # host address, "" where the rule has it; host port, container port
    _Group = tuple[int, str, str, list[int], tuple[_Shift, ...]]  # see _groups

TABLE_NAME = "cni_portmap"
TABLE = f"inet {TABLE_NAME}"
COMMENT_PREFIX = "cni-portmap "  # begins the comment of each rule of SHARED, with
BASE_VERSION = 3  # which goes up whenever SHARED changes
COMMENT_MAX = 128  # bytes, NFTNL_UDATA_COMMENT_MAXLEN
NAME_MAX = 255  # bytes, NFT_NAME_MAXLEN less the final NUL

HOSTPORTS = "hostports"  # the map of ports that are published on every address
HOSTIP_HOSTPORTS = {4: "hostip4_hostports", 6: "hostip6_hostports"}  # by family: those of one address
# By name: what they look up. Sets and maps are declared with `typeof`, never with `type`, and no rule has a map without
# a name: written by nft 1.1.2 or newer, either makes an older nft on the same host crash (kubernetes#136786).
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

EXPOSED = "guarded4"  # a set of `exposure`: a table that has it has them all

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
        ("ip daddr 127.0.0.0/8 ct status dnat return", "what rules of others lead there"),
        ("ip daddr 127.0.0.0/8 iifname @localhost_interfaces counter drop",
         "drop what source routes lead to 127.0.0.0/8"),
        ("ip6 daddr ::1 ct direction reply return", "replies to this host's localhost"),
        ("ip6 daddr ::1 ct status dnat return", "what rules of others lead there"),
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


BY_RUNTIME, BY_OPERATOR = "c", "p"  # begin the name of an attachment's chain: who has published what is in it


def chain_of(container_id: str, ifname: str, by: str = BY_RUNTIME) -> str:
    """The chain of an attachment. What nft cannot hold as a name is hashed; its record then names it in full."""
    name = f"{by}/{container_id}/{ifname}"
    if len(name) <= NAME_MAX and _HASHED.isdisjoint(ifname):
        return name
    from hashlib import sha256  # 4 ms, for names that hardly anybody has
    return f"{by}/{container_id[:64]}/hash/{sha256(name.encode()).hexdigest()[:32]}"


def own_chain(attachment: Attachment) -> str:
    """The chain of what `attachment` publishes."""
    return chain_of(attachment.container_id, attachment.ifname, BY_OPERATOR if attachment.by_operator else BY_RUNTIME)


def is_attachment_chain(name: str) -> bool:
    """Whether a chain of our table is an attachment's: its name is one that `chain_of` gives."""
    kind, _, rest = name.partition("/")
    container_id, _, end = rest.partition("/")
    if kind not in (BY_RUNTIME, BY_OPERATOR) or len(name) > NAME_MAX or not is_name(container_id):
        return False
    hashed, _, digest = end.partition("/")
    if digest:
        return hashed == "hash" and len(digest) == 32 and _HEX.issuperset(digest)
    return is_ifname(end) and _HASHED.isdisjoint(end)


def is_own_chain(name: str) -> bool:
    """Whether a chain's name is of our own grammar. Others write to our table, and no other name gets into nft text."""
    return name in SHARED or is_attachment_chain(name) or \
        (name[:2] == "x/" and is_attachment_chain(f"c{name[1:]}"))


def chain_of_conditions(chain: str) -> str:
    """The chain that judges by an attachment's conditions who reaches its container directly; see `exposure`."""
    return f"x{chain[1:]}"


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
    plugin could not have written is not known either: others may write into its chains. `record`: the text itself.
    `handle`: of the record's rule, 0 for none: one that is written again has another, though the chain stays.
    """

    __slots__ = ("chain", "container_id", "ifname", "network", "netns", "inode", "link", "pod", "record", "handle")

    def __init__(self, chain: str, record: str, handle: int = 0) -> None:
        fields = dict(field.partition("=")[::2] for field in record.split(" "))
        container_id, _, ifname = chain.partition("/")[2].partition("/")
        full = fields.get("id", ""), _unescape(fields.get("if", ""))
        if is_name(full[0]) and is_ifname(full[1]) and chain_of(*full, chain[:1]) == chain:
            container_id, ifname = full
        netns, _, inode = fields.get("netns", "").partition("#")
        network, pod = fields.get("net", ""), _unescape(fields.get("pod", ""))
        self.chain, self.record, self.handle = chain, record, handle
        self.container_id, self.ifname = container_id, ifname
        self.network = network if is_name(network) else ""
        self.netns = _unescape(netns)
        self.inode = int(inode) if _is_number(inode, 64) else 0
        name, _, index = fields.get("link", "").partition("#")
        self.link = f"{name}#{index}" if is_ifname(name) and _is_number(index, 31) else ""
        self.pod = pod if pod.count("/") < 2 and all(map(is_name, pod.split("/"))) else ""

    @property
    def is_by_operator(self) -> bool:
        """Whether an operator has published it, and no runtime: the same container may have another chain."""
        return self.chain[:2] == f"{BY_OPERATOR}/"

    @property
    def path(self) -> str:
        """`netns` for people: whoever wrote the record, a terminal gets plain text."""
        return _escape(self.netns)

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
    chain = own_chain(attachment)
    fields = [f"net={attachment.network}", f"netns={_escape(attachment.netns)}#{attachment.inode or ''}"]
    if attachment.link:
        fields.append(f"link={attachment.link}")
    if attachment.pod:
        fields.append(f"pod={attachment.pod}")
    fields += (exposure.note for exposure in attachment.exposure)
    if chain[1:] != f"/{attachment.container_id}/{attachment.ifname}":
        fields += [f"id={attachment.container_id}", f"if={_escape(attachment.ifname)}"]
    record = " ".join(fields)
    return [record[at:at + COMMENT_MAX] for at in range(0, len(record), COMMENT_MAX)]


# --- map elements ---------------------------------------------------------------------------------------------

def map_of(port: Port) -> str:
    """The verdict map that holds `port`."""
    return HOSTIP_HOSTPORTS[port.family] if port.host_ip else HOSTPORTS


def key_of(port: Port) -> bytes:
    """The key of `port` in its map, as the kernel has it: each field padded to 32 bits, in network order."""
    if not port.key:
        first = inet_pton(AF[port.family], port.host_ip) if port.host_ip else bytes((_NFPROTO[port.family], 0, 0, 0))
        port.key = first + bytes((PROTOCOL_NUMBERS[port.protocol], 0, 0, 0)) + port.host_port.to_bytes(2, "big") + \
            b"\0\0"
    return port.key


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


# A container may publish one port on several networks (podman does), and a pod's next sandbox the ports of the one
# before it, which is still there. The element leads to one of their chains, where rules without effect name those that
# stand by: when that chain goes, one of them takes its place.

_STANDBY, _OF = "also on ", " of "


def standby_note(chain: str, ifname: str, container_id: str = "") -> str:
    """The command that notes in `chain` that the same container publishes some of its ports on `ifname` too.

    `container_id`: that it is another one, the same pod's next sandbox.
    """
    return "\n".join(_chain(chain, [f'continue comment "{standby_comment(ifname, container_id)}"'])) + "\n"


def standby_comment(ifname: str, container_id: str = "") -> str:
    """The comment of that note."""
    return f"{_STANDBY}{ifname}{_OF if container_id else ''}{container_id}"


def standby_of(comment: str) -> tuple[str, str] | None:
    """The interface and the container ID ("" for the same container) that a rule's comment notes; None for no note."""
    ifname, _, container_id = comment[len(_STANDBY):].partition(_OF)
    is_note = comment.startswith(_STANDBY) and is_ifname(ifname) and (not container_id or is_name(container_id))
    return (ifname, container_id) if is_note else None


def standby_notes(comments: "Iterable[str]") -> list[tuple[str, str]]:
    """What the rules of a chain note, by their comments; the oldest first."""
    return [note for note in map(standby_of, comments) if note]


def is_next_sandbox(attachment: Attachment, owner: "Owner | Attachment") -> bool:
    """Whether an attachment is that of the same pod as another container's, and can be noted.

    The kubelet gives a pod's namespace and name to the runtime; who makes pods does not choose those of another. The
    network is not asked for: a pod may be in several, and an edit, or the node's next CNI configuration, changes it.
    """
    return "/" in attachment.pod and attachment.pod == owner.pod and \
        attachment.container_id != owner.container_id and not attachment.by_operator and \
        len(standby_comment(attachment.ifname, attachment.container_id)) <= COMMENT_MAX


# --- commands -------------------------------------------------------------------------------------------------

def shared_rules(name: str, attachments: "Iterable[Attachment]", comments: "Iterable[str]" = (),
                 known: "Mapping[str, Shared]" = SHARED) -> "list[Rule]":
    """The rules of a chain of `known`, as these attachments need it; `comments`: of the rules that it has."""
    shared = known[name]
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


_HOOKS = "prerouting", "input", "forward", "output", "postrouting"  # enum nf_inet_hooks
_PRIORITIES = {"raw": -300, "dstnat": -100, "filter": 0, "srcnat": 100}  # enum nf_ip_hook_priorities


def hook_of(text: str) -> tuple[str, int, int] | None:
    """Type, hook and priority of a chain's `Shared.hook`, as the kernel has them; None for no hook."""
    if not text:
        return None
    _, kind, _, hook, _, priority, *more = text.partition(";")[0].split()
    number = _PRIORITIES[priority] if priority in _PRIORITIES else int(priority)
    return kind, _HOOKS.index(hook), number + int("".join(more) or 0)


def note_interfaces(interfaces: "Mapping[str, str]") -> str:
    """The command that notes interfaces (names) that localhost leads through, each with its comment."""
    notes = ", ".join(f'"{name}" comment "{comment}"' for name, comment in interfaces.items())
    return _set(f"elements = {{ {notes} }}; ") + "\n" if notes else ""


def key_of_interface(name: str) -> bytes:
    """An interface's name as the key of a set, or a part of one, as the kernel has it."""
    return name.encode().ljust(16, b"\0")


def base(chains: "Mapping[str, Iterable[Rule]]", flushed: "Container[str]" = (),
         known: "Mapping[str, Shared]" = SHARED, sets: "Iterable[str]" = (), deleted: "Container[str]" = ()) -> str:
    """Commands that make the table and some of its `known` chains, each with its rules.

    `sets`: commands that declare what those rules look up besides. Of the chains that exist, those that are `flushed`
    get other rules, and those that hang on another hook are `deleted`: for a deletion libnftables 1.0 reads every set
    of the host, see `linux.batch`.
    """
    lines = [f"add table {TABLE}", *(_map(name) for name in MAPS), _set(), *sets]
    for name in (name for name in known if name in chains):
        hook = known[name].hook
        if name in flushed or name in deleted:
            lines.append(f"{'delete' if name in deleted else 'flush'} chain {TABLE} {name}")
        rules = (f'{rule} comment "{comment}"' for rule, comment in chains[name])
        lines += _chain(name, [hook, *rules] if hook else rules)
    return "\n".join(lines) + "\n"


def attach(attachment: Attachment, elsewhere: "Container[Element]" = ()) -> str:
    """Commands that publish the ports of `attachment`: its chain, and the elements that lead there.

    `elsewhere`: the elements that lead to the container through another of its interfaces, and stay.
    """
    own = [element for element in elements_of(attachment) if element not in elsewhere]
    return rules_text(attachment) + map_elements(own, own_chain(attachment))


def rules_text(attachment: Attachment) -> str:
    """Commands that create the chain of `attachment`, with its rules: to be built before the lock is taken."""
    chain = own_chain(attachment)
    groups = _groups(attachment)
    maps = _port_maps(attachment, groups)
    texts = (f"add map {TABLE} {name} {{ typeof {_port_map(shifts)}; }}" for shifts, name in maps.items())
    return created(chain, _rules(attachment, groups, maps), texts)


def created(chain: str, rules: "Iterable[str]", maps: "Iterable[str]" = ()) -> str:
    """Commands that create a chain without a hook, with these rules; `maps`: the commands for those that they name."""
    return "\n".join((f"create chain {TABLE} {chain}", *maps, *_chain(chain, rules))) + "\n"


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


class Change:
    """One transaction of attachments: what goes, and then what comes.

    `chains`, the `elements` that lead there, each with its chain, and `maps` of ports go; so do `stale_notes` (chain,
    handle of the rule), and the note of interfaces that are `forgotten`. What comes:
    `rules`: by chain, its `rules_text`; `leads`: elements, each with the chain that it leads to; `notes`: (chain,
    interface, container ID or "" for the same) who stands by there; `inserted`: by chain, rules and the place of the
    one that they come before; `interfaces`: those to note, each with its comment. `removed`, `created`: elements of the
    sets of `exposure`, with their comments; `exposure`: the same as commands, those that remove and those that create.
    """

    __slots__ = ("chains", "elements", "maps", "stale_notes", "rules", "leads", "notes", "inserted", "interfaces",
                 "forgotten", "removed", "created", "exposure")

    def __init__(self) -> None:
        self.chains: list[str] = []
        self.elements: dict[Element, str] = {}
        self.maps: list[str] = []
        self.stale_notes: list[tuple[str, int]] = []
        self.rules: dict[str, str] = {}
        self.leads: dict[Element, str] = {}
        self.notes: list[tuple[str, str, str]] = []
        self.inserted: dict[str, tuple[int, list[str]]] = {}
        self.interfaces: dict[str, str] = {}
        self.forgotten: list[str] = []
        self.removed: dict[Member, str] = {}
        self.created: dict[Member, str] = {}
        self.exposure = "", ""

    def removes(self) -> bool:
        """Whether something goes."""
        return bool(self.chains or self.maps or self.removed or self.stale_notes)

    def text(self) -> str:
        """It as commands."""
        text = self.exposure[0] + (detach(self.chains, self.elements) if self.chains else "")
        text += "".join(f"delete map {TABLE} {name}\n" for name in self.maps)
        for chain in dict.fromkeys((*self.rules, *self.leads.values())):
            text += self.rules.get(chain, "")
            text += map_elements([element for element, its in self.leads.items() if its == chain], chain)
        text += "".join(f"delete rule {TABLE} {chain} handle {handle}\n" for chain, handle in self.stale_notes)
        text += "".join(standby_note(*note) for note in self.notes)
        for chain, (index, rules) in self.inserted.items():
            text += "".join(f"insert rule {TABLE} {chain} index {index} {rule}\n" for rule in rules)
        text += "".join(f"delete element {TABLE} {LOCALHOST_INTERFACES} {{ {name} }}\n" for name in self.forgotten)
        return text + self.exposure[1] + note_interfaces(self.interfaces)

    def apart(self) -> str:
        """The commands that write its rules alone, and those to be inserted, where there is nothing yet."""
        lines = (line for chain, (_, rules) in self.inserted.items() for line in _chain(chain, rules))
        return base({}) + "".join(self.rules.values()) + "".join(f"{line}\n" for line in lines)


def probe(family: int, conditions: str, protocols: "Iterable[str]") -> str:
    """Commands, for a dry run, that show whether nft takes `conditions` as a match for ports of these protocols."""
    table = f"inet {TABLE_NAME}_probe"
    rules = (f"meta nfproto ipv{family} {conditions} {protocol} dport 1" for protocol in protocols)
    return "\n".join((f"add table {table}", f"add chain {table} probe {{", *rules, "}")) + "\n"


def with_indexes(text: str, index_of: "Callable[[str], int]") -> str:
    """The same conditions with indexes in place of the names of interfaces that iif and oif compare.

    nft takes the index, too; so the rule is the same where it is compiled in another network namespace. `index_of`: 0
    for a name of no interface. In a concatenation names stay.
    """
    words = []
    value = inside = False  # whether a value is to come, in braces
    for word in text.split():
        if word in ("iif", "oif"):
            value = True
        elif value and word not in ("==", "!=", "eq", "ne"):
            name = word.strip('",{}')
            index = index_of(name) if name else 0
            words.append(word.replace('"', "").replace(name, str(index)) if index else word)
            inside = (inside or "{" in word) and "}" not in word
            value = inside
            continue
        words.append(word)
    return " ".join(words)


# Many ports under other numbers share one rule, and a map of their own: host port -> container port. So do ports of
# many host addresses, by address and port. The map is named after the chain, and goes with it.

MANY_SHIFTED, MANY_ADDRESSES = 10, 100
_EACH = "*"  # in place of a host address: the map has it


def port_map_of(chain: str, number: int) -> str:
    """The name of a chain's map of ports, counted from 1."""
    return f"{chain}/{number}"


def port_maps_of(attachment: Attachment) -> "dict[tuple[_Shift, ...], str]":
    """The maps of ports of `attachment`: what each has -> its name."""
    return _port_maps(attachment, _groups(attachment))


def _port_map(shifts: "tuple[_Shift, ...]") -> str:
    """nft's text for what a map of ports looks up, and has."""
    address = shifts[0][0]
    if not address:
        return f"th dport : th dport; elements = {{ {', '.join([f'{host} : {port}' for _, host, port in shifts])} }}"
    elements = ", ".join([f"{ip} . {host} : {port}" for ip, host, port in shifts])
    return f"{_IP[6 if ':' in address else 4]} daddr . th dport : th dport; elements = {{ {elements} }}"


def _port_maps(attachment: Attachment, groups: "Iterable[_Group]") -> "dict[tuple[_Shift, ...], str]":
    found = dict.fromkeys(shifted for *_, shifted in groups if len(shifted) > MANY_SHIFTED)
    chain = own_chain(attachment) if found else ""
    room = 10 ** (NAME_MAX - len(chain) - 1)  # for numbers, in names
    return {shifts: port_map_of(chain, number) for number, shifts in enumerate(found, 1) if number < room}


def _groups(attachment: Attachment) -> "list[_Group]":
    """The ports, by family, host address and protocol: those that keep their number, and those that are shifted."""
    groups: dict[tuple[int, str, str], list[tuple[int, int]]] = {}
    for port in attachment.ports:
        groups.setdefault((port.family, port.host_ip, port.protocol), []).append((port.host_port, port.container_port))
    found: list[_Group] = []
    for family in sorted(attachment.addresses):
        its = {where[1:]: pairs for where, pairs in groups.items() if where[0] == family}
        for protocol in PROTOCOLS.values() if len(its) > MANY_ADDRESSES else ():
            many = {ip: pairs for (ip, its_protocol), pairs in its.items() if ip and its_protocol == protocol}
            if len(many) > MANY_ADDRESSES:
                found.append((family, _EACH, protocol, [],
                              tuple(sorted([(ip, *pair) for ip, pairs in many.items() for pair in pairs]))))
                its = {where: pairs for where, pairs in its.items() if not where[0] or where[1] != protocol}
        for (host_ip, protocol), pairs in sorted(its.items(), reverse=True):
            pairs.sort()
            found.append((family, host_ip, protocol, [host for host, container in pairs if host == container],
                          tuple([("", *pair) for pair in pairs if pair[0] != pair[1]])))
    return found


def rules_of(attachment: Attachment) -> "Iterator[str]":
    """The rules of an attachment's chain, in their order: the record, who is masqueraded, what is published."""
    groups = _groups(attachment)
    return _rules(attachment, groups, _port_maps(attachment, groups))


def _rules(attachment: Attachment, groups: "Iterable[_Group]", maps: "Mapping[tuple[_Shift, ...], str]") \
        -> "Iterator[str]":
    for index, part in enumerate(record_of(attachment)):
        yield f'{"continue" if index else "counter"} comment "{part}"'
    yield from _marks(attachment)
    for family in sorted(attachment.left_alone):
        yield f'{_IP[family]} daddr {LOCALHOST[family]} return comment "{_LEFT_ALONE} (IPv{family})"'
    for family, host_ip, protocol, same, shifted in groups:
        ip = attachment.addresses[family].ip
        conditions = f" {attachment.conditions[family]}" if attachment.conditions.get(family) else ""
        match = f"{_match(family, '' if host_ip == _EACH else host_ip)}{conditions}"
        dnat, target = f"dnat {_IP[family]} to", f"[{ip}]:" if family == 6 else f"{ip}:"
        for ports in _ranges(same):
            yield f"{match} {protocol} dport {ports} counter {dnat} {ip if '-' in ports else target + ports}"
        if shifted in maps:
            key = f"{_IP[family]} daddr . " if host_ip == _EACH else ""
            yield f"{match} meta l4proto {protocol} counter {dnat} {target}{key}{protocol} dport map @{maps[shifted]}"
            continue
        for address, host, container in shifted:
            its = f"{_match(family, address)}{conditions}" if address else match
            yield f"{its} {protocol} dport {host} counter {dnat} {target}{container}"


def _match(family: int, host_ip: str) -> str:
    return f"{_IP[family]} daddr {host_ip}" if host_ip else f"meta nfproto ipv{family}"


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


def is_comment_of_rule(comment: str) -> bool:
    """Whether a comment in an attachment's chain is that of a rule, and no part of the owner's record."""
    return comment.startswith(_LEFT_ALONE) or bool(on_link_of([comment]))


def share_on_link(comments: "list[str]", pairs: "Iterable[tuple[str, str]]", mark_bit: int) -> "tuple[int, list[str]]":
    """The rules that let a chain with these comments masquerade these, too: of the container's other interfaces.

    And the place of the rule that they are inserted before.
    """
    known = on_link_of(comments)
    if not known:
        return 0, []
    at = next(index for index, comment in enumerate(comments) if comment.startswith(_ON_LINK))
    return at, [on_link_rule(*pair, mark_bit) for pair in pairs if pair not in known]


def _ranges(ports: "Iterable[int]") -> "Iterator[str]":
    """Consecutive ones of these ports (sorted) as ranges: "80", "9000-9002"."""
    first = last = 0
    for port in (*ports, 0):
        if first and port == last + 1:
            last = port
            continue
        if first:
            yield f"{first}-{last}" if first < last else str(first)
        first = last = port
