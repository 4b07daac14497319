"""The one judgement whether an owner is alive, for list, gc, takeover, restore and CHECK.

The host-side link of the container decides first. The kernel deletes it with its peer's namespace, so it says the same
in every mount and PID namespace, without a path that could hang. Its index may be used again (a link that is moved to
this namespace keeps its own), so an index under another name decides nothing.

If no link is known (macvlan, host-device, records of cni-portmap 0.1), the network namespace is searched for among
those that processes use, hold open, or have mounted. If it is not found, the owner is dead only if this process sees
all of those; otherwise the owner is unknown, and counts as alive. The search takes 0.2 s with 10,000 processes, so it
is never made under the lock. Not searched: mount namespaces without a process; mounts outside of the root of processes
in another user namespace; and the open files of processes that cannot be inspected.

Source: namespaces(7), proc(5), Documentation/filesystems/proc.rst (mountinfo, hidepid).
"""
import posix

from . import EINVAL, ENAMETOOLONG, ENOENT, ESRCH

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..ruleset import Owner

    Verdict = tuple[str, str]  # ALIVE, DEAD or UNKNOWN; and why, as the end of a message

SIGKILL = 9
PATH_SECONDS = 1
ROUNDS = 100  # to look at processes that have just begun
ALIVE, DEAD, UNKNOWN = "alive", "dead", "unknown"
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h


def by_link(owner: "Owner", is_there: bool) -> "Verdict":
    """The verdict on an owner whose record names its host-side link."""
    name = owner.link.partition("#")[0]
    return (ALIVE, f"its interface {name} on this host exists") if is_there else \
        (DEAD, f"its interface {name} on this host is gone")


def by_namespace(owner: "Owner", sight: "Sight", leads_to: "Callable[[str], int]") -> "Verdict":
    """The verdict on an owner without a link. `leads_to`: see Kernel.namespace_soon, asked where no inode is known."""
    if not owner.netns:
        return UNKNOWN, "its network namespace is not known"
    inode = owner.inode or leads_to(owner.netns)
    if inode > 0 and (not owner.inode or f"net:[{inode}]" in sight.held):
        return ALIVE, f"its network namespace {owner.path} is alive"
    if not inode:
        return UNKNOWN, f"cannot tell whether its network namespace {owner.path} is alive: the path cannot be read"
    if not owner.inode and owner.netns in sight.mounted:
        return ALIVE, f"its network namespace {owner.path} is mounted in another mount namespace"
    if sight.obstacle:
        return UNKNOWN, f"cannot tell whether its network namespace {owner.path} is alive: {sight.obstacle}"
    return DEAD, f"its network namespace {owner.path} is gone"


class Sight:
    """The namespaces that processes hold ("net:[4026532177]"), and the paths where some are mounted.

    `obstacle`: why there may be more, "" if this process has seen all.
    """

    __slots__ = ("held", "mounted", "obstacle", "_examples", "_mounts", "_refused", "_users")

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.mounted: set[str] = set()
        self.obstacle = ""
        self._mounts: dict[str, bool] = {}  # mount namespace: whether all of its mounts were seen
        self._examples: dict[str, str] = {}  # network namespace: a process that is in it
        self._refused: set[str] = set()  # processes that only show their mounts
        try:
            self._users = posix.readlink("/proc/self/ns/user")
            self.obstacle = _obstacle()
            self._look_at_all()
        except OSError as error:
            self.obstacle = f"/proc: {posix.strerror(error.errno or 0)}"
        known = {_net_inode(process) for process in self._examples.values()} if self._refused else set()
        for process in self._refused:
            if _net_inode(process) not in known:
                self.obstacle = self.obstacle or f"{process} does not show its network namespace to this user"
        if not self.obstacle and not all(self._mounts.values()):
            self.obstacle = "some processes show only a part of their mounts (chroot)"

    def _look_at_all(self) -> None:
        """Look until none has ended before it was looked at: a child that began since may hold what that held."""
        seen: set[str] = set()
        for _ in range(ROUNDS):
            new = {name for name in posix.listdir("/proc") if name.isdigit()} - seen
            seen |= new
            if len(new) == sum(map(self._look_at, new)):
                return
        self.obstacle = self.obstacle or "processes end faster than they can be inspected"

    def _look_at(self, process: str) -> bool:
        """Record what one process holds; False if it has ended."""
        try:
            self._look_at_namespaces(f"/proc/{process}")
            for fd in posix.listdir(f"/proc/{process}/fd"):
                try:
                    target = posix.readlink(f"/proc/{process}/fd/{fd}")
                    if target == "/":  # so it looks where the mount that it was opened by has gone
                        target = f"net:[{_inode_of(f'/proc/{process}/fdinfo/{fd}')}]"
                except OSError as error:
                    if error.errno not in (ENOENT, ENAMETOOLONG):  # no namespace has a name that long
                        raise
                    continue
                if target.startswith("net:["):
                    self.held.add(target)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:
            self._refused.add(f"/proc/{process}")
            return self._look_at_mounts(f"/proc/{process}")
        except OSError as error:
            self.obstacle = self.obstacle or f"/proc/{process}: {posix.strerror(error.errno or 0)}"
        return True

    def _look_at_namespaces(self, process: str) -> None:
        for thread in posix.listdir(f"{process}/task"):  # each may be in another, and the first may have ended
            try:
                self.held.add(posix.readlink(f"{process}/task/{thread}/ns/net"))
            except FileNotFoundError:
                continue
        network = posix.readlink(f"{process}/ns/net")
        self._examples[network] = process
        mounts = posix.readlink(f"{process}/ns/mnt")
        if not self._mounts.get(mounts):
            ours = posix.readlink(f"{process}/ns/user") == self._users  # others can mount what they like, and hide it
            whole = not ours or posix.readlink(f"{process}/root") == "/"
            if not self._look_at_mounts(process, ours):
                raise ProcessLookupError  # the next process there shows them
            self._mounts[mounts] = whole

    def _look_at_mounts(self, process: str, has_paths: bool = True) -> bool:
        """Record the namespaces mounted there; `has_paths`: and their paths. False if the process has ended."""
        try:
            mounts = _read(f"{process}/mountinfo")
        except OSError as error:
            if error.errno in (ENOENT, ESRCH, EINVAL):
                return False
            self.obstacle = self.obstacle or f"{process} does not show its mounts"
            return True
        for line in mounts.split("\n"):  # and at nothing else that Python takes for the end of a line
            fields = line.split(" ")
            if len(fields) > 4 and fields[3].startswith("net:["):
                self.held.add(fields[3])
                if has_paths:
                    self.mounted.add(_unescape(fields[4]))
        return True


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
    """The reason why this process may not see all others; "" if it sees them."""
    if posix.readlink("/proc/self/ns/pid") != FIRST_PID_NAMESPACE:
        return "this process is in another PID namespace, and does not see the host's processes"
    lines = _read("/proc/self/mountinfo").split("\n")
    proc = [line.split(" - ")[1].split(" ") for line in lines if line.split(" ")[4:5] == ["/proc"]]
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


def judge(owners: "Iterable[Owner]", has_link: "Callable[[str], bool | None]", leads_to: "Callable[[str], int]") \
        -> "dict[str, Verdict]":
    """The verdict on each owner, by its chain. May take its time: never to be called under the lock.

    `has_link`, `leads_to`: see Kernel.has_link and Kernel.namespace_soon.
    """
    sight: Sight | None = None
    verdicts = {}
    for owner in owners:
        is_there = has_link(owner.link) if owner.link else None
        if is_there is not None:
            verdicts[owner.chain] = by_link(owner, is_there)
        else:
            sight = sight or Sight()
            verdicts[owner.chain] = by_namespace(owner, sight, leads_to)
    return verdicts


def in_a_second(ask: "Callable[[], int]") -> int | None:
    """The answer of a child, None if after a second it waits for something: a path may hang (NFS, FUSE).

    One that is still ready to run only lacks a processor: on a busy host it gets another second, and another.
    """
    from select import select
    read, write = posix.pipe()
    try:
        pid = posix.fork()
    except OSError:  # too many processes
        posix.close(read)
        posix.close(write)
        return None
    if not pid:
        try:
            posix.closerange(0, write)  # the lock, and the runtime's pipes, are not for a process that may stay
            posix.closerange(write + 1, 1024)
            posix.write(write, b"%d" % ask())
        finally:
            posix._exit(0)
    posix.close(write)
    while not (ready := select([read], [], [], PATH_SECONDS)[0]) and not _waits(pid):
        pass
    answer = posix.read(read, 32) if ready else b""
    posix.close(read)
    posix.kill(pid, SIGKILL)
    posix.waitpid(pid, 0 if answer else posix.WNOHANG)
    return int(answer) if answer else None


def _waits(pid: int) -> bool:
    """Whether a child neither runs, or is ready to, nor has ended just now. Source: proc(5), /proc/pid/stat."""
    try:
        return _read(f"/proc/{pid}/stat").rpartition(")")[2][:2] not in (" R", " Z")
    except OSError:  # no /proc
        return True


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
