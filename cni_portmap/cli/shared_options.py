"""Options that several commands have."""
import argparse
from collections.abc import Callable

from ..libcni_cache import CACHE_DIRS


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Where libcni's results are."""
    parser.add_argument("--cache", metavar="DIR", action="append", help="read this results folder of libcni instead "
                        f"of {', '.join(CACHE_DIRS)} (may be repeated)")


def add_plugin(parser: argparse.ArgumentParser) -> None:
    """What conflists call this plugin."""
    parser.add_argument("--plugin", metavar="TYPE", default="portmap", help="the type of this plugin in conflists "
                        "(default: portmap)")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Look, and change nothing."""
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and make no changes")


def seconds(least: float, most: float) -> Callable[[str], float]:
    """The type of a number of seconds in these bounds."""
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds from {least:g} to {most:g}")
        return value
    return read
