"""Containers that come and go by the thousand; then the host is compared with what it was."""
import os
import pathlib
import time
from collections.abc import Callable

from .calls import Host, Pod, fork
from .namespaces import wire
from .processes import run
from .tables import state

CONTAINERS = 10


def traces() -> dict[str, list[str]]:
    """All that calls could leave behind on this host; links, routes and rules as `ip` prints them, to be compared."""
    def lines(*command: object) -> list[str]:
        return run(*command).splitlines()

    def rows(path: str) -> list[str]:
        return pathlib.Path(path).read_text().splitlines()[1:]

    def netlink_sockets() -> list[str]:
        return [row for row in rows("/proc/net/netlink") if row.split()[2] != "0"]  # 0: the kernel's own

    deadline = time.monotonic() + 5
    while netlink_sockets() and time.monotonic() < deadline:
        time.sleep(0.005)  # see kernel.leave
    return {
        "table": state(),
        "other tables": sorted(set(lines("nft", "list", "tables"))),
        "sysctls": _sysctls(),
        "routes": sorted(line for family in ("-4", "-6")
                         for line in lines("ip", family, "route", "show", "table", "all")),
        "links and rules": lines("ip", "-o", "link") + lines("ip", "rule"),
        "files": sorted(str(path) for place in ("/run", "/var/lib/cni", "/etc/cni") for path in
                        pathlib.Path(place).rglob("*")),
        "mounts": rows("/proc/self/mountinfo"),
        "netlink sockets": netlink_sockets(),
        "unix sockets": rows("/proc/net/unix"),
        "locks": [row for row in rows("/proc/locks") if f" {os.getpid()} " in row],
        "own file descriptors": sorted(os.listdir("/proc/self/fd")),
    }


def _sysctls() -> list[str]:
    found = []
    for path in pathlib.Path("/proc/sys/net").rglob("*"):
        if path.is_file() and path.name not in ("nf_conntrack_count", "flush") and os.access(path, os.R_OK):
            try:
                found.append(f"{path}={path.read_text().strip()}")
            except OSError:
                continue  # stable_secret, where none is set
    return sorted(found)


def soak(executable: pathlib.Path, cycles: int, as_process: bool = False,
         progress: Callable[[int], None] = lambda _: None) -> dict[str, tuple[set[str], set[str]]]:
    """Run the cycles: what came and what went in the meantime, by kind; nothing, if all is well."""
    host = Host(executable)
    for i in range(CONTAINERS):
        wire(f"soak{i}", (f"10.30.{i}.1/24", f"fd30:{i}::1/64"), (f"10.30.{i}.2/24", f"fd30:{i}::2/64"))

    def call(verb: str, pod: Pod) -> None:
        reply = host.call(verb, pod) if as_process else fork(verb, pod)
        assert not reply.code, reply

    before: dict[str, list[str]] = {}
    for cycle in range(-CONTAINERS, cycles):
        i, port = cycle % CONTAINERS, 1024 + cycle % 60000
        pod = Pod(f"cycle{cycle}", f"{port}:80", f"192.0.2.1:{port}:53/udp", f"127.0.0.1:{port}:81/sctp",
                          ips=(f"10.30.{i}.2/24", f"fd30:{i}::2/64"), netns=f"/run/netns/soak{i}")
        call("ADD", pod)
        if cycle % 10 == 3:
            call("ADD", pod)
        if cycle % 10 == 7:
            call("CHECK", pod)
        call("DEL", pod)
        if cycle == -1:
            before = traces()  # the base is there, and what each interface needs for localhost
        if cycle >= 0 and cycle % 1000 == 999:
            progress(cycle + 1)
    after = traces()
    return {kind: ({*after[kind]} - {*before[kind]}, {*before[kind]} - {*after[kind]}) for kind in before
            if before[kind] != after[kind]}
