"""This host's kernel, as the verbs see it: what is read, what is written, and the lock between the two."""
import posix
from _socket import (AF_UNIX, IPPROTO_IPV6, IPPROTO_SCTP, IPV6_V6ONLY, SCM_RIGHTS, SO_REUSEADDR, SOCK_DGRAM,
                     SOCK_STREAM, SOL_SOCKET, if_indextoname, if_nametoindex, socket, socketpair)
from _struct import pack

from .. import ruleset
from ..attachment import AF
from ..cni import IO_FAILURE, NFT_REFUSED, TRY_AGAIN_LATER, CniError, is_ifname, warn
from . import (EACCES, EADDRINUSE, EAFNOSUPPORT, EHOSTUNREACH, EINVAL, ENETUNREACH, ENODEV, ENOENT, ENOTDIR, ENXIO,
               EOPNOTSUPP, EPERM, ERESTART, HINTS, read, system_error)
from .table import Table

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from ..ruleset import Element, Owner
    from .alive import Verdict
    from .conntrack import Filter, Flow
    from .libnftables import Libnftables

LOCK = "/run/cni-portmap.lock"
LOCK_SECONDS = 30  # 200 plugins at once need less than one
HUNG_PATHS = 3
LOCALHOST_METRIC = 4096  # after the host's own route for ::1, which has 0
CLONE_NEWNET = 0x40000000
NO_ROUTE = (ENXIO, ENODEV, EACCES, EINVAL, EOPNOTSUPP, EAFNOSUPPORT, ENETUNREACH, EHOSTUNREACH)


class Lock:
    """One plugin process at a time between reading the ruleset and writing it.

    A file lock, so the kernel releases it when its holder dies. The file is root's own: nobody else can open it,
    and so cannot hold it.
    """

    def __enter__(self) -> bool:
        """Whether another had it, so that there was a wait."""
        import _signal
        import fcntl

        def too_late(*_: object) -> None:
            raise CniError(TRY_AGAIN_LATER, f"timed out after {LOCK_SECONDS} s waiting for {LOCK}",
                           f"see who holds it: fuser -v {LOCK}")
        waited = False
        try:
            while True:
                self._fd = posix.open(LOCK, posix.O_RDWR | posix.O_CREAT | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600)
                status = posix.fstat(self._fd)
                if status.st_uid != posix.geteuid() or status.st_mode & 0o77:
                    raise CniError(IO_FAILURE, f"{LOCK} is accessible to other users", f"remove it: rm {LOCK}")
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waited = True
                    before = _signal.signal(_signal.SIGALRM, too_late)
                    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGALRM])  # a runtime may have blocked it
                    _signal.setitimer(_signal.ITIMER_REAL, LOCK_SECONDS)
                    try:
                        fcntl.flock(self._fd, fcntl.LOCK_EX)
                    finally:
                        _signal.setitimer(_signal.ITIMER_REAL, 0)
                        _signal.signal(_signal.SIGALRM, before)
                try:
                    if posix.stat(LOCK).st_ino == status.st_ino:
                        return waited
                except FileNotFoundError:
                    pass
                posix.close(self._fd)  # removed while we waited: lock the one that others will find
        except OSError as error:
            raise system_error(f"cannot lock {LOCK}", error) from None

    def __exit__(self, kind: "type[BaseException] | None", error: BaseException | None,
                 traceback: "TracebackType | None") -> None:
        posix.close(self._fd)


class Kernel(Table):
    """Our table, and what surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self._nft: Libnftables | None = None
        self._empty: Kernel | None = None
        self._hung = 0  # paths
        self._local: set[bytes] | None = None

    # --- who lives ---

    def link(self, names: "Sequence[str]") -> str:
        """The host's end of a container's link, as name#index, among these interfaces; "" for none.

        It goes with its other end, so with the container's network namespace; a bridge does not, nor does a tap.
        """
        from .netlink import paired_link
        try:
            name, index = paired_link(names)
        except OSError as error:
            raise system_error("cannot read the links of this host", error) from None
        return f"{name}#{index}" if name else ""

    def has_link(self, link: str) -> bool | None:
        """Whether the link is there that was name#index; None where another name has that index.

        That is the same link, which somebody renamed, or another one: an index may be used again. Raises CniError(5)
        where that cannot be asked.
        """
        name, _, index = link.rpartition("#")
        found = self._link_of(int(index))
        return False if found is None else True if found[0] == name else None

    def has_address(self, link: str, address: str) -> bool:
        """Whether a link, name#index, has this hardware address ("02:00:00:00:00:01")."""
        found = self._link_of(int(link.rpartition("#")[2]))
        return found is not None and found[1].hex() == address.replace(":", "").lower()

    def _link_of(self, index: int) -> tuple[str, bytes] | None:
        if not 0 < index < 1 << 31:
            return None
        from .netlink import link_of
        try:
            return link_of(index)
        except OSError as error:
            raise system_error("cannot read the links of this host", error) from None

    def has_interface(self, name: str) -> bool:
        """Whether there is an interface of that name."""
        return _is_interface(name)

    def namespace(self, path: str) -> int:
        """The inode of the network namespace that `path` leads to; -1 for none, 0 where that cannot be known.

        A path may hang (NFS, FUSE), so it is not asked under the lock.
        """
        try:
            found, own = posix.stat(path), posix.stat("/proc/self/ns/net")
        except OSError as error:
            return -1 if error.errno in (ENOENT, ENOTDIR) else 0
        except ValueError:  # no path at all
            return -1
        return found.st_ino if found.st_dev == own.st_dev else -1  # a file that is left where it was mounted

    def namespace_soon(self, path: str) -> int:
        """`namespace`, asked by a child that gets one second; 0 where it does not come back.

        After some that do not nothing is asked any more: all may be on one file server.
        """
        from .alive import in_a_second
        found = in_a_second(lambda: self.namespace(path)) if self._hung < HUNG_PATHS else None
        self._hung += found is None
        return found or 0

    def glance(self, owner: "Owner") -> "Verdict | None":
        """The verdict on an owner by its link alone; None if that does not decide. It cannot hang."""
        if not owner.link:
            return None
        is_there = self.has_link(owner.link)
        if is_there is None:
            return None
        from .alive import by_link
        return by_link(owner, is_there)

    def judge(self, owners: "Iterable[Owner]") -> "dict[str, Verdict]":
        """The verdict on each owner, by its chain. It takes long, so it is not called under the lock."""
        from .alive import judge
        return judge(owners, self.has_link, self.namespace_soon)

    def wait_for(self, owner: "Owner", handle: int, seconds: float) -> float:
        """Wait until an owner's chain, which has this handle, has changed or its link has gone; the seconds that took.

        Not longer than `seconds`, and never under the lock.
        """
        from .alive import until
        return until(lambda: self.handle(owner.chain) != handle or
                     bool(owner.link and self.has_link(owner.link) is False), seconds)

    # --- writing ---

    def lock(self) -> Lock:
        """The lock to hold between reading and writing."""
        return Lock()

    def transact(self, text: str) -> None:
        """Run nft commands, a line each, as one transaction: all of them or none."""
        problem = self._libnftables().run(text)
        if problem:
            raise self._refused(problem)

    def remove(self, generation: int, chains: "Iterable[str]", elements: "Iterable[Element]",
               inherited: "Mapping[Element, str]", notes: "Iterable[tuple[str, str]]",
               interfaces: "Iterable[str]") -> bool:
        """Remove attachments' `chains`, map `elements`, and the notes of `interfaces` (names), as one transaction.

        In it, too: what is `inherited` leads to other chains from then on, and `notes` (chain, interface) are made of
        who stands by there. False, and nothing is written, where the ruleset is not that of `generation` (0: whichever)
        any more, or something of it is gone.
        """
        from .batch import removal, send
        self._kept = None
        try:
            code, command = send(self._netlink(), removal(generation, chains, elements, inherited, notes, interfaces))
        except OSError as error:
            raise system_error("cannot write nf_tables", error) from None
        if code not in (0, ERESTART, ENOENT):
            raise self._refused(f"{posix.strerror(code)}, in: {command}")
        return not code

    def _refused(self, problem: str) -> CniError:
        hint = "no changes were made"
        if "Operation not permitted" in problem:
            hint = f"table {ruleset.TABLE} belongs to another program (flags owner)" if self.is_owned() else \
                HINTS[EPERM]
        elif "Message too long" in problem:
            hint = "too many ports with another number for this system; publish them under their own, or raise " \
                "net.core.wmem_max"
        return CniError(NFT_REFUSED, f"nftables rejected the transaction: {problem}", hint)

    def dry_run(self, text: str) -> str:
        """The reason nft or the kernel would reject the commands, "" for none. Writes nothing."""
        return self._libnftables().run(text, dry=True)

    def dry_run_apart(self, text: str) -> str:
        """`dry_run` of words that somebody else wrote, by a child: on some of them libnftables aborts the process."""
        nft = self._libnftables()
        read_end, write_end = posix.pipe()
        try:
            pid = posix.fork()
        except OSError as error:
            raise system_error("cannot fork to try the conditions", error) from None
        if not pid:
            try:
                posix.dup2(2, 1)  # the answer to the runtime is the parent's
                posix.write(write_end, nft.run(text, dry=True).encode(errors="replace")[:4096])
                posix._exit(0)
            finally:
                posix._exit(1)
        posix.close(write_end)
        problem = b""
        while chunk := posix.read(read_end, 4096):
            problem += chunk
        posix.close(read_end)
        _, status = posix.waitpid(pid, 0)
        return problem.decode(errors="replace") if not status else "libnftables aborted on this text; see stderr"

    def _libnftables(self) -> "Libnftables":
        if self._nft is None:
            from .libnftables import Libnftables
            self._nft = Libnftables()
        return self._nft

    def enter_empty_namespace(self) -> "Kernel":
        """Move this process to a new, empty network namespace, to write there what should be and look at it."""
        from .libnftables import import_lightly
        ctypes = import_lightly("ctypes")
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise system_error("cannot create a network namespace for the comparison", OSError(ctypes.get_errno(), ""))
        self._empty = Kernel()  # kept, see `leave`
        return self._empty

    # --- what surrounds the rules ---

    def port_in_use(self, family: int, protocol: str, host_ip: str, host_port: int) -> bool:
        """Whether a process of this host uses the port, by bind(2)'s own judgement."""
        kind = SOCK_DGRAM if protocol == "udp" else SOCK_STREAM
        try:
            probe = socket(AF[family], kind, IPPROTO_SCTP if protocol == "sctp" else 0)
        except OSError:
            return False  # no IPv6, or no SCTP: nobody can listen there
        try:
            if family == 6:
                probe.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 1)
            if protocol != "udp":
                probe.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)  # connections that end are not listeners
            probe.bind((host_ip, host_port))
        except OSError as error:
            return error.errno == EADDRINUSE
        finally:
            probe.close()
        return False

    def way_to(self, family: int, ip: str, links: "Sequence[str]") -> tuple[str, bool, list[str]]:
        """The interface of this host that a container's address is directly behind, and the networks of that interface.

        "" where there is none. And whether it leads to containers: it is one that the container's result names
        (`links`), or their bridge; where that names none, a bridge or the end of a pair, not the uplink. The parent of
        a macvlan is none: what this host sends there never arrives. Raises CniError(5).
        """
        from .netlink import PAIRED, link_kind, master_of, prefixes_of, route_interface, uplink
        try:
            index = route_interface(family, ip)
            name = if_indextoname(index) if index else ""
            if not is_ifname(name):  # none, or one that nft text cannot hold
                return "", False, []
            leads = (name in links or any(master_of(link) == index for link in links)) if links else \
                link_kind(index) in ("bridge", *PAIRED) and index != uplink(family)
            return name, leads, prefixes_of(family, index)
        except OSError as error:
            if error.errno in NO_ROUTE:
                return "", False, []
            raise system_error("cannot find the way to the container", error) from None

    # --- what lets this host's localhost reach containers ---

    def localhost_obstacle(self, family: int, name: str) -> str:
        """Why localhost cannot lead through the interface `name`, "" if it can."""
        if family == 6:
            from .netlink import link_kind
            if read("/proc/sys/net/bridge/bridge-nf-call-ip6tables") == b"1" and \
                    link_kind(if_nametoindex(name)) == "bridge":
                return "net.bridge.bridge-nf-call-ip6tables=1 translates the reply before it is routed"
            return ""
        if self.localnet(name):
            return ""
        path = _localnet(name)
        try:
            posix.close(posix.open(path, posix.O_WRONLY | posix.O_CLOEXEC))
        except OSError as error:
            return f"cannot write 1 to {path}: {posix.strerror(error.errno or 0)}"
        return ""

    def localnet(self, name: str) -> bool:
        """Whether packets from 127.0.0.0/8 may leave through the interface `name`; False where it is gone.

        The kernel takes the greater of its value and that of `all` (IN_DEV_ROUTE_LOCALNET).
        """
        try:
            return b"1" in (read(_localnet(name)), read(_localnet("all")))
        except OSError as error:
            raise system_error(f"cannot read {_localnet(name)}", error) from None

    def set_localnet(self, name: str, value: bool) -> None:
        """Let packets from 127.0.0.0/8 leave through the interface `name`, or let them no more.

        Source: net.ipv4.conf.*.route_localnet, Documentation/networking/ip-sysctl.rst.
        """
        try:
            fd = posix.open(_localnet(name), posix.O_WRONLY | posix.O_CLOEXEC)
            try:
                posix.write(fd, b"1" if value else b"0")
            finally:
                posix.close(fd)
        except OSError as error:
            raise system_error(f"cannot write {value:d} to {_localnet(name)}", error) from None

    def notes_interfaces(self) -> bool:
        """Whether the table notes the interfaces that localhost leads through: that of cni-portmap 0.1.0 did not."""
        return self.has_set(ruleset.LOCALHOST_INTERFACES)

    def is_noted(self, name: str) -> bool:
        """Whether the table notes an interface."""
        return self.has_element(ruleset.LOCALHOST_INTERFACES, ruleset.key_of_interface(name))

    def noted(self) -> dict[str, str]:
        """The interfaces that the table notes, each with what its comment says."""
        found = {key.rstrip(b"\0").decode(errors="replace"): comment
                 for key, comment in self.set_comments(ruleset.LOCALHOST_INTERFACES)}
        return {name: comment for name, comment in found.items() if is_ifname(name)}

    def noted_and_gone(self) -> "list[str]":
        """Those of `noted` that do not exist any more."""
        return [name for name in self.noted() if not _is_interface(name)]

    def has_localhost6(self, name: str) -> bool:
        """Whether replies to ::1 are let in through the interface `name`."""
        from .netlink import local_routes
        try:
            return if_nametoindex(name) in local_routes("::1", LOCALHOST_METRIC)
        except OSError:
            return False

    def allow_localhost6(self, name: str) -> str:
        """Let replies to ::1 in through the interface `name`; why that is not possible, or "".

        The kernel looks up ::1 only on an interface that has a local route for it (ip6_pol_route, RT6_LOOKUP_F_IFACE).
        """
        from .netlink import add_local_route
        try:
            add_local_route("::1", if_nametoindex(name), LOCALHOST_METRIC)
        except OSError as error:
            return f"no local route for ::1: {posix.strerror(error.errno or 0)}"
        return ""

    def delete_flows(self, protocol: int, filters: "Callable[[], list[Filter]]",
                     is_stale: "Callable[[Flow], bool]") -> None:
        """Delete stale flows from connection tracking. A failure is one line on stderr.

        Each of `filters` names some for the kernel to find and delete by itself. Where that would cost more than to
        list all flows, `is_stale` picks them from the list.
        """
        from .conntrack import delete_flows
        try:
            delete_flows(protocol, filters, is_stale, self.open_socket)
        except OSError as error:
            warn(f"could not delete stale conntrack entries: {posix.strerror(error.errno or 0)}")

    def local_addresses(self) -> set[bytes]:
        """This host's addresses, packed; not the link-local ones, which nothing is forwarded from (RFC 4291, 2.5.6)."""
        if self._local is None:
            from .netlink import local_addresses
            self._local = {address for address in local_addresses()
                           if len(address) == 4 or address[0] != 0xfe or address[1] & 0xc0 != 0x80}
        return self._local

    # --- the end ---

    def leave(self) -> None:
        """Let the kernel close this process's netlink sockets, without waiting for it: the last act of a process.

        After a transaction that deleted something, closing takes 11 to 13 ms (an RCU grace period), though its effect
        is there at once. So the sockets go into a message to a socket pair that nothing but that message refers to:
        the kernel's collector of such cycles (unix_gc, a worker of its own since Linux 6.9) closes them. Older kernels
        collect at once, and this costs what an ordinary close does. No process is left behind.
        """
        sockets = [*self._descriptors()]
        if not sockets:
            return
        try:
            near, far = socketpair(AF_UNIX, SOCK_DGRAM)
            near.sendmsg([b"close"], [(SOL_SOCKET, SCM_RIGHTS, pack(f"={len(sockets) + 1}i", far.fileno(), *sockets))])
            for fd in sockets:
                posix.close(fd)
            far.close()  # it lives on in its own message,
            near.close()  # and the end of a socket like this one wakes the collector
        except OSError:
            pass  # then they close when the process ends

    def _descriptors(self) -> "Iterable[int]":
        """This process's netlink sockets that are for nf_tables."""
        yield from (netlink.fileno() for netlink in self._sockets)
        if self._nft is not None and self._nft.fd >= 0:
            yield self._nft.fd
        if self._empty is not None:
            yield from self._empty._descriptors()


def _localnet(interface: str) -> str:
    return f"/proc/sys/net/ipv4/conf/{interface}/route_localnet"


def _is_interface(name: str) -> bool:
    try:
        return bool(if_nametoindex(name))
    except OSError:
        return False
