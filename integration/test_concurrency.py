"""Many calls at once, and the lock that orders them."""
import fcntl
import itertools
import os
import pathlib
import re
import signal
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import lab
import pytest
from cni_portmap.linux import kernel
from lab import LOCK, Answer, Call, GcCall, Host, Pod, fork


def at_once(host: Host, calls: "list[tuple[str, Pod | GcCall]]") -> list[Answer]:
    """The answers to calls of the executable that all run at the same time, in their order."""
    under_way = [Call(host.executable, verb, what) for verb, what in calls]
    with ThreadPoolExecutor(len(calls)) as readers:
        return [*readers.map(Call.answer, under_way)]


def crowd(calls: "list[tuple[str, Pod | GcCall]]") -> list[Answer]:
    """The same of forks, for so many that a busy host does not let each of them have the lock within 30 seconds."""
    under_way = [lab.start_fork(verb, what, prepare=lab.wait_long) for verb, what in calls]
    return [each.answer() for each in under_way]


# --- races ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prepared", [False, True], ids=["first ADD ever", "base is there"])
@pytest.mark.parametrize("dead", [False, True], ids=["free port", "dead owner"])
def test_twelve_racers(host, prepared, dead):
    """Of twelve containers that claim one port at once, one gets it and eleven are told who has it."""
    if prepared:
        host.add(Pod("bystander", "1000:80"))
    if dead:
        namespace = lab.Namespace("dead")
        host.add_for_nobody(Pod("dead", "8080:80"))
        namespace.remove()
    racers = [Pod(f"racer{i}", "8080:80" if i % 2 else "192.0.2.1:8080:80", f"{9000 + i}:80") for i in range(12)]
    answers = at_once(host, [("ADD", pod) for pod in racers])
    assert sorted(answer.code for answer in answers) == [0] + [101] * 11
    winner = racers[[answer.code for answer in answers].index(0)]
    assert all(f"container {winner.id}," in answer.msg for answer in answers if answer.code)
    assert lab.chains() == sorted([winner.chain] + (["c/bystander/eth0"] if prepared else []))
    assert not host.call("CHECK", winner).code


def test_two_hundred(host):
    """200 containers come at once, the first ever, to one base; go at once, and leave the table as it was."""
    first = Pod("first", "1000:80")
    host.add(first)
    base = [line for line in lab.state() if first.chain not in line]
    host.delete(first)
    assert lab.state() == base
    lab.nft_script(f"delete table {lab.TABLE}")
    pods = [Pod(f"pod{i}", f"{10000 + i}:80", f"192.0.2.1:{20000 + i}:53/udp", ips=(f"10.20.0.{i}/16",))
            for i in range(200)]
    for pod, answer in zip(pods, crowd([("ADD", pod) for pod in pods])):
        assert not answer.code, (pod.id, answer)
    assert len(lab.elements()) == 400 and lab.chains() == sorted(pod.chain for pod in pods)
    for answer in crowd([("CHECK", pod) for pod in pods[::20]]):
        assert not answer.code, answer
    for pod, answer in zip(pods, crowd([("DEL", pod) for pod in pods])):
        assert not answer.code, (pod.id, answer)
    assert lab.state() == base


def test_everything_at_once(host):
    """ADD, ADD again, CHECK, DEL and GC of 40 containers at once: all succeed, and what should remain remains."""
    coming, going, staying, stale = ([Pod(f"{name}{i}", f"{port + i}:80", network=network) for i in range(10)]
                                     for name, port, network in (("coming", 10000, "net"), ("going", 11000, "net"),
                                                                 ("staying", 12000, "net"), ("stale", 13000, "old")))
    host.add(*going, *staying, *stale)
    calls: list[tuple[str, Pod | GcCall]] = [("ADD", pod) for pod in coming + staying]
    calls += [("DEL", pod) for pod in going] * 2 + [("CHECK", pod) for pod in staying] * 2
    calls += [("GC", GcCall("old")), ("GC", GcCall("net", *coming, *going, *staying))] * 3
    for (verb, what), answer in zip(calls, crowd(calls)):
        assert not answer.code, (verb, what.id, answer)
    assert lab.chains() == sorted(pod.chain for pod in coming + staying)
    for answer in crowd([("CHECK", pod) for pod in coming + staying]):
        assert not answer.code, answer


def test_the_table_goes_under_an_add(host):
    """At any instant after its first transaction: ADD succeeds, and takes nobody's deletion for an old libnftables."""
    web, places = Pod("web", "8080:80"), itertools.count()
    is_deleted = True
    while is_deleted:
        before, place, is_deleted = lab.generation(), next(places), False
        instants = itertools.count()

        def look():
            nonlocal is_deleted
            if lab.generation() != before and not is_deleted and next(instants) == place:  # noqa: B023
                lab.nft_script(f"add table {lab.TABLE}", f"delete table {lab.TABLE}")
                is_deleted = True
        answer = lab.start_fork("ADD", web, look=look).answer()
        assert not answer.code, (place, answer)
        lab.nft_script(f"add table {lab.TABLE}", f"delete table {lab.TABLE}")
    assert place > 15


def test_foreign_changes(host):
    """Another program that changes its own rules all the time makes no call fail."""
    with lab.foreign_changes():
        pods = [Pod(f"pod{i}", *(f"{10000 + 100 * i + port}:80" for port in range(20))) for i in range(8)]
        for verb in ("ADD", "CHECK", "ADD", "CHECK", "DEL") * 2:
            for answer in at_once(host, [(verb, pod) for pod in pods]):
                assert not answer.code, (verb, answer)
    assert not lab.chains() and not lab.elements()


# --- the lock -------------------------------------------------------------------------------------------------

def impatient() -> None:
    """Wait for the lock for 0.2 seconds only."""
    kernel.LOCK_SECONDS = 0.2


def blocking_alarms() -> None:
    """As a runtime may start us: its signal mask is inherited."""
    impatient()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])


@pytest.mark.parametrize("prepare", [impatient, blocking_alarms])
@pytest.mark.parametrize("verb", ["ADD", "DEL", "CHECK", "GC"])
def test_wait_is_bounded(host, verb, prepare):
    """A call that does not get the lock in time says so with code 11, and has changed nothing."""
    web = Pod("web", "8080:80")
    host.add(web)
    before = lab.state()
    with lab.held_lock():
        call = lab.start_fork(verb, GcCall("net") if verb == "GC" else web, prepare=prepare)
        deadline = threading.Timer(60, os.kill, (call.pid, signal.SIGKILL))
        deadline.start()
        reply = call.answer()
        deadline.cancel()
    assert reply.code == 11 and str(LOCK) in reply.msg
    assert lab.state() == before


def test_no_lock_without_need(host):
    """A container that publishes nothing waits for nobody."""
    with lab.held_lock():
        for verb in "ADD", "CHECK", "DEL":
            assert not host.call(verb, Pod("quiet")).code


@pytest.mark.parametrize("wait", ["before the lock", "while it waits"])
def test_death_releases(host, wait):
    """A call that is killed while it holds the lock, or waits for it, holds up nobody."""
    with lab.held_lock() as fd:
        waiting = Call(host.executable, "ADD", Pod("waiting", "8080:80"))
        lab.wait_until_blocked(waiting.process.pid)
        if wait == "while it waits":
            waiting.process.kill()
            assert waiting.answer().code == -1
        fcntl.flock(fd, fcntl.LOCK_UN)
        if wait == "before the lock":
            assert not waiting.answer().code
    host.add(Pod("next", "9090:80"))
    assert ("c/waiting/eth0" in lab.chains()) == (wait == "before the lock")


def test_death_of_a_holder_releases(host):
    """A call that waits for the lock goes on as soon as the holder is killed."""
    with lab.held_lock():
        holder = os.fork()
        if not holder:
            signal.pause()  # holds the lock's open file too
            os._exit(0)
    waiting = Call(host.executable, "ADD", Pod("waiting", "8080:80"))
    lab.wait_until_blocked(waiting.process.pid)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert not waiting.answer().code


def test_never_held_while_a_socket_closes(host, tmp_path):
    """No netfilter socket is closed between taking the lock and releasing it: that takes the kernel 11 ms."""
    lab.wire("web", ("10.20.0.1/24", "fd20::1/64"), ("10.20.0.2/24", "fd20::2/64"))
    web = Pod("web", "8080:80", "192.0.2.1:53:53/udp", ips=("10.20.0.2/24", "fd20::2/64"))
    lan = Pod("web", "8080:80", ifname="net1", netns=web.netns)
    calls = [("ADD", web), ("ADD", web), ("ADD", Pod("rival", "8080:80")), ("CHECK", web), ("DEL", lan), ("DEL", web),
             ("ADD", web), ("GC", GcCall("net"))]
    for verb, what in calls:
        trace = tmp_path / "trace"
        host.call(verb, what, "strace", "-f", "-qq", "-yy", "-e", "trace=flock,close,sendmsg,sendto", "-o", trace)
        holding = released = False
        for line in trace.read_text().splitlines():
            holding |= "LOCK_EX" in line
            released |= holding and f"close({LOCK}" in re.sub(r"\d+<(/[^>]*)>", r"\1", line)
            assert not (holding and not released and "close(" in line and "<NETLINK:[NETFILTER" in line), (verb, line)
        assert released == (holding or verb != "DEL" or what is web), verb


def _symlink(target: pathlib.Path) -> None:
    LOCK.symlink_to(target)


def _open_to_all(target: pathlib.Path) -> None:
    LOCK.touch()
    LOCK.chmod(0o666)


def _of_another_user(target: pathlib.Path) -> None:
    LOCK.touch(0o600)
    os.chown(LOCK, 65534, 65534)


def _directory(target: pathlib.Path) -> None:
    LOCK.mkdir()


def _pipe_of_another_user(target: pathlib.Path) -> None:
    os.mkfifo(LOCK, 0o600)
    os.chown(LOCK, 65534, 65534)


@pytest.mark.parametrize("trick", [_symlink, _open_to_all, _of_another_user, _directory, _pipe_of_another_user])
def test_tricks_with_the_file(host, trick, tmp_path):
    """A lock that somebody else could hold, or that is no file of ours, is refused with code 5, its place named."""
    target = tmp_path / "precious"
    target.write_text("precious")
    trick(target)
    try:
        reply = host.call("ADD", Pod("web", "8080:80"))
        assert reply.code == 5 and str(LOCK) in reply.msg
        assert target.read_text() == "precious" and not lab.chains()
    finally:
        LOCK.rmdir() if LOCK.is_dir() and not LOCK.is_symlink() else LOCK.unlink()
    host.add(Pod("web", "8080:80"))


@pytest.mark.parametrize("umask", [0, 0o22, 0o777])
def test_file_is_private(host, umask):
    """Only root can open the lock file, whatever the runtime's umask is."""
    host.call("ADD", Pod("web", "8080:80"), umask=umask)
    assert not stat.S_IMODE(LOCK.stat().st_mode) & ~0o600 and LOCK.stat().st_uid == 0
    host.add(Pod("web", "8080:80"), Pod("next", "9090:80"))


def test_unprivileged_user_cannot_hold(host):
    """Nobody else can open the lock file, not even to read it."""
    host.add(Pod("web", "8080:80"))
    for mode in "<", ">>":
        done = subprocess.run(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c",
                               f"exec 3{mode} {LOCK}"], capture_output=True, text=True, check=False)
        assert "Permission denied" in done.stderr


def test_file_deleted_while_held(host):
    """A call that waits for a lock file that is deleted meanwhile takes the new one, so two never run at once."""
    with lab.held_lock():
        first = Call(host.executable, "ADD", Pod("first", "8080:80"))
        lab.wait_until_blocked(first.process.pid)
        LOCK.unlink()
        with lab.held_lock():  # the new file
            second = Call(host.executable, "ADD", Pod("second", "8080:80"))
            lab.wait_until_blocked(second.process.pid)
    codes = sorted((first.answer().code, second.answer().code))
    assert codes == [0, 101]


def test_racers_while_the_file_is_deleted(host):
    """Even with the lock file deleted all the time, a port gets one owner and nothing is half-done."""
    for _ in range(3):
        calls = [Call(host.executable, "ADD", Pod(f"racer{i}", "8080:80")) for i in range(12)]
        while any(call.process.poll() is None for call in calls):
            LOCK.unlink(missing_ok=True)
        answers = [call.answer() for call in calls]
        winners = [i for i, answer in enumerate(answers) if not answer.code]
        assert len(winners) == 1 and lab.chains() == [f"c/racer{winners[0]}/eth0"]
        host.delete(Pod(f"racer{winners[0]}"))
        assert not lab.elements()
        assert fork("CHECK", Pod(f"racer{winners[0]}", "8080:80")).code == 104
