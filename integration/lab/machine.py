"""A machine for a real runtime: a userland and a network of its own, with the plugin installed as documented."""
import collections
import pathlib
import shlex
from typing import Self

from .links import bring_up
from .namespaces import HOST, br_netfilter, own_network, sysctl, wire
from .processes import run
from .servers import exchange, patience
from .tables import keep_conntrack, nft
from .userland import NEWER_PLUGINS, PLUGINS, RUNTIMES, UNPACKED, Userland, says, shown_in  # noqa: F401  # for tests

VERSIONS: dict[str, list[str]] = collections.defaultdict(list)  # test module -> what its runtimes say they are
CLIENT_IP = {4: "203.0.113.2", 6: "2001:db8::2"}  # a machine on the LAN
HOST_IP = {4: "203.0.113.1", 6: "2001:db8::1"}  # the runtime's


class Machine(Userland):
    """A host for one runtime, with a client on its LAN; inside the `with`, this thread's network is the machine's.

    `install`: how the plugin is installed, as shell commands; the rest as in Userland.
    """

    def __init__(self, name: str, install: str = "scripts/install", *packages: str,
                 plugins: str | pathlib.Path = PLUGINS) -> None:
        super().__init__(name, *packages, plugins=plugins)
        self._install = install

    def __enter__(self) -> Self:
        self._network = own_network()
        self._network.__enter__()
        run("mount", "--make-shared", "/run")
        bring_up("lo")
        for key, value in {"ipv4.ip_forward": 1, "ipv6.conf.all.forwarding": 1, "ipv6.conf.all.accept_dad": 0,
                           "ipv6.conf.default.accept_dad": 0}.items():
            sysctl(f"net.{key}", value)
        br_netfilter(False)
        keep_conntrack()
        super().__enter__()
        self.client = wire(f"lan-{self.name}", (f"{HOST_IP[4]}/24", f"{HOST_IP[6]}/64"),
                               (f"{CLIENT_IP[4]}/24", f"{CLIENT_IP[6]}/64"), "lan")
        try:
            self.shell(self._install)
            self.prepare()
        except BaseException:  # `with` ends only what has begun
            self.__exit__()
            raise
        return self

    def prepare(self) -> None:
        """Prepare what else this machine needs; for subclasses."""

    def __exit__(self, *_: object) -> None:
        self.client.remove()
        super().__exit__()
        self._network.__exit__(None, None, None)

    def whom_server_sees(self, source: str, ip: str, port: int, protocol: str, comes: object) -> str:
        """The address that the server behind a published port sees of `client` or `host`; "nobody" if none came.

        `comes`: whether somebody should.
        """
        where = self.client if source == "client" else HOST
        saw = exchange(where, ip, port, protocol, timeout=patience(comes))
        return saw.peer if saw else "nobody"


def wrappers(folder: pathlib.Path, command: list[str], ours: str = "/opt/cni/bin") -> pathlib.Path:
    """A folder of plugins for `Network`, each of which runs where `command` leads: ours, and the distribution's."""
    for plugin in pathlib.Path(PLUGINS).iterdir():
        path = f"{ours}/portmap" if plugin.name == "portmap" else str(plugin)
        (folder / plugin.name).write_text("\n".join(["#!/bin/sh", f"export CNI_PATH={PLUGINS}",
                                                     f"exec {shlex.join([*command, path])}", ""]))
        (folder / plugin.name).chmod(0o755)
    return folder


def flush_ruleset() -> None:
    """Flush the ruleset, as a firewall does when it restarts."""
    nft("flush", "ruleset")
    keep_conntrack()
