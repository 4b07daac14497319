"""A host whose agent forwards what NAT cannot, with a LAN and a container."""
import contextlib
import pathlib
from typing import Any

from .agent import Agent
from .calls import Host, mapping
from .libcni_cache import Cache
from .namespaces import wire
from .processes import run, until
from .runtime import Container, Network, bridge_conflist

HOST4, HOST6 = "192.168.9.1", "fd09::1"


class Site:
    """A host with an agent, a LAN client, and a container on a bridge; `ports` in podman's short form.

    `folder`: libcni's results; `config`: keys of the plugin.
    """

    def __init__(self, host: Host, folder: pathlib.Path, *ports: str, subnets: tuple[str, ...] = ("10.88.0.0/16",),
                 **config: Any) -> None:
        self.network = Network(bridge_conflist(subnets=subnets, **config), host.executable.parent)
        self.lan = wire("lan", (f"{HOST4}/24", f"{HOST6}/64"), ("192.168.9.2/24", "fd09::2/64"))
        self.agent = Agent(host.cli, "--forward", "--metrics", f"unix:{folder}/metrics.sock", cache=folder)
        self.box = Container(self.network, "box", [mapping(port) for port in ports])
        Cache(folder).remember(self.box)

    def forwards(self, port: int, seconds: float = 30) -> bool:
        """Whether the agent holds a socket for IPv6 there, in time."""
        return bool(until(lambda: f"[::]:{port}" in run("ss", "-Hlntu"), seconds))

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *failure: object) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.lan.remove)
            stack.callback(self.box.remove)
            if failure[0]:
                print(self.agent.log)
            stack.enter_context(self.agent)
