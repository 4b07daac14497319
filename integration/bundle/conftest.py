"""Tests of what scripts/release has made: scripts/test bundle says where that is."""
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator

import image
import lab
import pytest

DIST, BUNDLE = os.environ.get("CNI_PORTMAP_DIST", ""), os.environ.get("CNI_PORTMAP_BUNDLE", "")
collect_ignore_glob = [] if DIST else ["*"]


@pytest.fixture(scope="session")
def dist() -> pathlib.Path:
    """The release; beside it, in again/, another one of the same commit, made in another folder, by another umask."""
    return pathlib.Path(DIST)


@pytest.fixture(scope="session")
def bundle() -> pathlib.Path:
    """The bundle, unpacked."""
    return pathlib.Path(BUNDLE)


@pytest.fixture(scope="session")
def image_root(dist: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The image's root folder."""
    folder = tmp_path_factory.mktemp("image")
    assert image.unpack(next(dist.glob("*-oci*.tar")), folder) == ["/cni-portmap"]
    return folder


@pytest.fixture(autouse=True)
def own_host(private_host: None) -> Iterator[None]:
    """A host of its own for each test."""
    with lab.fresh_host():
        yield


Install = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def install(bundle: pathlib.Path, tmp_path: pathlib.Path) -> Install:
    """Run install.sh, of the bundle or of another folder, for tmp_path/bin; it must end with `status`."""
    def run(*words: object, status: int = 0, folder: pathlib.Path = bundle, wrapped: tuple[object, ...] = (),
            bin_dir: pathlib.Path = tmp_path / "bin", path: str = "") -> "subprocess.CompletedProcess[str]":
        command = [*wrapped, folder / "install.sh", "--bin-dir", bin_dir, "--sbin-dir", tmp_path / "sbin", *words]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False,
                              env={"PATH": f"{path}/usr/sbin:/usr/bin:/sbin:/bin"})
        assert done.returncode == status, done.stdout + done.stderr
        return done
    return run
