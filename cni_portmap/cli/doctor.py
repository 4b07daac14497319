"""cni-portmap doctor."""
import argparse
import ipaddress
import json
import sys

from ..attachment import parse_ip
from ..cni import CniError, ConfigError
from ..linux.kernel import Kernel
from ..ruleset import PROTOCOL_NUMBERS
from .checks import Finding, Scene, examine
from .checks.drawing import drawing
from .checks.finding import ERROR, INFO, WARNING

HELP = "say why a published port does not answer; --from and --to turn most doubts into facts"
BOLD_RED, BOLD, PLAIN = "\033[1;31m", "\033[1m", "\033[0m"


def port(text: str) -> tuple[int, str]:
    """PORT[/PROTOCOL]; the protocol is "" where it is not named."""
    number, _, protocol = text.partition("/")
    if not (number.isascii() and number.isdigit() and 0 < int(number) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a port from 1 to 65535, such as 8080 or 53/udp")
    if protocol and protocol not in PROTOCOL_NUMBERS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(PROTOCOL_NUMBERS)} after the slash")
    return int(number), protocol


def address(text: str) -> bytes:
    """An address of one machine, packed."""
    try:
        found = ipaddress.ip_address(parse_ip(text.strip("[]").partition("%")[0], "")[1])
    except ConfigError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an IPv4 or IPv6 address") from None
    if found.is_unspecified or found.is_multicast or found == ipaddress.IPv4Address("255.255.255.255"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the address of one machine")
    return found.packed


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("port", metavar="PORT[/PROTOCOL]", nargs="?", type=port, default=(None, ""),
                        help="the host port that does not answer (default: the host in general)")
    parser.add_argument("--from", dest="client", metavar="ADDRESS", type=address, help="who asks")
    parser.add_argument("--to", metavar="ADDRESS", type=address, help="the address of this host that is asked")
    parser.add_argument("--probe", action="store_true", help="also send the first packet of a connection from this "
                        "host (TCP; it is reset at once, and the program does not see it)")
    parser.add_argument("--verbose", action="store_true", help="show what is only worth knowing, too")


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Print what is wrong; 1 if anything is."""
    number, protocol = options.port
    if options.client and options.to and len(options.client) != len(options.to):
        raise CniError(4, "--from and --to are of different families", "give two IPv4 addresses, or two of IPv6")
    try:
        scene = Scene(kernel, number, protocol, options.client, options.to)
        found = examine(scene)
    except CniError as error:
        if error.code == 103:
            raise
        scene, found = None, [Finding("unreadable", ERROR, f"the rules of this host cannot be read: {error.msg}",
                                      ("nft list ruleset",), error.details or "run it as root")]
    tried: list[str] = []
    if options.probe and scene is not None:
        from .checks.probe import probes
        tried = [*probes(scene)]
    if options.json:
        print(json.dumps([finding.as_json() for finding in found], indent=2))
    else:
        if scene is not None:
            _print_ports(scene)
        for line in tried:
            print(line)
        _print_findings(found, options.verbose)
        if scene is not None:
            _print_end(scene, found)
    return 1 if any(finding.severity != INFO for finding in found) else 0


def _print_ports(scene: Scene) -> None:
    for target in scene.targets:
        where = f"{target.container_ip}:{target.container_port}" if target.container_ip and ":" not in \
            target.container_ip else f"[{target.container_ip}]:{target.container_port}"
        count = len(target.line.host_ports)
        more = f" and {count - 1} more ports" if scene.port is None and count > 1 else ""
        print(f"{target}{more} -> {where if target.container_ip else '(no rule)'}  container {target.name}, network "
              f"{target.line.network or 'unknown'}, {target.line.connections or 0} connections so far")
    if scene.port is None:
        if not scene.targets:
            print("cni-portmap publishes nothing on this host")
        print()
        print(drawing(scene.rulesets))
    print()


def _print_findings(found: list[Finding], verbose: bool) -> None:
    on_terminal = sys.stdout.isatty()
    hidden = 0
    serious = any(finding.severity != INFO for finding in found)
    for finding in found:
        if finding.severity == INFO and serious and not verbose:
            hidden += 1
            continue
        word = {ERROR: "FOUND", WARNING: "PERHAPS", INFO: "by the way"}[finding.severity]
        if on_terminal:
            word = f"{BOLD_RED if finding.severity == ERROR else BOLD}{word}{PLAIN}"
        print(f"{word}: {finding.summary}   [{finding.cause}]")
        for line in finding.evidence:
            print(f"    seen: {line}")
        print(f"    do:   {finding.advice}")
        print()
    if hidden:
        print(f"{hidden} more that {'is' if hidden == 1 else 'are'} only worth knowing: --verbose")


def _print_end(scene: Scene, found: list[Finding]) -> None:
    if any(finding.severity == ERROR for finding in found):
        return
    if scene.port is None:
        if not any(finding.severity == WARNING for finding in found):
            print("Nothing is wrong with this host.")
    elif scene.targets:
        print(f"Nothing {'else ' if found else ''}here stops it. Try once more and look whether the number of "
              f"connections grows\n(cni-portmap list --port {scene.port}): if it does not, the packets do not reach "
              "this host: a router, a cloud's security\ngroup, another host's firewall. If it does: cni-portmap trace "
              f"{scene.port}/{scene.protocol}")
