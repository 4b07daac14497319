"""The agent, as systemd runs it: `cni-portmap agent` in the network namespace of the thread that starts it."""
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import tempfile

from .processes import until


class Agent:
    """An agent that is ready. `cli`: the command; `within`: a command line that runs it.

    `cache`: libcni's results folder; without, an empty one.
    """

    def __init__(self, cli: pathlib.Path, *options: object, within: tuple[object, ...] = (),
                 cache: pathlib.Path | None = None, ready: bool = True) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._folder.name)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify = str(folder / "notify")
        self._notify.bind(self.notify)
        self._notify.settimeout(0.1)
        self.cache = cache or folder / "results"
        self.cache.mkdir(exist_ok=True)
        self._log = folder / "log"
        words = [*within, cli, "agent", "--cache", self.cache, *options]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([str(word) for word in words], stderr=log,
                                            env={**os.environ, "NOTIFY_SOCKET": self.notify})
        self.told = ""
        if ready:
            self.wait_for("READY=1")

    def wait_for(self, line: str, seconds: float = 60) -> None:
        """Wait until it tells systemd so."""
        def is_told() -> bool:
            with contextlib.suppress(TimeoutError):
                self.told += self._notify.recv(4096).decode() + "\n"
            return line in self.told or self.process.poll() is not None
        assert until(is_told, seconds) and line in self.told, f"{line} does not come: {self.told}{self.log}"
        self.told = ""

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    def logs(self, words: str, seconds: float = 30) -> bool:
        """Whether it logs that in time."""
        return until(lambda: words in self.log, seconds)

    def send(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def cpu(self) -> float:
        """The seconds of CPU time that it, and its children that ended, have used."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def rss(self) -> int:
        """Its resident memory, in bytes."""
        return int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def children(self) -> list[str]:
        """The process IDs of its children, as it has them for what takes long."""
        pid = self.process.pid
        return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)

    def __enter__(self) -> "Agent":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            status = self.stop()
            log = self.log
            assert not any(words in log for words in ("Traceback", "internal", "please report it")), log
            assert status in (0, -signal.SIGKILL), (status, log)
        finally:
            self.process.kill()
            self.process.wait()
            self._notify.close()
            self._folder.cleanup()


