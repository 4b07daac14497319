"""cni-portmap node-install --watch: it puts ours back, not for ever; and --check."""
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess

import lab
import pytest
from cases import CALICO
from installers import PROGRAM, REFERENCE, Image, Node, NodeInstall, Shell


class Watcher:
    """node-install --watch, for a node."""

    def __init__(self, node, *words):
        command = node.command("--watch", *words)
        self._probe = node.probe()
        runc = getattr(node.installer, "runc", None)
        self._pid = runc.pid if runc else lambda: self._process.pid
        self._process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def line(self, words):
        """The next line that it prints has these words."""
        line = self._process.stdout.readline()
        assert words in line
        return line

    def is_ready(self):
        """What kubelet's probe finds."""
        done = subprocess.run(self._probe, capture_output=True, text=True, check=False)
        assert "this bundle's" in done.stdout, done
        return not done.returncode

    @contextlib.contextmanager
    def paused(self):
        """It stands still in the block: what happens there it sees as one."""
        pid = self._pid()
        os.kill(pid, signal.SIGSTOP)
        assert lab.until(lambda: pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def kill(self):
        """As the kernel does for want of memory."""
        os.kill(self._pid(), signal.SIGKILL)
        self._process.communicate(timeout=30)

    def end(self):
        """SIGTERM; what it says last."""
        self._process.send_signal(signal.SIGTERM)
        said = self._process.communicate(timeout=30)[0]
        assert self._process.returncode == 0
        return said


@pytest.fixture(params=[NodeInstall, Image])
def node(request, bundle, image_root, tmp_path):
    """A node with the reference plugin."""
    source = next(image_root.glob("cni-portmap-*")) if request.param is Image else bundle
    with contextlib.closing(Node(request.param(tmp_path), source, tmp_path)) as found:
        yield found


@pytest.fixture
def watch(node):
    """Start watchers, which end with the test."""
    watchers = []

    def start(*words):
        watchers.append(Watcher(node, *words))
        return watchers[-1]
    yield start
    for watcher in watchers:
        watcher._process.terminate()  # which runc hands on to the container
        watcher._process.communicate()


@pytest.fixture
def watcher(watch):
    """One that has installed the plugin in place of another's."""
    first = watch()
    first.line("kept what")
    first.line("installed")
    return first


def test_replaced_by_another(watcher, node):
    """Three times it puts ours back, however it was replaced; the fourth stays, and it says how to stop the other."""
    assert watcher.is_ready()
    for replace in (lambda: node.write("portmap", CALICO), lambda: node.write_through(CALICO),
                    lambda: node.write("portmap", CALICO)):
        with watcher.paused():
            replace()
        watcher.line(f"put back {node.shown}/portmap")
        node.works()
        assert watcher.is_ready()
    node.write("portmap", CALICO)
    assert "SKIP_CNI_BINARIES=portmap" in watcher.line("again and again")
    assert not watcher.is_ready() and node.plugin.read_text() == CALICO
    node.uninstall("gave back")  # who has given up waits for nobody, and nobody for him
    node.holds({"portmap": CALICO})
    assert watcher.end() == ""


def test_the_other_gives_up_at_last(watcher, node):
    """Its file, before which this gave up, goes: a node without any plugin starts no pod, so ours is back."""
    for _ in range(3):
        node.write("portmap", CALICO)
        watcher.line("put back")
    node.write("portmap", CALICO)
    watcher.line("again and again")
    node.remove("portmap")
    watcher.line("now that the other program's file is gone")
    node.works()
    node.write("portmap", CALICO)  # it goes on counting
    watcher.line("again and again")
    assert node.plugin.read_text() == CALICO


NO_PROGRAM = {
    "removed": lambda node: node.remove("portmap"),
    "a library removed": lambda node: node.spoil("remove", "lib/libc.so.6"),
    "the launcher damaged": lambda node: node.spoil("be bytes", "portmap"),
    "closed": lambda node: node.spoil("700", ".."),
    "not executable": lambda node: node.write("portmap", CALICO, 0o644),
    "a link to nothing": lambda node: (node.remove("portmap"), node.link("portmap", "gone")),
    "cut off": lambda node: node.write("portmap", PROGRAM[:1000]),
}


@pytest.mark.parametrize("how", NO_PROGRAM)
def test_it_never_gives_up_before_what_does_not_work(watcher, watch, node, how):
    """However often it happens, and after a restart, too; what was kept at first is still kept."""
    for _ in range(5):
        with watcher.paused():
            NO_PROGRAM[how](node)
        watcher.line("gone or damaged")
        assert watcher.is_ready()
    watcher.kill()
    NO_PROGRAM[how](node)
    watcher = watch()
    watcher.line("installed")
    node.works()
    watcher.end()
    node.uninstall("gave back")
    node.as_before()


def test_killed_and_started_again(watcher, watch, node):
    """It goes on counting: what is killed again and again does not fight for ever. SIGTERM ends it."""
    for number in range(4):
        watcher.kill()
        node.write("portmap", f"{CALICO}{number}")
        watcher = watch()
        if number < 3:
            watcher.line("kept what")
            watcher.line("installed")
    watcher.line("again and again")
    assert node.plugin.read_text() == f"{CALICO}3"
    assert watcher.end() == ""
    watch().line("kept what")


def test_another_writes_slowly(watcher, node):
    """Ours is back while the other is still writing, and what is whole at last is what was there."""
    node.begin_to_write(1000)
    watcher.line("put back")
    node.works()
    assert watcher.is_ready()
    node.write_the_rest()
    watcher.end()
    node.uninstall("gave back")
    node.holds_program()


@pytest.mark.parametrize("node", [NodeInstall], indirect=True)
@pytest.mark.parametrize(("how", "name"), [
    ("be empty", "lib/lib.zip"), ("remove", "lib/libnftables.so.1"), ("644", "portmap"), ("600", "lib/libc.so.6"),
    ("be empty", "SHA256SUMS"), ("700", ".."), ("be a folder", "cni-portmap")])
def test_damage_is_seen(node, how, name):
    """--check says so, whatever of the version there is wrong."""
    node.install("installed")
    assert not subprocess.run(node.probe(), check=False).returncode
    node.spoil(how, name)
    assert subprocess.run(node.probe(), check=False).returncode == 1


@pytest.mark.parametrize("node", [NodeInstall], indirect=True)
@pytest.mark.parametrize("option", ["noexec", "nosymfollow"])
def test_a_plugin_that_cannot_be_called_is_seen(node, option):
    """--check calls it as a runtime does."""
    node.install("installed")
    node.mounted(option)
    assert subprocess.run(["env", *node.command("--check")], check=False).returncode == 1


@pytest.mark.parametrize("node", [NodeInstall], indirect=True)
def test_folder_is_mounted_read_only_under_it(node, watch):
    """Nothing of the watch is in the way."""
    with node.small_disk("100m"):
        watcher = watch()
        watcher.line("kept what")
        watcher.line("installed")
        lab.run("mount", "-o", "remount,ro", node.bin_dir)
        assert watcher.is_ready()
        lab.run("mount", "-o", "remount,rw", node.bin_dir)
        node.remove("portmap")
        watcher.line("put back")
        watcher.end()


def test_damage_beside_the_versions_is_mended(watcher, node):
    """What one that was killed has left beside the plugin; the link to the command removed."""
    node.left_beside("portmap2")
    assert lab.until(lambda: not (node.bin_dir / ".portmap2.cni-portmap-new").is_symlink())
    node.remove(".cni-portmap/cni-portmap")
    watcher.line("put back")
    node.works()


def test_sigterm_leaves_the_plugin(watcher, watch, node):
    """The end of a pod is not the end of the plugin."""
    assert watcher.end() == ""
    node.works()
    second = watch()
    second.line("already")
    second.end()


def test_second_watcher_waits(watcher, watch, node):
    """It says for which lock, and goes on when the first has ended; SIGTERM ends the waiting, too."""
    impatient, second = watch(), watch()
    for waiting in impatient, second:
        waiting.line(f"waiting for another installer, which has locked {node.shown}/.cni-portmap/lock")
    assert impatient.end() == ""
    watcher.end()
    second.line("already")


@pytest.mark.parametrize("installer", [Shell, NodeInstall])
def test_waits_for_one_that_removes_all(installer, bundle, tmp_path):
    """The lock that it waits for may be gone with all else when it has it: then it takes the one that others find."""
    with contextlib.closing(Node(installer(tmp_path), bundle, tmp_path)) as node:
        home = node.bin_dir / ".cni-portmap"
        home.mkdir()
        with (home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            process = subprocess.Popen([*map(str, installer(tmp_path).command(bundle, node.bin_dir))], text=True,
                                       stdout=subprocess.PIPE)
            assert process.stdout.readline() == f"waiting for another installer, which has locked {home}/lock\n"
            shutil.rmtree(home)
        assert "installed" in process.communicate(timeout=60)[0]
        assert process.returncode == 0 and (home / "lock").exists()
        node.works()


@pytest.mark.parametrize("node", [NodeInstall], indirect=True)
def test_lock_goes_last(node, tmp_path):
    """Who waits for it while all is removed waits until all is gone."""
    with node.small_disk("100m"):
        node.install("installed")
        lock = node.bin_dir / ".cni-portmap/lock"
        lock.unlink()  # the uninstaller's own is the newest entry, and so, in a tmpfs, the first that is listed
        trace = tmp_path / "trace"
        lab.run("strace", "-y", "-qqq", "-o", trace, "-e", "trace=unlink,unlinkat,rmdir", *node.command("--uninstall"))
        removed = [line for line in trace.read_text().splitlines() if ".cni-portmap" in line]
        assert len(removed) > 20 and f'"{lock}"' in removed[-2] and f'rmdir("{lock.parent}")' in removed[-1]


@pytest.mark.parametrize("node", [NodeInstall], indirect=True)
def test_folder_goes_before_the_lock_is_made(node):
    """Another uninstalls just then: it makes the folder again."""
    lock = node.bin_dir / ".cni-portmap/lock"
    lab.run("strace", "-qqq", "-o", "/dev/null", "-P", lock, "-e", "inject=openat:error=ENOENT:when=1", *node.command())
    node.works()


@pytest.mark.parametrize("node", [NodeInstall], indirect=True)
def test_folder_is_a_mount(node):
    """Uninstalling removes what is in it, and says that it stays."""
    home = node.bin_dir / ".cni-portmap"
    home.mkdir()
    lab.run("mount", "-t", "tmpfs", "tmpfs", home)
    try:
        node.install("kept what")
        node.uninstall("it is a mount of its own")
        assert not [*home.iterdir()]
        node.uninstall("it is a mount of its own")
    finally:
        lab.run("umount", home)
    home.rmdir()
    node.holds({"portmap": REFERENCE})


def test_all_is_removed_under_it(watcher, node):
    """It copies the bundle again."""
    with watcher.paused():
        subprocess.run(["rm", "-rf", node.plugin, node.bin_dir / ".cni-portmap"], check=True)
    watcher.line("put back")
    node.works()


def test_it_cannot_be_put_back(watcher, node):
    """It says why, once, is not ready, and goes on until it can."""
    with watcher.paused():
        node.remove("portmap")
        node.folder("portmap")
    watcher.line("portmap is a folder")
    assert not watcher.is_ready()
    node.plugin.rmdir()
    watcher.line("put back")
    assert watcher.is_ready()


def test_documents_for_scripts(watch, node):
    """With --json each line is a document."""
    watcher = watch("--json")
    events = [json.loads(watcher.line("event")) for _ in range(2)]
    assert [each["event"] for each in events] == ["kept", "installed"]
    assert {each["plugin"] for each in events} == {f"{node.shown}/portmap"}


@pytest.mark.parametrize("node", [Image], indirect=True)
def test_privileges(watcher, node):
    """The image has what the manifest gives it: DAC_OVERRIDE, no new privilege, and only the folder to write to."""
    process = pathlib.Path(f"/proc/{node.installer.runc.pid()}")
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    assert {int(status[name], 16) for name in ("CapBnd", "CapEff", "CapPrm")} == {1 << 1} and \
        {int(status[name], 16) for name in ("CapInh", "CapAmb")} == {0} and status["NoNewPrivs"] == "1"
    mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    writable = {fields[4] for fields in mounts if fields[5].startswith("rw")}
    assert {path for path in writable if not path.startswith(("/proc", "/dev"))} == {"/host/bin"}
    assert not (process / "root/bin").exists()


@pytest.mark.parametrize("words", [
    ["--watch", "--uninstall"], ["--force"], ["--bin-dir", "relative"], ["--bin-dir", "//"], ["--name", "a/b"]])
def test_wrong_usage(node, words):
    """Words that do not go together; a value that is no path."""
    assert words[-1].lstrip("-") in node.run(*words, status=2).stderr


def test_not_of_a_bundle(tmp_path):
    """A clone's command says what to use instead."""
    done = subprocess.run(["/usr/bin/python3", "-m", "cni_portmap", "node-install", "--bin-dir", tmp_path],
                          capture_output=True, text=True, check=False, cwd=__file__.partition("/integration/")[0])
    assert done.returncode == 1 and "scripts/install" in done.stderr
