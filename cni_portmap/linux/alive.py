"""Who lives: the one judgement, for whoever asks: list, gc, takeover, restore, CHECK.

First witness is the host-side link of the container. It goes with its peer's namespace, so its index says who lives:
the same from every mount and PID namespace, without a path that could hang or an inode number that could be used again.

Where no link is known (macvlan, host-device, records of cni-portmap 0.1), the network namespace is sought: in what
processes are in, hold open, or have mounted. That it is not found proves its end only where this process sees all of
that; otherwise it cannot be judged, and counts as alive. To look costs 0.2 s with 10,000 processes, so nobody does it
under the lock. Not looked into: mount namespaces that no process is in, and what those processes hold open that do not
let themselves be looked at.

Source: namespaces(7), proc(5), Documentation/filesystems/proc.rst (mountinfo, hidepid).
"""
import posix

from . import EINVAL, ENOENT, ESRCH

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..ruleset import Owner

    Verdict = tuple[str, str]  # ALIVE, DEAD or UNKNOWN; and why, as the end of a message

SIGKILL = 9
PATH_SECONDS = 1
ALIVE, DEAD, UNKNOWN = "alive", "dead", "unknown"
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h


def by_link(owner: "Owner", is_there: bool) -> "Verdict":
    """The verdict on an owner whose record names its host-side link."""
    name = owner.link.partition("#")[0]
    return (ALIVE, f"its interface {name} on this host is there") if is_there else \
        (DEAD, f"its interface {name} on this host is gone")


def by_namespace(owner: "Owner", sight: "Sight", leads_to: "Callable[[str], int]") -> "Verdict":
    """The verdict on an owner without a link. `leads_to`: see Kernel.namespace_soon, asked where no inode is known."""
    if not owner.netns:
        return UNKNOWN, "its network namespace is not known"
    inode = owner.inode or leads_to(owner.netns)
    if inode > 0 and (not owner.inode or f"net:[{inode}]" in sight.held):
        return ALIVE, f"its network namespace {owner.netns} is alive"
    if not inode:
        return UNKNOWN, f"whether its network namespace {owner.netns} lives cannot be judged: the path cannot be read"
    if not owner.inode and owner.netns in sight.mounted:
        return ALIVE, f"its network namespace {owner.netns} is mounted by a process that has mounts of its own"
    if sight.obstacle:
        return UNKNOWN, f"whether its network namespace {owner.netns} lives cannot be judged: {sight.obstacle}"
    return DEAD, f"its network namespace {owner.netns} is gone"


class Sight:
    """What processes hold: namespaces ("net:[4026532177]"), and the paths where some have mounted any.

    `obstacle`: why there may be more, "" where this process has seen all.
    """

    __slots__ = ("held", "mounted", "obstacle", "_examples", "_mounts", "_refused")

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.mounted: set[str] = set()
        self.obstacle = ""
        self._mounts: dict[str, bool] = {}  # mount namespace: whether all of its mounts were seen
        self._examples: dict[str, str] = {}  # network namespace: a process that is in it
        self._refused: set[str] = set()  # processes that only show their mounts
        try:
            self.obstacle = _obstacle()
            processes = [name for name in posix.listdir("/proc") if name.isdigit()]
        except OSError as error:
            self.obstacle, processes = f"/proc: {posix.strerror(error.errno or 0)}", []
        for process in processes:
            self._look_at(process)
        known = {_net_inode(process) for process in self._examples.values()} if self._refused else set()
        for process in self._refused:
            if _net_inode(process) not in known:
                self.obstacle = self.obstacle or f"{process} does not show its network namespace"
        if not self.obstacle and not all(self._mounts.values()):
            self.obstacle = "some processes have mounts of their own, and show only a part of them (chroot)"

    def _look_at(self, process: str) -> None:
        """What one process holds. One that ends meanwhile holds nothing."""
        try:
            self._look_at_namespaces(f"/proc/{process}")
            for fd in posix.listdir(f"/proc/{process}/fd"):
                try:
                    target = posix.readlink(f"/proc/{process}/fd/{fd}")
                    if target == "/":  # so it looks where the mount that it was opened by has gone
                        target = f"net:[{_inode_of(f'/proc/{process}/fdinfo/{fd}')}]"
                except FileNotFoundError:
                    continue
                if target.startswith("net:["):
                    self.held.add(target)
        except (FileNotFoundError, ProcessLookupError):
            pass
        except PermissionError:
            self._refused.add(f"/proc/{process}")
            self._look_at_mounts(f"/proc/{process}")
        except OSError as error:
            self.obstacle = self.obstacle or f"/proc/{process}: {posix.strerror(error.errno or 0)}"

    def _look_at_namespaces(self, process: str) -> None:
        try:
            network = posix.readlink(f"{process}/ns/net")
        except FileNotFoundError:  # it has ended, and may have threads that go on
            for thread in posix.listdir(f"{process}/task"):
                try:
                    self.held.add(posix.readlink(f"{process}/task/{thread}/ns/net"))
                except FileNotFoundError:
                    continue
            return
        self.held.add(network)
        self._examples[network] = process
        mounts = posix.readlink(f"{process}/ns/mnt")
        if not self._mounts.get(mounts):
            self._mounts[mounts] = posix.readlink(f"{process}/root") == "/"
            self._look_at_mounts(process)

    def _look_at_mounts(self, process: str) -> None:
        try:
            mounts = _read(f"{process}/mountinfo")
        except OSError as error:
            if error.errno not in (ENOENT, ESRCH, EINVAL):  # it has ended
                self.obstacle = self.obstacle or f"{process} does not show its mounts"
            return
        for line in mounts.splitlines():
            fields = line.split(" ")
            if fields[3].startswith("net:["):
                self.held.add(fields[3])
                self.mounted.add(_unescape(fields[4]))


def _net_inode(process: str) -> int:
    """A number that is the same for all processes in a network namespace, and that none keeps to itself; 0 for none.

    Each namespace has files of its own in /proc/PID/net (proc_create_net_data), and those have inodes.
    """
    try:
        return posix.stat(f"{process}/net/dev").st_ino
    except OSError:
        return 0


def _inode_of(fdinfo: str) -> str:
    """The inode of an open file, without asking its file system, which may hang; "" before Linux 5.14."""
    return _read(fdinfo).partition("ino:\t")[2].partition("\n")[0]


def _obstacle() -> str:
    """Why this process may not see all others, "" if it does."""
    if posix.readlink("/proc/self/ns/pid") != FIRST_PID_NAMESPACE:
        return "this process is in a PID namespace of its own, and does not see the host's processes"
    proc = [line.split(" - ")[1].split(" ") for line in _read("/proc/self/mountinfo").splitlines()
            if line.split(" ")[4] == "/proc"]
    if not proc:
        return "/proc is not a mount point here"
    options = proc[-1][-1].split(",")  # the last mount is on top
    hidden = [option for option in options if option.startswith(("hidepid=", "subset="))
              and option not in ("hidepid=0", "hidepid=off")]
    return f"/proc is mounted with {hidden[0]}" if hidden else ""


def _read(path: str) -> str:
    fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        chunks = []
        while chunk := posix.read(fd, 1 << 16):
            chunks.append(chunk)
    finally:
        posix.close(fd)
    return b"".join(chunks).decode(errors="surrogateescape")


def _unescape(path: str) -> str:
    """A path that mountinfo has written, where spaces are in octal."""
    first, *rest = path.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def judge(owners: "Iterable[Owner]", has_link: "Callable[[str], bool]", leads_to: "Callable[[str], int]") \
        -> "dict[str, Verdict]":
    """The verdict on each owner, by its chain. May take its time: never to be called under the lock."""
    sight: Sight | None = None
    verdicts = {}
    for owner in owners:
        if owner.link:
            verdicts[owner.chain] = by_link(owner, has_link(owner.link))
        else:
            sight = sight or Sight()
            verdicts[owner.chain] = by_namespace(owner, sight, leads_to)
    return verdicts


def in_a_second(ask: "Callable[[], int]") -> int:
    """What a child finds out that gets one second, 0 where it does not come back: a path may hang (NFS, FUSE)."""
    from select import select
    read, write = posix.pipe()
    pid = posix.fork()
    if not pid:
        try:
            posix.closerange(0, write)  # the lock, and the runtime's pipes, are not for a process that may stay
            posix.closerange(write + 1, 1024)
            posix.write(write, b"%d" % ask())
        finally:
            posix._exit(0)
    posix.close(write)
    answer = posix.read(read, 32) if select([read], [], [], PATH_SECONDS)[0] else b""
    posix.close(read)
    posix.kill(pid, SIGKILL)
    posix.waitpid(pid, 0 if answer else posix.WNOHANG)
    return int(answer or 0)


def until(changed: "Callable[[], bool]", seconds: float) -> float:
    """Wait until something has changed, not longer than `seconds`; the seconds that took."""
    from time import monotonic, sleep
    began, pause = monotonic(), 0.02
    while True:
        waited = monotonic() - began
        if waited >= seconds or changed():
            return waited
        sleep(min(pause, seconds - waited))
        pause = min(2 * pause, 0.16)
