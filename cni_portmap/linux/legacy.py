"""The reference plugin's rules in iptables-legacy: read by iptables-legacy-save, removed by iptables-legacy-restore.

nf_tables knows nothing of them. Loaded only where iptables-legacy may have such rules, see `kernel.legacy_may_have`.
"""
import shlex
import shutil
import subprocess
from _socket import inet_pton

from ..attachment import AF
from ..cni import NFT_REFUSED, CniError, warn
from ..reference import ENTRIES, LEGACY, NAT, Leftover, chains_of, owner_in
from ..ruleset import PROTOCOL_NUMBERS

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..reference import Forward
    from .leftovers import Wanted

PROGRAMS = {4: "iptables-legacy", 6: "ip6tables-legacy"}
PATH = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"  # a runtime may have none
LOCK_SECONDS = "5"  # to wait for another who changes them


def in_nat(family: int, wanted: "Wanted", own: tuple[str, str] = ("", "")) -> list[Leftover]:
    """What `leftovers` finds in table nat of iptables-nft, here."""
    program = shutil.which(f"{PROGRAMS[family]}-save", path=PATH)
    if not program:
        warn(f"{PROGRAMS[family]} has nat rules, and {PROGRAMS[family]}-save is not installed: if the reference plugin "
             "wrote some of them, they stay")
        return []
    found: dict[tuple[str, str], Leftover] = {}
    owners: dict[str, tuple[str, str]] = dict.fromkeys(chains_of(*own), own) if own[1] else {}
    lines = _run([program, "-t", NAT]).splitlines()
    rules = [line[3:].partition(" ")[::2] for line in lines if line.startswith("-A ")]
    for chain, text in rules:
        if chain in ENTRIES:
            words = shlex.split(text)
            target = _after("-j", words)
            owner = owners.get(target) or owner_in(_after("--comment", words))
            if owner[1] and (owner == own or wanted(*owner)) and (target in chains_of(*owner) or chain != ENTRIES[0]):
                owners |= dict.fromkeys(chains_of(*owner), owner)
                found.setdefault(owner, Leftover(LEGACY, family, owner[1], owner[0])).rules.append((chain, text, b""))
    for chain in (line[1:].partition(" ")[0] for line in lines if line.startswith(":")):
        if chain in owners:
            owner = owners[chain]
            found.setdefault(owner, Leftover(LEGACY, family, owner[1], owner[0])).chains.append(chain)
    for chain, text in rules:
        if chain in owners:
            found[owners[chain]].forwards += _forwards(family, shlex.split(text))
    return [*found.values()]


def _forwards(family: int, words: "Sequence[str]") -> "Iterator[Forward]":
    """What a rule forwards, as iptables-save writes it."""
    ip = _after("--to-destination", words).rpartition(":")[0].strip("[]")
    host = _after("-d", words).partition("/")[0]
    try:
        if ip:
            yield (PROTOCOL_NUMBERS.get(_after("-p", words), 0), inet_pton(AF[family], host) if host else b"",
                   int(_after("--dport", words) or 0), inet_pton(AF[family], ip))
    except (OSError, ValueError):  # a range of ports or addresses: somebody else's rule in a container's chain
        return


def _after(option: str, words: "Sequence[str]") -> str:
    """The word after an option, "" for none."""
    return words[words.index(option) + 1] if option in words[:-1] else ""


def remove(found: "Sequence[Leftover]") -> None:
    """Remove leftovers, those of a family as one transaction. Raises CniError."""
    for family in 4, 6:
        lines = [line for leftover in found if leftover.family == family for line in (
            *(f"-D {chain} {text}" for chain, text, _ in leftover.rules),
            *(f"-F {chain}" for chain in leftover.chains), *(f"-X {chain}" for chain in leftover.chains))]
        if lines:
            program = shutil.which(f"{PROGRAMS[family]}-restore", path=PATH) or f"{PROGRAMS[family]}-restore"
            _run([program, "--noflush", "--wait", LOCK_SECONDS], "\n".join((f"*{NAT}", *lines, "COMMIT", "")))


def _run(words: list[str], text: str = "") -> str:
    """The output of a program that gets `text`. Raises CniError."""
    left = "rules of the reference plugin are left"
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, errors="replace", timeout=30,
                              check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise CniError(NFT_REFUSED, f"cannot run {words[0]}: {error}", left) from None
    if done.returncode:
        raise CniError(NFT_REFUSED, f"{words[0]} failed: {done.stderr.strip().partition(chr(10))[0]}", left)
    return done.stdout
