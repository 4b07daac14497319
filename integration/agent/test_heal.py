"""cni-portmap agent: what others delete comes back, what our own calls remove never does."""
import contextlib
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import time

import lab
import pytest
from cni_portmap.cni import CniError
from cni_portmap.linux import companion, events
from cni_portmap.linux.netlink import attributes, text
from lab import TABLE, Pod
from lab.agent import Agent
from lab.libcni_cache import Cache


def flush() -> None:
    lab.nft_script("flush ruleset")
    lab.keep_conntrack()


@pytest.fixture
def agent(host):
    with Agent(host.cli) as running:
        yield running


def back(before, seconds=30):
    """Whether the table is again what it was, byte for byte."""
    return lab.until(lambda: lab.table() == before, seconds)


def everything(name="all"):
    """An attachment with rules and elements of every kind."""
    return Pod(name, "8080:80", "127.0.0.1:8081:81", "[::1]:8082:82/udp",
               *(f"{9000 + i}:{9000 + i}" for i in range(40)), *(f"{9100 + i}:{19100 + i}" for i in range(12)),
               ips=("10.20.0.2/24", "fd20::2/64"),
               conditionsV4=["ip saddr { 10.0.0.0/8, 192.168.7.0/24 }"], conditionsV6=["ip6 saddr fd00::/8"],
               markMasqBit=14)


# --- what comes back ------------------------------------------------------------------------------------------

def test_a_flush(host, agent):
    """Byte for byte, counters too, whether it was heard or read at the start; and again."""
    host.add(everything(), Pod("other", "7000:70"))
    before = lab.table()
    for _ in range(2):
        flush()
        assert back(before), agent.log
    assert not host.call("CHECK", everything()).code
    agent.stop()
    with Agent(host.cli) as again:
        flush()
        assert back(before), again.log
    host.delete(everything(), Pod("other", "7000:70"))
    assert not lab.chains()


@pytest.mark.parametrize("damage", [
    "delete table inet cni_portmap", "flush chain inet cni_portmap guard", "flush chain inet cni_portmap postrouting",
    "flush map inet cni_portmap hostports", "delete element inet cni_portmap hostports { ipv4 . tcp . 8080 }",
    "flush set inet cni_portmap localhost_interfaces", "flush table inet cni_portmap",
    "delete chain inet cni_portmap output", "a rule in the middle", "the rules of a container", "one map and its rule"])
def test_a_part(host, agent, damage):
    """One rule, element, map or chain torn out is healed like the table."""
    host.add(everything(), Pod("other", "7000:70"))
    before = lab.state()
    if damage == "a rule in the middle":
        handles = lab.nft("-a", "list", "chain", *TABLE.split(), everything().chain)
        third = [line.rpartition("# handle ")[2] for line in handles.splitlines() if "# handle" in line][3:6]
        lab.nft_script(*(f"delete rule {TABLE} {everything().chain} handle {number}" for number in third))
    elif damage == "the rules of a container":
        lab.nft_script(f"flush chain {TABLE} {everything().chain}")
    elif damage == "one map and its rule":
        lab.nft_script(f"flush chain {TABLE} dispatch", f"delete map {TABLE} hostip4_hostports")
    else:
        lab.nft_script(damage)
    assert lab.until(lambda: lab.state() == before), (agent.log, lab.table())  # chains stand in another order
    assert not host.call("CHECK", everything()).code
    host.delete(everything(), Pod("other", "7000:70"))
    assert not lab.chains() and not lab.elements()


def test_the_next_sandbox(host, agent):
    """It stands by for its pod's port after a flush, too, and gets it when the last one dies without DEL."""
    last, following = (
        Pod(name, "8080:80", ips=(f"10.20.{number}.2/24",), args="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web",
            link=lab.wire(name, (f"10.20.{number}.1/24",), (f"10.20.{number}.2/24",)).host_device)
        for number, name in ((2, "last"), (3, "next")))
    host.add(last, following)
    before = lab.table()
    flush()
    assert back(before), agent.log
    lab.delete_link(last.link)
    assert lab.until(lambda: lab.chains() == [following.chain]), agent.log
    assert lab.elements() == {("ipv4", "tcp", "8080"): following.chain}
    flush()
    assert lab.until(lambda: not host.call("CHECK", following).code), agent.log


@pytest.mark.parametrize("mode", ["nat", "routed", "isolated"])
def test_exposure(host, agent, mode):
    """What a policy has written: its sets, its shared chains, its hooks; and DEL removes them as before."""
    its = Pod("web", *([] if mode == "isolated" else ["8080:80"]), ips=("10.20.0.2/24", "fd20::2/64"),
              gatewayModeV4=mode, gatewayModeV6=mode)
    host.add(Pod("other", "7000:70"))
    plain = lab.elements()
    host.add(its)
    before = lab.state()
    for _ in range(2):
        flush()
        assert lab.until(lambda: lab.state() == before), (agent.log, lab.table())  # chains stand in another order
    assert lab.until(lambda: not agent.children())  # flows that began meanwhile are forgotten
    assert not host.call("CHECK", its).code
    host.delete(its)
    assert lab.elements() == plain and lab.chains() == [Pod("other").chain]


def test_counters_survive(host, agent):
    """The kernel's last words on each rule say what it has counted."""
    host.add(Pod("web", "8080:80"))
    with lab.wire("lan", ("192.168.9.1/24",), ("192.168.9.2/24",)) as lan:
        pass

    before = connected(host, lan)
    flush()
    assert lab.until(lambda: _listed(host))
    assert _counts(host) == before


def connected(host, lan):
    """How many IPv4 connections each line of `list` counts, once somebody on the LAN has tried some."""
    assert lab.until(lambda: lab.exchange(lan, "192.168.9.1", 8080, timeout=0.2) or _counts(host)[0] >= 3)
    return _counts(host)


def _counts(host):
    return [line["connections"] for line in _listed(host) if line["family"] == 4]


def _listed(host):
    return json.loads(host.command("list", "--json"))


def test_the_guard_is_first(host, agent):
    """In a transaction of its own, with all that is shared; then come the containers."""
    name = TABLE.split()[1]
    host.add(everything())
    listener = events.Listener([name])
    flush()
    assert agent.logs("restored")
    written = [{text(dict(attributes(body, 4))[3]) for kind, _, body in each.messages[name] if kind ==
                events.NFT_MSG_NEWCHAIN} for each in listener.commits() if each.name.startswith("cni-portmap/")]
    listener.close()
    of_owners = [{chain for chain in chains if "/" in chain} for chains in written if chains]
    assert of_owners == [set(), {everything().chain}]
    assert "guard" in written[0]


def test_a_copy_of_long_ago(host, agent):
    """A firewall's reload that brings an old copy of our table back: what our calls have written since stands again."""
    host.add(Pod("old", "8080:80"))
    copy = lab.table()
    host.delete(Pod("old", "8080:80"))
    host.add(Pod("new", "8080:80"))
    before = lab.table()
    lab.nft_script("flush ruleset", copy)
    assert back(before), (agent.log, lab.table())


# --- what does not ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["DEL", "gc", "teardown"])
def test_what_our_own_calls_remove_stays_removed(host, agent, how):
    """DEL, GC and the command are known by the name of their process, whatever file they were started from."""
    pods = Pod("web", "8080:80"), Pod("db", "5432:5432")
    (host.add_without_link if how == "gc" else host.add)(pods[0])
    host.add(pods[1])
    if how == "DEL":
        host.delete(pods[0])
        assert lab.chains() == [pods[1].chain]
    elif how == "gc":
        host.command("gc")
        assert lab.chains() == [pods[1].chain]
    else:
        host.command("teardown", "--force")
        assert not lab.table()
    after = lab.table()
    lab.nft_script("add table ip other", "delete table ip other")
    if how != "teardown":
        flush()
    agent.catch_up()
    assert back(after), agent.log


def test_replaced_while_lost(host, agent):
    """A container that comes back with other ports while the table is gone has those alone."""
    web, other = Pod("web", "8080:80", "8081:81"), Pod("other", "7000:70")
    host.add(web, other)
    with lab.held_lock():
        flush()
        time.sleep(0.2)
        call = lab.Call(host.executable, "ADD", web.but("9090:90"))
        lab.wait_until_blocked(call.process.pid)
        agent.pause()  # so that the call is first
    assert not call.answer().code
    agent.send(signal.SIGCONT)
    assert lab.until(lambda: lab.chains() == sorted([web.chain, other.chain])), agent.log
    assert {key[2] for key in lab.elements()} == {"9090", "7000"}
    assert not host.call("CHECK", web.but("9090:90")).code


def test_a_new_owner(host, agent):
    """A port that got a lawful owner while the table was gone is his; the other ports of the first come back."""
    first = Pod("first", "8080:80", "8081:81")
    second = Pod("second", "10.20.0.1:8080:80", ips=("10.20.0.3/24",))
    host.add(first)
    with lab.held_lock():
        flush()
        time.sleep(0.2)
        call = lab.Call(host.executable, "ADD", second)
        lab.wait_until_blocked(call.process.pid)
        agent.pause()
    assert not call.answer().code
    agent.send(signal.SIGCONT)
    assert lab.until(lambda: len(lab.chains()) == 2), agent.log
    assert lab.elements() == {("ipv4", "tcp", "8081"): first.chain, ("10.20.0.1", "tcp", "8080"): second.chain}


def test_deleted_while_lost(host, tmp_path):
    """A DEL that meets a flushed table commits nothing; libcni's file, which was seen and has gone, tells of it."""
    cache = Cache(tmp_path)
    web, other = Pod("web", "8080:80"), Pod("other", "7000:70")
    host.add(web, other)
    files = [cache.write(pod) for pod in (web, other)]
    with Agent(host.cli, cache=tmp_path) as agent:
        for moment in "before", "after":
            with lab.held_lock():
                flush()
                time.sleep(0.1)
                host.delete(web)
                if moment == "before":
                    files[0].unlink()
            if moment == "after":
                assert lab.until(lambda: web.chain in lab.chains())
                files[0].unlink()  # libcni removes it after the plugin's DEL
            assert lab.until(lambda: lab.chains() == [other.chain]), agent.log
            time.sleep(0.3)
            assert lab.chains() == [other.chain]
            if moment == "before":
                host.add(web)
                files[0] = cache.write(web)
                agent.send(signal.SIGHUP)
                agent.wait_for("READY=1")  # it has seen that file


def test_dead_while_lost(host, agent):
    """A container that ended while the table was gone does not keep its port."""
    host.add_without_link(Pod("web", "8080:80"))
    host.add(Pod("other", "7000:70"))
    with lab.held_lock():
        flush()
        host.delete(Pod("web", "8080:80"))
    assert lab.until(lambda: lab.chains() == [Pod("other").chain]), agent.log


def test_not_heard(host, tmp_path):
    """After an overrun memory is what the kernel holds, and only what libcni's files prove comes back."""
    cache = Cache(tmp_path)
    web, gone = Pod("web", "8080:80"), Pod("gone", "7000:70")
    with Agent(host.cli, "--buffer", 1 << 18, cache=tmp_path) as agent:
        host.add(web, gone)
        cache.write(web)
        agent.catch_up()
        assert lab.until(lambda: not agent.children())  # one looks at libcni's files at the start
        agent.pause()
        host.delete(gone)
        flush()
        many = ", ".join(f"10.{i >> 8}.{i & 255}.1" for i in range(20000))
        lab.nft_script(f"table ip other {{ set many {{ type ipv4_addr; elements = {{ {many} }}; }}; }}")
        agent.send(signal.SIGCONT)
        assert agent.logs("reading the table again"), agent.log
        assert lab.until(lambda: lab.chains() == [web.chain]), agent.log
        time.sleep(0.5)
        assert lab.chains() == [web.chain] and {key[2] for key in lab.elements()} == {"8080"}
        assert "map elements" not in agent.log, agent.log  # of memory, for an audit to remove


def noted():
    """The interfaces that the guard keeps others from localhost by."""
    listing = lab.nft("-j", "list", "set", *TABLE.split(), "localhost_interfaces", check=False)
    sets = [entry["set"] for entry in json.loads(listing or '{"nftables": []}')["nftables"] if "set" in entry]
    return {item["elem"]["val"] for each in sets for item in each.get("elem", ())}


def test_an_open_interface_keeps_its_guard(host, tmp_path):
    """After a flush the first ADD guards its own interface; the agent the others, with a living container or without.

    Whether it begins then, and knows a bridge by its sysctl; or could not hear, and knows what the table had noted.
    """
    cache = Cache(tmp_path)
    links = {name: lab.wire(name, (f"10.20.{i}.1/24",), (f"10.20.{i}.2/24",)).host_device
             for i, name in enumerate(("web", "db"))}
    web, db = (Pod(name, f"80{i}0:80", ips=(f"10.20.{i}.2/24",)) for i, name in enumerate(links))
    lab.add_bridge("left")
    lab.bring_up("left", "10.20.9.1/24")
    lab.sysctl("net.ipv4.conf.left.route_localnet", 1)
    host.add(web)
    with Agent(host.cli, "--buffer", 4096, cache=tmp_path) as agent:
        assert lab.until(lambda: noted() == {links["web"], "left"}), agent.log
        agent.pause()
        host.add(Pod("much", *(f"{20000 + i}:{i + 1}" for i in range(500))))
        flush()
        host.add(db)
        cache.write(db)
        assert noted() == {links["db"]}
        agent.send(signal.SIGCONT)
        assert lab.until(lambda: noted() == {*links.values(), "left"}), agent.log
        assert "web" not in lab.table().replace(links["web"], "")


SETTLE = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
from cni_portmap.agent import main
main.time.sleep = lambda _: pathlib.Path(sys.argv[3]).unlink(missing_ok=True)
print(main.restore_settled(sys.argv[2:3], {}))
"""


def test_in_the_middle_of_a_deletion(host, bin_dir, tmp_path):
    """libcni removes its file after the plugin's DEL, here while the agent waits: only a file that stays is proof."""
    cache = Cache(tmp_path)
    web, other = Pod("web", "8080:80"), Pod("other", "7000:70")
    lab.Namespace("web"), lab.Namespace("other")
    files = [cache.write(pod) for pod in (web, other)]
    lib, = {path.parent.parent for path in (bin_dir.parent / "lib").rglob("cni_portmap/plugin.py")}
    said = lab.run("/usr/bin/python3", "-Bc", SETTLE, lib, tmp_path, files[0])
    assert lab.chains() == [other.chain]
    assert "restored container other" in said and "web" not in said


# --- an administrator, and those who do not stop ----------------------------------------------------------------

def test_a_wish(host, agent):
    """Our table alone, deleted twice by nft, stays deleted until --resume; a flush of everything is no wish."""
    host.add(Pod("web", "8080:80"))
    before = lab.table()
    for _ in range(2):
        flush()
        assert back(before), agent.log
    lab.nft("delete", "table", *TABLE.split())
    assert back(before), agent.log
    lab.nft("delete", "table", *TABLE.split())
    assert agent.logs("agent --resume")
    assert not lab.until(lab.table, 4)  # the fourth heal would wait for one second
    assert "heals again" in host.command("agent", "--resume")
    assert back(before), agent.log


def test_a_wish_while_a_heal_waits(host, agent):
    """What is lost by then is restored after --resume."""
    host.add(Pod("web", "8080:80"))
    before = lab.table()
    lab.nft("delete", "table", *TABLE.split())
    assert back(before), agent.log
    for _ in range(2):
        flush()
        assert back(before), agent.log
    lab.nft("flush", "chain", *TABLE.split(), "guard")  # the fourth heal waits for a second
    lab.nft("delete", "table", *TABLE.split())
    assert agent.logs("agent --resume")
    assert not lab.until(lab.table, 4)
    host.command("agent", "--resume")
    assert back(before), agent.log


def test_a_wish_and_a_reload(host, tmp_path):
    """What makes the agent look at libcni's files is no reason to forget the wish; --resume is."""
    cache, web = Cache(tmp_path), Pod("web", "8080:80")
    host.add(web)
    cache.write(web)
    with Agent(host.cli, cache=tmp_path) as agent:
        for _ in range(2):
            lab.nft("delete", "table", *TABLE.split())
            assert lab.until(lambda: lab.table() or "agent --resume" in agent.log)
        agent.send(signal.SIGHUP)
        agent.wait_for("READY=1")
        assert not lab.until(lab.table, 5), agent.log  # it would look whether the file stays
        host.command("agent", "--resume")
        assert lab.until(lambda: lab.chains() == [web.chain]), agent.log


def test_a_wish_while_it_looks_at_files(host, tmp_path):
    """What libcni's files prove is not written any more, though that had begun before."""
    cache, web = Cache(tmp_path), Pod("web", "8080:80")
    lab.Namespace("web")
    host.add(Pod("other", "7000:70"))
    with Agent(host.cli, cache=tmp_path) as agent:
        with agent.held_at(cache.write(web)):
            agent.send(signal.SIGHUP)
            agent.wait_for("READY=1")
            assert lab.until(agent.children)
            for _ in range(2):
                lab.nft("delete", "table", *TABLE.split())
                assert lab.until(lambda: lab.table() or "agent --resume" in agent.log)
        assert not lab.until(lab.table, 5), agent.log
        assert "agent --resume" in agent.log and "libcni's file" not in agent.log, agent.log
        host.command("agent", "--resume")
        assert lab.until(lambda: lab.chains() == sorted([web.chain, Pod("other").chain])), agent.log


def test_resume_without_an_agent(host):
    """Nobody is there to resume."""
    host.command("agent", "--resume", status=1)


def test_a_flusher_who_does_not_stop(host, agent):
    """At once for three times, then less and less often, however busy the host; and back when he stops."""
    host.add(everything())
    before, began = lab.table(), time.monotonic()
    for _ in range(7):
        flush()
        assert back(before), agent.log
    assert time.monotonic() - began > 1 + 2 + 4 + 8
    assert agent.comes_to_rest()


def test_one_agent(host, agent):
    """One for each network namespace; the second says so, and who is the first."""
    with Agent(host.cli, ready=False) as second:
        assert second.process.wait(30) == 1
        assert str(agent.process.pid) in second.log
        second.process.returncode = 0
    with lab.fresh_host(), Agent(host.cli):
        pass


def as_another_user(task):
    """What a task returns, in words, or the class of its error, in a process of somebody who is not root."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setresuid(65534, 65534, 65534)
            words = str(task())
        except (OSError, CniError) as error:
            words = type(error).__name__
        finally:
            os.write(write, words.encode())
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with open(read) as pipe:
        return pipe.read()


def test_nobody_else_has_its_name(host):
    """Only root can take it, or ask; nothing of it stays."""
    assert as_another_user(companion.take) == "CniError"
    with Agent(host.cli):
        assert lab.until(companion.is_healing)
        assert (as_another_user(companion.holder), as_another_user(companion.is_healing)) == ("0", "False")
    assert not companion.is_healing() and not [*pathlib.Path("/run").glob("cni-portmap-agent*")]


def test_killed_and_started_again(host, tmp_path):
    """Its name is free at once, though its children still work; what was lost meanwhile, libcni's files prove."""
    cache = Cache(tmp_path)
    web, other = Pod("web", "8080:80"), Pod("other", "7000:70")
    host.add(web, other)
    cache.write(web)
    with Agent(host.cli, cache=tmp_path) as agent:
        flush()
        assert agent.logs("restored 8 chains"), agent.log  # and a child looks for stale flows, another at the files
        agent.stop(signal.SIGKILL)
    flush()
    with Agent(host.cli, cache=tmp_path) as again:
        assert lab.until(lambda: lab.chains() == [web.chain]), again.log


def test_killed_in_the_middle_of_a_heal(host, tmp_path):
    """What is written is written as a whole, so the next one finds all or nothing, and libcni's files."""
    cache = Cache(tmp_path)
    pods = [Pod(f"pod{i}", f"{8000 + i}:80", ips=(f"10.20.0.{i + 2}/24",)) for i in range(20)]
    host.add(*pods)
    for pod in pods:
        cache.write(pod)
    before = lab.state()
    for _ in range(4):
        with Agent(host.cli, cache=tmp_path) as agent:
            lab.nft_script("flush ruleset")
            lab.until(lab.table, 1)
            agent.stop(signal.SIGKILL)
    lab.keep_conntrack()
    with Agent(host.cli, cache=tmp_path) as agent:
        assert lab.until(lambda: lab.state() == before), agent.log


def test_stopped_for_a_while(host, agent):
    """A process that the system stops hears what has happened when it goes on."""
    web, db = Pod("web", "8080:80"), Pod("db", "5432:5432")
    host.add(web, db)
    agent.pause()
    host.delete(db)
    before = lab.table()
    flush()
    agent.send(signal.SIGCONT)
    assert back(before), agent.log


@pytest.mark.parametrize("spare", [0, 100_000, 200_000, 400_000])
def test_no_memory(host, tmp_path, spare):
    """Where memory runs out, in whatever place, it says so, and tries until there is some."""
    cache, much = Cache(tmp_path), Pod("much", *(f"{20000 + i}:{i + 1}" for i in range(4000)))
    host.add(much)
    cache.write(much)
    with Agent(host.cli, cache=tmp_path) as agent:
        pid = agent.process.pid
        pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[0])
        limits = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + spare, limits[1]))
        flush()
        assert lab.until(lambda: "memory" in agent.log or (spare and "restored" in agent.log)), agent.log
        time.sleep(0.3)
        resource.prlimit(pid, resource.RLIMIT_AS, limits)
        assert lab.until(lambda: not host.call("CHECK", much).code), agent.log


def test_calls_while_it_heals(host, agent):
    """ADD and DEL in the middle of flushes end well, and in the end each living attachment is whole."""
    pods = [Pod(f"pod{i}", f"{8000 + i}:80", f"{8000 + i}:81/udp", ips=(f"10.20.0.{i + 2}/24",)) for i in range(12)]
    host.add(*pods[:6])
    for index in range(6):
        flush()
        answers = [lab.Call(host.executable, "ADD", pods[6 + index]), lab.Call(host.executable, "DEL", pods[index])]
        assert not any(each.answer().code for each in answers)
    alive = sorted(pod.chain for pod in pods[6:])

    def settled():
        return [chain for chain in lab.chains() if chain in alive] == alive
    assert lab.until(settled), agent.log
    time.sleep(1)
    for pod in pods[6:]:
        assert not host.call("CHECK", pod).code


# --- life ------------------------------------------------------------------------------------------------------

def test_end(host):
    """SIGTERM: status 0, and what is published stays."""
    host.add(Pod("web", "8080:80"))
    before = lab.table()
    with Agent(host.cli) as agent:
        assert agent.stop() == 0
    assert lab.table() == before


def test_end_before_it_is_ready(host):
    """SIGTERM is heard while somebody else has the lock."""
    with lab.held_lock(), Agent(host.cli, ready=False) as agent:
        assert lab.until(lambda: agent.handles(signal.SIGTERM))
        assert agent.process.poll() is None and agent.stop() == 0


def test_words_of_another_version(host):
    """What it does not understand has no answer, and no traceback."""
    with Agent(host.cli, "--reserve"):
        for words in "yield 4", "yield x tcp * 80", "yield 4 tcp * 80 90":
            assert companion.ask(words) is None
        assert lab.until(lambda: companion.ask("status"))


def test_reload(host, agent):
    """SIGHUP reads everything again, and tells systemd when that is done."""
    host.add(Pod("web", "8080:80"))
    agent.send(signal.SIGHUP)
    agent.wait_for("RELOADING=1")
    agent.told = "READY=1" if "READY=1" in agent.told else ""
    agent.wait_for("READY=1")
    before = lab.table()
    flush()
    assert back(before)


def test_a_service_manager_that_does_not_read(host, agent):
    """It waits for nobody: it heals, and says that it is ready as soon as somebody reads."""
    host.add(Pod("web", "8080:80"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(BlockingIOError):
        sock.setblocking(False)
        while sock.sendto(b"X=1", agent.notify):
            pass
    agent.send(signal.SIGHUP)
    assert lab.until(companion.is_healing)
    before = lab.table()
    flush()
    assert back(before), agent.log
    agent.wait_for("RELOADING=1")
    agent.wait_for("READY=1")


def test_watchdog(host):
    """It tells systemd that its loop goes round."""
    with Agent(host.cli, within=("env", "WATCHDOG_USEC=400000")) as agent:
        for _ in range(3):
            agent.wait_for("WATCHDOG=1")


@pytest.mark.parametrize("options", [["--metrics", "8080"], ["--metrics", "unix:relative"], ["--gc-seconds", "-1"],
                                     ["--gc-seconds", "x"], ["--buffer", "1"], ["--unknown"]])
def test_wrong_usage(host, options):
    """Each value is named, with what was expected."""
    host.command("agent", *options, status=2)


# --- the dead --------------------------------------------------------------------------------------------------

def test_gc(host):
    """An owner that was dead twice loses its ports; a living one and an unknown one keep theirs."""
    host.add(Pod("web", "8080:80"))
    host.add_without_link(Pod("dead", "7000:70"))
    with Agent(host.cli, "--gc-seconds", 0.3) as agent:
        assert lab.until(lambda: lab.chains() == [Pod("web").chain]), agent.log
        assert agent.logs("removed container dead")
        time.sleep(1)
    assert lab.chains() == [Pod("web").chain]


def test_gc_never_by_default(host, agent):
    """--gc-seconds 0."""
    host.add_without_link(Pod("dead", "7000:70"))
    time.sleep(1)
    assert lab.chains()


@pytest.mark.parametrize("within", [("unshare", "--mount", "--propagation", "private"),
                                    ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")])
def test_gc_needs_sight(host, within):
    """From another mount or PID namespace a living container's namespace cannot be seen: it keeps its ports."""
    with Agent(host.cli, "--gc-seconds", 0.2, within=within) as agent:
        host.add(Pod("web", "8080:80"))
        before = lab.table()
        time.sleep(1.5)
        assert lab.table() == before, agent.log
        flush()
        assert back(before), agent.log
        time.sleep(2)
        assert lab.table() == before, agent.log
        if within[1] == "--pid":
            subprocess.run(["pkill", "--parent", str(agent.process.pid)], check=False)
            agent.process.wait(30)
            agent.process.returncode = 0


# --- metrics ---------------------------------------------------------------------------------------------------

def scrape(path, request=b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(request)
        answer = b""
        while chunk := sock.recv(65536):
            answer += chunk
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head, body


def test_metrics(host, tmp_path):
    """By the names of docs/agent.md, read by prometheus_client's own parser."""
    parser = pytest.importorskip("prometheus_client.parser")
    path = tmp_path / "metrics"
    with Agent(host.cli, "--metrics", f"unix:{path}") as agent:
        assert path.stat().st_mode & 0o777 == 0o600
        host.add(Pod("web", "8080:80", "8080:80/udp", "127.0.0.1:9000:9000", "127.0.0.1:9001:9001"))
        with lab.wire("lan", ("192.168.9.1/24",), ("192.168.9.2/24",)) as lan:
            pass
        tcp, udp, *_ = connected(host, lan)
        flush()
        assert agent.logs("restored")
        head, body = scrape(path)
        assert head.startswith("HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4")
        found = {}
        for family in parser.text_string_to_metric_families(body):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        assert found["cni_portmap_published_ports"] == [({}, 4)]
        assert found["cni_portmap_restores_total"] == [({}, 1)] == found["cni_portmap_foreign_deletions_total"]
        assert found["cni_portmap_conntrack_entries"][0][1] >= 0 < found["cni_portmap_conntrack_limit"][0][1]
        names = {"network": "net", "container": "web", "interface": "eth0"}
        assert ({**names, "protocol": "tcp", "host_ip": "0.0.0.0", "host_port": "8080"}, tcp) in \
            found["cni_portmap_connections_total"]
        assert found["cni_portmap_container_connections_total"] == [(names, tcp + udp)]
        assert scrape(path, b"GET / HTTP/1.0\r\n\r\n")[0].startswith("HTTP/1.0 404")
        assert scrape(path, b"DELETE /metrics HTTP/1.0\r\n\r\n")[0].startswith("HTTP/1.0 405")
        assert scrape(path, b"\0" * 20000)[1] == ""
        agent.stop(signal.SIGKILL)
        with Agent(host.cli, "--metrics", f"unix:{path}"):  # the socket of one that was killed is taken over
            assert scrape(path)[0].startswith("HTTP/1.0 200")
    assert not path.exists()


def test_metrics_by_address(host):
    """HOST:PORT; an address that is taken is one clear line."""
    with Agent(host.cli, "--metrics", "127.0.0.1:9472") as agent:
        assert "cni_portmap_restores_total 0" in lab.run("curl", "-s", "http://127.0.0.1:9472/metrics")
        with lab.fresh_host(), Agent(host.cli, "--metrics", "192.0.2.1:9472", ready=False) as second:
            assert second.process.wait(30) == 1 and "cannot listen on 192.0.2.1:9472" in second.log
            second.process.returncode = 0
        assert agent.process.poll() is None
