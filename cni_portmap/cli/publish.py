"""cni-portmap publish."""
import argparse
import ipaddress
import json
import sys
from typing import Any

from ..attachment import Attachment, parse_ip
from ..cni import INVALID_CONFIG, INVALID_ENVIRONMENT, CniError, ConfigError, tell
from ..libcni_cache import CACHE_DIRS, Skipped, args_of, documents, with_mappings
from ..linux import companion
from ..linux.host import Host, inside, is_own_namespace, listeners
from ..linux.kernel import Kernel
from ..ruleset import PROTOCOL_NUMBERS, Owner
from ..verbs.exposed import modes_of
from ..verbs.publish import operators_ports, owners_of, publish
from .checks.container import serves
from .checks.scene import EVERY, Target, end
from .shared_options import add_cache, add_plugin

HELP = "publish ports of a container that runs, until it stops"
AMBIGUOUS = 2  # exit status: more than one container fits
Mapping = dict[str, Any]


def mapping(text: str) -> Mapping:
    """[HOSTIP:]HOSTPORT:PORT[/PROTOCOL], as runtimes' -p has it."""
    ports, _, protocol = text.partition("/")
    head, _, container = ports.rpartition(":")
    ip, _, host = head.rpartition(":")
    wrong = argparse.ArgumentTypeError(f"{text!r}: expected [HOSTIP:]HOSTPORT:PORT[/PROTOCOL], such as 8080:80 or "
                                       "127.0.0.1:5353:53/udp")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) < 65536 for part in (host, container)) or \
            (protocol and protocol not in PROTOCOL_NUMBERS) or text.endswith("/"):
        raise wrong
    try:
        shown = parse_ip(ip.strip("[]"), "")[1] if ip else ""
    except ConfigError:
        raise wrong from None
    return {"hostIP": shown, "hostPort": int(host), "containerPort": int(container), "protocol": protocol or "tcp"}


def container(text: str) -> str:
    """A container's name; the empty one, as of a variable that is not set, would be the beginning of any."""
    if not text:
        raise argparse.ArgumentTypeError("'': expected the beginning of a container's ID, or a name")
    return text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("container", metavar="CONTAINER", type=container,
                        help="the beginning of its ID, the name of its pod, or its own")
    parser.add_argument("ports", metavar="[HOSTIP:]HOSTPORT:PORT[/PROTOCOL]", nargs="+", type=mapping)
    add_cache(parser)
    add_plugin(parser)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Publish them, beside those that were published so before; 2 if more than one container fits."""
    found = find(options.container, options.cache or CACHE_DIRS, options.plugin, kernel)
    if len(found) > 1:
        return ambiguous(options, found)
    document, = found.values()
    _refuse_unreachable(document)
    asked = {_key(each): each["containerPort"] for each in options.ports}
    for each in options.ports:
        if asked[_key(each)] != each["containerPort"]:
            raise CniError(INVALID_CONFIG, f"host port {each['hostPort']}/{each['protocol']} is asked for twice",
                           "nothing was published: a host port leads to one port")
    before = operators_ports(kernel, document["containerId"], document["ifName"])
    anew = {key for each in options.ports for key in keys_of(each)}
    wanted = [*(each for each in mappings_of(before) if _key(each) not in anew),
              *{_key(each): each for each in options.ports}.values()]
    try:
        attachment = with_mappings(document, wanted, options.plugin, kernel)
    except Skipped as reason:
        raise CniError(INVALID_CONFIG, f"cannot publish ports of container {document['containerId']}: {reason}",
                       "nothing was published") from None
    publish(attachment, kernel)
    tell()
    hints = [*_hints(attachment, options.ports)]
    if options.json:
        print(json.dumps({"container": attachment.container_id, "interface": attachment.ifname,
                          "network": attachment.network, "ports": wanted, "hints": hints}, indent=2))
        return 0
    for each in options.ports:
        its = [port for port in attachment.ports
               if (port.protocol, port.host_port) == (each["protocol"], each["hostPort"])]
        for ip in [each["hostIP"]] if each["hostIP"] else dict.fromkeys(port.host_ip or "*" for port in its):
            print(f"published {end(ip, each['hostPort'])}/{each['protocol']} -> port {each['containerPort']} of "
                  f"container {attachment.pod or attachment.container_id}")
    print("until the container stops, or its network is reloaded; " + (
        "the agent restores it after a flush of the rules" if companion.is_healing() else
        "after a flush of the rules publish it again: no runtime knows of it, and no agent restores it"))
    for hint in hints:
        print(f"but: {hint}")
    return 0


def _key(each: Mapping) -> tuple[str, int, str]:
    return each["hostIP"], each["hostPort"], each["protocol"]


def keys_of(each: Mapping) -> set[tuple[str, int, str]]:
    """The keys of all that a mapping stands for: without an address, also what is published for one family only."""
    return {(ip, each["hostPort"], each["protocol"]) for ip in ([each["hostIP"]] if each["hostIP"] else
                                                               ("", *EVERY.values()))}


def mappings_of(lines: "list[Any]") -> list[Mapping]:
    """The mappings of published lines, as they were asked for: no address stands for every one of both families."""
    there = {(line.host_ip, host, line.protocol): container for line in lines
             for host, container in zip(line.host_ports, line.container_ports, strict=True)}
    found: dict[tuple[str, int, str], Mapping] = {}
    for (ip, host, protocol), container in there.items():
        both = ip in EVERY.values() and all(there.get((each, host, protocol)) == container for each in EVERY.values())
        each = {"hostIP": "" if both else ip, "hostPort": host, "containerPort": container, "protocol": protocol}
        found[_key(each)] = each
    return [*found.values()]


def ambiguous(options: argparse.Namespace, found: "dict[tuple[str, str], dict[str, Any]]") -> int:
    """Name the containers that fit."""
    print(f"cni-portmap: {options.container} fits more than one container:", file=sys.stderr)
    for container_id, ifname in found:
        print(f"  {container_id}  {ifname}", file=sys.stderr)
    return AMBIGUOUS


# --- which container -------------------------------------------------------------------------------------------

def find(name: str, folders: Any, plugin: str, kernel: Kernel) -> dict[tuple[str, str], dict[str, Any]]:
    """The attachments that fit a name, as documents of libcni's cache, by container ID and interface.

    By what libcni has cached; for a container that only our table knows, by its record. Raises CniError(4) for none.
    """
    if "/" in name and name.startswith("/"):
        raise CniError(INVALID_ENVIRONMENT, f"{name}: a path does not say which container it is", "nothing was "
                       "published: no runtime's DEL would remove it; give the container's ID: see podman ps, nerdctl "
                       "ps, crictl ps")
    found = {}
    for document in documents(folders):
        names = args_of(document)
        pod = names.get("K8S_POD_NAME", "")
        its = str(document.get("containerId", ""))
        if its and (its.startswith(name) or (name in (pod, f"{names.get('K8S_POD_NAMESPACE', '')}/{pod}") and pod)):
            found[its, str(document.get("ifName", ""))] = document
    for owner in owners_of(kernel, name):
        key = owner.container_id, owner.ifname
        if key not in found:
            found[key] = _document(owner, plugin)
    if not found:
        raise CniError(INVALID_ENVIRONMENT, f"no container with a CNI network is called {name}",
                       "nothing was published: give the beginning of its ID (podman ps, nerdctl ps, crictl pods). One "
                       "on the host's network has the host's ports already; one without a network, or a rootless one, "
                       "cannot be reached from here")
    exact = {key: document for key, document in found.items() if key[0] == name}
    first = exact or found
    if len({container_id for container_id, _ in first}) == 1:  # several networks: the first is the one with the ports
        key = next(iter(first))
        return {key: first[key]}
    return first


def document_of(owner: Owner, folders: Any, plugin: str) -> dict[str, Any]:
    """What libcni has cached of an owner's own interface, or would have."""
    return next((each for each in documents(folders) if (each.get("containerId"), each.get("ifName")) ==
                 (owner.container_id, owner.ifname)), None) or _document(owner, plugin)


def _document(owner: Owner, plugin: str) -> dict[str, Any]:
    """What libcni would have cached of an owner: its addresses are read inside."""
    import base64
    try:
        with inside(owner.netns):
            host = Host()
    except OSError as error:
        raise CniError(INVALID_ENVIRONMENT, f"the network namespace of {owner} cannot be looked at: {error.strerror}",
                       "nothing was published") from None
    ips = [{"address": f"{ipaddress.ip_address(each.ip)}/{each.length}", "interface": 0} for each in host.addresses
           if each.link == owner.ifname and not each.is_link_local]
    host.close()
    link = owner.link.rpartition("#")[0]
    conflist = json.dumps({"cniVersion": "1.0.0", "name": owner.network or "unknown",
                           "plugins": [{"type": plugin, **modes_of(owner)}]})
    interfaces = [{"name": owner.ifname, "sandbox": owner.netns}, *([{"name": link}] if link else [])]
    namespace, _, pod = owner.pod.rpartition("/")
    return {"kind": "cniCacheV1", "containerId": owner.container_id, "ifName": owner.ifname, "netns": owner.netns,
            "networkName": owner.network or "unknown", "config": base64.b64encode(conflist.encode()).decode(),
            "cniArgs": [["K8S_POD_NAMESPACE", namespace]] * bool(namespace) + [["K8S_POD_NAME", pod]] * bool(pod),
            "result": {"cniVersion": "1.0.0", "interfaces": interfaces, "ips": ips}}


def _refuse_unreachable(document: dict[str, Any]) -> None:
    """Raise CniError(4) where this host cannot reach the container: say which network it has, and what helps."""
    path, ifname, name = str(document.get("netns") or ""), str(document.get("ifName")), str(document["containerId"])
    if not path:
        return
    if is_own_namespace(path):
        raise CniError(INVALID_ENVIRONMENT, f"container {name} uses the host's network: its ports are the host's own "
                       "already", "there is nothing to publish")
    try:
        with inside(path):
            host = Host()
    except OSError:
        return
    link = host.link(ifname)
    others = [each for each in host.links.values() if not each.is_loopback]
    host.close()
    if not others:
        raise CniError(INVALID_ENVIRONMENT, f"container {name} has no network but its own localhost: nothing can be "
                       "led to it", "start it with a bridge network")
    if link and link.kind in ("macvlan", "ipvlan", "macvtap", "ipvtap"):
        ips = [str(ipaddress.ip_address(each.ip)) for each in host.addresses
               if each.link == ifname and not each.is_link_local]
        raise CniError(INVALID_ENVIRONMENT, f"container {name} is on {link.kind}: this host cannot reach it through "
                       f"{ifname} (the kernel keeps a parent and what is on it apart), so a published port would lead "
                       "nowhere", f"talk to {', '.join(ips)} itself, or give it a bridge network as well")


def _hints(attachment: Attachment, ports: list[Mapping]) -> "Any":
    """What keeps a port from answering now: nothing listens, or only on the container's own localhost."""
    from ..verbs.published import Published
    try:
        with inside(attachment.netns):
            sockets = {protocol: listeners(protocol) for protocol in {each["protocol"] for each in ports}}
    except OSError:
        return
    for each in ports:
        number, protocol = each["containerPort"], each["protocol"]
        mine = [socket for socket in sockets[protocol] if socket.port == number]
        line = Published(4, protocol, "", (), "", (), "", "", "", None, "", "", "", "")
        targets = [Target(family, protocol, "", 0, address.ip, number, line)
                   for family, address in attachment.addresses.items()]
        if any(serves(socket, target) for socket in mine for target in targets) or protocol == "sctp":
            continue
        ip = next(iter(attachment.addresses.values())).ip
        where = f"port {number}/{protocol}"
        if mine:
            relay = f"socat {protocol.upper()}-LISTEN:{number},bind={ip},fork {protocol.upper()}:127.0.0.1:{number}"
            yield f"the program listens on {where} of the container's own localhost only: let it listen on 0.0.0.0; " \
                f"or, while it runs: nsenter --net={attachment.netns} {relay}"
        else:
            yield f"nothing in the container listens on {where} yet"
