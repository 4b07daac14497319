"""Containers that come and go by the thousand; then the host is compared with what it was."""
import os
import pathlib
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from .agent import Agent
from .calls import Host, Pod, fork
from .libcni_cache import Cache
from .links import have_settled
from .namespaces import wire
from .processes import run, until
from .tables import keep_conntrack, nft_script, state, table

CONTAINERS = 10


def traces() -> dict[str, list[str]]:
    """All that calls could leave behind on this host; links, routes and rules as `ip` prints them, to be compared."""
    def lines(*command: object) -> list[str]:
        return run(*command).splitlines()

    def rows(path: str) -> list[str]:
        return pathlib.Path(path).read_text().splitlines()[1:]

    def netlink_sockets() -> list[str]:
        return [row for row in rows("/proc/net/netlink") if row.split()[2] != "0"]  # 0: the kernel's own

    until(lambda: not netlink_sockets())  # see kernel.leave
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
    assert until(have_settled)

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


# --- the agent ------------------------------------------------------------------------------------------------

KEPT = 100  # containers that stay
FLUSH, SCRAPE, RELOAD = 90, 15, 600  # seconds from one to the next; so long after a flush the next is healed at once


class Use(NamedTuple):
    """What an agent uses. `cpu`: seconds since its start, with its children that ended; memory in bytes."""

    minute: int
    rss: int
    anonymous: int
    fds: int
    threads: int
    children: int
    cpu: float


def use(minute: int, agent: Agent) -> Use:
    """What the agent uses now."""
    folder = pathlib.Path(f"/proc/{agent.process.pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return Use(minute, agent.rss(), int(status["RssAnon"].split()[0]) << 10, len(os.listdir(folder / "fd")),
               int(status["Threads"]), len(agent.children()), agent.cpu())


def soak_agent(host: Host, minutes: int, progress: Callable[[Use], None] = lambda _: None) -> list[Use]:
    """What an agent with all its options uses, minute by minute, while containers come and go and others flush.

    Each second a container comes and goes, with libcni's file, and every ninth does not say so (only its namespace
    goes); every 90 seconds the ruleset is flushed, and has to be back byte for byte.
    """
    wire("soak", ("10.30.0.1/24", "fd30::1/64"), ("10.30.0.2/24", "fd30::2/64"))
    kept = [Pod(f"kept{i}", f"{20000 + i}:80", f"{20000 + i}:53/udp", netns="/run/netns/soak") for i in range(KEPT)]
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(pathlib.Path(folder, "results"))
        cache.folder.mkdir()
        host.add(*kept)
        for pod in kept:
            cache.write(pod)
        path = f"{folder}/metrics"
        with Agent(host.cli, "--forward", "--metrics", f"unix:{path}", "--gc-seconds", 20, cache=cache.folder) as agent:
            began = time.monotonic()
            found = [use(0, agent)]
            for second in range(1, minutes * 60 + 1):
                time.sleep(max(0.0, began + second - time.monotonic()))
                _come_and_go(host, second, cache)
                if second % FLUSH == 0:
                    _flush(agent)
                if second % SCRAPE == 0:
                    _scrape(path)
                if second % RELOAD == 0:
                    agent.send(signal.SIGHUP)
                    agent.wait_for("RELOADING=1")
                if second % 60 == 0:
                    until(lambda: not agent.children(), 20)
                    found.append(use(second // 60, agent))
                    progress(found[-1])
    return found


def _come_and_go(host: Host, second: int, cache: Cache) -> None:
    port = 30000 + second % 1000
    pod = Pod(f"cycle{second}", f"{port}:80", f"127.0.0.1:{port}:53/udp", netns="/run/netns/soak")
    if second % 9 == 0:
        host.add_for_nobody(pod)
        return
    host.add(pod)
    file = cache.write(pod)
    host.delete(pod)
    file.unlink()


def _flush(agent: Agent) -> None:
    before, heals = table(), agent.log.count(" map elements in ")
    nft_script("flush ruleset")
    keep_conntrack()
    assert until(lambda: agent.log.count(" map elements in ") > heals, 30), agent.log
    since = agent.log.rpartition(" map elements in ")[2]
    assert table() == before or "removed" in since, since


def _scrape(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = b""
        while chunk := sock.recv(1 << 16):
            answer += chunk
    assert answer.startswith(b"HTTP/1.0 200"), answer
