"""The configuration: what a runtime sends -> an Attachment with its published ports.

Every refusal of bad input is here, so nothing after this module checks input again. The shape is also written
down in portmap.schema.json, the contract for people and editors; a property test holds the two together, and
`explain` words a refusal through it. Keys are those of the reference plugin (cni.dev, "portmap plugin").
"""
from .attachment import DEFAULT_MARK_BIT, PROTOCOLS, Address, Attachment, Port, is_localhost, parse_cidr, parse_ip
from .cni import INVALID_CONFIG, CniError, ConfigError, Request, as_go_reads, is_ifname, is_name, warn

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .attachment import Exposure
    from .exposure import Policy


def _text(value: object, key: str) -> str:
    if type(value) is not str:
        raise ConfigError(key)
    return value


def _flag(value: object, key: str) -> bool:
    if type(value) is not bool:
        raise ConfigError(key)
    return value


def _integer(value: object, low: int, high: int, path: str) -> int:
    if type(value) is float and value.is_integer():  # 80.0 is an integer, in JSON as in JSON Schema
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(path)
    return value


def _bit(value: object, key: str) -> int:
    return _integer(value, 0, 31, key)


def _backend(value: object, key: str) -> str:
    if value == "iptables":
        warn('backend "iptables" is not supported; using nftables')
    elif value != "nftables":
        raise ConfigError(key)
    return "nftables"


def _port_in_use(value: object, key: str) -> bool:
    if value not in ("ignore", "refuse"):
        raise ConfigError(key)
    return value == "refuse"


def _conditions(value: object, key: str) -> str:
    words = _list(value, key)
    if not words:
        return ""
    from .conditions import parse_conditions
    return parse_conditions(words, key)


def _exposure(value: object, key: str) -> object:
    from .exposure import read
    return read(value, key)


def _network(value: object, key: str) -> str:
    if type(value) is not str or not is_name(value):
        raise ConfigError(key)
    return value


# Every key of the plugin's own: how its value is read, and what it is where the key is absent or null. The schema and
# docs/configuration.md have the same keys, which a test compares. prevResult and runtimeConfig are the runtime's.
KEYS: "dict[str, tuple[Callable[[object, str], Any], Any]]" = {
    "backend": (_backend, "nftables"),
    "snat": (_flag, True),
    "masqAll": (_flag, False),
    "markMasqBit": (_bit, None),
    "externalSetMarkChain": (_text, None),
    "localhostIPv6": (_flag, True),
    "hostPortInUse": (_port_in_use, False),
    "conditionsV4": (_conditions, ""),
    "conditionsV6": (_conditions, ""),
    "gatewayModeV4": (_exposure, ""),
    "gatewayModeV6": (_exposure, ""),
    "allowDirectRouting": (_exposure, False),
    "trustedHostInterfaces": (_exposure, ()),
    "defaultHostIP": (_exposure, ()),
    "outgoingSourceV4": (_exposure, ""),
    "outgoingSourceV6": (_exposure, ""),
}
EVERY_ADDRESS = ((4, ""), (6, ""))  # family and host address


def parse(request: Request) -> Attachment:
    """The attachment that `request` describes; without ports if it publishes none.

    Raises ConfigError, which names the JSON path, and CniError(7) where it is no single value that is wrong.
    """
    config = request.config = as_go_reads(request.config, KEYS)
    network = _network(config.get("name"), "name")
    _text(config.get("type", ""), "type")
    given = {key: default if config.get(key) is None else read(config[key], key)
             for key, (read, default) in KEYS.items()}
    _warn_of_mark_chain(given)
    policy = _policy(given)
    wanted = parse_mappings(_runtime_mappings(config), MAPPINGS, policy)
    found, links = _addresses(config, request.ifname, bool(wanted or policy))
    addresses: dict[int, Address] = {}
    for address in found:
        addresses.setdefault(address.family, address)
    if request.verb in ("ADD", "CHECK"):
        if not request.prev_result:
            raise CniError(INVALID_CONFIG, "prevResult: missing", "the plugin must follow one that connects the "
                           "container, such as bridge, in the list of plugins")
        if wanted and not addresses:
            warn(f"prevResult has no address on {request.ifname}: no port is published through it")
        else:
            _warn_of_skipped(wanted, addresses)
    ports = tuple(port for port in wanted if port.family in addresses)
    exposure: tuple[Exposure, ...] = ()
    if policy:
        exposure = policy.exposure(found, ports)
        ports = tuple(port for port in ports if policy.publishes(port.family))
        addresses = {family: address for family, address in addresses.items() if policy.publishes(family)}
    mark_bit = DEFAULT_MARK_BIT if given["markMasqBit"] is None else given["markMasqBit"]
    return Attachment(
        request.container_id, request.ifname, network, netns=request.netns, addresses=addresses, ports=ports,
        mark_bit=mark_bit if given["snat"] and (ports or not policy) else None,
        masq_all=given["masqAll"],
        conditions={4: given["conditionsV4"], 6: given["conditionsV6"]},
        localhost6=given["localhostIPv6"],
        refuse_port_in_use=given["hostPortInUse"],
        pod=_pod(request.args) if ports or exposure else "", links=links,
        prefixes=tuple(dict.fromkeys(address.network for address in found)), exposure=exposure)


def _warn_of_mark_chain(given: "dict[str, Any]") -> None:
    chain = given["externalSetMarkChain"]
    if chain is not None:
        if given["markMasqBit"] is not None:
            raise ConfigError("externalSetMarkChain", "markMasqBit or externalSetMarkChain, not both")
        warn(f"ignoring externalSetMarkChain {chain!r}: cni-portmap does its own masquerading")


def _policy(given: "dict[str, Any]") -> "Policy | None":
    """The keys of exposure together; None for none. Raises ConfigError where they contradict each other."""
    if not any(given[key] for key in KEYS if KEYS[key][0] is _exposure):
        return None
    from .exposure import Policy
    return Policy(given)


def exposure_keys() -> list[str]:
    """The keys of exposure."""
    return [key for key, (read, _) in KEYS.items() if read is _exposure]


def is_consistent(config: dict[str, object]) -> bool:
    """True where values that are valid each by itself are valid together: what the schema cannot say.

    Else raises ConfigError, with a reason.
    """
    try:
        given = {key: default if config.get(key) is None else read(config[key], key)
                 for key, (read, default) in KEYS.items() if read is _exposure}
        policy = _policy({**given, "conditionsV4": _valid_conditions(config, "conditionsV4"),
                          "conditionsV6": _valid_conditions(config, "conditionsV6")})
        parse_mappings(_runtime_mappings(config), MAPPINGS, policy)
    except ConfigError as error:
        if error.reason:
            raise
    return True


def _valid_conditions(config: dict[str, object], key: str) -> str:
    try:
        return _conditions(config.get(key), key)
    except ConfigError:  # it is not valid by itself
        return ""


def parse_valid_attachments(request: Request) -> tuple[str, set[tuple[str, str]] | None]:
    """GC's network, and the (container ID, interface) of its valid attachments; None where there is no such list.

    An absent list is not an empty one: cnitool sends none. Source: SPEC.md 1.1.0, section 4, GC.
    """
    valid = None
    network = _network(request.config.get("name"), "name")
    for key in "cni.dev/attachments", "cni.dev/valid-attachments":  # the first is libcni's older name
        if request.config.get(key) is not None:
            valid = set()
            for index, item in enumerate(_list(request.config[key], key)):
                entry = _object(item, f"{key}[{index}]")
                for field in "containerID", "ifname":
                    if type(entry.get(field)) is not str:
                        raise ConfigError(f"{key}[{index}]")
                valid.add((str(entry["containerID"]), str(entry["ifname"])))
    return network, valid


# --- what the runtime sends: prevResult, runtimeConfig, CNI_ARGS ----------------------------------------------


def _object(value: object, path: str) -> dict[str, object]:
    if value is None:
        return {}
    if type(value) is not dict:
        raise ConfigError(path)
    return value


def _list(value: object, path: str) -> list[object]:
    if value is None:
        return []
    if type(value) is not list:
        raise ConfigError(path)
    return value


def _addresses(config: dict[str, object], ifname: str, needed: bool) -> tuple[list[Address], tuple[str, ...]]:
    """The container's addresses on `ifname`, or on no interface in particular.

    And the interfaces in no sandbox, by their names: the host's end of the container's link, a bridge. `needed`:
    whether an address there that no container can have is refused.
    """
    result = _object(config.get("prevResult"), "prevResult")
    sandboxed, links = [], []
    for index, item in enumerate(_list(result.get("interfaces"), "prevResult.interfaces")):
        path = f"prevResult.interfaces[{index}]"
        interface = _object(item, path)
        name, sandbox = interface.get("name", ""), interface.get("sandbox") or ""
        if type(name) is not str:
            raise ConfigError(f"{path}.name")
        if type(sandbox) is not str:
            raise ConfigError(f"{path}.sandbox")
        sandboxed.append(name == ifname and sandbox != "")
        if not sandbox and name != ifname and is_ifname(name):
            links.append(name)
    found: list[Address] = []
    for index, item in enumerate(_list(result.get("ips"), "prevResult.ips")):
        path = f"prevResult.ips[{index}]"
        entry = _object(item, path)
        address = parse_cidr(entry.get("address"), f"{path}.address")
        at = entry.get("interface")
        at = -1 if at is None else _integer(at, -1 << 31, 1 << 31, f"{path}.interface")
        if not 0 <= at < len(sandboxed) or sandboxed[at]:
            if needed:
                _refuse_unreachable(address, f"{path}.address")
            found.append(address)
    for key in "ip4", "ip6":  # results of cniVersion 0.1.0 and 0.2.0
        entry = _object(result.get(key), f"prevResult.{key}")
        if entry:
            address = parse_cidr(entry.get("ip"), f"prevResult.{key}.ip")
            if needed:
                _refuse_unreachable(address, f"prevResult.{key}.ip")
            found.append(address)
    return found, tuple(links)


def _refuse_unreachable(address: Address, path: str) -> None:
    """Raise ConfigError for an address to which nothing can be forwarded: localhost, none at all, or of many."""
    ip = address.ip
    multicast = ip[:2] == "ff" if address.family == 6 else 224 <= int(ip.partition(".")[0]) < 240
    if multicast or is_localhost(ip) or ip in ("0.0.0.0", "::", "255.255.255.255"):
        raise ConfigError(path, "an address of the container, not one of localhost, a multicast group or none at all")


POD_NAME_MAX = 253  # characters, as Kubernetes has it


def _pod(args: str) -> str:
    """The container's name for people, from CNI_ARGS: "namespace/pod", a name alone (podman, nerdctl), "" for none.

    A value that cannot be a name is left out: it is for people's eyes, and no reason to refuse a container.
    """
    found = dict(item.partition("=")[::2] for item in args.split(";"))
    namespace, name, host = (value if is_name(value) and len(value) <= POD_NAME_MAX else "" for value in (
        found.get(key, "") for key in ("K8S_POD_NAMESPACE", "K8S_POD_NAME", "NERDCTL_CNI_DHCP_HOSTNAME")))
    name = name or host
    if namespace == name and not found.get("K8S_POD_UID"):  # a container's name, of which podman 3 makes both
        return name
    return f"{namespace}/{name}" if namespace and name else name


MAPPINGS = "runtimeConfig.portMappings"


def _runtime_mappings(config: dict[str, object]) -> object:
    runtime = _object(config.get("runtimeConfig"), "runtimeConfig")
    if "portMappings" not in runtime and runtime:
        runtime = config["runtimeConfig"] = as_go_reads(runtime, ("portMappings",))
    return runtime.get("portMappings")


def parse_mappings(value: object, at: str, policy: "Policy | None" = None) -> list[Port]:
    """Every port that the list `value` asks for, in both families; what is said twice is meant once."""
    published: dict[tuple[int, str, str, int, int], Port] = {}
    for index, item in enumerate(_list(value, at)):
        path = f"{at}[{index}]"
        if type(item) is not dict:
            raise ConfigError(path)
        host_port = container_port = 0
        protocol, hosts = "tcp", policy.hosts if policy else EVERY_ADDRESS
        for name, field in item.items():
            key = name.lower()  # containerd capitalises: HostPort
            if key == "hostport":
                host_port = _integer(field, 1, 65535, f"{path}.{name}")
            elif key == "containerport":
                container_port = _integer(field, 1, 65535, f"{path}.{name}")
            elif key == "protocol" and field not in (None, ""):
                protocol = field.lower() if type(field) is str else ""
                if protocol not in PROTOCOLS:
                    raise ConfigError(f"{path}.{name}")
            elif key == "hostip" and field not in (None, ""):
                family, host_ip = parse_ip(field, f"{path}.{name}")
                hosts = ((family, "" if host_ip in ("0.0.0.0", "::") else host_ip),)  # of all: each of that family
        if not host_port or not container_port:
            raise ConfigError(path)
        for family, host_ip in policy.reachable(hosts, path) if policy else hosts:
            port = Port(family, protocol, host_ip, host_port, container_port)
            own = container_port if policy and policy.is_routed(family) else 0  # there a host port is nobody's
            same = published.setdefault((family, protocol, host_ip, host_port, own), port)
            if same.container_port != container_port:
                raise ConfigError(path, f"one container port: {port} is mapped twice, to container ports "
                                        f"{same.container_port} and {container_port}")
    return list(published.values())


def _warn_of_skipped(wanted: list[Port], addresses: dict[int, Address]) -> None:
    kept = {(port.protocol, port.host_port, port.container_port) for port in wanted
            if port.family in addresses and not port.host_ip}
    for port in wanted:
        if port.family not in addresses and (port.protocol, port.host_port, port.container_port) not in kept:
            warn(f"{port} is not published: the container has no IPv{port.family} address")
