"""What each runtime leaves in libcni's cache, as it was found there: cni-portmap restore understands it."""
import json

import lab
import pytest
from lab.machine import RUNTIMES

EXAMPLES = sorted((RUNTIMES / "cache").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_restored(bin_dir, tmp_path, path):
    """A pod's file is restored, also where it does not name its namespace itself; loopback's is passed over"""
    text, namespace = path.read_text(), lab.Namespace("cached")
    cached = json.loads(text)
    sandbox = next(interface["sandbox"] for interface in cached["result"]["interfaces"] if "sandbox" in interface)
    (tmp_path / path.stem).write_text(text.replace(sandbox, namespace.path))
    links = [interface for interface in cached["result"]["interfaces"] if interface["name"].startswith("veth")]
    for link in links:  # it says who lives, if it has the name and address that the result says
        lab.run("ip", "link", "add", link["name"], "address", link["mac"], "type", "veth")
    report = json.loads(lab.run(bin_dir.parent / "sbin/cni-portmap", "restore", "--dry-run", "--json", "--cache",
                                tmp_path))
    namespace.remove()
    for link in links:
        lab.run("ip", "link", "del", link["name"])
    if cached["ifName"] == "lo":
        assert [each["reason"] for each in report["skipped"]] == ["publishes nothing"]
    else:
        assert [each["container"] for each in report["restored"]] == [cached["containerId"]]
