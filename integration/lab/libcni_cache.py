"""libcni's cache, where `cni-portmap restore` reads what runtimes had published."""
import base64
import json
import pathlib
from typing import Any

from .calls import Host, Pod
from .runtime import Container

PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}}


class Cache:
    """A results folder of libcni: libcni/api.go, cachedInfo."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def write(self, pod: Pod, **changes: Any) -> pathlib.Path:
        """The file that libcni writes after ADD. `changes`: other members; None for none."""
        stdin = json.loads(pod.stdin("ADD"))
        conflist = {"cniVersion": "1.1.0", "name": pod.network, "plugins": [
            {"type": "bridge", "bridge": "cni0"},
            {**PORTMAP, **{key: value for key, value in pod.config.items() if key not in ("cniVersion", "name")}}]}
        entry = {"kind": "cniCacheV1", "containerId": pod.id, "config": conflist, "ifName": pod.ifname,
                 "networkName": pod.network, "netns": pod.netns,
                 "cniArgs": [item.split("=") for item in (pod.args or "IgnoreUnknown=1").split(";")],
                 "capabilityArgs": {"portMappings": pod.ports}, "result": stdin["prevResult"], **changes}
        return _write(self.folder / f"{pod.network}-{pod.id}-{pod.ifname}", entry)

    def remember(self, container: Container, **changes: Any) -> None:
        """The same for a container that real plugins have connected."""
        network = container.network.conflist
        _write(self._path(container), {
            "kind": "cniCacheV1", "containerId": container.id, "config": network, "ifName": container.ifname,
            "networkName": network["name"], "netns": container.namespace.path,
            "capabilityArgs": {"portMappings": container.ports}, "result": container.result, **changes})

    def forget(self, container: Container) -> None:
        """Remove it, as libcni does at the end of DEL."""
        self._path(container).unlink(missing_ok=True)

    def _path(self, container: Container) -> pathlib.Path:
        return self.folder / f"{container.network.conflist['name']}-{container.id}-{container.ifname}"

    def restore(self, host: Host, *options: object, status: int = 0) -> Any:
        """Run the command: its report."""
        return json.loads(host.command("restore", "--json", "--cache", self.folder, *options, status=status))


def _write(path: pathlib.Path, entry: dict[str, Any]) -> pathlib.Path:
    entry["config"] = base64.b64encode(json.dumps(entry["config"]).encode()).decode()
    path.write_text(json.dumps({key: value for key, value in entry.items() if value is not None}))
    return path
