"""Exposure: who may reach a container besides its published ports, and as whom it goes out. Pure.

Loaded only for a configuration that has one of the keys, and where the table has the sets: so that nobody else pays.
The rules are shared (SHARED), and a container is in their sets: one more costs the same whatever is there. Each element
carries its owner, the name of the attachment's chain, as a comment; the chain's record tells which elements it has.

What is judged is the first direction of a connection, each packet of it, and never `ct state established`: a flow that
was alive before the container had its address would go on (docs/exposure.md). Source: nft(8).
"""
from _socket import inet_ntop, inet_pton

from .attachment import AF, PROTOCOLS, Address, Attachment, Exposure, Port, is_localhost, parse_cidr, parse_ip
from .cni import ConfigError, is_ifname, warn
from .ruleset import COMMENT_MAX, PROTOCOL_NUMBERS, TABLE, Shared, chain_of_conditions, key_of_interface
from .ruleset import PROTOCOLS as PROTOCOL_NAMES

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from .ruleset import Member

    Hosts = Sequence[tuple[int, str]]  # family, and an address of this host, "" for all of them

# --- configuration --------------------------------------------------------------------------------------------

MODES = NAT, UNPROTECTED, ROUTED, ISOLATED = ("nat", "nat-unprotected", "routed", "isolated")
CONTAINER = "container"


def read(value: object, key: str) -> object:
    """The value of one of the keys of exposure. Raises ConfigError, which names the place."""
    if key == "allowDirectRouting":
        if type(value) is not bool:
            raise ConfigError(key)
        return value
    if key == "trustedHostInterfaces":
        return _interfaces(value, key)
    if key == "defaultHostIP":
        return _hosts(value, key)
    if key.startswith("outgoingSource"):
        return _source(value, key)
    if value not in MODES:
        raise ConfigError(key)
    return value


def _interfaces(value: object, key: str) -> tuple[str, ...]:
    if type(value) is not list:
        raise ConfigError(key)
    for index, name in enumerate(value):
        if type(name) is not str or not is_ifname(name):
            raise ConfigError(f"{key}[{index}]")
    return tuple(dict.fromkeys(value))


def _hosts(value: object, key: str) -> "Hosts":
    if value == []:
        raise ConfigError(key)
    given = [(item, f"{key}[{index}]") for index, item in enumerate(value)] if type(value) is list else [(value, key)]
    found = dict.fromkeys(parse_ip(*item) for item in given)
    return tuple((family, "" if ip in ("0.0.0.0", "::") else ip) for family, ip in found)


def _source(value: object, key: str) -> str:
    if value == CONTAINER:
        return CONTAINER
    family, ip = parse_ip(value, key)
    first, second = inet_pton(AF[family], ip)[:2]
    is_no_source = first in (0, *range(224, 256)) if family == 4 else \
        first == 0xff or (first == 0xfe and second & 0xc0 == 0x80)  # link-local: nothing is forwarded from it
    if family != int(key[-1]) or ip == "::" or is_localhost(ip) or is_no_source:
        raise ConfigError(key)
    return ip


class Policy:
    """The keys of a network together.

    `hosts`: where a mapping without hostIP is published; `modes` and `outgoing`: by family.
    """

    __slots__ = ("hosts", "modes", "outgoing", "_direct", "_interfaces", "_conditions", "_has_default")

    def __init__(self, given: "Mapping[str, Any]") -> None:
        """Raises ConfigError where the values contradict each other."""
        self.modes: dict[int, str] = {family: given[f"gatewayModeV{family}"] or UNPROTECTED for family in AF}
        self.outgoing: dict[int, str] = {family: given[f"outgoingSourceV{family}"] for family in AF}
        self._direct: bool = given["allowDirectRouting"]
        self._interfaces: tuple[str, ...] = given["trustedHostInterfaces"]
        self._conditions = {family: str(given.get(f"conditionsV{family}", "")) for family in AF}
        self._has_default = bool(given["defaultHostIP"])
        self.hosts: Hosts = given["defaultHostIP"] or tuple((family, "") for family in AF)
        for key in "allowDirectRouting", "trustedHostInterfaces":
            if given[key] and NAT not in self.modes.values():
                raise ConfigError(key, f'gatewayModeV4 or gatewayModeV6 "{NAT}" beside it')
        for family, mode in self.modes.items():
            if mode in (ROUTED, ISOLATED) and any(ip for its, ip in self.hosts if its == family):
                every = "0.0.0.0" if family == 4 else "::"
                raise ConfigError("defaultHostIP",
                                  f'"{every}", or no IPv{family} address, as gatewayModeV{family} is "{mode}"')
            source = self.outgoing[family]
            if source and (mode == ISOLATED or (mode == ROUTED and source != CONTAINER)):
                expected = "nothing" if mode == ISOLATED else f'"{CONTAINER}", or nothing'
                raise ConfigError(f"outgoingSourceV{family}", f'{expected}, as gatewayModeV{family} is "{mode}"')
            opens = mode == ROUTED or (mode == NAT and (self._direct or self._interfaces))
            if opens and "ct state" in self._conditions[family]:
                raise ConfigError(f"conditionsV{family}", "no ct state: where the container's address is reached, as "
                                  f'with gatewayModeV{family} "{mode}" here, each packet is asked')

    def reachable(self, hosts: "Hosts", path: str) -> "Hosts":
        """Those of `hosts` that a mapping at `path` may have. Raises ConfigError where their families are isolated."""
        found = [host for host in hosts if self.modes[host[0]] != ISOLATED]
        if not found:
            keys = " and ".join(f"gatewayModeV{family}" for family in dict.fromkeys(family for family, _ in hosts))
            raise ConfigError(path, f'no port mapping, as {keys} is "{ISOLATED}"')
        return found

    def is_routed(self, family: int) -> bool:
        """Whether host ports of a family are nobody's."""
        return self.modes[family] == ROUTED

    def publishes(self, family: int) -> bool:
        """Whether ports of a family are published on this host's addresses."""
        return self.modes[family] in (NAT, UNPROTECTED)

    def exposure(self, addresses: "Sequence[Address]", ports: "Iterable[Port]") -> tuple[Exposure, ...]:
        """The exposure of a container with these addresses and ports. What it cannot have is one line on stderr."""
        ports = [*ports]
        if self._has_default and ports and (4, "") not in self.hosts and \
                all((port.family, port.host_ip) == (4, "") for port in ports):
            warn("defaultHostIP has no effect: each mapping came with hostIP 0.0.0.0, which nerdctl sends for none")
        found = []
        for family, mode in self.modes.items():
            its = [address for address in addresses if address.family == family]
            outgoing = self.outgoing[family] or (CONTAINER if mode == ROUTED else "")
            if not its or (mode == UNPROTECTED and not outgoing):
                continue
            mine = [port for port in ports if port.family == family]
            opened: tuple[tuple[str, int], ...] = ()
            trusted: tuple[tuple[str, int], ...] = ()
            if mode == ROUTED or (mode == NAT and self._direct):
                opened = _container_ports(port for port in mine if not is_localhost(port.host_ip))
            if mode == NAT and self._interfaces:
                trusted = _container_ports(mine)
            if mode == ROUTED:
                self._warn_of_host_ports(family, mine, its[0])
            found.append(Exposure(
                family, mode, tuple(dict.fromkeys(address.ip for address in its)),
                networks=tuple(dict.fromkeys(address.network for address in its)), opened=opened, trusted=trusted,
                interfaces=self._interfaces if trusted else (),
                conditions=self._conditions[family] if opened or trusted else "", outgoing=outgoing))
        return tuple(found)

    def _warn_of_host_ports(self, family: int, ports: "Iterable[Port]", address: Address) -> None:
        for port in ports:
            if is_localhost(port.host_ip):
                warn(f"{port} is not opened: it is for localhost only, and gatewayModeV{family} is {ROUTED}")
            else:
                warn(f"gatewayModeV{family} is {ROUTED}: host ports are ignored; the container answers at {address.ip}")


def _container_ports(ports: "Iterable[Port]") -> tuple[tuple[str, int], ...]:
    return tuple(sorted({(port.protocol, port.container_port) for port in ports}))


# --- the record: an exposure as fields of the owner's record, and back ------------------------------------------

def note_of(exposure: Exposure) -> str:
    """The fields of a record that tell all elements of an exposure, such as "mode4=nat ip4=10.88.0.2 home4=cni0"."""
    fields = {"mode": exposure.mode, "ip": ";".join(exposure.ips), "home": ";".join(exposure.home),
              "near": ";".join(exposure.networks) if exposure.is_routed else "", "open": _ranges(exposure.opened),
              "from": ";".join(exposure.interfaces), "trusted": _ranges(exposure.trusted),
              "if": "conditions" if exposure.conditions else "", "out": exposure.outgoing}
    return " ".join(f"{name}{exposure.family}={value}" for name, value in fields.items() if value)


def exposure_in(record: str) -> tuple[Exposure, ...] | None:
    """The exposure that a record notes; None where it is not as this plugin writes it, for others may have.

    Of conditions it has only that there are some.
    """
    fields = dict(field.partition("=")[::2] for field in record.split(" "))
    found = []
    for family in AF:
        if f"mode{family}" not in fields:
            continue
        mode, ip, home, near, ports, interfaces, trusted, conditions, out = (
            fields.get(f"{name}{family}", "") for name in (
                "mode", "ip", "home", "near", "open", "from", "trusted", "if", "out"))
        try:
            each = Exposure(family, mode, _ips(family, ip), networks=_networks(family, near), opened=_ports(ports),
                            trusted=_ports(trusted), interfaces=_names(interfaces), conditions=conditions, outgoing=out,
                            home=_names(home), is_routed=bool(near))
            if mode not in MODES or (out and out != CONTAINER and _ips(family, out) != (out,)):
                return None
        except (ConfigError, ValueError):
            return None
        found.append(each)
    return tuple(found)


def _ranges(ports: "Iterable[tuple[str, int]]") -> str:
    """Ports (sorted) as text: tcp:80,8000-8009;udp:53."""
    parts: list[list[Any]] = []  # protocol, first, last
    for protocol, port in ports:
        if parts and parts[-1][0] == protocol and parts[-1][2] == port - 1:
            parts[-1][2] = port
        else:
            parts.append([protocol, port, port])
    texts: dict[str, list[str]] = {}
    for protocol, first, last in parts:
        texts.setdefault(protocol, []).append(f"{first}-{last}" if first < last else str(first))
    return ";".join(f"{protocol}:{','.join(its)}" for protocol, its in texts.items())


def _ports(text: str) -> tuple[tuple[str, int], ...]:
    found = []
    for part in text.split(";") if text else ():
        protocol, _, its = part.partition(":")
        for each in its.split(","):
            first, _, last = each.partition("-")
            if protocol not in PROTOCOLS or not all(len(number) < 6 and number.isascii() and number.isdigit()
                                                    for number in (first, last or first)):
                raise ValueError(text)
            found += [(protocol, port) for port in range(int(first), int(last or first) + 1) if 0 < port < 65536]
    return tuple(found)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(";")) if text else ()
    if not all(map(is_ifname, names)):
        raise ValueError(text)
    return names


def _ips(family: int, text: str) -> tuple[str, ...]:
    ips = text.split(";")
    if any(parse_ip(ip, "") != (family, ip) for ip in ips):
        raise ValueError(text)
    return tuple(ips)


def _networks(family: int, text: str) -> tuple[str, ...]:
    networks = tuple(text.split(";")) if text else ()
    if any((found := parse_cidr(network, "")).family != family or found.network != network for network in networks):
        raise ValueError(text)
    return networks


# --- sets -----------------------------------------------------------------------------------------------------

# By name, less the family: the fields of a key. Declared with `typeof` only, see `ruleset.MAPS`.
_FIELDS = {
    "guarded": ("daddr",),  # mode nat, routed or isolated
    "isolated": ("daddr",),
    "home": ("meta iifname", "daddr"),  # the interface that leads to the container
    "near": ("daddr", "saddr"),  # where its neighbours are behind others: the network of both
    "open": ("daddr", "meta l4proto", "th dport"),
    "trusted": ("meta iifname", "daddr", "meta l4proto", "th dport"),
    "ping": ("daddr",),
    "conditional": ("daddr",),  # a map: the chain that judges by the conditions of the container
    "outgoing": ("saddr",),  # a map: what the world sees
}
_IP = {4: "ip", 6: "ip6"}
_SIZES = {"meta iifname": 16, "meta l4proto": 4, "th dport": 4}  # bytes, padded; an address has that of its family
SETS = {f"{name}{family}": fields for family in AF for name, fields in _FIELDS.items()}
ANCHORS = "guarded", "outgoing"  # each exposure has an element in one of them, for each address


def _family(name: str) -> int:
    return int(name[-1])


def _fields(name: str) -> "Iterator[tuple[str, str, int]]":
    """Each field of a set's key: its name, nft's text for it, its size in bytes."""
    family = _family(name)
    for field in SETS[name]:
        yield (field, field, _SIZES[field]) if field in _SIZES else \
            (field, f"{_IP[family]} {field}", 4 if family == 4 else 16)


def size_of(name: str) -> int:
    """The size of a set's key, in bytes."""
    return sum(size for _, _, size in _fields(name))


def address_in(name: str, key: bytes) -> bytes:
    """The container's address, packed, in the key of a set."""
    at = 0
    for field, _, size in _fields(name):
        if field == ("saddr" if name.startswith("outgoing") else "daddr"):
            return key[at:at + size]
        at += size
    return b""


def _value_of(name: str) -> str:
    """What a map leads to, "" for a set."""
    return "verdict" if name.startswith("conditional") else f"{_IP[_family(name)]} saddr" \
        if name.startswith("outgoing") else ""


def _declared(name: str, elements: str = "") -> str:
    """The command that declares a set, with some elements: alone, libnftables would first list the host's sets."""
    typeof = " . ".join(text for _, text, _ in _fields(name))
    flags = "flags interval; " if name.startswith("near") else ""
    value = _value_of(name)
    kind, typeof = ("map", f"{typeof} : {value}") if value else ("set", typeof)
    return f"add {kind} {TABLE} {name} {{ typeof {typeof}; {flags}{elements}}}"


def declarations() -> list[str]:
    """The commands that declare every set."""
    return [_declared(name) for name in SETS]


def comment_of(chain: str) -> str:
    """The comment of the elements that an attachment's chain owns."""
    if len(chain) <= COMMENT_MAX:
        return chain
    from hashlib import sha256  # 4 ms, for names that hardly anybody has
    return f"{chain[:66]}/hash/{sha256(chain.encode()).hexdigest()[:32]}"


def members_of(exposure: Exposure, chain: str) -> "Iterator[Member]":
    """The elements of an exposure; `chain`: the attachment's."""
    family, kind = exposure.family, AF[exposure.family]
    for ip in exposure.ips:
        address = inet_pton(kind, ip)
        if exposure.mode != UNPROTECTED:
            yield f"guarded{family}", address, b"", b""
        if exposure.mode == ISOLATED:
            yield f"isolated{family}", address, b"", b""
        if exposure.mode == ROUTED:
            yield f"ping{family}", address, b"", b""
        for name in exposure.home:
            yield f"home{family}", key_of_interface(name) + address, b"", b""
        for network in exposure.networks if exposure.is_routed else ():
            first, last = _bounds(family, network)
            yield f"near{family}", address + first, address + last, b""
        for port in exposure.opened:
            yield f"open{family}", address + _port_key(*port), b"", b""
        for name in exposure.interfaces:
            for port in exposure.trusted:
                yield f"trusted{family}", key_of_interface(name) + address + _port_key(*port), b"", b""
        if exposure.conditions:
            yield f"conditional{family}", address, b"", chain_of_conditions(chain)
        if exposure.outgoing:
            seen = address if exposure.outgoing == CONTAINER else inet_pton(kind, exposure.outgoing)
            yield f"outgoing{family}", address, b"", seen


def _port_key(protocol: str, port: int) -> bytes:
    return bytes((PROTOCOL_NUMBERS[protocol], 0, 0, 0)) + port.to_bytes(2, "big") + b"\0\0"


def _bounds(family: int, network: str) -> tuple[bytes, bytes]:
    """First and last address of a network, packed."""
    first, _, length = network.partition("/")
    packed = inet_pton(AF[family], first)
    bits = len(packed) * 8 - int(length)
    return packed, (int.from_bytes(packed, "big") | (1 << bits) - 1).to_bytes(len(packed), "big")


def member_text(member: "Member") -> str:
    """nft's text for the key of an element, such as "cni0" . 10.88.0.2."""
    name, key, end, _ = member
    parts, at = [], 0
    for field, _, size in _fields(name):
        part, last = key[at:at + size], end[at:at + size]
        parts.append(_part(field, part) + (f"-{_part(field, last)}" if last and last != part else ""))
        at += size
    return " . ".join(parts)


def _part(field: str, part: bytes) -> str:
    if field == "meta iifname":
        return f'"{part.rstrip(bytes(1)).decode()}"'
    if field == "meta l4proto":
        return PROTOCOL_NAMES.get(part[0], str(part[0]))
    if field == "th dport":
        return str(int.from_bytes(part[:2], "big"))
    return inet_ntop(AF[4 if len(part) == 4 else 6], part)


def commands(removed: "Iterable[Member]", created: "Mapping[Member, str]") -> tuple[str, str]:
    """Commands that remove elements, and commands that create others, each with its comment."""
    gone: dict[str, list[str]] = {}
    come: dict[str, list[str]] = {}
    for member in removed:
        gone.setdefault(member[0], []).append(member_text(member))
    for member, comment in created.items():
        come.setdefault(member[0], []).append(f'{member_text(member)} comment "{comment}"{_value_text(member)}')
    return "".join(f"delete element {TABLE} {name} {{ {', '.join(its)} }}\n" for name, its in gone.items()), \
        "".join(_declared(name, f"elements = {{ {', '.join(its)} }}; ") + "\n" for name, its in come.items())


def _value_text(member: "Member") -> str:
    name, _, _, value = member
    if isinstance(value, str):
        return f" : jump {value}"
    return f" : {inet_ntop(AF[_family(name)], value)}" if value else ""


def created_for(attachment: Attachment, chain: str) -> "dict[Member, str]":
    """The elements of an attachment, each with its owner's comment; `chain`: its own."""
    comment = comment_of(chain)
    return {member: comment for each in attachment.exposure for member in members_of(each, chain)}


def conditional_rules(attachment: Attachment) -> list[str]:
    """The rules of the chain that judges by an attachment's conditions; none where there are none."""
    rules = [f"meta nfproto ipv{each.family} {each.conditions} return" for each in attachment.exposure
             if each.conditions]
    return [*rules, "counter drop"] if rules else []


# --- rules ----------------------------------------------------------------------------------------------------

def _both(rule: str, comment: str) -> "list[tuple[str, str]]":
    """A rule for IPv4, and the same for IPv6; in it, `ip` and sets have no family."""
    return [(rule.replace("{ip}", ip).replace("{family}", str(family)), comment) for family, ip in _IP.items()]


# By name. Those without a hook first: others lead to them. What most packets meet comes first: each lookup is 1 % of a
# new connection. ICMP and ICMPv6 by number: their names are in a file that small systems lack.
SHARED = {
    "isolated": Shared(
        "",
        *_both("iifname . {ip} daddr @home{family} accept", "within its own network"),
        *_both("iifname . {ip} saddr @home{family} oifname . {ip} saddr @home{family} accept",
               "within its own network"),
        *_both("{ip} daddr . {ip} saddr @near{family} iifname . {ip} saddr @home{family} accept",
               "between neighbours behind other interfaces"),
        ("counter drop", "everything else from or to an isolated container")),
    "direct": Shared(
        "",
        # Of IPv4 the kernel refuses it (fib_validate_source).
        ("meta nfproto ipv6 ct direction reply fib saddr type local counter drop",
         "forged: this host's address, from elsewhere"),
        ("ct direction reply accept", "replies to the container"),
        *_both("iifname . {ip} daddr @home{family} accept", "from the container's own network"),
        *_both("{ip} daddr . {ip} saddr @near{family} iifname . {ip} saddr @home{family} accept",
               "from a neighbour behind another interface"),
        ("meta l4proto 1 ct state related accept", "ICMP errors of its connections"),
        ("meta l4proto 58 ct state related accept", "ICMPv6 errors of its connections"),
        ("ip daddr @ping4 meta l4proto 1 accept", "ping"),
        ("ip6 daddr @ping6 meta l4proto 58 accept", "ping"),
        *_both("{ip} daddr vmap @conditional{family}", "by the conditions of the container"),
        *_both("{ip} daddr . meta l4proto . th dport @open{family} accept",
               "ports that answer on the container's address"),
        *_both("iifname . {ip} daddr . meta l4proto . th dport @trusted{family} accept",
               "the same, from trusted interfaces"),
        ("counter drop", "everything else, straight to a guarded container")),
    "exposure": Shared(
        "type filter hook forward priority filter; policy accept;",
        *_both("{ip} saddr @isolated{family} goto isolated", "from an isolated container"),
        *_both("{ip} daddr @isolated{family} goto isolated", "to an isolated container"),
        # Whoever forges a container's address makes an answer (ct direction) of what they send to it.
        *_both("ct state new {ip} saddr @guarded{family} iifname . {ip} saddr != @home{family} counter drop",
               "forged: from a container's address, elsewhere"),
        # Not their replies: whoever forges a container's address makes those of what this host redirects to itself.
        ("ct direction original ct status dnat accept", "this host has translated it: a published port"),
        *_both("{ip} daddr @guarded{family} goto direct", "to a guarded container")),
    "outgoing": Shared(
        "type nat hook postrouting priority srcnat - 1; policy accept;",
        *_both("oifname . {ip} saddr @home{family} accept", "within its own network"),
        *_both("snat {ip} to {ip} saddr map @outgoing{family}", "as whom the container goes out")),
}
