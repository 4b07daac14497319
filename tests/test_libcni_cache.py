"""libcni's cache: the files that describe a live attachment, and that no other file breaks anything."""
import base64
import json
import os
import types

import pytest
from helpers import CHAIN, PORT, PREV_RESULT

from cni_portmap import libcni_cache, ruleset
from cni_portmap.attachment import Attachment
from cni_portmap.linux import alive
from cni_portmap.linux.kernel import Kernel

NETNS = "/proc/self/ns/net"
CONFLIST = {"cniVersion": "1.0.0", "name": "lab",
            "plugins": [{"type": "bridge"}, {"type": "portmap", "snat": False, "capabilities": {"portMappings": True}}]}
CACHE = {"kind": "cniCacheV1", "containerId": "web-1", "config": CONFLIST, "ifName": "eth0", "networkName": "lab",
         "netns": NETNS, "capabilityArgs": {"portMappings": [PORT]}, "result": PREV_RESULT}


def write(folder, name="results", raw=None, **changes):
    found = {key: value for key, value in {**CACHE, **changes}.items() if value is not None}
    if type(found.get("config")) is dict:
        found["config"] = base64.b64encode(json.dumps(found["config"]).encode()).decode()
    path = folder / name
    path.write_bytes(json.dumps(found).encode() if raw is None else raw)
    return path


@pytest.fixture(autouse=True)
def full_sight(monkeypatch):
    """Let all processes seem visible: a user who cannot see them all could judge no owner dead."""
    monkeypatch.setattr(alive, "Sight", lambda: types.SimpleNamespace(held=set(), mounted=set(), obstacle=""))
    monkeypatch.setattr(Kernel, "has_interface", lambda self, name: name in ("cni0", "lo"))


def read(folder):
    return [found for _, found in libcni_cache.Memory([folder, folder / "none"]).found]


def test_remembered(tmp_path):
    """A live attachment comes back as ADD had parsed it, with its namespace's inode."""
    write(tmp_path)
    [found] = read(tmp_path)
    assert ruleset.chain_of(found.container_id,
                            found.ifname) == CHAIN and len(found.ports) == 2 and found.mark_bit is None
    assert (found.network, found.netns, found.inode) == ("lab", NETNS, os.stat(NETNS).st_ino)


@pytest.mark.parametrize("changes", [
    {"netns": None, "result": {**PREV_RESULT, "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": NETNS}]}},
    {"networkName": None}, {"config": {"cniVersion": "1.0.0", "name": "lab", **CONFLIST["plugins"][-1]}},
    {"config": {**CONFLIST, "cniVersion": ""}}, {"config": {"name": "lab", "plugins": CONFLIST["plugins"]}},
    {"unknown": 1},
    {"capabilityArgs": {"PortMappings": [PORT]},
     "config": {**CONFLIST, "plugins": [{"Type": "portmap", "Capabilities": {"PortMappings": True}}]}}])
def test_variants(tmp_path, changes):
    """Older libcni has no netns in its files; a configuration may be no list, have no version, and other capitals."""
    write(tmp_path, **changes)
    [found] = read(tmp_path)
    assert isinstance(found, Attachment) and found.netns == NETNS


@pytest.mark.parametrize("changes, reason", [
    ({"netns": "/run/netns/gone"}, "is gone"), ({"netns": "/"}, "is gone"), ({"netns": "/proc/self/status"}, "is gone"),
    ({"netns": "\0"}, "CNI_NETNS"), ({"netns": None}, "is gone"),
    ({"netns": None, "result": {"ips": [{"address": "10.88.0.2/16"}]}}, "is not known"),
    ({"kind": "x"}, "not a file of libcni"),
    ({"capabilityArgs": {"PortMappings": [PORT]}}, "publishes nothing"),  # libcni finds no such capability
    ({"capabilityArgs": None}, "publishes nothing"), ({"capabilityArgs": {"portMappings": []}}, "publishes nothing"),
    ({"config": {**CONFLIST, "plugins": [{"type": "bridge"}]}}, "publishes nothing"),
    ({"config": "%%"}, "not a file of libcni"), ({"config": 1}, "not a file of libcni"),
    ({"result": None}, "not a file of libcni"), ({"ifName": None}, "not a file"),
    ({"containerId": None}, "not a file of libcni"), ({"result": []}, "prevResult"), ({"raw": b""}, "not a file"),
    ({"raw": b"\xff"}, "not a file"), ({"raw": b"[]"}, "not a file"), ({"raw": b"null"}, "not a file"),
    ({"capabilityArgs": {"portMappings": [{"hostPort": 0}]}}, "hostPort"), ({"containerId": "a; flush ruleset"}, ""),
    ({"containerId": "a\nb"}, ""), ({"ifName": "eth0; x", "result": {"ips": [{"address": "10.88.0.2/16"}]}}, ""),
    ({"networkName": "a b"}, "name"), ({"containerId": 1}, ""), ({"raw": b"[" * 100_000}, "")])
def test_skipped(tmp_path, changes, reason):
    """Files without a live attachment are skipped with the reason; nothing that isn't a name reaches nft."""
    write(tmp_path, **changes)
    [found] = read(tmp_path)
    assert isinstance(found, libcni_cache.Skipped) and reason in str(found)


PLACES = ["kind", "containerId", "config", "ifName", "networkName", "netns", "capabilityArgs", "cniArgs", "result"]
INNER = [*(("result", key) for key in ("interfaces", "ips", "cniVersion")), ("capabilityArgs", "portMappings")]
ODD = [None, True, 0, -1, 7, 10 ** 400, 1e308, float("inf"), "", "x", "\ud800", "\0", "x" * 100_000, [], [[]], [None],
       [1], ["e", "t"], [{}], [{"name": []}], [{"name": {}, "mac": 1}], [[[1]]], {}, {"e": 1}, {"x": {}}]


def test_any_type_of_any_member(tmp_path):
    """Nothing that a file has in the place of anything else keeps another's container from being restored."""
    count = 0
    for value in ODD:
        for place in PLACES:
            write(tmp_path, f"{count}", raw=json.dumps({**encoded(), place: value}).encode())
            count += 1
        for place, key in INNER:
            write(tmp_path, f"{count}", raw=json.dumps({**encoded(), place: {**CACHE[place], key: value}}).encode())
            count += 1
        for conflist in ({**CONFLIST, "plugins": value}, {**CONFLIST, "cniVersion": value}, value,
                         {**CONFLIST, "plugins": [value]}, {**CONFLIST, "plugins": [{"type": "portmap", "capabilities":
                                                                                    value}]}):
            write(tmp_path, f"{count}", config=base64.b64encode(json.dumps(conflist).encode()).decode())
            count += 1
    write(tmp_path, "good", containerId="good")
    found = read(tmp_path)
    assert len(found) == count + 1
    live = [each for each in found if isinstance(each, Attachment)]
    assert {"web-1", "good"} <= {each.container_id for each in live}
    assert all(type(each.ifname) is str for each in live)


def encoded():
    return {**CACHE, "config": base64.b64encode(json.dumps(CONFLIST).encode()).decode()}


def test_any_kind_of_file(tmp_path):
    """A look may block, or never end: only regular files are read, and only so much of them."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "kernel").symlink_to("/proc/kmsg")
    (tmp_path / "folder").mkdir()
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(3 << 30)
    write(tmp_path, "good")
    found = dict(libcni_cache.Memory([tmp_path, tmp_path / "good", "/proc/self/mem"]).found)
    assert {*found} == {f"{tmp_path}/sparse", f"{tmp_path}/good"}
    assert isinstance(found[f"{tmp_path}/good"], Attachment)
    assert "larger than 32 MiB" in str(found[f"{tmp_path}/sparse"])


def test_a_file_that_becomes_another(tmp_path, monkeypatch):
    """What was a file when the folder was read may be a FIFO by now."""
    monkeypatch.setattr(libcni_cache, "_is_regular", lambda path: True)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    found = read(tmp_path)
    assert len(found) == 2 and all(isinstance(each, libcni_cache.Skipped) for each in found)


def test_order(tmp_path):
    """The oldest comes first: it had the port."""
    for name, time in ("b", 1), ("a", 2), ("c", 2):
        os.utime(write(tmp_path, name, containerId=name), (time, time))
    (tmp_path / "folder").mkdir()
    assert [found.container_id for found in read(tmp_path)] == ["b", "a", "c"]


def test_a_file_that_changes(tmp_path):
    """Before it is restored it is looked at again: a file that is gone means DEL, one that is new another ADD."""
    path = write(tmp_path)
    memory = libcni_cache.Memory([tmp_path])
    [(_, found)] = memory.found
    assert memory.is_current(found)
    write(tmp_path, containerId="other")
    assert not memory.is_current(found)
    path.unlink()
    assert not memory.is_current(found)


def test_the_link_is_asked_first(tmp_path, monkeypatch):
    """A container whose link is there lives, wherever its namespace is mounted; without it, it is not current."""
    monkeypatch.setattr(Kernel, "link", lambda self, names: f"{names[0]}#7")
    write(tmp_path, netns="/run/netns/elsewhere", cniArgs=[["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web"]])
    memory = libcni_cache.Memory([tmp_path])
    [(_, found)] = memory.found
    assert (found.link, found.inode, found.pod) == ("cni0#7", 0, "shop/web")
    for there in True, False:
        monkeypatch.setattr(Kernel, "has_link", lambda self, link, there=there: there)
        assert memory.is_current(found) == there


def test_who_cannot_be_judged_is_restored(tmp_path, monkeypatch):
    """A namespace that is not found proves nothing to one who does not see all."""
    monkeypatch.setattr(alive, "Sight", lambda: types.SimpleNamespace(held=set(), mounted=set(), obstacle="hidepid"))
    write(tmp_path, netns="/run/netns/gone")
    assert isinstance(read(tmp_path)[0], Attachment)


def test_a_link_with_another_address_is_no_witness(tmp_path, monkeypatch):
    """Somebody may have given it one: where the namespace is there, that says who lives."""
    monkeypatch.setattr(Kernel, "link", lambda self, names: "lo#1")
    interfaces = [{"name": "lo", "mac": "02:00:00:00:00:01"}, {"name": "eth0", "sandbox": NETNS}]
    write(tmp_path, result={**PREV_RESULT, "interfaces": interfaces})
    [found] = read(tmp_path)
    assert isinstance(found, Attachment) and found.link == ""


def linked(folder, name, link, container_id, mac="", ports=(PORT,)):
    """A file whose result names a link; its namespace's path is not seen from here."""
    result = {**PREV_RESULT, "interfaces": [{"name": "cni0"}, {"name": link, "mac": mac},
                                            {"name": "eth0", "sandbox": "/none"}]}
    result["ips"] = [{**entry, "interface": 2} for entry in PREV_RESULT["ips"]]
    return write(folder, name, containerId=container_id, netns="/none", result=result,
                 capabilityArgs={"portMappings": [*ports]})


@pytest.mark.parametrize("link, mac, others, reason", [
    ("lo", "", (), ""), ("lo", "00:00:00:00:00:00", (), ""),
    ("lo", "02:00:00:00:00:01", (), "another one has its name"), ("gone0", "", (), "gone0 on this host is gone"),
    ("lo", "", (PORT,), "network namespace /none is gone"), ("lo", "", ("none",), "network namespace /none is gone")])
def test_a_link_is_proof_where_it_is_this_containers(monkeypatch, tmp_path, link, mac, others, reason):
    """Not one that has gone, has another address, or is said to be another container's, even if that has no ports."""
    monkeypatch.setattr(Kernel, "link", lambda self, names: "lo#1" if "lo" in names else "")
    linked(tmp_path, "a", link, "web-1", mac)
    if others:
        linked(tmp_path, "b", link, "other", mac, () if others == ("none",) else others)
    found = read(tmp_path)[0]
    assert isinstance(found, Attachment) if not reason else reason in str(found)
