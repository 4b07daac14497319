#!/usr/bin/python3
"""Measure which versions of nftables get along on one host: the table of docs/compatibility.md. As root, 10 minutes.

Containers, agents and firewalls bring an nft of their own, and all share the kernel's ruleset. So each version has each
part: the plugin runs with it, it lists what the plugin wrote, it wrote the plugin's table before, it wrote the tables
of others beside it. A version is that of a Debian release, made by debootstrap in integration/kernel/kept
(CNI_PORTMAP_KEPT names another folder). The older kernel runs in qemu, see integration/kernel/run.
"""
import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab import GcCall, Host, Pod
from measure.bench import peers
from measure.paths import replace_table

KEPT = pathlib.Path(os.environ.get("CNI_PORTMAP_KEPT") or lab.ROOT / "integration/kernel/kept")
SUITES = "bookworm", "trixie", "forky"
KERNEL = "6.1"  # the older one; the newer one is that of this machine
PODS = (Pod("one", "8080:80", "127.0.0.1:7070:70/udp", ips=("10.20.0.2/24", "fd20::2/64")),
        Pod("many", *(f"{9000 + n}:{80 + n}" for n in range(30)), "7000:7000", "7001:7001",
            conditionsV4=["-s 10.0.0.0/8,192.0.2.0/24"], markMasqBit=7))  # whose ADD gives a shared chain other rules
LISTINGS = ("list", "ruleset"), ("-j", "list", "ruleset")
OTHERS = """
table inet others {
    set networks { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.0/24 } }
    set pairs { typeof ip saddr . tcp dport; elements = { 192.0.2.1 . 80 } }
    map ports { type inet_service : inet_service; elements = { 1 : 2 } }
    map verdicts { type ipv4_addr . inet_service : verdict; elements = { 192.0.2.1 . 80 : accept } }
    chain forward {
        type filter hook forward priority 10
        ip saddr @networks tcp dport { 1, 2 } counter
        ip daddr . tcp dport vmap @verdicts
        tcp dport vmap { 3 : accept }
    }
}
"""
Found = dict[str, str]  # by part: "" where all is well, else what is not


class Version:
    """A release's nft, and the plugin that runs with its Python and libnftables."""

    def __init__(self, suite: str, place: pathlib.Path) -> None:
        self._place = place
        self.name = self.nft("--version")[1].split()[1].removeprefix("v")
        self.host = Host(lab.install_in_other_root(pathlib.Path("/run/bin", suite), place) / "portmap")

    def nft(self, *words: str, input: str = "") -> tuple[int, str]:
        done = subprocess.run(["chroot", self._place, "nft", *words], input=input, capture_output=True, text=True,
                              check=False)
        return done.returncode, done.stdout

    def listings(self) -> Iterator[str]:
        """The listings that fail, or do not have our table."""
        for words in LISTINGS:
            status, text = self.nft(*words)
            if status or "cni_portmap" not in text or "many" not in text:
                yield f"nft {' '.join(words)}: {_end(status)}"

    def calls(self, *calls: str) -> Iterator[str]:
        """The calls that fail, of each pod."""
        for call in calls:
            if call == "teardown":
                done = subprocess.run(["chroot", self._place, "/opt/sbin/cni-portmap", call], capture_output=True,
                                      text=True, check=False)
                yield from [f"teardown: {done.stderr or _end(done.returncode)}"] * bool(done.returncode)
                continue
            for pod in PODS if call != "STATUS" else PODS[:1]:
                verb = call.split()[0]
                try:
                    reply = self.host.call(verb, GcCall("net") if verb == "STATUS" else pod)
                    if reply.code:
                        yield f"{call}: {reply.msg or 'a signal'}"
                except AssertionError as error:
                    yield f"{call}: {error}"


def _end(status: int) -> str:
    return f"signal {-status if status < 0 else status - 128}" if status < 0 or status > 128 else f"status {status}"


@contextlib.contextmanager
def versions(roots: list[str]) -> Iterator[list[Version]]:
    """Each of these systems (suite=folder)."""
    with contextlib.ExitStack() as stack:
        lab.run("mount", "-t", "tmpfs", "none", "/mnt")
        found = []
        for suite, _, root in (each.partition("=") for each in roots):
            place = pathlib.Path("/mnt", suite)
            place.mkdir()
            stack.enter_context(lab.other_root(root, place))
            found.append(Version(suite, place))
        yield found


def measure(roots: list[str]) -> dict[str, Found]:
    """What is found with this kernel: by the version of the plugin, each part and the version that has it."""
    found: dict[str, Found] = {}
    lab.enter()
    with versions(roots) as all_versions:
        for ours in all_versions:
            parts = found[ours.name] = {}
            with _host():
                parts["alone"] = _says(ours.calls("STATUS", "ADD", "CHECK", "ADD again", "CHECK"))
                for other in all_versions:
                    parts[f"lists {other.name}"] = _says(other.listings())
                parts["alone"] += _says(ours.calls("DEL", "teardown"))
            for other in all_versions:
                with _host():
                    parts[f"had {other.name}"] = _says((*other.calls("ADD"), *ours.calls(
                        "STATUS", "CHECK", "ADD again", "CHECK", "DEL", "ADD", "DEL", "teardown")))
                with _host():
                    status, _ = other.nft("-f", "-", input=OTHERS)
                    assert not status, f"nft {other.name} does not take the tables of others"
                    parts[f"beside {other.name}"] = _says(ours.calls("STATUS", "ADD", "CHECK", "ADD again", "CHECK"))
                    parts[f"others' {other.name}"] = _says(ours.listings())
                    parts[f"beside {other.name}"] += _says(ours.calls("DEL", "teardown"))
    return found


@contextlib.contextmanager
def _host() -> Iterator[None]:
    with lab.fresh_host():
        lab.wire("web", ("10.20.0.1/24", "fd20::1/64"), ("10.20.0.2/24", "fd20::2/64"))
        yield
    lab.LOCK.unlink(missing_ok=True)


def _says(failures: "Iterator[str] | tuple[str, ...]") -> str:
    return "; ".join(failures)


PARTS = {"alone": "alone", "lists": "read by", "had": "written by", "beside": "beside"}


def table(measured: dict[str, dict[str, Found]]) -> str:
    """The Markdown table: a line for each kernel and version of the plugin's libnftables."""
    names = [*next(iter(measured.values()))]
    columns = ["alone", *(f"{part} {name}" for part in ("lists", "had", "beside") for name in names)]
    heads = [PARTS["alone"], *(f"{PARTS[column.split()[0]]} {column.split()[1]}" for column in columns[1:])]
    lines = [["Linux", "libnftables", *heads], ["---"] * (2 + len(columns))]
    for kernel, found in measured.items():
        lines += ([kernel, name, *(f"**{parts[column]}**" if parts[column] else "yes" for column in columns)]
                  for name, parts in found.items())
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(measured: dict[str, dict[str, Found]]) -> str:
    """What fails for a reason that is not ours: listings of the tables of others."""
    found = {f"- Linux {kernel}: nft {name}, tables of {part.split()[1]}: {what}"
             for kernel, versions in measured.items() for name, parts in versions.items()
             for part, what in parts.items() if part.startswith("others'") and what}
    return "\n".join(sorted(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", nargs="+", metavar="SUITE=FOLDER", help="this kernel only, as JSON")
    parser.add_argument("--write", action="store_true", help="also write the table to docs/compatibility.md")
    options = parser.parse_args()
    if options.here:
        print("\n" + json.dumps({platform.release(): measure(options.here)}))
        return
    roots = []
    for suite in SUITES:
        peers.newer_system(KEPT / suite, suite)
        roots.append(f"{suite}={KEPT / suite}")
    command = f"{pathlib.Path(__file__).relative_to(lab.ROOT)} --here {' '.join(roots)}"
    outputs = [lab.run(lab.ROOT / "integration/kernel/run", KERNEL, "--run", command, timeout=3000),
               lab.run(sys.executable, __file__, "--here", *roots, timeout=3000)]
    measured: dict[str, dict[str, Found]] = {}
    for output in outputs:
        measured |= json.loads(re.findall(r"(?m)^\{.*\}\s*$", output)[-1])
    measured = {re.match(r"\d+\.\d+", release)[0]: found for release, found in measured.items()}  # type: ignore[index]
    print(table(measured), notes(measured), sep="\n\n")
    if options.write:
        replace_table(lab.ROOT / "docs/compatibility.md", table(measured))


if __name__ == "__main__":
    main()
