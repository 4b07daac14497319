"""cni-portmap list."""
import argparse
import json
import sys

from ..cni import warn
from ..linux import companion
from ..linux.kernel import Kernel
from ..verbs.exposed import Exposed, exposed
from ..verbs.published import Published, published, ranges
from .shared_options import seconds

HELP = "show which host port is forwarded to which container"
RED, PLAIN = "\033[31m", "\033[0m"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--port", type=int, help="only this host port")
    parser.add_argument("--container", metavar="ID", help="only containers whose ID begins with this")
    parser.add_argument("--network", metavar="NAME", help="only this network")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--exposure", action="store_true", help="show instead who reaches which container past its "
                      "published ports; --port is then a container port")
    what.add_argument("--watch", metavar="SECONDS", nargs="?", type=seconds(0.1, 86400), const=1.0,
                      help="show new connections per second, again and again (default: each second)")
    what.add_argument("--all", action="store_true", help="also ports that others publish (Docker, netavark, CRI-O, "
                        "kube-proxy, the reference plugin), and whether two publish one port")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Print a line for each rule; 1 if the port that was asked for is not published."""
    if options.exposure:
        return _show_exposure(options, kernel)
    return _run_all(options, kernel) if options.all else _run_own(options, kernel)


def _run_own(options: argparse.Namespace, kernel: Kernel) -> int:
    if options.watch is not None:
        from .watch import watch
        watch(kernel, lambda line: _is_wanted(line, options), options.watch, options.json, _show_rates)
    lines = [line for line in published(kernel) if _is_wanted(line, options)]
    if options.json:
        print(json.dumps([{**line._asdict(), "reach": line.reach} for line in lines], indent=2))
    else:
        _print_table(("HOST", "REACH", "CONTAINER", "NETWORK", "POD", "ID", "INTERFACE", "CONNECTIONS", "OWNER"),
                     [(_host(line), line.reach, _container(line), line.network, line.pod or "-",
                       line.container_id[:12], line.ifname, _connections(line), _owner(line)) for line in lines],
                     [line.owner == "dead" for line in lines])
        _print_forwarded(options.port)
    return 0 if lines or options.port is None else 1


def _show_rates(rows: list[tuple[Published, float]]) -> None:
    _print_table(("HOST", "REACH", "CONTAINER", "POD", "ID", "CONNECTIONS", "NEW/S"),
                 [(_host(line), line.reach, _container(line), line.pod or "-", line.container_id[:12],
                   _connections(line), f"{rate:.1f}") for line, rate in rows],
                 [line.owner == "dead" for line, _ in rows])


def _show_exposure(options: argparse.Namespace, kernel: Kernel) -> int:
    """Print a line for each policy; 1 if nobody reaches the port that was asked for."""
    lines = [line for line in exposed(kernel)
             if (options.port is None or any(port.startswith(f"{options.port}/") for port in line.open + line.trusted))
             and (not options.container or line.container_id.startswith(options.container))
             and (not options.network or line.network == options.network)]
    if options.json:
        print(json.dumps([line._asdict() for line in lines], indent=2))
    else:
        _print_table(("CONTAINER", "MODE", "OPEN", "OUT AS", "NETWORK", "POD", "ID", "INTERFACE", "COMPLETE", "OWNER"),
                     [(",".join(line.addresses), line.mode, _opened(line), line.outgoing or "-", line.network,
                       line.pod or "-", line.container_id[:12], line.ifname, "yes" if line.complete else "no",
                       line.owner) for line in lines],
                     [line.owner == "dead" for line in lines])
    return 0 if lines or options.port is None else 1


def _opened(line: Exposed) -> str:
    """The ports that are open, such as "80/tcp; from wg0: 80/tcp"."""
    parts = [",".join(line.open)] if line.open else []
    if line.trusted:
        parts.append(f"from {','.join(line.interfaces)}: {','.join(line.trusted)}")
    return "; ".join(parts) + (" (conditions)" if line.conditions else "") or "-"


def _run_all(options: argparse.Namespace, kernel: Kernel) -> int:
    from ..verbs.others import everybody
    found, unreadable = everybody(published(kernel), kernel)
    if unreadable:
        warn(f"the rules of iptables-legacy cannot be read: {unreadable}")
    found = [each for each in found if _is_wanted(each.published, options)]
    if options.json:
        print(json.dumps([{**each.published._asdict(), "publisher": each.publisher, "rule": each.rule,
                           "split": each.split} for each in found], indent=2))
    else:
        lines: dict[tuple[str, str], tuple[str, ...]] = {}
        more: dict[tuple[str, str], int] = {}
        for each in found:  # of several containers that share a port (kube-proxy) the first is shown
            line, key = each.published, (_host(each.published), each.publisher)
            more[key] = more.get(key, -1) + 1
            lines.setdefault(key, (
                _host(line), _container(line), each.publisher, line.network or "-", line.pod or "-",
                line.container_id[:12] or "-", _connections(line),
                f"with {', '.join(each.split)}" if each.split else "-"))
        _print_table(("HOST", "CONTAINER", "PUBLISHER", "NETWORK", "POD", "ID", "CONNECTIONS", "SPLIT"),
                     [(host, container + (f" (+{more[key]})" if more[key] else ""), *rest)
                      for key, (host, container, *rest) in lines.items()],
                     [line[-1] != "-" for line in lines.values()])
    return 0 if found or options.port is None else 1


def _is_wanted(line: Published, options: argparse.Namespace) -> bool:
    return (options.port is None or options.port in line.host_ports) and \
        (not options.container or line.container_id.startswith(options.container)) and \
        (not options.network or line.network == options.network)


def _host(line: Published) -> str:
    return _end(line.host_ip, line.host_ports) + f"/{line.protocol}"


def _container(line: Published) -> str:
    return _end(line.container_ip, line.container_ports) if line.container_ip else "(no rule)" if line.owner else "-"


def _connections(line: Published) -> str:
    return "-" if line.connections is None else str(line.connections)


def _owner(line: Published) -> str:
    """Its state, and who gets the port when it is removed: "alive, 6f1c0a2b9d3e stands by"."""
    words = [line.owner, *(["by operator"] if line.by == "operator" else [])]
    for each in line.standby:
        container_id, _, ifname = each.partition("/")
        words.append(f"{ifname if container_id == line.container_id else container_id[:12]} stands by")
    return ", ".join(words)


def _end(ip: str, ports: tuple[int, ...]) -> str:
    return f"{f'[{ip}]' if ':' in ip else ip}:{ranges(ports)}"


def _print_forwarded(port: int | None) -> None:
    """What an agent forwards besides, which is not in the table."""
    for family, protocol, _, host_port, ip, container_port in (companion.ask("status") or {}).get("forwarded", ()):
        if port in (None, host_port):
            print(f"the agent forwards {'[::]' if family == 6 else '0.0.0.0'}:{host_port}/{protocol} to "
                  f"{_end(ip, (container_port,))}")


def _print_table(head: tuple[str, ...], lines: list[tuple[str, ...]], red: list[bool]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line, is_red in zip((head, *lines), (False, *red), strict=True):
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(f"{RED}{text}{PLAIN}" if is_red and sys.stdout.isatty() else text)
