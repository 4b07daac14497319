"""What the tests of trust share: a host for each test, containers as a runtime describes them, calls that run at
once, fail or die, and what the kernel holds afterwards, read with nft."""
import contextlib
import ctypes
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lab
import pytest

sys.path[:0] = [str(lab.ROOT), "/usr/lib/python3/dist-packages"]
import nftables  # noqa: E402
from cni_portmap import cni, plugin, ruleset  # noqa: E402
from cni_portmap.linux import alive, conntrack, expressions, kernel, libnftables, netlink  # noqa: E402, F401
from cni_portmap.verbs import add, check, delete, flows, gc, status as _status  # noqa: E402, F401  # so that forks have them

LOCK = pathlib.Path(kernel.LOCK)
TABLE = ruleset.TABLE


# --- what a runtime says --------------------------------------------------------------------------------------

def mapping(text: str) -> dict[str, object]:
    """A port mapping from its short form, as in podman's -p: "127.0.0.1:8080:80/udp"."""
    ports, _, protocol = text.partition("/")
    host, container = ports.rsplit(":", 1)
    ip, _, host = host.rpartition(":")
    return {"hostPort": int(host), "containerPort": int(container), "protocol": protocol or "tcp",
            "hostIP": ip.strip("[]")}


class Pod:
    """An attachment of a container, as a runtime describes it to the plugin. `config`: more keys of its conflist.

    `link`: the host's end of its link, named in the result; `args`: CNI_ARGS. Its namespace is made for its first ADD,
    if it is a name that nobody has; of one that is `gone` it is not.
    """

    def __init__(self, name: str, *ports: str, ips: tuple[str, ...] = ("10.20.0.2/24",), ifname: str = "eth0",
                 network: str = "net", netns: str = "", link: str = "", args: str = "", gone: bool = False,
                 **config: object) -> None:
        self.id, self.ifname, self.network, self.ips = name, ifname, network, ips
        self.netns = netns or f"/run/netns/{name[:200]}"
        self.link, self.args, self.gone = link, args, gone
        self.config = {"cniVersion": "1.1.0", "name": network, "type": "portmap", **config}
        self.ports = [mapping(port) for port in ports]
        self.chain = ruleset.chain_of(name, ifname)

    def environ(self, verb: str) -> dict[str, str]:
        if verb == "ADD" and not self.gone:
            make_namespace(self.netns)
        return {"CNI_COMMAND": verb, "CNI_CONTAINERID": self.id, "CNI_NETNS": self.netns, "CNI_IFNAME": self.ifname,
                "CNI_PATH": "/nowhere", "CNI_ARGS": self.args}

    def stdin(self, verb: str) -> str:
        interfaces = [{"name": self.ifname, "sandbox": self.netns}] + [{"name": self.link}] * bool(self.link)
        result = {"cniVersion": self.config["cniVersion"], "interfaces": interfaces,
                  "ips": [{"address": ip, "interface": 0} for ip in self.ips]}
        return json.dumps({**self.config, "runtimeConfig": {"portMappings": self.ports}, "prevResult": result})

    def but(self, *ports: str) -> "Pod":
        """The same attachment with other ports."""
        other = Pod(self.id, *ports, ips=self.ips, ifname=self.ifname, network=self.network, netns=self.netns,
                    link=self.link, args=self.args, gone=self.gone)
        other.config = self.config
        return other


_making = threading.Lock()


def make_namespace(path: str) -> None:
    """A network namespace where a path under /run/netns says so, if there is nothing."""
    with _making:
        if path.startswith("/run/netns/") and not os.path.lexists(path):
            lab.run("ip", "netns", "add", path.rpartition("/")[2])


class Collection:
    """A GC call: who is `valid` in a network."""

    netns = ifname = id = ""

    def __init__(self, network: str, *valid: Pod) -> None:
        self.network, self.chains = network, {pod.chain for pod in valid}
        self._config = {"cniVersion": "1.1.0", "name": network, "type": "portmap", "cni.dev/valid-attachments":
                        [{"containerID": pod.id, "ifname": pod.ifname} for pod in valid]}

    def environ(self, verb: str) -> dict[str, str]:
        return {"CNI_COMMAND": verb, "CNI_PATH": "/nowhere"}

    def stdin(self, verb: str) -> str:
        return json.dumps(self._config)


# --- what the plugin answers ----------------------------------------------------------------------------------

class Answer(NamedTuple):
    """How a call ended. `code`: 0, or the error document's; a process that died has code -1 and no document."""

    code: int
    msg: str
    details: str
    document: str
    stderr: str


def answer(status: int, stdout: str, stderr: str) -> Answer:
    """Read an answer; anything but one result, or one error that is no bug of ours, fails the test."""
    assert "Traceback" not in stderr, stderr
    if status < 0:
        return Answer(-1, "", "", stdout, stderr)
    if not status:
        assert not stdout or json.loads(stdout).get("code", 0) == 0, stdout
        return Answer(0, "", "", stdout, stderr)
    assert stdout, f"status {status} without a document: {stderr}"
    error = json.loads(stdout)
    assert error["code"] not in (0, cni.INTERNAL) and error["msg"], stdout
    return Answer(error["code"], error["msg"], error.get("details", ""), stdout, stderr)


class Call:
    """A call of the executable, under way. `wrapped`: a command line that runs it, such as strace's."""

    def __init__(self, executable: object, verb: str, what: "Pod | Collection", wrapped: tuple[object, ...] = (),
                 **options: Any) -> None:
        with tempfile.TemporaryFile() as stdin:
            stdin.write(what.stdin(verb).encode())
            stdin.seek(0)
            environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **what.environ(verb)}
            self.process = subprocess.Popen([str(word) for word in (*wrapped, executable)], stdin=stdin, env=environ,
                                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    def answer(self, timeout: float = 120) -> Answer:
        stdout, stderr = self.process.communicate(timeout=timeout)
        return answer(self.process.returncode, stdout, stderr)


class Fork:
    """A task in a fork of this process, under way. `prepare` runs there first.

    With `stop_at` it is killed at that system call, counted from 0.
    """

    def __init__(self, task: Callable[[], tuple[int, str]], prepare: Callable[[], object] = lambda: None,
                 stop_at: int = -1) -> None:
        self._read, write = os.pipe()
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the fork
        self.traced = stop_at >= 0
        self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(self._stderr.fileno(), 2)
                add.STRANGER_SECONDS, add.PREDECESSOR_SECONDS = 0.2, 1  # thousands of calls are refused
                prepare()
                if self.traced:
                    _libc.ptrace(PTRACE_TRACEME, 0, None, None)
                    os.kill(os.getpid(), signal.SIGSTOP)
                os.write(write, json.dumps(task()).encode())
                for each in plugin._in_use:
                    each.leave()
            except BaseException as error:  # noqa: BLE001  # told to the parent
                os.write(write, json.dumps([1, json.dumps({"code": cni.INTERNAL, "msg": repr(error)})]).encode())
            finally:
                os._exit(0)
        os.close(write)
        self.killed = self.traced and _stop_at(self.pid, stop_at)
        if self.killed:
            os.close(self._read)

    def answer(self) -> Answer:
        if self.killed:
            return Answer(-1, "", "", "", "")
        with open(self._read, "rb") as end:
            data = end.read()
        _, ended = os.waitpid(self.pid, 0) if not self.traced else (0, 0)
        self._stderr.seek(0)
        with self._stderr:
            stderr = self._stderr.read()
        assert data, f"no answer; status {ended:#x}; {stderr}"
        return answer(*json.loads(data), stderr)


def call(verb: str, what: "Pod | Collection", **options: Any) -> Fork:
    """A call of the plugin in a fork: its own code without the interpreter's start (40 ms)."""
    return Fork(lambda: cni.respond(plugin.HANDLERS, what.environ(verb), lambda: what.stdin(verb).encode()), **options)


# ptrace(2), which has no module. Only what is the same on every architecture.
PTRACE_TRACEME, PTRACE_SYSCALL, PTRACE_SETOPTIONS = 0, 24, 0x4200
PTRACE_O_TRACESYSGOOD, PTRACE_O_EXITKILL = 1, 0x100000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p


def _stop_at(pid: int, number: int) -> bool:
    """Let a traced process run to the beginning of its system call `number`, then kill it; False if it ended before.

    Between two system calls a process changes nothing outside of itself, so these are all the instants there are.
    """
    os.waitpid(pid, 0)
    _libc.ptrace(PTRACE_SETOPTIONS, pid, None, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL)
    stops = 2 * number + 1  # each call stops at its beginning and at its end
    pending = 0
    while True:
        _libc.ptrace(PTRACE_SYSCALL, pid, None, pending)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return False
        pending = os.WSTOPSIG(status)
        if pending == signal.SIGTRAP | 0x80:
            pending = 0
            stops -= 1
            if not stops:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True


# --- a host ---------------------------------------------------------------------------------------------------

class Host:
    """A host of its own with the plugin installed: calls, and what the kernel holds."""

    def __init__(self, executable: pathlib.Path) -> None:
        self.executable = executable

    def call(self, verb: str, what: "Pod | Collection", *wrapped: object, **options: Any) -> Answer:
        return Call(self.executable, verb, what, wrapped, **options).answer()

    def add(self, *pods: Pod) -> None:
        """ADD that must succeed."""
        for pod in pods:
            reply = self.call("ADD", pod)
            assert not reply.code, reply

    def add_for_nobody(self, *pods: Pod) -> None:
        """ADD that must succeed, and records a namespace whose number none ever has.

        A real one is somebody else's as soon as it is free, and then its owner lives: other tests run beside this one.
        """
        def number() -> None:
            kernel.Kernel.namespace = lambda self, path: 1  # type: ignore[method-assign]
        for pod in pods:
            reply = fork("ADD", pod, prepare=number)
            assert not reply.code, reply

    def delete(self, *pods: Pod) -> None:
        """DEL that must succeed."""
        for pod in pods:
            reply = self.call("DEL", pod)
            assert not reply.code, reply


def conntrack_on() -> None:
    """Keep conntrack on, in a table of the lab's: see lab.enter."""
    lab.run("nft", "-f", "-", input="table inet lab { chain keep_conntrack { type filter hook forward priority 0; "
                                    "ct state new counter; }; }")


@contextlib.contextmanager
def fresh_host() -> Iterator[None]:
    """This thread is in a host of its own, until the end of the block; namespaces that the block made are removed."""
    namespaces = pathlib.Path("/run/netns")
    before = {*namespaces.glob("*")}
    os.chmod("/run", 0o755)  # root's alone, as it is everywhere
    with lab.Namespace("trust-host"):
        lab.sysctl("net.ipv4.ip_forward", 1)
        lab.sysctl("net.ipv6.conf.all.forwarding", 1)
        conntrack_on()
        yield
    for path in {*namespaces.glob("*")} - before:
        lab.run("umount", path, check=False)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    LOCK.unlink(missing_ok=True)


@pytest.fixture(name="host")
def host_fixture(bin_dir: pathlib.Path) -> Iterator[Host]:
    """A host of its own for a test, so that whatever the test breaks ends with it."""
    with fresh_host():
        yield Host(bin_dir / "portmap")


def fork(verb: str, what: "Pod | Collection", **options: Any) -> Answer:
    """The answer to a call in a fork."""
    return call(verb, what, **options).answer()


# --- what the kernel holds ------------------------------------------------------------------------------------

def nft(*lines: str) -> None:
    """Run nft commands, as one transaction, in the name of somebody else."""
    lab.run("nft", "-f", "-", input="\n".join(lines) + "\n")


def listing(what: str = f"table {TABLE}") -> list[dict[str, Any]]:
    """`nft -j list`, without handles and counters' values; [] where there is no such thing."""
    context = nftables.Nftables()  # not kept: it belongs to the namespace in which it was made
    context.set_json_output(True)
    context.set_stateless_output(True)
    code, output, error = context.cmd(f"list {what}")
    assert not code or "No such file" in error, error
    if code or not output:
        return []
    objects: list[dict[str, Any]] = json.loads(output)["nftables"]
    return [entry for entry in map(_without_handles, objects) if "metainfo" not in entry]


def _without_handles(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_handles(item) for key, item in value.items() if key != "handle"}
    return [_without_handles(item) for item in value] if isinstance(value, list) else value


def state() -> list[str]:
    """All that the table holds, a line each, sorted but for the rules of a chain; [] for no table."""
    lines: list[tuple[str, str]] = []
    for entry in listing():
        (kind, thing), = entry.items()
        for element in thing.pop("elem", ()):
            line = f"element of {thing['name']}: {json.dumps(element)}"
            lines.append((line, line))
        line = f"{kind}: {json.dumps(thing)}"
        lines.append((f"rule of {thing['chain']}" if kind == "rule" else line, line))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def elements(entries: list[dict[str, Any]] | None = None) -> dict[tuple[str, ...], str]:
    """Which chain each map element leads to: (family or address, protocol, port) -> chain."""
    return {tuple(map(str, key["concat"])): (verdict.get("goto") or {"target": str(verdict)})["target"]
            for entry in entries or listing() for key, verdict in entry.get("map", {}).get("elem", ())}


def generation() -> int:
    """How many transactions nf_tables has committed here."""
    reply, = netlink.Socket(netlink.NETLINK_NETFILTER).ask(10 << 8 | 16, bytes(4))  # NFT_MSG_GETGEN
    return int.from_bytes(dict(netlink.attributes(reply, 4))[1], "big")  # NFTA_GEN_ID


def chains() -> list[str]:
    """The attachments' chains."""
    return sorted(name for entry in listing() if (name := entry.get("chain", {}).get("name", "")).startswith("c/"))
