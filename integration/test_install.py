"""scripts/install: twice, over itself while it is in use, and away again; and the pip package."""
import json
import pathlib
import subprocess
import sys
import threading

import lab
import pytest


def install(root: pathlib.Path, *options: str) -> str:
    return lab.run(lab.ROOT / "scripts/install", "--prefix", root / "lib", "--bin-dir", root / "bin",
                   "--sbin-dir", root / "sbin", *options)


def version(executable: pathlib.Path) -> dict[str, object]:
    return lab.call_plugin(executable, "VERSION", {"cniVersion": "1.0.0"})


def test_install_again_and_uninstall(tmp_path):
    """Installing twice is installing once; uninstalling leaves nothing, in the file system or in the kernel."""
    install(tmp_path, "--name", "portmap2")
    install(tmp_path, "--name", "portmap2")
    assert version(tmp_path / "bin/portmap2")["cniVersion"] == "1.0.0"
    assert [path.name for path in (tmp_path / "bin").iterdir()] == ["portmap2"]
    lab.run("nft", "add", "table", "inet", "cni_portmap")
    install(tmp_path, "--name", "portmap2", "--uninstall")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    assert lab.table() == ""


def test_upgrade_in_place(tmp_path):
    """A runtime that goes on calling during upgrades never sees a half-installed plugin."""
    install(tmp_path)
    done, failures, calls = threading.Event(), [], 0

    def call() -> None:
        nonlocal calls
        while not done.is_set():
            try:
                version(tmp_path / "bin/portmap")
                calls += 1
            except (AssertionError, lab.CniFailed, OSError) as failure:
                failures.append(failure)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for _ in range(4):
        install(tmp_path)
    done.set()
    for caller in callers:
        caller.join()
    assert not failures
    assert calls > 10


def test_runs_from_compiled_bytecode(tmp_path):
    """The installed package is loaded from bytecode, and nothing is written next to it by a call."""
    install(tmp_path)
    before = sorted((tmp_path / "lib").rglob("*"))
    assert any(path.suffix == ".pyc" for path in before)
    version(tmp_path / "bin/portmap")
    assert sorted((tmp_path / "lib").rglob("*")) == before


@pytest.mark.parametrize("option", [["--prefix", "relative"], ["--name", "a/b"], ["--bin-dir", "/tmp/a'b"], ["--what"]])
def test_wrong_usage(option):
    """A path that could break out of the launcher, or an unknown option, is refused."""
    done = subprocess.run([lab.ROOT / "scripts/install", *option], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr


def test_pip_package(tmp_path):
    """The checkout is an ordinary pip package, with the operator's command."""
    source = tmp_path / "source"
    source.mkdir()
    for name in "setup.cfg", "pyproject.toml", "README.md", "cni_portmap":
        lab.run("cp", "-r", lab.ROOT / name, source)
    target = tmp_path / "target"
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                           "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = subprocess.run([sys.executable, "-c", "from cni_portmap.cli import main; main(['version', '--json'])"],
                         cwd=target, capture_output=True, text=True, check=True).stdout
    assert "1.1.0" in json.loads(out)["cniVersions"]
    assert (target / "cni_portmap/portmap.schema.json").exists()
    assert (target / "bin/cni-portmap").exists()
