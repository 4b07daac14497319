"""A machine for a real runtime: its network, its processes and the folders that it writes to end with the tests.

The runtime lives in a network, PID and mount namespace, where the folders that packages and runtimes write to are
overlays. Only /run is common to it and the tests, so that they see its network namespaces and sockets. The plugin is
installed as its documentation says.
"""
import collections
import hashlib
import io
import json
import pathlib
import shlex
import subprocess
import tarfile
import textwrap
from typing import Any, Self

from .links import bring_up
from .namespaces import HOST, br_netfilter, own_network, sysctl, wire
from .processes import ROOT, run
from .servers import exchange
from .tables import keep_conntrack, nft

VERSIONS: dict[str, list[str]] = collections.defaultdict(list)  # test module -> what its runtimes say they are
RUNTIMES = ROOT / "integration/runtimes"  # the tests
UNPACKED = RUNTIMES / "unpacked"  # by integration/runtimes/packages
PLUGINS, NEWER_PLUGINS = "/usr/lib/cni", UNPACKED / "cni-plugins/usr/lib/cni"
CLIENT_IP = {4: "203.0.113.2", 6: "2001:db8::2"}  # a machine on the LAN
HOST_IP = {4: "203.0.113.1", 6: "2001:db8::1"}  # the runtime's

# Children of a process that ignores SIGCHLD leave no zombies: an init in one line.
BOOT = """
set -e
mount -t proc proc /proc
scratch() {{
    mkdir -p {upper}/$1 {upper}/work/$1
    mount -t overlay -o lowerdir=$2,upperdir={upper}/$1,workdir={upper}/work/$1 overlay $1
}}
for folder in /etc /opt /usr/local /var/lib; do scratch $folder $folder; done
scratch /usr/lib/cni {plugins}
for folder in containers containerd; do
    mkdir -p /var/lib/$folder
    mount -t tmpfs tmpfs /var/lib/$folder
done
trap '' CHLD
echo ready
exec sleep infinity
"""


class Machine:
    """A host for one runtime, with a client on its LAN; inside the `with`, this thread's network is the machine's.

    `install`: how the plugin is installed, as shell commands; `plugins`: the folder of the distribution's others.
    """

    def __init__(self, name: str, install: str = "scripts/install", plugins: str | pathlib.Path = PLUGINS) -> None:
        self.name, self._install, self._plugins = name, install, plugins

    def _new_cgroups(self) -> list[pathlib.Path]:
        """The cgroups of runtimes' containers, which all namespaces share."""
        root = pathlib.Path("/sys/fs/cgroup")
        return [path for name in ("libpod_parent", "k8s.io") for path in (root / name, *root.glob(f"*/{name}"))
                if path.is_dir() and path not in self._cgroups]

    def __enter__(self) -> Self:
        self._cgroups: list[pathlib.Path] = []
        self._cgroups = self._new_cgroups()
        self._network = own_network()
        self._network.__enter__()
        run("mount", "--make-shared", "/run")
        bring_up("lo")
        for key, value in {"ipv4.ip_forward": 1, "ipv6.conf.all.forwarding": 1, "ipv6.conf.all.accept_dad": 0,
                           "ipv6.conf.default.accept_dad": 0}.items():
            sysctl(f"net.{key}", value)
        br_netfilter(False)
        keep_conntrack()
        boot = BOOT.format(upper=f"/run/machine/{self.name}", plugins=self._plugins)
        # What the tests' process leaves behind when it is killed, the kernel kills: unshare, its child, all in there.
        self._init = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation",
             "unchanged", "sh", "-c", boot], stdout=subprocess.PIPE, text=True)
        assert self._init.stdout and self._init.stdout.readline() == "ready\n"
        self.pid = int(pathlib.Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text())
        self.root = pathlib.Path(f"/proc/{self.pid}/root")
        self.client = wire(f"lan-{self.name}", (f"{HOST_IP[4]}/24", f"{HOST_IP[6]}/64"),
                               (f"{CLIENT_IP[4]}/24", f"{CLIENT_IP[6]}/64"), "lan")
        try:
            self.shell(self._install)
            self.prepare()
        except BaseException:  # `with` ends only what has begun
            self.__exit__()
            raise
        return self

    def prepare(self) -> None:
        """Prepare what else this machine needs; for subclasses."""

    def __exit__(self, *_: object) -> None:
        self.client.remove()
        self._init.kill()
        self._init.wait()
        for group in self._new_cgroups():
            run("find", group, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";", check=False)
        self._network.__exit__(None, None, None)

    def command(self, *words: object) -> list[str]:
        """A command, to be run in the machine."""
        return ["nsenter", "-t", str(self.pid), "-p", "-m", "--", *map(str, words)]

    def run(self, *words: object, check: bool = True, input: str | None = None) -> str:
        return run(*self.command(*words), check=check, input=input)

    def shell(self, commands: str) -> str:
        """Run what somebody has typed, in the project's folder."""
        return self.run("env", "--chdir", ROOT, "sh", "-euc", commands)

    def json(self, *words: object) -> Any:
        return json.loads(self.run(*words))

    def fails(self, *words: object) -> str:
        """The output of a command that must fail."""
        done = subprocess.run(self.command(*words), text=True, capture_output=True, timeout=60, check=False)
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

    def whom_server_sees(self, source: str, ip: str, port: int, protocol: str) -> str:
        """The address that the server behind a published port sees of `client` or `host`; "nobody" if none came."""
        saw = exchange(self.client if source == "client" else HOST, ip, port, protocol)
        return saw.peer if saw else "nobody"


def _add(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    info = tarfile.TarInfo(path)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


def shown_in(document: str, commands: str) -> bool:
    """Whether a document shows these commands, so that a reader types what a test runs."""
    return textwrap.indent(commands.strip(), "    ") in (ROOT / document).read_text()


def wrappers(folder: pathlib.Path, command: list[str]) -> pathlib.Path:
    """A folder of plugins for `Network`, each of which runs where `command` leads: ours, and the distribution's."""
    for plugin in pathlib.Path(PLUGINS).iterdir():
        path = "/opt/cni/bin/portmap" if plugin.name == "portmap" else str(plugin)
        (folder / plugin.name).write_text("\n".join(["#!/bin/sh", f"export CNI_PATH={PLUGINS}",
                                                     f"exec {shlex.join([*command, path])}", ""]))
        (folder / plugin.name).chmod(0o755)
    return folder


def flush_ruleset() -> None:
    """Flush the ruleset, as a firewall does when it restarts."""
    nft("flush", "ruleset")
    keep_conntrack()
