"""The bundle that this program is of, as a node's plugin: copied, switched in, given back.

Each version has a folder in BIN_DIR/.cni-portmap, and the plugin is a link into it. So replacing a link switches to
another version, and a call that is under way finds its files where they were. What was there before is in kept-portmap.
No shell and no program is run but the plugin itself, so it works where there is none: in an image with nothing else.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from .. import __version__
from ..cni import IO_FAILURE, CniError
from .whole import is_program, is_written

SUMS = "SHA256SUMS"
MARK = b"files of cni-portmap are missing"  # each version's launcher says so, on each architecture: packaging/stub.c
PROGRAMS = {"portmap", "cni-portmap", "install.sh", "ld.so", "program"}  # all other files are only read
LAUNCHES = b"from cni_portmap.plugin import main"  # so do the launchers of scripts/install and of packages
PACKAGED = b'sys.path.insert(0, "/usr/share/cni-portmap")'  # a package's: packaging/stage
UNUSED_SECONDS = 3600  # no call lasts that long
CAP_NET_ADMIN = 12
SELINUX = "security.selinux"


def bundle() -> str:
    """The folder of the bundle that this program is of. Raises CniError for a program that is of none."""
    if not hasattr(sys, "frozen"):
        raise CniError(IO_FAILURE, "this command is not a bundle's, and only a bundle can be copied to a node",
                       "run it in an unpacked bundle or in the image; a clone has scripts/install")
    return os.path.dirname(os.path.dirname(os.readlink("/proc/self/exe")))  # it is lib/ld.so there


def may_administer() -> bool:
    """Whether this process has CAP_NET_ADMIN, which reading and writing of nf_tables needs."""
    with open("/proc/self/status") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_NET_ADMIN & 1)


class _Refused(Exception):
    """A version's folder cannot be mended: it is another user's."""


class _File(NamedTuple):
    """A file of a bundle, as it is to be: its size in bytes, its permissions, its sha256 in hexadecimal digits."""

    size: int
    mode: int
    digest: str


class Installation:
    """What `source`, a bundle, becomes in `bin_dir`, a node's folder of plugins. Its methods raise CniError."""

    def __init__(self, source: str, bin_dir: str, name: str = "portmap") -> None:
        self._source, self.bin_dir = source, bin_dir.rstrip("/")
        self._home = f"{self.bin_dir}/.cni-portmap"
        self.plugin = f"{self.bin_dir}/{name}"
        self._kept, self._previous = f"{self._home}/kept-{name}", f"{self._home}/previous-{name}"
        self._aside = f"{self._kept}.new"  # what another program may still be writing
        self._replaced = f"{self._home}/replaced-{name}"
        self._lock = -1
        self._times = list[float]()  # when another has replaced the plugin
        self._sums = _content(f"{source}/{SUMS}")
        self._files = _files(source)

    # --- one at a time ---

    def lock(self) -> bool:
        """Take the lock, until this process ends, if it is free or this process has it; whether it has it now."""
        return self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def wait(self) -> None:
        """Wait for the lock, and take it."""
        self._locked(fcntl.LOCK_EX)

    @property
    def lock_path(self) -> str:
        """The file that is locked."""
        return f"{self._home}/lock"

    def unlock(self) -> None:
        """Let others have the lock."""
        os.close(self._lock)
        self._lock = -1

    def _locked(self, how: int) -> bool:
        with _told(f"{self._home} cannot be written to"):
            while not self._has_lock():
                os.makedirs(self.bin_dir, exist_ok=True)
                try:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(self._home, 0o755)
                    # Not for writing: that would forbid to mount it read-only while this watches. Whoever can open it
                    # can lock it, so nobody else can.
                    self._lock = os.open(self.lock_path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                    with contextlib.suppress(OSError):  # of another user, or mounted read-only
                        os.fchmod(self._lock, 0o600)
                except FileNotFoundError:
                    if os.path.islink(self._home):
                        raise
                    continue  # who uninstalls has removed the folder just now
                try:
                    try:
                        fcntl.flock(self._lock, how)
                    except OSError as error:
                        if error.errno != errno.EBADF:
                            raise
                        os.close(self._lock)  # NFS locks only what is open for writing: flock(2)
                        self._lock = os.open(self.lock_path, os.O_RDWR | os.O_CLOEXEC)
                        fcntl.flock(self._lock, how)
                except BlockingIOError:
                    return False
        return True

    def _has_lock(self) -> bool:
        """Whether what is locked is the file that others find; if not, it is closed: its folder has been removed."""
        if self._lock < 0:
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._lock), os.stat(self.lock_path)):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
        os.close(self._lock)
        self._lock = -1
        return False

    # --- questions ---

    def is_current(self) -> bool:
        """Whether the plugin there is this bundle's, with all of its files: as far as names, sizes and modes tell."""
        folder = self._folder_of(self.plugin)
        with contextlib.suppress(OSError):  # another program replaces something of it just now
            return bool(folder) and os.readlink(self.plugin) == f".cni-portmap/{folder}/portmap" and \
                self._is_this(folder) and not self._wrong(folder) and \
                _is_launcher(f"{self._home}/{folder}/portmap") and os.path.lexists(self.command)
        return False

    def runs(self) -> bool:
        """Whether the plugin answers a runtime: the folder may be mounted anew, with other options."""
        with contextlib.suppress(OSError):
            return not _call(self.plugin, "VERSION", {"cniVersion": "1.0.0"})[0]
        return False

    def is_there(self) -> bool:
        """Whether anything of an installation is there."""
        return os.path.isdir(self._home) or self._is_ours() or bool(self._leftovers())

    @property
    def command(self) -> str:
        """The operator's command, a link to that of the version in use."""
        return f"{self._home}/cni-portmap"

    def _folder_of(self, path: str) -> str:
        """The version's folder that a link leads to, by its name; "" for what is not of this installation."""
        try:
            link = os.readlink(path)
        except OSError:
            return ""
        # An absolute one may name this folder by another path: that of the node, seen from a container.
        before, _, inside = f"/{link}".rpartition("/.cni-portmap/")
        folder, _, file = inside.partition("/")
        return folder if file and (not before or folder in self._folders()) else ""

    def _entry(self) -> str:
        """The plugin itself; for a link to a version, that one's file, also where the link cannot be followed."""
        folder = self._folder_of(self.plugin)
        return f"{self._home}/{folder}/portmap" if folder else self.plugin

    def _is_ours(self) -> bool:
        """Whether the plugin is ours: a link to a version that nobody has written over, or a copy of one's launcher."""
        entry = self._entry()
        return _is_launcher(entry) or (entry != self.plugin and not os.path.lexists(entry))

    def _folders(self) -> list[str]:
        with contextlib.suppress(OSError):
            return sorted(entry.name for entry in os.scandir(self._home) if entry.is_dir(follow_symlinks=False))
        return []

    # --- install ---

    def install(self) -> tuple[bool, bool]:
        """Let the plugin be this bundle's. With the lock.

        Whether another's was kept for `give_back`, and whether the plugin was anything but this version. Whatever
        fails, and wherever it is killed, the plugin that was there works on.
        """
        if os.path.lexists(self.plugin) and not os.path.islink(self.plugin) and not os.path.isfile(self.plugin):
            what = "a folder" if os.path.isdir(self.plugin) else "no file"
            raise CniError(IO_FAILURE, f"{self.plugin} is {what}: expected a plugin there, or nothing")
        if _is_other_launcher(self.plugin) and PACKAGED in _content(self.plugin, 4096):
            raise CniError(IO_FAILURE, f"{self.plugin} is of the package cni-portmap, and would be removed with it: "
                           "remove the package first, or choose another folder")
        was_current = self.is_current()
        for name in self._folders():
            if name.startswith("new-"):  # of one that was killed
                shutil.rmtree(f"{self._home}/{name}", ignore_errors=True)
        folder = next((name for name in (self._folder_of(self.plugin), *self._folders()) if self._is_this(name)), "")
        new = "" if folder else self._copy()
        with _told(f"cannot replace {self.plugin}"):
            kept = self._keep()
        mended = False
        try:
            mended = bool(folder) and self._mend(folder)
        except _Refused:
            folder, new = "", self._copy()
        if folder:
            self._check(folder)
        with _told(f"cannot replace {self.plugin}"):
            self._switch(folder or new)
            self._remove_unused()
        return kept, mended or not was_current

    def prepare(self) -> None:
        """Refuse what cannot be, before the lock is there: no list of files, a folder that cannot be written to."""
        if os.geteuid():
            raise CniError(IO_FAILURE, "run it as root")
        if not self._sums:
            raise CniError(IO_FAILURE, f"this bundle is incomplete: {SUMS} is missing; unpack the archive again")
        _make_folder(self.bin_dir)
        if os.path.islink(self._home) or (os.path.lexists(self._home) and not os.path.isdir(self._home)):
            raise CniError(IO_FAILURE, f"{self._home} is not a folder of this program: move it away")

    def _is_this(self, name: str) -> bool:
        """Whether a folder there is for this bundle."""
        return bool(name and self._sums) and _content(f"{self._home}/{name}/{SUMS}") == self._sums

    def _wrong(self, name: str, thorough: bool = False) -> list[str]:
        """What in a folder for this bundle is not as it is to be: paths in it, those of folders end with /.

        By kind, size and permissions; with `thorough`, by all bytes, and by who else may write.
        """
        closed = 0o022 if thorough else 0
        places = ["../", "./", *sorted({f"{os.path.dirname(path)}/" for path in self._files if "/" in path})]
        folder = f"{self._home}/{name}"
        wrong = [place for place in places if not _has_mode(f"{folder}/{place}", stat.S_IFDIR, 0o755, closed)]
        for path, file in self._files.items():
            there = f"{folder}/{path}"
            if not _has_mode(there, stat.S_IFREG, file.mode, closed) or os.stat(there).st_size != file.size or \
                    (thorough and _digest(_content(there)) != file.digest):
                wrong.append(path)
        return wrong

    def _mend(self, name: str) -> bool:
        """Put right what is wrong in this bundle's folder there, file by file; whether anything was."""
        folder = f"{self._home}/{name}"
        with _told(f"cannot mend {folder}"):
            wrong = self._wrong(name, thorough=True)
            for path in wrong:
                if path.endswith("/"):
                    there = f"{folder}/{path.rstrip('/')}"
                    if not os.path.isdir(there) or os.path.islink(there):
                        _remove(there)
                        os.mkdir(there)
                    try:
                        os.chmod(there, 0o755)
                    except PermissionError:  # of another user, and this process may not have the capability FOWNER
                        if _has_mode(there, stat.S_IFDIR, 0o755):
                            continue  # he may let others write
                        if path == "../":
                            raise
                        raise _Refused from None
            if not wrong:
                return False
            for path in self._wrong(name, thorough=True):  # now that folders can be looked into
                if path.endswith("/"):
                    continue
                if os.path.isdir(f"{folder}/{path}") and not os.path.islink(f"{folder}/{path}"):
                    shutil.rmtree(f"{folder}/{path}")
                self._copy_file(folder, path)
            _label(folder, self.bin_dir)
            for place, _, _ in os.walk(folder):
                _sync(place)
        return True

    def _copy(self) -> str:
        """Copy the bundle beside, and try it there; the name of its folder."""
        with _told(f"{self._home} cannot be written to"):
            new = tempfile.mkdtemp(prefix="new-", dir=self._home)
        try:
            with _told("cannot copy the bundle"):
                for path in self._files:
                    self._copy_file(new, path)
                os.chmod(new, 0o755)
                _label(new, self.bin_dir)
                for folder, _, _ in os.walk(new):
                    _sync(folder)
            self._check(os.path.basename(new))
            name = f"{__version__}-{new.rpartition('-')[2]}"
            with _told(f"{self._home} cannot be written to"):
                os.rename(new, f"{self._home}/{name}")
                _sync(self._home)
            return name
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise

    def _copy_file(self, new: str, path: str) -> None:
        try:
            content = _read(f"{self._source}/{path}")
        except FileNotFoundError:
            raise CniError(IO_FAILURE, f"this bundle is incomplete: {path} is missing; unpack the archive again") \
                from None
        if _digest(content) != self._files[path].digest:
            raise CniError(IO_FAILURE, "this bundle is damaged: a checksum in SHA256SUMS is wrong; unpack the archive "
                           "again")
        os.makedirs(os.path.dirname(f"{new}/{path}"), 0o755, exist_ok=True)
        _replace(f"{new}/{path}", content, self._files[path].mode)

    def _check(self, folder: str) -> None:
        """Raise CniError unless the plugin in a version's folder runs, and can publish as far as this process can tell.

        By a link beside the plugin, as runtimes call it: a mount may forbid to follow links.
        """
        beside = self._beside(self.plugin)
        with _told(f"{self.bin_dir} cannot be written to"):
            _remove(beside)
            os.symlink(f".cni-portmap/{folder}/portmap", beside)
            try:
                self._try(beside)
            finally:
                _remove(beside)

    def _try(self, plugin: str) -> None:
        try:
            status, said = _call(plugin, "VERSION", {"cniVersion": "1.0.0"})
        except OSError as error:
            raise CniError(IO_FAILURE, f"the plugin does not run in {self.bin_dir}: {error.strerror}: is it mounted "
                           "noexec or nosymfollow?") from None
        if status or "supportedVersions" not in said:
            raise CniError(IO_FAILURE, f"the plugin does not run in {self.bin_dir}: {said or f'status {status}'}")
        if may_administer():
            status, said = _call(plugin, "STATUS", {"cniVersion": "1.1.0", "name": "install", "type": "portmap"})
            if status:
                with contextlib.suppress(ValueError, KeyError):
                    said = json.loads(said)["msg"]
                raise CniError(IO_FAILURE, f"this host cannot publish ports: {said}")

    def _keep(self) -> bool:
        """Keep the entry that is there, as it is, a link as a link, unless it is ours; whether there was one to keep.

        The file itself is kept, by a second name: so what another program is still writing becomes whole here.
        """
        self.settle()
        entry = self._entry()
        if not os.path.lexists(entry) or (self._is_ours() and not is_written(entry)):
            return False
        _remove(self._aside)
        try:
            os.link(entry, self._aside, follow_symlinks=False)
        except OSError:  # a file system without such names, or another user's file
            if is_written(entry):
                raise CniError(IO_FAILURE, f"{entry} is being written by another program, and cannot be kept yet") \
                    from None
            _copy_entry(entry, self._aside)
        _sync(self._home)
        return self.settle() or os.path.lexists(self._aside)

    def _leftovers(self) -> list[str]:
        """Links that one that was killed has left under the name that `_beside` gives, for whatever plugin."""
        with contextlib.suppress(FileNotFoundError):
            return [entry.path for entry in os.scandir(self.bin_dir)
                    if entry.name.endswith(".cni-portmap-new") and self._folder_of(entry.path)]
        return []

    def settle(self) -> bool:
        """Let what was set aside be what is kept, once nobody writes it; whether it is now. With the lock.

        And remove what one that was killed has left beside the plugins, where it would be a user of the versions.
        What is ours or empty never is. What is no program that runs here, or is another installation's launcher, is
        only where nothing else was kept.
        """
        with _told(f"cannot write to {self._home}"):
            for path in self._leftovers():
                _remove(path)
            if not os.path.lexists(self._aside) or is_written(self._aside):
                return False
            if self._is_own(self._aside) or self._is_launcher_over_kept() or not (is_program(self._aside) or (
                    # A link may lead somewhere where all of the node is seen.
                    not is_program(self._kept) if os.path.islink(self._aside) else
                    not os.path.lexists(self._kept) and os.path.getsize(self._aside))):
                _remove(self._aside)
                return False
            os.rename(self._aside, self._kept)
            _remove(self._aside)  # rename(2) does nothing where both are the same file
            _sync(self._home)
            return True

    def _is_own(self, path: str) -> bool:
        """Whether an entry is nothing to keep: of this installation."""
        return bool(self._folder_of(path)) or _is_launcher(path)

    def _is_launcher_over_kept(self) -> bool:
        """Whether another installation's launcher would take the place of what was there before both."""
        return _is_other_launcher(self._aside) and os.path.lexists(self._kept) and not _is_other_launcher(self._kept)

    def _switch(self, folder: str) -> None:
        """Let the plugin and the command be those of a version."""
        before = self._folder_of(self.plugin)
        if before not in ("", folder):  # first: whatever fails here, who is switched can be rolled back
            with contextlib.suppress(FileNotFoundError):
                os.utime(f"{self._home}/{before}")
            _replace(self._previous, f"{before}\n".encode(), 0o644)
            _sync(self._home)
        self._link(f".cni-portmap/{folder}/portmap", self.plugin)
        self._link(f"{folder}/cni-portmap", self.command)
        _sync(self._home)

    @staticmethod
    def _link(target: str, path: str) -> None:
        """Let `path` be a link to `target`, in one step, whatever is there."""
        with contextlib.suppress(OSError):
            if os.readlink(path) == target:
                return
        beside = Installation._beside(path)
        _remove(beside)
        os.symlink(target, beside)
        os.rename(beside, path)
        _sync(os.path.dirname(path))

    @staticmethod
    def _beside(path: str) -> str:
        """Where an entry is made that is to take this path's place."""
        folder, name = os.path.split(path)
        return f"{folder}/.{name}.cni-portmap-new"

    def _remove_unused(self) -> None:
        """Remove the versions that neither a link nor a rollback leads to, an hour after they were last used."""
        used = {self._folder_of(entry.path) for entry in os.scandir(self.bin_dir)}
        for entry in os.scandir(self._home):
            if entry.name.startswith("previous-"):
                used.add(_content(entry.path).decode(errors="replace").strip())
        for name in self._folders():
            path = f"{self._home}/{name}"
            if name not in used and time.time() - os.stat(path).st_mtime > UNUSED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def check_command(self, folder: str) -> None:
        """Refuse what cannot be the folder of the operator's command, or has a folder in the command's place."""
        _make_folder(folder)
        if os.path.isdir(f"{folder}/cni-portmap"):
            raise CniError(IO_FAILURE, f"{folder}/cni-portmap is a folder: expected a command there, or nothing")

    def put_command(self, folder: str) -> bool:
        """Let a link in `folder` lead to the operator's command; False if another installation's is there: it stays."""
        path, noted = f"{folder}/cni-portmap", f"{self._home}/commands"
        with _told(f"cannot write to {folder}"):
            if os.path.lexists(path) and not (os.path.islink(path) and
                                              os.readlink(path).endswith("/.cni-portmap/cni-portmap")):
                return False
            if path not in (lines := _lines(noted)):  # first: so also who is killed here leaves nothing unknown
                _replace(noted, "".join(f"{line}\n" for line in (*lines, path)).encode(), 0o644)
            self._link(self.command, path)
        return True

    def roll_back(self) -> str:
        """Switch to the version that was installed before this one; a line that says so. With the lock."""
        if not self._folder_of(self.plugin):
            raise CniError(IO_FAILURE, f"{self.plugin} is not of this installation")
        before = "".join(_lines(self._previous))
        folder = f"{self._home}/{before}"
        if before not in self._folders() or before == self._folder_of(self.plugin):
            raise CniError(IO_FAILURE, "no version was installed before this one: --uninstall restores the plugin of "
                           "another program")
        if any(_digest(_content(f"{folder}/{path}")) != digest for path, digest in _sums(folder).items()):
            raise CniError(IO_FAILURE, f"{folder}, the version before this one, is damaged: install it again")
        self._check(before)
        with _told(f"cannot replace {self.plugin}"):
            self._keep()
            self._switch(before)
        return f"{self.plugin} is cni-portmap {before.rpartition('-')[0]} again"

    # --- who is replaced again and again ---

    def is_installed(self) -> bool:
        """Whether it was installed here, whatever the plugin is now."""
        return os.path.islink(self.command)

    def is_others(self) -> bool:
        """Whether the plugin is another's program, one that runs here as far as its file tells."""
        entry = self._entry()
        with contextlib.suppress(OSError):
            return not self._is_own(entry) and is_program(entry)
        return False

    def note_replaced(self, seconds: float) -> int:
        """Note that another program has replaced the plugin; how often it did so in the last `seconds`.

        Also in a file, if there is room, so that who is killed and started again does not begin to count again.
        """
        now = time.time()
        times = {*self._times, now}
        for line in _lines(self._replaced):
            with contextlib.suppress(ValueError):
                times.add(float(line))
        self._times = sorted(each for each in times if 0 <= now - each < seconds)
        with contextlib.suppress(OSError):
            _replace(self._replaced, "".join(f"{each}\n" for each in self._times).encode(), 0o644)
        return len(self._times)

    def forget_replaced(self) -> None:
        """Begin to count again."""
        self._times = []
        with contextlib.suppress(OSError):
            os.unlink(self._replaced)

    # --- uninstall ---

    def give_back(self) -> str:
        """Let the plugin be what was there before, or what another has put there since; a line that says which.

        Another installation of cni-portmap stays the plugin, and then what was kept stays for it: scripts/install.
        """
        with _told(f"cannot replace {self.plugin}"):
            if _is_other_launcher(self.plugin):
                for path in self._aside, self._previous, self._replaced, \
                        *([self._kept] if _is_other_launcher(self._kept) else []):
                    _remove(path)
                return f"left {self.plugin}, which is of another installation of cni-portmap"
            self._keep()
            said = ""
            # What another still writes is the plugin again, as it would be if this were not here.
            found = next((path for path in (self._aside, self._kept) if os.path.lexists(path)), "")
            if found and not self._is_own(found):
                try:
                    os.rename(found, self.plugin)
                except OSError as error:
                    if error.errno != errno.EXDEV:  # the folder of versions is a mount of its own
                        raise
                    _remove(self._beside(self.plugin))
                    _copy_entry(found, self._beside(self.plugin))
                    os.rename(self._beside(self.plugin), self.plugin)
                said = f"gave back {self.plugin}"
            elif os.path.lexists(self.plugin):
                os.unlink(self.plugin)
                said = f"removed {self.plugin}"
            for path in self._aside, self._kept, self._previous, self._replaced:  # see `settle`
                _remove(path)
            _sync(self.bin_dir)
            return said

    def user(self) -> str:
        """Another entry of the folder that is a link into this installation; "" for none."""
        return next((entry.path for entry in os.scandir(self.bin_dir) if self._folder_of(entry.path)), "")

    def remove(self) -> str:
        """Remove all but what is kept, and the links to the command that can be seen from here; a line that says so.

        The lock goes last: until then who waits for it waits, and whoever comes finds it.
        """
        with _told(f"cannot remove {self._home}"):
            for entry in (each for path in _lines(f"{self._home}/commands") for each in (path, self._beside(path))):
                with contextlib.suppress(OSError):
                    folder, name = os.path.split(os.readlink(entry))
                    if name == "cni-portmap" and os.path.samefile(folder, self._home):  # by whatever path
                        os.unlink(entry)
            for entry in [*os.scandir(self._home)]:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.path != self.lock_path and not entry.name.startswith("kept-"):
                    os.unlink(entry.path)
            with contextlib.suppress(OSError):
                os.unlink("/run/cni-portmap.lock")
            _remove(self.lock_path)
            try:
                os.rmdir(self._home)
            except OSError as error:
                if error.errno == errno.ENOTEMPTY and any(name.startswith("kept-") for name in os.listdir(self._home)):
                    return f"removed what was in {self._home}, but for what is kept"
                if error.errno == errno.ENOTEMPTY:  # the next installer has made it its own already
                    return f"removed what was in {self._home}, where another installer begins"
                if error.errno == errno.EBUSY:
                    return f"removed what was in {self._home}; the folder stays: it is a mount of its own"
                raise
            return f"removed {self._home}"


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Let a failed system call be a CniError of one sentence."""
    try:
        yield
    except OSError as error:
        raise CniError(IO_FAILURE, f"{what}: {error.strerror}") from None


def _make_folder(path: str) -> None:
    """Make a folder if it is not there. Raises CniError where that cannot be, or nothing can be written to it."""
    ancestor = path
    while not os.path.lexists(ancestor):
        ancestor = os.path.dirname(ancestor)
    if not os.path.isdir(ancestor):
        raise CniError(IO_FAILURE, f"{ancestor} is not a folder")
    if not os.access(ancestor, os.W_OK):
        owner = os.stat(ancestor).st_uid
        if os.statvfs(ancestor).f_flag & os.ST_RDONLY:
            why = "it is mounted read-only"
        elif owner:
            why = f"it is of user {owner}, and for that this process needs the capability DAC_OVERRIDE"
        else:
            why = "is it immutable (lsattr), or does a security module forbid it?"
        raise CniError(IO_FAILURE, f"{ancestor} cannot be written to: {why}")
    with _told(f"{ancestor} cannot be written to"):
        os.makedirs(path, exist_ok=True)


def _call(plugin: str, verb: str, config: object) -> tuple[int, str]:
    """Call a plugin by its path: its status, and all that it said. Raises OSError where it does not start."""
    done = subprocess.run([plugin], input=json.dumps(config), env={"CNI_COMMAND": verb}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", check=False)
    return done.returncode, done.stdout.strip()


def _sums(folder: str) -> dict[str, str]:
    """The files of a bundle, with their sha256, as its SHA256SUMS has them: path -> hexadecimal digits."""
    return {path: digest for digest, _, path in (line.partition("  ") for line in _lines(f"{folder}/{SUMS}"))}


def _files(source: str) -> dict[str, _File]:
    """All files of a bundle, as they are to be on a node, whatever umask it was unpacked with: path -> file."""
    sums = {**_sums(source), SUMS: _digest(_content(f"{source}/{SUMS}"))}
    return {path: _File(os.stat(f"{source}/{path}").st_size if os.path.exists(f"{source}/{path}") else -1,
                        0o755 if os.path.basename(path) in PROGRAMS else 0o644, digest)
            for path, digest in sums.items()}


def is_plugin(path: str) -> bool:
    """Whether a file, or what a link leads to, is the plugin of any installation of cni-portmap."""
    found = os.path.realpath(path)
    return _is_launcher(found) or _is_other_launcher(found)


def _is_launcher(path: str) -> bool:
    """Whether a file, not a link, is the plugin of any version."""
    return os.path.isfile(path) and not os.path.islink(path) and MARK in _content(path, 65536)


def _is_other_launcher(path: str) -> bool:
    """Whether a file, not a link, is the plugin of an installation that is not a bundle's."""
    return os.path.isfile(path) and not os.path.islink(path) and LAUNCHES in _content(path, 4096)


def _has_mode(path: str, kind: int, mode: int, closed: int = 0) -> bool:
    """Whether an entry is of that kind, permits at least `mode`, and nothing of `closed`."""
    try:
        found = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_IFMT(found) == kind and not mode & ~found and not closed & found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _content(path: str, most: int = -1) -> bytes:
    """A file's content, its first `most` bytes; b"" for none that can be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(most)
    return b""


def _lines(path: str) -> list[str]:
    """A text file's lines, whatever bytes it has; none for none that can be read."""
    return _content(path).decode(errors="replace").splitlines()


def _write(path: str, content: bytes, mode: int) -> None:
    """Write a new file, and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def _replace(path: str, content: bytes, mode: int) -> None:
    """Let a file have that content, in one step: whoever has the former open keeps it."""
    _remove(f"{path}.new")
    _write(f"{path}.new", content, mode)
    os.rename(f"{path}.new", path)


def _copy_entry(path: str, copy: str) -> None:
    """Make a copy of a link or file, with its mode and, where this process may, its owner."""
    if os.path.islink(path):
        os.symlink(os.readlink(path), copy)
        return
    about = os.stat(path)
    _write(copy, _read(path), 0o600)
    mode = stat.S_IMODE(about.st_mode)
    try:
        os.chown(copy, about.st_uid, about.st_gid)
    except PermissionError:
        mode &= 0o777  # it would be setuid for another user
    os.chmod(copy, mode)


def _sync(folder: str) -> None:
    """Wait until a folder's entries are on the disk: a power cut leaves those or the former ones."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _label(folder: str, like: str) -> None:
    """Give all files in a folder the SELinux label of another, where SELinux is on. Raises OSError."""
    if "selinuxfs" not in _content("/proc/filesystems").decode().split():
        return
    label = os.getxattr(like, SELINUX)
    for place, _, names in os.walk(folder):
        for path in (place, *(f"{place}/{name}" for name in names)):
            with contextlib.suppress(OSError):
                if os.getxattr(path, SELINUX) == label:
                    continue  # as each file's is that is made there, unless the policy says otherwise
            os.setxattr(path, SELINUX, label)
