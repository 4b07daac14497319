"""Integration tests need root. They run in namespaces of their own; the machine's network is never touched."""
import contextlib
import importlib.util
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import lab
import pytest
from lab.cri import DEFINITION, compile_messages
from lab.exposed import Place
from lab.paths import Setting
from lab.site import Site

OTHER_ROOT = os.environ.get("CNI_PORTMAP_ROOT", "")  # see test_nft_versions
BIN_DIR = os.environ.get("CNI_PORTMAP_BIN_DIR", "")  # where this checkout's is installed already: see kernel/run


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
    return lab.plugins(pathlib.Path(BIN_DIR)) if BIN_DIR else lab.install(tmp_path_factory.mktemp("cni") / "bin")


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


@pytest.fixture(scope="module")
def sites(each_bin_dir: pathlib.Path) -> Iterator[Callable[[Setting], Site]]:
    """A function that makes the site of a setting, or gives the one that is there."""
    with one_at_a_time(lambda setting: Site(setting, each_bin_dir)) as site_of:
        yield site_of


@pytest.fixture(scope="module")
def places(each_bin_dir: pathlib.Path) -> Iterator[Callable[[Setting], Place]]:
    """The same of a place."""
    with one_at_a_time(lambda setting: Place(setting, each_bin_dir)) as place_of:
        yield place_of


@contextlib.contextmanager
def one_at_a_time(lab_of: Callable[[Any], contextlib.AbstractContextManager[Any]]) -> Iterator[Callable[[Any], Any]]:
    """A function that makes the lab of a setting with `lab_of`, or gives the one that is there: the last one stays."""
    with contextlib.ExitStack() as stack:
        there: dict[Any, Any] = {}

        def of(setting: Any) -> Any:
            if setting not in there:
                stack.close()
                there.clear()
                if not lab.br_netfilter(setting.br_netfilter):
                    pytest.skip("no br_netfilter in this kernel: modprobe br_netfilter")
                there[setting] = stack.enter_context(lab_of(setting))
            return there[setting]
        yield of


@pytest.fixture(params=["older", "newer"])
def reference(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of plugins with the reference portmap: Debian 12's, and a newer one where it was fetched.

    For tests with a parameter `backend`.
    """
    newer = lab.ROOT / "integration/runtimes/unpacked/cni-plugins/usr/lib/cni/portmap"
    path = lab.PLUGINS / "portmap" if request.param == "older" else newer
    if request.node.callspec.params["backend"] == "nftables" and request.param == "older":
        pytest.skip("Debian 12's reference plugin has no nftables backend: nothing to try")
    if not path.exists():
        pytest.skip(f"missing, see integration/runtimes/packages: {path}")
    folder = lab.plugins(tmp_path / "theirs")
    (folder / "portmap").symlink_to(path)
    return folder


@pytest.fixture
def host(bin_dir: pathlib.Path) -> Iterator[lab.Host]:
    """A host of its own for a test, so that whatever the test breaks ends with it."""
    with lab.fresh_host():
        yield lab.Host(bin_dir / "portmap")
    lab.LOCK.unlink(missing_ok=True)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of the package that it is in; a path is no name
        return False


@pytest.fixture(scope="session")
def need() -> Callable[..., None]:
    """Skip, and say so, where a program, a file or a module is missing: integration/runtimes/packages fetches it."""
    def check(*needed: str | pathlib.Path) -> None:
        missing = [str(each) for each in needed
                   if not shutil.which(each) and not pathlib.Path(each).exists() and not _is_module(str(each))]
        if missing:
            pytest.skip(f"missing, see integration/runtimes/packages: {', '.join(missing)}")
    return check


@pytest.fixture(scope="session")
def messages(need: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """CRI's messages, see lab.cri."""
    need("grpc", "google.protobuf", "protoc", DEFINITION)
    return compile_messages(tmp_path_factory.mktemp("cri"))
