"""cni-portmap, the operator's command: who has a port, and what to do about it."""
import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from . import __version__, portmap, restore
from .cni import VERSIONS, CniError, tell
from .config import Attachment
from .explain import violations
from .kernel import Kernel, leave
from .report import published, ranges
from .ruleset import TABLE
from .teardown import teardown

RED, PLAIN = "\033[31m", "\033[0m"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status: 0 fine, 1 a failure or a finding, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    kernel = Kernel()
    try:
        status: int = options.run(options, kernel)
    except CniError as error:
        if options.json:
            print(json.dumps({"code": error.code, "msg": error.msg, "details": error.details}))
        print(f"cni-portmap: {error.msg}\n  {error.details}".rstrip(), file=sys.stderr)
        status = 1
    except BrokenPipeError:  # `cni-portmap list | head`
        sys.stderr.close()
        status = 1
    tell()
    leave()
    return status


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable output")
    parser = argparse.ArgumentParser(prog="cni-portmap", description="Container ports published with nftables.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=[common], help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    sub = command("list", _list, "show which host port leads to which container")
    sub.add_argument("--port", type=int, help="only this host port")
    sub.add_argument("--container", metavar="ID", help="only containers whose ID begins like this")
    sub.add_argument("--network", metavar="NAME", help="only this network")
    sub = command("restore", _restore, "publish again what a firewall reload has removed")
    sub.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    sub.add_argument("--cache", metavar="DIR", action="append", help="a results folder of libcni, in place of "
                     f"{', '.join(restore.CACHES)} (may be repeated)")
    sub.add_argument("--plugin", metavar="TYPE", default="portmap", help="its type in conflists (default: portmap)")
    sub.add_argument("--base-only", action="store_true", help="repair only what all containers share, such as the "
                     "guard of localhost")
    sub = command("gc", _gc, "remove what containers left behind whose network namespace is gone")
    sub.add_argument("--dry-run", action="store_true", help="show what would be removed, and write nothing")
    sub = command("teardown", _teardown, "close localhost and remove the whole table, before an uninstallation")
    sub.add_argument("--force", action="store_true", help="also while containers are published: their ports stop "
                     "answering")
    sub.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    sub = command("validate", _validate, "check the portmap part of a CNI configuration file")
    sub.add_argument("file", type=pathlib.Path, metavar="FILE", help="a .conflist or .conf file")
    sub.add_argument("--plugin", metavar="TYPE", default="portmap", help="the plugin's type in it (default: portmap)")
    command("version", _version, "show the versions of this program and of the CNI specification")
    return parser


# --- list -----------------------------------------------------------------------------------------------------

def _list(options: argparse.Namespace, kernel: Kernel) -> int:
    lines = [line for line in published(kernel)
             if (options.port is None or options.port in line.host_ports)
             and (not options.container or line.container_id.startswith(options.container))
             and (not options.network or line.network == options.network)]
    if options.json:
        print(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        _print_table(("HOST", "CONTAINER", "NETWORK", "POD", "ID", "INTERFACE", "CONNECTIONS", "OWNER"),
                     [(_end(line.host_ip, line.host_ports) + f"/{line.protocol}",
                       _end(line.container_ip, line.container_ports) if line.container_ip else "(rule is missing)",
                       line.network, line.pod or "-", line.container_id[:12], line.ifname,
                       "-" if line.connections is None else str(line.connections), line.owner) for line in lines])
    return 0 if lines or options.port is None else 1


def _end(ip: str, ports: tuple[int, ...]) -> str:
    return f"{f'[{ip}]' if ':' in ip else ip}:{ranges(ports)}"


def _print_table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(f"{RED}{text}{PLAIN}" if line[-1] == "dead" and sys.stdout.isatty() else text)


# --- restore, gc ----------------------------------------------------------------------------------------------

def _name(attachment: Attachment) -> dict[str, object]:
    return {"container": attachment.container_id, "interface": attachment.ifname, "network": attachment.network,
            "ports": len(attachment.ports)}


def _restore(options: argparse.Namespace, kernel: Kernel) -> int:
    live: list[Attachment] = []
    skipped: list[dict[str, str]] = []
    if options.base_only:
        return _repair_base(options, kernel)
    memory = restore.Memory(options.cache or restore.CACHES, options.plugin, kernel)
    for path, found in memory.found:
        if isinstance(found, Attachment):
            live.append(found)
        else:
            skipped.append({"file": str(path), "reason": str(found)})
    lost, refused = restore.restore(live, kernel, options.dry_run, memory.is_current)
    tell()
    report = {"restored": [_name(each) for each in lost],
              "refused": [{**_name(each), "reason": error.msg} for each, error in refused],
              "in_place": len(live) - len(lost) - len(refused), "skipped": skipped}
    if options.json:
        print(json.dumps(report, indent=2))
        return 1 if refused else 0
    for each in lost:
        print(f"{'would restore' if options.dry_run else 'restored'} container {each.container_id}, interface "
              f"{each.ifname}, network {each.network}: {len(each.ports)} ports")
    for each, error in refused:
        print(f"cannot restore container {each.container_id}: {error.msg}")
    print(f"{len(lost)} restored, {len(live) - len(lost) - len(refused)} in place, {len(refused)} refused, "
          f"{len(skipped)} skipped" + (" (dry run)" if options.dry_run else ""))
    return 1 if refused else 0


def _repair_base(options: argparse.Namespace, kernel: Kernel) -> int:
    repaired = portmap.repair_base(kernel, options.dry_run)
    if options.json:
        print(json.dumps({"repaired": repaired}))
    else:
        print(("would repair" if options.dry_run else "repaired") + " what containers share" if repaired else
              "nothing to repair")
    return 0


def _gc(options: argparse.Namespace, kernel: Kernel) -> int:
    found = restore.prune(kernel, options.dry_run)
    dead = [(owner, why) for owner, (state, why) in found if state == "dead"]
    unknown = [(owner, why) for owner, (state, why) in found if state == "unknown"]
    if options.json:
        print(json.dumps([{"container": owner.container_id, "interface": owner.ifname, "network": owner.network,
                           "netns": owner.netns} for owner, _ in dead], indent=2))
    else:
        for owner, why in dead:
            print(f"{'would remove' if options.dry_run else 'removed'} {owner}: {why}")
        for owner, why in unknown:
            print(f"kept {owner}: {why}")
        print(f"{len(dead)} dead" + (" (dry run)" if options.dry_run else ""))
    return 0


def _teardown(options: argparse.Namespace, kernel: Kernel) -> int:
    done = teardown(kernel, options.force, options.dry_run)
    published = [{"container": owner.container_id, "interface": owner.ifname, "network": owner.network, "dead": dead}
                 for owner, dead in done.published]
    if options.json:
        print(json.dumps({"published": published, "refused": done.refused, "table": done.table,
                          **done.closing._asdict()}, indent=2))
        return 1 if done.refused else 0
    for owner, dead in done.published:
        print(f"published: {owner}" + (", whose network namespace is gone" if dead else ""),
              file=sys.stderr if done.refused else sys.stdout)
    if done.refused:
        print("cni-portmap: nothing was removed, because these containers are published\n"
              "  stop them (cni-portmap gc: those that are gone), or say --force: their ports stop answering",
              file=sys.stderr)
        return 1
    would = "would close" if options.dry_run else "closed"
    for name in done.closing.ipv4:
        print(f"{would} 127.0.0.0/8 on {name}")
    for name in done.closing.ipv6:
        print(f"{would} ::1 on {name}")
    for name, reason in done.closing.left_open.items():
        print(f"127.0.0.0/8 stays open on {name}, without a guard: {reason}")
    if done.table:
        print(f"{'would remove' if options.dry_run else 'removed'} table {TABLE}")
    return 0


# --- validate, version ----------------------------------------------------------------------------------------

def _validate(options: argparse.Namespace, kernel: Kernel) -> int:
    try:
        text = options.file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        print(f"cni-portmap: cannot read {options.file}: {error}", file=sys.stderr)
        return 1
    findings = [{"line": text.count("\n", 0, at) + 1, "column": at - text.rfind("\n", 0, at), "path": path,
                 "expected": expected} for at, path, expected in _findings(text, options.plugin)]
    if options.json:
        print(json.dumps(findings, indent=2))
    else:
        for finding in findings:
            print(f"{options.file}:{finding['line']}:{finding['column']}: {finding['path']}: "
                  f"expected {finding['expected']}")
        if not findings:
            print(f"{options.file}: valid")
    return 1 if findings else 0


def _findings(text: str, plugin: str) -> Iterator[tuple[int, str, str]]:
    """Offset, JSON path and expectation of each thing that is wrong with a CNI configuration file."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        yield error.pos, "JSON", error.msg
        return
    if not isinstance(document, dict):
        yield 0, "JSON", "an object"
        return
    if document.get("cniVersion", "0.1.0") not in VERSIONS:
        yield _offset(text, ["cniVersion"]), "cniVersion", f"one of {', '.join(VERSIONS)}"
    plugins = document.get("plugins")
    entries: list[tuple[list[Any], dict[str, Any]]]
    if plugins is None:
        entries = [([], document)]
    elif isinstance(plugins, list):
        entries = [(["plugins", index], entry) for index, entry in enumerate(plugins) if isinstance(entry, dict)]
    else:
        yield _offset(text, ["plugins"]), "plugins", "a list of plugins"
        return
    ours = [(steps, entry) for steps, entry in entries if entry.get("type") == plugin]
    if not ours:
        yield 0, "plugins", f"a plugin of type {plugin}"
    for steps, entry in ours:
        if steps == ["plugins", 0]:
            yield _offset(text, steps), "plugins[0]", "a plugin that connects the container before this one"
        capabilities = entry.get("capabilities")
        if not isinstance(capabilities, dict) or capabilities.get("portMappings") is not True:
            yield _offset(text, steps), _path(steps), '"capabilities": {"portMappings": true}, or nothing is published'
        inherited = {key: document[key] for key in ("name", "cniVersion") if key in document}
        for path, _, expected in violations({**entry, **inherited}):
            inner = [int(step[1:-1]) if step[0] == "[" else step for step in re.findall(r"[^.\[]+|\[\d+\]", path)]
            where = inner if inner[:1] in (["name"], ["cniVersion"]) else [*steps, *inner]
            yield _offset(text, where), _path(where), expected


def _path(steps: list[Any]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def _offset(text: str, steps: list[Any]) -> int:
    """Where in a JSON text the value at a path begins, or the deepest value around it that exists."""
    decoder = json.JSONDecoder()
    space = re.compile(r"\s*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]

    at = skip(0)
    for step in steps:
        position, index, found = skip(at + 1), 0, None
        while text[position] not in "}]":
            key: Any = index
            if text[at] == "{":
                key, position = decoder.raw_decode(text, position)
                position = skip(skip(position) + 1)
            if key == step:
                found = position
            position = skip(decoder.raw_decode(text, position)[1])
            position, index = skip(position + 1) if text[position] == "," else position, index + 1
        if found is None:
            break
        at = found
    return at


def _version(options: argparse.Namespace, kernel: Kernel) -> int:
    if options.json:
        print(json.dumps({"version": __version__, "cniVersions": VERSIONS}))
    else:
        print(f"cni-portmap {__version__}, CNI {', '.join(VERSIONS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
