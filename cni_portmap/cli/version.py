"""cni-portmap version."""
import argparse
import json

from .. import __version__
from ..cni import VERSIONS
from ..linux.kernel import Kernel

HELP = "show the versions of this program and of the CNI specification"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare no options."""


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Print them."""
    if options.json:
        print(json.dumps({"version": __version__, "cniVersions": VERSIONS}))
    else:
        print(f"cni-portmap {__version__}, CNI {', '.join(VERSIONS)}")
    return 0
