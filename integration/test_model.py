"""A random walk: calls, deaths, damage, races, and after every step the kernel holds what a simple model says.

WALK_STEPS steps (2,000) of the walk WALK_SEED (another one each time; it is printed). The model knows who owns
what, and nothing of nftables; `observed` reads the kernel with nft. Most calls run in a fork of this process, some
through the executable. In the end real clients connect to everything that may be published.
"""
import contextlib
import itertools
import os
import pathlib
import random
import re
import socket
from typing import Any, NamedTuple

import lab
from lab import TABLE, GcCall, Host, Pod, fork

STEPS = int(os.environ.get("WALK_STEPS", "2000"))
SEED = int(os.environ.get("WALK_SEED", random.randrange(1 << 32)))

SANDBOXES, POD = 3, "shop/web"  # the first containers are sandboxes of one pod
CONTAINERS, SLOTS = 6, 8  # slot: an address; the next container gets a free one, so addresses come again
INTERFACES = {"eth0": "lan", "net1": "wan"}  # interface: its network
HOST_IPS = "192.0.2.1", "192.0.2.9", "2001:db8::1"
PUBLISHED = "", "", "0.0.0.0", "::", "127.0.0.1", "::1", *HOST_IPS  # hostIP
HOST_PORTS, CONTAINER_PORTS, PROTOCOLS = range(8000, 8005), (80, 81), ("tcp", "udp")

Claim = tuple[str, str, str]  # as nft writes it: address or family, protocol, port


# --- the model ------------------------------------------------------------------------------------------------

class Owned(NamedTuple):
    """An attachment: its record, where its rules lead to, and which claims lead to its rules."""

    network: str
    netns: str  # path#inode, "" if the record is lost
    link: str  # of the host's end of its link, as name#index, "" if none is known
    pod: str  # "namespace/name", "" if none is known
    targets: "tuple[tuple[Claim, str], ...]"
    claims: frozenset[Claim]
    standby: "tuple[tuple[str, str], ...]"  # who publishes some of it too: interface and container, "" for its own


NOBODY = Owned("", "", "", "", (), frozenset(), ())
State = dict[str, Owned]  # by chain
BASE = frozenset(("dispatch", "guard", "guard_input", "prerouting", "output", "postrouting"))


class Luck(NamedTuple):
    """What a model cannot know of an ADD.

    `number_is_used`: a dead owner without a link lives by its number, which a namespace of another test has now.
    `buries`: it meets the dead, for whom others stand by, before it meets the living who refuse it.
    """

    number_is_used: bool
    buries: bool

    def is_dead(self, chain: str, owned: Owned, pod: Pod) -> bool:
        """Whether an owner is dead to a container that asks: for one, if that has its interface in its namespace."""
        if owned.link:
            return is_dead(owned)
        is_replaced = owned.netns.partition("#")[2] == inode(pod.netns) and container_of(chain) != pod.id and \
            chain.rpartition("/")[2] == pod.ifname
        return is_replaced or (is_dead(owned) and not self.number_is_used)


ALL_LUCK = [Luck(*each) for each in itertools.product((False, True), repeat=2)]
IMPOSSIBLE = -2  # no call's code


class Model:  # noqa: PLW1641  # compared, never in a set
    """The state that the kernel should hold: the owner of each claim, and the pieces of the base that are whole."""

    def __init__(self, owned: State | None = None, base: frozenset[str] = frozenset()) -> None:
        self.owned, self.base = dict(owned or {}), base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and (self.owned, self.base) == (other.owned, other.base)

    def __repr__(self) -> str:
        return "\n".join([f"base {sorted(self.base)}", *(f"{chain} {owned}" for chain, owned in self.owned.items())])

    def add(self, pod: Pod, luck: Luck) -> "tuple[int, Model]":
        """The code and the state that an ADD leads to."""
        buried = self.buried(pod, luck)
        if luck.buries or buried is self:
            return buried._add(pod, luck)
        code, _ = self._add(pod, luck)
        return code or IMPOSSIBLE, self

    def buried(self, pod: Pod, luck: Luck) -> "Model":
        """The state when an ADD has removed the dead whose ports it wants, and for whom others stand by."""
        for chain, owned in self._in_the_way(pod):
            if luck.is_dead(chain, owned, pod) and \
                    any(container != container_of(chain) for _, container in self._heirs(chain)):
                return self.without({chain}).buried(pod, luck)
        return self

    def _in_the_way(self, pod: Pod) -> list[tuple[str, Owned]]:
        return [(chain, owned) for chain, owned in self.owned.items() if chain != pod.chain and
                any(overlap(claim, other) for claim in targets_of(pod) for other in owned.claims)]

    def _heirs(self, chain: str) -> list[tuple[str, str]]:
        """Interface and container of those who stand by for a chain, and are there."""
        found = dict.fromkeys((ifname, container or container_of(chain))
                              for ifname, container in self.owned[chain].standby)
        return [(ifname, container) for ifname, container in found if f"c/{container}/{ifname}" in self.owned]

    def _add(self, pod: Pod, luck: Luck) -> "tuple[int, Model]":
        wanted, before = targets_of(pod), self.owned.get(pod.chain, NOBODY)
        gone, mates = {pod.chain}, set()
        for chain, owned in self._in_the_way(pod):
            if luck.is_dead(chain, owned, pod):
                gone.add(chain)
            elif is_of_this_life(owned, pod) if container_of(chain) == pod.id else is_next_sandbox(pod, owned):
                mates.add(chain)
            else:
                return 101, self
        left = self.without(gone, {*before.claims} - {*wanted}).owned
        claims = frozenset(wanted).difference(*(self.owned[mate].claims for mate in mates))
        left[pod.chain] = Owned(pod.network, f"{pod.netns}#{inode(pod.netns)}", link(pod.link), pod_of(pod),
                                tuple(sorted(wanted.items())), claims, before.standby)
        for mate in mates:
            if {*wanted} & self.owned[mate].claims:
                known = [(ifname, container) for ifname, container in left[mate].standby
                         if container in ("", pod.id) or f"c/{container}/{ifname}" in self.owned]
                note = (pod.ifname, "" if container_of(mate) == pod.id else pod.id)
                left[mate] = left[mate]._replace(standby=tuple(dict.fromkeys((*known, note))))
        return 0, Model(left, BASE)

    def without(self, chains: "set[str]", released: "set[Claim] | None" = None) -> "Model":
        """The model without these attachments. Ports among `released` (default: all) go on where somebody stands by:
        another interface of the container, then the newest sandbox of the pod; last those whose link has gone."""
        left = {chain: owned for chain, owned in self.owned.items() if chain not in chains}
        for chain in (chain for chain in self.owned if chain in chains):
            heirs = [who for who in self._heirs(chain) if f"c/{who[1]}/{who[0]}" in left]
            oldest_first = [*dict.fromkeys(container for _, container in heirs)]
            free = {claim for claim in self.owned[chain].claims if released is None or claim in released}
            for who in sorted(heirs, key=lambda who: (
                    has_no_link_left(left[f"c/{who[1]}/{who[0]}"]), who[1] != container_of(chain),
                    -oldest_first.index(who[1]))):
                mate = f"c/{who[1]}/{who[0]}"
                its = free & wanted_by(left[mate], free)
                free -= its
                if its:
                    notes = ((ifname, "" if container == who[1] else container)
                             for ifname, container in heirs if (ifname, container) != who)
                    left[mate] = left[mate]._replace(claims=left[mate].claims | its, standby=tuple(
                        dict.fromkeys((*left[mate].standby, *notes))))
        return Model(left, self.base)

    def check(self, pod: Pod, luck: Luck) -> int:
        """The code of a CHECK."""
        wanted, owned = targets_of(pod), self.owned.get(pod.chain)
        led = {claim for chain, mate in self.owned.items() if container_of(chain) == pod.id or (
            is_next_sandbox(pod, mate) and (pod.ifname, pod.id) in mate.standby and not luck.is_dead(chain, mate, pod))
            for claim in mate.claims}
        whole = owned and owned.targets == tuple(sorted(wanted.items())) and {*wanted} <= led and \
            owned.netns == f"{pod.netns}#{inode(pod.netns)}" and not is_dead(owned)
        return 0 if whole and self.base == BASE else 104


def container_of(chain: str) -> str:
    return chain.split("/")[1]


def wanted_by(mate: Owned, free: set[Claim]) -> set[Claim]:
    """What may be had by one that stands by. Its rule for one address may have come of a port of every address and a
    condition: so also that of every address, unless it has one of such a rule's addresses, or is offered it."""
    targets = {*dict(mate.targets)}
    every = {(claim, ("ipv6" if ":" in claim[0] else "ipv4", *claim[1:])) for claim in targets
             if not claim[0].startswith("ipv")}
    has = mate.claims | free
    return targets | {wildcard for _, wildcard in every} - {wildcard for claim, wildcard in every if claim in has}


def pod_of(pod: Pod) -> str:
    return POD if pod.args else ""


def is_of_this_life(owned: Owned, pod: Pod) -> bool:
    """Whether an owner with a container's ID is in its namespace, as far as is known, and not of an earlier life."""
    return owned.netns.partition("#")[2] in ("", inode(pod.netns))


def is_next_sandbox(pod: Pod, owned: Owned) -> bool:
    """Whether a container that asks is another sandbox of an owner's pod."""
    return bool(pod.args) and owned.pod == POD


def targets_of(pod: Pod) -> dict[Claim, str]:
    """Each claim of a pod, and where it leads to."""
    v4, v6 = (ip.partition("/")[0] for ip in pod.ips)
    found = {}
    for port in pod.ports:
        ip = str(port["hostIP"])
        for family, target in ("ipv4", f"{v4}:{port['containerPort']}"), ("ipv6", f"{v6}:{port['containerPort']}"):
            if not ip or (":" in ip) == (family == "ipv6"):
                address = family if ip in ("", "0.0.0.0", "::") else ip
                found[address, str(port["protocol"]), str(port["hostPort"])] = target
    return found


def overlap(one: Claim, other: Claim) -> bool:
    """Whether two claims cannot have different owners, as in bind(2)."""
    def family(claim: Claim) -> str:
        return claim[0] if claim[0].startswith("ipv") else "ipv6" if ":" in claim[0] else "ipv4"
    return one[1:] == other[1:] and family(one) == family(other) and \
        (one[0] == other[0] or family(one) in (one[0], other[0]))


def inode(path: str) -> str:
    return str(os.stat(path).st_ino) if os.path.exists(path) else ""


def link(name: str) -> str:
    """An interface of the host as name#index, "" for none."""
    return f"{name}#{socket.if_nametoindex(name)}" if name else ""


def has_no_link_left(owned: Owned) -> bool:
    """Whether the host's end of a link is known to be gone."""
    return bool(owned.link) and is_dead(owned)


def is_dead(owned: Owned) -> bool:
    """By its link; by its namespace, which any name may lead to, where no link is known."""
    if owned.link:
        return all(index != int(owned.link.rpartition("#")[2]) for index, _ in socket.if_nameindex())
    number = owned.netns.partition("#")[2]
    if not number or number in {inode(str(path)) for path in pathlib.Path("/run/netns").iterdir()}:
        return False
    for process in pathlib.Path("/proc").glob("[0-9]*"):  # somebody else's by now, whose tests run beside
        with contextlib.suppress(OSError):
            if f"net:[{number}]" in (os.readlink(process / "ns/net"), *(process / "mountinfo").read_text().split()):
                return False
    return True


# --- the kernel -----------------------------------------------------------------------------------------------

def observed() -> Model:
    """The state of the kernel, as nft shows it. A piece of the base is whole if it is as in the beginning."""
    claims: dict[str, set[Claim]] = {}
    entries = lab.listing()
    for claim, chain in lab.elements(entries).items():
        claims.setdefault(chain, set()).add(claim)
    rules: dict[str, list[dict[str, Any]]] = {}
    hooks = {}
    for entry in entries:
        if "chain" in entry:
            rules.setdefault(entry["chain"]["name"], [])
            hooks[entry["chain"]["name"]] = entry["chain"]
        elif "rule" in entry:
            rules.setdefault(entry["rule"]["chain"], []).append(entry["rule"])
    owned = {}
    for chain, its_rules in rules.items():
        if chain.startswith("c/"):
            record = next((rule["comment"] for rule in its_rules if "comment" in rule), "")
            found = re.fullmatch(r"net=(\S+) netns=(\S+?)(?: link=(\S+))?(?: pod=(\S+))?", record)
            targets = tuple(sorted(filter(None, map(_target, its_rules))))
            standby = (re.fullmatch(r"also on (\S+)(?: of (\S+))?", rule.get("comment", "")) for rule in its_rules)
            network, netns, its_link, its_pod = found.groups("") if found else ("", "", "", "")
            owned[chain] = Owned(network, netns, its_link, its_pod, targets, frozenset(claims.pop(chain, ())),
                                 tuple((note[1], note[2] or "") for note in standby if note))
    assert not claims, f"elements of nobody: {claims}"
    pictures = {chain: str((hooks[chain], rules[chain])) for chain in BASE & {*rules}}
    for chain, picture in pictures.items():
        _whole.setdefault(chain, picture)  # the first is right: test_damage looks at each rule
    return Model(owned, frozenset(chain for chain, picture in pictures.items() if picture == _whole[chain]))


_whole: dict[str, str] = {}


def _target(rule: dict[str, Any]) -> tuple[Claim, str] | None:
    """The claim that a rule translates, and to where; None for other rules."""
    translation = next((part["dnat"] for part in rule["expr"] if "dnat" in part), None)
    if not translation:
        return None
    address, (protocol, port) = "", ("", "")
    for match in (part["match"] for part in rule["expr"] if "match" in part):
        left = match["left"]
        if "payload" in left and left["payload"]["field"] == "dport":
            protocol, port = left["payload"]["protocol"], str(match["right"])
        else:
            address = match["right"]
    return (address, protocol, port), f"{translation['addr']}:{translation['port']}"


# --- the world ------------------------------------------------------------------------------------------------

class World:
    """The containers that live, and a walk through what may happen to them."""

    def __init__(self, host: Host, seed: int) -> None:
        self.host, self.random = host, random.Random(seed)
        self.model = Model()
        self.slots: dict[int, int] = {}  # container: its slot
        self.born = 0
        self.log: list[str] = []
        self.counts: dict[str, int] = {}
        self.devices: dict[int, str] = {}  # container: the host's end of its wire
        self.pods: dict[str, Pod] = {}  # the last that was asked for, by chain
        for container in range(CONTAINERS):
            self.birth(container)

    # --- containers ---

    def birth(self, container: int) -> None:
        """A container begins (again), with an address that is free: perhaps a dead one's, still in the rules."""
        slot = self.random.choice([slot for slot in range(1, SLOTS + 1) if slot not in self.slots.values()])
        self.slots[container] = slot
        self.born += 1
        device = self.devices[container] = f"w{container}.{self.born}"
        lab.wire(f"c{container}", (f"10.20.{slot}.1/24", f"fd20:{slot}::1/64"),
                 (f"10.20.{slot}.2/24", f"fd20:{slot}::2/64"), device)

    def death(self, container: int) -> None:
        lab.delete_link(self.devices[container])
        lab.delete_namespace(f"c{container}")
        del self.slots[container]

    def pod(self, container: int, ifname: str) -> Pod:
        """A runtime's present request for a container that lives."""
        slot = self.slots[container]
        pod = Pod(f"c{container}", ips=(f"10.20.{slot}.2/24", f"fd20:{slot}::2/64"), ifname=ifname,
                  network=INTERFACES[ifname], link=self.random.choice(("", self.devices[container])),
                  args="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web" if container < SANDBOXES else "")
        claims: set[Claim] = set()
        for _ in range(self.random.choice((1, 1, 2, 3))):
            ip, port = self.random.choice(PUBLISHED), self.random.choice(HOST_PORTS)
            protocol, to = self.random.choice(PROTOCOLS), self.random.choice(CONTAINER_PORTS)
            asked = lab.mapping(f"{f'[{ip}]' if ':' in ip else ip}:{port}:{to}/{protocol}")
            new = {*targets_of(_with(pod, asked))}
            if not any(overlap(claim, old) for claim in new for old in claims):
                claims |= new
                pod.ports.append(asked)
        return pod

    # --- calls ---

    def outcome(self, verb: str, what: "Pod | GcCall", model: Model, luck: Luck) -> tuple[int, Model]:
        """The model's expectation of a call: its code, and the state after it."""
        if isinstance(what, GcCall):
            return 0, model.without({chain for chain, owned in model.owned.items()
                                    if owned.network == what.network and chain not in what.chains})
        if verb == "ADD":
            return model.add(what, luck)
        if verb == "DEL":
            return 0, model.without({what.chain})
        return model.check(what, luck), model

    def draw(self, only: str = "") -> "tuple[str, Pod | GcCall]":
        """A call that a runtime may make."""
        verb = only or self.random.choices(("ADD", "DEL", "CHECK", "GC"), (10, 6, 3, 1))[0]
        if verb == "GC":
            network = self.random.choice((*INTERFACES.values(), "unknown"))
            alive = [pod for pod in self.pods.values() if self.random.random() < 0.8]
            return verb, GcCall(network, *alive)
        known = [chain for chain in self.model.owned if chain in self.pods]
        if verb != "ADD" and known and self.random.random() < 0.8:
            return verb, self.pods[self.random.choice(known)]
        container, ifname = self.random.randrange(CONTAINERS), self.random.choice((*INTERFACES, "eth0"))
        if container not in self.slots:
            return "DEL", self.pods.get(f"c/c{container}/{ifname}") or Pod(f"c{container}", ifname=ifname)
        pod = self.pod(container, ifname)
        if verb == "ADD":
            self.pods[pod.chain] = pod
        return verb, pod

    def call(self, only: str = "") -> None:
        verb, what = self.draw(only)
        self.log[-1] += f": {verb} {describe(what)}"
        outcomes = [self.outcome(verb, what, self.model, luck) for luck in ALL_LUCK]
        reply = self.host.call(verb, what) if self.random.random() < 0.04 else fork(verb, what)
        assert reply.code in [code for code, _ in outcomes], reply
        self.settle([expected for code, expected in outcomes if code == reply.code])

    def crash(self) -> None:
        """A call that is killed, at a random system call."""
        verb, what = self.draw()
        instant = self.random.randrange(140)
        self.log[-1] += f": {verb} {describe(what)} at {instant}"
        expected = [self.outcome(verb, what, self.model, luck)[1] for luck in ALL_LUCK]
        if verb == "ADD" and isinstance(what, Pod):
            expected += [self.model.buried(what, luck) for luck in ALL_LUCK]
        lab.start_fork(verb, what, stop_at=instant).answer()
        bases = [Model(self.model.owned, model.base) for model in expected]  # ADD repairs the base first
        self.settle([self.model, *expected, *bases])
        if verb == "ADD" and isinstance(what, Pod):  # localhost is opened last
            device = self.devices[int(what.id[1:])]
            pathlib.Path(f"/proc/sys/net/ipv4/conf/{device}/route_localnet").write_text("1")
            lab.run("ip", "-6", "route", "append", "local", "::1", "dev", device, "table", "local", "proto", "static",
                    "metric", "4096", check=False)

    def race(self) -> None:
        """Calls at the same time: answers and outcome are those of one order or another."""
        calls = [self.draw() for _ in range(self.random.choice((2, 2, 3, 4)))]
        self.log[-1] += ": " + ", ".join(f"{verb} {describe(what)}" for verb, what in calls)
        under_way = [lab.start_fork(verb, what) for verb, what in calls]
        codes = [each.answer().code for each in under_way]
        found, orders = observed(), []
        for order, luck in itertools.product(itertools.permutations(range(len(calls))), ALL_LUCK):
            model, expected = self.model, [0] * len(calls)
            for index in order:
                expected[index], model = self.outcome(*calls[index], model, luck)
            if expected == codes and model == found:
                self.model = model
                return
            orders.append((expected, model))
        raise AssertionError(f"no order explains {codes} and\n{found}\n\nexpected one of {orders}")

    # --- what others do ---

    def toggle(self) -> None:
        container = self.random.randrange(CONTAINERS)
        if container in self.slots:
            self.log[-1] += f": death of c{container}"
            self.death(container)
        else:
            self.log[-1] += f": birth of c{container}"
            self.birth(container)

    def flush(self) -> None:
        lab.nft_script("flush ruleset")
        lab.keep_conntrack()
        self.settle([Model()])

    def damage(self) -> None:
        """Somebody removes a piece."""
        owned, base = dict(self.model.owned), self.model.base
        choices = [chain for chain in base if chain != "dispatch"] if self.random.random() < 0.5 else [*owned]
        if not choices:
            return
        chain = self.random.choice(sorted(choices))
        if chain in base:
            command = self.random.choice((f"delete chain {TABLE} {chain}", f"flush chain {TABLE} {chain}",
                                          f"flush chain {TABLE} dispatch"))
            base -= {chain if f" {chain}" in command else "dispatch"}
        elif owned[chain].claims and self.random.random() < 0.5:
            claim = self.random.choice(sorted(owned[chain].claims))
            name = "hostports" if claim[0].startswith("ipv") else f"hostip{6 if ':' in claim[0] else 4}_hostports"
            command = f"delete element {TABLE} {name} {{ {' . '.join(claim)} }}"
            owned[chain] = owned[chain]._replace(claims=owned[chain].claims - {claim})
        else:
            command = f"flush chain {TABLE} {chain}"
            owned[chain] = owned[chain]._replace(network="", netns="", link="", pod="", targets=(), standby=())
        self.log[-1] += f": {command}"
        lab.nft_script(command)
        self.settle([Model(owned, base)])

    # --- the walk ---

    def settle(self, expected: list[Model]) -> None:
        """The kernel holds what one of the `expected` models says."""
        found = observed()
        for model in expected:
            if found == model:
                self.model = model
                return
        raise AssertionError("the kernel holds\n" + f"{found}\n\nexpected\n" + "\nor\n".join(map(repr, expected)))

    def step(self, number: int) -> None:
        kind, = self.random.choices(("call", "race", "crash", "toggle", "damage", "flush"), (140, 16, 24, 12, 7, 1))
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.log = [*self.log[-30:], f"{number} {kind}"]
        getattr(self, kind)()

    def connect(self, client: lab.Namespace) -> int:
        """Real clients connect to whatever may be published: they reach whom the model says. How many did."""
        names = {f"10.20.{slot}.2": container for container, slot in self.slots.items()}
        names |= {f"fd20:{slot}::2": container for container, slot in self.slots.items()}
        servers = [lab.Server(f"c{container}:{port}", lab.Netns(f"/run/netns/c{container}"), port, protocol)
                   for container in self.slots for port in CONTAINER_PORTS for protocol in PROTOCOLS]
        led = {claim: dict(owned.targets).get(claim, "") for owned in self.model.owned.values()
               for claim in owned.claims}
        answered = 0
        for ip, port, protocol in itertools.product(HOST_IPS, HOST_PORTS, PROTOCOLS):
            wildcard = "ipv6" if ":" in ip else "ipv4"
            target = led.get((ip, protocol, str(port)), led.get((wildcard, protocol, str(port)), ""))
            address, _, to = target.rpartition(":")
            expected = f"c{names[address]}:{to}" if address in names else None
            saw = lab.exchange(client, ip, port, protocol, timeout=lab.patience(expected))
            assert (saw.server if saw else None) == expected, f"{protocol} {ip} {port} leads to {saw}"
            answered += saw is not None
        for server in servers:
            server.close()
        return answered


def _with(pod: Pod, port: dict[str, object]) -> Pod:
    other = pod.but()
    other.ports = [port]
    return other


def describe(what: "Pod | GcCall") -> str:
    if isinstance(what, GcCall):
        return f"{what.network} but {sorted(what.chains)}"
    return " ".join((what.chain, *(f"{port['hostIP']}:{port['hostPort']}:{port['containerPort']}/{port['protocol']}"
                                   for port in what.ports)))


def test_after_each_step_the_kernel_holds_what_the_model_says(host):
    """After every step of a random walk the kernel holds what a model says, and packets go where it says."""
    print(f"WALK_SEED={SEED} WALK_STEPS={STEPS}")
    lan = lab.wire("client", ("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
    lab.add_addresses(lan.host_device, "192.0.2.9/24")
    world = World(host, SEED)
    answered = 0
    try:
        for number in range(1, STEPS + 1):
            world.step(number)
            if not number % 500 or number == STEPS:
                for _ in range(20):
                    world.log.append("before clients connect")
                    world.call("ADD")
                answered += world.connect(lan)
    except BaseException:
        print("the last steps:", *world.log, sep="\n  ")
        raise
    print(f"{world.counts}, {answered} connections")
    assert answered
