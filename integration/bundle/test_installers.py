"""Installers of the bundle: the cases that they share, and what only install.sh does."""
import collections
import os
import re
import subprocess

import lab
import pytest
from cases import CASES
from installers import REFERENCE, Image, Node, NodeInstall, Shell, entries, next_version, replace
from lab import Host, Pod

WEB = Pod("web", "8080:80")


def takes(installer, steps):
    """Whether a case is for an installer."""
    names = {step for step, *_ in steps}
    return not names & installer.without and bool(not installer.only or names & installer.only)


@pytest.mark.parametrize(("installer", "case"), [
    (installer, case) for installer in (Shell, NodeInstall, Image) for case, steps in CASES.items()
    if takes(installer, steps)])
def test_case(installer, case, bundle, image_root, tmp_path):
    """What each installer does to a node."""
    node = Node(installer(tmp_path), next(image_root.glob("cni-portmap-*")) if installer is Image else bundle, tmp_path)
    try:
        for step, *given in CASES[case]:
            getattr(node, step)(*given)
    finally:
        node.close()


CHANGES = "rename", "linkat", "symlink", "unlink", "unlinkat", "rmdir", "mkdir"


@pytest.mark.parametrize("word", ["", "--uninstall"])
def test_killed_at_each_step(bundle, tmp_path, word):
    """Before each call that changes what there is: a plugin runs, and the next run of the installer ends as the first.

    An upgrade over another's plugin, which is kept; of those calls that copy files, the first and the last.
    """
    theirs = f"{REFERENCE}exit 0\n"
    node = Node(NodeInstall(tmp_path), bundle, tmp_path)
    node.install("kept what")
    node.write("portmap", theirs)
    command = NodeInstall(tmp_path).command(next_version(bundle, tmp_path / "newer"), node.bin_dir, *word.split())
    before, trace = tmp_path / "before", tmp_path / "trace"
    lab.run("cp", "-a", node.bin_dir, before)
    lab.run("strace", "-qqq", "-o", trace, "-e", f"trace={','.join(CHANGES)}", *command)
    called = collections.Counter(re.findall(r"(?m)^(\w+)\(", trace.read_text()))
    killed = 0
    for call, number in called.items():
        for step in sorted({1, *range(max(1, number - 2), number + 1)}):
            lab.run("rm", "-rf", node.bin_dir)
            lab.run("cp", "-a", before, node.bin_dir)
            lab.run("strace", "-qqq", "-o", trace, "-e", f"trace={call}", "-e",
                    f"inject={call}:signal=KILL:when={step}", *command, check=False)
            killed += "killed by SIGKILL" in trace.read_text()
            done = subprocess.run([node.plugin], input='{"cniVersion": "1.0.0"}', text=True, check=False,
                                  env={"CNI_COMMAND": "VERSION"}, capture_output=True)
            assert done.returncode == 0 and done.stdout, (call, step)
            if not word:
                node.upgrade("cni-portmap")
                node.works()
            node.run("--uninstall")
            node.holds({"portmap": theirs})
            assert not (node.bin_dir / ".cni-portmap").exists(), (call, step)
    assert killed > 10


# --- install.sh alone --------------------------------------------------------------------------------------------

@pytest.fixture
def bin_dir(tmp_path):
    """A folder of plugins with the reference plugin."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "portmap").write_text(REFERENCE)
    (folder / "portmap").chmod(0o755)
    return folder


def test_roll_back(install, bin_dir, bundle, tmp_path):
    """To the version before, and again to this one; by the copy that is installed, all of it goes in the end."""
    install()
    first = os.readlink(bin_dir / "portmap")
    host = Host(bin_dir / "portmap")
    host.add(WEB)
    install(folder=next_version(bundle, tmp_path / "newer"))
    second = os.readlink(bin_dir / "portmap")
    assert first != second and host.call("CHECK", WEB).code == 0
    install("--rollback")
    assert os.readlink(bin_dir / "portmap") == first and "8080" in host.command("list")
    install("--rollback")
    assert os.readlink(bin_dir / "portmap") == second
    host.delete(WEB)
    install("--uninstall", folder=(bin_dir / "portmap").resolve().parent)
    assert not [*(tmp_path / "sbin").iterdir()] and "cni_portmap" not in lab.nft("list", "ruleset")


def test_nothing_to_roll_back_to(install, bin_dir):
    """The first version has none before it; a plugin of others is not ours to switch."""
    assert "not of this installation" in install("--rollback", status=1).stderr
    install()
    assert "no version was installed before" in install("--rollback", status=1).stderr


@pytest.mark.parametrize("before", ["reference", "nothing"])
@pytest.mark.parametrize("order", ["bsBS", "bsSB", "sbBS", "sbSB", "bsbBS", "bsbSB", "sbsBS", "sbsSB", "bsBbBS"])
def test_beside_a_checkout(install, bin_dir, tmp_path, order, before):
    """In one folder with scripts/install, b and B being the bundle's installer and its --uninstall, s and S the other.

    The plugin works at each moment, and in the end all is as it was.
    """
    if before == "nothing":
        (bin_dir / "portmap").unlink()
    there = entries(bin_dir)
    for step in order:
        if step in "bB":
            install(*(["--uninstall"] if step == "B" else []))
        else:
            lab.run(lab.ROOT / "scripts/install", "--prefix", tmp_path / "lib", "--bin-dir", bin_dir, "--sbin-dir",
                    tmp_path / "sbin", *(["--uninstall"] if step == "S" else []))
        if before == "reference" or step in "bs":
            done = subprocess.run([bin_dir / "portmap"], input='{"cniVersion": "1.0.0"}', text=True, check=False,
                                  env={"CNI_COMMAND": "VERSION"}, capture_output=True)
            assert done.returncode == 0, (step, done.stdout)
    assert entries(bin_dir) == there and not (bin_dir / ".cni-portmap").exists()
    assert not (tmp_path / "lib").exists() and not [*(tmp_path / "sbin").iterdir()]


def test_two_names(install, bin_dir):
    """Each name is switched and given back by itself; the rest goes with the last."""
    before = entries(bin_dir)
    install()
    install("--name", "portmap2")
    assert "the rest stays" in install("--uninstall").stdout
    assert Host(bin_dir / "portmap2").call("VERSION", WEB).code == 0
    install("--uninstall", "--name", "portmap2")
    assert entries(bin_dir) == before


def refuses(install, bin_dir, words, **how):
    """The sentence of a refusal; nothing has changed."""
    before = entries(bin_dir)
    said = install(status=1, **how).stderr.strip()
    assert words in said and said.count("\n") == 0 and said.startswith(Shell.says), said
    assert entries(bin_dir) == before


def test_wrong_architecture(install, bin_dir, bundle, tmp_path):
    """A bundle for another machine. (The kernel does not even start its node-install.)"""
    broken = next_version(bundle, tmp_path / "broken")
    replace(broken / "install.sh", (broken / "install.sh").read_bytes().replace(b"machine=x86_64", b"machine=aarch64"))
    refuses(install, bin_dir, "is for aarch64", folder=broken)


def test_no_folder_for_the_command(install, bin_dir, tmp_path):
    """A file where the command's folder is to be; a folder where the command is to be."""
    (tmp_path / "sbin").touch()
    refuses(install, bin_dir, "sbin is not a folder")
    (tmp_path / "sbin").unlink()
    (tmp_path / "sbin/cni-portmap").mkdir(parents=True)
    refuses(install, bin_dir, "cni-portmap is a folder")
    assert not [*(tmp_path / "sbin/cni-portmap").iterdir()]


def test_command_of_another_installation(install, bin_dir, tmp_path):
    """That of a checkout, for example, stays, also after the bundle has gone."""
    other = tmp_path / "sbin/cni-portmap"
    other.parent.mkdir()
    other.write_text("another")
    assert f"left {other}" in install().stdout and (bin_dir / ".cni-portmap/cni-portmap").exists()
    install("--uninstall")
    assert other.read_text() == "another"


def test_folder_behind_a_link(install, bin_dir, tmp_path):
    """The installed copy finds the folder by its own path, and the link to the command by that of before."""
    (tmp_path / "link").symlink_to(bin_dir)
    install(bin_dir=tmp_path / "link")
    lab.run((bin_dir / "portmap").resolve().parent / "install.sh", "--uninstall")
    assert not [*(tmp_path / "sbin").iterdir()]


def test_bundle_where_nothing_can_be_run(bin_dir, bundle, tmp_path):
    """As /tmp is on hardened hosts: one sentence says so."""
    lab.run("mount", "--bind", bundle, bundle)
    try:
        lab.run("mount", "-o", "remount,bind,noexec", bundle)
        done = subprocess.run(["sh", bundle / "install.sh", "--bin-dir", bin_dir], capture_output=True, text=True,
                              check=False)
    finally:
        lab.run("umount", bundle)
    assert done.returncode == 1
    assert done.stderr == f"install.sh: nothing can be run in {bundle}: is it mounted noexec?\n"


def test_wrong_usage(install):
    """An option that there is not; a value that is no path, or no folder of plugins; each is named."""
    for words in (["--nonsense"], ["--bin-dir", "relative"], ["--bin-dir", "/"], ["--name", "a/b"], ["--force"]):
        done = install(*words, status=2)
        assert words[-1].lstrip("-") in done.stderr


def test_node_install_goes_on(install, bin_dir, bundle, tmp_path):
    """The command uninstalls what install.sh has installed, the links to the command, too."""
    before = entries(bin_dir)
    install()
    done = subprocess.run([tmp_path / "sbin/cni-portmap", "node-install", "--bin-dir", bin_dir, "--uninstall"],
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert entries(bin_dir) == before and not [*(tmp_path / "sbin").iterdir()]
