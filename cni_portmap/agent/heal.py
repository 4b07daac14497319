"""Writes again what others delete of our table: at once, and then less and less often while they go on.

Others may write at any time, so each transaction says which ruleset it was made for, and is made again where that has
changed. Our own calls are kept out by the plugin's lock.
"""
import asyncio
import errno
import time
from collections.abc import Callable, Iterable, Sequence

from .. import ruleset
from ..cni import PROCESS_NAME, CniError
from ..linux import read
from ..linux.events import Commit, Listener, Message, Overrun, commit, generation, read_table
from ..linux.kernel import Lock
from ..linux.netlink import NETLINK_NETFILTER, Socket, attributes, named
from ..linux.table import NFGENMSG, NFT_MSG_GETTABLE, NFTA_DATA_VALUE, NFTA_SET_ELEM_KEY
from .memory import NFT_MSG_DELTABLE, Memory, elements_in, elements_message, owners_of
from .witness import Witness

OWN_BEFORE = ("portmap", "cni-portmap")  # the names of the processes of 0.1
AT_ONCE = 3  # heals
PAUSES = (1, 2, 4, 8, 15)  # seconds, for those that follow
CALM = 60  # seconds without a deletion, after which the next is answered at once again
WISH_SECONDS = 60
TRIES = 50  # to catch up with those who write
LOCK_POLL = 0.01  # seconds
READ_POLL = 1  # seconds, from a vain attempt to read the table to the next
NO_MEMORY = "not enough memory"


def is_own(name: str) -> bool:
    """Whether a process is one of ours, by its name."""
    return name.startswith(PROCESS_NAME) or name in OWN_BEFORE


class Healer:
    """The memory of our tables, and its keeper. `memories`: that of the plugin's table first.

    `restores`, `foreign_deletions`: counters; `resting`: whether an administrator wishes the table away.
    `on_commit(commit, own)`: told of each transaction; `on_heal(chains, elements)`: of each heal, with the chains that
    it wrote again and the map elements; `on_overrun()`: that transactions were not heard; `on_wish()`: of that wish.
    """

    def __init__(self, memories: Sequence[Memory], witness: Witness, buffer: int, log: Callable[[str], None]) -> None:
        self.memories, self._witness, self._log = memories, witness, log
        self.restores = self.foreign_deletions = 0
        self.resting = False
        self.on_commit: Callable[[Commit, bool], object] = _pass
        self.on_heal: Callable[[list[str], list[tuple[str, bytes]]], object] = _pass
        self.on_overrun: Callable[[], object] = _pass
        self.on_wish: Callable[[], object] = _pass
        self.listener = Listener([memory.name for memory in memories], buffer)
        self._netlink = Socket(NETLINK_NETFILTER)
        self._port = self._netlink.port()
        self._heard = 0  # the generation of the last transaction that was heard
        self._wishes: list[float] = []
        self._answered: list[float] = []  # when there was something to heal, since it was last calm
        self._healing: asyncio.Task[None] | None = None
        self._overrun = False

    # --- hearing ---

    async def read(self) -> None:
        """Become what the kernel holds: at the start, and where transactions were not heard. The lock is held.

        It is tried until the ruleset holds still for that long. Raises OSError, MemoryError.
        """
        tried = 0
        while not await self._read():
            tried += 1
            if tried == 3:
                self._log("the ruleset keeps changing: cannot read the table yet")
            await asyncio.sleep(LOCK_POLL if tried < 3 else READ_POLL)
        self._witness.look()

    async def _read(self) -> bool:
        """Whether that is what the kernel holds: nobody wrote while it was read, and all that followed was heard."""
        lock = await self._lock()
        try:
            self._overrun = True  # until all is known
            for _ in range(TRIES):
                self._drain()
                before = generation(self._netlink)
                tables = [read_table(self._netlink, memory.name) for memory in self.memories]
                if generation(self._netlink) == before:
                    break
            else:
                return False
            for memory, messages in zip(self.memories, tables, strict=True):
                memory.read(messages)
            self._heard, self._overrun = before, False
            self._drain(until=before)
            return not self._overrun
        except BaseException:
            self._overrun = True
            raise
        finally:
            lock.release()

    def _drain(self, until: int = -1) -> None:
        """Pass over what is known by now: transactions up to a number, or all."""
        while True:
            try:
                for each in self.listener.commits():
                    if until >= 0 and _is_after(each.generation, until):
                        self._take(each)
                return
            except Overrun:
                self._overrun = self._overrun or until >= 0

    def hear(self) -> None:
        """Take in what has happened since the last time."""
        self._take_all()
        if self._overrun:
            return
        if any(memory.damaged for memory in self.memories) and not self._healing and not self.resting:
            self._healing = asyncio.get_running_loop().create_task(self._heal_in_time())

    def _take_all(self) -> None:
        try:
            for each in self.listener.commits():
                self._take(each)
        except Overrun:
            self._lose_track("the netlink buffer was too small")
        except MemoryError:  # in the middle of a transaction
            self._lose_track(NO_MEMORY)

    def _take(self, each: Commit) -> None:
        if self._overrun:
            return
        if each.generation != (self._heard + 1 & 0xffffffff or 1):
            self._lose_track(f"transactions {self._heard + 1} to {each.generation - 1} were not heard")
            return
        self._heard = each.generation
        own = is_own(each.name)
        deleted = 0
        for memory in self.memories:
            if memory.name in each.messages:
                deleted += memory.apply(each.messages[memory.name], own, each.port == self._port)
        if deleted:
            self.foreign_deletions += 1
            self._look_for_a_wish(each)
        self.on_commit(each, own)

    def _lose_track(self, why: str) -> None:
        if not self._overrun:
            self._overrun = True
            self._log(f"{why}: reading the table again, and what libcni's files prove")
            self.on_overrun()

    def _look_for_a_wish(self, each: Commit) -> None:
        """`nft delete table inet cni_portmap`, twice in a minute, is what an administrator wants."""
        ours = self.memories[0].name
        if each.name != "nft" or each.elsewhere or [*each.messages] != [ours] or \
                not any(kind == NFT_MSG_DELTABLE for kind, _, _ in each.messages[ours]):
            return
        if b"flush" in _words_of(each.pid):  # where there is no other table, a flush of all looks the same
            return
        now = time.monotonic()
        self._wishes = [at for at in self._wishes if now - at < WISH_SECONDS] + [now]
        if len(self._wishes) > 1:
            self.resting = True
            self.on_wish()
            self._log(f"nft has deleted table {ruleset.TABLE} alone, twice within {WISH_SECONDS} s: it stays deleted; "
                      "to heal again: cni-portmap agent --resume")

    def resume(self) -> None:
        """Heal again, whatever an administrator has wished before."""
        self.resting, self._wishes = False, []
        self.hear()

    # --- healing ---

    def _pause(self) -> float:
        """How many seconds to wait before the next heal."""
        now = time.monotonic()
        if self._answered and now - self._answered[-1] > CALM:
            self._answered = []
        late = len(self._answered) - AT_ONCE
        if late < 0:
            return 0
        return max(0.0, self._answered[-1] + PAUSES[min(late, len(PAUSES) - 1)] - now)

    async def _heal_in_time(self) -> None:
        try:
            while any(memory.damaged for memory in self.memories) and not self._overrun and not self.resting:
                pause = self._pause()
                if pause:
                    await asyncio.sleep(pause)
                self._answered.append(time.monotonic())
                try:
                    await self.heal()
                except (CniError, OSError, MemoryError) as error:
                    self._log(f"cannot heal (yet): {str(error) or NO_MEMORY}")
        finally:
            self._healing = None
        self.hear()

    async def _lock(self) -> Lock:
        lock = Lock()
        while not lock.attempt():
            await asyncio.sleep(LOCK_POLL)
        return lock

    async def heal(self) -> None:
        """Write what is lost. Raises OSError where the kernel does not take it."""
        began = time.monotonic()
        lock = await self._lock()
        words: list[str] = []
        chains: list[str] = []
        elements: list[tuple[str, bytes]] = []
        try:
            for memory in self.memories:
                if self._catch_up() and not memory.is_whole():
                    its_chains, its_elements = self._heal(memory, words)
                    if memory is self.memories[0]:
                        chains, elements = its_chains, its_elements
                if not (self._overrun or self.resting):  # else it is still to be done
                    memory.damaged = False
        finally:
            lock.release()
        if chains or elements or words:
            self.restores += 1
            self._log(f"restored {len(chains)} chains and {len(elements)} map elements in "
                      f"{time.monotonic() - began:.2f} s")
            self.on_heal(chains, elements)
        for each in words:
            self._log(each)

    def _catch_up(self) -> bool:
        """Hear all that has happened; False where that is not to be had. Under the lock, so only others write."""
        for _ in range(TRIES):
            self._take_all()
            if self._overrun or self.resting:
                return False
            if generation(self._netlink) == self._heard:
                return True
            time.sleep(0.001)
        raise OSError(errno.EAGAIN, "the ruleset keeps changing")

    def _heal(self, memory: Memory, words: list[str]) -> tuple[list[str], list[tuple[str, bytes]]]:
        """Write what a memory lacks, the guard first; the chains that were lost, and the map elements."""
        for name in self._witness.gone([name for name, chain in memory.chains.items() if not chain.handle]):
            memory.forget_owner(name)
        _respect_new_owners(memory)
        chains = [name for name, chain in memory.chains.items() if not chain.handle or chain.lost]
        elements = [(name, key) for name, key, _ in memory.lost_elements()]
        for shared_only in (True, False):
            for _ in range(TRIES):
                if not self._catch_up():
                    return [], []
                messages = [*memory.missing(shared_only)]
                if not messages or self._write(memory, messages, words):
                    break
            else:
                raise OSError(errno.EAGAIN, "the ruleset keeps changing")
        return chains, elements

    def _write(self, memory: Memory, messages: list[Message], words: list[str]) -> bool:
        """Write messages but those that are refused; False where the ruleset has changed, so that they may be wrong."""
        if not memory.handle and \
                self._netlink.ask_each(NFT_MSG_GETTABLE, [NFGENMSG + named(1, memory.name)])[0] is not None:
            # It is others' copy, such as a backup of long ago.
            messages.insert(0, (NFT_MSG_DELTABLE, 0, NFGENMSG + named(1, memory.name)))
        for _ in range(4):
            refused = commit(self._netlink, self._heard, messages)
            if not refused:
                return True
            if -1 in refused:
                if refused[-1] == errno.ERESTART:
                    return False
                raise OSError(refused[-1], errno.errorcode.get(refused[-1], "refused"))
            messages = [*_without(memory, messages, refused, words)]
            if not messages:  # an empty transaction would have no answer
                return True
        raise OSError(errno.EINVAL, "the kernel refuses what it had before")


def _words_of(pid: int) -> bytes:
    """The command line of a process, b"" where it has ended or cannot be seen."""
    try:
        return read(f"/proc/{pid}/cmdline", 4096)
    except OSError:
        return b""


def _pass(*_: object) -> None:
    pass


def _is_after(one: int, other: int) -> bool:
    return 0 < (one - other & 0xffffffff) < 1 << 31


def _without(memory: Memory, messages: list[Message], refused: dict[int, int], words: list[str]) -> "Iterable[Message]":
    """The messages that were not refused. Of elements each becomes a message of its own first."""
    for place, message in enumerate(messages):
        kind, _, body = message
        if place not in refused:
            yield message
            continue
        found = [*elements_in(body)]
        if len(found) > 1:
            name = dict(attributes(body, 4))[2][:-1].decode()  # NFTA_SET_ELEM_LIST_SET
            for _, raw in found:
                yield from elements_message(memory.name, name, [raw])
        else:
            words.append(f"a part of table {memory.name} stays lost: {errno.errorcode.get(refused[place], '')} for "
                         f"message {kind & 0xff}; see cni-portmap list, and CHECK")


def _respect_new_owners(memory: Memory) -> None:
    """Forget lost elements whose port, or a port that overlaps with it, has got another owner meanwhile."""
    alive: dict[tuple[bool, int, bytes], set[str]] = {}  # whether for every address, family, protocol and port
    for name in ruleset.MAPS:
        its = memory.sets.get(name)
        for key, raw in its.elements.items() if its and its.handle else ():
            if its and key not in its.lost:
                alive.setdefault(_claim(name, raw), set()).update(map(_container, owners_of(raw)))
    if not alive:
        return
    for name, key, raw in [*memory.lost_elements()]:
        if name in ruleset.MAPS:
            every, family, ending = _claim(name, raw)
            others = alive.get((not every, family, ending), set()) - {*map(_container, owners_of(raw))}
            if others:
                memory.forget_element(name, key)


def _claim(name: str, raw: bytes) -> tuple[bool, int, bytes]:
    key = dict(attributes(dict(attributes(raw)).get(NFTA_SET_ELEM_KEY, b""))).get(NFTA_DATA_VALUE, b"")
    family, _, host, _ = ruleset.claim_of((name, key))
    return not host, family, key[ruleset.PROTOCOL_AND_PORT]


def _container(chain: str) -> str:
    """The part of a chain's name that says whose it is."""
    return chain.split("/")[1]


