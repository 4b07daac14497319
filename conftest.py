"""What both suites share: what was skipped is said at the end, and who may run beside whom."""
import collections
from typing import Any

import pytest

# Of these files one process has the most to do. They begin, so that at the end it is not the last that works.
LONGEST = ["test_model", "test_packets", "test_exposure", "test_flows", "test_reader"]
ANYWHERE = {"private_host", "each_bin_dir", "other_bin_dir"}  # each process makes its own, at little cost


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let those tests of a file that share a lab run in one process, and those of all real runtimes (cgroups)."""
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        runs_containers = any(isinstance(value, type) and getattr(value, "cgroup", "")
                              for value in vars(item.module).values())
        shared = {name for name, (*_, fixture) in item._fixtureinfo.name2fixturedefs.items()
                  if fixture.scope in ("module", "class")} - ANYWHERE
        if runs_containers or shared:
            item.add_marker(pytest.mark.xdist_group("runtimes" if runs_containers else item.path.stem))
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was skipped, by reason: each names what is missing, and after a colon what would change that."""
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ")
                                  for report in terminalreporter.stats.get("skipped", ()))
    if reasons:
        terminalreporter.section("skipped, and what would change that")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5} {reason}")
