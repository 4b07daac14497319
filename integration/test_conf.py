"""The conflists in conf/: each is valid, and makes a container whose ports answer."""
import json

import lab
import pytest

CONFLISTS = sorted((lab.ROOT / "conf").rglob("*.conflist"))
PORTS = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
         {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "127.0.0.1"}]


@pytest.fixture(scope="module")
def client():
    client = lab.wire("conf", ("192.0.2.81/30", "2001:db8:81::1/64"), ("192.0.2.82/30", "2001:db8:81::2/64"))
    yield client
    client.remove()


@pytest.mark.parametrize("path", CONFLISTS, ids=lambda path: str(path.relative_to(lab.ROOT / "conf")))
class TestConflist:
    """One file."""

    def test_validate_accepts_it(self, bin_dir, path):
        """`cni-portmap validate` has nothing against it."""
        assert lab.run(bin_dir.parent / "sbin/cni-portmap", "validate", path) == f"{path}: valid\n"

    def test_its_ports_answer(self, bin_dir, client, path, tmp_path):
        """The real plugins make a container of it, whose ports answer whom they should, and remove it."""
        conflist = json.loads(path.read_text())
        first = conflist["plugins"][0]
        first["ipam"]["dataDir"] = str(tmp_path)
        private = path.name == "localhost.conflist"
        box = lab.Container(lab.Network(conflist, bin_dir), "conf-box", PORTS)
        with lab.Server("conf-box", box, 80):
            for host, seen, has in (("192.0.2.81", "192.0.2.82", box.ipv4),
                                    ("2001:db8:81::1", "2001:db8:81::2", box.ipv6)):
                wanted = lab.Saw("conf-box", seen, 80) if has and not private else None
                assert lab.exchange(client, host, 8080) == wanted
            assert lab.exchange(lab.HOST, "127.0.0.1", 8080)
            assert lab.exchange(lab.HOST, "127.0.0.1", 8081)
            assert lab.exchange(client, "192.0.2.81", 8081) is None
        box.check()
        box.remove()
        assert box.id not in lab.table()
        if "bridge" in first:
            lab.delete_link(first["bridge"])


def test_all_listed():
    """conf/README.md knows each file."""
    listed = (lab.ROOT / "conf/README.md").read_text()
    assert CONFLISTS
    for path in CONFLISTS:
        assert f"| `{path.relative_to(lab.ROOT / 'conf')}` |" in listed
