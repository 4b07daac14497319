"""Calls of the plugin, as a runtime makes them: at once, in forks, killed; and the host where they are made."""
import contextlib
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from .faults import kill_at, system_calls, trace_me
from .links import add_veth, delete_link
from .namespaces import ensure_namespace
from .processes import until
from .tables import generation, state

from cni_portmap import cni, conditions, exposure, plugin, ruleset  # noqa: F401  # so that forks have them
from cni_portmap.linux import alive, batch, conntrack, expressions, kernel, libnftables, netlink  # noqa: F401
from cni_portmap.verbs import add, check, delete, expose, flows, gc  # noqa: F401
from cni_portmap.verbs import status as _status  # noqa: F401

LOCK = pathlib.Path("/run/cni-portmap.lock")


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
            ensure_namespace(self.netns)
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


class GcCall:
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
    """The end of a call. `code`: 0, or the error document's; a process that died has code -1 and no document."""

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

    def __init__(self, executable: object, verb: str, what: "Pod | GcCall", wrapped: tuple[object, ...] = (),
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

    With `stop_at` it is killed at the beginning of that system call, counted from 0; `look` is called at each.
    """

    def __init__(self, task: Callable[[], tuple[int, str]], prepare: Callable[[], object] = lambda: None,
                 stop_at: int = -1, look: Callable[[], object] | None = None) -> None:
        self._read, write = os.pipe()
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the fork
        self.traced = stop_at >= 0 or look is not None
        self.pid = os.fork()
        if not self.pid:
            try:
                os.dup2(self._stderr.fileno(), 2)
                add.OWNER_SECONDS = 0.2  # type: ignore[assignment]  # thousands of calls are refused
                prepare()
                if self.traced:
                    trace_me()
                os.write(write, json.dumps(task()).encode())
                for each in plugin._in_use:
                    each.leave()
            except BaseException as error:  # noqa: BLE001  # told to the parent
                os.write(write, json.dumps([1, json.dumps({"code": cni.INTERNAL, "msg": repr(error)})]).encode())
            finally:
                os._exit(0)
        os.close(write)
        self.killed = stop_at >= 0 and kill_at(self.pid, stop_at)
        if self.killed:
            os.close(self._read)
        elif look:
            for _ in system_calls(self.pid):
                look()

    def is_running(self) -> bool:
        return not self.killed and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._read)
        self.killed = True

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
        status, stdout = json.loads(data)
        return answer(status, stdout, stderr)


def start_fork(verb: str, what: "Pod | GcCall", **options: Any) -> Fork:
    """A call of the plugin in a fork, under way: its own code without the interpreter's start (40 ms)."""
    return Fork(lambda: cni.respond(plugin.HANDLERS, what.environ(verb), lambda: what.stdin(verb).encode()), **options)


def wait_long() -> None:
    """In a fork: wait a minute for a living owner, and ten for the lock. However late the others are, it still waits.
    """
    add.OWNER_SECONDS = add.ALL_SECONDS = 60
    kernel.LOCK_SECONDS = 600


def fork(verb: str, what: "Pod | GcCall", **options: Any) -> Answer:
    """The answer to a call in a fork."""
    return start_fork(verb, what, **options).answer()


def instants(start: Callable[..., Fork]) -> tuple[list[list[str]], list[int]]:
    """What our table holds at the beginning of each system call of a task, as one that is killed there would leave it.

    It is seen while the task stands still: its end changes no table. Also those where killing it is worth the time:
    where the table has just changed, and now and then. `start`: starts the task with these options of a Fork.
    """
    found: list[list[str]] = []
    generations: list[int] = []

    def look() -> None:
        generations.append(generation())
        found.append(found[-1] if generations[-2:-1] == generations[-1:] else state())

    assert not start(look=look).answer().code
    return found, [instant for instant in range(len(found))
                   if instant % 8 == 0 or generations[instant] != generations[instant - 1]]


# --- a host ---------------------------------------------------------------------------------------------------

class Host:
    """A host of its own with the plugin installed: calls, and what the kernel holds."""

    def __init__(self, executable: pathlib.Path) -> None:
        self.executable, self.cli = executable, executable.parent.parent / "sbin/cni-portmap"

    def call(self, verb: str, what: "Pod | GcCall", *wrapped: object, **options: Any) -> Answer:
        return Call(self.executable, verb, what, wrapped, **options).answer()

    def add(self, *pods: Pod) -> None:
        """ADD that must succeed."""
        for pod in pods:
            reply = self.call("ADD", pod)
            assert not reply.code, reply

    def command(self, *arguments: object, status: int = 0, within: tuple[object, ...] = ()) -> str:
        """The output of cni-portmap, run by the command line `within`; it must end with `status`."""
        words = [*within, self.cli, *arguments]
        done = subprocess.run([str(word) for word in words], text=True, capture_output=True, check=False)
        assert done.returncode == status and "Traceback" not in done.stderr, done
        return done.stdout

    def add_for_nobody(self, *pods: Pod) -> None:
        """ADD that must succeed, and records a namespace whose number none ever has.

        A real one is somebody else's as soon as it is free, and then its owner lives: other tests run beside this one.
        """
        def number() -> None:
            kernel.Kernel.namespace = lambda self, path: 1  # type: ignore[method-assign]
            cni.name_process("ADD")
        for pod in pods:
            reply = fork("ADD", pod, prepare=number)
            assert not reply.code, reply

    def add_without_link(self, *pods: Pod) -> None:
        """ADD that must succeed, of containers whose link goes then: dead, whichever processes this machine has.

        Where no link is known, a process that ends too soon, or in a chroot, makes the verdict "unknown".
        """
        for pod in pods:
            pod.link = f"gone-{pod.id}"
            add_veth(pod.link, f"peer-{pod.id}")
            self.add(pod)
            delete_link(pod.link)

    def delete(self, *pods: Pod) -> None:
        """DEL that must succeed."""
        for pod in pods:
            reply = self.call("DEL", pod)
            assert not reply.code, reply


# --- the lock -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def held_lock() -> Iterator[int]:
    """The plugin's lock is held by this process; its file descriptor."""
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def lock_is_free() -> bool:
    """Whether nobody holds the plugin's lock."""
    fd = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def wait_until_blocked(pid: int) -> None:
    """Return when a process waits for the lock."""
    assert until(lambda: re.search(rf"-> FLOCK .* {pid} ", pathlib.Path("/proc/locks").read_text())), \
        f"process {pid} does not wait for the lock"
