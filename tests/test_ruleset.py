"""The nft text that we send, as goldens; the names and records in it; and that nothing can break out of it.

Goldens are rewritten by UPDATE_GOLDENS=1 /usr/bin/python3 -m pytest tests/test_ruleset.py; then read the difference.
Each is one transaction. `base` loads into an empty kernel; after it `repair` and each attach-*; after attach-dual-stack
`detach`, `replace` and `second-interface`; after that `inherit`. After `base` comes `exposure`, and after that the
others with its name.
"""
import hashlib
import os
import pathlib
import re
import socket
import types

import hypothesis
import hypothesis.strategies as st
import pytest
from helpers import (CHAIN, PORT, VARIABLES, RecordingKernel, attachment, base, configuration, crashes_older_nft,
                     elements, respond, using)

from cni_portmap import exposure, ruleset
from cni_portmap.attachment import PROTOCOLS, Address, Attachment, Port
from cni_portmap.linux import table

GOLDENS = pathlib.Path(__file__).with_name("goldens")


def port(host, container, protocol="tcp", ip=""):
    return {"hostPort": host, "containerPort": container, "protocol": protocol, "hostIP": ip}


def attach(*ports, **keys):
    return ruleset.attach(attachment(*ports, **keys))


WEB = attachment(PORT)
ONLY = {4: {"prevResult": {"ips": [{"address": "10.88.0.2/16"}]}},
        6: {"prevResult": {"ips": [{"address": "fd88::2/64"}]}}}
SECOND = attachment(PORT, environ={**VARIABLES, "CNI_IFNAME": "eth1"},
                    prevResult={"ips": [{"address": "10.99.0.2/16"}, {"address": "fd99::2/64"}]})
LONG = {"CNI_CONTAINERID": "a" * 300, "CNI_NETNS": '/run/netns/a "b"; c\n#é', "CNI_IFNAME": "e@b+c~d=e,f"}

def exposed(mode, *ports, **keys):
    """The commands for a container with a policy: its chains and elements."""
    found = attachment(*ports, gatewayModeV4=mode, gatewayModeV6=mode, **keys)
    conditional = exposure.conditional_rules(found)
    return ruleset.attach(found) + \
        (ruleset.created(ruleset.chain_of_conditions(CHAIN), conditional) if conditional else "") + \
        exposure.commands((), exposure.created_for(found, CHAIN))[1]


def exposure_base():
    """The commands that make the shared chains of exposure."""
    known = {**ruleset.SHARED, **exposure.SHARED}
    return ruleset.base({name: ruleset.shared_rules(name, [], (), known) for name in exposure.SHARED}, (), known,
                        exposure.declarations())


TRUSTING = {"trustedHostInterfaces": ["wg0", "veth1a2b@if3"], "outgoingSourceV4": "192.0.2.9"}
CASES = {
    "base": base,
    "repair": lambda: base(["guard"], ("dispatch", "output", "postrouting"), {13, 5}),
    "attach-dual-stack": lambda: ruleset.attach(WEB),
    "attach-ipv4-only": lambda: attach(PORT, **ONLY[4]),
    "attach-ipv6-only": lambda: attach(PORT, **ONLY[6]),
    "attach-host-ip": lambda: attach(port(8080, 80, ip="192.0.2.1"), port(8080, 81, ip="127.0.0.1"),
                                     port(8080, 80, ip="::1"), port(53, 53, "udp", "0.0.0.0")),
    "attach-protocols": lambda: attach(*(port(8080, 80, protocol) for protocol in PROTOCOLS)),
    "attach-identity-range": lambda: attach(*(port(n, n, "udp", "0.0.0.0")
                                              for n in [9003, 9000, 9001, 9002, 9010, 65535, 65534])),
    "attach-shifted": lambda: attach(*(port(8000 + n, 80 + n) for n in range(9)), port(443, 443)),
    "attach-many-shifted": lambda: attach(*(port(8000 + n, 80 + n, protocol) for n in range(11)
                                            for protocol in ("tcp", "udp")), port(53, 5353, "udp"),
                                          *(port(8443, n, ip=f"127.0.0.{n}") for n in (1, 2)), port(443, 443),
                                          conditionsV4=["-s 10.0.0.0/8"]),
    "attach-no-snat": lambda: attach(PORT, snat=False),
    "attach-masq-all": lambda: attach(PORT, masqAll=True),
    "attach-mark-bit": lambda: attach(PORT, markMasqBit=31),
    "attach-conditions": lambda: attach(port(8080, 80), port(9000, 9000),
                                        conditionsV4=["ip saddr { 10.0.0.0/8, 192.0.2.7 }", 'iifname != "eth*"'],
                                        conditionsV6=["-s fd00::/8"]),
    "attach-long-names": lambda: attach(PORT, environ=LONG, name="n" * 123, **ONLY[4]),
    # the first comment ends with a space
    "detach": lambda: ruleset.detach([CHAIN], elements(WEB)),
    "second-interface": lambda: ruleset.attach(SECOND, elements(WEB)) + ruleset.standby_note(CHAIN, "eth1"),
    "note-interfaces": lambda: ruleset.note_interfaces({"cni0": ruleset.OPENED, "veth1a2b@if3": ruleset.WAS_OPEN}),
    "inherit": lambda: ruleset.detach([CHAIN], elements(WEB)) + ruleset.map_elements(elements(WEB), "c/web-1/eth1"),
    "exposure": exposure_base,
    "exposure-nat": lambda: exposed("nat", PORT, port(8443, 443, ip="127.0.0.1"), **TRUSTING),
    "exposure-routed": lambda: exposed("routed", PORT, port(53, 53, "udp"), port(3868, 3868, "sctp"),
                                       conditionsV4=["ip saddr 10.0.0.0/8"]),
    "exposure-isolated": lambda: exposed("isolated"),
    "replace": lambda: ruleset.detach([CHAIN], elements(WEB)) + attach(PORT, port(8443, 443)),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    """The text that we send is unchanged, or somebody has read the difference."""
    path, text = GOLDENS / f"{name}.nft", CASES[name]()
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()


def test_goldens_are_used():
    """No golden is left over."""
    assert {path.name for path in GOLDENS.iterdir()} == {f"{name}.nft" for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_goldens_are_readable_by_older_nft(name):
    """Nothing that we write makes an older nft on the same host crash, see `helpers.crashes_older_nft`."""
    assert not crashes_older_nft((GOLDENS / f"{name}.nft").read_text())


@pytest.mark.parametrize("text, crashes", [
    ("add map inet t m { type nf_proto . inet_proto : verdict; }", True),
    ("add set inet t s {\n\ttype ifname; }", True), ("create set inet t s { flags interval; type ipv4_addr; }", True),
    ("add map inet t m { typeof meta nfproto : verdict; elements = { ipv4 : goto c/type/eth0 }; }", False),
    ("table inet t {\nmap m {\n typeof ip daddr : verdict\n}\nset s {\n type ipv4_addr\n}\n}", True),
    ("add chain inet t c {\ntype nat hook output priority -100;\n}", False),
    ("tcp dport { 1, 2 } dnat ip to 10.0.0.1:tcp dport map { 1 : 2 }", True),
    ("ip saddr vmap { 10.0.0.1 : drop }", True), ("ip daddr . meta l4proto . th dport vmap @m", False)])
def test_what_crashes_older_nft(text, crashes):
    """Declarations by `type`, and maps within rules; not how a chain is hooked, nor sets within rules."""
    assert crashes_older_nft(text) == crashes


def test_version():
    """A change of SHARED raises BASE_VERSION, or hosts keep the old base: add the new number and hash here."""
    text = base(bits=range(32)).replace(f"{ruleset.COMMENT_PREFIX}{ruleset.BASE_VERSION}: ", "")
    assert {ruleset.BASE_VERSION: hashlib.sha256(text.encode()).hexdigest()[:16]} == {3: "f351d710cc938341"}


def test_version_of_exposure():
    """The same for the shared chains of exposure."""
    text = exposure_base().replace(f"{ruleset.COMMENT_PREFIX}{ruleset.BASE_VERSION}: ", "")
    assert {ruleset.BASE_VERSION: hashlib.sha256(text.encode()).hexdigest()[:16]} == {3: "88599d1831984ab8"}


def test_repair_keeps_attachments():
    """A repair flushes or deletes no attachment's chain, no map and not the table."""
    for chain in ruleset.SHARED:
        rules = {chain: ruleset.shared_rules(chain, [])}
        for verb, text in ("flush", ruleset.base(rules, [chain])), ("delete", ruleset.base(rules, deleted=[chain])):
            removed = [line for line in text.splitlines() if re.match("flush|delete", line)]
            assert removed == [f"{verb} chain inet cni_portmap {chain}"]


@pytest.mark.parametrize("text, numbers", [
    ("", None), ("type filter hook prerouting priority raw; policy accept;", ("filter", 0, -300)),
    ("type nat hook output priority -100; policy accept;", ("nat", 3, -100)),
    ("type nat hook postrouting priority srcnat - 1; policy accept;", ("nat", 4, 99))])
def test_hook(text, numbers):
    """A hook's words as the kernel's numbers."""
    assert ruleset.hook_of(text) == numbers


@pytest.mark.parametrize("text, expected", [
    ('iif "eth0" tcp sport 80', "iif 7 tcp sport 80"), ("meta iif != lo oif eq eth0", "meta iif != 1 oif eq 7"),
    ("iif { lo, eth0 } ip saddr 10.0.0.1", "iif { 1, 7 } ip saddr 10.0.0.1"), ("oif {eth0,  lo}", "oif {7, 1}"),
    ('iifname "eth0" oifname lo', 'iifname "eth0" oifname lo'), ("iif gone oifname lo", "iif gone oifname lo"),
    ('iif . ip saddr { "eth0" . 10.0.0.1 }', 'iif . ip saddr { "eth0" . 10.0.0.1 }'), ("iif 7", "iif 7")])
def test_conditions_by_index(text, expected):
    """What nft compares by index has it in place of the name, and nothing else has."""
    assert ruleset.with_indexes(text, lambda name: {"lo": 1, "eth0": 7}.get(name, 0)) == expected


def test_mark_bits():
    """The mark bits of a `postrouting` chain are read back from its comments, which others may have written too."""
    for bits in set(), {13}, {0, 3, 13, 30, 31}:
        rules = ruleset.shared_rules("postrouting", using(bits))
        assert ruleset.shared_rules("postrouting", [], [comment for _, comment in rules]) == rules
        assert rules == ruleset.shared_rules("postrouting", using(bits | {13}))
    odd = ["", "markMasqBit", "cni-portmap 0: markMasqBit 5", "markMasqBit x", "markMasqBit 32", "markMasqBit \u00b2"]
    assert ruleset.shared_rules("postrouting", [], odd) == ruleset.shared_rules("postrouting", using({5}))


# --- map elements ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mapping, name, text", [
    (port(8080, 80), "hostports", "ipv4 . tcp . 8080"), (port(1, 80, "udp", "::"), "hostports", "ipv6 . udp . 1"),
    (port(65535, 80, "sctp", "192.0.2.1"), "hostip4_hostports", "192.0.2.1 . sctp . 65535"),
    (port(256, 80, ip="2001:DB8::1"), "hostip6_hostports", "2001:db8::1 . tcp . 256")])
def test_element(mapping, name, text):
    """A port's key, as bytes for the kernel and as text for nft."""
    found = attachment(mapping).ports[0]
    assert (ruleset.map_of(found), ruleset.element_text(name, ruleset.key_of(found))) == (name, text)
    assert len(ruleset.key_of(found)) == {"hostports": 12, "hostip4_hostports": 12, "hostip6_hostports": 24}[name]


IPS = {4: st.just("") | st.ip_addresses(v=4).map(str),
       6: st.just("") | st.ip_addresses(v=6).map(lambda ip: socket.inet_ntop(socket.AF_INET6, ip.packed))}
PORT_OBJECTS = st.sampled_from([4, 6]).flatmap(lambda family: st.builds(
    Port, st.just(family), st.sampled_from(PROTOCOLS), IPS[family], st.integers(1, 65535),
    st.integers(1, 65535)))


@hypothesis.given(PORT_OBJECTS)
def test_element_round_trip(found):
    """A key holds the port that it was made from, and its wildcard differs in the address alone."""
    element = name, key = ruleset.map_of(found), ruleset.key_of(found)
    packed = socket.inet_pton(socket.AF_INET if found.family == 4 else socket.AF_INET6,
                              found.host_ip) if found.host_ip else b""
    number = ruleset.PROTOCOL_NUMBERS[found.protocol]
    assert ruleset.claim_of(element) == (found.family, number, packed, found.host_port)
    assert ruleset.claim_of(ruleset.wildcard_of(found)) == (found.family, number, b"", found.host_port)
    first = found.host_ip or f"ipv{found.family}"
    assert ruleset.element_text(name, key) == f"{first} . {found.protocol} . {found.host_port}"


@hypothesis.given(st.sampled_from(list(ruleset.MAPS)), st.binary(min_size=12, max_size=12))
def test_foreign_element(name, key):
    """The key of an element that somebody else wrote has a text too."""
    key = key if name != "hostip6_hostports" else bytes(12) + key
    assert ruleset.element_text(name, key).count(" . ") == 2
    assert ruleset.element_text("hostports", bytes((7, 0, 0, 0, 99, 0, 0, 0, 1, 0, 0, 0))) == "7 . 99 . 256"


@hypothesis.given(PORT_OBJECTS)
def test_elements_of_rule(found):
    """The element of a port may lead to the rule that its attachment has for it.

    A rule of one address may be of a port of every address, with a condition.
    """
    packed = ruleset.key_of(found)[:-8] if found.host_ip else b""
    rule = types.SimpleNamespace(target=bytes(4 if found.family == 4 else 16), daddr=packed,
                                 ports={found.host_port: 80}, protocol=ruleset.PROTOCOL_NUMBERS[found.protocol])
    wanted = {*ruleset.elements_for(rule.target, rule.daddr, rule.protocol, rule.ports)}
    assert wanted == {(ruleset.map_of(found), ruleset.key_of(found)), ruleset.wildcard_of(found)}


# --- names and records ----------------------------------------------------------------------------------------

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,20}", fullmatch=True) | st.integers(60, 400).map("a".__mul__)
IFNAMES = st.text(alphabet="ab0_.-@+~=,", min_size=1, max_size=15).filter(lambda name: name not in (".", ".."))
PATHS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=80)
OWNERS = st.builds(Attachment, IDS, IFNAMES, IDS, netns=PATHS, inode=st.integers(0, 2 ** 32))


@hypothesis.given(OWNERS)
def test_record_round_trip(owner):
    """Owner and record come back whole, whatever the path of the network namespace holds, and fit the kernel."""
    chain, record = ruleset.chain_of(owner.container_id, owner.ifname), ruleset.record_of(owner)
    assert re.fullmatch(r"c/[A-Za-z0-9/_.\-]{1,253}", chain)
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-/:@+,~%=# ]{1,128}", comment) for comment in record)
    found = ruleset.Owner(chain, "".join(record))
    assert [getattr(found, name) for name in ("container_id", "ifname", "network", "netns", "inode")] == \
        [getattr(owner, name) for name in ("container_id", "ifname", "network", "netns", "inode")]
    assert (found.link, found.pod) == ("", "")


def test_record_of_a_pod():
    """Link and pod are part of the record, in as many comments as it takes; version 0.1 reads the rest of it."""
    owner = Attachment("w" * 64, "eth0", "n" * 60, netns="/run/netns/web", inode=7, pod=f"shop/{'w' * 253}",
                              link="veth1a2b#12")
    comments = ruleset.record_of(owner)
    assert len(comments) > 1 and all(len(comment) <= 128 for comment in comments)
    found = ruleset.Owner(ruleset.chain_of("w" * 64, "eth0"), "".join(comments))
    assert (found.link, found.pod, found.network, found.netns) == (owner.link, owner.pod, owner.network, owner.netns)
    assert str(found).startswith(f"pod shop/{'w' * 253}, container {'w' * 64}, ")
    assert "".join(comments).startswith(f"net={'n' * 60} netns=/run/netns/web#7 ")


def test_a_record_in_pieces_that_look_like_rules():
    """Whatever a pod is called, no piece of its record is taken for a rule's comment, wherever the pieces begin."""
    for length in range(60, 100):
        owner = attachment(PORT, gatewayModeV4="nat", environ={**VARIABLES, "CNI_ARGS": (
            f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={'w' * length}on-link")})
        owner.exposure[0].note = exposure.note_of(owner.exposure[0])
        comments = ruleset.record_of(owner)
        assert table.record_in([*comments, "on-link cni0 10.88.0.0/16"]) == "".join(comments), length


FULL = "r" * ruleset.COMMENT_MAX


@pytest.mark.parametrize("comments, expected", [
    ([], ""), ([""], ""), (["a", "", "b"], "a"), ([FULL, "b", ""], f"{FULL}b"), (["a", "b"], "a"),
    ([FULL, "", "b"], FULL),
    *((["a", rule], "a") for rule in ("localhost is left to this host (IPv4)", "on-link cni0 10.88.0.0/16")),
    *(([FULL, rule], FULL) for rule in ("localhost is left to this host (IPv6)", "on-link cni0 10.88.0.0/16"))])
def test_record_of_chain(comments, expected):
    """The record goes on only after a comment as long as may be, and ends before a rule's own comment."""
    assert table.record_in(comments) == expected


@pytest.mark.parametrize("chain, record", [
    *((chain, "net=a netns=/n#1") for chain in ["c", "c/", "c//", "c/a/b/c", "other"]),
    *((CHAIN, record) for record in ["", " ", "net", "net=", "netns", "netns=/a", "netns=/a#x", "netns=/a#-1",
                                     "netns=/a#\u00b2", "netns=%zz#1", "netns=%#1",
                                     "netns=%4#1", "id= if=", "link=veth1", "link=#7", "link=a;b#7", "link=veth1#x",
                                     "link=veth1#-7", "link=veth1#" + "9" * 5000, "netns=/a#" + "9" * 5000,
                                     "netns=%ff#1", "net=a net=b", "\ufffd=\ufffd"])])
def test_foreign_record(chain, record):
    """A record that somebody else wrote names an owner all the same, one of unknown parts."""
    owner = ruleset.Owner(chain, record)
    assert owner.chain == chain and type(owner.inode) is int and str(owner)
    assert "%zz" not in record or owner.netns == "%zz"


def test_chain_name_length():
    """A name is hashed where the kernel can't hold it (255 bytes), and not before."""
    for length, hashed in (248, False), (249, True):
        assert ("/hash/" in ruleset.chain_of("a" * length, "eth0")) == hashed


def test_chain_names_differ():
    """Two attachments never share a chain, however long or alike their names are."""
    names = [("a", "b"), ("a", "b@"), ("a", "b+"), ("a" * 64, "b@"), ("a" * 65, "b@"), ("a" * 300, "b"),
             ("a" * 301, "b"), ("a" * 300, "c"), ("a-b", "c"), ("a", "hash"), ("a" * 64, "hash")]
    assert len({ruleset.chain_of(*name) for name in names}) == len(names)


NOTED_IDS = st.just("") | IDS.filter(lambda name: len(name) < 99)


@hypothesis.given(st.lists(st.tuples(IFNAMES, NOTED_IDS)), st.lists(st.text(max_size=10)))
def test_stand_by_round_trip(who, others):
    """Who stands by is read back from the comments of a chain, among others."""
    notes = [re.fullmatch(r'add chain inet cni_portmap c \{\ncontinue comment "([^"\\]{1,128})"\n\}\n',
                          ruleset.standby_note("c", *each))[1] for each in who]
    others = [other for other in others if not other.startswith("also on ")]
    others += ["also on ", "also on x; flush ruleset", "also on 0123456789abcdef", "also on eth0 of x; flush ruleset"]
    assert ruleset.standby_notes([*others, *notes]) == who


@pytest.mark.parametrize("pod, network, container_id, by_operator, expected", [
    ("shop/web", "lab", "next", False, True), ("shop/web", "lab", "last", False, False),
    ("shop/other", "lab", "next", False, False), ("web", "lab", "next", False, False),
    ("shop/web", "other", "next", False, True), ("shop/web", "lab", "next", True, False),
    ("shop/web", "lab", "n" * 112, False, True), ("shop/web", "lab", "n" * 113, False, False)])
def test_next_sandbox(pod, network, container_id, by_operator, expected):
    """The same namespace and pod under another container ID, in whatever network; a comment can hold it, and it is a
    runtime's."""
    following = Attachment(container_id, "eth0", network, pod=pod)
    following.by_operator = by_operator
    owner = ruleset.Owner("c/last/eth0", f"net=lab netns=# pod={pod if '/' not in pod else 'shop/web'}")
    assert ruleset.is_next_sandbox(following, owner) == expected


@hypothesis.given(OWNERS)
def test_own_names(owner):
    """Every name that an attachment's chain can have is known again."""
    chain = ruleset.chain_of(owner.container_id, owner.ifname)
    assert ruleset.is_attachment_chain(chain) and ruleset.is_own_chain(chain)


@hypothesis.given(st.text() | st.text(alphabet="cx/ab0.-_@;{} \n\"").map("c/".__add__))
def test_names_of_others(name):
    """What is taken for a chain of ours can only be a name in nft text."""
    if ruleset.is_own_chain(name):
        assert re.fullmatch(r"(?a)[cx]/([A-Za-z0-9][\w.\-]*/[\w.\-]{1,15}|[\w.\-]+/hash/[0-9a-f]{32})",
                            name) or name in ruleset.SHARED


@pytest.mark.parametrize("name", ["", "c", "c/", "c/a", "c/a/", "c//eth0", "c/a/eth0/x", "c/a/eth0;", "c/a b/eth0",
                                  "c/-a/eth0", "c/a/.", "c/a/x@y", "c/a/0123456789abcdef", "c/a/hash/", "c/é/eth0",
                                  "c/a/hash/" + "g" * 32, "c/a/hash/" + "0" * 31, f"c/{'a' * 254}/eth0", "d/a/eth0",
                                  "c/a/hash/" + "0" * 32 + "/x", "guard\n", "c/a/eth0\n", "c/a/\udcff"])
def test_names_that_are_not_ours(name):
    """Nearly ours is not ours."""
    assert not ruleset.is_own_chain(name)


@pytest.mark.parametrize("record, field, expected", [
    ("net=lab; add netns=/n#5", "network", ""), ("net=a\nb", "network", ""), ("pod=a;b", "pod", ""),
    ('pod=a"b/c', "pod", ""), ("pod=a/b/c", "pod", ""), ("pod=/", "pod", ""), ("pod=shop/web", "pod", "shop/web"),
    ("netns=/n#" + "9" * 4300, "inode", 0), ("netns=/n#18446744073709551616", "inode", 0),
    ("netns=/n#18446744073709551615", "inode", 2 ** 64 - 1), ("netns=/n#²", "inode", 0), ("netns=/n#-1", "inode", 0),
    ("link=veth1#2147483648", "link", ""), ("link=veth1#2147483647", "link", "veth1#2147483647"),
    ("link=a;b#1", "link", ""), ("id=victim if=eth0", "container_id", "web"), ("id=web if=eth9", "ifname", "eth0"),
    ("id=a;b if=x@y", "container_id", "web")])
def test_records_of_others(record, field, expected):
    """What the plugin could not have written, in a chain of that name, is not known."""
    assert getattr(ruleset.Owner("c/web/eth0", record), field) == expected


# --- nothing breaks out ---------------------------------------------------------------------------------------

ADDRESS = r"(?:[0-9.]+|[0-9a-f:.]+)"
NAME = r"c/[A-Za-z0-9/_.\-]+"
CONDITION_WORDS = ["ip saddr 10.0.0.0/8", "ip6 daddr != fd00::/8", "ip daddr { 1.2.3.4, 1.2.3.5 }",
                   'iifname "eth*"', "ip saddr @trusted", "ct state new"]
WORD = "|".join(map(re.escape, CONDITION_WORDS))
PROTOCOL = "(?:tcp|udp|sctp)"
MATCH_ALL = rf"(?:meta nfproto ipv[46]|ip6? daddr {ADDRESS})(?: (?:{WORD}))*"
MATCH = rf"{MATCH_ALL} {PROTOCOL} dport"
RULE = "|".join([
    r'(?:counter|continue) comment "[A-Za-z0-9_.\-/:@+,~%=# ]{1,128}"',
    rf"(?:(?:oiftype loopback )?ip6? saddr {ADDRESS}(?:/\d+)? )?meta mark set meta mark \| 0x[0-9a-f]+",
    rf'iifname "[A-Za-z0-9_.\-@+,~=]{{1,15}}" ip6? saddr {ADDRESS}/\d+ meta mark set meta mark \| 0x[0-9a-f]+ '
    rf'comment "on-link [A-Za-z0-9_.\-@+,~=]{{1,15}} {ADDRESS}/\d+"',
    r'ip6? daddr (?:127\.0\.0\.0/8|::1) return comment "localhost is left to this host \(IPv[46]\)"',
    rf"{MATCH_ALL} meta l4proto ({PROTOCOL}) counter dnat ip6? to (?:[0-9.]+|\[[0-9a-f:.]+\]):{PROTOCOL} dport map "
    rf"@{NAME}/\d+",
    rf"{MATCH} (?:\d+|\d+-\d+) counter dnat ip6? to (?:[0-9.]+(?::\d+)?|\[[0-9a-f:.]+\]:\d+|[0-9a-f:.]+)"])
ELEMENT = rf"(?:ipv4|ipv6|{ADDRESS}) \. {PROTOCOL} \. \d+ : goto {NAME}"
LINE = rf"create chain inet cni_portmap {NAME}|add map inet cni_portmap {NAME}/\d+ \{{ typeof th dport : th dport; " \
       rf"elements = \{{ \d+ : \d+(?:, \d+ : \d+)* \}}; \}}|add chain inet cni_portmap {NAME} \{{|{RULE}|\}}|" \
       r"add map inet cni_portmap (?:hostports|hostip[46]_hostports) \{ typeof [a-z46. ]+ : verdict; " \
       rf"elements = \{{ {ELEMENT}(?:, {ELEMENT})* \}}; \}}"

FAMILIES = st.sampled_from([["10.88.0.2/16", "fd88::2/64"], ["10.88.0.2/32"], ["fd88::2/128"],
                            ["::ffff:10.0.0.1/104", "fd88::/0"]])
MAPPINGS = st.lists(st.builds(port, st.integers(1, 65535), st.integers(1, 65535),
                              st.sampled_from(["tcp", "UDP", "sctp", ""]), IPS[4] | IPS[6] | st.just("")),
                    max_size=40, unique_by=lambda mapping: mapping["hostPort"])
CONDITIONS = st.lists(st.lists(st.sampled_from(CONDITION_WORDS)).map(" ".join), max_size=3)


@hypothesis.given(OWNERS, FAMILIES, MAPPINGS, CONDITIONS, CONDITIONS, st.booleans(), st.booleans(), st.integers(0, 31))
def test_only_allowed_tokens(owner, ips, mappings, v4, v6, snat, masq_all, bit):
    """Any valid configuration renders only lines of the forms above, one for each command."""
    found = attachment(*mappings, environ={"CNI_CONTAINERID": owner.container_id, "CNI_NETNS": owner.netns,
                                           "CNI_IFNAME": owner.ifname},
                       name=owner.network, snat=snat, masqAll=masq_all, markMasqBit=bit, conditionsV4=v4,
                       conditionsV6=v6, prevResult={"ips": [{"address": ip} for ip in ips]})
    lines = ruleset.attach(found).splitlines()
    assert [line for line in lines if not re.fullmatch(LINE, line)] == []
    maps = {ruleset.map_of(published) for published in found.ports}
    assert len(lines) == 3 + len([*ruleset.rules_of(found)]) + len(maps) + len(ruleset.port_maps_of(found))


@hypothesis.given(MAPPINGS)
def test_every_port_is_translated_once(mappings):
    """Each port is forwarded to its own container port, and no other port is, in ranges too."""
    found = attachment(*mappings, **ONLY[4])
    translated = []
    maps = {name: [pair[1:] for pair in pairs] for pairs, name in ruleset.port_maps_of(found).items()}
    for rule in ruleset.rules_of(found):
        match = re.search(r"(?:nfproto ipv4|ip daddr (\S+)) (\w+) dport (\d+)(?:-(\d+))? counter "
                          r"dnat ip to \S+?(?::(\d+))?$", rule)
        if match:
            ip, protocol, first, last, to = match.groups()
            translated += [(ip or "", protocol, number, int(to or number))
                           for number in range(int(first), int(last or first) + 1)]
        mapped = re.search(r"(?:nfproto ipv4|ip daddr (\S+)) meta l4proto (\w+) counter "
                           r"dnat ip to \S+ dport map @(\S+)$", rule)
        if mapped:
            translated += [(mapped[1] or "", mapped[2], *pair) for pair in maps[mapped[3]]]
    assert sorted(translated) == sorted((each.host_ip, each.protocol, each.host_port, each.container_port)
                                        for each in found.ports)


HOSTILE = ["a; drop", "a\nadd rule inet cni_portmap guard accept", "a }", "{ a", 'a"', "a # b", "a accept", "a\\", "$a",
           "a\0", "a\r", "é", "\ud800", "a'", "`a`", "@a;", "a\u2028b", " ", "a : goto guard", "*;"]
PLACES = {
    "container-id": lambda text: ({**VARIABLES, "CNI_CONTAINERID": text}, {}),
    "ifname": lambda text: ({**VARIABLES, "CNI_IFNAME": text[:15]}, {}),
    "name": lambda text: (VARIABLES, {"name": text}),
    "protocol": lambda text: (VARIABLES, {"runtimeConfig": {"portMappings": [{**PORT, "protocol": text}]}}),
    "protocol-suffix": lambda text: (VARIABLES,
                                     {"runtimeConfig": {"portMappings": [{**PORT, "protocol": "tcp" + text}]}}),
    "host-ip": lambda text: (VARIABLES, {"runtimeConfig": {"portMappings": [{**PORT, "hostIP": "10.0.0.1" + text}]}}),
    "host-port": lambda text: (VARIABLES, {"runtimeConfig": {"portMappings": [{**PORT, "hostPort": "80" + text}]}}),
    "address": lambda text: (VARIABLES, {"prevResult": {"ips": [{"address": f"10.88.0.2{text}/16"}]}}),
    "prefix": lambda text: (VARIABLES, {"prevResult": {"ips": [{"address": f"10.88.0.2/16{text}"}]}}),
    "mark-bit": lambda text: (VARIABLES, {"markMasqBit": "1" + text}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile(place, text):
    """Text that could end a command, a set or a comment is refused before the kernel is asked anything."""
    environ, keys = PLACES[place](text)
    kernel = RecordingKernel()
    status, document = respond("ADD", configuration(PORT, **keys), kernel, environ=environ)
    assert (status, document["code"]) == (1, 4 if place in ("container-id", "ifname") else 7)
    assert kernel.calls == []


def test_table_names():
    """The reader of the kernel and the writer of text mean the same table."""
    assert f"inet {ruleset.TABLE_NAME}" == ruleset.TABLE and table.NFPROTO_INET == 1


def test_many_host_addresses_are_grouped_once():
    """The number of passes over the ports does not grow with the number of their host addresses."""
    class Counted(tuple):
        __slots__ = ()

        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    counts = []
    for number in 2, 200:
        ports = [Port(4, "tcp", f"127.1.0.{index}", 8080, 80) for index in range(number)]
        found = Attachment("web", "eth0", "lab", addresses={4: Address(4, "10.88.0.2", "10.88.0.0/16")},
                                  ports=Counted(ports))
        passes = []
        assert len([rule for rule in ruleset.rules_of(found) if "dnat" in rule]) == (2 if number == 2 else 1)
        counts.append(len(passes))
    assert counts[0] == counts[1]
