"""Network namespaces, and machines in them that are wired to the host."""
import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Self

from .links import add_route, add_veth, bring_up, delete_link
from .processes import libc, run, succeed
from .tables import keep_conntrack

_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SHARED = 0x1000, 0x4000, 0x40000, 0x100000
_MNT_DETACH = 2
NAMED = pathlib.Path("/run/netns")  # where namespaces have names, as `ip netns` and runtimes give them


def _mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    succeed(libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()))


def _leave_for_private_namespaces() -> None:
    succeed(libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS))
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def enter() -> None:
    """Move this process to a private network and mount namespace, and make it a host: forwarding, conntrack on."""
    _leave_for_private_namespaces()
    while not libc.umount2(b"/run", _MNT_DETACH):  # containerd takes the lowest of several for the one that counts
        pass
    _mount("tmpfs", "/run", "tmpfs", options="mode=755")
    NAMED.mkdir()
    _mount(str(NAMED), str(NAMED), "", _MS_BIND)  # shared, as `ip netns` makes it: others see what comes and goes
    _mount("none", str(NAMED), "", _MS_SHARED)
    if not os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK):
        _mount("proc", "/proc", "proc")
    _become_host()


def obstacle() -> str:
    """The reason why no lab can be made here, and the remedy; "" if it can. Tried in a process that ends."""
    if os.geteuid():
        return "a lab of network namespaces needs root: run it as root"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        reason = forbidden = "this process may not make network namespaces (CAP_SYS_ADMIN, CAP_NET_ADMIN): run it on " \
                             "a machine, or in a privileged container"
        try:
            _leave_for_private_namespaces()
            reason = "there is no veth or bridge in this kernel: boot the distribution's own, or load the modules " \
                     "(modprobe veth bridge)"
            # By command, not by pyroute2: test_scripts plays a kernel without veth with an `ip` that fails.
            run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
            run("ip", "link", "add", "bridge0", "type", "bridge")
            reason = "this kernel has no nf_tables: boot the distribution's own, or load it (modprobe nf_tables)"
            run("nft", "add", "table", "inet", "x")
            reason = ""
        except OSError:
            pass
        except AssertionError as error:
            if "not permitted" in str(error):
                reason = forbidden
        os.write(write, reason.encode())
        os._exit(0)
    os.close(write)
    with open(read) as answer:
        reason = answer.read()
    os.waitpid(pid, 0)
    return reason


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread is in a new network namespace, until the end of the block."""
    outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    succeed(libc.unshare(_CLONE_NEWNET))
    try:
        yield
    finally:
        succeed(libc.setns(outside, _CLONE_NEWNET))
        os.close(outside)


@contextlib.contextmanager
def fresh_host() -> Iterator[None]:
    """Another network namespace plays the host, for this thread, until the end of the block.

    What got a name in /run/netns in the block is removed then.
    """
    before = {*NAMED.iterdir()}
    try:
        with own_network():
            _become_host()
            yield
    finally:
        for path in {*NAMED.iterdir()} - before:
            path.rmdir() if path.is_dir() and not path.is_symlink() else delete_namespace(path.name)


def _become_host() -> None:
    _settle()
    sysctl("net.ipv4.ip_forward", 1)
    sysctl("net.ipv6.conf.all.forwarding", 1)
    br_netfilter(False)
    keep_conntrack()


def _settle() -> None:
    """Loopback up; addresses usable at once."""
    bring_up("lo")
    for which in "all", "default":
        sysctl(f"net.ipv6.conf.{which}.accept_dad", 0)
        sysctl(f"net.ipv6.conf.{which}.accept_ra", 0)


def sysctl(name: str, value: object) -> None:
    """Set a sysctl."""
    pathlib.Path("/proc/sys", name.replace(".", "/")).write_text(str(value))


def br_netfilter(on: bool) -> bool:
    """Whether this namespace's bridges hand their packets to nftables; False if the kernel cannot (no module)."""
    if pathlib.Path("/proc/sys/net/bridge").exists():
        for family in "ip", "ip6":
            sysctl(f"net.bridge.bridge-nf-call-{family}tables", int(on))
        return True
    return not on


class Netns:
    """The network namespace at a path, made by anybody."""

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = str(path)
        self._outside = threading.local()  # threads enter side by side

    def __enter__(self) -> Self:
        """This thread's sockets, sysctls and children are the namespace's, until the end of the block."""
        self._outside.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        inside = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        succeed(libc.setns(inside, _CLONE_NEWNET))
        os.close(inside)
        return self

    def __exit__(self, *_: object) -> None:
        succeed(libc.setns(self._outside.fd, _CLONE_NEWNET))
        os.close(self._outside.fd)


class Namespace(Netns):
    """A new network namespace with a name under /run/netns, as runtimes make them."""

    def __init__(self, name: str) -> None:
        super().__init__(NAMED / name)
        self.name = name
        self.host_device = ""  # the host's end of its wire, see `wire`
        make_namespace(self.path)
        with self:
            _settle()

    def remove(self) -> None:
        """Delete it, if it is still there."""
        if self.host_device:  # the kernel takes its time to end a namespace with what is in it
            delete_link(self.host_device)
        delete_namespace(self.name, missing_ok=True)


# Made and deleted here, and not by pyroute2, whose netns.create forks this process with its threads.

def make_namespace(path: str) -> None:
    """Make a network namespace at a path where there is nothing yet."""
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    with own_network():
        _mount("/proc/thread-self/ns/net", path, "", _MS_BIND)


_making = threading.Lock()


def ensure_namespace(path: str) -> None:
    """Make a network namespace where a path under /run/netns says so, if there is nothing."""
    with _making:
        if path.startswith(f"{NAMED}/") and not os.path.lexists(path):
            make_namespace(path)


def delete_namespace(name: str, missing_ok: bool = False) -> None:
    """Delete what has a name in /run/netns, whether a namespace is mounted there or not."""
    path = NAMED / name
    libc.umount2(str(path).encode(), _MNT_DETACH)
    path.unlink(missing_ok)


HOST: contextlib.AbstractContextManager[object] = contextlib.nullcontext()  # the namespace that plays the host


def wire(name: str, host_ips: tuple[str, ...], their_ips: tuple[str, ...], device: str = "") -> Namespace:
    """A machine on a link of its own with the host; its default route leads through the host."""
    other, device = Namespace(name), device or f"to-{name}"
    other.host_device = device
    add_veth(device, "eth0", other.path)
    bring_up(device, *host_ips)
    with other:
        bring_up("eth0", *their_ips)
        for ip in host_ips:
            add_route("default", ip.partition("/")[0])
    return other
