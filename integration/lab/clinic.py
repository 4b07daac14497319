"""A host with a published container and a client on its LAN, to be broken; and what doctor says of it."""
import contextlib
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any, Self

from .links import add_route
from .namespaces import HOST, Namespace, fresh_host, wire
from .runtime import Container, Network, bridge_conflist
from .servers import PATIENT, Server, exchange

PORT, WEB = 8080, 80
LAN_IP = {4: "192.0.2.1", 6: "2001:db8::1"}
CLIENT_IP = {4: "192.0.2.2", 6: "2001:db8::2"}


class Clinic:
    """A fresh host: lan0 to a client, bridge cni0 with container `web`, which serves WEB for PORT. A context manager.

    `ports`: its mappings; `portmap`: more keys of its network; `subnets`: of the bridge; `serve`: whether its program
    runs.
    """

    def __init__(self, bin_dir: pathlib.Path, ports: list[dict[str, Any]] | None = None, serve: bool = True,
                 subnets: tuple[str, ...] = ("10.88.0.0/16", "fd88::/64"), **portmap: Any) -> None:
        self._bin_dir, self._serve, self._subnets, self._portmap = bin_dir, serve, subnets, portmap
        self.ports = [{"hostPort": PORT, "containerPort": WEB, "protocol": "tcp"}] if ports is None else ports

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        try:
            self._stack.enter_context(fresh_host())
            shutil.rmtree("/run/lab-ipam", ignore_errors=True)
            self.client = self.machine("lan-client", "lan0", (f"{LAN_IP[4]}/24", f"{LAN_IP[6]}/64"),
                                       (f"{CLIENT_IP[4]}/24", f"{CLIENT_IP[6]}/64"))
            for family in 4, 6:
                add_route("default", CLIENT_IP[family])
            self.network = Network(bridge_conflist(subnets=self._subnets, **self._portmap), self._bin_dir)
            self.web = self.container("web", self.ports)
            if self._serve:
                self.serve()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def machine(self, name: str, device: str, host: tuple[str, ...], its: tuple[str, ...]) -> Namespace:
        """Another machine on a link of its own."""
        machine = wire(name, host, its, device)
        self._stack.callback(machine.remove)
        return machine

    def container(self, name: str, ports: object = (), network: Network | None = None) -> Container:
        """Another container."""
        found = Container(network or self.network, name, ports)
        self._stack.callback(self._remove, found)
        return found

    def _remove(self, container: Container) -> None:
        with contextlib.suppress(Exception):
            container.remove()
        container.namespace.remove()

    def serve(self, port: int = WEB, ip: str = "", protocol: str = "tcp",
              where: contextlib.AbstractContextManager[object] | None = None) -> Server:
        """Let a program serve a port of the container."""
        return self._stack.enter_context(Server("web", where or self.web, port, protocol, ip))

    def command(self, *words: object) -> "subprocess.CompletedProcess[str]":
        """The command, as it ended. The launcher of an installation, in this network namespace."""
        done = subprocess.run([self._bin_dir.parent / "sbin/cni-portmap", *map(str, words)], capture_output=True,
                              text=True, timeout=300, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def doctor(self, *words: str) -> tuple[list[dict[str, Any]], int]:
        """The findings, and the exit status."""
        done = self.command("doctor", *words, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout), done.returncode

    def answers(self, family: int = 4, path: str = "client", port: int = PORT, protocol: str = "tcp",
                timeout: float = PATIENT) -> bool:
        """Whether the published port answers."""
        where = self.client if path == "client" else HOST
        ip = {"client": LAN_IP[family], "host": LAN_IP[family], "localhost": {4: "127.0.0.1", 6: "::1"}[family]}[path]
        return exchange(where, ip, port, protocol, timeout=timeout) is not None

    def follow(self, advice: str) -> str:
        """Do what an advice says, as a person at this host would; the command."""
        found = re.search(r"\b((?:sysctl|nft|ip6?tables(?:-legacy|-nft)?|ip|ufw|nsenter|cni-portmap|bridge|conntrack"
                          r"|firewall-cmd) [^;,(]*)", advice)
        assert found, f"no command in: {advice}"
        command = found[1].strip().removesuffix(" and").replace(
            "cni-portmap ", f"{self._bin_dir.parent}/sbin/cni-portmap ")
        done = subprocess.run(["sh", "-euc", command], capture_output=True, text=True, timeout=60, check=False)
        assert not done.returncode, f"{command}: {done.stdout}{done.stderr}"
        return command


