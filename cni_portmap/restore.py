"""What the operator's command mends: ports that a flush has removed, and rules that dead containers left behind.

After `nft flush ruleset` or a firewall's reload the kernel has lost every published port, while the containers live
on and no runtime calls again. libcni keeps a file for each attachment (libcni/api.go, cachedInfo, kind cniCacheV1)
in its results folder. `Memory` reads them, `restore` writes what is lost. No call of a runtime needs any of this.
"""
import base64
import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import portmap, ruleset
from .alive import DEAD
from .cni import PORT_TAKEN, CniError, Request, environment_error
from .config import Attachment, Port, parse
from .kernel import Kernel

if TYPE_CHECKING:
    from .alive import Verdict

# Where runtimes let libcni keep its files: podman and CRI-O, containerd, cnitool and nerdctl use the default.
CACHES = ("/var/lib/cni/results", "/var/lib/cni/cache/results", "/run/cni/results")


class Skipped(Exception):
    """A cache file that leads to nothing that could be restored, and why."""


class Memory:
    """What libcni remembers now: each cache file, the oldest first, with the attachment that it describes.

    `found`: each file with a live attachment (one that cannot be judged counts as alive), or with the reason why not.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]] = CACHES, plugin: str = "portmap",
                 kernel: Kernel | None = None) -> None:
        self._kernel = kernel or Kernel()
        self._files: dict[int, tuple[pathlib.Path, object]] = {}  # by the attachment's id
        files = [path for folder in folders for path in pathlib.Path(folder).glob("*") if path.is_file()]
        read = [(path, _identity(path), _read(path, plugin, self._kernel)) for path in sorted(files, key=_age)]
        by_link: dict[str, set[str]] = {}
        for _, _, each in read:
            if isinstance(each, Attachment) and each.link:
                by_link.setdefault(each.link, set()).add(ruleset.chain_of(each.container_id, each.ifname))
        for _, _, each in read:  # a link that several are said to have is one's whose namespace is there, or nobody's
            if isinstance(each, Attachment) and len(by_link.get(each.link, ())) > 1 and not each.inode:
                each.link = ""
        unseen = {str(id(each)): each.netns for _, _, each in read
                  if isinstance(each, Attachment) and not each.link and not each.inode}
        verdicts = self._kernel.judge(ruleset.Owner(name, f"netns={netns}") for name, netns in unseen.items())
        dead = {int(name): why for name, (state, why) in verdicts.items() if state == DEAD}
        self.found: list[tuple[pathlib.Path, Attachment | Skipped]] = []
        for path, identity, each in read:
            self._files[id(each)] = path, identity
            self.found.append((path, Skipped(dead[id(each)]) if id(each) in dead else each))

    def is_current(self, attachment: Attachment) -> bool:
        """Whether its file is still the same, and its link is there. Cannot hang, so the lock may be held."""
        path, identity = self._files[id(attachment)]
        return _identity(path) == identity and (not attachment.link or self._kernel.has_link(attachment.link))


def _read(path: pathlib.Path, plugin: str, kernel: Kernel) -> Attachment | Skipped:
    try:
        return _attachment(json.loads(path.read_bytes()), plugin, kernel)
    except Skipped as reason:
        return reason
    except CniError as error:
        return Skipped(f"{error.msg}; {error.details}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        return Skipped(f"not a file of libcni's cache: {type(error).__name__}: {error}")


def _identity(path: pathlib.Path) -> object:
    """What changes when a file is written again, None where it has gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _age(path: pathlib.Path) -> tuple[float, str]:
    try:
        return path.stat().st_mtime, path.name
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
    netns = cache.get("netns") or next((interface["sandbox"] for interface in result.get("interfaces", ())
                                        if interface.get("sandbox") and interface.get("name") == ifname), "")
    if not netns:
        raise Skipped("its network namespace is not known")
    config = {**config, "name": cache.get("networkName") or conflist["name"], "prevResult": result,
              "runtimeConfig": {"portMappings": arguments["portMappings"]}}
    environ = {"CNI_CONTAINERID": cache["containerId"], "CNI_NETNS": netns, "CNI_IFNAME": ifname,
               "CNI_ARGS": ";".join(f"{key}={value}" for key, value in cache.get("cniArgs") or ())}
    wrong = environment_error("ADD", environ)
    if wrong:
        raise wrong
    attachment = parse(Request("ADD", conflist.get("cniVersion", "0.1.0"), environ, config, json.dumps(result)))
    attachment.link = kernel.link(attachment.links) if attachment.links else ""
    attachment.inode = max(kernel.namespace_soon(netns), 0)
    return attachment


# --- what is written --------------------------------------------------------------------------------------------

def prune(kernel: Kernel, dry_run: bool = False) -> list[tuple[ruleset.Owner, "Verdict"]]:
    """Remove every attachment whose container is gone; what was found of each, also of those that stay.

    `dry_run`: nothing is written.
    """
    handles = kernel.handles()
    owners = kernel.owners()
    verdicts = kernel.judge(owners)
    if not dry_run:
        portmap._sweep([owner for owner in owners if verdicts[owner.chain][0] == DEAD], handles, kernel)
    return [(owner, verdicts[owner.chain]) for owner in owners]


def restore(attachments: Iterable[Attachment], kernel: Kernel, dry_run: bool = False,
            is_current: Callable[[Attachment], bool] = lambda _: True) \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    """Publish again what of `attachments` the kernel has lost: the base, then all of them in one transaction.

    Returns those that are published again, and those that cannot be, each with the reason. The first of two that
    claim one port gets it. `dry_run`: nothing is written. `is_current`: asked under the lock whether an attachment has
    not been deleted, or come back by itself, since it was read; one that has is passed over.
    """
    attachments = [*attachments]
    judged: portmap.Judged = {}
    while True:
        try:
            return _restore(attachments, kernel, dry_run, is_current, judged)
        except portmap.Unjudged as unjudged:
            portmap._judge(unjudged.owners, judged, kernel)


def _restore(attachments: list[Attachment], kernel: Kernel, dry_run: bool,
             is_current: Callable[[Attachment], bool], judged: "portmap.Judged") \
        -> tuple[list[Attachment], list[tuple[Attachment, CniError]]]:
    asked: dict[str, tuple[Attachment, dict[tuple[str, bytes], str]]] = {}  # by chain, with where its elements lead
    whole: set[str] = set()
    anew: set[str] = set()
    gone: set[str] = set()  # chains of the dead, and those that are written anew
    refused: list[tuple[Attachment, CniError]] = []
    claimed: dict[tuple[str, bytes], dict[str, Attachment]] = {}  # by container ID; by a key's ending, too
    unjudged: list[ruleset.Owner] = []
    texts = {id(attachment): ruleset.rules_text(attachment) for attachment in attachments}
    with kernel.lock():
        for attachment in attachments:
            chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
            if chain in asked or not is_current(attachment):
                continue  # two folders remember it, or none does any more
            ports = ruleset.elements_for(attachment)
            found = kernel.lookup(ports)
            asked[chain] = attachment, found
            if _is_whole(attachment, chain, found, kernel):
                whole.add(chain)
            else:
                try:
                    for element, port in ports.items():
                        _refuse_overlap(element, port, attachment, claimed)
                    gone.update(portmap._settle(attachment, chain, kernel, judged)[0])
                except portmap.Unjudged as its:
                    unjudged += its.owners
                except CniError as error:
                    refused.append((attachment, error))
                    continue
                anew.add(chain)
            for name, key in ports:
                for claim in (name, key), (name, key[-8:]):
                    claimed.setdefault(claim, {}).setdefault(attachment.container_id, attachment)
        if unjudged:
            raise portmap.Unjudged(unjudged)
        gone |= anew
        while bereft := {chain for chain in whole - gone if gone.intersection(asked[chain][1].values())}:
            anew |= bereft  # they stand by for a chain that is written anew
            gone |= bereft
        lost = [attachment for chain, (attachment, _) in asked.items() if chain in anew]
        base = portmap._base([asked[chain][0] for chain in whole | anew], kernel) if whole or anew else ""
        replaced = [chain for chain in sorted(gone) if kernel.has_chain(chain)]
        text = portmap._detach(replaced, kernel.elements_of(replaced), (), kernel)
        leads: dict[tuple[str, bytes], str] = {}
        for attachment in lost:
            chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
            leads |= {element: other for element, other in asked[chain][1].items() if other not in gone}
            own = ruleset.elements_for(attachment)
            elsewhere = {element: leads[element] for element in own if element in leads}
            text += portmap._attach(attachment, elsewhere, kernel, texts[id(attachment)])
            for element in own:
                leads.setdefault(element, chain)
        forgotten = bool(base) and not kernel.notes_opened()  # the table was gone: what is open now, we had opened
        if base and not dry_run:
            portmap._write_base(base, kernel)
        if text and not dry_run:
            closed = portmap._closed_to_localhost(lost, kernel, forgotten)
            kernel.transact(text + ruleset.note_opened(closed))
            portmap._open_localhost(lost, closed, kernel)
    return lost, refused


def _is_whole(attachment: Attachment, chain: str, found: dict[tuple[str, bytes], str], kernel: Kernel) -> bool:
    """Whether nothing was removed of what `attachment` published. `found`: where its elements lead to."""
    return len(kernel.comments(chain)) >= len([*ruleset.rules_of(attachment)]) and \
        len(found) == len(attachment.ports) and \
        portmap._home(found.values(), attachment, kernel).issuperset(found.values())


def _refuse_overlap(element: tuple[str, bytes], port: Port, attachment: Attachment,
                    claimed: dict[tuple[str, bytes], dict[str, Attachment]]) -> None:
    """Raise CniError(101) if another of the attachments that are being restored claims an overlapping port."""
    overlapping = ruleset.wildcard_of(port) if port.host_ip else (f"hostip{port.family}_hostports", element[1][-8:])
    for other in element, overlapping:
        for container_id, owner in claimed.get(other, {}).items():
            if container_id != attachment.container_id:
                raise CniError(PORT_TAKEN, f"{port} is already published by container {container_id}, interface "
                               f"{owner.ifname}, network {owner.network}")
