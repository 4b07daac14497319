"""The configuration: what a runtime sends -> an Attachment with its published ports.

Every refusal of bad input is here, so nothing after this module checks input again. The shape is also written
down in portmap.schema.json, the contract for people and editors; a property test holds the two together, and
`explain` words a refusal through it. Keys are those of the reference plugin (cni.dev, "portmap plugin").
"""
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from .cni import INVALID_CONFIG, CniError, Request, is_ifname, is_name, warn

PROTOCOLS = ("tcp", "udp", "sctp")
DEFAULT_MARK_BIT = 13  # the reference plugin's


class Refused(Exception):
    """The configuration is not valid at `path`, such as `runtimeConfig.portMappings[0].hostPort`.

    `reason`: what to write instead; "" where the schema's description of the path says it best.
    """

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class Address:
    """An address of the container: `family` 4 or 6, `ip` in canonical text, `network` it is in ("10.88.0.0/16")."""

    __slots__ = ("family", "ip", "network")

    def __init__(self, family: int, ip: str, network: str) -> None:
        self.family, self.ip, self.network = family, ip, network


class Port:
    """One published port: `host_ip` ("" for every address of the family) and `host_port` lead to `container_port`."""

    __slots__ = ("family", "protocol", "host_ip", "host_port", "container_port")

    def __init__(self, family: int, protocol: str, host_ip: str, host_port: int, container_port: int) -> None:
        self.family, self.protocol, self.host_ip = family, protocol, host_ip
        self.host_port, self.container_port = host_port, container_port

    def __str__(self) -> str:
        ip = self.host_ip or ("0.0.0.0" if self.family == 4 else "::")
        return f"{self.protocol} port {self.host_port} on {ip}"


class Attachment:
    """A container's interface in a network, and all that it publishes.

    `inode`: the network namespace that `netns` led to, 0 where that cannot be known. `addresses`: by family.
    `mark_bit`: 0 to 31, or None where nothing is masqueraded. `conditions`: nft match text by family.
    `localhost6`: whether [::1] is opened. `refuse_bound`: whether a port that a process of the host uses is refused.
    `pod`: the name that people know, "shop/web-7d9f", or "". `links`: the interfaces of the host that prevResult names,
    of which `link` is the container's own, as name#index, or "".
    """

    __slots__ = ("container_id", "ifname", "network", "netns", "inode", "addresses", "ports", "mark_bit",
                 "masq_all", "conditions", "localhost6", "refuse_bound", "pod", "links", "link")

    def __init__(self, container_id: str, ifname: str, network: str, netns: str = "", inode: int = 0,
                 addresses: dict[int, Address] | None = None, ports: tuple[Port, ...] = (),
                 mark_bit: int | None = None, masq_all: bool = False,
                 conditions: dict[int, str] | None = None, localhost6: bool = True,
                 refuse_bound: bool = False, pod: str = "", links: tuple[str, ...] = (), link: str = "") -> None:
        self.container_id, self.ifname, self.network = container_id, ifname, network
        self.netns, self.inode = netns, inode
        self.addresses, self.ports = addresses or {}, ports
        self.mark_bit, self.masq_all, self.conditions = mark_bit, masq_all, conditions or {}
        self.localhost6, self.refuse_bound = localhost6, refuse_bound
        self.pod, self.links, self.link = pod, links, link


def parse(request: Request) -> Attachment:
    """The attachment that `request` describes; without ports if it publishes none.

    Raises CniError(7), naming the JSON path, the value and what was expected.
    """
    try:
        return _attachment(request)
    except Refused as refused:
        raise _explained(request, refused) from None


def parse_valid_attachments(request: Request) -> tuple[str, set[tuple[str, str]] | None]:
    """GC's network, and the (container ID, interface) of its valid attachments; None where there is no such list.

    An absent list is not an empty one: cnitool sends none. Source: SPEC.md 1.1.0, section 4, GC.
    """
    try:
        network, valid = _network(request.config), None
        for key in "cni.dev/attachments", "cni.dev/valid-attachments":  # the first is libcni's older name
            if request.config.get(key) is not None:
                valid = set()
                for index, item in enumerate(_list(request.config[key], key)):
                    entry = _object(item, f"{key}[{index}]")
                    for field in "containerID", "ifname":
                        if type(entry.get(field)) is not str:
                            raise Refused(f"{key}[{index}]")
                    valid.add((str(entry["containerID"]), str(entry["ifname"])))
        return network, valid
    except Refused as refused:
        raise _explained(request, refused) from None


def _explained(request: Request, refused: Refused) -> CniError:
    from .explain import explain  # with jsonschema 70 ms, on this path only
    return CniError(INVALID_CONFIG, *explain(request.config, refused))


def _network(config: dict[str, object]) -> str:
    name = config.get("name")
    if type(name) is not str or not is_name(name):
        raise Refused("name")
    return name


def _attachment(request: Request) -> Attachment:
    config = request.config
    network = _network(config)
    if type(config.get("type", "")) is not str:
        raise Refused("type")
    snat = _flag(config, "snat", True)
    masq_all = _flag(config, "masqAll", False)
    mark_bit = _mark_bit(config)
    localhost6 = _flag(config, "localhostIPv6", True)
    refuse_bound = _host_port_in_use(config)
    _backend(config)
    conditions = {4: parse_conditions(config, "conditionsV4"), 6: parse_conditions(config, "conditionsV6")}
    addresses, links = _addresses(config, request.ifname)
    wanted = _mappings(config)
    if request.verb in ("ADD", "CHECK"):
        if not request.prev_result:
            raise CniError(INVALID_CONFIG, "prevResult is missing", "this plugin is chained after one that connects "
                           "the container, such as bridge")
        if wanted and not addresses:
            raise CniError(INVALID_CONFIG, f"prevResult has no address on {request.ifname}", "a published port "
                           "needs an address of the container to lead to")
        _warn_of_skipped(wanted, addresses)
    ports = tuple(port for port in wanted if port.family in addresses)
    return Attachment(request.container_id, request.ifname, network, request.netns, 0, addresses, ports,
                      mark_bit if snat else None, masq_all, conditions, localhost6, refuse_bound,
                      _pod(request.args) if ports else "", links)


def _flag(config: dict[str, object], key: str, default: bool) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise Refused(key)
    return value


def _integer(value: object, low: int, high: int, path: str) -> int:
    if type(value) is float and value.is_integer():  # 80.0 is an integer, in JSON as in JSON Schema
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise Refused(path)
    return value


def _mark_bit(config: dict[str, object]) -> int:
    bit, chain = config.get("markMasqBit"), config.get("externalSetMarkChain")
    if chain is not None:
        if type(chain) is not str:
            raise Refused("externalSetMarkChain")
        if bit is not None:
            raise Refused("externalSetMarkChain", "markMasqBit or externalSetMarkChain, not both")
        warn(f"externalSetMarkChain {chain!r} is not needed: cni-portmap masquerades in its own table")
    return DEFAULT_MARK_BIT if bit is None else _integer(bit, 0, 31, "markMasqBit")


def _host_port_in_use(config: dict[str, object]) -> bool:
    value = config.get("hostPortInUse")
    if value not in (None, "ignore", "refuse"):
        raise Refused("hostPortInUse")
    return value == "refuse"


def _backend(config: dict[str, object]) -> None:
    backend = config.get("backend")
    if backend == "iptables":
        warn("backend iptables: this plugin writes nftables only, and goes on with that")
    elif backend not in (None, "nftables"):
        raise Refused("backend")


# --- addresses ------------------------------------------------------------------------------------------------

_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, IPv4-mapped IPv6 (RFC 4291, 2.5.5.2)


def parse_ip(text: object, path: str) -> tuple[int, str]:
    """Family (4 or 6) and canonical text of an address; IPv4-mapped IPv6 is IPv4."""
    if type(text) is not str:
        raise Refused(path)
    for family, kind in (4, AF_INET), (6, AF_INET6):
        try:
            packed = inet_pton(kind, text)
        except (OSError, ValueError):  # ValueError: NUL or a lone surrogate in the text
            continue
        if packed[:12] == _MAPPED:
            return 4, inet_ntop(AF_INET, packed[12:])
        return family, inet_ntop(kind, packed)
    raise Refused(path)


def parse_cidr(text: object, path: str) -> Address:
    """An address with its prefix length, as IPAM plugins write it: "10.88.0.2/16"."""
    if type(text) is not str:
        raise Refused(path)
    host, _, length = text.partition("/")
    family, ip = parse_ip(host, path)
    if not (length.isascii() and length.isdigit() and len(length) < 4):
        raise Refused(path)
    kind, bits = (AF_INET, 32) if family == 4 else (AF_INET6, 128)
    prefix = int(length) - 96 if family == 4 and ":" in host else int(length)
    if not 0 <= prefix <= bits:
        raise Refused(path)
    number = int.from_bytes(inet_pton(kind, ip), "big") >> bits - prefix << bits - prefix
    return Address(family, ip, f"{inet_ntop(kind, number.to_bytes(bits // 8, 'big'))}/{prefix}")


def _object(value: object, path: str) -> dict[str, object]:
    if value is None:
        return {}
    if type(value) is not dict:
        raise Refused(path)
    return value


def _list(value: object, path: str) -> list[object]:
    if value is None:
        return []
    if type(value) is not list:
        raise Refused(path)
    return value


def _addresses(config: dict[str, object], ifname: str) -> tuple[dict[int, Address], tuple[str, ...]]:
    """The container's first IPv4 and first IPv6 address on `ifname`, or on no interface in particular.

    And the interfaces in no sandbox, by their names: the host's end of the container's link, a bridge.
    """
    result = _object(config.get("prevResult"), "prevResult")
    sandboxed, links = [], []
    for index, item in enumerate(_list(result.get("interfaces"), "prevResult.interfaces")):
        path = f"prevResult.interfaces[{index}]"
        interface = _object(item, path)
        name, sandbox = interface.get("name", ""), interface.get("sandbox") or ""
        if type(name) is not str:
            raise Refused(f"{path}.name")
        if type(sandbox) is not str:
            raise Refused(f"{path}.sandbox")
        sandboxed.append(name == ifname and sandbox != "")
        if not sandbox and is_ifname(name):
            links.append(name)
    found: dict[int, Address] = {}
    for index, item in enumerate(_list(result.get("ips"), "prevResult.ips")):
        path = f"prevResult.ips[{index}]"
        entry = _object(item, path)
        address = parse_cidr(entry.get("address"), f"{path}.address")
        at = entry.get("interface")
        at = -1 if at is None else _integer(at, -1 << 31, 1 << 31, f"{path}.interface")
        if not 0 <= at < len(sandboxed) or sandboxed[at]:
            found.setdefault(address.family, address)
    for key in "ip4", "ip6":  # results of cniVersion 0.1.0 and 0.2.0
        entry = _object(result.get(key), f"prevResult.{key}")
        if entry:
            address = parse_cidr(entry.get("ip"), f"prevResult.{key}.ip")
            found.setdefault(address.family, address)
    return found, tuple(links)


# --- who it is ------------------------------------------------------------------------------------------------

POD_NAME_MAX = 253  # characters, as Kubernetes has it


def _pod(args: str) -> str:
    """What people call the container, by CNI_ARGS: "namespace/pod", a name alone (podman, nerdctl), "" for none.

    A value that cannot be a name is left out: it is for people's eyes, and no reason to refuse a container.
    """
    found = dict(item.partition("=")[::2] for item in args.split(";"))
    namespace, name, host = (value if is_name(value) and len(value) <= POD_NAME_MAX else "" for value in (
        found.get(key, "") for key in ("K8S_POD_NAMESPACE", "K8S_POD_NAME", "NERDCTL_CNI_DHCP_HOSTNAME")))
    name = name or host
    return f"{namespace}/{name}" if namespace and name else name


# --- port mappings --------------------------------------------------------------------------------------------

def _mappings(config: dict[str, object]) -> list[Port]:
    runtime = _object(config.get("runtimeConfig"), "runtimeConfig")
    return parse_mappings(runtime.get("portMappings"), "runtimeConfig.portMappings")


def parse_mappings(value: object, at: str) -> list[Port]:
    """Every port that the list `value` asks for, in both families; what is said twice is meant once."""
    published: dict[tuple[int, str, str, int], Port] = {}
    for index, item in enumerate(_list(value, at)):
        path = f"{at}[{index}]"
        if type(item) is not dict:
            raise Refused(path)
        host_port = container_port = 0
        protocol, host_ip = "tcp", ""
        families: tuple[int, ...] = (4, 6)
        for name, field in item.items():
            key = name.lower()  # containerd capitalises: HostPort
            if key == "hostport":
                host_port = _integer(field, 1, 65535, f"{path}.{name}")
            elif key == "containerport":
                container_port = _integer(field, 1, 65535, f"{path}.{name}")
            elif key == "protocol" and field not in (None, ""):
                protocol = field.lower() if type(field) is str else ""
                if protocol not in PROTOCOLS:
                    raise Refused(f"{path}.{name}")
            elif key == "hostip" and field not in (None, ""):
                family, host_ip = parse_ip(field, f"{path}.{name}")
                families = (family,)
                if host_ip in ("0.0.0.0", "::"):  # every address of that family
                    host_ip = ""
        if not host_port or not container_port:
            raise Refused(path)
        for family in families:
            port = Port(family, protocol, host_ip, host_port, container_port)
            same = published.setdefault((family, protocol, host_ip, host_port), port)
            if same.container_port != container_port:
                raise Refused(path, f"one container port for {port}, which leads to {same.container_port} already")
    return list(published.values())


def _warn_of_skipped(wanted: list[Port], addresses: dict[int, Address]) -> None:
    kept = {(port.protocol, port.host_port, port.container_port) for port in wanted
            if port.family in addresses and not port.host_ip}
    for port in wanted:
        if port.family not in addresses and (port.protocol, port.host_port, port.container_port) not in kept:
            warn(f"{port} is not published: the container has no IPv{port.family} address")


# --- conditions -----------------------------------------------------------------------------------------------

_TEXT = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \t._:/-,@!=<>&|^*+\"{}")

_BRACES = dict.fromkeys(map(ord, "{},"), " ")
_NOT_LETTERS = dict.fromkeys((ord(letter) for letter in _TEXT if not letter.isalpha()), " ")

# nft(8), STATEMENTS: the words that do something with a packet. A condition only looks at it.
_STATEMENTS = frozenset("""accept add comment continue count counter delete dnat drop dup flow flush fwd goto insert
jump last limit log map masquerade meter notrack queue quota redirect reject replace reset return set snat synproxy
tproxy update vmap xt""".split())

_IPTABLES = {"-s": "saddr", "--source": "saddr", "--src": "saddr",
             "-d": "daddr", "--destination": "daddr", "--dst": "daddr", "-i": "", "--in-interface": ""}
_INSTEAD = {"-p": "meta l4proto tcp", "--protocol": "meta l4proto tcp", "--sport": "tcp sport 1024-65535",
            "--dport": "tcp dport 80", "--mark": "meta mark 0x1", "--src-range": "ip saddr 10.0.0.1-10.0.0.9",
            "--dst-range": "ip daddr 10.0.0.1-10.0.0.9", "--mac-source": "ether saddr 02:00:00:00:00:01",
            "--ctstate": "ct state new", "--match-set": "ip saddr { 10.0.0.1, 10.0.0.2 }"}


def parse_conditions(config: dict[str, object], key: str) -> str:
    """nft match text from conditionsV4 or conditionsV6; iptables' -s, -d and -i are translated."""
    ip = "ip" if key == "conditionsV4" else "ip6"
    words = []
    for index, item in enumerate(_list(config.get(key), key)):
        if type(item) is not str:
            raise Refused(f"{key}[{index}]")
        if not _TEXT.issuperset(item):
            raise Refused(f"{key}[{index}]", "nft match text, without ';', '#', line ends or other special characters")
        words += item.split()
    if any(word[0] == "-" or word == "!" for word in words):
        words = _from_iptables(words, ip, key)
    inside = False
    for word in words:
        if '"' in word and (word.count('"') != 2 or word[0] != '"' or word[-1] != '"'):
            raise Refused(key, f"a quoted word, such as \"eth0\", in place of {word}")
        for brace in (letter for letter in word if letter in "{}"):
            if inside == (brace == "{"):
                raise Refused(key, "nft match text with balanced braces, not nested")
            inside = not inside
        for piece in word.translate(_BRACES).split():
            if '"' not in piece and not _is_literal(piece):
                for letters in piece.translate(_NOT_LETTERS).split():
                    if statement := _statement_in(letters.lower()):
                        raise Refused(key, f"nft match text only; {statement!r} is not a match")
    if inside:
        raise Refused(key, "nft match text with balanced braces, not nested")
    return " ".join(words)


def _statement_in(letters: str) -> str:
    """The statement that nft reads in letters, "" for none: 80accept is 80 accept for it, and 0xfflog is 0xff log."""
    rest = letters.removeprefix("x")
    while rest[:1] and rest not in _STATEMENTS and rest[0] in "abcdef":
        rest = rest[1:]
    return letters if letters in _STATEMENTS else rest if rest in _STATEMENTS else ""


def _is_literal(piece: str) -> bool:
    """Whether `piece` is a number or an address, which may hold letters (0xadd, 2001:add::/32)."""
    try:
        int(piece, 0)
        return True
    except ValueError:
        pass
    host, _, length = piece.partition("/")
    try:
        parse_ip(host, "")
        return ":" in host and (not length or (length.isascii() and length.isdigit()))
    except Refused:
        return False


def _from_iptables(words: list[str], ip: str, key: str) -> list[str]:
    """nft's words for iptables' `[!] -s/-d/-i value`, the forms that the reference plugin documents."""
    translated = []
    rest = iter(words)
    for word in rest:
        negated = word == "!"
        option = next(rest, "") if negated else word
        if option not in _IPTABLES:
            raise Refused(key, f"nft match text in place of iptables' {option!r}, "
                               f"for example {_INSTEAD.get(option, f'{ip} saddr 10.0.0.0/8')!r}")
        value = next(rest, "")
        if not value or value[0] in "-!":
            raise Refused(key, f"a value after {option}")
        field = f"{ip} {_IPTABLES[option]}"
        if not _IPTABLES[option]:
            field, value = "iifname", '"' + (value[:-1] + "*" if value[-1] == "+" else value) + '"'
        elif "," in value:
            value = "{ " + value.replace(",", ", ") + " }"
        translated += [*field.split(), *(["!="] if negated else []), *value.split()]
    return translated
