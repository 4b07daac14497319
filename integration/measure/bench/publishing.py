"""The cost of publishing a port, beside netavark: a call that connects a container and publishes a port, less one
that only connects it. netavark does both in one process, so nothing else can be compared.
"""
import itertools
import json
from collections.abc import Callable, Iterator

import lab

from . import process, subjects
from .results import Key, Results, Sample, interleave
from .subjects import Nodes, Published, Subject, TimedCall

PACKAGE, NETAVARK = "netavark", "/usr/lib/podman/netavark"
NETAVARKS = -1  # the "number of containers" of its node, which nobody else uses
COMMANDS = {"ADD": "setup", "DEL": "teardown"}
NETWORK = {"name": "bench", "id": "b" * 64, "driver": "bridge", "network_interface": "podman9",
           "created": "2026-01-01T00:00:00Z", "subnets": [{"subnet": "10.89.0.0/16", "gateway": "10.89.0.1"}],
           "ipv6_enabled": False, "internal": False, "dns_enabled": False, "ipam_options": {"driver": "host-local"}}


def measure(everybody: list[Subject], netavark: str, nodes: Nodes, results: Results, rounds: int) -> None:
    """The difference, round by round. `netavark`: what it is called."""
    cells = [_cell(subject.name, nodes, subject, lambda container, subject=subject: {  # type: ignore[misc]
        verb: TimedCall.of(subject, verb, container) for verb in COMMANDS}) for subject in everybody]
    cells.append(_cell(netavark, nodes, None, lambda container: _netavark(container, "10.89.0.2", subjects.NETNS)))
    resident = _netavark(process.NONE, "10.89.0.3", lab.Namespace("resident").path)["ADD"]
    with nodes.of(None, NETAVARKS).namespace:
        resident.run()  # so that its bridge is there, as it is for the others
    interleave("publishing", cells, results, rounds, 60)


def _cell(name: str, nodes: Nodes, subject: Subject | None, calls: Callable[[Published], dict[str, TimedCall]]) \
        -> Callable[[], Sample]:
    node, number = nodes.of(subject, 0 if subject else NETAVARKS), itertools.count()
    lives = [calls(process.NONE), calls(process.ONE)]

    def sample() -> Iterator[tuple[Key, float]]:
        took = {}
        with node.namespace:
            for index in (0, 1) if next(number) % 2 else (1, 0):
                took[index] = {verb: call.run()[0] for verb, call in lives[index].items()}
        for verb in COMMANDS:
            yield Key(f"{verb}, publishing", "1 TCP port", 0, name), took[1][verb] - took[0][verb]
    return sample


def _netavark(container: Published, ip: str, netns: object) -> dict[str, TimedCall]:
    request = {"container_id": ip[-1] * 64, "container_name": container.container_id,
               "networks": {"bench": {"static_ips": [ip], "interface_name": subjects.IFNAME}},
               "network_info": {"bench": NETWORK},
               "port_mappings": [{"host_ip": "", "host_port": host, "container_port": inner, "range": 1,
                                  "protocol": container.protocol} for host, inner in container.ports]}
    return {verb: TimedCall([NETAVARK, "--config", "/run/bench/netavark", command, str(netns)],
                            stdin=json.dumps(request).encode()) for verb, command in COMMANDS.items()}
