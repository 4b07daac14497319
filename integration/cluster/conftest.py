"""Kubernetes, built by integration/cluster/build. What was measured is printed when the tests have run."""
from typing import Any

import pytest
from lab.kubernetes import BIN

MEASURED: list[str] = []


@pytest.fixture(scope="session")
def built(need):
    if not (BIN / "kube-apiserver").exists():
        pytest.skip("Kubernetes is not built: scripts/test cluster builds it")
    need("containerd", "runc", "busybox", "iptables", "/usr/lib/cni/bridge", "openssl")


@pytest.fixture
def measured():
    """A function that keeps a line for the end."""
    return MEASURED.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if MEASURED:
        terminalreporter.section("measured")
        for line in MEASURED:
            terminalreporter.write_line(line)
