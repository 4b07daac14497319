"""What both suites share: what was skipped is said at the end, and who may run beside whom."""
import collections
import pathlib
from typing import Any

import pytest

HERE = pathlib.Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of a file run in one process (they share a host), and those of all real runtimes (cgroups)."""
    runtimes = HERE / "integration/runtimes"
    for item in items:
        group = "runtimes" if runtimes in item.path.parents else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was skipped, by reason: each names what is missing, and after a colon what would change that."""
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ")
                                  for report in terminalreporter.stats.get("skipped", ()))
    if reasons:
        terminalreporter.section("skipped, and what would change that")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5} {reason}")
