"""What libcni remembers of live attachments: configuration, capability arguments, result -> Attachments.

After `nft flush ruleset` or a firewall's reload the kernel has lost every published port, while the containers live
on and no runtime calls again. libcni keeps a file for each attachment (libcni/api.go, cachedInfo, kind cniCacheV1)
in its results folder. This reads them; `portmap.restore` writes what is lost.
"""
import base64
import json
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator
from typing import Any

from .cni import CniError, Request, environment_error
from .config import Attachment, parse

# Where runtimes let libcni keep its files: podman and CRI-O, containerd, cnitool and nerdctl use the default.
CACHES = ("/var/lib/cni/results", "/var/lib/cni/cache/results", "/run/cni/results")


class Skipped(Exception):
    """A cache file that leads to nothing that could be restored, and why."""


def remembered(folders: Iterable[str | os.PathLike[str]] = CACHES,
               plugin: str = "portmap") -> Iterator[tuple[pathlib.Path, Attachment | Skipped]]:
    """Each cache file, the oldest first, with the live attachment that it describes or the reason why it has none."""
    files = [path for folder in folders for path in pathlib.Path(folder).glob("*") if path.is_file()]
    for path in sorted(files, key=_age):
        try:
            yield path, _attachment(json.loads(path.read_bytes()), plugin)
        except Skipped as reason:
            yield path, reason
        except CniError as error:
            yield path, Skipped(f"{error.msg}; {error.details}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
            yield path, Skipped(f"not a file of libcni's cache: {type(error).__name__}: {error}")


def _age(path: pathlib.Path) -> tuple[float, str]:
    try:
        return path.stat().st_mtime, path.name
    except OSError:  # a runtime has just removed it
        return 0, path.name


def _attachment(cache: dict[str, Any], plugin: str) -> Attachment:
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
    if not _is_namespace(netns):
        raise Skipped(f"its network namespace is gone: {netns or 'unknown'}")
    config = {**config, "name": cache.get("networkName") or conflist["name"], "prevResult": result,
              "runtimeConfig": {"portMappings": arguments["portMappings"]}}
    environ = {"CNI_CONTAINERID": cache["containerId"], "CNI_NETNS": netns, "CNI_IFNAME": ifname}
    wrong = environment_error("ADD", environ)
    if wrong:
        raise wrong
    attachment = parse(Request("ADD", conflist.get("cniVersion", "0.1.0"), environ, config, json.dumps(result)))
    attachment.inode = os.stat(netns).st_ino
    return attachment


def _is_namespace(path: str) -> bool:
    """Whether `path` still leads to a namespace: a file of nsfs, not what is left where it was mounted."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_dev == os.stat("/proc/self/ns/net").st_dev
