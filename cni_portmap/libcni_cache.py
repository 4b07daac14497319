"""libcni's cache: a file for each attachment, with which lost ports can be published again.

libcni writes them at ADD and removes them at DEL (libcni/api.go, cachedInfo, kind cniCacheV1), in its results folder.
"""
import base64
import json
import os
import pathlib
import stat
from collections.abc import Iterable
from typing import Any

from . import ruleset
from .attachment import Attachment
from .cni import CniError, Request, environment_error
from .config import parse
from .linux.alive import DEAD
from .linux.kernel import Kernel


FILE_MAX = 32 << 20  # bytes; one with 65,535 mappings has 5 MB
# Where runtimes let libcni keep its files: podman and CRI-O, containerd, cnitool and nerdctl use the default.
CACHE_DIRS = ("/var/lib/cni/results", "/var/lib/cni/cache/results", "/run/cni/results")


class Skipped(Exception):
    """A cache file that leads to nothing that could be restored, and why."""


class Memory:
    """The content of libcni's cache: each file, the oldest first, with the attachment that it describes.

    `found`: each file with a live attachment (unknown counts as alive), or with the reason why not.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]] = CACHE_DIRS, plugin: str = "portmap",
                 kernel: Kernel | None = None) -> None:
        self._kernel = kernel or Kernel()
        self._files: dict[int, tuple[pathlib.Path, object]] = {}  # by the attachment's id
        files = [path for folder in folders for path in _entries(folder) if _is_regular(path)]
        documents = [(path, _identity(path), _load(path)) for path in sorted(files, key=_age)]
        users: dict[str, set[str]] = {}  # of an interface of the host: the containers whose results name it
        for _, _, document in documents:
            for name, container_id in _interfaces_of(document):
                users.setdefault(name, set()).add(container_id)
        read = [(path, identity, _read(document, plugin, self._kernel)) for path, identity, document in documents]
        for _, _, each in read:  # a link in several results belongs to the one whose namespace exists, or to none
            if isinstance(each, Attachment) and len(users.get(each.link.rpartition("#")[0], ())) > 1 and not each.inode:
                each.link = ""
        unseen = {str(id(each)): each.netns for _, _, each in read
                  if isinstance(each, Attachment) and not each.link and not each.inode}
        verdicts = self._kernel.judge(ruleset.Owner.of_namespace(name, netns) for name, netns in unseen.items())
        dead = {int(name): why for name, (state, why) in verdicts.items() if state == DEAD}
        self.found: list[tuple[pathlib.Path, Attachment | Skipped]] = []
        for path, identity, each in read:
            self._files[id(each)] = path, identity
            self.found.append((path, Skipped(dead[id(each)]) if id(each) in dead else each))

    def is_current(self, attachment: Attachment) -> bool:
        """Whether its file is still the same, and its link is there. Cannot hang, so the lock may be held."""
        path, identity = self._files[id(attachment)]
        return _identity(path) == identity and \
            (not attachment.link or self._kernel.has_link(attachment.link) is not False)


def _entries(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    try:
        return [*pathlib.Path(folder).iterdir()]
    except OSError:  # most runtimes have no such folder
        return []


def _is_regular(path: pathlib.Path) -> bool:
    """Whether it is a file that could be libcni's. No link is followed: where it leads, a look may block."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _load(path: pathlib.Path) -> Any:
    """The document in a file, or a Skipped that says why there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):  # it is another one by now
                raise ValueError("no regular file")
            raw = file.read(FILE_MAX + 1)
        if len(raw) > FILE_MAX:
            raise ValueError(f"larger than {FILE_MAX >> 20} MiB")
        return json.loads(raw)
    except Exception as error:
        return _not_ours(error)


def _not_ours(error: Exception) -> Skipped:
    return Skipped(f"not a file of libcni's cache: {type(error).__name__}: {error}")


def _interfaces_of(document: Any) -> list[tuple[str, str]]:
    """The interfaces of the host that a result names, each with its container."""
    try:
        found = [(interface["name"], document["containerId"]) for interface in document["result"]["interfaces"]
                 if not interface.get("sandbox")]
    except (TypeError, LookupError, AttributeError):
        return []
    return [pair for pair in found if all(type(text) is str for text in pair)]


def _read(document: Any, plugin: str, kernel: Kernel) -> Attachment | Skipped:
    if isinstance(document, Skipped):
        return document
    try:
        return _attachment(document, plugin, kernel)
    except Skipped as reason:
        return reason
    except CniError as error:
        return Skipped(f"{error.msg}; {error.details}")
    except Exception as error:
        return _not_ours(error)


def _identity(path: pathlib.Path) -> object:
    """A value that changes when a file is written again, None if the file is gone."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _age(path: pathlib.Path) -> tuple[float, str]:
    try:
        return path.lstat().st_mtime, path.name
    except OSError:  # a runtime has just removed it
        return 0, path.name


def _attachment(cache: dict[str, Any], plugin: str, kernel: Kernel) -> Attachment:
    if cache.get("kind") != "cniCacheV1":
        raise Skipped("not a file of libcni's cache")
    conflist = json.loads(base64.b64decode(cache["config"]))
    plugins = conflist.get("plugins", [conflist])
    config = next((entry for entry in plugins if entry.get("type") == plugin), None)
    arguments = cache.get("capabilityArgs") or {}
    if config is None or not arguments.get("portMappings") or \
            (config.get("capabilities") or {}).get("portMappings") is not True:
        raise Skipped("publishes nothing")
    result, ifname = cache["result"], cache["ifName"]
    netns = cache.get("netns") or next((interface["sandbox"] for interface in result.get("interfaces") or ()
                                        if interface.get("sandbox") and interface.get("name") == ifname), "")
    if not netns:
        raise Skipped("its network namespace is not known")
    config = {**config, "name": cache.get("networkName") or conflist["name"], "prevResult": result,
              "runtimeConfig": {"portMappings": arguments["portMappings"]}}
    if not all(type(text) is str for text in (cache["containerId"], netns, ifname)):
        raise Skipped("not a file of libcni's cache: containerId, netns and ifName are texts")
    environ = {"CNI_CONTAINERID": cache["containerId"], "CNI_NETNS": netns, "CNI_IFNAME": ifname,
               "CNI_ARGS": ";".join(f"{key}={value}" for key, value in cache.get("cniArgs") or ())}
    wrong = environment_error("ADD", environ)
    if wrong:
        raise wrong
    attachment = parse(Request("ADD", conflist.get("cniVersion", "0.1.0"), environ, config, json.dumps(result)))
    if not attachment.ports:
        raise Skipped(f"publishes nothing: its result has no address on {ifname} for these ports")
    attachment.inode = max(kernel.namespace_soon(netns), 0)
    attachment.link = _link(attachment, result, kernel)
    return attachment


def _link(attachment: Attachment, result: dict[str, Any], kernel: Kernel) -> str:
    """The host's end of a container's link, of those that its result names. Raises Skipped if it has gone.

    One with another hardware address than the result says is no witness, so the namespace is.
    """
    names = attachment.links
    link = kernel.link(names) if names else ""
    if names and not link and not kernel.has_interface(names[-1]):  # a bridge comes first
        raise Skipped(f"its interface {names[-1]} on this host is gone")
    name = link.rpartition("#")[0]
    for interface in result.get("interfaces") or ():
        address = interface.get("mac") if interface.get("name") == name and not interface.get("sandbox") else None
        if isinstance(address, str) and address and not kernel.has_address(link, address):
            if not attachment.inode:
                raise Skipped(f"its interface {name} on this host is gone; another one has its name")
            return ""
    return link
