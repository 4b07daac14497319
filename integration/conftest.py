"""Integration tests need root. They run in namespaces of their own; the machine's network is never touched."""
import os
import pathlib
from collections.abc import Iterator

import lab
import pytest

OTHER_ROOT = os.environ.get("CNI_PORTMAP_ROOT", "")  # see test_nft_versions


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests that use `each_bin_dir` with the other libnftables too, if there is one."""
    if OTHER_ROOT and "each_bin_dir" in metafunc.fixturenames:
        metafunc.parametrize("each_bin_dir", ["bin_dir", "other_bin_dir"], indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def private_host() -> None:
    """Each module has a host to itself: what one leaves behind is nobody else's."""
    lab.enter()


@pytest.fixture(scope="session")
def bin_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with this checkout's portmap, installed, and the distribution's other plugins."""
    return lab.install(tmp_path_factory.mktemp("cni") / "bin")


@pytest.fixture(scope="module")
def other_bin_dir(private_host: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The same, but portmap runs with the Python and the libnftables of CNI_PORTMAP_ROOT."""
    with lab.other_root(OTHER_ROOT):
        yield lab.install_in_other_root(tmp_path_factory.mktemp("other") / "bin")


@pytest.fixture(scope="module")
def each_bin_dir(request: pytest.FixtureRequest) -> pathlib.Path:
    """`bin_dir`, and then `other_bin_dir`, where there is one."""
    found: pathlib.Path = request.getfixturevalue(getattr(request, "param", "bin_dir"))
    return found


@pytest.fixture
def host(bin_dir: pathlib.Path) -> Iterator[lab.Host]:
    """A host of its own for a test, so that whatever the test breaks ends with it."""
    with lab.fresh_host():
        yield lab.Host(bin_dir / "portmap")
    lab.LOCK.unlink(missing_ok=True)
