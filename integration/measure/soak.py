#!/usr/bin/python3
"""Thousands of containers come and go; then the host is compared with what it was. As root.

    integration/measure/soak.py [--cycles 10000] [--executable]

A cycle is ADD, sometimes ADD again or CHECK, and DEL of a container with two addresses and three ports, in a fork of
this process or, with --executable, as runtimes do it. It prints what grew, and how long a cycle took.
"""
import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab.soak import soak

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10000)
    parser.add_argument("--executable", action="store_true")
    options = parser.parse_args()
    lab.enter()
    begin = last = time.monotonic()

    def progress(cycle: int) -> None:
        nonlocal last
        print(f"{cycle} cycles, the last 1000 took {time.monotonic() - last:.1f} ms each", flush=True)
        last = time.monotonic()

    with tempfile.TemporaryDirectory() as folder, lab.fresh_host():
        changed = soak(lab.install(pathlib.Path(folder, "bin")) / "portmap", options.cycles, options.executable,
                       progress)
    for kind, (came, went) in changed.items():
        print(f"{kind}: {len(came)} came, {len(went)} went", *sorted(came)[:5], *sorted(went)[:5], sep="\n  ")
    verdict = "SOMETHING CHANGED" if changed else "nothing grew"
    print(f"{options.cycles} cycles in {time.monotonic() - begin:.0f} s: {verdict}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
