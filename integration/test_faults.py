"""Death, errors of the kernel, and other people's hands: all or nothing, one clear error, and a way back."""
import functools
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable

import lab
import pytest
from lab.damage import BASE, BOTH, DAMAGES, OTHER
from lab.soak import soak
from lab import TABLE, Call, GcCall, Pod, fork

WEB = Pod("web", "8080:80", "127.0.0.1:7070:70/udp")
PODS = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"
ALL_FAULTS = "ALL_FAULTS" in os.environ  # every error at every call, minutes instead of seconds


# --- kill -9 --------------------------------------------------------------------------------------------------

def _nothing() -> None:
    pass


def _base() -> None:
    fork("ADD", OTHER)


def _published() -> None:
    _base()
    fork("ADD", WEB)


def _owner_dead() -> None:
    _base()
    lab.add_veth("dead0", "dead1", index=4711)  # the same each time
    fork("ADD", Pod("dead", "8080:80", "6060:60", link="dead0"))
    lab.delete_link("dead0")


def _with_link() -> None:
    _base()
    if "pod0" not in dict(socket.if_nameindex()).values():
        lab.add_veth("pod0", "pod1", index=4712)


def _base_damaged() -> None:
    _published()
    lab.nft_script(f"flush chain {TABLE} dispatch", f"delete chain {TABLE} output")


def _three_stale() -> None:
    _base()
    for i in range(3):
        fork("ADD", Pod(f"stale{i}", f"{9000 + i}:80", network="old"))


GUARDED = {"gatewayModeV4": "nat", "allowDirectRouting": True, "conditionsV4": ["ip saddr 10.0.0.0/8"]}


def _guarded() -> None:
    _base()
    fork("ADD", Pod("guarded", ips=("10.20.0.9/24",), **GUARDED))
    fork("DEL", Pod("guarded"))


def _guarded_web() -> None:
    _guarded()
    fork("ADD", Pod("old", "6060:60", **GUARDED))


SWEEPS: dict[str, tuple[Callable[[], None], str, "Pod | GcCall"]] = {
    "the first ADD ever": (_nothing, "ADD", WEB),
    "ADD": (_base, "ADD", WEB),
    "ADD of a pod with a link": (_with_link, "ADD", Pod("pod", "8080:80", link="pod0", args=PODS)),
    "ADD again with other ports": (_published, "ADD", WEB.but("8081:80", "7070:70/udp")),
    "ADD in place of a dead owner": (_owner_dead, "ADD", WEB),
    "ADD that repairs the base": (_base_damaged, "ADD", WEB),
    "ADD with a policy": (_guarded, "ADD", Pod("web", "8080:80", **GUARDED)),
    "ADD again with another mode": (_guarded_web, "ADD", Pod("old", "6060:60", gatewayModeV4="routed")),
    "ADD that takes an address over": (_guarded_web, "ADD", Pod("web", "8080:80", **GUARDED)),
    "DEL with a policy": (_guarded_web, "DEL", Pod("old")),
    "DEL": (_published, "DEL", WEB),
    "GC of three": (_three_stale, "GC", GcCall("old")),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_killed_at_every_instant(host, name):
    """Killed at the beginning of each of its system calls, a call leaves all or nothing, and the next converges.

    What all containers share is written first, where it is missing, and may be there alone.
    """
    prepare, verb, what = SWEEPS[name]
    prepare()
    before, text = lab.state(), lab.table()
    instants, worth_it = lab.instants(functools.partial(lab.start_fork, verb, what))
    after = lab.state()
    assert len(instants) > 20 and instants[0] == before != after == instants[-1]
    whole = [before, after]
    if not before:
        fork("DEL", what)
        whole.append(lab.state())
    for instant, found in enumerate(instants):
        assert found in whole, f"half-done when killed at system call {instant}"
    for instant in worth_it:
        lab.nft_script(f"add table {TABLE}", f"delete table {TABLE}", text)
        assert lab.state() == before
        lab.start_fork(verb, what, stop_at=instant).answer()
        assert lab.state() in whole, f"half-done when killed at system call {instant}"
        assert not fork(verb, what).code
        assert lab.state() == after
        if isinstance(what, Pod):
            assert not fork("DEL", what).code
            assert what.chain not in lab.chains() + [*lab.elements().values()]


def test_localhost_is_never_open_without_the_guard(host):
    """At no instant of a host's first ADD does route_localnet let anything in (CVE-2020-8558), or nobody closes it."""
    lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
    path, opened = pathlib.Path("/proc/sys/net/ipv4/conf/to-web/route_localnet"), []

    def look() -> None:
        opened.append(path.read_text() == "1\n")
        state = "".join(lab.state())
        assert not opened[-1] or ("CVE-2020-8558" in state and "to-web" in state), f"system call {len(opened) - 1}"
    assert not lab.start_fork("ADD", WEB, look=look).answer().code
    assert opened[-1] and not opened[0]


def test_killed_at_random(host):
    """The executable, killed at 60 random moments, leaves all or nothing, and the next DEL and ADD succeed."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    host.add(OTHER)
    without = lab.state()
    host.add(WEB)
    complete = lab.state()
    for verb in ("ADD", "DEL") * 30:
        fork("DEL" if verb == "ADD" else "ADD", WEB)
        call = Call(host.executable, verb, WEB)
        time.sleep(moments.uniform(0.005, 0.06))  # any moment of its life
        call.process.kill()
        call.answer()
        assert lab.state() in (without, complete), f"{verb}, seed {seed}"
    host.delete(WEB)
    assert lab.state() == without
    host.add(WEB)
    assert lab.state() == complete


def _calls(trace: pathlib.Path) -> tuple[int, int]:
    """How many system calls a process has made, and which is the one by which it ignores SIGINT: one of these, or none.
    """
    lines = [line for line in trace.read_text().splitlines() if re.match(r"\w+\(", line)]
    return len(lines), next((number for number, line in enumerate(lines, 1) if "SIGINT, {sa_handler=SIG_IGN" in line),
                            len(lines) + 1)


def test_interrupted_from_the_keyboard(host, tmp_path):
    """Ctrl-C in `podman run` reaches the plugin: it ends well what it has begun, and never says what is not true.

    Only an interpreter that has not come to our first line ends, without a word, and nothing is written.
    """
    host.add(OTHER)
    without, trace = lab.state(), tmp_path / "trace"
    assert not host.call("ADD", WEB, "strace", "-o", trace).code
    complete = lab.state()
    count, ignores = _calls(trace)
    assert ignores < count
    for number in (*range(1, ignores, 7), *range(ignores + 1, count, 9)):
        fork("DEL", WEB)
        assert lab.state() == without
        reply = host.call("ADD", WEB, "strace", "-o", trace, "-e", f"inject=all:signal=SIGINT:when={number}")
        if number <= _calls(trace)[1] and reply.code:  # in this run: the interpreter makes one more or less
            assert (reply.code, reply.document, lab.state()) == (-1, "", without), number
        else:
            assert (reply.code, lab.state()) == (0, complete), number


def test_command_interrupted(host):
    """Ctrl-C ends the command as it ends others: by the signal, without a traceback."""
    host.add(WEB)
    for call, number in ("openat", 60), ("sendto", 1), ("write", 1):
        done = subprocess.run(["strace", "-o", "/dev/null", "-e", f"inject={call}:signal=SIGINT:when={number}",
                               host.cli, "list"], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGINT and not done.stderr, done


# --- errors of the kernel -------------------------------------------------------------------------------------

# From the first netlink socket on: every call on a netlink socket, on the lock and on a sysctl.
_FAULTY = re.compile(r"\d+ (?:(socket|sendto|recvfrom|sendmsg|recvmsg|[gs]etsockopt|flock|pselect6|select|poll)\("
                     r"|(openat)\(AT_FDCWD, \"/(?:run|proc)|(write)\([3-9])")
_ERRORS = "EINTR", "ENOMEM", "EPERM", "ENOSPC", "ENOBUFS"


def _instants(trace: str) -> list[tuple[str, int]]:
    """Name and number of the system calls in a trace that can fail, from the first netlink socket on."""
    counts: dict[str, int] = {}
    found, started = [], False
    for line in trace.splitlines():
        name = re.match(r"\d+ +(\w+)\(", line)
        if not name:
            continue
        counts[name[1]] = counts.get(name[1], 0) + 1
        started |= "socket(AF_NETLINK" in line
        if started and _FAULTY.match(re.sub(" +", " ", line)):
            found.append((name[1], counts[name[1]]))
    return found


@pytest.mark.parametrize("verb", ["ADD", "DEL", "CHECK"])
def test_every_call_fails(host, verb, tmp_path):
    """Whichever system call fails, with whichever error: one error that names it or success, nothing half-done."""
    lab.wire("web", ("10.20.0.1/24", "fd20::1/64"), ("10.20.0.2/24", "fd20::2/64"))
    web = Pod("web", "8080:80", "127.0.0.1:7070:70/udp", ips=("10.20.0.2/24", "fd20::2/64"))

    def reset() -> None:
        fork("DEL" if verb == "ADD" else "ADD", web)
        if verb == "ADD":
            lab.sysctl("net.ipv4.conf.to-web.route_localnet", 0)

    fork("ADD", OTHER)
    fork("ADD", web)
    complete = lab.state()
    fork("DEL", web)
    without = lab.state()
    reset()
    trace = tmp_path / "trace"
    assert not host.call(verb, web, "strace", "-f", "-o", trace).code
    instants = _instants(trace.read_text())
    assert len(instants) > 20
    outcomes, problems = set(), []
    for index, (name, number) in enumerate(instants):
        for error in _ERRORS if ALL_FAULTS else [_ERRORS[index % len(_ERRORS)]]:
            reset()
            try:
                reply = host.call(verb, web, "strace", "-f", "-o", trace, "-e", f"trace={name}",
                                  "-e", f"inject={name}:error={error}:when={number}")
                assert reply.code != -1
                outcomes.add(reply.code)
                found = lab.state()
                assert found in ([complete] if verb == "CHECK" else [without, complete])
                assert reply.code or found == (without if verb == "DEL" else complete)
            except AssertionError as problem:
                problems.append(f"{name} {number} {error}: {problem}")
    assert not problems, "\n".join(problems)
    assert 0 in outcomes and outcomes & {5, 100}
    assert not fork("DEL", web).code and lab.state() == without


# --- other people's hands -------------------------------------------------------------------------------------

@pytest.fixture
def forking(host, monkeypatch):
    """A host whose calls are forks: these tests are about what is done."""
    monkeypatch.setattr(host, "call", fork)
    return host


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(forking, name):
    """Any piece may be removed: CHECK names it, DEL succeeds, the next ADD repairs it."""
    damage, named = DAMAGES[name]
    forking.add(OTHER, BOTH)
    whole = lab.state()
    assert not forking.call("CHECK", BOTH).code
    damage()
    damaged = lab.state()
    reply = forking.call("CHECK", BOTH)
    assert reply.code == 104 and named in reply.msg, reply
    assert lab.state() == damaged
    forking.delete(OTHER)
    assert OTHER.chain not in lab.chains()
    assert all(chain != OTHER.chain or name == "element stolen" for chain in lab.elements().values())
    forking.add(OTHER, BOTH)
    assert lab.state() == whole
    for pod in BOTH, OTHER:
        assert not forking.call("CHECK", pod).code


@pytest.mark.parametrize("name", DAMAGES)
def test_delete_after_damage(forking, name):
    """A container leaves nothing, whichever of its pieces somebody removed."""
    forking.add(OTHER, BOTH)
    DAMAGES[name][0]()
    forking.delete(BOTH, BOTH)
    assert BOTH.chain not in lab.chains() + [*lab.elements().values()]


# What stands in the table before our first ADD; whether ADD can live with it, else what its error must name.
FOREIGN = {
    "an empty table": ("", ""),
    "chains and sets of their own": ("set blocked { type ipv4_addr; elements = { 192.0.2.66 }; }\n"
                                     "chain mine { type filter hook input priority 0; ip saddr @blocked drop; }", ""),
    "a rule in a base chain": ("chain output { type nat hook output priority -100; tcp dport 1 redirect to :2; }",
                               "chain output"),
    "a rule in dispatch": ("chain dispatch { counter; }", "chain dispatch"),
    "dispatch with a hook": ("chain dispatch { type filter hook input priority 0; }", "dispatch"),
    "a set in place of a map": ("set hostports { type inet_service; }", "hostports"),
    "a map of another type": ("map hostports { type inet_service : verdict; }", "hostports"),
    "a map of another kind": ("map hostports { type nf_proto . inet_proto . inet_service : mark; }", "hostports"),
    "an element that drops": ("map hostports { type nf_proto . inet_proto . inet_service : verdict; "
                              "elements = { ipv4 . tcp . 8080 : drop }; }", "tcp port 8080"),
    "an element that leads to them": ("chain mine { counter; }\nmap hostports { type nf_proto . inet_proto . "
                                      "inet_service : verdict; elements = { ipv4 . tcp . 8080 : goto mine }; }",
                                      "tcp port 8080"),
    "an element for another port": ("chain mine { counter; }\nmap hostports { type nf_proto . inet_proto . "
                                    "inet_service : verdict; elements = { ipv4 . tcp . 1 : jump mine }; }", ""),
    "a chain that looks like an owner": ("chain c/somebody/eth0 { counter; }\nmap hostports { type nf_proto . "
                                         "inet_proto . inet_service : verdict; elements = { ipv4 . tcp . 8080 : goto "
                                         "c/somebody/eth0 }; }", "container somebody"),
    "a full map": ("map hostports { type nf_proto . inet_proto . inet_service : verdict; size 1; }", "hostports"),
    "a map with intervals": ("map hostports { type nf_proto . inet_proto . inet_service : verdict; flags interval; "
                             "elements = { ipv4 . tcp . 1-9000 : drop }; }", "8080"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_table(host, name):
    """Foreign objects in a table of our name stay as they are; if one is in the way, the error names it."""
    text, named = FOREIGN[name]
    lab.nft_script(f"table {TABLE} {{", text, "}")
    theirs = lab.state()
    pod = Pod("web", "8080:80", "8081:81")
    reply = host.call("ADD", pod)
    if named:
        assert reply.code in (100, 101, 103) and named in reply.msg + reply.details, reply
        left = lab.state()
        assert left == theirs or name == "a full map" and {*theirs} < {*left} and pod.chain not in "\n".join(left)
        status = host.call("STATUS", GcCall("net"))
        assert status.code in (0, 50)
        assert host.call("CHECK", pod).code in (103, 104)
    else:
        assert not reply.code, reply
        assert not host.call("CHECK", pod).code
        host.add(pod)
        host.delete(pod)
    host.delete(pod)
    assert not host.call("GC", GcCall("net")).code
    assert {*theirs} <= {*lab.state()}


@pytest.mark.parametrize("chain", [*BASE, WEB.chain])
def test_foreign_rules_stay(host, chain):
    """Somebody's own rules in our chains, before and after ours, disturb nobody and are not touched."""
    host.add(WEB)
    lab.nft_script(f'insert rule {TABLE} {chain} tcp dport 1 counter comment "first"',
                f'add rule {TABLE} {chain} tcp dport 1 counter comment "last"')
    host.add(OTHER)
    for pod in WEB, OTHER:
        assert not host.call("CHECK", pod).code
    host.delete(OTHER)
    rules = [line for line in lab.state() if '"first"' in line or '"last"' in line]
    assert len(rules) == 2 and all(chain in rule for rule in rules)
    host.delete(WEB)


@pytest.mark.parametrize("verb", ["DEL", "GC"])
def test_foreign_rule_leads_to_a_container(host, verb):
    """A foreign rule that refers to a container's chain makes a call fail that removes it; nothing is half-done.

    The call names the chain. An ADD in the container's place keeps the chain, and so succeeds.
    """
    host.add(WEB)
    lab.nft_script(f"add chain {TABLE} mine", f"add rule {TABLE} mine jump {WEB.chain}")
    before = lab.state()
    host.add(WEB)
    assert lab.state() == before
    reply = host.call(verb, GcCall("net") if verb == "GC" else WEB)
    assert reply.code == 100 and WEB.chain in reply.msg + reply.details, reply
    assert lab.state() == before
    lab.nft_script(f"flush chain {TABLE} mine")
    host.delete(WEB)
    assert not lab.chains()


def test_table_owned_by_a_process(host):
    """A table of our name that belongs to a running program (nft's flag owner) is named as what is in the way."""
    with subprocess.Popen(["nft", "-i"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin and owner.stdout
        owner.stdin.write(f"add table {TABLE} {{ flags owner; }}\nlist tables inet\n")
        owner.stdin.flush()
        while "cni_portmap" not in owner.stdout.readline():
            pass
        reply = host.call("ADD", WEB)
        assert reply.code in (100, 103) and "cni_portmap" in reply.msg + reply.details, reply
        assert "CAP_NET_ADMIN" not in reply.details, "a hint that leads nowhere"
        host.delete(WEB)
        owner.stdin.close()
        owner.wait()
    host.add(WEB)


@pytest.mark.parametrize("family", ["ip", "ip6", "netdev"])
def test_same_name_in_another_family(host, family):
    """A table of our name in another family is none of our business."""
    lab.nft_script(f"add table {family} cni_portmap", f"add chain {family} cni_portmap prerouting")
    before = lab.listing(f"table {family} cni_portmap")
    host.add(WEB)
    host.delete(WEB)
    assert lab.listing(f"table {family} cni_portmap") == before


# --- a poor environment ---------------------------------------------------------------------------------------

_PACKAGES = "/usr/lib/python3/dist-packages"
_LIBRARY = "/usr/lib/*/libnftables.so.1.*"  # the file itself, not a link to it
_NEEDS_LIBNFTABLES = {"ADD": 5, "CHECK": 5, "STATUS": 50}
_DROP = "-net_admin"

# how it is run: the code, and what the error must say; "" where the verb succeeds because it needs nothing of it
POOR: dict[str, tuple[tuple[object, ...], dict[str, tuple[int, str]]]] = {
    "no binding": (lab.in_own_mounts(f"mount -t tmpfs none {_PACKAGES}"),
                   {verb: (code, "python3-nftables") for verb, code in _NEEDS_LIBNFTABLES.items()}),
    "binding of another library": (lab.in_own_mounts(f"mount -t tmpfs none {_PACKAGES}; touch {_PACKAGES}/nftables.py"),
                                   {verb: (code, "libnftables") for verb, code in _NEEDS_LIBNFTABLES.items()}),
    "no library": (lab.in_own_mounts(f"for f in {_LIBRARY}; do mount --bind /dev/null $f; done"),
                   {verb: (code, "libnftables") for verb, code in _NEEDS_LIBNFTABLES.items()}),
    "library too old": (lab.in_own_mounts(f"for f in {_LIBRARY}; do mount --bind /usr/lib/*/libm.so.6 $f; done"),
                        {verb: (code, "libnftables") for verb, code in _NEEDS_LIBNFTABLES.items()}),
    "no CAP_NET_ADMIN": (("setpriv", "--bounding-set", _DROP, "--inh-caps", _DROP),
                         {"ADD": (0, "CAP_NET_ADMIN"), "DEL": (0, "CAP_NET_ADMIN"), "CHECK": (0, "CAP_NET_ADMIN"),
                          "GC": (0, "CAP_NET_ADMIN"), "STATUS": (50, "CAP_NET_ADMIN")}),
    "not root": (("setpriv", "--reuid", 65534, "--regid", 65534, "--clear-groups"),
                 {"ADD": (0, "root"), "DEL": (0, "root"), "CHECK": (0, "root"), "GC": (0, "root"),
                  "STATUS": (50, "root")}),
    "sysctls are read-only": (lab.in_own_mounts("mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys"),
                              {"ADD": (5, "route_localnet")}),
    "/run is read-only": (lab.in_own_mounts("mount --bind /run /run; mount -o remount,bind,ro /run"),
                          {"ADD": (5, "/run/cni-portmap.lock"), "DEL": (5, "/run/cni-portmap.lock"),
                           "CHECK": (5, "/run/cni-portmap.lock")}),
    "/run is full": (lab.in_own_mounts("mount -t tmpfs -o nr_inodes=1 none /run"),
                     {"ADD": (5, "/run/cni-portmap.lock"), "DEL": (5, "/run/cni-portmap.lock"),
                      "CHECK": (5, "/run/cni-portmap.lock")}),
    "no file descriptors": (("prlimit", "--nofile=5"), {"ADD": (5, ""), "DEL": (5, ""), "CHECK": (5, "")}),
}


@pytest.mark.parametrize(("name", "verb"), [(name, verb) for name, (_, verbs) in POOR.items() for verb in verbs])
def test_poor_environment(host, name, verb, tmp_path_factory):
    """A missing requirement of the plugin: one error that says what to do, and nothing is written."""
    wrapped, verbs = POOR[name]
    code, named = verbs[verb]
    anybody = pathlib.Path("/mnt")  # pytest's own folders are root's alone
    lab.run("mount", "-t", "tmpfs", "none", anybody)
    try:
        executable = lab.install(anybody / "bin") / "portmap"
        lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
        if verb != "ADD":
            host.add(WEB)
        else:
            lab.sysctl("net.ipv4.conf.to-web.route_localnet", 0)
        before = lab.state()
        what = GcCall("net") if verb in ("GC", "STATUS") else WEB
        if verb == "ADD":
            what = Pod("web", "8080:80", "127.0.0.1:7070:70/udp", netns="/proc/self/ns/net")  # not in /run
        reply = Call(executable, verb, what, wrapped).answer()
        assert reply.code == code or not code and reply.code in (5, 100), reply
        assert named in reply.msg + reply.details, reply
        assert reply.details, "what to do?"
        left = lab.state()
        assert left == before or name == "sysctls are read-only" and WEB.chain not in "\n".join(left)
    finally:
        lab.run("umount", anybody)
    if verb == "ADD":
        host.add(WEB)


def test_removal_needs_no_libnftables(host):
    """A container leaves also where libnftables is broken: a runtime repeats a DEL that fails for ever."""
    executable = lab.install(pathlib.Path("/run/bin")) / "portmap"
    for verb, what in ("DEL", WEB), ("GC", GcCall("net")):
        host.add(WEB)
        reply = Call(executable, verb, what, POOR["library too old"][0]).answer()
        assert not reply.code and not lab.chains() and not lab.elements(), reply
    host.add(WEB)
    host.command("teardown", "--force", within=POOR["library too old"][0])
    assert not lab.table()


@pytest.mark.parametrize("name", ["no binding", "no library", "/run is full", "sysctls are read-only"])
@pytest.mark.parametrize("verb", ["ADD", "CHECK", "DEL"])
def test_poor_environment_without_ports(host, name, verb):
    """A container that publishes nothing needs nothing."""
    reply = Call(host.executable, verb, Pod("quiet"), POOR[name][0]).answer()
    assert not reply.code, reply


# --- what a call leaves behind --------------------------------------------------------------------------------


def _netfilter_sockets() -> int:
    lines = pathlib.Path("/proc/net/netlink").read_text().splitlines()[1:]
    return sum(line.split()[1] == "12" and line.split()[2] != "0" for line in lines)


def _children() -> set[str]:
    """This process's, also those that have ended and were not waited for."""
    return {child for path in pathlib.Path("/proc/self/task").glob("*/children") for child in path.read_text().split()}


@pytest.mark.parametrize("verb", ["ADD", "CHECK", "DEL", "GC"])
def test_nothing_is_left_of_a_call(host, verb):
    """When a call returns its work is done, its pipes are closed, no process goes on; its sockets go at once."""
    if verb != "ADD":
        host.add(WEB)
    pipes, before = [os.pipe() for _ in range(4)], _children()  # others may be of tests before
    lent = [write for _, write in pipes]
    call = Call(host.executable, verb, GcCall("net") if verb == "GC" else WEB, pass_fds=lent)
    for write in lent:
        os.close(write)
    assert call.process.stdout and call.process.stderr
    ends = [read for read, _ in pipes] + [call.process.stdout.fileno(), call.process.stderr.fileno()]
    with lab.adopted_orphans():
        assert call.process.wait(timeout=60) == 0
        assert bool(lab.chains()) == (verb in ("ADD", "CHECK"))
        assert _children() <= before
    for end in ends:
        os.set_blocking(end, False)
        while os.read(end, 1 << 16):  # to its end; a writer that lives on would raise BlockingIOError
            pass
    for read, _ in pipes:
        os.close(read)
    deadline = time.monotonic() + 30  # the kernel takes its time, and has its own reasons
    while _netfilter_sockets():
        assert time.monotonic() < deadline, "its sockets live on"
        time.sleep(0.005)


def test_nothing_is_kept_on_disk(host, tmp_path):
    """No call writes a file but the lock, a sysctl and its name, so after a reboot nothing is stale."""
    lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
    trace, written = tmp_path / "trace", set()
    for verb in "ADD", "CHECK", "ADD", "DEL":
        host.call(verb, WEB, "strace", "-f", "-qq", "-e", "trace=%file", "-e", "status=successful", "-o", trace)
        calls = trace.read_text()
        written |= {*re.findall(r' (?:open\w*|creat)\([^"]*"([^"]*)", [^)]*O_(?:WRONLY|RDWR|CREAT)', calls)}
        assert not re.search(r" (mk|link|symlink|rename|unlink|rmdir|truncate)\w*\(", calls)
    assert written == {str(lab.LOCK), "/proc/sys/net/ipv4/conf/to-web/route_localnet", "/proc/self/comm"}
    assert not lab.LOCK.read_bytes()


def test_nothing_grows_in_200_lives(host):
    """After 200 containers have come and gone, nothing has grown. (measure/soak.py has thousands.)"""
    assert not soak(host.executable, 200)
