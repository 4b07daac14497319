"""Docker Engine, on a machine of its own."""
from typing import Self

from .namespaces import Netns
from .processes import until
from .userland import Userland


class Docker(Userland):
    """A machine with Docker Engine, and an image."""

    cgroup = "docker"

    def __enter__(self) -> Self:
        super().__enter__()
        self.begin()
        self.load("docker load -i", "localhost/image:latest", "sleep", "100000")
        return self

    def begin(self, *options: str) -> None:
        """Start dockerd, and wait until it answers."""
        self._dockerd = self.daemon("dockerd", "--storage-driver", "vfs", "--exec-opt", "native.cgroupdriver=cgroupfs",
                                    "--oom-score-adjust", "0", *options)
        assert until(lambda: self._dockerd.has_ended() or self.version(), 60) and self.version(), \
            self._dockerd.last_words()

    def end(self) -> None:
        """Stop dockerd."""
        self._dockerd.stop()

    def version(self) -> str:
        """dockerd's version, "" for none that answers."""
        return self.run("docker", "version", "--format", "{{.Server.Version}}", check=False).strip()

    def start(self, *options: str, name: str = "docker") -> Netns:
        """The network namespace of a new container."""
        self.run("docker", "run", "-d", "--name", name, *options, "localhost/image")
        path = self.run("docker", "inspect", "--format", "{{.NetworkSettings.SandboxKey}}", name).strip()
        return Netns(self.root / path.replace("/var/run/", "run/"))

    def remove(self, name: str = "docker") -> None:
        """Remove a container."""
        self.run("docker", "rm", "-f", name)
