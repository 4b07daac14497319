#!/usr/bin/python3
"""Compare the reader of everybody's rules with the kernel, for as many random rulesets as --rulesets says.

Usage: integration/measure/rules.py [--rulesets N] [--seed FIRST] [KIND...]   (kinds: nft iptables-nft iptables-legacy)

As root. Each ruleset is loaded in a private namespace, and two connections are made. Prints each difference with the
ruleset; the status is 1 if there is one.
"""
import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab import firewalls


def main() -> int:
    """Try them all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rulesets", type=int, default=1000, help="how many of each kind")
    parser.add_argument("--seed", type=int, default=1000, help="the first seed")
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    options = parser.parse_args()
    if not {*options.kinds} <= {*firewalls.KINDS}:
        parser.error(f"the kinds are {', '.join(firewalls.KINDS)}")
    lab.enter()
    equal, undecided, different = 0, 0, 0
    with firewalls.Lab() as three:
        for seed in range(options.seed, options.seed + options.rulesets):
            for kind in options.kinds or firewalls.KINDS:
                for result in three.try_one(kind, seed):
                    if isinstance(result, firewalls.Difference):
                        different += 1
                        print(result._replace(rules=""), result.rules, sep="\n", flush=True)
                    else:
                        equal, undecided = equal + result, undecided + (not result)
    print(f"{equal} verdicts equal, {undecided} undecided, {different} different")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
