"""The reference plugin portmap of three releases, and a node where it is exchanged for ours while containers run."""
import copy
import json
import pathlib
import shutil
import subprocess
from typing import NamedTuple, Self

from .calls import Answer, answer
from .libcni_cache import Cache
from .links import has_link
from .namespaces import fresh_host, wire
from .processes import run, until
from .runtime import PLUGINS, Container, Network, bridge_conflist, call_process, plugins
from .servers import PATIENT, exchange
from .tables import TABLE
from .userland import UNPACKED

PORTMAPS = {"1.1.1": PLUGINS / "portmap", "1.6.2": UNPACKED / "cni-plugins-1.6/usr/lib/cni/portmap",
            "1.9.1": UNPACKED / "cni-plugins/usr/lib/cni/portmap"}
CACHE = pathlib.Path("/run/cni/results")  # one of those that libcni has
LAN = {4: "203.0.113.1", 6: "2001:db8::1"}  # the node's addresses


class Reference(NamedTuple):
    """A release of the reference plugin and a backend of it; `iptables-legacy` is its backend iptables, too."""

    release: str
    backend: str

    def __str__(self) -> str:
        return f"{self.release}-{self.backend}"

    @property
    def config(self) -> dict[str, str]:
        """The backend in the plugin's configuration; 1.1.1 knows of none."""
        return {} if self.release == "1.1.1" else {"backend": self.backend.partition("-")[0]}


REFERENCES = [Reference("1.1.1", "iptables"), Reference("1.1.1", "iptables-legacy"), Reference("1.6.2", "iptables"),
              Reference("1.6.2", "nftables"), Reference("1.9.1", "iptables"), Reference("1.9.1", "iptables-legacy"),
              Reference("1.9.1", "nftables")]


class Node:
    """A host, a client on its LAN, and containers that the reference plugin publishes until `swap`.

    `ours`: the folder of our plugin; `folder`: for that of the reference plugin.
    """

    def __init__(self, reference: Reference, ours: pathlib.Path, folder: pathlib.Path) -> None:
        self.reference, self.ours = reference, ours
        self.theirs = plugins(folder / "bin")
        # Its go-iptables looks for the programs in PATH, of which we are the masters.
        launcher, programs = self.theirs / "portmap", folder / "programs"
        if not launcher.exists():
            programs.mkdir()
            for name in "iptables", "ip6tables":
                kind = f"{name}-legacy" if reference.backend == "iptables-legacy" else f"{name}-nft"
                (programs / name).symlink_to(shutil.which(kind) or f"/usr/sbin/{kind}")
            launcher.write_text(f"#!/bin/sh\nPATH={programs}:$PATH exec {PORTMAPS[reference.release]}\n")
            launcher.chmod(0o755)
        self.networks: dict[str, Network] = {}
        self.containers: list[Container] = []

    def __enter__(self) -> Self:
        self._host = fresh_host()
        self._host.__enter__()
        self.client = wire("lan", tuple(f"{ip}/{24 if family == 4 else 64}" for family, ip in LAN.items()),
                           ("203.0.113.2/24", "2001:db8::2/64"))
        CACHE.mkdir(parents=True, exist_ok=True)
        self.network("net")
        return self

    def __exit__(self, *_: object) -> None:
        for container in self.containers:
            container.network.bin_dir = self.ours
            container.remove()
        shutil.rmtree(CACHE)
        shutil.rmtree("/run/lab-ipam", ignore_errors=True)  # which remembers those that were killed
        self._host.__exit__(None, None, None)

    def network(self, name: str) -> Network:
        """The network of that name, on a bridge of its own."""
        if name not in self.networks:
            number = 88 + len(self.networks)
            conflist = bridge_conflist(name, f"cni-{name}", (f"10.{number}.0.0/16", f"fd{number}::/64"),
                                       **self.reference.config)
            self.networks[name] = Network(conflist, self.theirs)
        return self.networks[name]

    def start(self, name: str, *ports: object, network: str = "net") -> Container:
        """A container, and the file in which libcni remembers it."""
        container = Container(self.network(network), name, ports)
        self.containers.append(container)
        Cache(CACHE).remember(container)
        return container

    def join(self, container: Container, network: str, *ports: object) -> Container:
        """The container in another network as well, through eth1."""
        second = copy.copy(container)
        second.network, second.ifname, second.ports = self.network(network), "eth1", ports
        second.result = second.network.add(second.id, second.namespace.path, ports, second.ifname)
        second.ipv4, second.ipv6 = (entry["address"].partition("/")[0] for entry in second.result["ips"])
        self.containers.insert(0, second)
        Cache(CACHE).remember(second)
        return second

    def stop(self, container: Container) -> None:
        """As a runtime ends a container: DEL, then its file goes."""
        container.remove()
        self.containers.remove(container)
        Cache(CACHE).forget(container)

    def kill(self, container: Container) -> None:
        """The container's namespace goes, without DEL, and the link that led there."""
        self.containers.remove(container)
        container.namespace.remove()
        assert until(lambda: not has_link(container.link))

    def swap(self) -> None:
        """Exchange the plugin."""
        for network in self.networks.values():
            network.bin_dir = self.ours

    def call(self, verb: str, container: Container, late: bool = False) -> Answer:
        """A call of our plugin; `late`: without prevResult and CNI_NETNS, as runtimes repeat DEL."""
        config = container.network.config(container.ports, None if late else container.result)
        done = call_process(self.ours / "portmap", verb, config, container.id,
                            "" if late else container.namespace.path, container.ifname)
        return answer(done.returncode, done.stdout, done.stderr)

    def gc(self, network: str, *valid: Container) -> Answer:
        """Our GC, with these containers as valid."""
        attachments = [{"containerID": container.id, "ifname": container.ifname} for container in valid]
        config = {**self.network(network).config(), "cniVersion": "1.1.0", "cni.dev/valid-attachments": attachments}
        done = call_process(self.ours / "portmap", "GC", config)
        return answer(done.returncode, done.stdout, done.stderr)

    def answers(self, port: int, protocol: str = "tcp", timeout: float = PATIENT) -> dict[int, str]:
        """Who answers the client on the LAN, by family; "" for nobody."""
        saw = {family: exchange(self.client, ip, port, protocol, timeout=timeout) for family, ip in LAN.items()}
        return {family: found.server if found else "" for family, found in saw.items()}

    def command(self, *words: object, status: int = 0) -> object:
        """The document of cni-portmap --json."""
        done = subprocess.run([str(word) for word in (self.ours.parent / "sbin/cni-portmap", *words, "--json")],
                              text=True, capture_output=True, check=False)
        assert done.returncode == status and "Traceback" not in done.stderr, done
        return json.loads(done.stdout)


def traces(*words: str) -> list[str]:
    """The lines of rules outside of our table that name one of `words`: a container's ID, or its address."""
    ours = f"table {TABLE} {{"
    lines = [line for block in run("nft", "list", "ruleset").split("\n}") if ours not in block
             for line in block.splitlines()]
    for program in "iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save":
        kind = "ip6" if program.startswith("ip6") else "ip"
        names = pathlib.Path(f"/proc/self/net/{kind}_tables_names")
        if "legacy" not in program or (names.exists() and "nat\n" in names.read_text()):
            lines += run(program, "-t", "nat").splitlines()
    return [line.strip() for line in lines if any(word and word in line for word in words)]
