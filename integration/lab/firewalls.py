"""Rulesets at random, as others write them: nft, iptables-nft and iptables-legacy; and what is done to a connection.

A lab of three: a client on a LAN, a host that publishes a port, a container behind it. `Difference` is what the reader
of rules (cni_portmap.firewall) says otherwise than the kernel does.
"""
import contextlib
import random
import re
from collections.abc import Iterator
from socket import AF_INET, AF_INET6, inet_pton
from typing import NamedTuple

from .namespaces import HOST, Namespace, fresh_host, wire
from .processes import run
from .servers import PATIENT, Client, Server
from .tables import nft

from cni_portmap.firewall.journey import Journey, Traveller
from cni_portmap.firewall.packet import MAYBE, YES, Packet
from cni_portmap.firewall.walk import Walker
from cni_portmap.linux.host import Host
from cni_portmap.linux.rulesets import Rulesets

PUBLISHED, WEB = 8080, 80
NETS = {4: {"client": "203.0.113.2", "lan": "203.0.113.1", "container": "10.88.0.2", "other": "10.88.0.3",
            "gate": "10.88.0.1", "bits": 24},
        6: {"client": "2001:db8::2", "lan": "2001:db8::1", "container": "fd88::2", "other": "fd88::3",
            "gate": "fd88::1", "bits": 64}}
KINDS = ("nft", "iptables-nft", "iptables-legacy")


class Difference(NamedTuple):
    """A connection for which the reader is wrong: `said` YES (lost), NO or MAYBE; `server`: who answered, or ""."""

    kind: str
    seed: int
    family: int
    path: str
    said: str
    expected: str
    server: str
    rules: str


class Lab:
    """Client, host, container; the host publishes PUBLISHED with a rule of its own. A context manager."""

    def __enter__(self) -> "Lab":
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(fresh_host())
        self.client = self._machine("fw-client", "lan0", "lan", "client")
        self.container = self._machine("fw-web", "cni0", "gate", "container")
        self.other = self._machine("fw-other", "cni1", "", "other")
        for family in 4, 6:
            net = NETS[family]
            for name, machine, ip in ("web", self.container, net["container"]), ("other", self.other, net["other"]):
                self._stack.enter_context(Server(name, machine, WEB, ip=str(ip)))
            self._stack.enter_context(Server("host", HOST, PUBLISHED, ip=str(net["lan"])))
            bits = 32 if family == 4 else 128
            run("ip", f"-{family}", "route", "add", f"{net['other']}/{bits}", "dev", "cni1")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _machine(self, name: str, device: str, host: str, its: str) -> Namespace:
        hosts = tuple(f"{NETS[family][host]}/{NETS[family]['bits']}" for family in (4, 6)) if host else ()
        machine = wire(name, hosts, tuple(f"{NETS[family][its]}/{NETS[family]['bits']}" for family in (4, 6)), device)
        self._stack.callback(machine.remove)
        if not host:  # it has no address of the host's; what it answers goes to the link
            run("ip", "link", "set", device, "up")
            run("ip", "netns", "exec", name, "ip", "route", "add", "default", "dev", "eth0")
            run("ip", "netns", "exec", name, "ip", "-6", "route", "add", "default", "dev", "eth0")
            for path in f"ipv4/conf/{device}", f"ipv6/conf/{device}":
                with open(f"/proc/sys/net/{path}/proxy_{'arp' if '4' in path else 'ndp'}", "w") as file:
                    file.write("1")
            run("ip", "-6", "neigh", "add", "proxy", NETS[6]["client"], "dev", device)
            run("ip", "-6", "neigh", "add", "proxy", NETS[6]["lan"], "dev", device)
        return machine

    def clear(self) -> None:
        """Remove all rules, and publish the port again."""
        for program in "iptables-legacy", "ip6tables-legacy":
            for table in "filter", "nat", "mangle", "raw":
                run(program + "-restore", input=_empty(table))
        nft("-f", "-", input="flush ruleset\n" + _publisher())

    def try_one(self, kind: str, seed: int) -> Iterator[Difference | bool]:
        """Load a ruleset and compare; a Difference, or whether the reader was certain, for each connection."""
        rng = random.Random(f"{kind} {seed}")
        family = rng.choice((4, 6))
        rules = RANDOM[kind](rng, family)
        self.clear()
        rules = load(kind, family, rules)
        rulesets, host = Rulesets(), Host()
        try:
            for path in "client", "host":
                journey = self.journey(rulesets, host, family, path)
                expected = self.server_of(journey, family)
                server = self.connect(family, path, expected)
                said = journey.lost
                # What this host itself answers, where the port is not translated, is not led through the rules.
                wrong = said != MAYBE and server != expected and (expected, server) != ("host", "")
                yield Difference(kind, seed, family, path, said, expected, server, rules) if wrong else said != MAYBE
        finally:
            rulesets.close()
            host.close()

    def journey(self, rulesets: Rulesets, host: Host, family: int, path: str) -> Journey:
        """The reader's opinion on a connection to the published port."""
        net, domain = NETS[family], AF_INET if family == 4 else AF_INET6
        lan = inet_pton(domain, str(net["lan"]))
        if path == "client":
            packet = Packet(family, 6, inet_pton(domain, str(net["client"])), lan, PUBLISHED, iif="lan0")
        else:
            packet = Packet(family, 6, lan, lan, PUBLISHED, local=True)
        return Traveller(Walker(rulesets, host), host).travel(packet)

    @staticmethod
    def server_of(journey: Journey, family: int) -> str:
        """The server that answers by the reader's opinion, "" for none."""
        if journey.lost == YES or (journey.state == "untracked" and journey.dnat is not None):
            return ""
        address, port = journey.destination
        domain = AF_INET if family == 4 else AF_INET6
        for name, its, its_port in (("web", "container", WEB), ("other", "other", WEB), ("host", "lan", PUBLISHED)):
            if (address, port) == (inet_pton(domain, str(NETS[family][its])), its_port):
                return name
        return ""

    def connect(self, family: int, path: str, expected: str) -> str:
        """The server that answers, "" for none. Where one is expected, there is more time for it."""
        for timeout in (0.1, PATIENT) if expected else (0.1,):
            with contextlib.suppress(OSError):
                where = self.client if path == "client" else HOST
                with Client(where, str(NETS[family]["lan"]), PUBLISHED, timeout=timeout) as client:
                    saw = client.ask()
                    if saw:
                        return saw.server
        return ""


def load(kind: str, family: int, rules: str) -> str:
    """Load the rules of a kind, less the lines that its program does not take; what was loaded."""
    prefix = "iptables" if family == 4 else "ip6tables"
    lines = rules.splitlines()
    for _ in range(20):
        try:
            text = "\n".join(lines) + "\n"
            if kind == "nft":
                nft("-f", "-", input=text)
            else:
                run(f"{prefix}-{kind.partition('-')[2]}-restore", "-n", input=text)
            return text
        except AssertionError as error:
            wrong = {int(number) for found in re.findall(r"/dev/stdin:(\d+):|[Ll]ine:? (\d+)", str(error))
                     for number in found if number}
            if not wrong:
                raise
            lines = ["" if index in wrong else line for index, line in enumerate(lines, 1)]
    raise AssertionError(f"no ruleset: {rules}")


def _publisher() -> str:
    lines = [f"meta nfproto ipv{family} fib daddr type local tcp dport {PUBLISHED} dnat ip{'6' if family == 6 else ''} "
             f"to {_bracket(NETS[family]['container'], family)}:{WEB}" for family in (4, 6)]
    text = "; ".join(lines)
    return f"table inet publisher {{ chain pre {{ type nat hook prerouting priority -100; {text}; }}; " \
           f"chain out {{ type nat hook output priority -100; {text}; }}; " \
           "chain track { type filter hook forward priority 300; ct state new counter; }; }\n"


def _bracket(ip: object, family: int) -> str:
    return f"[{ip}]" if family == 6 else str(ip)


def _empty(table: str) -> str:
    chains = {"filter": ("INPUT", "FORWARD", "OUTPUT"), "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
              "raw": ("PREROUTING", "OUTPUT")}.get(table, ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"))
    return "\n".join((f"*{table}", *(f":{chain} ACCEPT" for chain in chains), "COMMIT", ""))


# --- nft ------------------------------------------------------------------------------------------------------

def random_nft(rng: random.Random, family: int) -> str:
    """Tables in the language of nft."""
    tables = []
    for number in range(rng.randint(1, 2)):
        kind = rng.choice(("inet", "ip" if family == 4 else "ip6"))
        lines = [f"table {kind} random{number} {{", *_nft_sets(rng, family)]
        depth = 3
        for level in range(depth):  # a chain jumps to deeper ones only
            lines += [f"chain user{level} {{", *(f"  {_nft_rule(rng, family, level + 1, depth)}"
                                                for _ in range(rng.randint(0, 3))), "}"]
        order = lines[1:]
        for index in range(rng.randint(1, 3)):
            hook = rng.choice(("prerouting", "forward", "forward", "postrouting", "output", "input"))
            priority = rng.choice((-350, -250, -150, -50, 0, 10, 150) if hook in ("prerouting", "output") else
                                  (-150, -50, 0, 10, 90, 150))
            policy = rng.choice(("accept", "accept", "accept", "drop"))
            order += [f"chain base{index} {{", f"  type filter hook {hook} priority {priority}; policy {policy};",
                      *_DISCOVERY[family],
                      *(f"  {_nft_rule(rng, family, 0, depth, hook, priority)}" for _ in range(rng.randint(1, 5))), "}"]
        if rng.random() < 0.3:
            hook, priority = rng.choice(("prerouting", "output")), rng.choice((-150, -101, -99, 0))
            target = rng.choice(("container", "other"))
            to = f"dnat {'to' if kind != 'inet' else ('ip' if family == 4 else 'ip6') + ' to'} " \
                f"{_bracket(NETS[family][target], family)}:{WEB}"
            order += ["chain nat {", f"  type nat hook {hook} priority {priority};",
                      f"  {_nft_match(rng, family, hook, priority)} tcp dport {PUBLISHED} {to}", "}"]
        # User chains must be there before they are named.
        tables += [f"table {kind} random{number} {{", *[f"chain user{level} {{ }}" for level in range(depth)], "}",
                   lines[0], *order, "}"]
    return "\n".join(tables) + "\n"


# Neighbour discovery is another packet, and what is known already is not asked for: so it is no part of the comparison.
_DISCOVERY = {4: (), 6: ("  meta l4proto ipv6-icmp accept",)}


def _nft_sets(rng: random.Random, family: int) -> list[str]:
    ip, net = ("ip" if family == 4 else "ip6"), NETS[family]
    addresses = [str(net[name]) for name in ("client", "lan", "container", "other", "gate")]
    prefix = 24 if family == 4 else 64
    return [f"set addresses {{ typeof {ip} saddr; elements = {{ {', '.join(rng.sample(addresses, 2))} }}; }}",
            f"set ports {{ typeof tcp dport; flags interval; elements = {{ {rng.choice(('80', '8080', '1-79'))}, "
            f"9000-{rng.choice((9100, 60000))} }}; }}",
            f"set nets {{ typeof {ip} saddr; flags interval; elements = {{ {rng.choice(addresses[:3])}/{prefix} }}; }}",
            f"set pairs {{ typeof {ip} daddr . tcp dport; flags interval; elements = {{ "
            f"{rng.choice(addresses)} . {rng.choice(('80', '8080', '1-100'))} }}; }}",
            f"set names {{ typeof iifname; elements = {{ \"{rng.choice(('lan0', 'cni0', 'eth9'))}\" }}; }}"]


_NFT_PORTS = ("1-100", "8000-9000", "1024-65535", "{ 80, 8080 }")
_STATES = ("NEW", "ESTABLISHED,RELATED", "DNAT", "INVALID", "UNTRACKED", "SNAT")
_PORTS = ("--dports", "--sports", "--ports")


def _nft_match(rng: random.Random, family: int, hook: str = "", priority: int = 0) -> str:
    ip, net = ("ip" if family == 4 else "ip6"), NETS[family]
    addresses = [str(net[name]) for name in ("client", "lan", "container", "other", "gate")]
    equal = rng.choice(("", "", "!= "))
    length = rng.choice((8, 16, 24, 25, 32) if family == 4 else (16, 32, 64, 127, 128))
    choices = [
        f"{ip} {rng.choice(('saddr', 'daddr'))} {equal}{rng.choice(addresses)}",
        f"{ip} {rng.choice(('saddr', 'daddr'))} {equal}{rng.choice(addresses)}/{length}",
        f"{ip} {rng.choice(('saddr', 'daddr'))} {rng.choice(('', '!= '))}@{rng.choice(('addresses', 'nets'))}",
        f"{ip} saddr {addresses[1] if family == 4 else 'fd88::1'}-{addresses[0] if family == 4 else 'fd88::9'}",
        f"tcp {rng.choice(('dport', 'sport'))} {equal}{rng.choice((80, 8080, 22))}",
        f"tcp {rng.choice(('dport', 'sport'))} {rng.choice(_NFT_PORTS)}",
        f"tcp {rng.choice(('dport', 'sport'))} {rng.choice(('', '!= '))}@ports",
        f"{ip} daddr . tcp dport {rng.choice(('', '!= '))}@pairs",
        f"iifname {equal}{rng.choice(('lan0', 'cni0', 'lo', 'lan*', 'cni*', '@names'))}",
        f"oifname {equal}{rng.choice(('lan0', 'cni0', 'lo', 'cni*'))}",
        f"ct state {rng.choice(('', '', '!= '))}{rng.choice(('new', 'established', '{ new, established }'))}",
        f"ct state {rng.choice(('established,related', 'new,invalid', 'invalid', 'untracked'))}",
        f"ct direction {rng.choice(('original', 'reply'))}",
        f"ct status {rng.choice(('dnat', 'snat', 'dnat,snat'))}",
        f"ct original {ip} daddr {equal}{rng.choice(addresses)}",
        f"meta l4proto tcp ct original proto-dst {rng.choice((80, 8080))}",
        f"ct reply {ip} saddr {rng.choice(addresses)}",
        f"fib daddr type {equal}{rng.choice(('local', 'unicast'))}",
        f"fib saddr type {rng.choice(('local', 'unicast'))}",
        f"meta mark {equal}{rng.choice((0, 1, 2))}",
        f"meta mark & {rng.choice((1, 2, 3))} == {rng.choice((0, 1, 2))}",
        f"ct mark {rng.choice((0, 1))}",
        f"tcp flags & (syn|ack) == {rng.choice(('syn', '(syn|ack)', 'ack'))}",
        f"tcp flags {rng.choice(('syn', 'ack', 'fin'))}",
        f"meta l4proto {rng.choice(('tcp', '!= udp'))}",
        "meta pkttype host" if hook not in ("output", "postrouting") else "meta l4proto tcp",
        f"meta nfproto ipv{rng.choice((4, 6))}" if rng.random() < 0.3 else f"meta nfproto ipv{family}",
    ]
    if hook in ("prerouting", "input", "forward"):
        choices.append(f"fib saddr . iif oif {rng.choice(('exists', 'missing'))}")
    return rng.choice(choices)


def _nft_rule(rng: random.Random, family: int, level: int, depth: int, hook: str = "", priority: int = 0) -> str:
    matches = " ".join(_nft_match(rng, family, hook, priority) for _ in range(rng.choice((1, 1, 2, 3))))
    verdicts = ["accept", "accept", "drop", "drop", "return", "counter", "meta mark set 1", "ct mark set 1",
                "meta mark set meta mark | 2", "meta mark set ct mark", "drop"]
    if hook in ("input", "forward", "output"):
        verdicts += ["reject", "reject with tcp reset"]
    if hook in ("prerouting", "output") and priority < -200 and rng.random() < 0.4:
        verdicts.append("notrack")
    if level < depth:
        verdicts += [f"jump user{rng.randrange(level, depth)}", f"goto user{rng.randrange(level, depth)}"] * 2
        if rng.random() < 0.2:
            return f"tcp dport vmap {{ 80 : {rng.choice(('accept', 'drop', 'return'))}, " \
                f"8080 : {rng.choice(('accept', 'drop', f'jump user{level}', f'goto user{level}'))} }}"
        if rng.random() < 0.1:
            return f"iifname vmap {{ lan0 : {rng.choice(('accept', 'drop', 'return'))}, cni0 : jump user{level} }}"
    verdict = rng.choice(verdicts)
    if "reset" in verdict:
        matches = f"meta l4proto tcp {matches}"
    return f"{matches} counter {verdict}"


# --- iptables -------------------------------------------------------------------------------------------------

def random_iptables(rng: random.Random, family: int) -> str:
    """Tables in the language of iptables-restore."""
    lines: list[str] = []
    for table, hooks in (("raw", ("PREROUTING", "OUTPUT")), ("mangle", ("PREROUTING", "FORWARD", "POSTROUTING")),
                         ("nat", ("PREROUTING", "OUTPUT")), ("filter", ("FORWARD", "FORWARD", "OUTPUT", "INPUT"))):
        if rng.random() < {"filter": 0.9, "nat": 0.25}.get(table, 0.3):
            lines += [f"*{table}", *(f":{hook} {rng.choice(('ACCEPT', 'ACCEPT', 'ACCEPT', 'DROP'))} [0:0]"
                                     for hook in dict.fromkeys(hooks) if table == "filter"),
                      *(f":USER{level} - [0:0]" for level in range(3))]
            for level in range(3):
                lines += [f"-A USER{level} {_iptables_rule(rng, family, table, '', level + 1)}"
                          for _ in range(rng.randint(0, 3))]
            if family == 6 and table != "nat":
                lines += [f"-A {hook} -p ipv6-icmp -j ACCEPT" for hook in dict.fromkeys(hooks)]
            for _ in range(rng.randint(1, 5)):
                hook = rng.choice(hooks)
                lines.append(f"-A {hook} {_iptables_rule(rng, family, table, hook, 0)}")
            lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def _iptables_match(rng: random.Random, family: int, table: str, hook: str) -> str:
    net = NETS[family]
    addresses = [str(net[name]) for name in ("client", "lan", "container", "other", "gate")]
    no = rng.choice(("", "", "! "))
    length = rng.choice((8, 16, 24, 25, 32) if family == 4 else (16, 32, 64, 127, 128))
    choices = [
        f"{no}{rng.choice(('-s', '-d'))} {rng.choice(addresses)}/{length}",
        f"{no}{rng.choice(('-s', '-d'))} {rng.choice(addresses)}",
        f"-p tcp -m tcp {no}{rng.choice(('--dport', '--sport'))} {rng.choice(('80', '8080', '1:100', '1024:65535'))}",
        f"-p tcp -m multiport {no}{rng.choice(_PORTS)} {rng.choice(('80,443', '8080,1:100'))}",
        f"-p tcp -m tcp --tcp-flags SYN,ACK {rng.choice(('SYN', 'SYN,ACK', 'ACK'))}",
        "-p tcp -m tcp --syn", f"-p {rng.choice(('tcp', 'udp'))}",
        f"-m conntrack {no}--ctstate {rng.choice(_STATES)}",
        f"-m conntrack {no}--ctorigdst {rng.choice(addresses)}",
        f"-m conntrack {no}--ctorigdstport {rng.choice(('80', '8080', '8000:9000'))}",
        f"-m conntrack --ctdir {rng.choice(('ORIGINAL', 'REPLY'))}",
        f"-m conntrack {no}--ctreplsrc {rng.choice(addresses)}",
        f"-m state {no}--state {rng.choice(('NEW', 'ESTABLISHED', 'INVALID,NEW'))}",
        f"-m addrtype {no}--dst-type {rng.choice(('LOCAL', 'UNICAST'))}",
        f"-m addrtype {no}--src-type {rng.choice(('LOCAL', 'UNICAST'))}",
        f"-m mark {no}--mark {rng.choice(('0x1', '0x0', '0x2/0x3'))}",
        f"-m comment --comment {rng.choice(('a', 'b'))}",
        f"-m iprange {no}--src-range {addresses[1]}-{addresses[0]}" if family == 4 else "-m comment --comment v6",
    ]
    if hook not in ("OUTPUT", "POSTROUTING"):
        choices.append(f"{no}-i {rng.choice(('lan0', 'cni0', 'lo', 'lan+', 'cni+'))}" if hook else "-p tcp")
        choices.append("-m pkttype --pkt-type unicast" if hook else "-p tcp")
    if hook in ("FORWARD", "OUTPUT", "POSTROUTING"):
        choices.append(f"{no}-o {rng.choice(('lan0', 'cni0', 'lo', 'cni+'))}")
    return rng.choice(choices)


def _iptables_rule(rng: random.Random, family: int, table: str, hook: str, level: int) -> str:
    matches = [_iptables_match(rng, family, table, hook) for _ in range(rng.choice((1, 1, 2)))]
    if sum("-p " in match for match in matches) > 1 or len({match.replace("! ", "").split()[0] for match in matches}) \
            < len(matches) and not all(match.startswith("-m") for match in matches):
        matches = matches[:1]
    names = [match.split()[match.split().index("-m") + 1] for match in matches if "-m" in match.split()]
    if len({*names}) < len(names):
        matches = matches[:1]
    targets = ["ACCEPT", "ACCEPT", "DROP", "DROP", "RETURN"] if table != "nat" else ["ACCEPT", "RETURN"]
    if table == "filter":
        targets.append("REJECT")
    if table == "mangle":
        targets += ["MARK --set-xmark 0x1/0xffffffff", "MARK --set-xmark 0x2/0x2"]
    if table == "raw" and rng.random() < 0.2:
        targets.append("CT --notrack")
    if table == "nat" and "-p tcp" in " ".join(matches) and "! -p" not in " ".join(matches) and hook:
        target = _bracket(NETS[family][rng.choice(("container", "other"))], family)
        targets += [f"DNAT --to-destination {target}:{WEB}"] * 2
    if level < 3:
        targets += [f"USER{rng.randrange(level, 3)}"] * 2
        goto = f"-g USER{rng.randrange(level, 3)}"
        if rng.random() < 0.2:
            return f"{' '.join(matches)} {goto}"
    return f"{' '.join(matches)} -j {rng.choice(targets)}"


RANDOM = {"nft": random_nft, "iptables-nft": random_iptables, "iptables-legacy": random_iptables}
