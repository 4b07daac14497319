"""The .rpm, installed in a copy of this system. (The .deb: integration/fresh/package.)"""
import json
import pathlib
import subprocess

import lab
import pytest

FOLDERS = "/usr", "/etc", "/var/lib"


@pytest.fixture
def rpm(dist):
    """A command that runs rpm; what it writes is in overlays that end with the test."""
    upper = pathlib.Path("/run/rpm")
    for folder in FOLDERS:
        part = upper / folder[1:].replace("/", "-")
        for name in "upper", "work":
            (part / name).mkdir(parents=True)
        layers = f"lowerdir={folder},upperdir={part}/upper,workdir={part}/work"
        lab.run("mount", "-t", "overlay", "-o", layers, "overlay", folder)

    def run(*words):
        return lab.run("rpm", "--force-debian", "--dbpath", upper / "database", *words)
    yield run
    for folder in reversed(FOLDERS):
        lab.run("umount", "--lazy", folder)


def test_life_of_the_rpm(rpm, dist):
    """Installed, modules are compiled, and plugin and command answer; removed, nothing is left, nor is bytecode."""
    plugin, lib = pathlib.Path("/usr/libexec/cni-portmap/portmap"), pathlib.Path("/usr/share/cni-portmap")
    rpm("--install", "--nodeps", next(dist.glob("*.rpm")))
    done = subprocess.run([plugin], input='{"cniVersion": "1.0.0"}', text=True, capture_output=True, check=True,
                          env={"CNI_COMMAND": "VERSION"})
    assert json.loads(done.stdout)["cniVersion"] == "1.0.0"
    assert lab.run("/usr/sbin/cni-portmap", "version").startswith("cni-portmap ")
    assert [*lib.rglob("*.pyc")] and pathlib.Path("/usr/lib/systemd/system/cni-portmap-agent.service").exists()
    rpm("--erase", "cni-portmap")
    assert not lib.exists() and not plugin.exists()
