"""cni-portmap validate."""
import argparse
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from ..cni import IO_FAILURE, UNDECODABLE, VERSIONS, CniError
from ..explain import violations
from ..linux.kernel import Kernel
from .shared_options import add_plugin

HELP = "check the portmap part of a CNI configuration file"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", type=pathlib.Path, metavar="FILE", help="a .conflist or .conf file")
    add_plugin(parser)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Print each finding with its line and column; 1 if there is one."""
    try:
        text = options.file.read_text("utf-8")
    except OSError as error:
        raise CniError(IO_FAILURE, f"cannot read {options.file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CniError(UNDECODABLE, f"{options.file} is not UTF-8: {error.reason} at byte {error.start}") from None
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
    """Offset, JSON path and expected value of each mistake in a CNI configuration file."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        yield error.pos, "JSON", f"a JSON document ({error.msg})"
        return
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, or 100,000 lists in one another
        yield 0, "JSON", f"values that can be read: {error}"
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
        capabilities, is_isolated = entry.get("capabilities"), "isolated" in (entry.get("gatewayModeV4"),
                                                                             entry.get("gatewayModeV6"))
        if not is_isolated and (not isinstance(capabilities, dict) or capabilities.get("portMappings") is not True):
            yield _offset(text, steps), _path(steps), '"capabilities": {"portMappings": true}, or nothing is published'
        inherited = {key: document[key] for key in ("name", "cniVersion") if key in document}
        for found, _, expected in violations({**entry, **inherited}):
            path = found.removeprefix("the configuration")
            inner = [int(step[1:-1]) if step[0] == "[" else step for step in re.findall(r"[^.\[]+|\[\d+\]", path)]
            where = inner if inner[:1] in (["name"], ["cniVersion"]) else [*steps, *inner]
            yield _offset(text, where), _path(where) or found, expected


def _path(steps: list[Any]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def _offset(text: str, steps: list[Any]) -> int:
    """The offset in a JSON text of the value at a path, or of the deepest existing value around it."""
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
