"""The numbers as tables, plots and JSON."""
import html
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from . import agent, exposure, process
from .packets import NO_NAT
from .results import Key, Results, Summary


class Names(NamedTuple):
    """The titles of the subjects in this run; "" for one that is not there."""

    ours: str
    nftables: str
    iptables: str
    old: str
    newer: str
    bundle: str = ""


# --- what the project promises --------------------------------------------------------------------------------

class Target(NamedTuple):
    """`value` is at most `most` times the `base`, or so many milliseconds where there is none."""

    text: str
    value: Key
    base: Key | None
    most: float

    def ratio(self, results: Results) -> float | None:
        """What was measured of it, None for nothing."""
        value, base = results.median(self.value), results.median(self.base) if self.base else 1.0
        return value / base if value is not None and base else None


VERBS = ("ADD", "CHECK", "DEL")


def targets(names: Names, sizes: tuple[int, ...], ports: tuple[int, ...], crowds: tuple[int, ...],
            networks: int, addresses: int) -> list[Target]:
    """The ratios that this plugin is held to. A quick run has smaller sizes, and so ratios without a promise."""
    found: list[Target] = []

    def at(full: bool, ratio: float) -> float:
        return ratio if full else math.inf

    def against(who: str, what: str, ratios: tuple[float, ...], verbs: tuple[str, ...] = VERBS, size: int = 0) -> None:
        there = f", {size:,} containers present" if size else ""
        for verb, most in zip(verbs, ratios):
            ours = Key(verb, what, size, names.ours)
            found.append(Target(f"{verb}, {what}{there} / {who}", ours, ours._replace(subject=who), most))

    many, full = ports[-1], ports[-1] == 1000
    against(names.nftables, "1 TCP port", (0.43, 0.65, 0.20))
    against(names.nftables, "1 TCP port", (0.42, 0.15, 0.12), size=1000)
    for kind in "identity", "shifted":
        against(names.nftables, f"{many:,} {kind} ports", (at(full, 0.58), at(full, 0.72), at(full, 0.24)))
    against(names.iptables, f"{many:,} identity ports", (at(full, 0.002),), ("ADD",))
    for verb in VERBS:
        udp = Key(verb, "1 UDP port", 0, names.ours)
        found.append(Target(f"{verb}, 1 UDP port / 1 TCP port", udp, udp._replace(what="1 TCP port"), 1.15))
    for verb in VERBS:
        none = Key(verb, "no ports", 0, names.ours)
        found.append(Target(f"{verb}, no ports / {process.FLOOR}", none, Key(process.FLOOR, "", 0, ""), 1.35))
    against(names.nftables, "no ports", (math.inf,) * 3)
    for verb in "ADD again", "DEL":
        near = Key(verb, process.networks_beside(networks), 0, names.ours)
        found.append(Target(f"{verb}, beside somebody's {networks:,} networks / without", near,
                            near._replace(what=process.networks_beside(0)), at(full, 1.3)))
    big = Key("ADD", f"a port on {addresses:,} addresses", 0, names.ours)
    found += (Target(f"{key.measure}, {key.what} (ms)", key, None, at(full, most)) for key, most in (
        (big, 1000), (big._replace(measure="ADD of another meanwhile, longer by"), 200)))
    for who in names.newer, names.ours:
        for verb in "ADD", "DEL":
            last = Key(verb, "1 TCP port", sizes[-1], who)
            found.append(Target(f"{verb}, {sizes[-1]:,} containers present / none, {who}", last, last._replace(size=0),
                                at(who == names.newer and sizes[-1] == 10000, 2.0)))
    full = crowds[-1] == 10000
    for what in "published", "not published":
        last = Key("connect", what, crowds[-1], names.ours, "µs")
        others = ((f"{crowds[0]}", last._replace(size=crowds[0]), 1.05),
                  (NO_NAT, last._replace(size=0, subject=NO_NAT), 1.35),
                  (names.nftables, last._replace(subject=names.nftables), at(full, 0.15)),
                  (names.iptables, last._replace(subject=names.iptables), at(full, 0.04)))
        found += (Target(f"connect, {what}, {crowds[-1]:,} ports / {name}", last, base, most)
                  for name, base, most in others)
    for size, most in (0, 1.10), (1000, 1.15):
        guarded = Key("ADD", exposure.WHAT, size, f"{names.ours}, mode nat")
        there = f", {size:,} containers present" if size else ""
        found.append(Target(f"ADD{there}, with a policy / without", guarded, guarded._replace(subject=names.ours),
                            most))
    for size in 1, 1000:
        guarded = Key("connect, p10", exposure.WHAT, size, f"{names.ours}, mode nat", "µs")
        found.append(Target(f"connect, p10, {size:,} containers, with a policy / without", guarded,
                            guarded._replace(subject=names.ours), 1.08))
    for size in 0, 1000:
        for verb in "ADD", "DEL":
            beside = Key(verb, agent.WHAT, size, agent.beside(names.ours))
            there = f", {size:,} containers present" if size else ""
            found.append(Target(f"{verb}{there}, beside the agent / without", beside,
                                beside._replace(subject=names.ours), 1.05))
    found += (Target(f"{measure}, {size:,} containers ({unit})", Key(measure, agent.HEAL, size, "agent", unit), None,
                     most) for measure, unit, size, most in agent.TARGETS)
    for verb in VERBS:
        peak = Key(f"{verb}, peak memory", "1 TCP port", 0, names.ours, "MiB")
        theirs = peak._replace(subject=names.nftables)
        found.append(Target(f"{verb}, peak memory / {names.nftables} and its nft", peak, theirs, 1.0))
    for verb, most in zip(VERBS, (0.82, 0.88, 0.92)) if names.bundle else ():
        bundle = Key(verb, "1 TCP port", 0, names.bundle)
        found.append(Target(f"{verb}, 1 TCP port, the bundle / {names.ours}", bundle,
                            bundle._replace(subject=names.ours), most))
        none = bundle._replace(what="no ports")
        found.append(Target(f"{verb}, no ports, the bundle / {names.ours}", none, none._replace(subject=names.ours),
                            0.97))
        found.append(Target(f"{verb}, no ports, the bundle / {names.nftables}", none,
                            none._replace(subject=names.nftables), math.inf))
        peak = bundle._replace(measure=f"{verb}, peak memory", unit="MiB")
        found.append(Target(f"{verb}, peak memory, the bundle / {names.ours}", peak, peak._replace(subject=names.ours),
                            1.05))
    return found


# --- Markdown -------------------------------------------------------------------------------------------------

def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _cell(summary: Summary | None) -> str:
    if not summary:
        return ""
    spread = "" if summary.samples < 3 else f" <sub>{number(summary.low)}–{number(summary.high)}</sub>"
    return number(summary.median) + spread


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def missed(results: Results, wanted: list[Target]) -> list[Target]:
    """The targets that were measured, and not met."""
    return [target for target in wanted if (target.ratio(results) or 0) > target.most]


def markdown(results: Results, wanted: list[Target], subjects: list[str], about: dict[str, Any],
             again: Results) -> str:
    """The whole report. Ratios are of medians; the small numbers are quartiles.

    `again`: the second try of what was missed at first.
    """
    parts = ["# Benchmark\n", "Medians, with quartiles beside them; measured by `scripts/bench`, all subjects "
             "interleaved.\n", _table(["", ""], [[name, str(value)] for name, value in about.items()]),
             *_ratios(results, wanted, again)]
    sections: list[tuple[str, Callable[[Key], bool]]] = [
        ("Process (ms)", lambda key: key.unit == "ms" and "," not in key.measure and "connections" not in key.what and
         key.measure != "who lives" and key.what != exposure.WHAT),
        ("Publishing (ms): a call that publishes a port, minus one that does not",
         lambda key: key.measure.endswith("publishing")),
        ("With a policy (gatewayModeV4 and V6: nat) and without",
         lambda key: key.what == exposure.WHAT and "processor" not in key.measure),
        ("CPU time of these processes (ms)", lambda key: key.measure.endswith("processor") and
         key.what in ("no ports", "1 TCP port")),
        ("Peak memory (MiB): the process, and the largest child that ran beside it", lambda key: key.unit == "MiB"),
        ("Instructions in user space (millions), with children", lambda key: key.unit == "million"),
        ("Failed calls among concurrent ones", lambda key: key.unit == "calls"),
        ("Judging an owner without a known link (ms)", lambda key: key.measure == "who lives"),
        ("With many connections in conntrack (ms)", lambda key: key.unit == "ms" and "connections" in key.what),
        ("Packets, by number of published ports", lambda key: key.unit in ("µs", "1/s", "Gbit/s") and
         key.what != exposure.WHAT)]
    for title, belongs in sections:
        rows: dict[tuple[str, str, int, str], dict[str, Key]] = {}
        columns = dict.fromkeys(name for name in ("", NO_NAT, *subjects)
                                if any(belongs(key) and key.subject == name for key in results))
        for key in filter(belongs, results):
            if key.subject in columns and key.subject != NO_NAT:
                rows.setdefault((key.measure, key.what, key.size, key.unit), {})[key.subject] = key
        if rows:
            for row in rows.values():
                bare = next(iter(row.values()))._replace(size=0, subject=NO_NAT)
                row.update({NO_NAT: bare} if bare in results else {})
            parts += [f"## {title}\n", _table(["", *(name or "baseline" for name in columns)], [
                [_row(*name), *(_cell(results.summary(row[column])) if column in row else "" for column in columns)]
                for name, row in sorted(rows.items(), key=lambda item: _order(item[0]))])]
    return "\n".join(parts)


def _order(row: tuple[str, str, int, str]) -> tuple[object, ...]:
    measure, what, size, _ = row
    verb, verbs = measure.partition(",")[0], (*VERBS, "STATUS", "VERSION")
    digits = "".join(letter for letter in what if letter.isdigit())
    return verb not in verbs, verbs.index(verb) if verb in verbs else measure, what != "1 TCP port", size, \
        int(digits or 0), what


def _row(measure: str, what: str, size: int, unit: str) -> str:
    packets = unit in ("µs", "1/s", "Gbit/s")
    there = (f"{size:,} ports" if size > 1 else "1 port") if packets else f"{size:,} containers present" if size else ""
    name = f"{measure} ({unit})" if packets else measure.partition(",")[0]
    return ", ".join(part for part in (name, what, there) if part)


def _ratios(results: Results, wanted: list[Target], again: Results) -> list[str]:
    rows = []
    for target in wanted:
        first, second = target.ratio(results), target.ratio(again)
        ratio, found = (first, results) if second is None else (second, again)
        if ratio is not None:
            verdict = "" if target.most == math.inf else "yes" if ratio <= target.most else "**no**"
            tries = "" if second is None else f" (second try; first {_ratio(first)})"
            rows.append([target.text, number(found.median(target.value) or 0.0),
                         number(found.median(target.base) or 0.0) if target.base else "",
                         _ratio(ratio) if target.base else "",
                         "" if target.most == math.inf else f"≤ {target.most:g}", verdict + tries])
    if not rows:
        return []
    return ["## Ratios\n", '"this" is cni-portmap, "that" is the subject after the slash; milliseconds, but connect in '
            "microseconds and memory in MiB.\n", _table(["", "this", "that", "ratio", "target", "met"], rows)]


def _ratio(value: float | None) -> str:
    return f"{value or 0.0:.2g}" if (value or 0.0) < 0.1 else f"{value:.2f}"


def as_json(results: Results, about: dict[str, Any]) -> str:
    rows = []
    for key in results:
        summary = results.summary(key)
        assert summary
        rows.append({**key._asdict(), **{name: round(value, 4) for name, value in summary._asdict().items()}})
    return json.dumps({"about": about, "results": rows}, indent=1, ensure_ascii=False) + "\n"


# --- SVG ------------------------------------------------------------------------------------------------------

_LIGHT = ("#ffffff", "#d8dee4", "#1f2328", "#59636e"), ("#0969da", "#bc4c00", "#8250df", "#59636e", "#1a7f37")
_DARK = ("#0d1117", "#30363d", "#e6edf3", "#9198a1"), ("#58a6ff", "#f0883e", "#bc8cff", "#9198a1", "#3fb950")


def _style(theme: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    (page, grid, text, small), series = theme
    return f".page {{ fill: {page} }} .grid {{ stroke: {grid} }} text {{ fill: {text} }} .small {{ fill: {small} }}" + \
        "".join(f" .c{index} path {{ stroke: {color} }} .c{index} circle {{ fill: {color} }}"
                for index, color in enumerate(series))


STYLE = f"""
text {{ font: 12px sans-serif }} .title {{ font-size: 14px; font-weight: bold }} .small {{ font-size: 11px }}
path {{ fill: none; stroke-width: 2 }} .grid {{ stroke-width: 1 }}
{_style(_LIGHT)}
@media (prefers-color-scheme: dark) {{ {_style(_DARK)} }}
"""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300, 220, 52, 64, 46


class Panel(NamedTuple):
    """A plot: its title, what is below, the values below, and for each series (name -> key of each value)."""

    title: str
    below: str
    values: tuple[int, ...]
    series: dict[str, list[Key]]


def svg(results: Results, panels: list[Panel]) -> str:
    """Panels side by side, with one legend and a logarithmic scale that all share."""
    found = {(panel.title, name): [results.summary(key) for key in keys]
             for panel in panels for name, keys in panel.series.items()}
    numbers = [value for summaries in found.values() for each in summaries if each for value in (each.low, each.high)]
    names = [*dict.fromkeys(name for (_, name), summaries in found.items() if any(summaries))]
    if not numbers:
        return ""
    floor, ceiling = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))
    ceiling += floor == ceiling
    unit = next(iter(panels[0].series.values()))[0].unit
    width, height = (WIDTH + LEFT) * len(panels) + 20, TOP + HEIGHT + BOTTOM

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - (math.log10(value) - floor) / (ceiling - floor))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           f'role="img"><style>{STYLE}</style><rect class="page" width="{width}" height="{height}" rx="6"/>']
    at = LEFT
    for index, name in enumerate(names):
        out.append(f'<g class="c{index}"><circle cx="{at}" cy="20" r="5"/></g><text x="{at + 10}" y="24">'
                   f'{html.escape(name)}</text>')
        at += 30 + 7 * len(name)
    for column, panel in enumerate(panels):
        left = LEFT + column * (WIDTH + LEFT)
        step = (WIDTH - 40) / max(len(panel.values) - 1, 1)
        out.append(f'<text class="title" x="{left}" y="{TOP - 12}">{html.escape(panel.title)}</text>')
        out += (f'<path class="grid" d="M{left} {y(10 ** power):.1f}h{WIDTH}"/><text class="small" x="{left - 6}" '
                f'y="{y(10 ** power) + 4:.1f}" text-anchor="end">{10.0 ** power:,g}</text>'
                for power in range(floor, ceiling + 1))
        out += (f'<text class="small" x="{left + 20 + step * position:.1f}" y="{TOP + HEIGHT + 18}" '
                f'text-anchor="middle">{value:,}</text>' for position, value in enumerate(panel.values))
        out.append(f'<text class="small" x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">'
                   f'{html.escape(panel.below)}; {unit}, logarithmic</text>')
        for name in panel.series:
            points = [(left + 20 + step * position, each)
                      for position, each in enumerate(found[panel.title, name]) if each]
            if points:
                line = "L".join(f"{x:.1f} {y(each.median):.1f}" for x, each in points)
                out.append(f'<g class="c{names.index(name)}"><path d="M{line}"/>')
                out += (f'<path d="M{x:.1f} {y(each.low):.1f}V{y(each.high):.1f}"/>'
                        f'<circle cx="{x:.1f}" cy="{y(each.median):.1f}" r="3.5"/>' for x, each in points)
                out.append("</g>")
    return "\n".join([*out, "</svg>", ""])


def plots(results: Results, names: Names, sizes: tuple[int, ...], ports: tuple[int, ...],
          crowds: tuple[int, ...]) -> dict[str, str]:
    """The plots by file name."""
    who = [name for name in (names.ours, names.bundle, names.nftables, names.iptables, names.newer)
           if name]
    counts = (1, *ports)

    def panel(verb: str, values: tuple[int, ...], below: str, key: Callable[[str, int], Key]) -> Panel:
        return Panel(verb, below, values, {name: [key(name, value) for value in values] for name in who})

    files = {
        "bench-containers.svg": [
            panel(verb, (0, *sizes), "containers that publish ports already",
                  lambda name, value, verb=verb: Key(verb, "1 TCP port", value, name))  # type: ignore[misc]
            for verb in VERBS],
        "bench-ports.svg": [
            panel(verb, counts, "ports of one container",
                  lambda name, value, verb=verb: Key(  # type: ignore[misc]
                      verb, f"{value:,} identity ports" if value > 1 else "1 TCP port", 0, name))
            for verb in VERBS],
        "bench-packets.svg": [
            Panel(title, "published ports of the host", crowds, {
                **{name: [Key(measure, what, value, name, "µs") for value in crowds] for name in who[:3]},
                NO_NAT: [Key(measure, what, 0, NO_NAT, "µs") for _ in crowds]})
            for title, measure, what in (("connect, published port", "connect", "published"),
                                         ("connect, host's own service", "connect", "not published"),
                                         ("UDP, a flow's first packet", "UDP first packet", "published"))]}
    return {file: text for file, panels in files.items() if (text := svg(results, panels))}
