"""A runtime, as libcni is one: containers that real CNI plugins, this checkout's portmap the last, connect."""
import contextlib
import copy
import json
import os
import pathlib
import subprocess
from typing import Any

from .namespaces import Namespace
from .processes import ROOT, run
from .tables import OTHER_ROOT

# The distribution's plugins: Debian's folder, Fedora's
PLUGINS = next((path for path in map(pathlib.Path, ("/usr/lib/cni", "/usr/libexec/cni")) if path.is_dir()),
               pathlib.Path("/usr/lib/cni"))

BUNDLE = os.environ.get("CNI_PORTMAP_BUNDLE", "")  # an unpacked bundle, to be tested instead of the checkout


class CniFailed(Exception):
    """A plugin's error document."""

    def __init__(self, plugin: str, code: int, msg: str, details: str) -> None:
        super().__init__(f"{plugin}: {code}: {msg}; {details}")
        self.plugin, self.code, self.msg, self.details = plugin, code, msg, details


def call_process(executable: str | pathlib.Path, verb: str, config: object, container_id: str = "", netns: str = "",
                 ifname: str = "eth0", timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    """One call of one plugin, as it ended: status, stdout, stderr."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND": verb, "CNI_CONTAINERID": container_id,
               "CNI_NETNS": netns, "CNI_IFNAME": ifname, "CNI_PATH": str(pathlib.Path(executable).parent)}
    stdin = config if isinstance(config, str) else json.dumps(config)
    return subprocess.run([str(executable)], input=stdin, text=True, capture_output=True, timeout=timeout,
                          env=environ, check=False)


def call_plugin(executable: str | pathlib.Path, verb: str, config: object, container_id: str = "", netns: str = "",
                ifname: str = "eth0", timeout: float = 300) -> Any:
    """One call of one plugin: its result, {} for none. Raises CniFailed, and AssertionError for anything else."""
    done = call_process(executable, verb, config, container_id, netns, ifname, timeout)
    name = pathlib.Path(executable).name
    try:
        answer = json.loads(done.stdout) if done.stdout else {}
    except ValueError:
        raise AssertionError(f"{name} {verb}: not one document: {done.stdout!r} {done.stderr!r}") from None
    if done.returncode:
        if "code" not in answer:
            raise AssertionError(f"{name} {verb}: status {done.returncode}: {done.stdout!r} {done.stderr!r}")
        raise CniFailed(name, answer["code"], answer["msg"], answer.get("details", ""))
    return answer


class Network:
    """A conflist and the folder of its plugins, driven as libcni does: ADD in order, DEL in reverse."""

    def __init__(self, conflist: dict[str, Any], bin_dir: str | pathlib.Path) -> None:
        self.conflist, self.bin_dir = conflist, pathlib.Path(bin_dir)
        self.results: dict[tuple[str, str], Any] = {}

    def _config(self, plugin: dict[str, Any], ports: object, previous: object) -> dict[str, Any]:
        config = {**plugin, "name": self.conflist["name"], "cniVersion": self.conflist["cniVersion"]}
        if ports and plugin.get("capabilities", {}).get("portMappings"):
            config["runtimeConfig"] = {"portMappings": ports}
        if previous:
            config["prevResult"] = previous
        return config

    def config(self, ports: object = (), previous: object = None) -> dict[str, Any]:
        """The standard input of the last plugin of the chain, ours."""
        return self._config(self.conflist["plugins"][-1], ports, previous)

    def _call(self, plugin: dict[str, Any], verb: str, container_id: str, netns: str, ports: object, previous: object,
              ifname: str) -> Any:
        return call_plugin(self.bin_dir / plugin["type"], verb, self._config(plugin, ports, previous), container_id,
                           netns, ifname)

    def add(self, container_id: str, netns: str, ports: object = (), ifname: str = "eth0") -> Any:
        result = None
        for plugin in self.conflist["plugins"]:
            result = self._call(plugin, "ADD", container_id, netns, ports, result, ifname)
        self.results[container_id, ifname] = result
        return result

    def check(self, container_id: str, netns: str, ports: object = (), ifname: str = "eth0") -> None:
        for plugin in self.conflist["plugins"]:
            self._call(plugin, "CHECK", container_id, netns, ports, self.results[container_id, ifname], ifname)

    def delete(self, container_id: str, netns: str = "", ports: object = (), ifname: str = "eth0") -> None:
        result = self.results.pop((container_id, ifname), None)
        for plugin in reversed(self.conflist["plugins"]):
            self._call(plugin, "DEL", container_id, netns, ports, result, ifname)


def bridge_conflist(name: str = "labnet", bridge: str = "cni0",
                    subnets: tuple[str, ...] = ("10.88.0.0/16", "fd88::/64"), version: str = "1.0.0",
                    **portmap: Any) -> dict[str, Any]:
    """The conflist that most nodes have: a bridge with an address, then our plugin."""
    bridge_config = {"type": "bridge", "bridge": bridge, "isGateway": True, "hairpinMode": True,
                     "ipam": _ipam(name, subnets)}
    return _conflist(name, version, bridge_config, portmap)


def ptp_conflist(name: str = "labnet", subnets: tuple[str, ...] = ("10.88.0.0/16", "fd88::/64"),
                 version: str = "1.0.0", **portmap: Any) -> dict[str, Any]:
    """A conflist with a routed veth for each container in place of a bridge, then our plugin."""
    return _conflist(name, version, {"type": "ptp", "ipam": _ipam(name, subnets)}, portmap)


def _conflist(name: str, version: str, first: dict[str, Any], portmap: dict[str, Any]) -> dict[str, Any]:
    return {"cniVersion": version, "name": name, "plugins": [
        first, {"type": "portmap", "capabilities": {"portMappings": True}, **portmap}]}


def _ipam(name: str, subnets: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "host-local", "dataDir": f"/run/lab-ipam/{name}", "ranges": [[{"subnet": s}] for s in subnets],
            "routes": [{"dst": dst} for dst in dict.fromkeys("::/0" if ":" in s else "0.0.0.0/0" for s in subnets)]}


class Container:
    """A container's namespace in a network, with its published ports."""

    def __init__(self, network: Network, name: str, ports: object = (), ifname: str = "eth0") -> None:
        self.network, self.ports, self.ifname = network, ports, ifname
        self.id = f"{name}-0123456789abcdef"
        self.namespace = Namespace(name)
        try:
            self.result = network.add(self.id, self.namespace.path, ports, ifname)
        except BaseException:
            self.namespace.remove()
            raise
        self._take(self.result)

    def _take(self, result: Any) -> None:
        self.result = result
        links: list[str] = [link["name"] for link in result["interfaces"] if not link.get("sandbox")]
        # The host's end of its link, and its bridge where it has one; "" where it has no link here (macvlan).
        self.link, self.interface = (links[-1], links[0]) if links else ("", "")
        ips = [entry["address"].partition("/")[0] for entry in result["ips"]]
        self.ipv4, self.other_ipv4 = [*(ip for ip in ips if ":" not in ip), "", ""][:2]
        self.ipv6, self.other_ipv6 = [*(ip for ip in ips if ":" in ip), "", ""][:2]

    def join(self, network: Network, ifname: str) -> "Container":
        """This container as it is in one more network, where it publishes the same ports."""
        other = copy.copy(self)
        other.network, other.ifname = network, ifname
        other._take(network.add(self.id, self.namespace.path, self.ports, ifname))
        return other

    def leave(self) -> None:
        """Leave the network."""
        self.network.delete(self.id, self.namespace.path, self.ports, self.ifname)

    def __enter__(self) -> "Container":
        self.namespace.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.namespace.__exit__()

    def check(self) -> None:
        self.network.check(self.id, self.namespace.path, self.ports, self.ifname)

    def remove(self) -> None:
        self.leave()
        self.namespace.remove()


def plugins(bin_dir: pathlib.Path) -> pathlib.Path:
    """A folder of the distribution's plugins, without portmap."""
    bin_dir.mkdir(parents=True, exist_ok=True)
    for plugin in PLUGINS.iterdir():
        if plugin.name != "portmap":
            with contextlib.suppress(FileExistsError):
                (bin_dir / plugin.name).symlink_to(plugin)
    return bin_dir


def install(bin_dir: pathlib.Path) -> pathlib.Path:
    """A folder of plugins: this checkout's portmap, or that of an unpacked BUNDLE; and the distribution's others."""
    plugins(bin_dir)
    command = [f"{BUNDLE}/install.sh"] if BUNDLE else [ROOT / "scripts/install", "--prefix", bin_dir.parent / "lib"]
    run(*command, "--bin-dir", bin_dir, "--sbin-dir", bin_dir.parent / "sbin", timeout=600)  # an emulated processor's
    return bin_dir


def install_in_other_root(bin_dir: pathlib.Path, place: pathlib.Path = OTHER_ROOT) -> pathlib.Path:
    """A folder of plugins: this checkout's portmap, run by the Python and libnftables at `place`, and our others."""
    run("chroot", place, "/mnt/scripts/install", "--prefix", "/opt/lib", "--bin-dir", "/opt/cni/bin",
        "--sbin-dir", "/opt/sbin", timeout=600)
    launcher = plugins(bin_dir) / "portmap"
    launcher.write_text(f"#!/bin/sh\nexec chroot {place} /opt/cni/bin/portmap\n")
    launcher.chmod(0o755)
    return bin_dir
