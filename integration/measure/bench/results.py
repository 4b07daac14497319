"""The measured numbers, by quantity, amount and subject: how they are taken, and how they are summarised."""
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Key(NamedTuple):
    """`measure`: ADD, connect, ...; `what` is asked for; `size`: how many are there already; `subject`: by whom."""

    measure: str
    what: str
    size: int
    subject: str
    unit: str = "ms"


class Summary(NamedTuple):
    median: float
    low: float  # quartiles
    high: float
    samples: int


Sample = Iterable[tuple[Key, float]]


class Results(dict[Key, list[float]]):
    """Every number that was measured."""

    def take(self, sample: Sample) -> None:
        for key, value in sample:
            self.setdefault(key, []).append(value)

    def summary(self, key: Key) -> Summary | None:
        values = self.get(key)
        if not values:
            return None
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return Summary(median, low, high, len(values))

    def median(self, key: Key) -> float | None:
        return statistics.median(self[key]) if key in self else None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def interleave(title: str, cells: list[Callable[[], Sample]], results: Results, rounds: int, seconds: float) -> None:
    """Take a sample of every cell in turn, `rounds` times; a cell that has taken its `seconds` has its last."""
    spent = [0.0] * len(cells)
    began = time.monotonic()
    for number in range(rounds):
        for index, cell in enumerate(cells):
            if spent[index] < seconds:
                start = time.monotonic()
                results.take([*cell()])
                spent[index] += time.monotonic() - start
        print(f"\r{title}: round {number + 1} of {rounds}, {time.monotonic() - began:.0f} s ", end="", file=sys.stderr,
              flush=True)
    say("")
