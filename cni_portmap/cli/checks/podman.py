"""Which portmap podman calls: that in the first of its folders that has one.

Source: containers-common, pkg/config/default.go (DefaultCNIPluginDirs), containers.conf(5): later files replace keys.
"""
import contextlib
import os
import pathlib
import tomllib
from typing import Any

from ...linux.installation import is_plugin

FOLDERS = ("/usr/local/libexec/cni", "/usr/libexec/cni", "/usr/local/lib/cni", "/usr/lib/cni", "/opt/cni/bin")
FILES = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")


def calls_another() -> tuple[str, str, tuple[str, ...]] | None:
    """The portmap that podman calls and ours, which it does not, with its folders; None where that is not so."""
    network = _network()
    is_there = any(pathlib.Path(folder, "podman").exists() for folder in os.get_exec_path())
    if not is_there or network.get("network_backend", "cni") != "cni":
        return None
    folders = tuple(map(str, network.get("cni_plugin_dirs") or FOLDERS))
    found = [path for folder in folders if (path := pathlib.Path(folder, "portmap")).exists()]
    ours = next((path for path in found if is_plugin(str(path))), None)
    return (str(found[0]), str(ours), folders) if ours and ours != found[0] else None


def _network() -> dict[str, Any]:
    """The part [network] of containers.conf."""
    merged: dict[str, Any] = {}
    for path in (*map(pathlib.Path, FILES), *sorted(pathlib.Path(f"{FILES[-1]}.d").glob("*.conf"))):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            merged |= dict(tomllib.loads(path.read_text()).get("network", {}))
    return merged
