"""The files and processes of a machine of its own: what packages bring is added, and what programs write ends with it.

A PID and mount namespace, where the folders that packages and programs write to are overlays. Its network is that of
the thread that makes it and runs commands in it. Only /run is common to it and the tests, so that they see its network
namespaces and sockets. Sysctls of the whole machine (kernel, vm, fs) are copies there: some daemons write them.
"""
import hashlib
import io
import json
import pathlib
import shlex
import subprocess
import tarfile
import textwrap
from typing import Any, Self

from .processes import ROOT, run, until

RUNTIMES = ROOT / "integration/runtimes"  # the tests of real programs
UNPACKED = RUNTIMES / "unpacked"  # by integration/runtimes/packages
PLUGINS, NEWER_PLUGINS = "/usr/lib/cni", UNPACKED / "cni-plugins/usr/lib/cni"

# Children of a process that ignores SIGCHLD leave no zombies: an init in one line.
BOOT = """
set -e
mount -t proc proc /proc
scratch() {{
    mkdir -p {upper}/$1 {upper}/work/$1
    mount -t overlay -o lowerdir=$2,upperdir={upper}/$1,workdir={upper}/work/$1 overlay $1
}}
{packages}
for folder in /etc /opt /usr/local /var/lib; do scratch $folder $folder; done
scratch /usr/lib/cni {plugins}
for folder in containers containerd docker; do
    mkdir -p /var/lib/$folder
    mount -t tmpfs tmpfs /var/lib/$folder
done
mkdir -p {upper}/proc
mount -t proc proc {upper}/proc  # one that hides nothing: else the kernel gives ordinary users' containers none
for folder in kernel vm fs; do
    mkdir -p {upper}/sysctl
    cp -r /proc/sys/$folder {upper}/sysctl 2>/dev/null || true  # some may not be read
    mount --bind {upper}/sysctl/$folder /proc/sys/$folder
done
trap '' CHLD
echo ready
exec sleep infinity
"""


class Userland:
    """A context manager; `packages`: the names of unpacked ones, whose files are added to the distribution's own.

    `plugins`: the folder of the distribution's CNI plugins.
    """

    cgroup = ""  # the cgroup of its containers. Tests of classes that have one run one after the other (conftest.py)

    def __init__(self, name: str, *packages: str, plugins: str | pathlib.Path = PLUGINS) -> None:
        self.name, self._packages, self._plugins = name, packages, plugins

    def _all_cgroups(self) -> list[pathlib.Path]:
        """The cgroups of that name, which all namespaces share."""
        root = pathlib.Path("/sys/fs/cgroup")
        return [path for path in (root / self.cgroup, *root.glob(f"*/{self.cgroup}")) if self.cgroup and path.is_dir()]

    def _remove_cgroups(self) -> bool:
        """Remove those of its containers; whether none is left. One stays as long as a process in it is ending."""
        left = [path for path in self._all_cgroups() if path not in self._others_cgroups]
        for path in left:
            run("find", path, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";", check=False)
        return not any(path.is_dir() for path in left)

    def __enter__(self) -> Self:
        # Where nothing is in it, a machine has left it that was killed.
        self._others_cgroups = [path for path in self._all_cgroups()
                                if any(each.read_text() for each in path.glob("**/cgroup.procs"))]
        upper = f"/run/machine/{self.name}"
        layers = [f"scratch /{folder} {UNPACKED / package / folder}:/{folder}" for package in self._packages
                  for folder in ("usr", "etc") if (UNPACKED / package / folder).is_dir()]
        boot = BOOT.format(upper=upper, plugins=self._plugins, packages="\n".join(layers))
        # What the tests' process leaves behind when it is killed, the kernel kills: unshare, its child, all in there.
        self._init = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation",
             "unchanged", "sh", "-c", boot], stdout=subprocess.PIPE, text=True)
        assert self._init.stdout and self._init.stdout.readline() == "ready\n"
        self.pid = int(pathlib.Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text())
        self.root = pathlib.Path(f"/proc/{self.pid}/root")
        return self

    def __exit__(self, *_: object) -> None:
        self._init.kill()
        self._init.wait()
        until(self._remove_cgroups, 10)

    def command(self, *words: object) -> list[str]:
        """A command, to be run in the machine."""
        return ["nsenter", "-t", str(self.pid), "-p", "-m", "--", *map(str, words)]

    def run(self, *words: object, check: bool = True, input: str | None = None, timeout: float = 300) -> str:
        return run(*self.command(*words), check=check, input=input, timeout=timeout)

    def shell(self, commands: str) -> str:
        """Run what somebody has typed, in the project's folder."""
        return self.run("env", "--chdir", ROOT, "sh", "-euc", commands)

    def json(self, *words: object) -> Any:
        return json.loads(self.run(*words))

    def fails(self, *words: object) -> str:
        """The output of a command that must fail."""
        done = subprocess.run(self.command(*words), text=True, capture_output=True, timeout=300, check=False)
        assert done.returncode, f"{words} succeeded: {done.stdout}"
        return done.stdout + done.stderr

    def write(self, path: str, text: str | bytes) -> None:
        """Write a file of the machine."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode() if isinstance(text, str) else text)

    def load(self, command: str, name: str, *cmd: str) -> None:
        """Give a runtime's `command` that loads an archive an image: busybox, which runs `cmd`."""
        layer, archive = io.BytesIO(), io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            tar.add("/usr/bin/busybox", "bin/busybox")
            _add(tar, "index.html", b"hello\n")
        architecture = run("dpkg", "--print-architecture").strip()
        parts = {
            "layer.tar": layer.getvalue(),
            "config.json": json.dumps({
                "architecture": architecture, "os": "linux", "config": {"Cmd": ["/bin/busybox", *cmd]},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
            }).encode(),
            "manifest.json": json.dumps([{"Config": "config.json", "Layers": ["layer.tar"],
                                          "RepoTags": [name]}]).encode(),
        }
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path, content in parts.items():
                _add(tar, path, content)
        self.write("/opt/image.tar", archive.getvalue())
        self.run(*command.split(), "/opt/image.tar")

    def daemon(self, *words: object, path: str | pathlib.Path = "") -> "Daemon":
        """Start a program that goes on. `path`: a folder where it finds others first."""
        return Daemon(self, words, path)


class Daemon:
    """A program of a machine, under way; `log` has what it says."""

    def __init__(self, machine: Userland, words: tuple[object, ...], path: str | pathlib.Path) -> None:
        name = pathlib.Path(str(words[0])).name
        self._machine, self._pid_file = machine, f"/run/machine/{machine.name}/{name}.pid"
        self.log = pathlib.Path(f"/run/machine/{machine.name}/{name}.log")
        command = f"{f'PATH={path}:$PATH; ' * bool(path)}echo $$ >{self._pid_file}; exec {shlex.join(map(str, words))}"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(machine.command("sh", "-c", command), stdout=log, stderr=log,
                                             stdin=subprocess.DEVNULL)

    def stop(self, signal: str = "TERM") -> None:
        self._machine.run("sh", "-c", f"kill -{signal} $(cat {self._pid_file})")
        self._process.wait(timeout=300)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def last_words(self) -> str:
        return self.log.read_text()[-3000:]


def _add(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    info = tarfile.TarInfo(path)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


def says(document: str, *sentences: str) -> bool:
    """Whether a document has these sentences, however it breaks lines, so that what a test has seen is what it says."""
    text = " ".join((ROOT / document).read_text().split())
    return all(sentence in text for sentence in sentences)


def shown_in(document: str, commands: str) -> bool:
    """Whether a document shows these commands, so that a reader types what a test runs."""
    return textwrap.indent(commands.strip(), "    ") in (ROOT / document).read_text()
