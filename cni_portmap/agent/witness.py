"""libcni's files as a witness: an attachment whose file was seen, and has gone, was deleted by its runtime.

A DEL that meets a flushed table finds nothing to remove and commits nothing, so it cannot be heard.
"""
import os
from collections.abc import Collection, Iterable, Sequence

from ..linux.table import record_in
from ..ruleset import Owner, is_attachment_chain
from .memory import Memory

LOOKS = 8  # the agent looks three times after a transaction, and as often again if it forwards


class Witness:
    """Looks at libcni's `folders` for the attachments that are in a memory."""

    def __init__(self, folders: Sequence[str], memory: Memory) -> None:
        self._folders, self._memory = folders, memory

    def look(self, only: Iterable[str] | None = None) -> None:
        """Note whose files are there. What was looked for in vain a few times has none, and is looked for no more.

        `only`: these chains; None for all.
        """
        folders = [(folder, identity) for folder in self._folders if (identity := _identity(folder))]
        chains = self._memory.chains
        for name in (chains if only is None else chains.keys() & set(only)) if folders else ():
            chain = chains[name]
            looks = chain.seen or 0
            if isinstance(looks, int) and looks < LOOKS and is_attachment_chain(name):
                file = self._file_of(name)
                chain.seen = next(((folder, identity, file) for folder, identity in folders
                                   if "/" not in file and os.path.lexists(f"{folder}/{file}")), looks + 1)

    def files(self, chains: Collection[str]) -> list[tuple[str, str]]:
        """Those of these chains whose file was seen, each with its path."""
        self.look(chains)
        found = ((name, getattr(self._memory.chains.get(name), "seen", None)) for name in chains)
        return [(name, os.path.join(seen[0], seen[2])) for name, seen in found if isinstance(seen, tuple)]

    def gone(self, chains: Iterable[str]) -> list[str]:
        """Those of these chains whose file was seen and is no more, in a folder that is still the same."""
        there = {folder: _names(folder) for folder in self._folders}
        found = []
        for name in chains:
            seen = getattr(self._memory.chains.get(name), "seen", None)
            if isinstance(seen, tuple):
                folder, identity, file = seen
                now = there[folder]
                if now and now[0] == identity and file not in now[1]:
                    found.append(name)
        return found

    def _file_of(self, name: str) -> str:
        """The name that libcni gives the file of an attachment: libcni/api.go, getCacheFilePath."""
        owner = Owner(name, record_in(self._memory.comments(name)))
        return f"{owner.network}-{owner.container_id}-{owner.ifname}"


def _identity(folder: str) -> tuple[int, int] | None:
    """What identifies a folder; None where there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _names(folder: str) -> tuple[tuple[int, int], set[str]] | None:
    """What identifies a folder, and the names in it; None where it cannot be read."""
    try:
        identity = _identity(folder)
        return (identity, {*os.listdir(folder)}) if identity else None
    except OSError:
        return None
