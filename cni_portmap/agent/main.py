"""The loop: listens, and hands on what it hears."""
import asyncio
import contextlib
import gc
import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

from .. import ruleset
from ..attachment import Attachment
from ..cni import IO_FAILURE, CniError, name_process
from ..libcni_cache import CACHE_DIRS
from ..libcni_cache import Memory as Cache
from ..linux import companion, system_error
from ..linux.events import BUFFER, Commit
from ..linux.kernel import Kernel
from ..verbs.delete import remove
from ..verbs.flows import delete_flows_to
from ..verbs.restore import prune, restore
from . import children, redirect
from .forward import Forward
from .heal import NO_MEMORY, READ_POLL, Healer
from .memory import Memory, noted_in, owners_of
from .metrics import Server
from .notify import notify, watchdog_seconds
from .permits import Permit, permits_in
from .reserve import DELAY, Claim, Reserve, claim
from .witness import Witness

LOOKS = (2, 10, 60)  # seconds after a transaction of ours, for libcni's files: it writes them after the last plugin
ASKS = (0, 2, 12, 72)  # seconds after an attachment is to be forwarded to, for its file
ASK_SECONDS = 1  # however many come, there is one look in that time
AUDITS = (1.5, 5, 15)  # seconds after a heal
TELL_AGAIN = 1  # seconds
BRIDGE_SECONDS = 5
SETTLED = 2  # seconds for which a file of libcni's must stay the same: it removes it after the plugin's DEL


class Options(NamedTuple):
    """The options of `cni-portmap agent`. `cache`: results folders of libcni; `buffer`: bytes."""

    metrics: str = ""
    gc_seconds: float = 0
    cache: Sequence[str] = CACHE_DIRS
    buffer: int = BUFFER
    reserve: bool = False
    forward: bool = False


def _words_of(error: object) -> str:
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, CniError):
        return f"{error.msg} {error.details}".rstrip()
    return str(error) if isinstance(error, OSError) else f"internal error: {error!r}; please report it"


def log(line: str) -> None:
    """A line for the journal."""
    print(f"cni-portmap agent: {line}", file=sys.stderr, flush=True)


async def _telling(work: Coroutine[Any, Any, None]) -> None:
    """Do something; where it fails, tell why."""
    try:
        await work
    except (CniError, OSError, MemoryError) as error:
        log(_words_of(error))


async def _every(seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do something again and again; what fails is tried again the next time."""
    while True:
        await asyncio.sleep(seconds)
        await _telling(work())


class Agent:
    """One run of the agent. `name`: its own, by which it is asked."""

    def __init__(self, options: Options, name: companion.Name) -> None:
        self._options, self._asked = options, name.socket
        self._asked.setblocking(False)
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            self._memory = Memory(ruleset.TABLE_NAME)
            memories = [self._memory, *([Memory(redirect.NAME)] if options.forward else [])]
            self._witness = Witness(options.cache, self._memory)
            self._healer = Healer(memories, self._witness, options.buffer, log)
        except OSError as error:
            raise system_error("cannot listen to nf_tables", error) from None
        self._healer.on_commit, self._healer.on_heal = self._on_commit, self._on_heal
        self._healer.on_wish = self._stop_restoring
        self._healer.on_overrun = lambda: self._start(self._resync())
        self._dead: dict[str, int] = {}  # chain -> handle, of those that looked dead the last time
        self._looking: asyncio.Task[None] | None = None
        self._resyncing = False
        self._noted: dict[str, str] = {}  # interfaces that were noted before the table had to be read again
        self._restoring: set[asyncio.Task[None]] = set()
        self._reserve = Reserve(log) if options.reserve or options.forward else None
        self._forward: Forward | None = None
        self._permitted: dict[str, list[tuple[Claim, Permit]]] = {}  # by chain
        self._published: set[Claim] = set()  # by the table
        self._ask: dict[str, list[float]] = {}  # chains whose files are to be read, each with the times to try
        self._asking: asyncio.Task[None] | None = None
        self._redirected: tuple[frozenset[Claim], bool] | None = None
        self._writing: asyncio.Handle | None = None
        self._server = Server(options.metrics, self._counters) if options.metrics else None

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(_telling(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- from start to end ---

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda _, context: log(_words_of(context.get("exception") or context["message"])))
        if self._server:
            await self._server.start()
        reading = loop.create_task(self._healer.read())

        def end() -> None:
            ended.set()
            reading.cancel()  # it waits while somebody else has the lock
        for each in signal.SIGTERM, signal.SIGINT:
            loop.add_signal_handler(each, end)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        with contextlib.suppress(asyncio.CancelledError):
            await reading
            self._begin()
        await ended.wait()
        notify("STOPPING=1")
        for task in self._tasks:
            task.cancel()
        children.end_all()
        if self._server:
            self._server.stop()
        if self._reserve:
            self._reserve.close()
        if self._forward:
            self._forward.close()
            if self._writing:
                self._writing.cancel()
            Kernel().delete_table(redirect.NAME)

    def _begin(self) -> None:
        """Listen, and say so: the table is known."""
        loop = asyncio.get_running_loop()
        if self._options.forward and self._reserve:
            self._forward = Forward(log)
            self._reserve.opened, self._reserve.closed = self._opened, self._closed
            self._ask_libcni([name for name in self._memory.chains if ruleset.is_attachment_chain(name)], 0)
        gc.collect()
        gc.freeze()  # what is known from the start is not looked through again,
        gc.set_threshold(100_000, 50, 100)  # nor are the thousands of messages of a heal
        loop.add_reader(self._healer.listener.fileno(), self._healer.hear)
        loop.add_reader(self._asked.fileno(), self._accept)
        self._reserve_changed(0)
        self._tell("READY=1", f"STATUS={len(self._memory.chains)} chains known")
        log(f"keeps {sum(1 for name in self._memory.chains if '/' in name)} attachments")
        self._start(self._restore())
        if self._forward:
            self._start(_every(BRIDGE_SECONDS, self._look_at_bridges))
        if self._options.gc_seconds:
            self._start(_every(self._options.gc_seconds, self._gc))
        if watchdog_seconds():
            self._start(_every(watchdog_seconds(), self._beat))

    def _reserve_changed(self, delay: float = DELAY, again: bool = False) -> None:
        """Reserve what came, and let go of what went; `again`: what came was read again, and may be held already."""
        changed = self._memory.take_changed()
        if not self._reserve or not changed:
            return
        came: list[Claim] = []
        went: list[Claim] = []
        for name, key in changed:
            each = claim(name, key)
            if each:
                its = self._memory.sets.get(name)
                if not (its and key in its.elements):
                    went.append(each)
                elif not (again and each in self._published):
                    came.append(each)
        self._published.difference_update(went)
        self._published.update(came)
        self._reserve.drop(went)
        if self._forward:
            self._forward.forbid((*went, *came))
            self._ask_about(changed, went)
        self._reserve.want(came, delay)

    def _ask_about(self, changed: set[tuple[str, bytes]], went: list[Claim]) -> None:
        """Forward no more what has gone, and ask libcni's files about what came."""
        for name in [name for name in self._permitted if name not in self._memory.chains]:
            self._permit(name, [])
        self._allow_others(went)
        names: set[str] = set()
        for name, key in changed:
            its = self._memory.sets.get(name)
            names.update(owners_of(its.elements[key]) if its and key in its.elements else ())
        self._ask_libcni(names, DELAY)
        self._write_table()

    def _ask_libcni(self, names: Iterable[str], delay: float) -> None:
        """Read the files of containers that came: libcni writes them after the last plugin, some time after ADD."""
        now = asyncio.get_running_loop().time()
        self._ask.update({name: [now + delay + seconds for seconds in ASKS] for name in names})
        if self._ask and (self._asking is None or self._asking.done()):
            self._asking = self._start(self._read_files())

    async def _read_files(self) -> None:
        """Read the files that are due, once a second, until none is."""
        while self._ask:
            now = asyncio.get_running_loop().time()
            later = {name: times[1:] for name, times in self._ask.items() if times[0] <= now}
            for name, times in later.items():
                if times and name in self._memory.chains:
                    self._ask[name] = times
                else:
                    del self._ask[name]
            files = self._witness.files(later)
            try:
                found = await children.in_child("forward", lambda: permits_in(files)) if files else {}  # noqa: B023
            except (CniError, OSError, MemoryError) as error:
                log(_words_of(error))
                found = {}
            for name, permits in found.items():
                if name in self._memory.chains and self._ask.get(name, []) == later[name]:  # else it came again
                    if permits is not None:
                        self._ask.pop(name, None)
                    self._permit(name, [((family, protocol, host_ip, port), Permit(*its))
                                        for (family, protocol, host_ip, port), its in permits or ()])
            if found:
                self._write_table()
            await asyncio.sleep(ASK_SECONDS)

    def _permit(self, chain: str, permits: list[tuple[Claim, Permit]]) -> None:
        """Forward this for the container of a chain, in place of what was before. What stays the same goes on."""
        assert self._forward is not None
        assert self._reserve is not None
        gone = [each for each, permit in self._permitted.pop(chain, [])
                if (each, permit) not in permits and self._forward.permits.get(each) == permit]
        self._forward.forbid(gone)
        self._reserve.drop(each for each in gone if each not in self._published)
        if permits:
            self._permitted[chain] = permits
        self._allow(permits)
        self._allow_others(gone)

    def _allow(self, permits: list[tuple[Claim, Permit]]) -> None:
        """Forward this, where nobody publishes what would be forwarded across families."""
        assert self._forward is not None
        assert self._reserve is not None
        for each, permit in permits:
            if permit.cross == (each not in self._published) and self._forward.permits.get(each) != permit:
                self._forward.permits[each] = permit
                if permit.cross or each[1] == "udp":  # another socket; or one that is read from now on
                    self._reserve.want([each], 0)

    def _allow_others(self, claims: Iterable[Claim]) -> None:
        """Forward what has become free of these for a container that could not have it until now."""
        assert self._forward is not None
        free = {*claims}.difference(self._forward.permits)
        if free:
            self._allow([(each, permit) for permits in self._permitted.values() for each, permit in permits
                         if each in free])

    def _opened(self, each: Claim, sock: socket.socket) -> None:
        assert self._forward
        self._forward.opened(each, sock)
        self._write_table()

    def _closed(self, sockets: list[tuple[Claim, socket.socket]]) -> None:
        assert self._forward
        self._forward.closed(sockets)
        self._write_table()

    def _write_table(self) -> None:
        """Once for all that changes now."""
        if self._writing is None:
            self._writing = asyncio.get_running_loop().call_soon(self._write_table_now)

    def _write_table_now(self) -> None:
        """Lead clients to the sockets that are held, and nobody to a socket of somebody else."""
        assert self._forward
        assert self._reserve
        self._writing = None
        wanted = frozenset(each for each, permit in self._forward.permits.items()
                           if not permit.cross and each in self._reserve.sockets), redirect.needs_localhost()
        if wanted != self._redirected:
            Kernel().transact(redirect.text(*wanted))
            self._redirected = wanted

    async def _look_at_bridges(self) -> None:
        """Whether NAT can serve ::1 may change at any time, as when a cluster's agent starts."""
        self._write_table()

    def _tell(self, *lines: str) -> None:
        """Tell the service manager; later, where it has no ear at the moment."""
        if not notify(*lines):
            asyncio.get_running_loop().call_later(TELL_AGAIN, self._tell, *lines)

    async def _beat(self) -> None:
        notify("WATCHDOG=1")

    def _reload(self) -> None:
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        self._start(self._resync("READY=1"))

    async def _resync(self, *lines: str) -> None:
        """Read the table again, and restore what libcni's files prove."""
        if not self._resyncing:
            self._resyncing = True
            self._noted |= noted_in(self._memory)
            try:
                while not await self._read_again():
                    await asyncio.sleep(READ_POLL)
            finally:
                self._resyncing = False
            self._reserve_changed(again=True)
        if lines:
            self._tell(*lines)
        self._healer.hear()
        await self._restore()

    async def _read_again(self) -> bool:
        """Whether the table was read: without that the agent hears nothing, so it is tried until it is."""
        try:
            await self._healer.read()
            return True
        except (CniError, OSError, MemoryError) as error:
            log(f"cannot read the table (yet): {_words_of(error)}")
            return False

    async def _restore(self) -> None:
        """Publish what libcni's files prove and the kernel does not hold: nobody was heard to remove it."""
        if self._healer.resting:
            return
        noted, self._noted = self._noted, {}
        task = asyncio.current_task()
        assert task
        self._restoring.add(task)  # an administrator may wish it away meanwhile
        try:
            report = await children.in_child("restore", lambda: restore_settled(self._options.cache, noted))
        finally:
            self._restoring.discard(task)
        for line in report:
            log(line)

    def _stop_restoring(self) -> None:
        for task in self._restoring:
            task.cancel()

    # --- what others ask ---

    def _accept(self) -> None:
        try:
            connection, _ = self._asked.accept()
        except OSError:
            return
        self._start(self._answer(connection))

    async def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(TimeoutError):  # it asks nothing
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(companion.SECONDS):
                word = (await loop.sock_recv(connection, 256)).decode(errors="replace").strip()
                answer = self._status()
                if word == "resume":
                    self._healer.resume()
                    log("resumes healing")
                    self._start(self._restore())
                elif word.startswith("yield ") and self._reserve:
                    try:
                        family, protocol, host_ip, port = word.split()[1:]
                        answer["yielded"] = self._reserve.yield_to(int(family), protocol, host_ip.strip("*"), int(port))
                    except ValueError:  # another version's words
                        return
                await loop.sock_sendall(connection, json.dumps(answer).encode())

    def _status(self) -> dict[str, object]:
        return {"resting": self._healer.resting, "restores": self._healer.restores,
                "reserved": len(self._reserve.sockets) if self._reserve else 0,
                "forwarded": [[*each, permit.ip, permit.port] for each, permit in sorted(self._forward.permits.items())
                              if permit.cross] if self._forward else []}

    def _counters(self) -> dict[str, tuple[str, int]]:
        forwarded = {"forwarded_total": ("Connections and UDP sessions that the agent forwarded.",
                                         self._forward.forwarded)} if self._forward else {}
        return {**forwarded, "restores_total": ("Heals that wrote something.", self._healer.restores),
                "foreign_deletions_total": ("Transactions of other processes that deleted from table "
                                            f"{ruleset.TABLE}.", self._healer.foreign_deletions)}

    # --- what is heard ---

    def _on_commit(self, each: Commit, own: bool) -> None:
        if own and ruleset.TABLE_NAME in each.messages:
            self._reserve_changed(again=self._resyncing)
        if own and ruleset.TABLE_NAME in each.messages and (self._looking is None or self._looking.done()):
            self._looking = self._start(self._look())

    async def _look(self) -> None:
        waited = 0
        for seconds in LOOKS:
            await asyncio.sleep(seconds - waited)
            waited = seconds
            self._witness.look()

    def _on_heal(self, chains: list[str], elements: list[tuple[str, bytes]]) -> None:
        self._start(self._audit([name for name in chains if ruleset.is_attachment_chain(name)]))
        sets = self._memory.sets
        claimed: dict[str, list[tuple[str, bytes]]] = {}
        for name, key in elements:  # exposure has maps too, of addresses
            raw = sets[name].elements.get(key, b"") if name in sets and name in ruleset.MAPS else b""
            for chain in owners_of(raw):
                claimed.setdefault(chain, []).append((name, key))
        self._start(self._forget_flows(claimed))

    async def _forget_flows(self, claimed: dict[str, list[tuple[str, bytes]]]) -> None:
        """Forget flows without connections that began while nothing was published."""
        await children.in_child("flows", lambda: delete_flows_to(claimed, Kernel()))

    async def _audit(self, healed: list[str]) -> None:
        """Remove what was deleted while nothing was published: that DEL found nothing, and committed nothing."""
        waited = 0.0
        for seconds in AUDITS:
            await asyncio.sleep(seconds - waited)
            waited = seconds
            await _telling(self._audit_once(healed))

    async def _audit_once(self, healed: list[str]) -> None:
        deleted = self._witness.gone(healed)
        handles = {name: chain.first for name, chain in self._memory.chains.items()}
        for line in await children.in_child("gc", lambda: audit(healed, deleted, handles)):
            log(line)

    # --- the dead ---

    async def _gc(self) -> None:
        removed, self._dead = await children.in_child("gc", lambda: collect(self._dead))
        for line in removed:
            log(line)


# --- in children ---

def restore_settled(folders: Sequence[str], noted: dict[str, str]) -> list[str]:
    """Publish what libcni's files prove; what was done, in lines. A file that changes meanwhile proves nothing.

    `noted`: interfaces that were noted in the table, and the comments: what is open of them is guarded again.
    """
    kernel = Kernel()
    cache = Cache(folders, "portmap", kernel)
    live = [found for _, found in cache.found if isinstance(found, Attachment)]
    lost, _ = restore(live, kernel, True, cache.is_current)
    if not lost:
        restore([], kernel, noted=noted)  # what is open without a container that lives has its guard, too
        kernel.leave()
        return []
    time.sleep(SETTLED)
    lost, refused = restore(live, kernel, False, cache.is_current, noted=noted)
    kernel.leave()
    return [f"restored container {each.container_id}, interface {each.ifname}, from libcni's file" for each in lost] + \
        [f"cannot restore container {each.container_id}: {error.msg}" for each, error in refused]


def audit(healed: list[str], deleted: list[str], handles: dict[str, int]) -> list[str]:
    """Remove those of what was healed whose container is gone, or which its runtime has deleted; in lines."""
    kernel = Kernel()
    if deleted:
        remove(deleted, kernel, handles)
    found, _ = prune(kernel, among={name: handles.get(name, 0) for name in healed})
    kernel.leave()
    return [f"removed chain {name}: its runtime has deleted it" for name in deleted] + \
        [f"removed {owner}: {why}" for owner, (state, why) in found if state == "dead"]


def collect(before: dict[str, int]) -> tuple[list[str], dict[str, int]]:
    """Remove the dead that were dead already, see `prune`; in lines, and all that are dead by now."""
    kernel = Kernel()
    found, _ = prune(kernel, dry_run=True)
    dead = {owner.chain: owner.handle for owner, (state, _) in found if state == "dead"}
    both = {chain: handle for chain, handle in dead.items() if before.get(chain) == handle}
    if not both:
        return [], dead
    removed, _ = prune(kernel, among=both)
    kernel.leave()
    return [f"removed {owner}: {why}" for owner, (state, why) in removed if state == "dead"], dead


def run(options: Options) -> int:
    """Run an agent until it is told to end; the exit status."""
    name_process("agent")
    name = companion.take()
    if name is None:
        raise CniError(IO_FAILURE, "an agent runs already in this network namespace", f"see: ps {companion.holder()}")
    try:
        asyncio.run(Agent(options, name).run())
    except OSError as error:
        raise system_error("cannot read the table", error) from None
    except MemoryError:
        raise CniError(IO_FAILURE, NO_MEMORY, "see: MemoryMax= of the unit, and ulimit -v") from None
    finally:
        name.close()
    return 0
