"""cni-portmap list --watch: new connections by port, refreshed in place."""
import json
import sys
import time
from collections.abc import Callable

from ..linux.kernel import Kernel
from ..verbs.published import Published, published

CLEAR = "\033[H\033[J"
Row = tuple[Published, float]  # and how many new connections it gets per second


def watch(kernel: Kernel, is_wanted: Callable[[Published], bool], seconds: float, as_json: bool,
          show: Callable[[list[Row]], None]) -> None:
    """Print what is published again and again, until it is interrupted.

    On a terminal in the same place; else one after another, with `as_json` a document a line.
    """
    before: dict[tuple[object, ...], int] = {}
    since = time.monotonic()
    while True:
        lines = [line for line in published(kernel) if is_wanted(line)]
        now = time.monotonic()
        counts = {_key(line): line.connections or 0 for line in lines}
        new = {key: max(count - before.get(key, count), 0) for key, count in counts.items()}
        rows = [(line, new[_key(line)] / max(now - since, 0.001)) for line in lines]
        if as_json:
            print(json.dumps([{**line._asdict(), "reach": line.reach, "new_per_second": round(rate, 1)}
                              for line, rate in rows]))
        else:
            print(CLEAR if sys.stdout.isatty() else "", end="")
            show(rows)
            print("" if sys.stdout.isatty() else "\n", end="")
        sys.stdout.flush()
        before, since = counts, now
        time.sleep(seconds)


def _key(line: Published) -> tuple[object, ...]:
    return *line[:6], line.container_id, line.ifname
