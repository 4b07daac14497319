"""The module that touches the kernel, as far as it goes without root: its failures, its lock, what it leaves."""
import errno
import faulthandler
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from typing import NamedTuple

import pytest
from helpers import ROOT

from cni_portmap import cni, linux, ruleset
from cni_portmap.cni import CniError
from cni_portmap.linux import alive, conntrack, host, kernel, libnftables, localhost, netlink
from cni_portmap.linux.kernel import Kernel
from cni_portmap.linux.netlink import attribute, nested


class Broken:
    """A netlink socket that can't even ask."""

    def __init__(self, *_):
        raise PermissionError(1, "Operation not permitted")


READS = {"has_chain": ["x"], "comments": ["x"], "owner": ["x"], "owners": [], "rules": [],
         "lookup": [[("hostports", bytes(12))]], "elements": [], "owned_elements": [["x"]], "targets": [["x"]],
         "owners_of_port": ["hostports", [bytes(8)]], "snapshot": ["x"], "references": ["x"], "is_dormant": [],
         "set_elements": [b"x\0"], "has_table": [], "notes_interfaces": [], "noted": [], "noted_and_gone": [],
         "is_noted": ["x"],
         "dnat_rules": ["x"], "elements_wanted_by": ["x"]}


@pytest.mark.parametrize("method", READS)
def test_reading_fails(monkeypatch, method):
    """A refusal by netlink is one CniError, with what to do."""
    monkeypatch.setattr("cni_portmap.linux.netlink.socket", Broken)
    with pytest.raises(CniError) as caught:
        getattr(Kernel(), method)(*READS[method])
    assert caught.value.code == 5 and "Operation not permitted" in caught.value.args[0]
    assert "root" in caught.value.details


def test_nothing_to_read(monkeypatch):
    """Asked about no chains, the kernel isn't asked."""
    monkeypatch.setattr("cni_portmap.linux.netlink.socket", Broken)
    assert (Kernel().owned_elements([]), Kernel().targets([])) == ([], {})


def reading(**tables):
    """A kernel whose nf_tables answer like this."""
    found = Kernel()
    for name, answer in tables.items():
        setattr(found, name, answer)
    return found


def test_owners():
    """Each attachment's chain has an owner, by the comments at its head; other chains have none."""
    full = "net=lab netns=/r".ljust(128, "r")
    rules = [("output", "cni-portmap 1: x", b"", 1), ("c/a/eth0", full, b"", 9), ("c/a/eth0", "un#7", b"", 8),
             ("c/a/eth0", "", b"", 2), ("c/a/eth0", "net=wrong", b"", 3), ("c/b/eth0", "", b"", 4)]
    found = reading(rules=lambda chain="": [rule for rule in rules if chain in ("", rule[0])])
    assert [(owner.chain, owner.network, owner.netns, owner.inode) for owner in found.owners()] == \
        [("c/a/eth0", "lab", f"{full[14:]}un", 7), ("c/b/eth0", "", "", 0)]
    assert [owner.handle for owner in found.owners()] == [9, 4]
    assert found.owner("c/a/eth0").inode == 7 and found.comments("output") == ["cni-portmap 1: x"]


class Growing:
    """A netlink socket that lists a map whose hash table grows during the first dumps: one key twice, another never."""

    def __init__(self, dumps):
        self.dumps = [[bytes(4) + nested(3, *(nested(1, nested(1, attribute(1, bytes((0, key)))),
                                                     nested(2, attribute(1, bytes((0, key))))) for key in part))
                       for part in parts] for parts in dumps]

    def dump(self, kind, body):
        return self.dumps.pop(0) if len(self.dumps) > 1 else self.dumps[0]


@pytest.mark.parametrize("dumps, keys", [
    ([[(1, 2), (2, 4)], [(1, 2), (1, 3)], [(1, 2), (3, 4)]], [1, 2, 3, 4]),
    ([[(1, 2), (3, 4)], [()]], [1, 2, 3, 4]),
    ([[(1, 2)], [()]], [1, 2]),
])
def test_map_that_grows(dumps, keys):
    """A list with an element twice is not taken, since another is missing in it: it is asked for again."""
    netlink = Growing(dumps)
    found = reading(_netlink=lambda: netlink).set_elements(b"m\0")
    assert [key[1] for key, _ in found] == keys


def test_map_that_grows_for_ever():
    """After a hundred such lists the call fails, and says why."""
    with pytest.raises(CniError) as caught:
        reading(_netlink=lambda: Growing([[(1, 2), (2, 4)]])).set_elements(b"m\0")
    assert "kept changing" in str(caught.value)


def rule_of(*parts):
    """A rule's expressions from (name, {attribute: bytes})."""
    return b"".join(nested(1, attribute(1, name.encode() + b"\0"),
                           nested(2, *(attribute(*field) for field in fields.items())))
                    for name, fields in parts)


def pictured(chain, rules, sets=()):
    elements = [nested(3, *(nested(1, attribute(1, element)) for element in each)) for each in sets]
    return reading(_chain=lambda name: chain, rules=lambda name: [("x", "comment", rule, 1) for rule in rules],
                   _dump=lambda kind, body: [bytes(4) + elements[int(body.rstrip(b'\0')[-1:])]]).snapshot("x")


def test_snapshot():
    """Alike are chains whose hook and rules are; not their counters, nor the names and order of anonymous sets."""
    hook = {4: b"hook", 5: b"policy", 7: b"type", 2: b"handle 1"}
    lookup = rule_of(("counter", {1: b"1"}), ("lookup", {1: b"__set0\0", 2: b"r"}))
    same = rule_of(("counter", {1: b"2"}), ("lookup", {1: b"__set1\0", 2: b"r"}))
    sets = [[b"a", b"b"], [b"b", b"a"], [b"a", b"c"]]
    found = pictured(hook, [lookup], sets)
    assert len(found) == 2 and found == pictured({**hook, 2: b"handle 9"}, [same], sets)
    different = [pictured({**hook, 4: b"other"}, [lookup], sets), pictured(hook, [lookup, lookup], sets),
                 pictured(None, []), pictured(hook, [rule_of(("lookup", {1: b"__set0\0", 2: b"r"}))], sets),
                 pictured(hook, [rule_of(("counter", {}), ("lookup", {1: b"__set2\0", 2: b"r"}))], sets),
                 pictured(hook, [rule_of(("counter", {}), ("lookup", {1: b"__set0\0", 2: b"q"}))], sets),
                 pictured(hook, [rule_of(("counter", {}), ("lookup", {1: b"hostports\0", 2: b"r"}))], sets),
                 pictured(hook, [rule_of(("counter", {}), ("meta", {1: b"__set0\0", 2: b"r"}))], sets)]
    assert found not in different and different[2] == []


def test_references():
    """The kernel counts a chain's own rules among its users; nobody uses a chain that isn't there."""
    assert reading(_chain=lambda name: {6: b"\0\0\0\5"}, rules=lambda name: ["rule"] * 3).references("x") == 2
    assert reading(_chain=lambda name: None, rules=lambda name: []).references("x") == 0


@pytest.mark.parametrize("references, wanted, listed",
                         [(2, "ab", False), (2, "abc", False), (2, "a", True), (0, "", False), (10_000, "ab", True)])
def test_elements_of(monkeypatch, references, wanted, listed):
    """The elements that a chain's own rules name are looked up; if more refer to it, the maps are listed."""
    there = {"a": "c/x/eth0", "b": "c/x/eth0", "c": "c/y/eth0"}
    lists = []
    monkeypatch.setattr(Kernel, "references", lambda self, chain: references)
    monkeypatch.setattr(Kernel, "elements_wanted_by", lambda self, chain: {*wanted})
    monkeypatch.setattr(Kernel, "lookup", lambda self, asked: {each: there[each] for each in asked})
    monkeypatch.setattr(Kernel, "elements", lambda self: lists.append(1) or [*there.items()])
    owned = [("a", "c/x/eth0"), ("b", "c/x/eth0")] if references else []
    assert sorted(Kernel().owned_elements(["c/x/eth0"])) == owned
    assert bool(lists) == listed


@pytest.mark.parametrize("run, says", [
    (lambda text, dry: "", ""), (lambda text, dry: f"no {text} {dry}", "no é True"),
    (lambda text, dry: faulthandler.disable() or os.abort(), "aborted"),  # pytest would print it like a failure
    (lambda text, dry: 1 / 0, "aborted"), (lambda text, dry: "x" * 100_000, "x" * 4096)])
def test_a_dry_run_apart_survives_what_nft_does_not(monkeypatch, run, says):
    """On some words libnftables aborts the process: it is a child's, and the runtime gets its answer."""
    monkeypatch.setattr(Kernel, "_libnftables", lambda self: types.SimpleNamespace(run=run))
    found = Kernel().dry_run_apart("é")
    assert says in found if says else not found
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# --- who lives ------------------------------------------------------------------------------------------------

@pytest.fixture
def nsfs(monkeypatch, tmp_path):
    """A folder whose files are taken for namespaces."""
    (tmp_path / "own").touch()  # a file: an overlay gives folders another device
    own = os.stat(tmp_path / "own")
    fake = types.SimpleNamespace(**{name: getattr(kernel.posix, name) for name in dir(kernel.posix) if name != "stat"},
                                 stat=lambda path: own if path == "/proc/self/ns/net" else os.stat(path))
    monkeypatch.setattr(kernel, "posix", fake)
    return tmp_path


@pytest.mark.parametrize("ask", ["namespace", "namespace_soon"])
def test_namespace(nsfs, ask):
    """A path leads to a namespace, provably to none, or it cannot be followed."""
    (nsfs / "netns").touch()
    (nsfs / "loop").symlink_to("loop")
    cases = {"netns": (nsfs / "netns").stat().st_ino, "gone": -1, "netns/below": -1, "loop": 0, "x" * 300: 0, "\0": -1,
             "\ud800": -1}
    assert {path: getattr(Kernel(), ask)(f"{nsfs}/{path}") for path in cases} == cases
    assert getattr(Kernel(), ask)("") == -1


def test_a_file_is_no_namespace(tmp_path):
    """The file that is left where a namespace was mounted is of another device."""
    (tmp_path / "netns").touch()
    assert Kernel().namespace(str(tmp_path / "netns")) == -1
    assert Kernel().namespace("/proc/self/ns/net") == os.stat("/proc/self/ns/net").st_ino


def test_a_path_that_hangs(monkeypatch):
    """It is asked for in a child, which holds nothing and has its time; then nothing is known."""
    monkeypatch.setattr(alive, "PATH_SECONDS", 0.1)
    monkeypatch.setattr(Kernel, "namespace", lambda self, path: signal.pause())
    assert Kernel().namespace_soon("/") == 0


def test_a_path_that_does_not_hang(monkeypatch):
    """A child that lacks only a processor is waited for: a busy host is no proof that a path hangs."""
    def compute(self, path):
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return 7
    monkeypatch.setattr(alive, "PATH_SECONDS", 0.01)
    monkeypatch.setattr(Kernel, "namespace", compute)
    assert Kernel().namespace_soon("/") == 7


def test_links():
    """A link is there, gone, or its index is another name's; one that is no end of a pair goes with no container."""
    cases = {"lo#1": True, "renamed#1": None, "lo#2147483646": False, "lo#4294967295": False, f"lo#{1 << 64}": False}
    assert {link: Kernel().has_link(link) for link in cases} == cases
    assert Kernel().has_address("lo#1", "00:00:00:00:00:00") and not Kernel().has_address("lo#1", "02:00:00:00:00:00")
    assert Kernel().link(["lo", "none"]) == "" and Kernel().link([]) == ""


# --- who lives: the judgement ---------------------------------------------------------------------------------

def owner_of(record):
    return ruleset.Owner("c/web/eth0", record)


def sight(monkeypatch, held=(), mounted=(), obstacle=""):
    seen = types.SimpleNamespace(held={*held}, mounted={*mounted}, obstacle=obstacle)
    monkeypatch.setattr(alive, "Sight", lambda: seen)


def judged(record, has_link=True, leads_to=0):
    found = alive.judge([owner_of(record)], lambda link: has_link, lambda path: leads_to)
    return found["c/web/eth0"][0]


def test_the_link_is_the_first_witness(monkeypatch):
    """A recorded link decides alone: no path and no process is inspected."""
    monkeypatch.setattr(alive, "Sight", None)
    record = "net=lab netns=/run/netns/web#5 link=veth1#7"
    assert (judged(record, True), judged(record, False)) == ("alive", "dead")
    for has_link in True, False:
        monkeypatch.setattr(Kernel, "has_link", lambda self, link, has_link=has_link: has_link)
        assert Kernel().glance(owner_of(record))[0] == judged(record, has_link)
    assert Kernel().glance(owner_of("net=lab netns=/run/netns/web#5")) is None


@pytest.mark.parametrize("record, leads_to, seen, verdict", [
    ("netns=/n#5", 0, {"held": ["net:[5]"]}, "alive"),
    ("netns=/n#5", 5, {"held": []}, "dead"),  # another's by now
    ("netns=/n#5", -1, {"held": [], "obstacle": "no sight"}, "unknown"),
    ("netns=/n#5", -1, {"held": ["net:[5]"], "obstacle": "no sight"}, "alive"),
    ("netns=/n#", 6, {"held": []}, "alive"), ("netns=/n#", 0, {}, "unknown"), ("netns=/n#", -1, {}, "dead"),
    ("netns=/n#", -1, {"mounted": ["/n"]}, "alive"), ("netns=/n#", -1, {"obstacle": "no sight"}, "unknown"),
    ("net=lab", -1, {}, "unknown"), ("", -1, {}, "unknown"), ("netns=/n#5 link=veth#", 0, {}, "dead"),
    ("netns=/n#5 link=a/b#7", 0, {}, "dead"), ("netns=/n#" + "9" * 5000, -1, {}, "dead")])
def test_without_a_link_the_namespace_is_sought(monkeypatch, record, leads_to, seen, verdict):
    """An owner is dead only if one who sees everything finds it nowhere; otherwise it is unknown."""
    sight(monkeypatch, **seen)
    assert judged(record, leads_to=leads_to) == verdict


def test_sight_is_looked_for_once(monkeypatch):
    """One look at all processes serves any number of owners."""
    looks = []
    monkeypatch.setattr(alive, "Sight", lambda: looks.append(1) or types.SimpleNamespace(held=set(), mounted=set(),
                                                                                        obstacle=""))
    owners = [ruleset.Owner(f"c/{index}/eth0", f"netns=/n#{index}") for index in range(1, 9)]
    assert {state for state, _ in alive.judge(owners, None, None).values()} == {"dead"} and len(looks) == 1


def test_octal_paths():
    """mountinfo writes spaces in octal."""
    assert alive._unescape("/run/my\\040netns\\134x") == "/run/my netns\\x" and alive._unescape("/run") == "/run"


OF_A_PROCESS = {"ns/pid": alive.FIRST_PID_NAMESPACE, "ns/user": "user:[1]", "ns/net": "net:[5]", "ns/mnt": "mnt:[6]",
                "root": "/"}


@pytest.mark.parametrize("error", [2, 3, 22])
def test_process_that_ends_while_it_is_looked_at(monkeypatch, error):
    """The mounts that it does not show any more are those of the next process in its mount namespace."""
    def read(path):
        if path == "/proc/1/mountinfo":
            raise OSError(error, "it has ended")
        return "1 2 0:3 / /proc rw - proc proc rw\n7 2 0:4 net:[77] /run/netns/web rw - nsfs nsfs rw\n"
    kept = {"O_RDONLY": 0, "strerror": str}
    monkeypatch.setattr(alive, "_read", read)
    monkeypatch.setattr(alive, "posix", types.SimpleNamespace(
        **kept, readlink=lambda path: OF_A_PROCESS["/".join(path.split("/")[3:]) if "/task/" not in path else "ns/net"],
        listdir=lambda path: {"/proc": ["1", "2"]}.get(path, ["1"] if path.endswith("task") else [])))
    sight = alive.Sight()
    assert (sight.held, sight.mounted, sight.obstacle) == ({"net:[5]", "net:[77]"}, {"/run/netns/web"}, "")


# --- libnftables ----------------------------------------------------------------------------------------------

class Binding:
    """Answers each command with the same."""

    def __init__(self, code, error):
        self.answer, self.dry, self.seen = (code, "", error), False, []

    def set_dry_run(self, on):
        self.dry = on

    def cmd(self, text):
        self.seen.append((self.dry, text))
        return self.answer


def nft(code=0, error=""):
    found = Kernel()
    found._nft = libnftables.Libnftables.__new__(libnftables.Libnftables)
    found._nft._nft = Binding(code, error)
    return found


def test_transact():
    """All lines go as one command; success is silence."""
    found = nft()
    found.transact("add table inet a\nadd chain inet a b\n")
    assert found.dry_run("add table inet a\n") == ""
    found.transact("add table inet b\n")
    assert found._nft._nft.seen == [(False, "add table inet a;add chain inet a b"), (True, "add table inet a"),
                                   (False, "add table inet b")]


LINE = "add table inet a;delete chain inet a zz;add chain inet a b"


@pytest.mark.parametrize("error, says", [
    (f"Error: No such file or directory; did you mean chain ‘b’?\n{LINE}\n{'':37}^^\n",
     "No such file or directory; did you mean chain ‘b’?, in: delete chain inet a zz"),
    (f"Error: Could not process rule: File exists\n{LINE}\n^^^^^^^\n", "File exists, in: add table inet a"),
    (f"Error: syntax error\n{LINE}\n{'':57}^\n", "syntax error, in: add chain inet a b"),
    ("netlink: Error: cache initialization failed: Operation not permitted\n",
     "Operation not permitted, in: add table inet a"), ("", ", in: add table inet a"),
    ("\n\n", ", in: add table inet a")])
def test_refused(error, says):
    """A refusal is code 100 with the command that nft points at; nothing is hidden and nothing breaks it."""
    text = LINE.replace(";", "\n")
    with pytest.raises(CniError) as caught:
        nft(-1, error).transact(text)
    assert caught.value.code == 100 and caught.value.args[0].endswith(says) and "\n" not in caught.value.args[0]
    assert ("root" in caught.value.details) == ("not permitted" in error)
    found = nft(-1, error)
    assert found.dry_run(text).endswith(says)


def test_no_libnftables(monkeypatch):
    """Without the binding the error names the package; nobody else sees the modules that it was lent."""
    monkeypatch.setitem(sys.modules, "nftables", None)
    for loaded in json, None:
        if loaded is None:
            monkeypatch.delitem(sys.modules, "json")
        with pytest.raises(CniError, match="libnftables") as caught:
            Kernel().transact("add table inet a\n")
        assert caught.value.code == 5 and "python3-nftables" in caught.value.details
        assert sys.modules.get("json") is loaded


LATER = """
import sys
sys.path.insert(0, sys.argv[1])
from cni_portmap.linux.libnftables import _StandIn, import_lightly
stand_in = _StandIn("fractions", known=1)
stand_in.step_in()
import fractions
assert fractions is stand_in and fractions.known == 1 and "decimal" not in sys.modules
assert fractions.Fraction(1, 2) and sys.modules["fractions"] is not stand_in
found = import_lightly("ctypes")
assert found.CDLL("libc.so.6").getpid() > 0 and "os" not in sys.modules
import os
assert os.path.join and found.CDLL(None)
"""


def test_later():
    """A module behind a stand-in has all of its attributes, and nobody else ever sees the stand-in."""
    subprocess.run(["/usr/bin/python3", "-IS", "-c", LATER, ROOT], timeout=60, check=True)


# --- the lock -------------------------------------------------------------------------------------------------

@pytest.fixture
def lock(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel, "LOCK", str(tmp_path / "lock"))
    monkeypatch.setattr(kernel, "LOCK_SECONDS", 0.2)
    return tmp_path / "lock"


def is_free(path):
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_lock(lock):
    """The lock is held in the block and free after it, an error or not; only its owner can open it."""
    with kernel.Lock():
        assert not is_free(lock) and lock.stat().st_mode & 0o777 == 0o600
    assert is_free(lock)
    with pytest.raises(KeyError), kernel.Lock():
        raise KeyError
    assert is_free(lock)


def test_lock_waits_in_vain(lock):
    """A call that waits too long is told to try again later, and SIGALRM is as it was before."""
    before = signal.getsignal(signal.SIGALRM)
    with kernel.Lock(), pytest.raises(CniError, match="waiting for") as caught, kernel.Lock():
        pass
    assert caught.value.code == 11
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with kernel.Lock():
        pass


def test_lock_waits(lock, monkeypatch):
    """A call that waits gets the lock when its holder is gone."""
    monkeypatch.setattr(kernel, "LOCK_SECONDS", 30)
    hold = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o600), fcntl.LOCK_EX); " \
           "print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.read(1)
        assert not is_free(lock)
        threading.Timer(0.1, holder.stdin.close).start()
        with kernel.Lock():
            assert holder.stdin.closed and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_lock_removed(lock, monkeypatch):
    """A lock file that is removed while we wait is not the one that others will find: the new one is taken."""
    real = os.stat
    removed = []

    def stat(path):
        if not removed:
            removed.append(path)
            os.unlink(path)
        return real(path)
    fake = types.SimpleNamespace(**{name: getattr(kernel.posix, name) for name in dir(kernel.posix) if name != "stat"},
                                 stat=stat)
    monkeypatch.setattr(kernel, "posix", fake)
    with kernel.Lock():
        assert removed and lock.exists() and not is_free(lock)


@pytest.mark.parametrize("prepare, word", [
    (lambda lock: lock.symlink_to("/dev/null"), "symbolic links"), (lambda lock: lock.mkdir(), "directory"),
    (lambda lock: (lock.touch(), lock.chmod(0o644)), "accessible to other users"),
    (lambda lock: (lock.touch(), lock.chmod(0o620)), "accessible to other users")])
def test_lock_unsafe(lock, prepare, word):
    """A lock that others could hold, or that leads elsewhere, is not used."""
    prepare(lock)
    with pytest.raises(CniError, match=word) as caught, kernel.Lock():
        pass
    assert caught.value.code == 5


# --- what surrounds the rules ---------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol, kind", [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)])
def test_port_in_use(protocol, kind):
    """bind(2) itself says whether a port is in use: overlapping addresses are, others aren't."""
    with socket.socket(socket.AF_INET, kind) as used:
        used.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            used.listen()
        port = used.getsockname()[1]
        found = [Kernel().port_in_use(4, protocol, ip, port) for ip in ("127.0.0.1", "", "127.0.0.2")]
        assert found == [True, True, False] and not Kernel().port_in_use(6, protocol, "::1", port)
    assert not Kernel().port_in_use(4, protocol, "127.0.0.1", port)


def test_port_in_use_elsewhere():
    """An address that this host doesn't have, and a protocol that it doesn't know, are used by nobody."""
    assert not Kernel().port_in_use(4, "tcp", "192.0.2.77", 8080)
    assert not Kernel().port_in_use(4, "sctp", "127.0.0.1", 8080)


@pytest.fixture
def sysctl(monkeypatch, tmp_path):
    """route_localnet of interfaces, as temporary files; the one of `all` is 0."""
    monkeypatch.setattr(kernel, "_localnet", lambda interface: str(tmp_path / f"{interface}-route_localnet"))
    (tmp_path / "all-route_localnet").write_text("0\n")
    return tmp_path / "cni0-route_localnet"


def test_the_greater_of_both_sysctls_counts(sysctl):
    """An interface is open by its own value, or by that of all."""
    sysctl.write_text("0\n")
    assert not Kernel().localnet("cni0") and Kernel().localhost_obstacle(4, "cni0") == ""
    for value in True, False:
        Kernel().set_localnet("cni0", value)
        assert Kernel().localnet("cni0") == value
    sysctl.with_name("all-route_localnet").write_text("1\n")
    assert Kernel().localnet("cni0")


def test_a_sysctl_that_cannot_be_written_is_named(sysctl):
    """As an obstacle where it is asked, as an error where it is written; where it is open already there is neither."""
    assert "cannot write 1 to" in Kernel().localhost_obstacle(4, "cni0")
    with pytest.raises(CniError, match=r"cannot write 1 to .*route_localnet") as caught:
        Kernel().set_localnet("cni0", True)
    assert caught.value.code == 5
    sysctl.with_name("all-route_localnet").write_text("1\n")
    assert Kernel().localhost_obstacle(4, "cni0") == ""


@pytest.mark.parametrize("links, kind, master, leads", [
    (["cni0"], "bridge", 0, True), (["veth1"], "bridge", 7, True), (["veth1"], "bridge", 8, False),
    ([], "bridge", 0, True), ([], "veth", 0, True), ([], "", 0, False), ([], "uplink", 0, False)])
def test_what_leads_to_the_container(monkeypatch, links, kind, master, leads):
    """An interface that its result names, or its bridge; without any a bridge or a pair, and never the uplink."""
    for name, value in {"route_interface": lambda family, ip: 7, "uplink": lambda family: 7 * (kind == "uplink"),
                        "link_kind": lambda index: "veth" if kind == "uplink" else kind,
                        "master_of": lambda name: master,
                        "prefixes_of": lambda family, index: ["10.88.0.0/16"]}.items():
        monkeypatch.setattr(netlink, name, value)
    monkeypatch.setattr(kernel, "if_indextoname", lambda index: "cni0")
    assert Kernel().way_to(4, "10.88.0.2", links) == ("cni0", leads, ["10.88.0.0/16"])


LINKS = {1: ("cni0", "bridge", 0), 2: ("veth1", "veth", 1), 3: ("veth2", "veth", 0), 4: ("blue", "vrf", 0),
         5: ("cni1", "bridge", 4), 6: ("veth3", "veth", 5), 7: ("veth4", "veth", 4), 8: ("vlan7", "vlan", 0)}


@pytest.mark.parametrize("route, links, home", [
    (1, ["cni0", "veth1"], (("cni0",), False)), (0, ["veth1"], (("cni0",), False)), (0, [], ((), False)),
    (3, ["veth2"], (("veth2",), True)), (8, ["veth1"], (("vlan7", "cni0"), True)),
    (0, ["cni1", "veth3"], None), (0, ["veth3"], None), (0, ["veth4"], None), (7, [], None)])
def test_where_a_container_is_at_home(monkeypatch, route, links, home):
    """What leads to it and the bridge of its link; a port of a VRF is refused, since all its ports look alike."""
    by_name = {name: master for name, _, master in LINKS.values()}
    monkeypatch.setattr(netlink, "route_interface", lambda family, ip: route)
    monkeypatch.setattr(netlink, "link_kind", lambda index: LINKS[index][1])
    monkeypatch.setattr(netlink, "master_of", by_name.get)
    monkeypatch.setattr(kernel, "if_indextoname", lambda index: LINKS[index][0])
    if home:
        assert Kernel().home_of(4, "10.88.0.2", links) == home
        return
    with pytest.raises(CniError, match=r"10\.88\.0\.2: .*VRF") as caught:
        Kernel().home_of(4, "10.88.0.2", links)
    assert caught.value.code == 7


@pytest.mark.parametrize("code, name", [(101, "cni0"), (97, "cni0"), (0, 'x";drop'), (24, "")])
def test_no_way_to_the_container(monkeypatch, code, name):
    """No route, no IPv6, or a name that nft text cannot hold is no way; a fault of the system is an error."""
    def route(family, ip):
        if code:
            raise OSError(code, "no")
        return 7
    monkeypatch.setattr(netlink, "route_interface", route)
    monkeypatch.setattr(kernel, "if_indextoname", lambda index: name)
    if code == 24:
        with pytest.raises(CniError, match="Too many open files"):
            Kernel().way_to(4, "10.88.0.2", [])
    else:
        assert Kernel().way_to(4, "10.88.0.2", []) == ("", False, [])


def test_noted():
    """The names that the table notes; others may have written there what is no name, or none of an interface."""
    keys = [name.ljust(16, b"\0") for name in (b"lo", b"nobody0", b"../all", b"a;b", b"\xff", b"")]
    comment = attribute(6, b"\x00\x02x\0")
    host = reading(_dump=lambda kind, body: [bytes(4) + nested(3, *(nested(1, nested(1, attribute(1, key)), comment)
                                                                    for key in keys))])
    assert (host.noted(), host.noted_and_gone()) == ({"lo": "x", "nobody0": "x"}, ["nobody0"])


BRIDGED, SRV6 = "/proc/sys/net/bridge/bridge-nf-call-ip6tables", "/proc/sys/net/ipv6/conf/%s/seg6_enabled"


@pytest.mark.parametrize("settings, kind, says", [
    ({}, "bridge", ""), ({BRIDGED: b"0"}, "bridge", ""), ({BRIDGED: b"1"}, "veth", ""),
    ({BRIDGED: b"1"}, "bridge", "bridge-nf-call-ip6tables"), ({SRV6 % "all": b"1", SRV6 % "lo": b"0"}, "veth", ""),
    ({SRV6 % "all": b"1", SRV6 % "lo": b"1"}, "veth", "conf.lo.seg6_enabled")])
def test_obstacles_of_localhost6(monkeypatch, settings, kind, says):
    """A bridge whose replies are translated too early, and an interface whose packets choose their way."""
    monkeypatch.setattr(kernel, "read", lambda path: settings.get(path, b""))
    monkeypatch.setattr(netlink, "link_kind", lambda index: kind)
    found = Kernel().localhost_obstacle(6, "lo")
    assert says in found and bool(found) == bool(says)


@pytest.mark.parametrize("code, says", [(0, ""), (95, "no local route")])
def test_allow_localhost6(monkeypatch, code, says):
    """The route is added, or the obstacle named."""
    added = []

    def add(*route):
        added.append(route)
        if code:
            raise OSError(code, "no")
    monkeypatch.setattr(netlink, "add_local_route", add)
    found = Kernel().allow_localhost6("lo")
    assert says in found and bool(found) == bool(says) and added == [("::1", 1, 4096)]


class Conntrack:
    """Flows (family, port, destination, target), and whether the kernel can choose among them by itself."""

    def __init__(self, flows, able=True):
        self.live, self.able, self.log = [Flow(*flow) for flow in flows], able, []

    def __call__(self, protocol, open_socket):
        return self

    def delete(self, port, destination, target):
        self.log.append("filter")
        if self.able:
            self.live = [flow for flow in self.live if not (
                flow.family == 4 and port in (0, flow.port) and destination in (b"", flow.destination)
                and target in (b"", flow.target))]
        return self.able

    def flows(self, family, port):
        self.log.append("list")
        return [flow for flow in self.live if flow.family == family and port in (0, flow.port)]

    def delete_each(self, flows):
        self.live = [flow for flow in self.live if flow not in flows]


class Flow(NamedTuple):
    family: int
    port: int
    destination: bytes
    target: bytes


A, B = (4, 80, b"host", b"gone"), (6, 80, b"host" * 4, b"gone" * 4)
MINE = (4, 80, b"host", b"mine")


@pytest.mark.parametrize("flows, filters, able, log", [
    ([], [A], True, []), ([MINE], [], True, []), ([A, MINE], [A], True, ["filter"]),
    ([A, MINE], [A], False, ["filter", "list"]), ([B, MINE], [B], True, ["list"]),
    ([A, B, MINE], [A, B], True, ["filter", "list"]),
    ([A, MINE], [(4, port, b"host", b"gone") for port in range(1, 1000)], True, ["list"]),
    ([*[A] * 5, MINE], [A], False, ["filter", "list", "filter"]),
    ([*[(4, 80, bytes([host]), b"gone") for host in range(200)], MINE],
     [(4, 80, bytes([host]), b"gone") for host in range(200)], True, ["list", *["filter"] * 3, "list"])])
def test_delete_flows(monkeypatch, flows, filters, able, log):
    """Stale flows go and others stay, at the least cost: by the kernel's own filter where it can, or from a list."""
    found = Conntrack(flows, able)
    monkeypatch.setattr(conntrack, "read", lambda path, size=1: str(len(flows)).encode() if flows else b"")
    monkeypatch.setattr(conntrack, "Conntrack", found)
    monkeypatch.setattr(conntrack, "MANY_FLOWS", 3)
    monkeypatch.setattr(conntrack, "TRACKED", "/nowhere")
    Kernel().delete_flows(17, lambda: filters, lambda flow: flow != MINE)
    assert [flow for flow in found.live if flow != MINE] == [] and found.live.count(MINE) == flows.count(MINE)
    assert found.log[:len(log)] == log and ("list" in found.log) == ("list" in log)


UDP6 = "ipv6     10 udp      17 29 src=2001:db8::1 dst=fd20::1 sport=4000 dport=80 src=fd20::2 dst=2001:db8::1 " \
    "sport=8080 dport=4000 mark=0 zone=0 use=2\n"
TCP4 = "ipv4     2 tcp      6 431999 ESTABLISHED src=192.0.2.1 dst=192.0.2.2 sport=80 dport=443 src=10.20.0.2 " \
    "dst=192.0.2.1 sport=443 dport=80 [ASSURED] mark=0 zone=0 use=2\n"
IGMP = "unknown  2 unknown  2 597 src=0.0.0.0 dst=224.0.0.1 [UNREPLIED] src=224.0.0.1 dst=0.0.0.0 mark=0 use=2\n"


@pytest.mark.parametrize("text, family, protocol, port, listed", [
    (UDP6, 6, 17, 80, True), (UDP6, 4, 17, 80, False), (UDP6, 6, 6, 80, False), (UDP6, 6, 17, 8080, False),
    (UDP6, 6, 17, 4000, False), (TCP4 * 3 + IGMP + UDP6, 6, 17, 80, True), (TCP4 + IGMP, 4, 6, 443, True),
    (TCP4 + IGMP, 4, 6, 80, False), ("", 4, 6, 80, False), (None, 4, 6, 80, True)])
def test_flows_are_listed_where_there_may_be_some(monkeypatch, tmp_path, text, family, protocol, port, listed):
    """A list of flows is asked for only if /proc has one to the port, or says nothing; or if it has many."""
    path = tmp_path / "nf_conntrack"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(conntrack, "TRACKED", str(path))
    filters = [(family, port, b"", b"")] * 1000
    for count, expected in (3, listed), (conntrack.FEW_TRACKED, True):
        found = Conntrack([], able=False)
        monkeypatch.setattr(conntrack, "Conntrack", found)
        monkeypatch.setattr(conntrack, "read", lambda path, size=1, count=count: str(count).encode())
        Kernel().delete_flows(protocol, lambda: filters, lambda flow: True)
        assert ("list" in found.log) == expected


def test_delete_flows_fails(monkeypatch, capfd):
    """Conntrack's refusal is one line, and no failure: the ports are published all the same."""
    monkeypatch.setattr(conntrack, "read", lambda path, size=1: b"9")
    monkeypatch.setattr("cni_portmap.linux.netlink.socket", Broken)
    Kernel().delete_flows(17, lambda: [(4, 80, b"", b"")], lambda flow: True)
    cni.tell()
    assert capfd.readouterr().err == "cni-portmap: could not delete stale conntrack entries: Operation not permitted\n"


def test_local_addresses(monkeypatch):
    """Link-local addresses aren't among this host's: nothing is forwarded from them."""
    ips = {socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip): ip
           for ip in ("127.0.0.1", "169.254.1.1", "::1", "fe80::1", "febf::1", "fec0::1", "fd00::1")}
    monkeypatch.setattr(netlink, "local_addresses", lambda: set(ips))
    assert {*ips.values()} - {ips[address] for address in Kernel().local_addresses()} == {"fe80::1", "febf::1"}


def test_read(tmp_path):
    """The first bytes of a file; nothing of one that isn't there."""
    (tmp_path / "a").write_text("12345")
    assert (linux.read(f"{tmp_path}/a"), linux.read(f"{tmp_path}/a", 9)) == (b"1", b"12345")
    assert linux.read(f"{tmp_path}/b") == b""


def test_leave():
    """It gives away the sockets that it opened, and nothing that was there before; no process stays behind."""
    script = """if True:
        import os, socket, sys
        sys.path.insert(0, sys.argv[1])
        inherited = [os.open("/", os.O_RDONLY), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).detach()]
        from cni_portmap.linux.kernel import Kernel
        host = Kernel()
        host._libnftables()
        own = [host.open_socket().fileno(), host._nft.fd]
        host.leave()
        print(*(os.path.exists(f"/proc/self/fd/{fd}") for fd in (*inherited, *own)), flush=True)
        os._exit(0)"""
    done = subprocess.run(["/usr/bin/python3", "-IS", "-c", script, ROOT], capture_output=True, text=True, timeout=60,
                          check=True)
    assert done.stdout == "True True False False\n"


def test_close():
    """Its sockets are closed, and it may be asked again."""
    host = Kernel()
    first = host.open_socket().fileno()
    host.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(first)
    host.close()


ENDS = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from cni_portmap import cni, plugin
from cni_portmap.linux import kernel
"""


@pytest.mark.parametrize("script, status, code", [
    ("cni._answering['process'] = 'plugin'; plugin._kernel()._libnftables(); ctypes.CDLL(None).exit(1)", 1, 100),
    ("kernel.Kernel()._libnftables(); sys.exit(3)", 3, None)], ids=["libnftables", "command"])
def test_end(script, status, code):
    """A plugin that libnftables ends still answers; a command that loaded libnftables ends as it wants to."""
    done = subprocess.run(["/usr/bin/python3", "-IS", "-c", ENDS + script, ROOT], capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.returncode, "code" in done.stdout and json.loads(done.stdout)["code"] or None) == (status, code)


def test_a_chain_that_was_flushed_meanwhile(monkeypatch):
    """Where rules are to be inserted before one that is gone, nothing is written, and the call reads again."""
    kernel, change = Kernel(), ruleset.Change()
    change.chains, change.inserted = ["c/web/eth0"], {"c/web/eth1": (2, ["accept"])}
    monkeypatch.setattr(kernel, "rule_attributes", lambda chain: [])
    monkeypatch.setattr(kernel, "transact", None)
    monkeypatch.setattr(kernel, "_send", None)
    assert kernel.write(change, 7) is False


def test_interfaces_that_go_while_they_are_asked_for(monkeypatch):
    """Containers come and go while restore looks for what is open: what has gone is not, and no failure."""
    monkeypatch.setattr(localhost, "_interfaces", lambda: ["gone0", "lo"])
    monkeypatch.setattr(localhost, "_is_open", lambda name: True)
    assert "gone0" not in localhost.open_interfaces() and localhost.open_bridges() == []
    assert netlink.name_of(1 << 30) == ""

    def vanished(path):
        raise OSError(errno.ENODEV, "No such device")
    monkeypatch.setattr(kernel, "read", vanished)
    assert Kernel().localnet("gone0") is False
    monkeypatch.setattr(kernel, "read", lambda path: b"1")  # with br_netfilter
    with pytest.raises(CniError, match="cannot look at the interface gone0: no interface with this name"):
        Kernel().localhost_obstacle(6, "gone0")


@pytest.mark.parametrize("path", ["/run/\0", "\ud800", "", "/nonexistent", "/proc/self/exe"])
def test_a_namespace_that_is_none(path):
    """Whatever path others have written into a record or libcni's cache is an OSError, and nothing was entered."""
    before = os.readlink("/proc/thread-self/ns/net")
    with pytest.raises(OSError, match=r"Invalid argument|No such file"), host.inside(path):
        pass
    assert not host.is_own_namespace(path) and os.readlink("/proc/thread-self/ns/net") == before
