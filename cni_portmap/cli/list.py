"""cni-portmap list."""
import argparse
import json
import sys

from ..linux.kernel import Kernel
from ..verbs.published import published, ranges

HELP = "show which host port is forwarded to which container"
RED, PLAIN = "\033[31m", "\033[0m"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--port", type=int, help="only this host port")
    parser.add_argument("--container", metavar="ID", help="only containers whose ID begins with this")
    parser.add_argument("--network", metavar="NAME", help="only this network")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Print a line for each rule; 1 if the port that was asked for is not published."""
    lines = [line for line in published(kernel)
             if (options.port is None or options.port in line.host_ports)
             and (not options.container or line.container_id.startswith(options.container))
             and (not options.network or line.network == options.network)]
    if options.json:
        print(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        _print_table(("HOST", "CONTAINER", "NETWORK", "POD", "ID", "INTERFACE", "CONNECTIONS", "OWNER"),
                     [(_end(line.host_ip, line.host_ports) + f"/{line.protocol}",
                       _end(line.container_ip, line.container_ports) if line.container_ip else "(no rule)",
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
