"""podman with its CNI backend: as root, and as an ordinary user."""
import subprocess

from .machine import CLIENT_IP, HOST_IP, Machine
from .namespaces import Netns
from .servers import PATIENT, Saw, Server, exchange

INSTALL = "scripts/install --bin-dir /usr/local/lib/cni"
CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[network]
network_backend = "cni"
"""


class Podman(Machine):
    """A machine with podman, images without a registry, and two networks, of which `dual` is dual-stack."""

    cgroup = "libpod_parent"
    as_user: tuple[object, ...] = ()  # the words before a command of the user who runs podman

    def __init__(self, name: str = "podman", install: str = INSTALL) -> None:
        super().__init__(name, install)

    def prepare(self) -> None:
        self.write("/etc/containers/containers.conf", CONF)
        load = " ".join(map(str, (*self.as_user, "podman load -i")))
        self.load(load, "localhost/image:latest", "sleep", "100000")
        self.load(load, "localhost/hello:latest", "httpd", "-f", "-p", "80")
        self.podman("network", "create", "--ipv6", "dual")
        self.podman("network", "create", "other")

    def podman(self, *words: object) -> str:
        return self.run(*self.as_user, "podman", *words).strip()

    def start(self, *options: str, name: str = "web", network: str = "dual") -> str:
        return self.podman("run", "-d", "--name", name, "--network", network, *options, "image")

    def refuses(self, *options: str, network: str = "dual") -> str:
        """The words with which a container is refused."""
        return self.fails(*self.as_user, "podman", "run", "-d", "--network", network, *options, "image")

    def inside(self, name: str = "web") -> Netns:
        return Netns(self.podman("inspect", "--format", "{{.NetworkSettings.SandboxKey}}", name))

    def answers(self, port: int = 8080, families: tuple[int, ...] = (4, 6), name: str = "web",
                timeout: float = PATIENT) -> bool:
        """Whether a container's server answers on the host's addresses, and sees the client's own."""
        with Server(name, self.inside(name), 80):
            return [exchange(self.client, HOST_IP[family], port, timeout=timeout) for family in families] == \
                [Saw(name, CLIENT_IP[family], 80) for family in families]


class RootlessPodman(Podman):
    """The same for an ordinary user, whose containers are in a network of the user's own."""

    UID = 4242
    as_user = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "env", "-i", "--chdir=/opt/user",
               "HOME=/opt/user", f"XDG_RUNTIME_DIR=/run/user/{UID}",
               "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")

    def prepare(self) -> None:
        self.write("/etc/passwd", f"root:x:0:0::/root:/bin/sh\nuser:x:{self.UID}:{self.UID}::/opt/user:/bin/sh\n")
        for name in "subuid", "subgid":
            self.write(f"/etc/{name}", "user:100000:65536\n")
        for folder in "/opt/user", f"/run/user/{self.UID}":
            self.run("install", "-d", "-o", self.UID, "-g", self.UID, folder)
        # Everybody may use it, as udev has it.
        self.run("sh", "-euc", "mknod -m 666 /run/machine/tun c 10 200; mkdir -p /dev/net; touch -a /dev/net/tun; "
                               "mount --bind /run/machine/tun /dev/net/tun")
        super().prepare()

    @staticmethod
    def _within(*words: object) -> tuple[object, ...]:
        return "podman", "unshare", "--rootless-netns", *words

    def within(self, *words: object) -> str:
        """Run a command in the network of the user's containers."""
        return self.run(*self.as_user, *self._within(*words))

    def network(self) -> Netns:
        """The network of the user's containers, which podman makes for the first and removes with the last of them."""
        words = self._within("sh", "-c", "echo $$; exec sleep 10000")  # until the machine ends
        holder = subprocess.Popen(self.command(*self.as_user, *words), stdout=subprocess.PIPE, text=True)
        assert holder.stdout
        return self._netns_of(holder.stdout.readline().strip())

    def inside(self, name: str = "web") -> Netns:
        return self._netns_of(self.podman("inspect", "--format", "{{.State.Pid}}", name))

    def _netns_of(self, pid: str) -> Netns:
        return Netns(self.root / "proc" / pid / "ns/net")
