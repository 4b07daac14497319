"""The flows that the host tracks, read and made with the command `conntrack`."""
import re
from typing import NamedTuple

from .processes import run


class TrackedFlow(NamedTuple):
    """A flow that the host tracks; `target` answers it."""

    source: str
    source_port: int
    destination: str
    port: int
    target: str


_FLOW = re.compile(r"src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+) .*?src=(\S+)")


def flows(protocol: str, port: int, family: int = 4) -> set[TrackedFlow]:
    """The flows to a port that the host tracks."""
    lines = run("conntrack", "-L", "-f", f"ipv{family}", "-p", protocol, "--dport", port)
    return {TrackedFlow(source, int(source_port), destination, int(its_port), target)
            for source, destination, source_port, its_port, target in _FLOW.findall(lines)}


def track(count: int, ip: str, port: int, target: str = "", ports: int = 1) -> None:
    """Let the host track `count` more UDP flows from 10.128.0.0/9 to `ip`, spread over `ports` ports from `port` on.

    `target`: the container that answers them, on the same port; without one, nobody has translated them.
    """
    lines = []
    for i in range(count):
        source, its_port = f"10.{128 + (i >> 16)}.{i >> 8 & 255}.{i & 255}", port + i % ports
        lines.append(f"-A -p udp -s {source} -d {ip} --sport 1000 --dport {its_port} --reply-src {target or ip} "
                     f"--reply-dst {source} --reply-port-src {its_port} --reply-port-dst 1000 --timeout 600\n")
    run("conntrack", "-R", "-", input="".join(lines))


def tracked() -> int:
    """The number of flows that the host tracks."""
    return int(run("conntrack", "-C"))
