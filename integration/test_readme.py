"""What the README shows is what happens."""
import lab

from cni_portmap import ruleset
from cni_portmap.config import Address, Attachment, Port

README = (lab.ROOT / "README.md").read_text()


def example() -> Attachment:
    """The container of the README: -p 8080:80 -p 127.0.0.1:8081:80 -p 9000-9003:9000-9003/udp."""
    ports = [Port(4, "tcp", "127.0.0.1", 8081, 80)]
    for family in 4, 6:
        ports += [Port(family, "tcp", "", 8080, 80), *(Port(family, "udp", "", p, p) for p in range(9000, 9004))]
    return Attachment("6f1c0a2b9d3e", "eth0", "web", "/run/netns/cni-1b9d6bcd", 4026532177,
                      {4: Address(4, "10.88.0.2", "10.88.0.0/16"), 6: Address(6, "fd88::2", "fd88::/64")},
                      tuple(ports), 13, pod="shop/web-7d9f", link="veth5c1e09d2#12")


def test_the_ruleset_shown_is_the_one_that_add_writes():
    """The ruleset in the README is the one that ADD writes."""
    shown = "table inet" + README.partition("    table inet")[2].partition("\n\nHow to read it")[0]
    listings = []
    for index, script in enumerate((shown, ruleset.base(ruleset.BASE, (), [13]) + ruleset.attach(example()) +
                                      ruleset.note_opened(["cni0"]))):
        with lab.Namespace(f"readme{index}"):
            lab.nft_script(script)
            listings.append(lab.table())
        lab.delete_namespace(f"readme{index}")
    assert listings[0] == listings[1]
