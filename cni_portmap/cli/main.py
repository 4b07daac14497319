"""Run one command."""
import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from ..cni import IO_FAILURE, CniError, name_process, tell
from ..linux.kernel import Kernel

COMMANDS = ("list", "doctor", "trace", "publish", "unpublish", "restore", "gc", "agent", "adopt", "release", "teardown",
            "node-install", "validate", "version", "completion")  # in the order of --help


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0 success, 1 a failure or a finding, 2 wrong usage."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser(given[:1]).parse_args(given)
    name_process(options.command)
    kernel = Kernel()
    try:
        status: int = options.run(options, kernel)
        print(end="", flush=True)  # also where there is no standard output
    except CniError as error:
        status = _failed(error, options.json)
    except BrokenPipeError:  # `cni-portmap list | head`
        _discard_output()
        status = 1
    except OSError as error:
        why = f"{error.filename or 'the system'}: {error.strerror or error}"
        status = _failed(CniError(IO_FAILURE, why), options.json)
    except MemoryError:
        status = _failed(CniError(IO_FAILURE, "there is not enough memory"), options.json)
    tell()
    kernel.leave()
    return status


def _failed(error: CniError, as_json: bool) -> int:
    """Tell of an error; the exit status."""
    print(f"cni-portmap: {error.msg}\n  {error.details}".rstrip(), file=sys.stderr)
    try:
        if as_json:
            print(json.dumps({"code": error.code, "msg": error.msg, "details": error.details}))
        print(end="", flush=True)
    except OSError:  # it is full
        _discard_output()
    return 1


def _discard_output() -> None:
    """Let what is left for standard output go nowhere: else the interpreter's end would complain of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser(names: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of these commands; of all, if none of them is one. All cost 0.2 s of imports."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable output")
    whole = argparse.ArgumentParser(prog="cni-portmap", description="Container ports published with nftables.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name in [name for name in names if name in COMMANDS] or COMMANDS:
        command = module(name)
        sub = commands.add_parser(name, parents=[common], help=command.HELP,
                                  description=command.HELP[0].upper() + command.HELP[1:] + ".")
        command.arguments(sub)
        sub.set_defaults(run=command.run, command=name)
    return whole


def module(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f".{name.replace('-', '_')}", __package__)


if __name__ == "__main__":
    sys.exit(main())
