#!/usr/bin/python3
"""Measure the paths of lab/paths.py with this plugin and with others: the table of docs/paths.md. As root.

    integration/measure/paths.py --plugin 'portmap 1.1.1, iptables' /usr/lib/cni/portmap iptables \\
                                 --plugin 'portmap 1.9.1, nftables' /tmp/new/usr/lib/cni/portmap nftables

Debian's package containernetworking-plugins has the reference plugin: 1.1.1 in bookworm and trixie, with an iptables
backend only, 1.9.1 in forky, with both; `apt-get download` and `dpkg -x` unpack it beside the installed one. It needs
the packages iptables and nftables. Every plugin gets a network namespace of its own.
"""
import argparse
import concurrent.futures
import multiprocessing
import pathlib
import re
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab import exposed, paths
from lab.site import Site

Case = tuple[paths.Path, paths.Setting, int, str]  # with the family and the protocol
FAILED = "ADD fails"
POLICIES = [mode for mode in exposed.MODES if "outgoing" not in mode.name and len({mode.of(4), mode.of(6)}) == 1]
POLICY_HEADING = "## With a policy"


def measure(executable: str, config: dict[str, Any]) -> dict[Case, str]:
    """The peer that the container saw in each case; `executable`: "" for this checkout's plugin."""
    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        bin_dir = pathlib.Path(folder, "bin")
        if executable:
            (lab.plugins(bin_dir) / "portmap").symlink_to(executable)
        else:
            lab.install(bin_dir)
        for setting in paths.SETTINGS:
            cases = [(path, setting, family, protocol) for path in paths.PATHS for family in (4, 6)
                     for protocol in ("tcp", "udp") if paths.exists(path, setting, family)]
            try:
                with Site(setting, bin_dir, **config) as site:
                    for case in cases:
                        seen[case] = site.try_path(case[0], case[2], case[3], 0.4)
            except lab.CniFailed:
                seen.update(dict.fromkeys(cases, FAILED))
    return seen


def cell(path: paths.Path, family: int, seen: dict[Case, str]) -> str:
    """The peer seen on a path, the most frequent first, then the others with their settings. A failure is bold."""
    texts: dict[str, set[str]] = {}
    for (its_path, setting, its_family, _), saw in seen.items():
        if (its_path, its_family) == (path, family):
            right = paths.wanted(path, setting)
            text = FAILED if saw == FAILED else "no" if not saw else "yes" if not right or saw in (right, path.sees) \
                else f"yes, but sees {saw}"
            text = text if (saw == "") == (right == "") and saw != FAILED else f"**{text}**"
            texts.setdefault(text, set()).add(setting.name.replace(f"IPv{family}", "one family"))
    first, *rest = sorted(texts, key=lambda text: -len(texts[text])) or [""]
    order = [setting.name.replace(f"IPv{family}", "one family") for setting in paths.SETTINGS]
    where = {text: " / ".join(name for name in order if name in texts[text]) for text in rest}
    return "; ".join([first, *(f"{text} ({where[text]})" for text in rest)])


def table(measured: dict[str, dict[Case, str]]) -> str:
    """The Markdown table: a line for each path, IPv4 and IPv6 apart where they differ."""
    lines = [["path", "", "the container sees", *measured], ["---"] * (3 + len(measured))]
    for path in paths.PATHS:
        cells = {family: [cell(path, family, seen) for seen in measured.values()] for family in (4, 6)}
        merged = [family for family in (4, 6) if any(cells[family])]
        if cells[4] == cells[6]:
            merged = merged[:1]
        lines += ([str(path), "IPv4, IPv6" if cells[4] == cells[6] else f"IPv{family}",
                   path.sees or "nothing", *cells[family]] for family in merged)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def policy_table() -> str:
    """The Markdown table of who reaches what in each gateway mode, as test_exposure asserts it with packets."""
    lines = [["to", "from", *(mode.name for mode in POLICIES)], ["---"] * (2 + len(POLICIES))]
    for target in exposed.TARGETS:
        who: dict[tuple[str, ...], list[str]] = {}
        for each in exposed.WHO:
            cells = tuple("yes" if exposed.reaches(mode, 4, each, target) else "no" for mode in POLICIES)
            who.setdefault(cells, []).append(each)
        lines += ([target.name, "everybody" if len(who) == 1 else ", ".join(names), *cells]
                  for cells, names in who.items())
    seen = {"container": "itself", "": "nobody"}
    out = (exposed.out_as(mode, 4, "container") for mode in POLICIES)
    lines.append(["the LAN client, who sees", "the container", *(seen.get(each, "the host") for each in out)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_table(document: pathlib.Path, table: str, heading: str = "") -> None:
    """Put a Markdown table in the place of the first one of a document, after a heading."""
    text = document.read_text()
    at = text.index(heading)
    document.write_text(text[:at] + re.sub(r"(?m)(^\|.*\n)+", lambda _: f"{table}\n", text[at:], count=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", nargs=3, action="append", default=[], metavar=("TITLE", "EXECUTABLE", "BACKEND"),
                        help="another portmap plugin, and its configuration's `backend`")
    parser.add_argument("--write", action="store_true", help="also write the table to docs/paths.md")
    options = parser.parse_args()
    measured = {}
    for title, executable, backend in [("cni-portmap", "", ""), *options.plugin]:
        fresh = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh, initializer=lab.enter) as process:
            config = {"backend": backend} if backend else {}
            measured[title] = process.submit(measure, executable, config).result()
    text = table(measured)
    print(text)
    if options.write:
        replace_table(lab.ROOT / "docs/paths.md", text)
        replace_table(lab.ROOT / "docs/paths.md", policy_table(), POLICY_HEADING)


if __name__ == "__main__":
    main()
