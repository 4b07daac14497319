"""cni-portmap restore: after a flush the kernel holds again what libcni remembers of those that live, and no more."""
import contextlib
import functools
import os
import pathlib
import random
import threading
from typing import Any

import lab
import pytest
from cni_portmap.attachment import Attachment
from cni_portmap.libcni_cache import Memory
from cni_portmap.linux import kernel
from cni_portmap.verbs.restore import restore
from lab import TABLE, Call, Fork, Pod
from lab.damage import BOTH, DAMAGES, OTHER
from lab.libcni_cache import PORTMAP, Cache


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path)


def alive(*pods: Pod) -> tuple[Pod, ...]:
    for name in {pathlib.Path(pod.netns).name for pod in pods}:
        lab.Namespace(name)
    return pods


def flush() -> None:
    lab.nft_script("flush ruleset")


def restored(report: Any) -> list[str]:
    return sorted(f"c/{each['container']}/{each['interface']}" for each in report["restored"])


# --- what comes back ------------------------------------------------------------------------------------------

def test_everything_comes_back(host, cache):
    """The base, then all that 50 containers had published is there again at once; a second run writes nothing."""
    namespace = lab.Namespace("shared")
    pods = [Pod(f"pod{i}", f"{9000 + i}:80", f"127.0.0.1:{9000 + i}:53/udp", netns=namespace.path,
                ips=(f"10.20.0.{i + 2}/16", f"fd20::{i + 2}/64")) for i in range(50)]
    for pod in pods:
        assert not lab.fork("ADD", pod).code
        cache.write(pod)
    before = lab.state()
    flush()
    generation = lab.generation()
    assert restored(cache.restore(host)) == sorted(pod.chain for pod in pods)
    assert lab.state() == before and lab.generation() == generation + 2
    again = cache.restore(host)
    assert not again["restored"] and again["in_place"] == 50
    assert lab.generation() == generation + 2
    for pod in pods[::10]:
        assert not host.call("CHECK", pod).code
    host.delete(*pods[::10])


def test_bridges_that_a_new_table_does_not_know(host, cache):
    """A bridge without a live container, open since before a flush, is guarded though an ADD has made a table since.

    A wire that an administrator has opened is left alone, and so is the uplink.
    """
    for number, device in enumerate(("cni8", "cni9", "uplink")):
        lab.add_bridge(device)
        lab.bring_up(device, f"10.66.{number}.1/24")
    lab.add_route("default", "10.66.2.2")
    lab.wire("admin", ("192.0.2.1/24",), ("192.0.2.2/24",), "loopback0")
    for device in "cni9", "uplink", "loopback0":
        lab.sysctl(f"net.ipv4.conf.{device}.route_localnet", 1)
    host.add(Pod("web", "8080:80", ips=("10.66.0.2/24",)))
    guarded = []
    for _ in range(2):
        cache.restore(host)
        listing = lab.nft("list", "set", "inet", "cni_portmap", "localhost_interfaces")
        guarded.append({word for word in ("cni8", "cni9", "uplink", "loopback0") if f'"{word}"' in listing})
    assert guarded == [{"cni8", "cni9"}] * 2


@pytest.mark.parametrize("damage", ["flush chain {} guard", "delete chain {} guard_input",
                                    "add table {} {{ flags dormant; }}"])
def test_the_guard_comes_back_for_nobody(host, cache, damage):
    """What was opened for a container stays open after its DEL: `restore` repairs the guard though nobody lives."""
    pod = Pod("web", "8080:80")
    host.add(pod)
    host.delete(pod)
    before = sorted(lab.table().splitlines())
    lab.nft_script(damage.format(TABLE))
    assert sorted(lab.table().splitlines()) != before
    cache.restore(host)
    assert sorted(lab.table().splitlines()) == before


def test_dry_run(host, cache):
    """A dry run says what a real one would do, and writes nothing."""
    web, other = alive(Pod("web", "8080:80"), Pod("other", "9090:80"))
    cache.write(web)
    cache.write(other)
    host.add(other)
    before, generation = lab.state(), lab.generation()
    planned = cache.restore(host, "--dry-run")
    assert restored(planned) == [web.chain] and planned["in_place"] == 1
    assert lab.state() == before and lab.generation() == generation
    assert cache.restore(host) == planned


@pytest.mark.parametrize("first", [0, 1], ids=["holder first", "stand-by first"])
@pytest.mark.parametrize("damage", ["flush table {}", "flush chain {} c/web/eth0", "flush chain {} c/web/eth1"])
def test_who_stands_by(host, cache, damage, first):
    """A port that two interfaces of a container publish is restored whichever is damaged, and remembered first."""
    lab.Namespace("web")
    both = (Pod("web", "8080:80", ips=("10.20.0.2/24",)),
            Pod("web", "8080:80", ifname="eth1", network="wan", ips=("10.21.0.2/24",)))
    host.add(*both)
    for index, pod in enumerate(both):
        path = cache.write(pod)
        os.utime(path, (index ^ first, index ^ first))  # the oldest is read first
    lab.nft_script(damage.format(TABLE))
    cache.restore(host)
    assert [*lab.elements()] == [("ipv4", "tcp", "8080")]
    assert not cache.restore(host)["restored"]
    for pod in both:
        assert not host.call("CHECK", pod).code
    holder, = lab.elements().values()
    host.delete(*(pod for pod in both if pod.chain == holder))
    assert [*lab.elements().values()] == [pod.chain for pod in both if pod.chain != holder]


def test_localhost_stays_closed_without_the_guard(host, cache):
    """Localhost is not opened if the shared chains cannot be written."""
    lab.wire("web", ("10.20.0.1/24",), ("10.20.0.2/24",))
    cache.write(Pod("web", "8080:80"))
    path = pathlib.Path("/proc/sys/net/ipv4/conf/to-web/route_localnet")
    lab.nft_script(f"table {TABLE} {{ map hostip6_hostports {{ type inet_service : verdict; }}; }}")
    cache.restore(host, status=1)
    assert path.read_text() == "0\n"
    lab.nft_script(f"delete table {TABLE}")
    assert restored(cache.restore(host)) == ["c/web/eth0"] and path.read_text() == "1\n"


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "element stolen"])
def test_every_damage(host, cache, name):
    """restore brings back everything that somebody removed, the shared chains too."""
    pods = alive(OTHER, BOTH)
    host.add(*pods)
    for pod in pods:
        cache.write(pod)
    before = lab.state()
    DAMAGES[name][0]()
    cache.restore(host)
    assert lab.state() == before
    for pod in pods:
        assert not host.call("CHECK", pod).code


def test_what_is_whole_is_left_alone(host, cache):
    """Only what is lost is written: others keep their counters."""
    pods = alive(Pod("web", "8080:80"), Pod("other", "9090:80"))
    host.add(*pods)
    for pod in pods:
        cache.write(pod)
    handles = lab.run("nft", "-a", "list", "chain", "inet", "cni_portmap", pods[1].chain)
    lab.nft_script(f"delete element {TABLE} hostports {{ ipv4 . tcp . 8080 }}")
    assert restored(cache.restore(host)) == [pods[0].chain]
    assert lab.run("nft", "-a", "list", "chain", "inet", "cni_portmap", pods[1].chain) == handles


def test_one_port_on_two_networks(host, cache):
    """A port that a container publishes on two networks comes back as it was, and outlives the first of them."""
    lan, wan = alive(Pod("web", "8080:80", ifname="eth0", network="lan"),
                     Pod("web", "8080:80", ifname="eth1", network="wan", ips=("10.21.0.2/24",)))
    host.add(lan, wan)
    for age, pod in enumerate((wan, lan)):  # libcni's files, the older last
        path = cache.write(pod)
        os.utime(path, (1000 - age, 1000 - age))
    before = lab.state()
    flush()
    assert restored(cache.restore(host)) == [lan.chain, wan.chain]
    assert lab.state() == before
    host.delete(lan)
    assert lab.elements() == {("ipv4", "tcp", "8080"): wan.chain}


# --- which files ----------------------------------------------------------------------------------------------

WEB = Pod("web", "8080:80")
SANDBOX = [{"name": "eth0", "sandbox": WEB.netns}]

# changes to the file, all of which runtimes write: it comes back
SHAPES: dict[str, dict[str, Any]] = {
    "libcni 1.1 and later": {},
    "libcni before 1.1 has no netns": {"netns": None},
    "no arguments": {"cniArgs": None},
    "containerd's capitals": {"capabilityArgs": {"portMappings": [
        {"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}], "dns": {"Servers": []}}},
    "a single plugin": {"config": {**PORTMAP, "cniVersion": "1.0.0", "name": "net"}},
    "cniVersion 0.4.0": {"config": {"cniVersion": "0.4.0", "name": "net", "plugins": [{"type": "bridge"}, PORTMAP]},
                         "result": {"cniVersion": "0.4.0", "interfaces": SANDBOX,
                                    "ips": [{"version": "4", "address": "10.20.0.2/24", "interface": 0}]}},
    "cniVersion 0.2.0": {"config": {"cniVersion": "0.2.0", "name": "net", "plugins": [{"type": "bridge"}, PORTMAP]},
                         "result": {"cniVersion": "0.2.0", "ip4": {"ip": "10.20.0.2/24"}}},
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_the_file_is_understood(host, cache, name):
    """Every shape that libcni's file has had leads to the same rules."""
    alive(WEB)
    host.add(WEB)
    before = lab.state()
    cache.write(WEB, **SHAPES[name])
    flush()
    assert restored(cache.restore(host)) == [WEB.chain]
    assert lab.state() == before


# changes to the file that mean that nothing was published, or that it cannot be known what
NOTHING: dict[str, dict[str, Any]] = {
    "its namespace is gone": {"netns": "/run/netns/gone"},
    "its namespace is a file that is left": {"netns": "/run/left"},
    "its namespace is a folder": {"netns": "/run"},
    "no namespace is known": {"netns": None, "result": {"ips": [{"address": "10.20.0.2/24"}]}},
    "no ports": {"capabilityArgs": {"portMappings": []}},
    "no capability arguments": {"capabilityArgs": None},
    "capability not asked for": {"config": {"cniVersion": "1.0.0", "name": "net",
                                            "plugins": [{"type": "bridge"}, {"type": "portmap"}]}},
    "capability switched off": {"config": {"cniVersion": "1.0.0", "name": "net", "plugins": [
        {"type": "bridge"}, {"type": "portmap", "capabilities": {"portMappings": False}}]}},
    "another plugin": {"config": {"cniVersion": "1.0.0", "name": "net", "plugins": [{**PORTMAP, "type": "other"}]}},
    "another kind": {"kind": "cniCacheV9"},
    "no container": {"containerId": None},
    "a container ID that is none": {"containerId": "../x; flush ruleset"},
    "an interface that is none": {"ifName": 'eth0" ; flush ruleset'},
    "a network that is none": {"networkName": "no name"},
    "no result": {"result": None},
    "result without addresses": {"result": {"cniVersion": "1.0.0", "interfaces": SANDBOX}},
    "a port that is none": {"capabilityArgs": {"portMappings": [{"hostPort": 99999, "containerPort": 80}]}},
    "mappings that are no list": {"capabilityArgs": {"portMappings": {"hostPort": 1}}},
    "plugins that are no list": {"config": {"cniVersion": "1.0.0", "name": "net", "plugins": 7}},
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_restore(host, cache, name):
    """Files of dead containers or without ports, and unreadable ones, are skipped with the reason; others come back."""
    pathlib.Path("/run/left").touch()
    other, _ = alive(Pod("other", "9090:80"), WEB)
    file = cache.write(WEB, **NOTHING[name])
    cache.write(other)
    report = cache.restore(host)
    assert restored(report) == [other.chain] and lab.chains() == [other.chain]
    assert [each["file"] for each in report["skipped"]] == [str(file)] and report["skipped"][0]["reason"]


def test_garbage_in_the_folder_is_passed_over(host, cache):
    """restore goes on after any file in the folder."""
    alive(WEB)
    whole = cache.write(WEB).read_bytes()
    for index, data in enumerate((b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100000, whole[:len(whole) // 2],
                                  whole.replace(b'"config": "', b'"config": "A'), whole + whole)):
        (cache.folder / f"garbage{index}").write_bytes(data)
    os.mkfifo(cache.folder / "pipe")
    (cache.folder / "folder").mkdir()
    (cache.folder / "loop").symlink_to("loop")
    report = cache.restore(host)
    assert restored(report) == [WEB.chain] and len(report["skipped"]) == 9


def test_one_that_nft_refuses(host, cache):
    """Conditions that nft does not take (written for another version, a set that is gone) keep nobody else away."""
    first, bad, last = alive(WEB, Pod("bad", "8081:80", conditionsV4=["ip saddr @office"]), Pod("last", "8082:80/udp"))
    for pod in first, bad, last:
        cache.write(pod)
    report = cache.restore(host, status=1)
    assert restored(report) == [last.chain, first.chain] == lab.chains()
    assert [each["container"] for each in report["refused"]] == ["bad"] and "office" in report["refused"][0]["reason"]
    assert cache.restore(host, status=1)["in_place"] == 2


def test_files_that_block(host, cache):
    """A link to what never answers, an endless file, and numbers that nobody can count to are survived."""
    alive(WEB)
    whole = cache.write(WEB).read_text()
    (cache.folder / "zero").symlink_to("/dev/zero")
    (cache.folder / "kernel").symlink_to("/proc/kmsg")
    with (cache.folder / "sparse").open("wb") as file:
        file.truncate(3 << 30)
    for index, number in enumerate(("0", "1e999", "9" * 5000)):
        (cache.folder / f"number{index}").write_text(whole.replace(f'"{WEB.netns}"', number))
    report = cache.restore(host)
    assert restored(report) == [WEB.chain] and len(report["skipped"]) == 4


def test_no_folder(host, cache):
    """A folder that does not exist holds nothing."""
    cache.folder = pathlib.Path("/run/nowhere")
    assert cache.restore(host) == {"restored": [], "refused": [], "in_place": 0, "skipped": []}
    assert not lab.state()


def test_files_that_vanish(cache):
    """Files that libcni removes meanwhile are no error."""
    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            for i in range(20):
                (cache.folder / f"file{i}").touch()
            for i in range(20):
                (cache.folder / f"file{i}").unlink()
    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            assert not [found for _, found in Memory([cache.folder]).found if isinstance(found, Attachment)]
    finally:
        done.set()
        thread.join()


# --- who gets a port ------------------------------------------------------------------------------------------

def test_the_oldest_claim_wins(host, cache):
    """Of two files that claim one port, the older gets it; the other is refused by name and exit status."""
    first, second, third = alive(Pod("first", "8080:80"), Pod("second", "192.0.2.1:8080:80", "7070:70"),
                                 Pod("third", "9090:80"))
    for age, pod in enumerate((third, second, first)):
        os.utime(cache.write(pod), (1000 - age, 1000 - age))
    report = cache.restore(host, status=1)
    assert restored(report) == [first.chain, third.chain] == lab.chains()
    assert [each["container"] for each in report["refused"]] == ["second"]
    assert "tcp port 8080 on 192.0.2.1 is already published by container first" in report["refused"][0]["reason"]


def test_a_living_owner_stays(host, cache):
    """A port that another container has got meanwhile stays with it."""
    web, new = alive(WEB, Pod("new", "8080:80"))
    cache.write(web)
    host.add(new)
    before = lab.state()
    report = cache.restore(host, status=1)
    assert [each["container"] for each in report["refused"]] == [web.id] and "container new" in \
        report["refused"][0]["reason"]
    assert lab.state() == before


def test_a_dead_owner_gives_way(host, cache):
    """A port that a dead container still has goes to the living one that is remembered with it."""
    dead = Pod("dead", "8080:80", "9090:90")
    namespace = lab.Namespace("dead")
    host.add_for_nobody(dead)
    namespace.remove()
    alive(WEB)
    cache.write(WEB)
    assert restored(cache.restore(host)) == [WEB.chain] == lab.chains()


# --- all or nothing -------------------------------------------------------------------------------------------

def test_killed_at_every_instant(host, cache):
    """Killed at the beginning of each of its system calls, restore leaves all or nothing; the next one converges.

    What all containers share is written first, and may be there alone.
    """
    pods = alive(Pod("web", "8080:80"), Pod("dns", "53:53/udp"))
    for pod in pods:
        cache.write(pod)
    host.add(*pods)
    after = lab.state()
    host.delete(*pods)
    base = lab.state()

    def task() -> tuple[int, str]:
        live = [found for _, found in Memory([cache.folder]).found if isinstance(found, Attachment)]
        restore(live, kernel.Kernel())
        return 0, ""

    lab.nft_script(f"delete table {TABLE}")
    instants, worth_it = lab.instants(functools.partial(Fork, task))
    assert len(instants) > 40 and not instants[0] and instants[-1] == after
    for instant, found in enumerate(instants):
        assert found in ([], base, after), f"half-done when killed at system call {instant}"
    for instant in worth_it:
        lab.nft_script(f"delete table {TABLE}")
        Fork(task, stop_at=instant).answer()
        assert lab.state() in ([], base, after), f"half-done when killed at system call {instant}"
        assert not Fork(task).answer().code
        assert lab.state() == after


def test_together_with_everything_else(host, cache):
    """Several restores, ADDs and DELs at once: all succeed, and what should remain remains."""
    staying = alive(*(Pod(f"staying{i}", f"{9000 + i}:80", netns="/run/netns/shared") for i in range(20)))
    coming, going = ([Pod(f"{name}{i}", f"{port + i}:80", netns="/run/netns/shared") for i in range(10)]
                     for name, port in (("coming", 10000), ("going", 11000)))
    for pod in staying:
        cache.write(pod)
    host.add(*going)
    with contextlib.ExitStack() as stack:
        calls = [Call(host.executable, verb, pod) for verb, pods in (("ADD", coming), ("DEL", going)) for pod in pods]
        random.shuffle(calls)
        restores = [threading.Thread(target=cache.restore, args=(host,)) for _ in range(3)]
        for thread in restores:
            thread.start()
            stack.callback(thread.join)
        for call in calls:
            assert not call.answer().code
    assert lab.chains() == sorted(pod.chain for pod in (*staying, *coming))
