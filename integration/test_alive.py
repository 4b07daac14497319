"""Whether an owner is alive, as seen from everywhere, and what an ADD does that meets a living one."""
import base64
import contextlib
import ctypes
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator

import lab
import pytest
from lab import TABLE, Call, Host, Pod, fork

from cni_portmap import libcni_cache
from cni_portmap.linux import kernel
from cni_portmap.verbs.restore import prune, restore

WHOLE_ID = "5f0c1b" + "a" * 58


def wired(name: str, *ports: str, number: int = 2, **options: str) -> Pod:
    """A container with a link, whose end on this host its result names; `bare` has no such name."""
    wire = lab.wire(name, (f"10.20.{number}.1/24",), (f"10.20.{number}.2/24",))
    return Pod(name, *ports, ips=(f"10.20.{number}.2/24",), link=wire.host_device, **options)


def bare(name: str, *ports: str, **options: str) -> Pod:
    """A container of whose link the result says nothing, as with macvlan; a record of version 0.1 is like that."""
    return Pod(name, *ports, **options)


def end(pod: Pod, host: Host | None = None) -> None:
    """The container ends without DEL. On a `host` that knows no link of it, its number is nobody's from then on."""
    if pod.link:
        lab.delete_link(pod.link)
    elif host:
        host.add_for_nobody(pod)
    lab.delete_namespace(pathlib.Path(pod.netns).name)


def owners(host: Host, within: tuple[str, ...] = ()) -> dict[str, str]:
    """The state of each owner, by container ID, as `list` says."""
    listed = json.loads(host.command("list", "--json", within=within))
    return {each["container_id"]: each["owner"] for each in listed}


@contextlib.contextmanager
def sleeper(*within: str) -> Iterator[int]:
    """A process that sleeps, started by the command line `within`; its process ID."""
    with subprocess.Popen([*within, "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


# --- from everywhere ------------------------------------------------------------------------------------------

ELSEWHERE = {
    "other mounts": ("unshare", "--mount", "--propagation", "private", "sh", "-c",
                     'for path in /run/netns/*; do umount "$path"; done 2>/dev/null; exec "$@"', "sh"),
    "no PID namespace of the host": ("unshare", "--pid", "--fork", "--mount-proc"),
    "hidepid": ("unshare", "--mount", "--propagation", "private", "sh", "-c",
                'mount -t proc -o hidepid=2 proc /proc && exec "$@"', "sh"),
    "subset": ("unshare", "--mount", "--propagation", "private", "sh", "-c",
               'mount -t proc -o subset=pid proc /proc && exec "$@"', "sh"),
    "no CAP_SYS_PTRACE": ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"),
}
BLIND = {*ELSEWHERE} - {"other mounts"}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_link_says_the_same_everywhere(host, where):
    """A link exists or is gone, from every namespace: so `list` is right, and gc takes the dead only."""
    alive, dead = wired("alive", "8080:80"), wired("dead", "9090:90", number=3)
    host.add(alive, dead)
    end(dead)
    within = ELSEWHERE[where]
    assert owners(host, within) == {"alive": "alive", "dead": "dead"}
    reply = host.call("ADD", Pod("heir", "8080:80", netns="/proc/self/ns/net"), *within)
    assert reply.code == 101 and lab.chains() == [alive.chain, dead.chain]
    host.command("gc", within=within)
    assert lab.chains() == [alive.chain]


@pytest.mark.parametrize("where", ELSEWHERE)
def test_without_a_link_absence_needs_proof(host, where):
    """A namespace that is not found is dead for those who see everything; others cannot say, so it stays."""
    alive, dead = bare("alive", "8080:80"), bare("dead", "9090:90")
    host.add(alive)
    host.add_for_nobody(dead)
    end(dead)
    within = ELSEWHERE[where]
    with sleeper("nsenter", f"--net={alive.netns}"):
        seen = owners(host, within)
        assert seen["dead"] == ("unknown" if where in BLIND else "dead") and seen["alive"] != "dead"
        said = host.command("gc", within=within)
        assert lab.chains() == [alive.chain] + [dead.chain] * (where in BLIND)
        assert ("cannot tell" in said) == (where in BLIND)
        if where in BLIND:
            reply = host.call("ADD", Pod("heir", "9090:90", netns="/proc/self/ns/net"), *within)
            assert reply.code == 101 and "cannot tell" in reply.details
    host.add(Pod("heir", "9090:90"))  # by one who sees


@pytest.mark.parametrize("holder", ["process", "thread", "descriptor", "mount elsewhere", "link"])
def test_what_keeps_a_namespace_alive(host, holder):
    """A namespace whose path is gone lives on in a process, a descriptor, or somebody's own mounts."""
    pod = wired("web", "8080:80") if holder == "link" else bare("web", "8080:80")
    host.add(pod)
    with contextlib.ExitStack() as stack:
        if holder == "process":
            stack.enter_context(sleeper("nsenter", f"--net={pod.netns}"))
        elif holder in ("descriptor", "link"):
            fd = os.open(pod.netns, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        elif holder == "mount elsewhere":
            stack.enter_context(sleeper("unshare", "--mount", "--propagation", "private"))
        else:
            process = stack.enter_context(subprocess.Popen(
                ["nsenter", f"--net={pod.netns}", "/usr/bin/python3", "-c", THREAD], stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline()
            assert lab.until(lambda: "zombie" in pathlib.Path(f"/proc/{process.pid}/status").read_text())
        lab.run("umount", "--lazy", pod.netns)
        if holder != "mount elsewhere":
            os.unlink(pod.netns)  # the kernel then ends what is mounted on it elsewhere
        assert owners(host) == {"web": "alive"}
        assert host.call("ADD", Pod("other", "8080:80")).code == 101


THREAD = """
import ctypes
import threading
import time
threading.Thread(target=time.sleep, args=(1000,)).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_that_moves_on(host):
    """A process leaves the namespace that its path in /proc led to: the namespace, with its child, lives."""
    path = lab.Namespace("moved").path
    with sleeper("nsenter", f"--net={path}") as child:
        inner = os.readlink(f"/proc/{child}/ns/net")
        with subprocess.Popen(["nsenter", f"--net={path}", "/usr/bin/python3", "-c", MOVES], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdout.readline()
            pod = Pod("web", "8080:80", netns=f"/proc/{process.pid}/ns/net")
            host.add(pod)
            process.stdin.write("go\n")
            process.stdin.flush()
            process.stdout.readline()
            assert os.readlink(pod.netns) != inner
            lab.delete_namespace("moved")
            assert owners(host) == {"web": "alive"}
            assert host.call("ADD", Pod("other", "8080:80")).code == 101


MOVES = """
import ctypes
print(flush=True)
input()
assert not ctypes.CDLL(None).unshare(0x40000000)
print(flush=True)
input()
"""


# --- at the last moment ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [wired, bare])
def test_add_for_a_container_that_is_gone(host, make):
    """It is refused, publishes nothing, and blocks nobody; one that publishes nothing is not looked at."""
    pod = make("web", "8080:80")
    lab.ensure_namespace(pod.netns)
    end(pod)
    pod.gone = True
    reply = host.call("ADD", pod)
    assert reply.code == 4 and "CNI_NETNS" in reply.msg and not lab.chains()
    assert not host.call("ADD", pod.but()).code
    host.add(Pod("other", "8080:80"))


@pytest.mark.parametrize("make", [wired, bare])
def test_deleted_while_add_waits_for_the_lock(host, make):
    """DEL answers at once, the container goes, and then the ADD that waited publishes nothing."""
    pod = make("web", "8080:80")
    lab.ensure_namespace(pod.netns)
    host.add(Pod("bystander", "1000:80"))
    with lab.held_lock():
        call = Call(host.executable, "ADD", pod)
        lab.wait_until_blocked(call.process.pid)
        assert not host.call("DEL", pod).code
        end(pod)
    assert call.answer().code == 4 and lab.chains() == ["c/bystander/eth0"]


class Late(kernel.Kernel):
    """A kernel whose lock is another's at first, who does something meanwhile."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    def lock(self) -> kernel.Lock:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()
        return super().lock()


@pytest.mark.parametrize("make", [wired, bare])
def test_gc_spares_who_comes_back(host, make):
    """A container that is started again while gc waits for the lock keeps its ports, though gc had found it dead."""
    pods = [make(name, f"{port}:80", number=number) if make is wired else make(name, f"{port}:80")
            for name, port, number in (("web", 8080, 2), ("dead", 9090, 3))]
    host.add(*pods)
    for pod in pods:
        end(pod, host)
    found, _ = prune(Late(lambda: host.add(
        wired("web", "8080:80", number=4) if make is wired else bare("web", "8080:80"))))
    assert {owner.container_id: state for owner, (state, _) in found} == {"web": "dead", "dead": "dead"}
    assert lab.chains() == [pods[0].chain] and owners(host) == {"web": "alive"}


@pytest.mark.parametrize("make", [wired, bare])
@pytest.mark.parametrize("meanwhile", ["nothing", "DEL", "the container ends"])
def test_restore_looks_again(host, make, meanwhile, tmp_path):
    """libcni's file goes while restore waits for the lock: that means DEL. A link that goes says the same."""
    pod = make("web", "8080:80")
    host.add(pod)
    conflist = {"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "bridge"}, {
        "type": "portmap", "capabilities": {"portMappings": True}}]}
    file = tmp_path / "net-web-eth0"
    file.write_text(json.dumps({
        "kind": "cniCacheV1", "containerId": pod.id, "ifName": "eth0", "networkName": "net", "netns": pod.netns,
        "config": base64.b64encode(json.dumps(conflist).encode()).decode(), "cniArgs": [["K8S_POD_NAME", "web"]],
        "capabilityArgs": {"portMappings": pod.ports}, "result": json.loads(pod.stdin("ADD"))["prevResult"]}))
    lab.nft_script(f"delete table {TABLE}")
    memory = libcni_cache.Memory([tmp_path])
    act = {"nothing": lambda: None, "DEL": file.unlink, "the container ends": lambda: end(pod)}[meanwhile]
    lost, refused = restore([found for _, found in memory.found], Late(act), False, memory.is_current)
    spared = meanwhile == "nothing" or (make is bare and meanwhile != "DEL")
    assert (len(lost), refused, lab.chains()) == (spared, [], [pod.chain] * spared)


@pytest.mark.parametrize("make", [wired, bare])
def test_a_new_namespace_of_the_same_name(host, make):
    """`ip netns add web`, again: the kernel may give it the same number, and the dead must be replaced even so."""
    pod = make("web", "8080:80")
    lab.ensure_namespace(pod.netns)
    host.add(pod)
    record = "".join(line for line in lab.state() if "netns=" in line)
    number = os.stat(pod.netns).st_ino
    assert str(number) in record
    if make is wired:
        lab.delete_link(pod.link)
    second = Pod("second", "8080:80", netns=pod.netns)  # its namespace has the number of the first
    host.add(second)
    assert lab.chains() == [second.chain]


def test_a_path_that_hangs_holds_nobody_up(host):
    """A namespace was mounted on a file system that does not answer any more: only who asks for its port waits."""
    path = pathlib.Path("/run/fs/ns")
    path.parent.mkdir()
    path.touch()
    lab.run("mount", "--bind", lab.Namespace("first").path, path)
    host.add(Pod("first", "8080:80", netns=str(path)))
    lab.run("umount", path)
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    assert not ctypes.CDLL(None).mount(b"hung", str(path.parent).encode(), b"fuse", 0, options)
    try:
        assert host.call("ADD", Pod("second", "8080:80")).code == 101
        pod = Pod("web", "9090:90", netns=str(path))
        call = Call(host.executable, "ADD", pod)
        host.add(Pod("third", "7070:70"))
        assert call.process.poll() is None
    finally:
        os.close(fuse)
        lab.run("umount", "--lazy", path.parent)
    call.answer()


# --- who is who -----------------------------------------------------------------------------------------------

def test_check_by_another_path(host):
    """/var/run is /run, and /proc/PID/ns/net leads there too: CHECK compares what they lead to."""
    pod = wired("web", "8080:80")
    host.add(pod)
    with sleeper("nsenter", f"--net={pod.netns}") as process:
        for path in f"/proc/{process}/ns/net", "/run/../run/netns/web":
            other = pod.but("8080:80")
            other.netns = path
            assert not host.call("CHECK", other).code
        other.netns = lab.Namespace("other").path
        reply = host.call("CHECK", other)
        assert reply.code == 104 and "another network namespace" in reply.msg
    end(pod)
    reply = host.call("CHECK", pod)
    assert reply.code == 104 and "gone" in reply.msg


@pytest.mark.parametrize("make", [wired, bare])
def test_a_namesake_in_another_network(host, make):
    """Two runtimes use one container ID, in two networks: the second is refused while the first lives."""
    first = make("web", "8080:80", network="blue")
    host.add(first)
    before = lab.state()
    second = Pod("web", "9090:90", network="red", netns=lab.Namespace("second").path)
    reply = host.call("ADD", second)
    assert reply.code == 101 and "network blue" in reply.msg and lab.state() == before
    end(first, host)
    host.add(second)
    assert lab.elements() == {("ipv4", "tcp", "9090"): second.chain}


def test_people_know_pods(host):
    """Refusals and `list` name the pod, and the whole container ID."""
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-7d9f"
    host.add(wired(WHOLE_ID[:8], "8080:80").but("8080:80"))
    host.add(Pod(WHOLE_ID, "9090:90", args=args))
    reply = host.call("ADD", Pod("second", "9090:90"))
    assert f"published by pod shop/web-7d9f, container {WHOLE_ID}, " in reply.msg and "waited " in reply.msg
    listed = json.loads(host.command("list", "--json"))
    assert {each["container_id"]: each["pod"] for each in listed} == {WHOLE_ID[:8]: "", WHOLE_ID: "shop/web-7d9f"}
    table = host.command("list", "--port", "9090").splitlines()
    assert "POD" in table[0] and "shop/web-7d9f" in table[1]
    assert not host.call("CHECK", Pod(WHOLE_ID, "9090:90", args=args)).code
    assert not host.call("CHECK", Pod(WHOLE_ID, "9090:90")).code


# --- waiting --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("leaves", ["DEL", "dies"])
def test_hand_over(host, leaves):
    """The next container's ADD comes before the last one's DEL: it waits, holds nobody up, and gets the port."""
    last, following = wired("last", "8080:80"), wired("next", "8080:80", number=3)
    host.add(last)
    call = lab.start_fork("ADD", following, prepare=lab.wait_long)
    host.add(Pod("third", "7070:70"))  # another ADD goes on
    assert lab.until(lab.lock_is_free) and call.is_running()  # it may be about to take its first look
    if leaves == "DEL":
        host.delete(last)
    else:
        end(last)
    assert not call.answer().code
    assert lab.elements()["ipv4", "tcp", "8080"] == following.chain and last.chain not in lab.chains()


def test_killed_while_it_waits(host):
    """An ADD that is killed while it waits for an owner leaves nothing behind, and holds nothing."""
    host.add(Pod("owner", "8080:80"))
    before = lab.state()
    call = lab.start_fork("ADD", Pod("second", "8080:80"), prepare=lab.wait_long)
    assert lab.until(lambda: "clock_nanosleep" in pathlib.Path(f"/proc/{call.pid}/stack").read_text()
                     or "hrtimer_nanosleep" in pathlib.Path(f"/proc/{call.pid}/wchan").read_text())
    call.kill()
    assert lab.state() == before and lab.lock_is_free()


# --- nobody waits for somebody else ---------------------------------------------------------------------------

def test_a_stopped_terminal_holds_nobody_up(host):
    """Warnings are written after the lock: a full pipe on standard error stops its own call only."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
    os.set_blocking(write, True)
    owner = Pod("web", "8080:80")
    host.add(owner)
    stand_by = Pod("web", "8080:80", ifname="net1", netns=owner.netns)  # has something to warn of
    call = subprocess.Popen([host.executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=write,
                            env={"PATH": "/usr/sbin:/usr/bin", **stand_by.environ("ADD")})
    assert call.stdin is not None
    call.stdin.write(stand_by.stdin("ADD").encode())
    call.stdin.close()
    assert lab.until(lambda: stand_by.chain in lab.chains())
    host.add(Pod("other", "9090:90"))
    assert call.poll() is None
    os.close(write)
    os.close(read)
    call.wait()


# What somebody else does between what a call reads and what it writes.
MEANWHILE = {
    "flush": [f"delete table {TABLE}"],
    "another table": ["add table inet another"],
    "a port of its own": [f"delete element {TABLE} hostports {{ ipv4 . tcp . 8080 }}"],
}


@pytest.mark.parametrize("verb, what", [("ADD", "flush"), *((verb, what) for verb in ("ADD again", "DEL")
                                                              for what in MEANWHILE)])
def test_another_hand_in_the_middle(host, verb, what):
    """Somebody changes the ruleset between what a call reads and what it writes: it reads again, and succeeds."""
    pod = Pod("web", "8080:80")
    host.add(pod)
    if verb == "ADD":
        pod = Pod("second", "9090:90")

    def prepare() -> None:
        write = kernel.Kernel.write

        def late(*arguments: object) -> object:
            kernel.Kernel.write = write
            lab.nft_script(*MEANWHILE[what])
            return write(*arguments)
        kernel.Kernel.write = late
    reply = fork(verb.split()[0], pod, prepare=prepare)
    assert not reply.code, reply
    assert lab.chains() == [pod.chain] * (verb != "DEL")
    assert verb == "DEL" or not host.call("CHECK", pod).code
