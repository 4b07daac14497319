"""What the README shows is what happens."""
import sys

import lab

sys.path.insert(0, str(lab.ROOT))
from cni_portmap import ruleset
from cni_portmap.attachment import Address, Attachment, Port

README = (lab.ROOT / "README.md").read_text()


def example() -> Attachment:
    """The container of the README: -p 8080:80 -p 127.0.0.1:8081:80 -p 9000-9003:9000-9003/udp."""
    ports = [Port(4, "tcp", "127.0.0.1", 8081, 80)]
    for family in 4, 6:
        ports += [Port(family, "tcp", "", 8080, 80), *(Port(family, "udp", "", p, p) for p in range(9000, 9004))]
    return Attachment("6f1c0a2b9d3e", "eth0", "web", netns="/run/netns/cni-1b9d6bcd", inode=4026532177, mark_bit=13,
                      addresses={4: Address(4, "10.88.0.2", "10.88.0.0/16"), 6: Address(6, "fd88::2", "fd88::/64")},
                      ports=tuple(ports), pod="shop/web-7d9f", link="veth5c1e09d2#12")


def test_ruleset():
    """The ruleset in the README is the one that ADD writes."""
    shown = "table inet" + README.partition("    table inet")[2].partition("\n\nHow to read it")[0]
    listings = []
    shared = ruleset.base({name: ruleset.shared_rules(name, []) for name in ruleset.SHARED})
    written = shared + ruleset.attach(example()) + ruleset.note_opened(["cni0"])
    for index, script in enumerate((shown, written)):
        with lab.Namespace(f"readme{index}"):
            lab.run("nft", "-f", "-", input=script)
            listings.append(lab.table())
        lab.run("ip", "netns", "del", f"readme{index}")
    assert listings[0] == listings[1]
