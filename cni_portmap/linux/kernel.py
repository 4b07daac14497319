"""This host's kernel, as the verbs see it: what is read, what is written, and the lock between the two."""
import posix
from _socket import (AF_UNIX, IPPROTO_IPV6, IPPROTO_SCTP, IPV6_V6ONLY, SCM_RIGHTS, SO_REUSEADDR, SOCK_DGRAM,
                     SOCK_STREAM, SOL_SOCKET, if_indextoname, if_nametoindex, socket, socketpair)
from _struct import pack

from .. import ruleset
from ..attachment import AF
from ..cni import INVALID_CONFIG, IO_FAILURE, NFT_REFUSED, TRY_AGAIN_LATER, CniError, is_ifname, warn
from . import (EACCES, EADDRINUSE, EAFNOSUPPORT, EHOSTUNREACH, EINVAL, EMSGSIZE, ENETUNREACH, ENODEV, ENOENT, ENOTDIR,
               ENXIO, EOPNOTSUPP, EPERM, ERESTART, HINTS, read, system_error)
from .netlink import named
from .table import (NFPROTO_IPV4, NFPROTO_IPV6, NFT_MSG_GETCHAIN, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE,
                    NFTA_RULE_HANDLE, Table)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from ..reference import Leftover
    from ..ruleset import Change, Owner
    from .alive import Verdict
    from .batch import Command
    from .conntrack import Filter, Flow
    from .libnftables import Libnftables

LOCK = "/run/cni-portmap.lock"
LOCK_SECONDS = 30  # 200 plugins at once need less than one
HUNG_PATHS = 3
LOCALHOST_METRIC = 4096  # after the host's own route for ::1, which has 0
CLONE_NEWNET = 0x40000000
REFERENCE_CHAINS = (("nat", "CNI-HOSTPORT-DNAT"), ("cni_hostport", "hostports"))  # the rest is in `reference`
LEGACY = {4: "/proc/net/ip_tables_", 6: "/proc/net/ip6_tables_"}
NO_ROUTE = (ENXIO, ENODEV, EACCES, EINVAL, EOPNOTSUPP, EAFNOSUPPORT, ENETUNREACH, EHOSTUNREACH)


class Lock:
    """One plugin process at a time between reading the ruleset and writing it.

    A file lock, so the kernel releases it when its holder dies. The file is root's own: nobody else can open it,
    and so cannot hold it. `path`: of another such file.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path or LOCK

    def __enter__(self) -> bool:
        """Whether another had it, so that there was a wait."""
        import _signal
        import fcntl

        def too_late(*_: object) -> None:
            raise CniError(TRY_AGAIN_LATER, f"timed out after {LOCK_SECONDS} s waiting for {self.path}",
                           f"see who holds it: fuser -v {self.path}")
        waited = False
        try:
            while True:
                self._open()
                if not self._take():
                    waited = True
                    before = _signal.signal(_signal.SIGALRM, too_late)
                    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGALRM])  # a runtime may have blocked it
                    _signal.setitimer(_signal.ITIMER_REAL, LOCK_SECONDS)
                    try:
                        fcntl.flock(self._fd, fcntl.LOCK_EX)
                    finally:
                        _signal.setitimer(_signal.ITIMER_REAL, 0)
                        _signal.signal(_signal.SIGALRM, before)
                if self._is_current():
                    return waited
        except OSError as error:
            raise system_error(f"cannot lock {self.path}", error) from None

    def attempt(self) -> bool:
        """Take the lock, to be released by `release`, if nobody has it: for a process that must not wait."""
        try:
            self._open()
            if not self._take():
                posix.close(self._fd)
                return False
            return self._is_current()
        except OSError as error:
            raise system_error(f"cannot lock {self.path}", error) from None

    def _open(self) -> None:
        self._fd = posix.open(self.path, posix.O_RDWR | posix.O_CREAT | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600)
        status = posix.fstat(self._fd)
        if status.st_uid != posix.geteuid() or status.st_mode & 0o77:
            posix.close(self._fd)
            raise CniError(IO_FAILURE, f"{self.path} is accessible to other users", f"remove it: rm {self.path}")

    def _take(self) -> bool:
        import fcntl
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def _is_current(self) -> bool:
        """Whether the file that is locked is the one that others will find; else it is closed."""
        try:
            if posix.stat(self.path).st_ino == posix.fstat(self._fd).st_ino:
                return True
        except FileNotFoundError:
            pass
        posix.close(self._fd)  # removed while we waited
        return False

    def release(self) -> None:
        """Release it."""
        posix.close(self._fd)

    def __exit__(self, kind: "type[BaseException] | None", error: BaseException | None,
                 traceback: "TracebackType | None") -> None:
        self.release()


class EmptyNamespace:
    """A new, empty network namespace; this process is in it for as long as the context lasts."""

    def __init__(self, kernel: "Kernel") -> None:
        self._kernel = kernel

    def __enter__(self) -> "Kernel":
        from .libnftables import unshare
        try:
            self._home = posix.open("/proc/self/ns/net", posix.O_RDONLY | posix.O_CLOEXEC)
            unshare(CLONE_NEWNET)
        except OSError as error:
            raise system_error("cannot create a network namespace to write rules apart", error) from None
        self._kernel.empty = Kernel()  # kept, see `leave`
        return self._kernel.empty

    def __exit__(self, kind: "type[BaseException] | None", error: BaseException | None,
                 traceback: "TracebackType | None") -> None:
        from .libnftables import setns
        setns(self._home, CLONE_NEWNET)
        posix.close(self._home)


class Kernel(Table):
    """Our table, and what surrounds it."""

    def __init__(self) -> None:
        super().__init__()
        self._nft: Libnftables | None = None
        self.empty: Kernel | None = None
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

    def index_of(self, name: str) -> int:
        """The index of an interface, 0 where there is none of that name."""
        try:
            return if_nametoindex(name)
        except OSError:
            return 0

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
        """`namespace`, asked by a child; 0 where that has waited for a second in vain.

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

    def wait_for(self, owner: "Owner", seconds: float) -> float:
        """Wait until an owner's chain has changed or its link has gone; the seconds that took.

        Not longer than `seconds`, and never under the lock.
        """
        from .alive import until
        return until(lambda: self.handle(owner.chain) != owner.handle or
                     bool(owner.link and self.has_link(owner.link) is False), seconds)

    # --- the reference plugin ---

    def has_reference(self) -> bool:
        """Whether the reference plugin portmap may have rules here: a chain of its own is there.

        Four look-ups by name, and nothing is loaded for them: most hosts never had it.
        """
        names = (bytes((family, 0, 0, 0)) + named(NFTA_CHAIN_TABLE, table) + named(NFTA_CHAIN_NAME, chain)
                 for table, chain in REFERENCE_CHAINS for family in (NFPROTO_IPV4, NFPROTO_IPV6))
        return any(answer is not None for answer in self._ask(NFT_MSG_GETCHAIN, *names)) or \
            legacy_may_have(4) or legacy_may_have(6)

    def leftovers(self, wanted: "Callable[[str, str], bool]", own: tuple[str, str] = ("", "")) -> "list[Leftover]":
        """What the reference plugin has written for containers, see `linux.leftovers`."""
        from .leftovers import leftovers
        try:
            return leftovers(self._netlink(), wanted, own)
        except OSError as error:
            raise system_error("cannot read the reference plugin's rules", error) from None

    def remove_leftovers(self, generation: int, found: "Sequence[Leftover]") -> bool:
        """Remove these; False, and nothing is removed, where the ruleset is not that of `generation` any more."""
        from .leftovers import remove
        try:
            return remove(self._netlink(), generation, found)
        except OSError as error:
            raise system_error("cannot write nf_tables", error) from None

    def wait_for_leftover(self, leftover: "Leftover", seconds: float) -> float:
        """Wait until a leftover has gone, not longer than `seconds`; the seconds that took. Never under the lock."""
        from .alive import until
        from .leftovers import is_there
        return until(lambda: not is_there(self._netlink(), leftover), seconds)

    # --- writing ---

    def lock(self) -> Lock:
        """The lock to hold between reading and writing. What was read before is read again."""
        self._kept = None
        return Lock()

    def transact(self, text: str) -> None:
        """Run nft commands, a line each, as one transaction: all of them or none."""
        problem = self._libnftables().run(text)
        if problem:
            raise self._refused(problem)

    def write(self, change: "Change", generation: int = 0) -> bool:
        """Make a change, as one transaction: nft text where it only adds, else netlink messages (see `batch`).

        False, and nothing is written, where something is to go and the ruleset is not that of `generation` (0:
        whichever) any more, or what is to go is gone.
        """
        self._kept = None
        if not change.removes():
            self.transact(change.text())
            return True
        from .batch import commands, copies
        created = []
        kept = {chain for chain in change.chains if chain in change.rules and not self.hook(chain)}
        places = {chain: [rule[NFTA_RULE_HANDLE] for rule in self.rule_attributes(chain)[index:index + 1]]
                  for chain, (index, _) in change.inserted.items()}
        if not all(places.values()):  # somebody has flushed one of these chains
            return False
        if change.rules or change.inserted:
            try:
                with self.empty_namespace() as empty:
                    empty.transact(change.apart())
                    created = [*copies(empty, self, {chain: place for chain, (place,) in places.items()}, kept)]
            except CniError:  # its conditions have what this host has alone; or no right to make a namespace
                self.transact(change.text())
                return True
        return self._send(commands(generation, change, created, kept))

    def delete_table(self, name: str = ruleset.TABLE_NAME) -> None:
        """Delete the table, or another of ours, with all that is in it; none is no error."""
        from .batch import END, begin, delete_table
        self._kept = None
        self._send([begin(0), delete_table(name), END])

    def _send(self, messages: "Sequence[Command]") -> bool:
        """Send a transaction; False where what it changes is stale or gone."""
        from .batch import send
        try:
            code, command = send(self._netlink(), messages)
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
            hint = HINTS[EMSGSIZE]
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

    def empty_namespace(self) -> "EmptyNamespace":
        """A new network namespace, to write there what should be and look at it."""
        return EmptyNamespace(self)

    # --- what surrounds the rules ---

    def port_in_use(self, family: int, protocol: str, host_ip: str, host_port: int) -> bool:
        """Whether a process of this host uses the port, but the agent, which holds it for those who publish."""
        if not _is_bound(family, protocol, host_ip, host_port):
            return False
        from .companion import yields
        return not yields(family, protocol, host_ip, host_port) or _is_bound(family, protocol, host_ip, host_port)

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

    def home_of(self, family: int, ip: str, links: "Sequence[str]") -> tuple[tuple[str, ...], bool]:
        """The interfaces of this host that lead to a container's own network; and whether it alone is behind them.

        That is where its address is directly behind, and the bridge of its `links`: one without an address has no
        route, and another interface may be on top of it (VLAN). Raises CniError(5); and CniError(7) where one is a
        port of a VRF: what is forwarded then comes in on that, whichever of its ports it is from (vrf_l3_rcv).
        """
        from .netlink import link_kind, master_of, route_interface
        try:
            index = route_interface(family, ip)
        except OSError as error:
            if error.errno not in NO_ROUTE:
                raise system_error("cannot find the way to the container", error) from None
            index = 0
        try:
            indexes = dict.fromkeys(each for each in (index, *map(master_of, links)) if each)
            names = tuple(name for name in map(if_indextoname, indexes) if is_ifname(name))
            above = (master_of(name) for name in names if name not in links)
            kinds = {each: link_kind(each) for each in dict.fromkeys((*indexes, *above)) if each}
        except OSError as error:
            raise system_error("cannot read the links of this host", error) from None
        if "vrf" in kinds.values():
            raise CniError(INVALID_CONFIG, f"no policy is possible for {ip}: it is behind a VRF ({', '.join(names)})",
                           "leave out gatewayModeV4, gatewayModeV6, outgoingSourceV4 and outgoingSourceV6 there")
        return names, bool(index) and kinds[index] != "bridge"

    # --- what lets this host's localhost reach containers ---

    def localhost_obstacle(self, family: int, name: str) -> str:
        """Why localhost cannot lead through the interface `name`, "" if it can."""
        if family == 6:
            try:
                return _localhost6_obstacle(name)
            except OSError as error:  # it has gone meanwhile
                raise system_error(f"cannot look at the interface {name}", error) from None
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
            if error.errno in (ENOENT, ENODEV):  # it has gone between opening and reading
                return False
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
        if self.empty is not None:
            yield from self.empty._descriptors()


def legacy_may_have(family: int) -> bool:
    """Whether iptables-legacy may have rules of the reference plugin: it has nat rules, and the match they need."""
    try:
        return b"nat\n" in read(f"{LEGACY[family]}names", 4096) and \
            b"multiport\n" in read(f"{LEGACY[family]}matches", 4096)
    except OSError:  # another user's
        return False


def _localnet(interface: str) -> str:
    return f"/proc/sys/net/ipv4/conf/{interface}/route_localnet"


def _localhost6_obstacle(name: str) -> str:
    from .netlink import link_kind
    if read("/proc/sys/net/bridge/bridge-nf-call-ip6tables") == b"1" and link_kind(if_nametoindex(name)) == "bridge":
        return "net.bridge.bridge-nf-call-ip6tables=1 translates the reply before it is routed"
    for setting in "seg6_enabled", "rpl_seg_enabled":  # the way goes on after all rules (ipv6_srh_rcv)
        paths = (f"/proc/sys/net/ipv6/conf/{which}/{setting}" for which in ("all", name))
        if all(read(path) not in (b"", b"0") for path in paths):
            return f"net.ipv6.conf.{name}.{setting}=1 lets neighbours send packets on to ::1, past all rules"
    return ""


def _is_interface(name: str) -> bool:
    try:
        return bool(if_nametoindex(name))
    except OSError:
        return False


def _is_bound(family: int, protocol: str, host_ip: str, host_port: int) -> bool:
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
