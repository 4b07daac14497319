#!/usr/bin/python3
"""Attempts at random to find a fault, in private namespaces; as root.

    scripts/test faults [--seed N] [--attempts N] [KIND...]

Faults of system calls, SIGKILL, SIGINT and little memory; mutated configurations, environments, conditions and files of
libcni's cache; what others write to our table. The rule: nothing half-done, no traceback, never code 99, and every next
call converges. A seed and a number repeat an attempt. It prints how often each kind was answered with each code.
"""
import argparse
import collections
import pathlib
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab.attack import KINDS, Attack

ATTEMPTS = 15  # of each kind: a minute in all


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/test faults", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="what is tried (default: 1)")
    parser.add_argument("--attempts", type=int, default=ATTEMPTS, metavar="N",
                        help=f"of each kind (default: {ATTEMPTS})")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"only these, of: {', '.join(KINDS)}")
    options = parser.parse_args()
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]} is none of {', '.join(KINDS)}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background job it would be ignored
    lab.enter()
    faults: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        attack = Attack(lab.install(pathlib.Path(folder, "bin")) / "portmap", pathlib.Path(folder), options.seed)
        for kind in options.kinds or KINDS:
            begin = time.monotonic()
            for number in range(options.attempts):
                try:
                    attack.attempt(kind, number)
                except AssertionError as problem:
                    faults[kind] += 1
                    print(f"FAULT {problem}", flush=True)
            codes = ", ".join(f"{code}: {count}" for code, count in sorted(attack.codes.get(kind, {}).items()))
            print(f"{kind}: {options.attempts} attempts, {faults[kind]} faults, {time.monotonic() - begin:.0f} s; "
                  f"answers {codes}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
