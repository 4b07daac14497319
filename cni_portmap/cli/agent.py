"""cni-portmap agent."""
import argparse
import os

from ..cni import IO_FAILURE, CniError
from ..libcni_cache import CACHE_DIRS
from ..linux import companion
from ..linux.kernel import Kernel
from .shared_options import add_cache, seconds

HELP = "restore at once what others delete, remove rules of dead containers, and tell of it"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--reserve", action="store_true", help="hold a socket for each published port, for those who "
                        "look for listeners: virtual machines' port forwarders")
    parser.add_argument("--forward", action="store_true", help="forward what NAT cannot: IPv6 clients to containers "
                        "without IPv6, [::1] behind br_netfilter, link-local clients; implies --reserve")
    parser.add_argument("--metrics", metavar="ADDRESS", type=_address, help="answer GET /metrics there: "
                        "unix:PATH, closed to other users, or HOST:PORT")
    parser.add_argument("--gc-seconds", metavar="SECONDS", type=seconds(0, 86400), default=0, help="remove rules "
                        "of dead containers as often (default: 0, never)")
    add_cache(parser)
    parser.add_argument("--buffer", metavar="BYTES", type=_bytes, default=0, help="netlink receive buffer "
                        "(default: 64 MiB, which 20,000 containers need)")
    parser.add_argument("--resume", action="store_true", help="let the agent that runs heal again, after an "
                        "administrator has deleted the table twice")


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text.startswith("unix:/") or (host and host != "unix" and port.isdecimal() and 0 < int(port) < 65536):
        return text
    raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected unix:PATH (absolute) or HOST:PORT")


def _bytes(text: str) -> int:
    if not text.isdecimal() or not 4096 <= int(text) < 1 << 30:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected a number of bytes, 4096 to 1073741823")
    return int(text)


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Run the agent until SIGTERM; or tell the one that runs to resume."""
    if options.resume:
        if companion.ask("resume") is None:
            raise CniError(IO_FAILURE, "no agent runs in this network namespace",
                           "see: systemctl status cni-portmap-agent")
        print("the agent heals again")
        return 0
    from ..agent.main import Options, run
    from ..linux.events import BUFFER
    return run(Options(options.metrics or "", options.gc_seconds, [*map(os.path.abspath, options.cache or CACHE_DIRS)],
                       options.buffer or BUFFER, options.reserve, options.forward))
