"""libcni's cache, where `cni-portmap restore` reads what runtimes had published."""
import base64
import json
import pathlib
from typing import Any

from .calls import Host, Pod

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
                 "networkName": pod.network, "netns": pod.netns, "cniArgs": [["IgnoreUnknown", "1"]],
                 "capabilityArgs": {"portMappings": pod.ports}, "result": stdin["prevResult"], **changes}
        entry["config"] = base64.b64encode(json.dumps(entry["config"]).encode()).decode()
        path = self.folder / f"{pod.network}-{pod.id}-{pod.ifname}"
        path.write_text(json.dumps({key: value for key, value in entry.items() if value is not None}))
        return path

    def restore(self, host: Host, *options: object, status: int = 0) -> Any:
        """Run the command: its report."""
        return json.loads(host.command("restore", "--json", "--cache", self.folder, *options, status=status))
