"""libcni's cache: a file for each attachment, with which lost ports can be published again.

libcni writes them at ADD and removes them at DEL (libcni/api.go, cachedInfo, kind cniCacheV1), in its results folder.
The plugin reads them too, where the reference plugin has rules: so json, pathlib and typing are not loaded.
"""
import posix
from _socket import inet_pton
from binascii import a2b_base64

from . import ruleset
from .attachment import AF, Attachment
from .cni import CniError, Request, as_go_reads, decode, environment_error
from .config import parse
from .linux.alive import DEAD

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from .linux.kernel import Kernel

FILE_MAX = 32 << 20  # bytes; one with 65,535 mappings has 5 MB
# Where runtimes let libcni keep its files: podman and CRI-O, containerd, cnitool and nerdctl use the default.
CACHE_DIRS = ("/var/lib/cni/results", "/var/lib/cni/cache/results", "/run/cni/results")


class Skipped(Exception):
    """A cache file that leads to nothing that could be restored, and why. `container_id`: "" where it names none."""

    container_id = ""


class Gone(Skipped):
    """A cache file of a container that is provably dead, and what proves it."""


class Memory:
    """The content of libcni's cache: each file, the oldest first, with the attachment that it describes.

    `found`: each file (its path) with a live attachment (unknown counts as alive), or with the reason why not. `only`:
    the ID of the one container whose files are read.
    """

    def __init__(self, folders: "Iterable[object]" = CACHE_DIRS, plugin: str = "portmap",
                 kernel: "Kernel | None" = None, only: str = "") -> None:
        if kernel is None:
            from .linux.kernel import Kernel
            kernel = Kernel()
        self._kernel = kernel
        self._files: dict[int, tuple[str, object]] = {}  # by the attachment's id
        files = [path for folder in folders for path in _entries(folder) if only in path and _is_regular(path)]
        documents = [(path, _identity(path), load(path)) for path in sorted(files, key=_age)]
        if only:
            documents = [each for each in documents if _container_of(each[2]) == only]
        users: dict[str, set[str]] = {}  # of an interface of the host: the containers whose results name it
        for _, _, document in documents:
            for name, container_id in _interfaces_of(document):
                users.setdefault(name, set()).add(container_id)
        read = [(path, identity, _read(document, plugin, kernel)) for path, identity, document in documents]
        for _, _, each in read:  # a link in several results belongs to the one whose namespace exists, or to none
            if isinstance(each, Attachment) and len(users.get(each.link.rpartition("#")[0], ())) > 1 and not each.inode:
                each.link = ""
        unseen = {str(id(each)): each.netns for _, _, each in read
                  if isinstance(each, Attachment) and not each.link and not each.inode}
        verdicts = self._kernel.judge(ruleset.Owner.of_namespace(name, netns) for name, netns in unseen.items())
        dead = {int(name): why for name, (state, why) in verdicts.items() if state == DEAD}
        self.found: list[tuple[str, Attachment | Skipped]] = []
        for (path, identity, each), (_, _, document) in zip(read, documents, strict=True):
            self._files[id(each)] = path, identity
            found = Gone(dead[id(each)]) if id(each) in dead else each
            found.container_id = _container_of(document)
            self.found.append((path, found))

    def is_current(self, attachment: Attachment) -> bool:
        """Whether its file is still the same, and its link is there. Cannot hang, so the lock may be held."""
        path, identity = self._files[id(attachment)]
        return _identity(path) == identity and \
            (not attachment.link or self._kernel.has_link(attachment.link) is not False)


def proof_of_death(container_id: str, kernel: "Kernel") -> str:
    """What proves that a container is dead in each of its networks, "" for nothing. Not to be asked under the lock."""
    found = [each for _, each in Memory(kernel=kernel, only=container_id).found]
    return str(found[0]) if found and all(isinstance(each, Gone) for each in found) else ""


def addresses_of(container_id: str, folders: "Iterable[object]" = CACHE_DIRS) -> dict[str, set[bytes]]:
    """By network, the addresses (packed) that a container has there."""
    found: dict[str, set[bytes]] = {}
    for path in (path for folder in folders for path in _entries(folder) if container_id in path):
        document: Any = load(path) if _is_regular(path) else None
        if _container_of(document) == container_id:
            try:
                ips = found.setdefault(document["networkName"], set())
                ips.update(_packed(entry["address"]) for entry in document["result"]["ips"])
            except (TypeError, LookupError, AttributeError, ValueError, OSError):
                continue
    return found


def _packed(address: str) -> bytes:
    ip = address.partition("/")[0]
    return inet_pton(AF[6 if ":" in ip else 4], ip)


def _entries(folder: object) -> list[str]:
    """The paths of what is in a folder."""
    try:
        return [f"{folder}/{name}" for name in posix.listdir(str(folder))]
    except OSError:  # most runtimes have no such folder
        return []


def _is_regular(path: str) -> bool:
    """Whether it is a file that could be libcni's. No link is followed: where it leads, a look may block."""
    try:
        return _is_file(posix.lstat(path))
    except OSError:
        return False


def _is_file(status: posix.stat_result) -> bool:
    return status.st_mode & 0o170000 == 0o100000  # S_ISREG


def load(path: str) -> "Any":
    """The document in a file, or a Skipped that says why there is none."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not _is_file(posix.fstat(fd)):  # it is another one by now
                raise ValueError("no regular file")
            raw = file.read(FILE_MAX + 1)
        if len(raw) > FILE_MAX:
            raise ValueError(f"larger than {FILE_MAX >> 20} MiB")
        return decode(raw.decode())
    except Exception as error:
        return _not_ours(error)


def _not_ours(error: Exception) -> Skipped:
    return Skipped(f"not a file of libcni's cache: {type(error).__name__}: {error}")


def _container_of(document: "Any") -> str:
    """The ID of the container that a document is about, "" where it names none."""
    found = document.get("containerId") if isinstance(document, dict) else ""
    return found if isinstance(found, str) else ""


def _interfaces_of(document: "Any") -> list[tuple[str, str]]:
    """The interfaces of the host that a result names, each with its container."""
    try:
        found = [(interface["name"], document["containerId"]) for interface in document["result"]["interfaces"]
                 if not interface.get("sandbox")]
    except (TypeError, LookupError, AttributeError):
        return []
    return [pair for pair in found if all(type(text) is str for text in pair)]


def _read(document: "Any", plugin: str, kernel: "Kernel") -> Attachment | Skipped:
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


def _identity(path: str) -> object:
    """A value that changes when a file is written again, None if the file is gone."""
    try:
        found = posix.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _age(path: str) -> tuple[float, str]:
    name = path.rpartition("/")[2]
    try:
        return posix.lstat(path).st_mtime, name
    except OSError:  # a runtime has just removed it
        return 0, name


def documents(folders: "Iterable[object]" = CACHE_DIRS) -> "list[dict[str, Any]]":
    """What libcni has cached of each attachment, whether it publishes anything or not; the oldest first."""
    files = [path for folder in folders for path in _entries(folder) if _is_regular(path)]
    found = (load(path) for path in sorted(files, key=_age))
    return [each for each in found if isinstance(each, dict) and each.get("kind") == "cniCacheV1"]


def with_mappings(cache: "dict[str, Any]", mappings: "list[dict[str, Any]]", plugin: str,
                  kernel: "Kernel") -> Attachment:
    """The attachment of a document of the cache, as if its runtime had asked for these port mappings.

    Its network's configuration of this plugin holds, but for exposure; a network without this plugin gets its defaults.
    Raises Skipped where it leads to nothing, and CniError for mappings that are not valid.
    """
    try:
        conflist: Any = conflist_of(cache)
        plugins = conflist.get("plugins", [conflist])
        config: dict[str, Any] = next((entry for entry in plugins if entry.get("type") == plugin), {})
        config = {**config, "type": plugin, "capabilities": {"portMappings": True}}
        asked = {**cache, "capabilityArgs": {"portMappings": mappings}}
        attachment = _attachment(asked, plugin, kernel, {**conflist, "plugins": [config]})
    except (Skipped, CniError):
        raise
    except Exception as error:
        raise _not_ours(error) from None
    if not attachment.ports:
        raise Skipped("it has no address for these ports, or its network's gatewayMode is routed: then it answers at "
                      "its own address")
    attachment.exposure = ()
    return attachment


def args_of(cache: "dict[str, Any]") -> dict[str, str]:
    """CNI_ARGS in a document, by name, such as K8S_POD_NAME; what is no text is left out."""
    pairs = cache.get("cniArgs")
    return dict(pair for pair in pairs if isinstance(pair, list) and len(pair) == 2 and
                all(isinstance(text, str) for text in pair)) if isinstance(pairs, list) else {}


def conflist_of(cache: "dict[str, Any]") -> "Any":
    """The configuration of a document's network. Wrong types raise."""
    return decode(a2b_base64(cache["config"]).decode())


def configs_of(cache: "dict[str, Any]", plugin: str, conflist: "Any" = None) -> "list[dict[str, Any]]":
    """The configurations of a plugin in a file, each with the runtimeConfig that libcni gives it. Wrong types raise.

    Source: libcni/api.go, injectRuntimeConfig, with keys as Go reads them: those of capabilities as they are.
    """
    conflist = conflist or conflist_of(cache)
    found = [as_go_reads(entry, ("type", "capabilities")) for entry in conflist.get("plugins", [conflist])]
    arguments = cache.get("capabilityArgs") or {}
    return [{**entry, "runtimeConfig": as_go_reads(
        {name: value for name, value in arguments.items() if (entry.get("capabilities") or {}).get(name) is True},
        ("portMappings",))} for entry in found if entry.get("type") == plugin]


def parsed(cache: "dict[str, Any]", plugin: str, conflist: "Any" = None) -> Attachment:
    """What a file describes, with nothing asked of the kernel. Raises Skipped, CniError, or what wrong types raise.

    `conflist`: instead of the network's configuration that the file has.
    """
    if cache.get("kind") != "cniCacheV1":
        raise Skipped("not a file of libcni's cache")
    conflist = conflist or conflist_of(cache)
    configs = configs_of(cache, plugin, conflist)
    if not configs:
        raise Skipped("publishes nothing")
    config = configs[0]
    result, ifname = cache["result"], cache["ifName"]
    netns = cache.get("netns") or next((interface["sandbox"] for interface in result.get("interfaces") or ()
                                        if interface.get("sandbox") and interface.get("name") == ifname), "")
    if not netns:
        raise Skipped("its network namespace is not known")
    config = {**config, "name": cache.get("networkName") or conflist["name"], "prevResult": result}
    if not all(type(text) is str for text in (cache["containerId"], netns, ifname)):
        raise Skipped("not a file of libcni's cache: containerId, netns and ifName are texts")
    environ = {"CNI_CONTAINERID": cache["containerId"], "CNI_NETNS": netns, "CNI_IFNAME": ifname,
               "CNI_ARGS": ";".join(f"{key}={value}" for key, value in cache.get("cniArgs") or ())}
    wrong = environment_error("ADD", environ)
    if wrong:
        raise wrong
    previous = "{}"  # it is there; nothing here passes its text on
    attachment = parse(Request("ADD", conflist.get("cniVersion", "0.1.0"), environ, config, previous))
    if not attachment.ports and not attachment.exposure:
        raise Skipped("publishes nothing" if not config["runtimeConfig"].get("portMappings") else
                      f"publishes nothing: its result has no address on {ifname} for these ports")
    return attachment


def _attachment(cache: "dict[str, Any]", plugin: str, kernel: "Kernel", conflist: "Any" = None) -> Attachment:
    attachment = parsed(cache, plugin, conflist)
    attachment.inode = max(kernel.namespace_soon(attachment.netns), 0)
    attachment.link = _link(attachment, cache["result"], kernel)
    return attachment


def _link(attachment: Attachment, result: "dict[str, Any]", kernel: "Kernel") -> str:
    """The host's end of a container's link, of those that its result names. Raises Skipped if it has gone.

    One with another hardware address than the result says is no witness, so the namespace is.
    """
    names = attachment.links
    link = kernel.link(names) if names else ""
    if names and not link and not kernel.has_interface(names[-1]):  # a bridge comes first
        raise Gone(f"its interface {names[-1]} on this host is gone")
    name = link.rpartition("#")[0]
    for interface in result.get("interfaces") or ():
        address = interface.get("mac") if interface.get("name") == name and not interface.get("sandbox") else None
        if isinstance(address, str) and address and not kernel.has_address(link, address):
            if not attachment.inode:
                raise Gone(f"its interface {name} on this host is gone; another one has its name")
            return ""
    return link
