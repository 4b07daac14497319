"""The bundle for arm64, made on amd64: it starts, and imports all that it has, under qemu's user emulation.

Only the loader is started there, as stub.c does it: for more, qemu would have to be the kernel's interpreter of such
files, and that is a setting of the whole machine.
"""
import json
import pathlib
import re
import subprocess
import tarfile

import lab
import pytest
from cni_portmap.linux.installation import MARK


@pytest.fixture(scope="module")
def arm64(dist, tmp_path_factory):
    """The bundle, unpacked."""
    folder = tmp_path_factory.mktemp("arm64")
    with tarfile.open(next(dist.glob("*-linux-arm64-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    return next(folder.iterdir())


def emulated(folder, role, *words, **how):
    """The program as the plugin or the command, under emulation."""
    lib = folder / "lib"
    loader = ["qemu-aarch64", lib / "ld.so", "--inhibit-cache", "--library-path", lib, "--argv0", role]
    return subprocess.run([*loader, lib / "program", *words], text=True, capture_output=True, check=False, **how)


def test_version(arm64):
    """VERSION loads the frozen modules alone."""
    done = emulated(arm64, "portmap", input='{"cniVersion": "1.1.0"}', env={"CNI_COMMAND": "VERSION"})
    assert done.returncode == 0 and json.loads(done.stdout)["cniVersion"] == "1.1.0", done


def test_refusal(arm64):
    """A refusal loads the schema's validator, with its extension modules."""
    environ = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "a", "CNI_IFNAME": "eth0", "CNI_NETNS": "/proc/self/ns/net"}
    config = {"cniVersion": "1.0.0", "name": "net", "type": "portmap", "snat": "yes", "prevResult": {"ips": []}}
    done = emulated(arm64, "portmap", input=json.dumps(config), env=environ)
    assert json.loads(done.stdout)["code"] == 7 and "snat" in done.stdout, done


def test_commands(arm64):
    """Each subcommand's modules are there."""
    names = re.search(r"COMMANDS = \(([^)]*)\)", (lab.ROOT / "cni_portmap/cli/main.py").read_text())[1]
    done = emulated(arm64, "cni-portmap", "--help")
    assert all(name in done.stdout for name in re.findall(r'"([a-z-]+)"', names)), done
    assert emulated(arm64, "cni-portmap", "validate", lab.ROOT / "conf/bridge.conflist").stdout.endswith("valid\n")


def test_node_install(arm64, tmp_path):
    """It copies itself, whole; then this kernel refuses to start the copy, and nothing has changed."""
    done = emulated(arm64, "cni-portmap", "node-install", "--bin-dir", tmp_path / "bin")
    assert (done.returncode, done.stdout) == (1, "") and "Exec format error" in done.stderr, done
    assert [path.name for path in (tmp_path / "bin").rglob("*")] == [".cni-portmap", "lock"]


def test_all_is_of_arm64(arm64):
    """No file of another architecture; the stubs, which emulation cannot run to the end, answer as far as they go."""
    for path in (*arm64.glob("*portmap"), *arm64.glob("lib/*.so*"), arm64 / "lib/program"):
        assert path.read_bytes()[18:20] == b"\xb7\0", path  # EM_AARCH64
    assert MARK in (arm64 / "portmap").read_bytes()
    done = subprocess.run(["qemu-aarch64", arm64 / "portmap"], text=True, capture_output=True, check=False)
    assert json.loads(done.stdout)["code"] == 5
    assert 'machine=aarch64' in pathlib.Path(arm64 / "install.sh").read_text()
