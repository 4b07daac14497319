"""The only module that touches the kernel: libnftables, what netlink reads, sysctls, namespaces, the lock.

It knows how, and nothing of what: texts come from `ruleset`, decisions from `portmap`. Every failure leaves as
one CniError that says what to do. libnftables is loaded for the first transaction only.
"""
import posix
import sys
from _socket import (AF_INET, AF_INET6, AF_UNIX, IPPROTO_IPV6, IPPROTO_SCTP, IPV6_V6ONLY, SCM_RIGHTS, SO_REUSEADDR,
                     SOCK_DGRAM, SOCK_STREAM, SOL_SOCKET, if_indextoname, if_nametoindex, socket, socketpair)
from _struct import pack

from . import ruleset, see_packages
from .cni import (FOREIGN_TABLE, IFNAME, IO_FAILURE, NFT_REFUSED, TRY_AGAIN_LATER, CniError, give_up, is_ifname,
                  is_serving, warn)
from .netlink import (Conntrack, NfTables, DnatRule, add_local_route, attributes, expressions, link_kind,
                      list_elements, local_addresses, paired_link, route_interface)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import ModuleType, TracebackType

    import nftables

    from .alive import Verdict
    from .netlink import Flow

LOCK = "/run/cni-portmap.lock"
MANY_FLOWS = 1000
MANY_PORTS = 100  # above, listing all of the maps is quicker than to ask for each element
LOCK_SECONDS = 30  # 200 plugins at once need less than one
LOCALHOST_METRIC = 4096  # after the host's own route for ::1, which has 0
READING = "cannot read nf_tables"
EPERM, ENOENT, ENOTDIR, EINVAL, EADDRINUSE = 1, 2, 20, 22, 98
CLONE_NEWNET = 0x40000000

HINTS = {
    EPERM: "run it as root, with CAP_NET_ADMIN in the network namespace of the host",
    ENOENT: "the kernel may lack nf_tables; try: modprobe nf_tables",
    13: "run it as root",
    23: "too many files are open on this host; raise fs.file-max",
    24: "the runtime's limit of open files is too low; raise it",
    28: "no space is left there; free some",
    30: "the file system is read-only; mount it read-write for the plugin",
}


def failure(what: str, error: OSError) -> CniError:
    """The CniError for a system call that failed."""
    if error.errno == EINVAL and what == READING:
        return CniError(FOREIGN_TABLE, f"table {ruleset.TABLE} has a set or map that this plugin did not make",
                        f"its maps are {', '.join(ruleset.MAPS)}; see: nft list table {ruleset.TABLE}")
    return CniError(IO_FAILURE, f"{what}: {posix.strerror(error.errno or 0)}", HINTS.get(error.errno or 0, ""))


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
            raise CniError(TRY_AGAIN_LATER, f"{LOCK} is held by another call for {LOCK_SECONDS} seconds",
                           f"see who holds it: fuser -v {LOCK}")
        waited = False
        try:
            while True:
                self._fd = posix.open(LOCK, posix.O_RDWR | posix.O_CREAT | posix.O_NOFOLLOW | posix.O_CLOEXEC, 0o600)
                status = posix.fstat(self._fd)
                if status.st_uid != posix.geteuid() or status.st_mode & 0o77:
                    raise CniError(IO_FAILURE, f"{LOCK} is open to other users", f"remove it: rm {LOCK}")
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
            raise failure(f"cannot lock {LOCK}", error) from None

    def __exit__(self, kind: "type[BaseException] | None", error: BaseException | None,
                 traceback: "TracebackType | None") -> None:
        posix.close(self._fd)


class Kernel:
    """This host's kernel, as the verbs see it."""

    def __init__(self) -> None:
        self._nft: nftables.Nftables | None = None
        self._tables: NfTables | None = None
        self._local: set[bytes] | None = None
        self._conntracks: list[Conntrack] = []

    # --- reading ---

    @property
    def _table(self) -> NfTables:
        if self._tables is None:
            self._tables = NfTables(ruleset.TABLE_NAME)
        return self._tables

    def has_chain(self, chain: str) -> bool:
        """Whether the table has such a chain."""
        try:
            return self._table.chain(chain) is not None
        except OSError as error:
            raise failure(READING, error) from None

    def handle(self, chain: str) -> int:
        """The chain's handle, which no other chain has had or will have; 0 for no chain."""
        try:
            return _handle(self._table.chain(chain) or {})
        except OSError as error:
            raise failure(READING, error) from None

    def handles(self) -> dict[str, int]:
        """The handle of each chain of the table."""
        try:
            return {found[3][:-1].decode(errors="replace"): _handle(found) for found in self._table.chains()}
        except OSError as error:
            raise failure(READING, error) from None

    def comments(self, chain: str) -> list[str]:
        """The comments of a chain's rules, "" for a rule without one."""
        return [comment for _, comment, _ in self.rules(chain)]

    def owner(self, chain: str) -> ruleset.Owner:
        """Whom an attachment's chain belongs to."""
        return ruleset.Owner(chain, _record(self.comments(chain)))

    def owners(self) -> list[ruleset.Owner]:
        """Whom every attachment's chain belongs to. Reads the whole table."""
        found: dict[str, list[str]] = {}
        for chain, comment, _ in self.rules():
            if chain.startswith("c/"):
                found.setdefault(chain, []).append(comment)
        return [ruleset.Owner(chain, _record(comments)) for chain, comments in found.items()]

    def dnat_rules(self, chain: str) -> list[DnatRule]:
        """What a chain's rules translate."""
        found = (DnatRule(raw, self.set_elements) for _, _, raw in self.rules(chain))
        return [rule for rule in found if rule.target]

    def targets(self, chains: "Iterable[str]") -> dict[str, set[bytes]]:
        """The container addresses, packed, that each chain translates to."""
        return {chain: {rule.target for rule in self.dnat_rules(chain)} for chain in chains}

    def wanted_by(self, chain: str) -> "set[tuple[str, bytes]]":
        """The map elements (map, key) that could lead to a chain: its rules have something for them."""
        return {element for rule in self.dnat_rules(chain) for element in ruleset.elements_of(rule)}

    def rules(self, chain: str = "") -> list[tuple[str, str, bytes]]:
        """Chain, comment and expressions of the rules of `chain`, or of the whole table."""
        try:
            return [*self._table.rules(chain)]
        except OSError as error:
            raise failure(READING, error) from None

    def lookup(self, elements: "Iterable[tuple[str, bytes]]") -> dict[tuple[str, bytes], str]:
        """The chain that each map element (map, key) leads to; those that do not exist are left out."""
        try:
            return self._table.lookup(elements)
        except OSError as error:
            raise failure(READING, error) from None

    def elements(self) -> "list[tuple[tuple[str, bytes], str]]":
        """All map elements (map, key), each with the chain that it leads to."""
        try:
            return [((name, key), chain) for name in ruleset.MAPS for key, chain in self._table.elements(name)]
        except OSError as error:
            raise failure(READING, error) from None

    def elements_of(self, chains: "Iterable[str]") -> "list[tuple[tuple[str, bytes], str]]":
        """The map elements (map, key) that lead to one of `chains`, each with its chain: what they own."""
        owned = []
        unknown = set()
        for chain in chains:
            references = self.references(chain)
            found = self.lookup(self.wanted_by(chain)) if references <= MANY_PORTS else {}
            its = [(element, chain) for element, its_chain in found.items() if its_chain == chain]
            owned += its
            if len(its) != references:  # many, or the chain's rules do not tell: the maps do
                unknown.add(chain)
        if unknown:
            owned = [item for item in owned if item[1] not in unknown]
            owned += [item for item in self.elements() if item[1] in unknown]
        return owned

    def set_elements(self, name: bytes) -> "list[tuple[bytes, bytes]]":
        """Key and value of each element of a set or map (a name as the kernel has it)."""
        try:
            answers = self._table.raw_elements(name[:-1].decode())
        except OSError as error:
            raise failure(READING, error) from None
        found = [dict(attributes(element)) for answer in answers for element in list_elements(answer)]
        return [(dict(attributes(each.get(1, b""))).get(1, b""), dict(attributes(each.get(2, b""))).get(1, b""))
                for each in found]

    def claimants(self, name: str, endings: "Iterable[bytes]") -> list[tuple[str, bytes]]:
        """Chain and ending of each element of a map whose key ends like one of `endings` (protocol and port)."""
        wanted = frozenset(endings)
        try:
            return [(chain, key[-8:]) for key, chain in self._table.elements(name) if key[-8:] in wanted]
        except OSError as error:
            raise failure(READING, error) from None

    # --- who lives ---

    def link(self, names: "Sequence[str]") -> str:
        """The host's end of a container's link, as name#index, among these interfaces; "" for none.

        It goes with its other end, so with the container's network namespace; a bridge does not, nor does a tap.
        """
        try:
            name, index = paired_link(names)
        except OSError as error:
            raise failure("cannot read the links of this host", error) from None
        return f"{name}#{index}" if name else ""

    def has_link(self, link: str) -> bool:
        """Whether the link is there that was name#index. One with another name is the same: somebody renamed it."""
        try:
            return bool(if_indextoname(int(link.rpartition("#")[2])))
        except (OSError, OverflowError):
            return False

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
        """`namespace`, asked by a child that gets one second; 0 where it does not come back."""
        from .alive import in_a_second
        return in_a_second(lambda: self.namespace(path))

    def glance(self, owner: ruleset.Owner) -> "Verdict | None":
        """Who lives, as far as that is known without looking for it; None where it is not. It cannot hang."""
        if not owner.link:
            return None
        from .alive import by_link
        return by_link(owner, self.has_link(owner.link))

    def judge(self, owners: "Iterable[ruleset.Owner]") -> "dict[str, Verdict]":
        """Who lives, by their chains. Takes its time, so it is not asked under the lock."""
        from .alive import judge
        return judge(owners, self.has_link, self.namespace_soon)

    def wait_for(self, owner: ruleset.Owner, handle: int, seconds: float) -> float:
        """Wait until an owner's chain, which has this handle, has changed or its link has gone; the seconds that took.

        Not longer than `seconds`, and never under the lock.
        """
        from .alive import until
        return until(lambda: self.handle(owner.chain) != handle or
                     bool(owner.link and not self.has_link(owner.link)), seconds)

    # --- comparing ---

    def picture(self, chain: str) -> "list[tuple[object, ...]]":
        """What a chain is, comparable with the same chain elsewhere: how it is hooked, then each of its rules.

        Counters have no values in it, and anonymous sets their elements in place of their names.
        """
        try:
            found = self._table.chain(chain)
            if found is None:
                return []
            hook = tuple(found.get(kind) for kind in (4, 5, 7))  # NFTA_CHAIN_HOOK, _POLICY, _TYPE
            return [hook, *((comment, *(self._expression(name, fields) for name, fields in expressions(raw)))
                            for _, comment, raw in self._table.rules(chain))]
        except OSError as error:
            raise failure(READING, error) from None

    def references(self, chain: str) -> int:
        """How many map elements and rules lead to `chain` (NFTA_CHAIN_USE less its own rules)."""
        try:
            use = (self._table.chain(chain) or {}).get(6, b"")
            return int.from_bytes(use, "big") - len([*self._table.rules(chain)])
        except OSError as error:
            raise failure(READING, error) from None

    def _expression(self, name: str, found: dict[int, bytes]) -> tuple[object, ...]:
        if name == "counter":
            return (name,)
        anonymous = name == "lookup" and found[1].startswith(b"__")
        if anonymous:
            elements = sorted(element for answer in self._table.raw_elements(found[1][:-1].decode())
                              for element in list_elements(answer))
            return (name, *elements, *(found.get(kind) for kind in (2, 3, 5)))
        return (name, *sorted(found.items()))

    def is_dormant(self) -> bool:
        """Whether somebody put the table to sleep: `add table inet cni_portmap { flags dormant; }`."""
        return bool((self._flags() or 0) & 1)

    def has_table(self) -> bool:
        """Whether our table is there."""
        return self._flags() is not None

    def _is_owned(self) -> bool:
        """Whether another program owns the table; False where that cannot be read."""
        try:
            return bool((self._flags() or 0) & 2)
        except CniError:
            return False

    def _flags(self) -> int | None:
        """The flags of our table (enum nft_table_flags), None where there is no such table."""
        try:
            return self._table.flags()
        except OSError as error:
            raise failure(READING, error) from None

    def mirror(self) -> "Kernel":
        """Move this process to a new, empty network namespace, to write there what should be and look at it."""
        ctypes = _import("ctypes")
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise failure("cannot make a network namespace to compare with", OSError(ctypes.get_errno(), ""))
        self._mirror = Kernel()  # kept, see `leave`
        return self._mirror

    # --- writing ---

    def lock(self) -> Lock:
        """What to hold between reading and writing."""
        return Lock()

    def transact(self, text: str) -> None:
        """Run nft commands, a line each, as one transaction: all of them or none."""
        problem = self._run(text)
        if problem:
            hint = "nothing was written"
            if "Operation not permitted" in problem:
                hint = f"table {ruleset.TABLE} belongs to another program (flags owner)" if self._is_owned() else \
                    HINTS[EPERM]
            raise CniError(NFT_REFUSED, f"nftables refused: {problem}", hint)

    def dry_run(self, text: str) -> str:
        """What nft or the kernel has against a transaction, "" for nothing. Writes nothing."""
        self._libnftables.set_dry_run(True)
        try:
            return self._run(text)
        finally:
            self._libnftables.set_dry_run(False)

    def _run(self, text: str) -> str:
        commands = text.splitlines()
        code, _, error = self._libnftables.cmd(";".join(commands))  # one line: nft's errors count columns, not lines
        if not code:
            return ""
        message, _, rest = error.partition("\n")
        carets = next((line for line in rest.splitlines() if line and not line.strip(" ^~")), "")
        at = len(carets) - len(carets.lstrip())
        for command in commands:
            if at <= len(command):
                break
            at -= len(command) + 1
        return f"{message.rpartition('Error: ')[2]}, in: {command[:200]}"

    @property
    def _libnftables(self) -> "nftables.Nftables":
        if self._nft is None:
            see_packages()
            try:
                nftables = _import("nftables")
                sys.unraisablehook = _say_nothing  # its __del__ complains where its __init__ has failed
                if is_serving():
                    _answer_if_it_exits()
                self._nft = nftables.Nftables()
            except (ImportError, OSError, AttributeError) as error:
                raise CniError(IO_FAILURE, f"cannot load libnftables: {error}",
                               "install the package python3-nftables") from None
        return self._nft

    # --- what surrounds the rules ---

    def is_bound(self, family: int, protocol: str, host_ip: str, host_port: int) -> bool:
        """Whether a process of this host uses the port, by bind(2)'s own judgement."""
        kind = SOCK_DGRAM if protocol == "udp" else SOCK_STREAM
        try:
            probe = socket(AF_INET if family == 4 else AF_INET6, kind, IPPROTO_SCTP if protocol == "sctp" else 0)
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

    def interface_to_open(self, ip: str, anyway: bool = False) -> str:
        """The interface that leads to `ip` and does not yet let packets from 127.0.0.0/8 out; "" for none.

        `anyway`: also where it lets them out. Raises CniError(5) where `set_localnet` could not open it.
        """
        name = interface_to(4, ip)
        if not name or (self.localnet(name) and not anyway):
            return ""
        if not is_ifname(name):
            raise CniError(IO_FAILURE, f"interface {name!r} leads to the container, and cannot be noted in nftables",
                           f"give it a name of {IFNAME}")
        path = _localnet(name)
        try:
            posix.close(posix.open(path, posix.O_WRONLY | posix.O_CLOEXEC))
        except OSError as error:
            raise failure(f"cannot write 1 to {path}", error) from None
        return name

    def localnet(self, name: str) -> bool:
        """Whether packets from 127.0.0.0/8 may leave through the interface `name`; False where it is gone."""
        try:
            return _read(_localnet(name)) == b"1"
        except OSError as error:
            raise failure(f"cannot read {_localnet(name)}", error) from None

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
            raise failure(f"cannot write {value:d} to {_localnet(name)}", error) from None

    def notes_opened(self) -> bool:
        """Whether the table notes what was opened: that of cni-portmap 0.1.0 did not."""
        try:
            return self._table.has_set(ruleset.OPENED)
        except OSError as error:
            raise failure(READING, error) from None

    def opened(self) -> "list[str]":
        """The interfaces that this plugin has opened to 127.0.0.0/8, as its table notes them."""
        names = (key.rstrip(b"\0").decode(errors="replace")
                 for key, _ in self.set_elements(f"{ruleset.OPENED}\0".encode()))
        return [name for name in names if is_ifname(name)]

    def opened_and_gone(self) -> "list[str]":
        """Those of `opened` that do not exist any more."""
        return [name for name in self.opened() if not _is_interface(name)]

    def allow_localhost6(self, ip: str) -> str:
        """Let replies to ::1 in through the interface that leads to `ip`; why that is not possible, or "".

        The kernel looks up ::1 only on an interface that has a local route for it (ip6_pol_route, RT6_LOOKUP_F_IFACE).
        """
        try:
            interface = route_interface(6, ip)
            if not interface:
                return f"no interface leads to {ip}"
            if _read("/proc/sys/net/bridge/bridge-nf-call-ip6tables") == b"1" and link_kind(interface) == "bridge":
                return "net.bridge.bridge-nf-call-ip6tables=1 translates the reply before it is routed"
            add_local_route("::1", interface, LOCALHOST_METRIC)
        except OSError as error:
            return f"no local route for ::1: {posix.strerror(error.errno or 0)}"
        return ""

    def forget(self, protocol: int, filters: "Callable[[], list[tuple[int, int, bytes, bytes]]]",
               is_stale: "Callable[[Flow], bool]") -> None:
        """Let conntrack forget stale flows. A failure is one line on stderr.

        Each of `filters` (family, host port, destination, target; b"" for any) names some for the kernel to find and
        forget by itself. Where that would cost more than to list all flows, `is_stale` picks them from the list.
        """
        try:
            count = int(_read("/proc/sys/net/netfilter/nf_conntrack_count", 16) or 0)
            wanted = filters() if count else []
            if not wanted:
                return
            conntrack = Conntrack(protocol)
            self._conntracks.append(conntrack)
            for family in 4, 6:
                mine = [each for each in wanted if each[0] == family]
                # Measured, in units of 0.3 us: a filter looks at every flow, a list also at every empty bucket (10 ms).
                if family == 4 and len(mine) * (400 + count) <= 35_000 + count and \
                        all(conntrack.forget(port, host, target) for _, port, host, target in mine):
                    continue
                ports = {port for _, port, *_ in mine}
                port = ports.pop() if len(ports) == 1 else 0
                for _ in range(100):  # an end even where flows stay
                    if not (mine and _forget_listed(conntrack, family, port, is_stale)):
                        break
        except OSError as error:
            warn(f"stale connections may live on: conntrack: {posix.strerror(error.errno or 0)}")

    def local_addresses(self) -> set[bytes]:
        """This host's addresses, packed; not the link-local ones, which nothing is forwarded from (RFC 4291, 2.5.6)."""
        if self._local is None:
            self._local = {address for address in local_addresses()
                           if len(address) == 4 or address[0] != 0xfe or address[1] & 0xc0 != 0x80}
        return self._local


def _forget_listed(conntrack: Conntrack, family: int, port: int, is_stale: "Callable[[Flow], bool]") -> bool:
    """Forget the stale flows among those to `port` (0: any); whether there may be more.

    Few are forgotten one by one (20 us each). Many to one port lead to few addresses, where the kernel forgets them.
    """
    stale = []
    for flow in conntrack.flows(family, port):
        if is_stale(flow):
            stale.append(flow)
            if len(stale) == MANY_FLOWS and family == 4 and port:
                places = {(flow.destination, flow.target) for flow in stale}
                if all(conntrack.forget(port, *place) for place in places):
                    return True
    conntrack.forget_each(stale)
    return False


def interface_to(family: int, ip: str) -> str:
    """The name of the interface that a container's address is directly behind.

    "" where it cannot be reached yet, from here or from anywhere.
    """
    try:
        return if_indextoname(route_interface(family, ip))
    except OSError:
        return ""


def _localnet(interface: str) -> str:
    return f"/proc/sys/net/ipv4/conf/{interface}/route_localnet"


def _handle(chain: dict[int, bytes]) -> int:
    return int.from_bytes(chain.get(2, b""), "big")  # NFTA_CHAIN_HANDLE


def _is_interface(name: str) -> bool:
    try:
        return bool(if_nametoindex(name))
    except OSError:
        return False


def _read(path: str, size: int = 1) -> bytes:
    """The first bytes of a file, b"" where there is no such file."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return posix.read(fd, size)
    finally:
        posix.close(fd)


_modules: "dict[str, object]" = sys.modules  # type: ignore[assignment]  # any object can be one


class _Later:
    """Stands for a module until something is asked of it that is not among what is `known` of it."""

    __spec__ = None  # import asks for this

    def __init__(self, module: str, /, **known: object) -> None:
        self._module = module
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> object:
        self.step_aside()
        return getattr(__import__(self._module), name)

    def step_in(self) -> None:
        """Be the module, for whoever imports it now, if nobody has before."""
        _modules.setdefault(self._module, self)

    def step_aside(self) -> None:
        """Be it no more."""
        if _modules.get(self._module) is self:
            del _modules[self._module]


def _import(name: str) -> "ModuleType":
    """nftables or ctypes, less 8 ms: the one imports json, the other os, for calls that we never make."""
    later = _Later("json"), _Later("os", name="posix", fspath=posix.fspath)
    for module in later:
        module.step_in()
    try:
        return __import__(name)
    finally:
        for module in later:
            module.step_aside()


def _say_nothing(_: object) -> None:
    pass


def _answer_if_it_exits() -> None:
    """libnftables ends the process where it gets no socket or no memory; the runtime shall have its answer even so.

    on_exit(3) is called by exit(3) only: this plugin itself ends with _exit.
    """
    import ctypes
    if not _at_exit:
        error = CniError(NFT_REFUSED, "libnftables gave up; its reason is on standard error", "nothing was written")
        _at_exit.append(ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(lambda *_: give_up(error)))
        ctypes.CDLL(None).on_exit(_at_exit[0], None)


_at_exit: list[object] = []  # kept for as long as C may call it


def _record(comments: "Iterable[str]") -> str:
    """The owner's record at the head of a chain: the comments up to the first rule without one."""
    record = []
    for comment in comments:
        if not comment:
            break
        record.append(comment)
    return "".join(record)


def leave() -> None:
    """Let the kernel close this process's netlink sockets, without waiting for it.

    After a transaction that deleted something, closing takes 11 to 13 ms (an RCU grace period), though its effect
    is there at once. So the sockets go into a message to a socket pair that nothing but that message refers to:
    the kernel's collector of such cycles (unix_gc, a worker of its own since Linux 6.9) closes them. Older kernels
    collect at once, and this costs what an ordinary close does. No process is left behind.
    """
    try:
        sockets = [fd for fd in range(3, 32) if _is_socket(fd)]
        if sockets:
            near, far = socketpair(AF_UNIX, SOCK_DGRAM)
            near.sendmsg([b"close"], [(SOL_SOCKET, SCM_RIGHTS, pack(f"={len(sockets) + 1}i", far.fileno(), *sockets))])
            for fd in sockets:
                posix.close(fd)
            far.close()  # it lives on in its own message,
            near.close()  # and the end of a socket like this one wakes the collector
    except OSError:
        pass  # then they close when the process ends


def _is_socket(fd: int) -> bool:
    try:
        return posix.fstat(fd).st_mode & 0o170000 == 0o140000
    except OSError:
        return False
