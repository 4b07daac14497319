"""The bundle needs nothing of the host's user space, and nothing there or in the environment has a say."""
import json
import pathlib
import re
import shutil
import subprocess

import lab
import pytest
from lab import Host, Pod
from lab.agent import Agent

WEB = Pod("web", "8080:80", "127.0.0.1:8081:80", conditionsV4=["tcp flags syn"])


@pytest.fixture
def root(bundle, tmp_path):
    """A root folder with busybox and nothing else, read-only, its /tmp noexec; the bundle is in /opt."""
    folder = tmp_path / "root"
    for name in "bin", "dev", "proc", "run", "tmp", "opt/cni/bin", "sys":
        (folder / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), folder / "bin/busybox")
    lab.run("chroot", folder, "/bin/busybox", "--install", "-s", "/bin")
    shutil.copytree(bundle, folder / "opt/new")
    for name in "dev", "proc", "run":
        lab.run("mount", "--rbind", f"/{name}", folder / name)
    lab.run("mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", folder / "tmp")
    yield folder
    lab.run("umount", "--recursive", "--lazy", folder / "tmp", folder / "run", folder / "proc", folder / "dev")


def test_busybox_alone(root):
    """It is installed there by busybox' shell, then the root is made read-only; all verbs work, and the command."""
    done = lab.run("chroot", root, "/opt/new/install.sh", "--sbin-dir", "/opt/sbin")
    assert "installed /opt/cni/bin/portmap" in done
    lab.run("mount", "--bind", root / "opt", root / "opt")
    lab.run("mount", "-o", "remount,bind,ro", root / "opt")
    try:
        launcher = root.parent / "portmap"
        launcher.write_text(f"#!/bin/sh\nexec chroot {root} /opt/cni/bin/portmap\n")
        launcher.chmod(0o755)
        host = Host(launcher)
        for verb in "STATUS", "ADD", "CHECK", "ADD", "CHECK":
            assert host.call(verb, WEB).code == 0, verb
        listed = json.loads(lab.run("chroot", root, "/opt/sbin/cni-portmap", "list", "--json"))
        assert {port for line in listed for port in line["host_ports"]} == {8080, 8081}
        wrong = host.call("ADD", Pod("wrong", snat="yes"))
        assert wrong.code == 7 and "snat" in wrong.msg
        assert host.call("DEL", WEB).code == 0
        assert json.loads(lab.run("chroot", root, "/opt/sbin/cni-portmap", "list", "--json")) == []
    finally:
        lab.run("umount", root / "opt")


def test_agent_in_the_image(image_root, tmp_path):
    """The image has all that the agent and the commands need, too: they get /proc, /run and libcni's folder."""
    folder = tmp_path / "root"
    folder.mkdir()
    lab.run("mount", "--bind", image_root, folder)
    try:
        for name in "proc", "run", "tmp":
            (folder / name).mkdir(exist_ok=True)
            lab.run("mount", "--rbind", f"/{name}", folder / name)
        assert "0 adopted" in lab.run("chroot", folder, "/cni-portmap", "adopt", "--dry-run")
        with Agent(pathlib.Path("/cni-portmap"), within=("chroot", folder)) as agent:
            lab.nft("add", "table", "inet", "cni_portmap")
            assert agent.stop() == 0
    finally:
        lab.run("umount", "--recursive", "--lazy", folder)


def test_files_of_the_host(install, tmp_path):
    """An ADD opens its own files, the kernel's, the lock, and what names the time zone and nft's symbols; no others."""
    install()
    host = Host(tmp_path / "bin/portmap")
    trace = tmp_path / "trace"
    assert host.call("ADD", WEB, "strace", "-f", "-qqq", "-e", "trace=open,openat,execve", "-o", trace).code == 0
    opened = {*re.findall(r'(?:open|openat|execve)\((?:AT_FDCWD, )?"([^"]+)".* = (?!-1)', trace.read_text())}
    home = f"{tmp_path}/bin/"
    assert any(path.startswith(f"{home}.cni-portmap/") for path in opened)
    others = {path for path in opened if not path.startswith((home, "/proc/", "/run/")) and path != "/"}
    assert others <= {"/etc/localtime", "/etc/iproute2/group", "/etc/iproute2/rt_realms", "/etc/iproute2/rt_marks",
                      "/etc/protocols", "/etc/nsswitch.conf", "/etc/passwd", "/sys/devices/system/cpu/possible"}


def test_environment_of_the_loader(install, tmp_path):
    """LD_PRELOAD and its kin, and Python's variables, are not for us."""
    install()
    environ = {"LD_PRELOAD": "/nonexistent.so", "LD_LIBRARY_PATH": "/nonexistent", "LD_DEBUG": "all",
               "PYTHONHOME": "/x", "PYTHONPATH": "/x", "GLIBC_TUNABLES": "glibc.malloc.check=3",
               "CNI_COMMAND": "VERSION"}
    done = subprocess.run([tmp_path / "bin/portmap"], input='{"cniVersion": "1.0.0"}', env=environ, text=True,
                          capture_output=True, check=True)
    assert json.loads(done.stdout)["cniVersion"] == "1.0.0" and done.stderr == ""
    shown = subprocess.run([tmp_path / "sbin/cni-portmap", "version"], env=environ, text=True, capture_output=True,
                           check=True)
    assert shown.stdout.startswith("cni-portmap ") and shown.stderr == ""


def test_name_of_processes(install, tmp_path):
    """ps, and listeners of nf_tables, see our name and the verb, not the loader's."""
    install()
    environ = {**WEB.environ("ADD"), "CNI_COMMAND": "ADD"}
    with lab.held_lock():
        process = subprocess.Popen([tmp_path / "bin/portmap"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   env=environ)
        process.stdin.write(WEB.stdin("ADD"))
        process.stdin.close()
        lab.wait_until_blocked(process.pid)
        assert pathlib.Path(f"/proc/{process.pid}/comm").read_text() == "cni-portmap/ADD\n"
        assert pathlib.Path(f"/proc/{process.pid}/cmdline").read_text().startswith("portmap\0")
    assert process.wait() == 0 and process.stdout.read()


def test_missing_files(bundle, tmp_path):
    """A bundle without its program answers in a runtime's words."""
    folder = shutil.copytree(bundle, tmp_path / "broken")
    for name in "lib/lib.zip", "lib/libnftables.so.1", "lib/ld.so":
        (folder / name).unlink()
        done = subprocess.run([folder / "portmap"], input=WEB.stdin("ADD"), env=WEB.environ("ADD"), text=True,
                              capture_output=True, check=False)
        if name != "lib/lib.zip":  # which a call that succeeds does not need
            assert done.returncode == 1 and json.loads(done.stdout)["code"] == 5, (name, done)


def test_command_of_each_kind(install, tmp_path):
    """Each subcommand is in the bundle, with all that it imports."""
    install()
    cli = tmp_path / "sbin/cni-portmap"
    names = re.search(r"COMMANDS = \(([^)]*)\)", (lab.ROOT / "cni_portmap/cli/main.py").read_text())[1]
    for name in re.findall(r'"([a-z-]+)"', names):
        done = subprocess.run([cli, name, "--help"], text=True, capture_output=True, check=False)
        assert done.returncode == 0 and name in done.stdout, done.stderr
    valid = subprocess.run([cli, "validate", lab.ROOT / "conf/bridge.conflist"], text=True, capture_output=True,
                           check=True)
    assert valid.stdout.endswith(": valid\n")
