"""Real runtimes, each on a machine of its own. What was tried is printed as a table when the tests have run."""
import collections
from typing import Any

import lab
import pytest
from lab.machine import RUNTIMES, UNPACKED, VERSIONS


@pytest.fixture(scope="session")
def cnitool(need, tmp_path_factory):
    """A folder with cnitool-1.1 and cnitool-1.3, built from the distribution's sources."""
    go = UNPACKED / "go/usr/lib/go-1.24/bin/go"
    need(go, UNPACKED / "cnitool-1.1", UNPACKED / "cnitool-1.3")
    folder = tmp_path_factory.mktemp("cnitool")
    for release in "1.1", "1.3":
        source = folder / release / "src/github.com/containernetworking/cni"
        source.parent.mkdir(parents=True)
        source.symlink_to(UNPACKED / f"cnitool-{release}")
        lab.run("env", "GO111MODULE=off", "CGO_ENABLED=0", "GOFLAGS=", f"GOPATH={folder / release}",
                f"GOCACHE={UNPACKED}/go-cache", go, "build", "-o", folder / f"cnitool-{release}",
                "github.com/containernetworking/cni/cnitool", timeout=900)
    return folder


@pytest.fixture(scope="module")
def podman_version(need, request):
    """What podman says it is, where it is one that calls CNI plugins."""
    need("podman", "runc", "busybox", "/usr/lib/cni/bridge")
    version = lab.run("podman", "--version").strip()
    if " 4." not in version:
        pytest.skip(f"{version} calls no CNI plugins: Debian 12 has podman 4.3")
    VERSIONS[request.module.__name__].append(version)


def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> None:
    """Give each report what the table has of it; as text, since it may come from another process."""
    if RUNTIMES in item.path.parents and isinstance(item, pytest.Function) and call.when != "teardown":
        about = (item.function.__doc__ or item.name).strip()
        case = item.name.partition("[")[2].rstrip("]")
        module = " ".join([(item.module.__doc__ or "").strip(), *VERSIONS[item.module.__name__]])
        item.user_properties[:] = [("tried", (module, f"{about} [{case}]" if case else about))]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    tables: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for outcome in "passed", "failed", "error", "xfailed", "skipped":
        for report in terminalreporter.stats.get(outcome, ()):
            for name, value in getattr(report, "user_properties", ()):
                if name == "tried":
                    module, row = value
                    reason = f": {report.longrepr[2]}" if outcome == "skipped" else ""
                    tables[module].append((outcome, row + reason))
    for module, rows in tables.items():
        terminalreporter.section(module)
        for outcome, row in rows:
            terminalreporter.write_line(f"{outcome:8} {row}")
