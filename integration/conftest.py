"""Integration tests need root. They run in namespaces of their own; the machine's network is never touched."""
import pathlib

import lab
import pytest


@pytest.fixture(scope="module", autouse=True)
def private_host() -> None:
    """Each module has a host to itself: what one leaves behind is nobody else's."""
    lab.enter()


@pytest.fixture(scope="session")
def bin_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with this checkout's portmap, installed, and the distribution's other plugins."""
    return lab.install(tmp_path_factory.mktemp("cni") / "bin")
