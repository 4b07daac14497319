"""A node on which an installer of the bundle runs, and the steps of cases.py."""
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator

import image
import lab
from lab import Host, Pod

WEB = Pod("web", "8080:80")
REFERENCE = "#!/bin/sh\necho the reference plugin\n"
SELINUX, LABEL = "security.selinux", b"system_u:object_r:bin_t:s0\0"
PROGRAM = pathlib.Path("/bin/true").read_bytes()  # another plugin, which is a program
FOREIGN = PROGRAM[:18] + (2).to_bytes(2, "little") + PROGRAM[20:]  # for another machine, SPARC
NO_HEADER = PROGRAM[:40] + b"\xff" * 8 + PROGRAM[48:]  # its sections begin nowhere
SECTIONLESS = PROGRAM[:40] + bytes(8) + PROGRAM[48:60] + bytes(4) + PROGRAM[64:]  # as UPX leaves it


def entries(folder: pathlib.Path) -> dict[str, str | bytes]:
    """All that is there, but the lock: path -> what a link says, or a file's bytes."""
    return {str(path.relative_to(folder)): f"-> {os.readlink(path)}" if path.is_symlink() else path.read_bytes()
            for path in folder.rglob("*") if path.name != "lock" and (path.is_symlink() or path.is_file())}


def next_version(bundle: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A bundle that differs from another in a file, and shares the others with it: who changes one replaces it."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    replace(folder / "CHANGELOG.md", b"more\n")
    replace(folder / "SHA256SUMS", "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS").encode())
    return folder


def replace(path: pathlib.Path, content: bytes) -> None:
    """Let a file have this content; other names of it keep theirs."""
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(content)
    path.chmod(mode)


class Shell:
    """install.sh, which hands on to node-install what it finds nothing wrong with."""

    says = "install.sh: ", "cni-portmap: "
    only = frozenset(["again", "truncate", "drop", "publish", "as_nobody"])  # cases with one of these steps
    without: frozenset[str] = frozenset()  # steps that it cannot take, and so cases

    def __init__(self, place: pathlib.Path) -> None:
        self._place = place

    def command(self, bundle: pathlib.Path, bin_dir: pathlib.Path, *words: str) -> list[object]:
        """The command line."""
        return [bundle / "install.sh", "--bin-dir", bin_dir, "--sbin-dir", self._place / "sbin", *words]

    def shown(self, bin_dir: pathlib.Path) -> pathlib.Path:
        """How it calls that folder."""
        return bin_dir


class NodeInstall:
    """cni-portmap node-install."""

    says = ("cni-portmap: ",)
    only: frozenset[str] = frozenset()  # all
    without: frozenset[str] = frozenset()

    def __init__(self, place: pathlib.Path) -> None:
        self._place = place

    def command(self, bundle: pathlib.Path, bin_dir: pathlib.Path, *words: str) -> list[object]:
        """The command line."""
        return [bundle / "cni-portmap", "node-install", "--bin-dir", bin_dir, *words]

    def probe(self, bundle: pathlib.Path, bin_dir: pathlib.Path) -> list[object]:
        """The command line that ends with 0 if the plugin there is ours."""
        return self.command(bundle, bin_dir, "--check")

    def shown(self, bin_dir: pathlib.Path) -> pathlib.Path:
        """How it calls that folder."""
        return bin_dir


class Image(NodeInstall):
    """The image, under runc."""

    # It is root, and has one capability.
    without = frozenset(["no_nf_tables", "publish", "as_nobody", "selinux", "without_dac_override", "renames_fail",
                         "without_fowner", "first_lock_fails"])

    def __init__(self, place: pathlib.Path) -> None:
        super().__init__(place)
        self.runc = image.Runc(place)

    def command(self, bundle: pathlib.Path, bin_dir: pathlib.Path, *words: str) -> list[object]:
        """The command line. The bundle stands in the image's root, or a root is made for it."""
        root = bundle.parent
        if not (root / "cni-portmap").is_symlink():
            root = self._place / f"root-{bundle.name}"
            if not root.exists():
                root.mkdir()
                bundle.rename(root / bundle.name)
                bundle.symlink_to(root / bundle.name)
                (root / "cni-portmap").symlink_to(f"{bundle.name}/cni-portmap")
        arguments = image.pod()[1]["args"]
        assert arguments == ["node-install", "--bin-dir", image.BIN_DIR, "--watch"]
        return self.runc.run(root, bin_dir, ["/cni-portmap", *arguments[:-1], *words])

    def probe(self, bundle: pathlib.Path, bin_dir: pathlib.Path) -> list[object]:
        """What the kubelet does."""
        del bundle, bin_dir
        return self.runc.probe()

    def shown(self, bin_dir: pathlib.Path) -> pathlib.Path:
        """The folder in the container."""
        del bin_dir
        return pathlib.Path(image.BIN_DIR)


class Node:
    """A folder of plugins, the bundle that is to be installed there, and what happens to them."""

    def __init__(self, installer: Shell | NodeInstall, bundle: pathlib.Path, place: pathlib.Path) -> None:
        self.installer, self._place = installer, place
        self._first, self._bundle = bundle, bundle
        self.bin_dir = place / "bin"
        self.bin_dir.mkdir()
        self.plugin = self.bin_dir / "portmap"
        self.shown = installer.shown(self.bin_dir)
        self._home = self.bin_dir / ".cni-portmap"
        self.write("portmap", REFERENCE)
        self._before, self._inode = entries(self.bin_dir), self.plugin.stat().st_ino
        self._wrapper: tuple[object, ...] = ()
        self._end, self._codes = threading.Event(), list[int]()
        self._callers: list[threading.Thread] = []
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """End what still goes on."""
        self._end.set()
        self._stack.close()

    def command(self, *words: str) -> list[str]:
        """The command line of the installer."""
        return [*map(str, (*self._wrapper, *self.installer.command(self._bundle, self.bin_dir, *words)))]

    def probe(self) -> list[str]:
        """The command line that ends with 0 if the plugin is ours, as the last command has it."""
        assert isinstance(self.installer, NodeInstall)
        return [*map(str, self.installer.probe(self._bundle, self.bin_dir))]

    def run(self, *words: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
        """Run the installer; it must end with `status`."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, check=False,
                              env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    # --- the installer ---

    def install(self, says: str) -> None:
        self._bundle = self._first
        assert says in self.run().stdout

    def upgrade(self, says: str) -> None:
        newer = self._place / "newer"
        self._bundle = newer if newer.exists() else next_version(self._first, newer)
        assert says in self.run().stdout

    def again(self) -> None:
        def state() -> list[object]:
            return [(path, path.lstat().st_ino, path.lstat().st_mtime_ns) for path in self.bin_dir.rglob("*")
                    if path.name not in ("lock", "commands")]
        before = state()
        assert "already" in self.run().stdout
        assert state() == before

    def uninstall(self, says: str, *words: str) -> None:
        assert says in self.run("--uninstall", *words).stdout

    def refuses(self, says: str) -> None:
        before = entries(self.bin_dir)
        said = self.run(status=1).stderr.strip()
        assert says in said and said.count("\n") == 0 and said.startswith(self.installer.says), said
        assert entries(self.bin_dir) == before

    def roll_back(self, says: str) -> None:
        assert says in self.run("--rollback").stdout

    def upgrade_fails(self, says: str) -> None:
        before = os.readlink(self.plugin)
        self._bundle = self._place / "newer"
        assert says in self.run(status=1).stderr
        assert os.readlink(self.plugin) == before

    def refuses_to_uninstall(self, says: str) -> None:
        before = entries(self.bin_dir)
        assert says in self.run("--uninstall", status=1).stderr
        assert entries(self.bin_dir) == before

    # --- what is there afterwards ---

    def runs(self) -> None:
        done = subprocess.run([self.plugin], input='{"cniVersion": "1.0.0"}', env={"CNI_COMMAND": "VERSION"}, text=True,
                              capture_output=True, check=True)
        assert json.loads(done.stdout)["cniVersion"] == "1.0.0"

    def works(self) -> None:
        self.runs()
        assert os.readlink(self.plugin).startswith(".cni-portmap/")
        assert lab.run(self._home / "cni-portmap", "version").startswith("cni-portmap ")
        folder = self.plugin.resolve().parent
        assert {path.relative_to(folder): path.stat().st_mode for path in folder.rglob("*")} == {
            path.relative_to(self._bundle): path.stat().st_mode for path in self._bundle.rglob("*")}

    def as_before(self) -> None:
        assert entries(self.bin_dir) == self._before and self.plugin.stat().st_ino == self._inode
        assert not self._home.exists()

    def holds(self, expected: dict[str, str]) -> None:
        assert entries(self.bin_dir) == {name: content if content.startswith("-> ") else content.encode()
                                         for name, content in expected.items()}

    def reads(self, name: str, content: str) -> None:
        assert (self.bin_dir / name).read_text() == content and not (self.bin_dir / name).is_symlink()

    def holds_program(self) -> None:
        assert entries(self.bin_dir) == {"portmap": PROGRAM}

    def is_one_version(self) -> None:
        assert len([*self._home.glob("*/lib")]) == 1

    def is_closed(self) -> None:
        assert not [path for path in (self._home, *self._home.rglob("*"))
                    if not path.is_symlink() and path.stat().st_mode & 0o022]

    def lock_is_roots_own(self) -> None:
        assert stat.S_IMODE((self._home / "lock").stat().st_mode) == 0o600

    def nothing_beside(self) -> None:
        assert {path.name for path in self.bin_dir.iterdir()} == {"portmap", ".cni-portmap"}

    def nothing_half(self) -> None:
        assert not [*self._home.glob("new-*")]

    def no_table(self) -> None:
        assert "cni_portmap" not in lab.nft("list", "ruleset")

    def labelled(self) -> None:
        files = [*self.plugin.resolve().parent.rglob("*")]
        assert len(files) > 20 and {os.getxattr(path, SELINUX) for path in files} == {LABEL}

    # --- what others do ---

    def write(self, name: str, content: str | bytes, mode: int = 0o755) -> None:
        """As most installers do: beside, and renamed."""
        beside = self._place / "beside"
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        beside.chmod(mode)
        beside.rename(self.bin_dir / name)

    def write_through(self, content: str) -> None:
        """As `cp` does."""
        self.plugin.write_text(content)

    def remove(self, name: str) -> None:
        (self.bin_dir / name).unlink()

    def link(self, name: str, target: str) -> None:
        (self.bin_dir / name).symlink_to(target)

    def folder(self, name: str) -> None:
        (self.bin_dir / name).mkdir()

    def copy_ours(self) -> None:
        shutil.copy(self._first / "portmap", self.plugin)

    def begin_to_write(self, size: int) -> None:
        """As a slow `cp` does: through our link, and the rest comes later."""
        self._writer = self.plugin.open("wb", buffering=0)
        self._stack.callback(self._writer.close)
        self._writer.write(PROGRAM[:size])

    def write_the_rest(self) -> None:
        self._writer.write(PROGRAM[self._writer.tell():])
        self._writer.close()

    def break_off(self) -> None:
        self._writer.close()

    def link_by_another_path(self) -> None:
        """As the node calls the folder, seen from a container."""
        folder = self.plugin.resolve().parent.name
        self.plugin.unlink()
        self.plugin.symlink_to(f"/path/of/the/node/.cni-portmap/{folder}/portmap")

    def spoil(self, how: str, name: str) -> None:
        """Change a file or folder of the version that is installed."""
        path = self.plugin.resolve().parent / name
        if how in ("remove", "be a folder"):
            path.unlink()
            if how == "be a folder":
                path.mkdir()
        elif how == "be bytes":
            path.write_bytes(b"\xff\xfe\n")
        elif how == "be empty":
            os.truncate(path, 0)
        else:
            path.chmod(int(how, 8))

    def half_copied(self) -> None:
        (self._home / "new-abcdef/lib").mkdir(parents=True)

    def left_beside(self, name: str) -> None:
        """Killed between a link's making and its renaming."""
        (self.bin_dir / f".{name}.cni-portmap-new").symlink_to(os.readlink(self.plugin))

    def kept_already(self) -> None:
        self._home.mkdir()
        os.link(self.plugin, self._home / "kept-portmap")

    def runtimes_call(self) -> None:
        host = Host(self.plugin)

        def call() -> None:
            while not self._end.is_set():
                self._codes.append(host.call("VERSION", WEB).code)
        self._callers = [threading.Thread(target=call) for _ in range(2)]
        for caller in self._callers:
            caller.start()

    def no_call_failed(self) -> None:
        lab.until(lambda: len(self._codes) > 20)  # a busy host makes fewer in the same time
        self._end.set()
        for caller in self._callers:
            caller.join()
        assert len(self._codes) > 20 and not any(self._codes)

    def publish(self) -> None:
        Host(self.plugin).add(WEB)

    # --- what is wrong ---

    def _broken(self) -> pathlib.Path:
        folder = self._place / "broken"
        self._bundle = folder if folder.exists() else next_version(self._first, folder)
        return folder

    def truncate(self, name: str) -> None:
        path = self._broken() / name
        replace(path, path.read_bytes()[:1000])

    def drop(self, name: str) -> None:
        (self._broken() / name).unlink()

    @contextlib.contextmanager
    def small_disk(self, size: str) -> Iterator[None]:
        """The folder is a file system of its own, of this size, with the reference plugin."""
        lab.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", self.bin_dir)
        try:
            self.write_through(REFERENCE)
            self.plugin.chmod(0o755)
            yield
        finally:
            lab.run("umount", self.bin_dir)

    def full_disk(self) -> None:
        self._stack.enter_context(self.small_disk("5m"))

    def mounted(self, options: str) -> None:
        folder = self.bin_dir
        script = f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,{options} "{folder}" && exec "$@"'
        self._wrapper = "unshare", "-m", "sh", "-ec", script, "sh"

    def renames_fail(self, name: str) -> None:
        path = self._home / name
        self._wrapper = ("strace", "-f", "-qqq", "-o", "/dev/null", "-P", path, "-P", f"{path}.new", "-e",
                         "trace=rename", "-e", "inject=rename:error=ENOSPC")

    def renames_work(self) -> None:
        self._wrapper = ()

    def no_nf_tables(self) -> None:
        self._wrapper = ("strace", "-f", "-qqq", "-o", "/dev/null", "-e", "trace=socket", "-e",
                         "inject=socket:error=EPROTONOSUPPORT")

    def as_nobody(self) -> None:
        self._bundle = shutil.copytree(self._first, pathlib.Path("/run/bundle"))
        self._stack.callback(shutil.rmtree, self._bundle)
        self._wrapper = "setpriv", "--reuid", "65534", "--clear-groups"

    def selinux(self) -> None:
        """The kernel seems to have SELinux."""
        os.setxattr(self.bin_dir, SELINUX, LABEL)
        file = self._place / "filesystems"
        file.write_text(pathlib.Path("/proc/filesystems").read_text() + "nodev\tselinuxfs\n")
        lab.run("mount", "--bind", file, "/proc/filesystems")
        self._stack.callback(lab.run, "umount", "/proc/filesystems")

    def of_another_owner(self) -> None:
        """As Kubespray makes it: the folder and the plugin are of user kube."""
        for path in self.bin_dir, self.plugin:
            os.chown(path, 1000, 1000)
        self.plugin.chmod(0o700)

    def give_away(self, name: str, mode: int) -> None:
        folder = self.plugin.resolve().parent / name
        os.chown(folder, 1000, 1000)
        folder.chmod(mode)

    def without_fowner(self) -> None:
        self._wrapper = "setpriv", "--bounding-set=-fowner"

    def first_lock_fails(self) -> None:
        self._wrapper = ("strace", "-f", "-qqq", "-o", "/dev/null", "-e", "trace=flock", "-e",
                         "inject=flock:error=EBADF:when=1")

    def without_dac_override(self) -> None:
        self._wrapper = "setpriv", "--bounding-set=-dac_override,-dac_read_search"

    def behind_a_link(self) -> None:
        folder = self._place / "elsewhere"
        self.bin_dir.rename(folder)
        self.bin_dir.symlink_to(folder)
