#!/usr/bin/python3
"""Thousands of containers come and go; then the host is compared with what it was. As root.

    integration/measure/soak.py [--cycles 10000] [--executable]
    integration/measure/soak.py --agent MINUTES

A cycle is ADD, sometimes ADD again or CHECK, and DEL of a container with two addresses and three ports, in a fork of
this process or, with --executable, as runtimes do it. It prints what grew, and how long a cycle took.

With --agent a container a second comes and goes beside an agent, the ruleset is flushed every 90 seconds, and each
minute it prints what the agent uses. It ends with what has grown since the tenth part of the time.
"""
import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import lab
from lab.soak import Use, soak, soak_agent

GROWTH = 2 << 20  # bytes of memory: what an allocator may keep
DEAD = 16  # descriptors: of the dead that are not noticed yet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10000)
    parser.add_argument("--executable", action="store_true")
    parser.add_argument("--agent", type=int, metavar="MINUTES")
    options = parser.parse_args()
    lab.enter()
    if options.agent:
        return beside_agent(options.agent)
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


def beside_agent(minutes: int) -> int:
    """Soak an agent; the exit status."""
    print("minute, RSS MB, of which anonymous, descriptors, threads, children, CPU s")

    def line(its: Use) -> None:
        print(f"{its.minute}, {its.rss / 1e6:.1f}, {its.anonymous / 1e6:.1f}, {its.fds}, {its.threads}, "
              f"{its.children}, {its.cpu:.2f}", flush=True)

    with tempfile.TemporaryDirectory() as folder, lab.fresh_host():
        found = soak_agent(lab.Host(lab.install(pathlib.Path(folder, "bin")) / "portmap"), minutes, line)
    first, last = found[max(1, minutes // 10)], found[-1]
    grown = last.rss - first.rss > GROWTH or last.fds > first.fds + DEAD or last.threads > first.threads
    share = (last.cpu - first.cpu) / max(1, last.minute - first.minute) / 60
    print(f"from minute {first.minute} to {last.minute}: RSS {(last.rss - first.rss) / 1e6:+.1f} MB, descriptors "
          f"{last.fds - first.fds:+}, threads {last.threads - first.threads:+}, CPU {share:.1%} of a core: "
          f"{'SOMETHING GREW' if grown else 'nothing grew'}")
    return grown


if __name__ == "__main__":
    sys.exit(main())
