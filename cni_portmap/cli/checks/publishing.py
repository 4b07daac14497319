"""Is the port published, by whom, where: what comes before any packet."""
from collections.abc import Iterator
from typing import Any

from ... import ruleset
from ...attachment import Attachment, Port
from ...cni import CniError
from ...firewall.claims import ANY, REFERENCE, Claim, claims, publisher
from ...libcni_cache import CACHE_DIRS, Gone, Memory, args_of, load
from ...linux.host import RTN_LOCAL, Listener, inside, other_namespaces, process_of
from ...linux.host import listeners as listeners_here
from ...linux.kernel import Kernel
from ...ruleset import PROTOCOL_NUMBERS, claim_of
from ...verbs.steps import shared_chains
from .finding import ERROR, INFO, OUTSIDE, WARNING, Check, Finding
from .podman import calls_another
from .scene import Scene, Target, end, packed, shown

RESERVERS = ("conmon", "docker-proxy", "rootlesskit", "rootlessport", "nerdctl", "containerd-roo", "slirp4netns",
             "pasta", "podman")  # they hold a port that they publish, and answer nothing
HOLDER = "conmon"  # accepts no connection, where others of these forward them
LIST = "cni-portmap list"
NAME = "K8S_POD_NAME"  # the name that a runtime has given a container; another one may have had it before
ANSWERED = ("host-process", "published-by-other")  # explain others although the port may answer


def asked(scene: Scene) -> str:
    """The port that was asked for."""
    return f"{scene.port}/{scene.protocol}"


# --- it is not published ---------------------------------------------------------------------------------------

def _not_published(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.port is not None and not scene.targets and not scene.asks_container:
        yield NOT_PUBLISHED.found(
            f"nobody publishes {asked(scene)} on this host",
            [f"no entry in the maps of table {ruleset.TABLE}: {LIST} --port {scene.port}",
             "no DNAT rule of anybody else for it: nft list ruleset"],
            f"publish it with the runtime's port option (podman run -p {scene.port}:PORT, hostPort in a pod), or for a "
            f"container that runs: cni-portmap publish CONTAINER {scene.port}:PORT/{scene.protocol}")


def _remembered(scene: Scene) -> Memory:
    if scene.memory is None:
        scene.memory = Memory(CACHE_DIRS, kernel=scene.kernel)
    return scene.memory


def _lost_from_kernel(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.port is not None and scene.targets:
        return
    there = {(target.family, target.protocol, target.port) for target in scene.targets} if scene.port is not None else \
        {(line.family, line.protocol, port) for line in scene.lines for port in line.host_ports}
    for path, found in _remembered(scene).found:
        if not isinstance(found, Attachment):
            continue
        lost = [port for port in found.ports if (port.family, port.protocol, port.host_port) not in there and
                (scene.port is None or (port.host_port, port.protocol) == (scene.port, scene.protocol))]
        lost = [port for port in lost if not any(_leads(claim, found, port) for claim in _claims(scene))]
        if lost:
            ports = ", ".join(dict.fromkeys(f"{port.host_port}/{port.protocol}" for port in lost))
            yield LOST_FROM_KERNEL.found(
                f"{ports} of container {found.pod or found.container_id} was published, and its rules are gone from "
                "the kernel",
                [f"{path} says that its runtime published it, and its network namespace {found.netns} lives",
                 f"table {ruleset.TABLE} has no entry for it: {LIST}"],
                "cni-portmap restore, which re-creates the rules that a flush or a firewall's reload has removed")


def _leads(claim: Claim, attachment: Attachment, port: Port) -> bool:
    """Whether somebody else's rule leads a port to its container, as the reference plugin's do until it is adopted."""
    return claim.has(port.family, PROTOCOL_NUMBERS[port.protocol], port.host_port) and \
        claim.target == packed(attachment.addresses[port.family].ip)


def _container_stopped(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.port is None or scene.targets:
        return
    for path, found in _remembered(scene).found:
        if not isinstance(found, Gone):
            continue
        document = _document(path)
        mappings = (document.get("capabilityArgs") or {}).get("portMappings") or ()
        ports = {(_key(mapping, "hostport"), str(_key(mapping, "protocol") or "tcp").lower())
                 for mapping in mappings if isinstance(mapping, dict)}
        if (scene.port, scene.protocol) in ports:
            name, number = args_of(document).get(NAME, ""), found.container_id[:12]
            living = {args_of(_document(its)).get(NAME, "") for its, each in _remembered(scene).found
                      if not isinstance(each, Gone)}
            yield CONTAINER_STOPPED.found(
                f"container {f'{name} ({number})' if name else number}, which published {asked(scene)}, has ended",
                [f"libcni's cache knows of it: {path}", f"it has ended: {found}"] +
                ([f"another container of the name {name} is there, and publishes other ports or none"]
                 if name and name in living else []),
                f"start it again by its ID: podman start {number}, or as its runtime does; if it was removed, run it "
                "again, or another one, with this port")


def _document(path: str) -> dict[str, Any]:
    document = load(path)
    return document if isinstance(document, dict) else {}


def _key(mapping: dict[str, Any], name: str) -> object:
    return next((value for key, value in mapping.items() if key.lower() == name), None)


def _other_protocol(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.other_protocols:
        others = " and ".join(scene.other_protocols)
        yield OTHER_PROTOCOL.found(
            f"{scene.port} is published for {others}, not for {scene.protocol}",
            [f"its entry is for {others}: {LIST} --port {scene.port}"],
            f"ask for {scene.port}/{scene.other_protocols[0]}, or publish it for {scene.protocol} too: "
            f"-p {scene.port}:PORT/{scene.protocol}")


def _claims(scene: Scene) -> list[Claim]:
    if scene.claims is None:
        scene.claims = claims(scene.rulesets, ("inet", ruleset.TABLE_NAME))
    return scene.claims


def _by_other(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.port is None:
        yield from _of_reference(scene)
    if scene.port is None or scene.targets:
        return
    number = PROTOCOL_NUMBERS[scene.protocol]
    for claim in _claims(scene):
        if claim.has(claim.family, number, scene.port) and claim.ports != ANY:
            who = publisher(claim.chain) or f"table {claim.chain.family} {claim.chain.table}"
            where = f"{shown(claim.target) or 'an address that it chooses'}" + (
                f", port {claim.port}" if claim.port else "")
            on = f" on {shown(claim.daddr)}" if claim.daddr else ""
            owner = _owner_of_target(scene, claim)
            yield BY_OTHER.found(
                f"{asked(scene)}{on} is published by {who}, not by cni-portmap: it leads to {where}" +
                (f", container {owner}" if owner else ""),
                [f"{claim.chain}: a DNAT rule for port {scene.port}; see {_listing(claim)}"],
                "cni-portmap adopt, which takes over the containers that run, and removes the rules of those that "
                "have ended" if who == REFERENCE else
                f"look for the container of {who} that has this port; to have it published by cni-portmap, remove it "
                "there first and start its container with a network that uses cni-portmap",
                severity=INFO if who == REFERENCE and owner else ERROR)._replace(
                    table=f"{claim.chain.family} {claim.chain.table}", chain=claim.chain.name,
                    backend=claim.chain.backend)
            return


def _owner_of_target(scene: Scene, claim: Claim) -> str:
    """The container that libcni knows to live where a rule leads, "" for none."""
    return next((found.pod or found.container_id for _, found in _remembered(scene).found
                 if isinstance(found, Attachment) and claim.target is not None and
                 claim.target in [packed(address.ip) for address in found.addresses.values()]), "")


def _of_reference(scene: Scene) -> Iterator[Finding]:
    """What the host in general has of it: containers from before this plugin was installed, or called."""
    found = scene.kernel.leftovers(lambda *_: True) if scene.kernel.has_reference() else []
    owners = [*dict.fromkeys(map(str, found))]
    if owners:
        yield BY_OTHER.found(
            f"{REFERENCE} publishes the ports of {len(owners)} container{'s' * (len(owners) > 1)}, not cni-portmap",
            [f"{LIST} --all", *owners], "cni-portmap adopt, which takes them over; until then they answer as before",
            severity=INFO)


def _listing(claim: Claim) -> str:
    chain = claim.chain
    if chain.backend != "nft":
        return f"{'ip6tables' if chain.family == 'ip6' else 'iptables'}-legacy -t {chain.table} -S {chain.name}"
    return f"nft list chain {chain.family} {chain.table} {chain.name}"


def _another_plugin(scene: Scene, target: Target | None) -> Iterator[Finding]:
    found = calls_another() if scene.port is None or not scene.targets else None
    if found:
        theirs, ours, folders = found
        first = ours.rpartition("/")[0]
        order = ", ".join(f'"{each}"' for each in (first, *(folder for folder in folders if folder != first)))
        yield ANOTHER_PLUGIN.found(
            f"podman calls {theirs}, and not {ours}, which is cni-portmap's", ["podman takes the first portmap of "
            f"{', '.join(folders)}"], f"cni_plugin_dirs = [{order}] under [network] in "
            "/etc/containers/containers.conf; then cni-portmap adopt takes over the containers that run")


def _elsewhere(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.port is None or scene.targets:
        return
    number = PROTOCOL_NUMBERS[scene.protocol]
    for path, process in other_namespaces():
        try:
            with inside(path):
                kernel = Kernel()
                owner = _owner_of(kernel, number, scene.port)
                kernel.close()
        except (OSError, CniError):
            continue
        if owner:
            yield ELSEWHERE.found(
                f"{asked(scene)} is published in another network namespace, that of {process}, by container {owner}",
                [f"nsenter --net={path} cni-portmap list --port {scene.port}"],
                "a rootless runtime publishes inside its own namespace, and forwards ports to it by a process on this "
                "host: see that this process runs (rootlesskit, rootlessport, pasta), or start the container as root")
            return


def _owner_of(kernel: Kernel, protocol: int, port: int) -> str:
    if not kernel.has_table():
        return ""
    for element, chain in kernel.elements():
        if claim_of(element)[1] == protocol and claim_of(element)[3] == port and chain:
            return kernel.owner(chain).container_id
    return ""


def _container_port(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.port is None or scene.targets or scene.asks_container:
        return
    for line in scene.lines:
        if scene.port in line.container_ports and line.protocol == scene.protocol:
            host_port = line.host_ports[line.container_ports.index(scene.port)]
            if host_port != scene.port:
                yield CONTAINER_PORT.found(
                    f"{scene.port} is the port inside container {line.pod or line.container_id[:24]}; on this host it "
                    f"is {host_port}", [f"{end(line.host_ip, host_port)}/{line.protocol} leads to "
                                     f"{end(line.container_ip, scene.port)}: {LIST} --port {host_port}"],
                    f"connect to port {host_port}; or publish it under its own number: -p {scene.port}:{scene.port}")
                return


def _listeners(scene: Scene, protocol: str) -> list[Listener]:
    if protocol not in scene.here:
        scene.here[protocol] = listeners_here(protocol)
    return scene.here[protocol]


def _host_process(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.port is None or scene.targets:
        return
    for listener in _listeners(scene, scene.protocol):
        process = (process_of(listener.inode) or "a process") if listener.port == scene.port else ""
        if process and not process.startswith(HOLDER):
            yield HOST_PROCESS.found(
                f"{process} of this host listens on {asked(scene)}: nothing has to be published",
                [f"{end(shown(listener.ip), listener.port)}: ss -lnp sport = :{scene.port}"],
                "if it does not answer, look at that program, at the address that it listens on, and at the input "
                "rules of this host's firewall: nft list ruleset")
            return


# --- it is, but not as asked -----------------------------------------------------------------------------------

def _hostip_not_here(scene: Scene, target: Target) -> Iterator[Finding]:
    if target.is_wildcard or target.is_localhost:
        return
    if scene.host.type_of(target.family, packed(target.host_ip)) != RTN_LOCAL:
        nonlocal_bind = scene.sysctl(f"net/ipv{target.family}/ip_nonlocal_bind") == "1"
        yield HOSTIP_NOT_HERE.found(
            f"{target} is published on {target.host_ip}, which is no address of this host"
            + (" now (it may be another node's: net.ipv4.ip_nonlocal_bind=1)" if nonlocal_bind else ""),
            [f"ip address show to {target.host_ip}: nothing"],
            "give this host the address, if it should have it; or publish the port on another address, or on every "
            f"one: -p {target.port}:{target.container_port}", severity=WARNING if nonlocal_bind else ERROR)


def _other_address(scene: Scene, target: Target) -> Iterator[Finding]:
    if scene.to is None or target is not scene.targets[0]:
        return
    mine = [each for each in scene.targets if len(scene.to) == (4 if each.family == 4 else 16)]
    if scene.asks_container:
        return  # the container's own address: see closed-by-exposure
    if any(each.is_wildcard for each in mine) and not scene.is_own(scene.to):
        yield OTHER_ADDRESS.found(
            f"{shown(scene.to)} is no address of this host: {asked(scene)} answers there only if a router or a cloud "
            "translates it to one", [f"ip address show to {shown(scene.to)}: nothing"],
            "see that what translates it leads here, and ask again with the address of this host that it leads to: "
            "ip address", (OUTSIDE,), severity=WARNING)
    if any(each.is_wildcard or packed(each.host_ip) == scene.to for each in mine):
        return
    where = ", ".join(str(each) for each in scene.targets)
    yield OTHER_ADDRESS.found(
        f"{asked(scene)} is not published on {shown(scene.to)}, but on {where}", [f"{LIST} --port {scene.port}"],
        f"connect to one of those, or publish it on {shown(scene.to)}, or on every address: -p "
        f"{scene.port}:{target.container_port}")


def _on_localhost(scene: Scene, target: Target) -> Iterator[Finding]:
    if scene.client is None or target is not scene.targets[0] or scene.is_own(scene.client):
        return
    if all(each.is_localhost for each in scene.targets):
        yield ON_LOCALHOST.found(
            f"{asked(scene)} is published on this host's localhost only, where {shown(scene.client)} cannot come",
            [f"{each}: {LIST} --port {scene.port}" for each in scene.targets],
            f"publish it on every address, or on one that clients reach: -p {scene.port}:{target.container_port}")


def _next_sandboxes(target: Target) -> str:
    """The containers (IDs) of the same pod that stand by for a port, "" for none."""
    found = (each.partition("/")[0] for each in target.line.standby)
    return ", ".join(dict.fromkeys(each[:24] for each in found if each != target.line.container_id))


def _owner_dead(scene: Scene, target: Target) -> Iterator[Finding]:
    if target.line.owner == "dead":
        following = _next_sandboxes(target)
        yield OWNER_DEAD.found(
            f"container {target.name}, which {target.label} leads to, is gone: its rules were left behind" +
            (f", and container {following} of the same pod stands by" if following else ""),
            [f"OWNER is dead: {LIST} --port {target.port}", f"its network namespace was {target.line.netns}"],
            "cni-portmap gc, which removes the rules of dead containers" +
            (", and so hands the port over" if following else "; a new container can take the port even without that"))


def _stood_by(scene: Scene, target: Target) -> Iterator[Finding]:
    following = _next_sandboxes(target)
    if following and target.line.owner != "dead":
        yield STOOD_BY.found(
            f"{target.label} leads to container {target.line.container_id[:24]}, and container {following} of the same "
            "pod stands by: it gets the port when its runtime removes the other one",
            [f"OWNER is {target.line.owner}, {following[:12]} stands by: {LIST} --port {target.port}"],
            "wait for the runtime; if it never removes the last sandbox, end what keeps its network namespace "
            f"{target.line.netns} alive, and call cni-portmap gc")


# --- the table --------------------------------------------------------------------------------------------------

def _dormant(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if scene.kernel.is_dormant():
        yield DORMANT.found(
            f"table {ruleset.TABLE} is dormant: somebody has switched all published ports off",
            [f"flags dormant: nft list table {ruleset.TABLE}"],
            f"cni-portmap restore --base-only, or: nft 'add table {ruleset.TABLE}'")


def _damaged(scene: Scene, target: Target | None) -> Iterator[Finding]:
    if not scene.kernel.has_table():
        return
    foreign = ""
    try:
        text = shared_chains([], scene.kernel)
    except CniError as error:
        text, foreign = "x", error.msg
    if text and not scene.kernel.is_dormant():
        yield DAMAGED.found(
            f"somebody has changed the chains of table {ruleset.TABLE} that all published ports need",
            [f"rules are missing there, or in another order{f' ({foreign})' if foreign else ''}: "
             f"nft list table {ruleset.TABLE}; cni-portmap restore --base-only --dry-run"],
            "cni-portmap restore --base-only" + (", after the foreign rule is deleted: nft -a list chain "
                                                 f"{foreign.rpartition('chain ')[2].split(' ')[0]}" if foreign else ""))
        return
    for each in [target] if target else scene.targets:
        if not each.container_ip:
            yield DAMAGED.found(
                f"the rule that leads {each.label} to container {each.name} was deleted from table {ruleset.TABLE}",
                [f"CONTAINER is (no rule): {LIST} --port {each.port}",
                 f"nft list chain {ruleset.TABLE} {each.chain}"], "cni-portmap restore; if libcni has no cache of the "
                "container, start it again")
        elif scene.port is not None and not scene.asks_container and scene.trips(each) and not any(
                trip.journey.dnat or trip.journey.maybe_dnat or trip.journey.lost == "yes" or
                trip.journey.state == "untracked" for trip in scene.trips(each)) and not _is_conditional(scene, each):
            yield DAMAGED.found(
                f"no rule of table {ruleset.TABLE} translates packets for {each.label}, though the port is published",
                [f"nft list table {ruleset.TABLE}"], "cni-portmap restore --base-only; cni-portmap restore")


def _is_conditional(scene: Scene, target: Target) -> bool:
    """Whether the rule of a port asks for more than ADD does by itself: conditionsV4, conditionsV6."""
    for chain, _, raw, _ in scene.kernel.rules(target.chain):
        if chain and b"nat\0" in raw:
            from ...linux.expressions import NFTA_LOOKUP_SET, dnat_rules, expressions
            if not any(rule.protocol == target.number and target.port in rule.ports and
                       len(rule.target) == (4 if target.family == 4 else 16)
                       for rule in dnat_rules(raw, scene.kernel.set_elements)):
                continue
            for name, fields in expressions(raw):
                if name in ("meta", "payload"):
                    found = tuple(int.from_bytes(fields.get(kind, b""), "big") for kind in (2, 3))
                    destination = (1, 16 if target.family == 4 else 24)
                    usual = found[0] in (15, 16) if name == "meta" else found in ((2, 2), destination)
                    if not usual:
                        return True
                elif name not in ("cmp", "counter", "immediate", "nat", "range") and not (
                        fields.get(NFTA_LOOKUP_SET, b"").startswith(f"{target.chain}/".encode())):
                    return True
    return False


def _excluded(scene: Scene, target: Target) -> Iterator[Finding]:
    if not target.container_ip or not _is_conditional(scene, target):
        return
    trips = [trip for trip in scene.trips(target) if trip.path == OUTSIDE] or scene.trips(target)
    missed = [trip for trip in trips if trip.journey.dnat is None and trip.journey.lost != "yes"]
    if not missed:
        return
    certain = [trip for trip in missed if not trip.journey.maybe_dnat]
    who = f"packets from {shown(scene.client)}" if scene.client else "packets of every client" if certain else \
        "packets of some clients"
    yield EXCLUDED.found(
        f"the conditions of container {target.name} leave out {who} for {target.label}",
        [f"conditionsV{target.family} in its network's configuration; the rule: "
         f"nft list chain {ruleset.TABLE} {target.chain}"],
        f"change conditionsV{target.family} of network {target.line.network}, and start the container again",
        (OUTSIDE,), severity=ERROR if certain else INFO if scene.client is None else WARNING)


def _only_one_family(family: int) -> "Any":
    def find(scene: Scene, target: Target) -> Iterator[Finding]:
        if scene.port is None or target is not scene.targets[0] or not target.is_wildcard:
            return
        if {each.family for each in scene.targets} == {family} and scene.uplinks(10 - family):
            check = ONLY_IPV4 if family == 4 else ONLY_IPV6
            yield check.found(
                f"{asked(scene)} is published for IPv{family} only",
                [f"container {target.name} has no IPv{10 - family} address, or its hostIP is one of IPv{family}: "
                 f"{LIST} --port {scene.port}"],
                f"clients have to use an IPv{family} address of this host; for both, give the network a subnet of "
                f"IPv{10 - family}")
    return find


def _shadowed(scene: Scene, target: Target) -> Iterator[Finding]:
    if scene.port is None or target is not scene.targets[0]:
        return
    for listener in _listeners(scene, target.protocol):
        if listener.port == target.port:
            process = process_of(listener.inode)
            if process and not process.startswith(RESERVERS):
                yield SHADOWED.found(
                    f"{process} of this host listens on {target.port}/{target.protocol} too: clients reach the "
                    "container in its place", [f"ss -lnp sport = :{target.port}"],
                    f"if clients should reach that program, stop container {target.name}, or publish it on another "
                    "port")
                return


PUBLISHED = ("published-other-protocol", "published-by-other", "published-in-other-namespace", "container-port-asked",
             "lost-from-kernel", "container-stopped", "host-process", "table-dormant")
NOT_PUBLISHED = Check("not-published", ERROR, "Nobody publishes the port.",
                      "Publish it with the runtime's port option.", _not_published, PUBLISHED)
LOST_FROM_KERNEL = Check(
    "lost-from-kernel", ERROR, "The rules were removed, by `nft flush ruleset` or a firewall's reload; the container "
    "runs, and libcni's cache knows its ports.", "`cni-portmap restore`", _lost_from_kernel)
CONTAINER_STOPPED = Check("container-stopped", ERROR, "The container is down; libcni's cache knows that it had the "
                          "port.", "Start it.", _container_stopped, ("published-by-other",))
OTHER_PROTOCOL = Check("published-other-protocol", ERROR, "It is published for TCP and asked for by UDP, or the other "
                       "way round.", "Publish it for both.", _other_protocol)
BY_OTHER = Check("published-by-other", ERROR, "Docker, netavark, the reference plugin or somebody else publishes it. "
                 "An info for running containers of the reference plugin.", "Look for the container there; "
                 "`cni-portmap adopt`", _by_other, ("lost-from-kernel",))
ANOTHER_PLUGIN = Check("podman-calls-another", INFO, "podman finds another portmap before this one: it takes the first "
                       "in its folders.", "`cni_plugin_dirs` in containers.conf", _another_plugin)
ELSEWHERE = Check("published-in-other-namespace", ERROR, "A rootless runtime publishes it inside its own network "
                  "namespace.", "Look at the process that forwards ports from this host into it.", _elsewhere,
                  ("lost-from-kernel", "container-stopped", "published-by-other", "published-other-protocol"))
CONTAINER_PORT = Check("container-port-asked", ERROR, "The number is the container's port, and another one is "
                       "published.", "Use the host's port.", _container_port)
HOST_PROCESS = Check("host-process", INFO, "A process of this host, or a container on the host's network, has the "
                     "port.", "Nothing is to be published.", _host_process, ("published-by-other",))
HOSTIP_NOT_HERE = Check("hostip-not-here", ERROR, "It is published on an address that has left this host (DHCP, a "
                        "virtual IP). A warning with `ip_nonlocal_bind`.",
                        "Give the address back, or publish on another.", _hostip_not_here)
OTHER_ADDRESS = Check("published-on-other-address", ERROR, "It is published on other addresses than the one asked "
                      "for (`--to`). A warning where that is no address of this host.", "Use those, or publish it on "
                      "this one.", _other_address)
ON_LOCALHOST = Check("published-on-localhost", ERROR, "It is published on localhost, and the client (`--from`) is not "
                     "this host.", "Publish it on every address.", _on_localhost)
OWNER_DEAD = Check("owner-dead", ERROR, "A crash left the rules of a container that is gone.", "`cni-portmap gc`",
                   _owner_dead)
STOOD_BY = Check("next-sandbox-stands-by", INFO, "The pod's last sandbox has the port until its runtime removes it; "
                 "the next one stands by.", "Wait for the runtime's DEL.", _stood_by)
DORMANT = Check("table-dormant", ERROR, "Somebody has switched the table off.", "`cni-portmap restore --base-only`",
                _dormant)
DAMAGED = Check("table-damaged", ERROR, "Somebody has edited the table.", "`cni-portmap restore`", _damaged,
                ("table-dormant", "owner-dead", "taken-by-other", "excluded-by-condition", "notrack", "hostip-not-here",
                 "published-on-other-address", "published-on-localhost"))
EXCLUDED = Check("excluded-by-condition", ERROR, "`conditionsV4` or `conditionsV6` leaves the client out.",
                 "Change the conditions.", _excluded)
ONLY_IPV4 = Check("only-ipv4", INFO, "The container has no IPv6 address, or is published for IPv4 only.",
                  "Use an IPv4 address.", _only_one_family(4))
ONLY_IPV6 = Check("only-ipv6", INFO, "The container has no IPv4 address, or is published for IPv6 only.",
                  "Use an IPv6 address.", _only_one_family(6))
SHADOWED = Check("host-process-shadowed", INFO, "A program of this host listens on the port too; clients reach the "
                 "container.", "Use another port for one of them.", _shadowed)

# For the port, or the host; and for each published port of it.
OF_PORT = (LOST_FROM_KERNEL, CONTAINER_STOPPED, OTHER_PROTOCOL, BY_OTHER, ANOTHER_PLUGIN, ELSEWHERE, CONTAINER_PORT,
           HOST_PROCESS, NOT_PUBLISHED, DORMANT, DAMAGED)
OF_TARGET = (OWNER_DEAD, STOOD_BY, HOSTIP_NOT_HERE, OTHER_ADDRESS, ON_LOCALHOST, EXCLUDED, ONLY_IPV4, ONLY_IPV6,
             SHADOWED)
