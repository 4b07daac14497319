"""Attempts at random to find a fault: of the system, of who calls, of who writes to our table or to libcni's cache.

The rule, whatever happens: one document or success, never code 99, never a traceback, nothing half-done, nothing of
others run or removed; and every next call converges.
"""
import contextlib
import copy
import json
import os
import pathlib
import random
import re
import string
import subprocess
from collections.abc import Callable
from typing import Any

from .calls import Answer, GcCall, Host, Pod, answer, fork
from .damage import OTHER
from .libcni_cache import Cache
from .namespaces import fresh_host
from .poison import chain, rule, write
from .processes import run
from .tables import TABLE, chains, elements, nft_script, state

WEB = Pod("web", "8080:80", "127.0.0.1:7070:70/udp")
ODD: list[Any] = [None, True, False, 0, -1, 1, 32, 65536, 10 ** 30, 1e308, "", "x", "a b", "é", "\ud800", "\0",
                  "; flush ruleset", "127.0.0.1", "10.20.0.2/24", [], [None], [[]], [{}], {}, {"": 0}, "x" * 5000]
WORDS = """ip ip6 saddr daddr tcp udp sport dport meta mark ct state new iifname "eth0" 10.0.0.0/8 fd00::/8 . { } , != &
    0xff == 80 ssh http shop.example localhost @set fib type local -s -d ! -i eth+ 10.0.0.1-10.0.0.9 accept drop th
    ether arp saddr daddr icmp protocol sctp rt nexthop l4proto nfproto and or""".split()
MATCHES = ["ip saddr 10.0.0.0/8", "ip daddr != 192.0.2.7", "ip daddr . th dport { 192.0.2.1 . 80 }", "ct state new",
           "meta mark & 0xff == 0", 'iifname { "eth0", "eth*" }', "fib saddr type != local", "-s 10.0.0.1", "-i eth+",
           "meta l4proto { tcp, udp }", "! -d 10.0.0.0/8", "th sport 1024-65535", "tcp dport { 80, 8080 }",
           "meta cgroup 1", "ip dscp cs1"]
CALL = re.compile(r"\d+ +(?:(socket|sendto|recvfrom|sendmsg|recvmsg|[gs]etsockopt|flock|pselect6|select|poll|bind)\("
                  r"|(openat)\(AT_FDCWD, \"/(?:run|proc)|(write)\([3-9])")
ERRORS = "EINTR", "ENOMEM", "EPERM", "ENOSPC", "ENOBUFS", "EIO", "EACCES", "EMFILE"

FOREIGN = [(f"flush chain {TABLE} dispatch", f"add rule {TABLE} dispatch accept"),
           (f"insert rule {TABLE} guard accept",),
           (f"add element {TABLE} hostports {{ ipv4 . tcp . 8080 : drop }}",),
           (f"add rule {TABLE} {OTHER.chain} meta l4proto tcp @th,16,32 > 5 dnat ip to 10.0.0.1",),
           (f"delete table {TABLE}", f"add table {TABLE}",
            f"add map {TABLE} hostports {{ type inet_service : verdict; }}"),
           (f"add set {TABLE} localhost_interfaces {{ type ipv4_addr; }}",)]


class Attack:
    """Attempts against an installed plugin. `codes`: how often each kind was answered with each code."""

    def __init__(self, executable: pathlib.Path, folder: pathlib.Path, seed: int) -> None:
        self.host, self.folder, self.seed = Host(executable), folder, seed
        self.codes: dict[str, dict[int, int]] = {}
        self._instants: dict[str, list[tuple[str, int]]] = {}
        self._least = 0  # bytes of address space with which the plugin's interpreter starts

    def attempt(self, kind: str, number: int) -> None:
        """One attempt, on a host of its own. Raises AssertionError where the rule is broken."""
        self.random = random.Random(f"{self.seed} {kind} {number}")
        self.told = ""  # what is being tried
        with fresh_host():
            try:
                code = KINDS[kind](self)
            except AssertionError as problem:
                raise AssertionError(f"{kind} {number}, seed {self.seed}: {self.told}: {problem}") from None
            finally:
                pathlib.Path("/run/cni-portmap.lock").unlink(missing_ok=True)
        found = self.codes.setdefault(kind, {})
        found[code] = found.get(code, 0) + 1

    # --- the rule ---

    def converge(self, other: Pod = OTHER) -> None:
        """Whatever stands there, the next calls succeed, and others' containers are as they were."""
        assert not fork("DEL", WEB).code and WEB.chain not in chains()
        assert not fork("ADD", WEB).code
        for pod in WEB, other:
            reply = fork("CHECK", pod)
            assert not reply.code, reply
        assert not fork("DEL", WEB).code
        assert WEB.chain not in [*elements().values(), *chains()] and OTHER.chain in chains()

    def call(self, stdin: bytes, environ: dict[str, str], *wrapped: object) -> Answer:
        """One call of the plugin with any input."""
        done = subprocess.run([str(word) for word in (*wrapped, self.host.executable)], input=stdin, check=False,
                              env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environ}, capture_output=True,
                              timeout=300)
        return answer(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def _odd(self) -> Any:
        return copy.deepcopy(self.random.choice(ODD))  # others of them may go into it

    # --- the kinds ---

    def system_call(self) -> int:
        """A system call fails, or the process is killed there; all or nothing is done."""
        verb, again = self.random.choice([("ADD", False), ("ADD", True), ("CHECK", True), ("DEL", True), ("GC", True)])
        what = GcCall("net", OTHER) if verb == "GC" else WEB
        fork("ADD", OTHER)
        without = state()
        fork("ADD", WEB)
        complete = state()
        if not again:
            fork("DEL", WEB)
        name, number = self.random.choice(self._instants_of(verb, again, what))
        fault = self.random.choice(["signal=SIGKILL", *(f"error={error}" for error in ERRORS)])
        self.told = f"{verb}, {name} {number}, {fault}"
        reply = self.host.call(verb, what, "strace", "-f", "-o", "/dev/null", "-e", f"trace={name}",
                               "-e", f"inject={name}:{fault}:when={number}")
        assert state() in (without, complete), "half-done"
        assert reply.code != -1 or "SIGKILL" in fault
        self.converge()
        return reply.code

    def _instants_of(self, verb: str, again: bool, what: "Pod | GcCall") -> list[tuple[str, int]]:
        key = f"{verb} {again}"
        if key not in self._instants:
            trace = self.folder / "trace"
            assert not self.host.call(verb, what, "strace", "-f", "-o", trace).code
            counts: dict[str, int] = {}
            found, started = [], False
            for line in trace.read_text().splitlines():
                if name := re.match(r"\d+ +(\w+)\(", line):
                    counts[name[1]] = counts.get(name[1], 0) + 1
                    started |= "socket(AF_NETLINK" in line
                    if started and CALL.match(line):
                        found.append((name[1], counts[name[1]]))
            self._instants[key] = found
            fork("ADD" if again else "DEL", WEB)
        return self._instants[key]

    def interrupt(self) -> int:
        """Ctrl-C at any system call: the call ends well, or not a word is said."""
        fork("ADD", OTHER)
        number = self.random.randrange(1, 700)
        self.told = f"SIGINT at system call {number}"
        try:
            reply = self.host.call("ADD", WEB, "strace", "-f", "-o", "/dev/null", "-e",
                                   f"inject=all:signal=SIGINT:when={number}")
        except AssertionError as error:
            if "Fatal Python error: init_" not in str(error):  # the interpreter's own, before a line of ours
                raise
            reply = Answer(-1, "", "", "", "")
        assert reply.code in (0, -1) and (WEB.chain in chains()) == (reply.code == 0)
        self.converge()
        return reply.code

    def configuration(self) -> int:
        """Any bytes, any value in any place, any environment; containers of another network are nobody's to remove."""
        other = Pod(OTHER.id, "9090:80", network="elsewhere")
        fork("ADD", other)
        verb = self.random.choice(["ADD", "CHECK", "DEL", "GC", "STATUS"])
        config = {**json.loads(WEB.stdin("ADD")), "conditionsV4": ["ip saddr 10.0.0.0/8"], "snat": True,
                  "markMasqBit": 13, "cni.dev/valid-attachments": [{"containerID": "other", "ifname": "eth0"}]}
        environ = WEB.environ(verb)
        for _ in range(self.random.randrange(1, 4)):
            if self.random.random() < 0.2:
                key = self.random.choice([*environ])
                environ[key] = str(self._odd()).encode(errors="replace").decode().replace("\0", "")
            else:
                inside, key = self.random.choice([*_places(config)])
                inside[key] = self._odd()
        stdin = json.dumps(config).encode()
        if self.random.random() < 0.3:
            stdin = _damaged(stdin, self.random)
        self.told = f"{environ} {stdin!r}"
        code = self.call(stdin, environ).code
        self.converge(other)
        return code

    def conditions(self) -> int:
        """Any words: published, or code 7; nobody asks DNS."""
        fork("ADD", OTHER)
        conditions = [self.random.choice(MATCHES) for _ in range(self.random.randrange(1, 3))]
        if self.random.random() < 0.7:  # what somebody may write wrong
            words = " ".join(conditions).split()
            for _ in range(self.random.randrange(1, 3)):
                words.insert(self.random.randrange(len(words) + 1), self.random.choice(WORDS))
            conditions = [" ".join(words[:self.random.randrange(1, len(words) + 1)])]
        self.told = f"{conditions}"
        reply = fork("ADD", Pod("web", "8080:80", "5353:53/udp", conditionsV4=conditions))
        assert reply.code in (0, 7) and "name resolution" not in reply.msg + reply.details, reply
        self.converge()
        return reply.code

    def table(self) -> int:
        """Others write to our table: nothing of it is run, nobody hangs, and what is refused is named."""
        fork("ADD", self.random.choice([OTHER, WEB]))
        texts = [self._text() for _ in range(3)]
        self.told = f"{texts}"
        for text in texts:
            with contextlib.suppress(AssertionError):  # what the kernel does not take
                kind = self.random.randrange(3 + len(FOREIGN))
                if kind < 3:
                    name = (f"c/{text}", WEB.chain, "guard")[kind]
                    write(*([chain(name)] if kind == 0 else []), rule(name, self._text() if kind == 0 else text))
                else:
                    nft_script(*FOREIGN[kind - 3])
        codes = [self.call(what.stdin(verb).encode(), what.environ(verb)).code
                 for verb, what in (("ADD", WEB), ("CHECK", WEB), ("STATUS", WEB), ("GC", GcCall("net")), ("DEL", WEB))]
        for command in ["list"], ["gc"], ["restore", "--cache", self.folder], ["restore", "--base-only"]:
            self._command(*command)
        assert "pwned" not in run("nft", "list", "tables")
        return codes[0]

    def _text(self) -> str:
        parts = ["web/eth0", "x/y", "; add table ip pwned", "net=net", " ", "netns=/none#", "9" * 90, "link=v#1", "\n",
                 "also on ", "id=web", "if=eth0", "/", "%zz", "é", "\"", "{", "markMasqBit 99999999999", "pod=a/b",
                 "cni-portmap 2: ", "hash/" + "0" * 32]
        return "".join(self.random.choice(parts) for _ in range(self.random.randrange(1, 6)))[:100]

    def cache_file(self) -> int:
        """Anything in libcni's folder: the others are restored."""
        for pod in OTHER, WEB:
            pod.environ("ADD")  # its namespace
        with contextlib.ExitStack() as stack:
            stack.callback(run, "rm", "-rf", self.folder / "cache")
            (self.folder / "cache").mkdir()
            cache = Cache(self.folder / "cache")
            os.utime(cache.write(OTHER), (1, 1))
            path = cache.write(WEB)
            document = json.loads(path.read_text())
            for _ in range(self.random.randrange(3)):
                inside, key = self.random.choice([*_places(document)])
                inside[key] = self._odd()
            raw = json.dumps(document).encode()
            path.write_bytes(_damaged(raw, self.random) if self.random.random() < 0.3 else raw)
            self.told = f"{path.read_bytes()!r}"
            if self.random.random() < 0.1:
                path.unlink()
                if self.random.random() < 0.5:
                    path.symlink_to("/dev/zero")
                else:
                    os.mkfifo(path)
            status = self._command("restore", "--json", "--cache", cache.folder)
        assert OTHER.chain in chains()
        self.converge()
        return status

    def _command(self, *words: object) -> int:
        done = subprocess.run([str(word) for word in (self.host.cli, *words)], capture_output=True, text=True,
                              check=False, timeout=300)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done
        return done.returncode

    def memory(self) -> int:
        """Less memory than it takes: one document, and nothing half-done."""
        if not self._least:
            self._least = next(size for size in range(8 << 20, 200 << 20, 1 << 20) if not subprocess.run(
                ["prlimit", f"--as={size}", self.host.executable], env={}, capture_output=True, check=False).returncode)
        fork("ADD", OTHER)
        without = state()
        size = self._least + self.random.randrange(40 << 20)
        self.told = f"{size} bytes"
        reply = self.host.call("ADD", WEB, "prlimit", f"--as={size}")
        assert reply.code == 0 or state() == without
        self.converge()
        return reply.code


KINDS: dict[str, Callable[[Attack], int]] = {
    "system calls": Attack.system_call, "interrupts": Attack.interrupt, "configurations": Attack.configuration,
    "conditions": Attack.conditions, "tables": Attack.table, "cache files": Attack.cache_file,
    "memory": Attack.memory}


def _places(value: Any) -> Any:
    """Each (container, key) in a document."""
    for key, inner in [*(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list)
                         else ())]:
        yield value, key
        yield from _places(inner)


def _damaged(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw))
    return chance.choice([raw[:at], raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1:], raw[at:] + raw[:at],
                          raw[:at] + chance.choice(string.punctuation).encode() + raw[at:], raw + raw[at:]])
