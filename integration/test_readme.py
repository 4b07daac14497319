"""The examples in the README and docs/ are true."""
import json
import re
import textwrap

import lab
from lab import paths
from measure import promises
from measure.paths import policy_table

from cni_portmap import ruleset
from cni_portmap.attachment import Address, Attachment, Port

DOCS = lab.ROOT / "docs"
SHOWN = "table inet" + (DOCS / "ruleset.md").read_text().partition("    table inet")[2].partition("\n\n## ")[0]


def example() -> Attachment:
    """The container of docs/ruleset.md: -p 8080:80 -p 127.0.0.1:8081:80 -p 9000-9003:9000-9003/udp."""
    ports = [Port(4, "tcp", "127.0.0.1", 8081, 80)]
    for family in 4, 6:
        ports += [Port(family, "tcp", "", 8080, 80), *(Port(family, "udp", "", p, p) for p in range(9000, 9004))]
    return Attachment("6f1c0a2b9d3e", "eth0", "web", netns="/run/netns/cni-1b9d6bcd", inode=4026532177, mark_bit=13,
                      addresses={4: Address(4, "10.88.0.2", "10.88.0.0/16"), 6: Address(6, "fd88::2", "fd88::/64")},
                      ports=tuple(ports), pod="shop/web-7d9f", link="veth5c1e09d2#12",
                      on_link=(("cni0", "10.88.0.0/16"), ("cni0", "fd88::/64")))


def test_the_ruleset_shown_is_the_one_that_add_writes():
    """The ruleset in docs/ruleset.md is the one that ADD writes."""
    listings = []
    shared = ruleset.base({name: ruleset.shared_rules(name, []) for name in ruleset.SHARED})
    written = shared + ruleset.attach(example()) + ruleset.note_interfaces({"cni0": ruleset.OPENED})
    for index, script in enumerate((SHOWN, written)):
        with lab.Namespace(f"readme{index}"):
            lab.nft_script(script)
            listings.append(lab.table())
        lab.delete_namespace(f"readme{index}")
    assert listings[0] == listings[1]


def test_list(bin_dir):
    """The list in README.md and docs/command.md is what the command prints of that ruleset, after 12 connections."""
    script, count = re.subn("(ipv4 tcp dport 8080 counter)", r"\1 packets 12 bytes 720", SHOWN)
    assert count == 1
    with lab.Namespace("readme-list"):
        lab.run("ip", "link", "add", "veth5c1e09d2", "index", "12", "type", "veth")
        lab.nft_script(script)
        listed = lab.run(bin_dir.parent / "sbin/cni-portmap", "list", "--port", "8080")
    lab.delete_namespace("readme-list")
    shown = textwrap.indent(f"# cni-portmap list --port 8080\n{listed}", "    ")
    for document in lab.ROOT / "README.md", DOCS / "command.md":
        assert shown in document.read_text()


def test_configuration(bin_dir, tmp_path):
    """The conflist in docs/configuration.md is valid."""
    shown = "{" + (DOCS / "configuration.md").read_text().partition("\n    {")[2].partition("\n\n")[0]
    file = tmp_path / "web.conflist"
    file.write_text(json.dumps(json.loads(shown)))
    assert lab.run(bin_dir.parent / "sbin/cni-portmap", "validate", file) == f"{file}: valid\n"


def column(document, *indexes):
    """These columns of a document's first table, row by row, without its head."""
    table = re.search(r"(?m)(^\|.*\n)+", (DOCS / document).read_text())[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [tuple(row[index] for index in indexes) for row in rows[2:]]


def test_paths():
    """docs/paths.md has the paths that test_packets asserts, and for cni-portmap what it asserts of them."""
    expected = {(str(path), path.sees or "nothing") for path in paths.PATHS}
    assert {*column("paths.md", 0, 2)} == expected
    for path, sees, saw in column("paths.md", 0, 2, 3):
        assert saw.partition(";")[0] == ("no" if sees == "nothing" else "yes"), path


def test_paths_with_a_policy():
    """docs/paths.md has who reaches what in each gateway mode, as test_exposure asserts it."""
    assert policy_table() in (DOCS / "paths.md").read_text()


def test_promises():
    """docs/promises.md has the scenarios of measure/promises.py, in their order; none is broken by cni-portmap."""
    assert column("promises.md", 0, 1) == [(what, f"`{test}`") for what, test, _ in promises.PROMISES]
    assert not [row for row in column("promises.md", 2) if "**" in row[0]]
