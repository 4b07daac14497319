#!/usr/bin/python3
"""Run this plugin and others through the same scenarios: the table of docs/promises.md. As root.

    integration/measure/promises.py --plugin 'portmap 1.9.1' /tmp/new/usr/lib/cni/portmap

Each scenario has a host of its own with a client in its LAN, and containers that say their names. What breaks the
promise is bold. Others run with their backend nftables, whose chains can be damaged as ours. Where to get them: see
paths.py.
"""
import argparse
import contextlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab import Answer, Call, GcCall, Pod
from lab.libcni_cache import Cache
from measure.paths import replace_table

ERROR = Answer(99, "", "", "", "")


class Stage:
    """A host with a plugin, a client in its LAN, and containers with a server on port 80 each."""

    def __init__(self, executable: pathlib.Path, config: dict[str, Any]) -> None:
        self.executable, self.config = executable, config
        self.client = lab.wire("client", ("192.0.2.1/24",), ("192.0.2.2/24",))
        self.servers: list[lab.Server] = []
        self.namespaces: dict[str, lab.Namespace] = {}

    def pod(self, name: str, *ports: str, slot: int = 0, **options: Any) -> Pod:
        """A container; its wire and its server too, with a slot: 10.40.<slot>.2."""
        if slot and name not in self.namespaces:
            self.namespaces[name] = lab.wire(name, (f"10.40.{slot}.1/24",), (f"10.40.{slot}.2/24",), f"to-{name}"[:15])
            self.servers.append(lab.Server(name, self.namespaces[name], 80))
        link = {"link": f"to-{name}"[:15]} if slot else {}
        return Pod(name, *ports, ips=(f"10.40.{slot}.2/24",), **{**self.config, **link, **options})

    def die(self, name: str) -> None:
        """A container ends and nobody calls DEL."""
        self.namespaces.pop(name).remove()

    def call(self, verb: str, what: "Pod | GcCall") -> Answer:
        return _answer(Call(self.executable, verb, what))

    def at_once(self, verb: str, pods: list[Pod]) -> list[Answer]:
        calls = [Call(self.executable, verb, pod) for pod in pods]
        return [_answer(call) for call in calls]

    def who(self, port: int, ip: str = "192.0.2.1") -> str:
        """Who answers the client."""
        saw = lab.exchange(self.client, ip, port, timeout=0.5)
        return saw.server if saw else "nobody"

    def rules(self) -> str:
        """All rules, but the lab's own."""
        text = lab.run("nft", "-s", "list", "ruleset")
        return "\n".join(sorted(line for line in text.splitlines() if "elements" not in line)) + str(lab.elements())


def _answer(call: Call) -> Answer:
    """As `lab.calls.answer`, but whatever others print is only an error."""
    stdout, stderr = call.process.communicate(timeout=120)
    if not call.process.returncode:
        return Answer(0, "", "", stdout, stderr)
    with contextlib.suppress(ValueError):
        error = json.loads(stdout)
        return Answer(error.get("code", 99), error.get("msg", ""), error.get("details", ""), stdout, stderr)
    return ERROR._replace(document=stdout, stderr=stderr)


def bad(text: str) -> str:
    return f"**{text}**"


# --- scenarios: each returns what happened --------------------------------------------------------------------

def second_claim(stage: Stage) -> str:
    stage.call("ADD", stage.pod("first", "8080:80", slot=1))
    reply = stage.call("ADD", stage.pod("second", "8080:80", slot=2))
    if reply.code:
        return "refused; the owner is named" if "first" in reply.msg else "refused"
    return bad(f"accepted; {stage.who(8080)} answers")


def overlapping_claim(stage: Stage) -> str:
    stage.call("ADD", stage.pod("first", "8080:80", slot=1))
    reply = stage.call("ADD", stage.pod("second", "192.0.2.1:8080:80", slot=2))
    return "refused" if reply.code else bad(f"accepted; {stage.who(8080)} answers")


def dead_owner(stage: Stage) -> str:
    stage.call("ADD", stage.pod("first", "8080:80", slot=1))
    stage.die("first")
    stage.call("ADD", stage.pod("second", "8080:80", slot=2))
    who = stage.who(8080)
    return "it answers" if who == "second" else bad(f"{who} answers")


def late_end(stage: Stage) -> str:
    old = stage.pod("first", "8080:80", slot=1)
    stage.call("ADD", old)
    stage.die("first")
    stage.call("ADD", stage.pod("second", "8080:80", slot=1))  # with the dead one's address
    stage.call("DEL", old)
    who = stage.who(8080)
    return "it answers" if who == "second" else bad(f"{who} answers")


def separate_attachments(stage: Stage) -> str:
    one = stage.pod("web", "8080:80", slot=1)
    two = stage.pod("web", "9090:80", slot=1, ifname="net1", network="other")
    stage.call("ADD", one)
    stage.call("ADD", two)
    stage.call("DEL", one)
    return "it stays" if stage.who(9090) == "web" else bad("it goes too")


def add_again(stage: Stage) -> str:
    web = stage.pod("web", "8080:80", slot=1)
    stage.call("ADD", web)
    once = stage.rules()
    for _ in range(3):
        stage.call("ADD", web)
    more = len(stage.rules().splitlines()) - len(once.splitlines())
    return "nothing" if not more else bad(f"{more} rules more")


def racers(stage: Stage) -> str:
    replies = stage.at_once("ADD", [stage.pod(f"racer{i}", "8080:80") for i in range(12)])
    winners = sum(not reply.code for reply in replies)
    return "one" if winners == 1 else bad(f"{winners} of 12")


def two_hundred(stage: Stage) -> str:
    pods = [stage.pod(f"pod{i}", f"{10000 + i}:80") for i in range(200)]
    stage.call("ADD", stage.pod("first", "1000:80"))
    before = stage.rules()
    failed = [sum(bool(reply.code) for reply in stage.at_once(verb, pods)) for verb in ("ADD", "DEL")]
    same = "" if stage.rules() == before else "; not what it was"
    return "none" if not sum(failed) + len(same) else bad(f"{failed[0]} ADD, {failed[1]} DEL{same}")


def busy_neighbour(stage: Stage) -> str:
    with lab.foreign_changes():
        pods = [stage.pod(f"pod{i}", f"{10000 + i}:80") for i in range(30)]
        failed = [sum(bool(stage.call(verb, pod).code) for pod in pods) for verb in ("ADD", "DEL")]
    return "none" if not sum(failed) else bad(f"{failed[0]} of 30 ADD, {failed[1]} of 30 DEL")


def killed(stage: Stage) -> str:
    stage.call("ADD", stage.pod("other", "9090:80"))
    web = stage.pod("web", "8080:80", "127.0.0.1:7070:80", "6060:60/udp")
    web.ips = "10.40.1.2/24", "fd40:1::2/64"
    stage.call("ADD", web)
    stage.call("DEL", web)  # what is shared may stay
    without = stage.rules()
    stage.call("ADD", web)
    whole, halves, moments = stage.rules(), 0, random.Random(1)
    for verb in ("ADD", "DEL") * 50:
        stage.call("DEL", web)
        stage.call("ADD" if verb == "DEL" else "DEL", web)
        call = Call(stage.executable, verb, web)
        with contextlib.suppress(subprocess.TimeoutExpired):
            call.process.wait(moments.uniform(0.001, 0.06))
        call.process.kill()
        call.process.communicate()
        halves += stage.rules() not in (without, whole)
    return "never" if not halves else bad(f"{halves} of 100")


def _table(stage: Stage) -> str:
    """The table with the plugin's base."""
    tables = lab.run("nft", "list", "tables").splitlines()
    return next(line.partition(" ")[2] for line in tables if "cni_" in line or "nat" in line)


def _check_after(stage: Stage, damage: Callable[[str], None]) -> str:
    web = stage.pod("web", "8080:80", slot=1)
    stage.call("ADD", web)
    if stage.call("CHECK", web).code:
        return bad("CHECK fails before")
    damage(_table(stage))
    check = stage.call("CHECK", web)
    delete = stage.call("DEL", stage.pod("web"))
    stage.call("ADD", web)
    wrong = [text for text, is_wrong in (("CHECK sees nothing", not check.code), ("DEL fails", bool(delete.code)),
                                         ("ADD does not", stage.who(8080) != "web")) if is_wrong]
    return bad(", ".join(wrong)) if wrong else "yes"


def flushed(stage: Stage) -> str:
    return _check_after(stage, lambda table: lab.nft_script("flush ruleset"))


def base_chain_flushed(stage: Stage) -> str:
    return _check_after(stage, lambda table: lab.nft_script(f"flush chain {table} prerouting"))


def base_chain_deleted(stage: Stage) -> str:
    return _check_after(stage, lambda table: lab.nft_script(f"flush chain {table} output",
                                                            f"delete chain {table} output"))


def redirected(stage: Stage) -> str:
    def damage(table: str) -> None:
        text = lab.run("nft", "list", "table", *table.split())
        lab.nft_script(f"flush table {table}", text.replace("10.40.1.2:80", "10.40.1.66:80"))
    return _check_after(stage, damage)


def foreign_rule(stage: Stage) -> str:
    stage.call("ADD", stage.pod("web", "8080:80", slot=1))
    lab.nft_script(f"add rule {_table(stage)} output tcp dport 1 counter comment \"somebody's\"")
    stage.call("ADD", stage.pod("other", "9090:80", slot=2))
    return "it stays" if "somebody's" in lab.run("nft", "list", "ruleset") else bad("it is deleted")


def collected(stage: Stage) -> str:
    stage.call("ADD", stage.pod("stale", "8080:80", slot=1))
    stage.call("ADD", stage.pod("valid", "9090:80", slot=2))
    collection = GcCall("net", stage.pod("valid"))
    reply = stage.call("GC", collection)
    left = stage.who(8080), stage.who(9090)
    return "yes" if not reply.code and left == ("nobody", "valid") else bad("no")


def host_process(stage: Stage) -> str:
    server = lab.Server("host process", lab.HOST, 8080)
    reply = stage.call("ADD", stage.pod("web", "8080:80", slot=1, hostPortInUse="refuse"))
    server.close()
    return "refused" if reply.code else bad("accepted")


def restored(stage: Stage) -> str:
    web = stage.pod("web", "8080:80", slot=1)
    stage.call("ADD", web)
    lab.nft_script("flush ruleset")
    host = lab.Host(stage.executable)
    if not host.cli.exists():
        return bad("not supported")
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(pathlib.Path(folder))
        cache.write(web)
        cache.restore(host)
    return "yes" if stage.who(8080) == "web" else bad("no")


# what is promised, the test that proves it, the scenario
PROMISES: list[tuple[str, str, Callable[[Stage], str]]] = [
    ("a second container claims a port", "test_ownership: test_second_claim", second_claim),
    ("… on one address, while the first has all addresses", "test_ownership: test_second_claim", overlapping_claim),
    ("a container claims the port of one that died without DEL", "test_ownership: test_dead_owner_gives_way",
     dead_owner),
    ("… and has its address; then the late DEL comes", "test_ownership: test_address_used_again", late_end),
    ("a container leaves one of two networks: its port on the other",
     "test_ownership: test_attachments_of_one_container", separate_attachments),
    ("ADD is repeated three times: rules left over", "test_ownership: test_same_attachment_again", add_again),
    ("a process of the host has the port (`hostPortInUse: refuse`)", "test_ownership: test_host_port_in_use",
     host_process),
    ("12 containers claim one port at once: how many get it", "test_concurrency: test_twelve_racers", racers),
    ("200 concurrent ADDs, then 200 concurrent DELs: failed calls", "test_concurrency: test_two_hundred", two_hundred),
    ("another program changes its rules all the time: failed calls", "test_concurrency: test_foreign_changes",
     busy_neighbour),
    ("`kill -9` at 100 points: changes half made", "test_faults: test_killed_at_every_instant", killed),
    ("`nft flush ruleset`: CHECK fails, DEL succeeds, ADD repairs", "test_faults: test_damage", flushed),
    ("the shared chain is flushed: the same", "test_faults: test_damage", base_chain_flushed),
    ("a shared chain is deleted: the same", "test_faults: test_damage", base_chain_deleted),
    ("the target of a rule is changed: the same", "test_faults: test_damage", redirected),
    ("an administrator's own rule in the shared chain, after an ADD", "test_faults: test_foreign_rules_stay",
     foreign_rule),
    ("GC removes invalid attachments, and nothing else", "test_concurrency: test_everything_at_once", collected),
    ("after a firewall reload all ports can be restored", "test_restore: test_everything_comes_back", restored),
]


def measure(executable: pathlib.Path, config: dict[str, Any]) -> list[str]:
    """What happened in each scenario."""
    happened = []
    for _, _, scenario in PROMISES:
        with lab.fresh_host():
            stage = Stage(executable, config)
            try:
                happened.append(scenario(stage))
            finally:
                for server in stage.servers:
                    server.close()
    return happened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", nargs=2, action="append", default=[], metavar=("TITLE", "EXECUTABLE"),
                        help="another portmap plugin with a backend nftables")
    parser.add_argument("--write", action="store_true", help="also write the table to docs/promises.md")
    options = parser.parse_args()
    lab.enter()
    with tempfile.TemporaryDirectory() as folder:
        columns = [("cni-portmap", measure(lab.install(pathlib.Path(folder, "bin")) / "portmap", {}))]
    columns += [(title, measure(pathlib.Path(executable), {"backend": "nftables"}))
                for title, executable in options.plugin]
    lines = [["what happens", "test", *(title for title, _ in columns)], ["---"] * (2 + len(columns))]
    lines += ([promise, f"`{test}`", *cells]
              for (promise, test, _), *cells in zip(PROMISES, *(cells for _, cells in columns)))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(text)
    if options.write:
        replace_table(lab.ROOT / "docs/promises.md", text)


if __name__ == "__main__":
    main()
