"""The conflists in conf/: each is valid, and makes a container whose ports answer."""
import contextlib
import json

import lab
import pytest

CONFLISTS = sorted((lab.ROOT / "conf").rglob("*.conflist"))
PUBLISHING = [path for path in CONFLISTS if path.parent.name != "exposure"]
EXPOSURE = {  # who reaches what: the client a port of the host, the host its localhost, the client the container itself
    "nat": (True, True, False), "trusted": (True, True, False), "routed": (False, False, True),
    "isolated": (False, False, False), "local": (False, True, True)}
PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
         {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]


@pytest.fixture(scope="module")
def client():
    client = lab.wire("conf", ("192.0.2.81/30", "2001:db8:81::1/64"), ("192.0.2.82/30", "2001:db8:81::2/64"))
    yield client
    client.remove()


def name_of(path):
    return str(path.relative_to(lab.ROOT / "conf"))


@pytest.mark.parametrize("path", CONFLISTS, ids=name_of)
def test_validate_accepts_it(bin_dir, path):
    """`cni-portmap validate` has nothing against it."""
    assert lab.run(bin_dir.parent / "sbin/cni-portmap", "validate", path) == f"{path}: valid\n"


@contextlib.contextmanager
def boxes(path, bin_dir, folder, *names):
    """Containers that the real plugins make of a conflist, and remove; the first has ports."""
    conflist = json.loads(path.read_text())
    first = conflist["plugins"][0]
    first["ipam"]["dataDir"] = str(folder)
    network = lab.Network(conflist, bin_dir)
    found = [lab.Container(network, name, PORTS if name == names[0] else ()) for name in names]
    with lab.Server(names[0], found[0], 80):
        yield found
    found[-1].check()  # the bridge's MAC address, which its plugin checks, is another for those before
    for box in found:
        box.remove()
        assert box.id not in lab.table()
    if "bridge" in first:
        lab.delete_link(first["bridge"])


@pytest.mark.parametrize("path", PUBLISHING, ids=name_of)
def test_its_ports_answer(bin_dir, client, path, tmp_path):
    """The ports answer whom they should."""
    private = path.name == "localhost.conflist"
    with boxes(path, bin_dir, tmp_path, "conf-box") as (box,):
        for host, seen, has in (("192.0.2.81", "192.0.2.82", box.ipv4), ("2001:db8:81::1", "2001:db8:81::2", box.ipv6)):
            wanted = lab.Saw("conf-box", seen, 80) if has and not private else None
            assert lab.exchange(client, host, 8080, timeout=lab.patience(wanted)) == wanted
        assert lab.exchange(lab.HOST, "127.0.0.1", 8080)
        assert lab.exchange(lab.HOST, "127.0.0.1", 8081)
        assert lab.exchange(client, "192.0.2.81", 8081, timeout=lab.HASTY) is None


@pytest.mark.parametrize("path", [*filter(lambda path: path not in PUBLISHING, CONFLISTS)], ids=name_of)
def test_its_containers_are_reached_as_its_mode_says(bin_dir, client, path, tmp_path):
    """The container answers whom it should, and always its neighbour."""
    published, local, direct = EXPOSURE[path.stem]
    with boxes(path, bin_dir, tmp_path, "conf-box", "conf-neighbour") as (box, neighbour):
        for host, localhost, ip in (("192.0.2.81", "127.0.0.1", box.ipv4), ("2001:db8:81::1", "::1", box.ipv6)):
            assert bool(lab.exchange(client, host, 8080, timeout=lab.patience(published))) == published
            assert bool(lab.exchange(lab.HOST, localhost, 8080, timeout=lab.patience(local))) == local
            assert bool(lab.exchange(client, ip, 80, timeout=lab.patience(direct))) == direct
            assert lab.exchange(neighbour, ip, 80)


def test_all_listed():
    """conf/README.md knows each file."""
    listed = (lab.ROOT / "conf/README.md").read_text()
    assert CONFLISTS
    for path in CONFLISTS:
        assert f"| `{path.relative_to(lab.ROOT / 'conf')}` |" in listed
