"""The agent, as systemd runs it: `cni-portmap agent` in the network namespace of the thread that starts it."""
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

from .processes import until

from cni_portmap.linux import companion


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
            try:
                self.wait_for("READY=1")
            except BaseException:
                self.process.kill()  # it would work on, beside later tests
                raise

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

    def catch_up(self) -> None:
        """Return when it has heard all that was done until now, and has healed what it heals at once.

        It answers whoever asks in the turn after the one in which it hears; both may come in the same one.
        """
        for _ in range(2):
            assert until(lambda: companion.ask("status")), self.log

    def pause(self) -> None:
        """Stop it, and return when it stands still, so that it has not got the lock in the meantime."""
        self.send(signal.SIGSTOP)
        tasks = pathlib.Path(f"/proc/{self.process.pid}/task")
        assert until(lambda: all(_fields_of(task)[0] == "T" for task in tasks.iterdir()))

    @contextlib.contextmanager
    def held_at(self, path: pathlib.Path) -> Iterator[None]:
        """Whichever of its children opens a file waits there, while the block lasts."""
        words = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", path, "-e", "trace=open,openat",
                 "-e", "inject=open,openat:delay_enter=600000000", "-p", self.process.pid]  # microseconds
        tasks = pathlib.Path(f"/proc/{self.process.pid}/task")
        with subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE) as strace:
            try:
                assert until(lambda: all("TracerPid:\t0\n" not in (task / "status").read_text()
                                         for task in tasks.iterdir()))
                yield
            finally:
                strace.terminate()

    def handles(self, number: int) -> bool:
        """Whether it has a handler for a signal by now, and so is not just ended by it."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return bool(int(status.partition("SigCgt:\t")[2].split()[0], 16) >> number - 1 & 1)

    def cpu(self) -> float:
        """The seconds of CPU time that it, and its children that ended, have used."""
        fields = _fields_of(pathlib.Path(f"/proc/{self.process.pid}"))
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def comes_to_rest(self) -> bool:
        """Whether there comes a second in which it uses next to no CPU time: who waits in a loop has none."""
        def rests() -> bool:
            before = self.cpu()
            time.sleep(1)
            return self.cpu() - before < 0.1
        return until(rests)

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


def _fields_of(process: pathlib.Path) -> list[str]:
    """The fields of proc(5)'s stat, from the state on."""
    return (process / "stat").read_text().rpartition(")")[2].split()
