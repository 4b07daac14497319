"""The configuration: what is accepted and how it is meant, what is refused and how that is said."""

import pytest
from helpers import (PORT, PREV_RESULT, VARIABLES, RecordingKernel, attachment, configuration, explained, names,
                     problem, request, respond)

from cni_portmap import cni, config
from cni_portmap.cni import CniError

MAPPINGS = "runtimeConfig.portMappings"


def ports_of(attached):
    return [(port.family, port.protocol, port.host_ip, port.host_port, port.container_port) for port in attached.ports]


def refusal(**keys):
    """The message and details of the CniError(7) for a configuration with these keys."""
    with pytest.raises(CniError) as caught:
        explained(config.parse, request(**keys))
    assert caught.value.code == 7
    return caught.value.args[0], caught.value.details


# --- keys with one value --------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys, field, meaning", [
    ({}, "mark_bit", 13), ({"snat": True}, "mark_bit", 13), ({"snat": None}, "mark_bit", 13),
    ({"snat": False}, "mark_bit", None), ({}, "masq_all", False), ({"masqAll": True}, "masq_all", True),
    ({"masqAll": None}, "masq_all", False), ({"markMasqBit": 0}, "mark_bit", 0), ({"markMasqBit": 31}, "mark_bit", 31),
    ({"markMasqBit": 7.0}, "mark_bit", 7), ({"markMasqBit": None}, "mark_bit", 13),
    ({"markMasqBit": 5, "snat": False}, "mark_bit", None),
    ({"externalSetMarkChain": None, "markMasqBit": 5}, "mark_bit", 5),
    ({"externalSetMarkChain": "KUBE-MARK-MASQ"}, "mark_bit", 13), ({"backend": "nftables"}, "network", "lab"),
    ({"backend": None}, "network", "lab"), ({"backend": "iptables"}, "network", "lab"), ({}, "localhost6", True),
    ({"localhostIPv6": None}, "localhost6", True), ({"localhostIPv6": False}, "localhost6", False),
    ({}, "refuse_port_in_use", False), ({"hostPortInUse": "ignore"}, "refuse_port_in_use", False),
    ({"hostPortInUse": None}, "refuse_port_in_use", False), ({"hostPortInUse": "refuse"}, "refuse_port_in_use", True),
    ({"name": "a"}, "network", "a"), ({"name": "A_b.c-1" * 20}, "network", "A_b.c-1" * 20),
    ({"runtimeConfig": None}, "ports", ()), ({"runtimeConfig": {}}, "ports", ()),
    ({"runtimeConfig": {"portMappings": None}}, "ports", ()),
    ({"runtimeConfig": {"portMappings": [], "bandwidth": {}}}, "ports", ()),
    ({"unknown": [], "args": {"cni": {}}, "capabilities": {"portMappings": True}, "ipMasq": True, "dns": {}}, "network",
     "lab"), ({}, "conditions", {4: "", 6: ""}),
    ({"conditionsV4": None, "conditionsV6": []}, "conditions", {4: "", 6: ""})])
def test_accepted(keys, field, meaning):
    """Every key of the reference plugin, absent, null and given, means what it means there."""
    assert getattr(explained(config.parse, request(**keys)), field) == meaning


BAD_KEYS = [
    *(("name", value) for value in [None, "", 1, "-a", ".a", "a b", "a\n", "a/b", "é", "a;b", "a\"b", []]),
    *((flag, value) for flag in ["snat", "masqAll", "localhostIPv6"] for value in ["true", 1, 0, "", [], {}]),
    *(("markMasqBit", value) for value in [-1, 32, "13", 1.5, True, [], 1e300, 10 ** 30]),
    *(("externalSetMarkChain", value) for value in [1, True, [], {}]),
    *(("backend", value) for value in ["nft", "IPTABLES", "", 1, True, [], {}]),
    *(("hostPortInUse", value) for value in ["Refuse", "", True, 1, []]),
    *((key, value) for key in ["conditionsV4", "conditionsV6"] for value in ["tcp dport 80", 1, {}, True]),
    *(("runtimeConfig", value) for value in [[], "a", 1, True]),
    *(("prevResult", value) for value in [[], "a", 1, True])]


@pytest.mark.parametrize("key, value", BAD_KEYS)
def test_refused(key, value):
    """A bad value is code 7; the message names key and value, the details what was expected."""
    message, details = refusal(**{key: value})
    assert message == problem(key, value) and details.startswith("expected ") and len(details) > 15


def test_name_missing():
    """A configuration without a name says so."""
    document = respond("ADD", {"cniVersion": "1.0.0", "prevResult": PREV_RESULT})[1]
    assert (document["code"], document["msg"]) == (7, "name: missing")
    assert "network's name" in document["details"]


def test_long_value():
    """A long value is cut short, on one line."""
    message, _ = refusal(backend="x\n" * 5000)
    assert names(message, "backend") and len(message) < 120 and "\n" not in message


def test_mark_bit_and_chain():
    """markMasqBit and externalSetMarkChain exclude each other, as in the reference plugin."""
    message, details = refusal(markMasqBit=13, externalSetMarkChain="X")
    assert message == 'invalid value for externalSetMarkChain: "X"' and "not both" in details


@pytest.mark.parametrize("keys, word", [({"backend": "iptables"}, "using nftables"),
                                        ({"externalSetMarkChain": "X\n;"}, "its own masquerading")])
def test_warned(keys, word, capfd):
    """A key that is accepted and ignored is one line on stderr."""
    explained(config.parse, request(**keys))
    cni.tell()
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("cni-portmap: ") and word in printed.err
    assert not printed.out


# --- port mappings --------------------------------------------------------------------------------------------

BOTH = [(4, "tcp", "", 8080, 80), (6, "tcp", "", 8080, 80)]


@pytest.mark.parametrize("mapping, expected", [
    ({}, BOTH), ({"protocol": "tcp"}, BOTH), ({"protocol": "TCP"}, BOTH), ({"protocol": ""}, BOTH),
    ({"protocol": None}, BOTH), ({"protocol": "Udp"}, [(4, "udp", "", 8080, 80), (6, "udp", "", 8080, 80)]),
    ({"protocol": "sctp"}, [(4, "sctp", "", 8080, 80), (6, "sctp", "", 8080, 80)]),
    ({"hostIP": ""}, BOTH), ({"hostIP": None}, BOTH), ({"HostIP": "", "Protocol": "tcp"}, BOTH),
    ({"unknown": 1, "name": "x"}, BOTH), ({"hostIP": "0.0.0.0"}, BOTH[:1]), ({"hostIP": "::"}, BOTH[1:]),
    ({"hostIP": "0:0::0"}, BOTH[1:]), ({"hostIP": "::ffff:0.0.0.0"}, BOTH[:1]),
    ({"hostIP": "192.0.2.1"}, [(4, "tcp", "192.0.2.1", 8080, 80)]),
    ({"hostIP": "::ffff:192.0.2.1"}, [(4, "tcp", "192.0.2.1", 8080, 80)]),
    ({"hostIP": "::FFFF:C000:0201"}, [(4, "tcp", "192.0.2.1", 8080, 80)]),
    ({"hostIP": "127.0.0.1"}, [(4, "tcp", "127.0.0.1", 8080, 80)]), ({"hostIP": "::1"}, [(6, "tcp", "::1", 8080, 80)]),
    ({"hostIP": "2001:DB8:0:0::01"}, [(6, "tcp", "2001:db8::1", 8080, 80)]),
    ({"hostIP": "::192.0.2.1"}, [(6, "tcp", "::192.0.2.1", 8080, 80)]),
    ({"hostPort": 1.0}, [(4, "tcp", "", 1, 80), (6, "tcp", "", 1, 80)]),
    ({"hostPort": 65535, "containerPort": 1}, [(4, "tcp", "", 65535, 1), (6, "tcp", "", 65535, 1)])])
def test_mapping(mapping, expected):
    """The ports of one mapping: "" on both families, an unspecified address on one, an IPv4-mapped one is IPv4."""
    assert ports_of(attachment({**PORT, **mapping})) == expected


@pytest.mark.parametrize("keys", [("HostPort", "ContainerPort", "Protocol", "HostIP"),
                                  ("hostport", "containerport", "protocol", "hostip"),
                                  ("HOSTPORT", "CONTAINERPORT", "PROTOCOL", "HOSTIP"),
                                  ("hOSTpORT", "ContainerPort", "protocol", "hostIp")])
def test_mapping_keys(keys):
    """The case of a mapping's keys does not matter (containerd capitalises them)."""
    assert ports_of(attachment(dict(zip(keys, (8080, 80, "UDP", "192.0.2.1"))))) == [(4, "udp", "192.0.2.1", 8080, 80)]


BAD_PORTS = [0, -1, 65536, 1.5, "80", True, None, [], {}, 1e400, 10 ** 30]
BAD_MAPPINGS = [
    *((name, value) for name in ["hostPort", "containerPort", "HostPort", "CONTAINERPORT"] for value in BAD_PORTS),
    *(("protocol", value) for value in ["icmp", "tcp6", "tcp ", "6", 6, True, [], "tcp\n", "tcp;drop", "tcp }",
                                        "ſctp"]),
    *(("hostIP", value) for value in ["localhost", "1.2.3", "1.2.3.4.5", "1.2.3.256", "01.2.3.4", "0x7f.1",
                                      "1.2.3.4/24", " 1.2.3.4", "1.2.3.4\n", "1.2.3.4\0", "1::2::3", "fe80::1%eth0",
                                      "[::1]", ":", "::ffff:1.2.3", "\ud800", "*", 1, True, [], {}])]


@pytest.mark.parametrize("name, value", BAD_MAPPINGS)
def test_mapping_refused(name, value):
    """A bad field is named with its path, as it was written, and its value."""
    mapping = {key: number for key, number in PORT.items() if key.lower() != name.lower()}
    message, details = refusal(runtimeConfig={"portMappings": [PORT, {**mapping, name: value}]})
    assert message == problem(f"{MAPPINGS}[1].{name}", value) and details.startswith("expected ")


@pytest.mark.parametrize("mapping", [{}, {"hostPort": 1}, {"containerPort": 1}, {"hostPort ": 1, "containerPort": 1},
                                     None, 1, "a", []])
def test_mapping_incomplete(mapping):
    """A mapping without both ports, or that is no object, is refused with its path."""
    message, details = refusal(runtimeConfig={"portMappings": [PORT, mapping]})
    assert f"{MAPPINGS}[1]" in message and "hostPort and containerPort" in details


@pytest.mark.parametrize("value", [{}, "8080:80", 8080, True])
def test_mappings_no_list(value):
    """portMappings that are no list are refused with their path."""
    assert refusal(runtimeConfig={"portMappings": value})[0] == problem(MAPPINGS, value)


OTHER = {**PORT, "containerPort": 81}


@pytest.mark.parametrize("first, second, count", [
    (PORT, PORT, 2), (PORT, {**PORT, "protocol": "TCP", "hostIP": ""}, 2), (PORT, {**PORT, "hostIP": "0.0.0.0"}, 2),
    ({**PORT, "hostIP": "::1"}, {**PORT, "hostIP": "0::1"}, 1),
    ({**PORT, "hostIP": "1.2.3.4"}, {**PORT, "hostIP": "::ffff:1.2.3.4"}, 1), (PORT, {**OTHER, "protocol": "udp"}, 4),
    (PORT, {**OTHER, "hostPort": 8081}, 4), (PORT, {**OTHER, "hostIP": "127.0.0.1"}, 3),
    ({**PORT, "hostIP": "0.0.0.0"}, {**OTHER, "hostIP": "::"}, 2)])
def test_said_twice(first, second, count):
    """Duplicate mappings are merged; those that differ in family, protocol, address or port are not."""
    assert len(attachment(first, second).ports) == count


@pytest.mark.parametrize("second", [OTHER, {**OTHER, "hostIP": "::"}, {**OTHER, "hostIP": "0.0.0.0"},
                                    {**OTHER, "protocol": "Tcp"}])
def test_contradiction(second):
    """One host port that is mapped to two container ports is refused, and both are named."""
    message, details = refusal(runtimeConfig={"portMappings": [PORT, second]})
    assert names(message, f"{MAPPINGS}[1]") and "8080" in details and "80" in details


# --- the container's addresses --------------------------------------------------------------------------------

def addresses(**result):
    found = explained(config.parse, request(prevResult=result)).addresses
    return {family: (address.ip, address.network) for family, address in found.items()}


V4, V6 = {4: ("10.88.0.2", "10.88.0.0/16")}, {6: ("fd88::2", "fd88::/64")}
IP4, IP6 = {"address": "10.88.0.2/16"}, {"address": "fd88::2/64"}
INSIDE, OUTSIDE, OTHER_IF = {"name": "eth0", "sandbox": "/n"}, {"name": "eth0"}, {"name": "eth1", "sandbox": "/n"}


@pytest.mark.parametrize("result, expected", [
    ({}, {}), ({"ips": None, "interfaces": None}, {}), ({"ips": [IP4]}, V4), ({"ips": [IP6, IP4]}, V4 | V6),
    ({"ips": [IP4, {"address": "10.0.0.9/8"}]}, V4), ({"ips": [{**IP4, "interface": 0}], "interfaces": [INSIDE]}, V4),
    ({"ips": [{**IP4, "interface": 0.0}], "interfaces": [INSIDE]}, V4),
    ({"ips": [{**IP4, "interface": 0}], "interfaces": [OUTSIDE]}, {}),
    ({"ips": [{**IP4, "interface": 0}], "interfaces": [OTHER_IF]}, {}),
    ({"ips": [{"address": "10.0.0.9/8", "interface": 0}, {**IP4, "interface": 1}], "interfaces": [OTHER_IF, INSIDE]},
     V4), ({"ips": [{**IP4, "interface": None}], "interfaces": [OTHER_IF]}, V4),
    ({"ips": [{**IP4, "interface": -1}], "interfaces": [OTHER_IF]}, V4),
    ({"ips": [{**IP4, "interface": 7}], "interfaces": [OTHER_IF]}, V4),
    ({"ips": [{**IP4, "interface": 0}], "interfaces": [{"name": "eth0", "sandbox": ""}]}, {}),
    ({"ips": [{**IP4, "interface": 0}], "interfaces": [None]}, {}),
    ({"ips": [{"address": "::ffff:10.88.0.2/112"}]}, V4),
    ({"ips": [{"address": "10.88.0.2/32"}]}, {4: ("10.88.0.2", "10.88.0.2/32")}),
    ({"ips": [{"address": "10.88.0.2/0"}]}, {4: ("10.88.0.2", "0.0.0.0/0")}),
    ({"ips": [{"address": "FD88:0::2/127"}]}, {6: ("fd88::2", "fd88::2/127")}),
    ({"ip4": {"ip": "10.88.0.2/16"}, "ip6": {"ip": "fd88::2/64"}}, V4 | V6),
    ({"ip4": {"ip": "10.88.0.2/16"}, "ip6": None}, V4), ({"ip4": {}}, {})])
def test_addresses(result, expected):
    """The first of each family on CNI_IFNAME in a sandbox, or on no interface in particular; old results too."""
    assert addresses(**result) == expected


@pytest.mark.parametrize("result, path", [
    *(({"ips": [IP4, {"address": value}]}, "prevResult.ips[1].address") for value in
      [1, None, "", "10.0.0.1", "10.0.0.1/", "10.0.0.1/33", "fd::1/129", "10.0.0.1/-1", "10.0.0.1/ 8", "10.0.0.1/8;",
       "10.0.0/8", "/8", "::ffff:1.2.3.4/95", "10.0.0.1/٨", "10.0.0.1/0008", "fe80::1%e/64"]),
    ({"ips": [{}]}, "prevResult.ips[0].address"), ({"ips": [1]}, "prevResult.ips[0]"), ({"ips": {}}, "prevResult.ips"),
    ({"ips": [{**IP4, "interface": "0"}]}, "prevResult.ips[0].interface"),
    ({"ips": [{**IP4, "interface": True}]}, "prevResult.ips[0].interface"),
    ({"interfaces": 1}, "prevResult.interfaces"), ({"interfaces": [1]}, "prevResult.interfaces[0]"),
    ({"interfaces": [{"name": 1}]}, "prevResult.interfaces[0].name"),
    ({"interfaces": [{"sandbox": 1}]}, "prevResult.interfaces[0].sandbox"), ({"ip4": {"ip": "1"}}, "prevResult.ip4.ip"),
    ({"ip6": 1}, "prevResult.ip6"), ({"ip4": {"gateway": "10.0.0.1"}}, "prevResult.ip4.ip")])
def test_addresses_refused(result, path):
    """A malformed prevResult is refused with the path in it."""
    assert names(refusal(prevResult=result)[0], path)


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.9.9.9", "0.0.0.0", "224.0.0.1", "239.255.255.255",
                                "255.255.255.255", "::", "::1", "ff02::1", "::ffff:127.0.0.1"])
def test_an_address_that_no_container_has(ip):
    """Nothing can be forwarded to localhost, to many, or to no address; other interfaces may have such addresses."""
    cidr = f"{ip}/{128 if ':' in ip else 32}"
    for result, path in ({"ips": [IP4, {"address": cidr}]}, "prevResult.ips[1].address"), \
            ({"ip6" if ":" in ip else "ip4": {"ip": cidr}}, f"prevResult.{'ip6' if ':' in ip else 'ip4'}.ip"):
        message, details = refusal(prevResult=result, runtimeConfig={"portMappings": [PORT]})
        assert names(message, path) and "address of the container" in details
        assert addresses(**result)  # without ports nothing is forwarded
    elsewhere = {"ips": [{"address": cidr, "interface": 0}, IP4], "interfaces": [OTHER_IF]}
    assert attachment(PORT, prevResult=elsewhere).ports


@pytest.mark.parametrize("ip", ["10.0.0.1", "100.64.0.1", "126.255.255.255", "128.0.0.1", "223.255.255.255",
                                "240.0.0.1", "169.254.1.1", "fe80::1", "fd00::ff02", "2001:db8::1"])
def test_an_address_that_a_container_may_have(ip):
    """Private, shared and link-local ones are in use for containers."""
    assert attachment(PORT, prevResult={"ips": [{"address": f"{ip}/32"}]}).ports


def test_no_address(capfd):
    """A network without addresses may be one of several of a container, which has to start: a line on stderr."""
    for interface in "eth9", "eth1":
        environ = {**VARIABLES, "CNI_IFNAME": interface}
        assert attachment(PORT, environ=environ).ports == attachment(environ=environ).ports == ()
        cni.tell()
        assert capfd.readouterr().err.count(f"no address on {interface}") == 1


V4_ONLY = {"prevResult": {"ips": [IP4]}}


@pytest.mark.parametrize("mapping, published, line", [
    (PORT, 1, ""), ({**PORT, "hostIP": "::1"}, 0, "tcp port 8080 on ::1"),
    ({**PORT, "hostIP": "::"}, 0, "tcp port 8080 on ::"), ({**PORT, "hostIP": "127.0.0.1"}, 1, "")])
def test_skipped(mapping, published, line, capfd):
    """A port that was asked for on a family that the container lacks is skipped with a line; "" asks for none."""
    assert len(attachment(mapping, **V4_ONLY).ports) == published
    cni.tell()
    error = capfd.readouterr().err
    assert error.count("\n") == bool(line) and (f"{line} is not published" in error if line else not error)


def test_shape_only():
    """STATUS and DEL come without a result, so only the shape of their configuration counts."""
    asked = request("STATUS", prevResult=None, runtimeConfig={"portMappings": [PORT]})
    assert explained(config.parse, asked).ports == ()


# --- conditions -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("items, expected", [
    ([], ""), ([""], ""), (["ip saddr 10.0.0.0/8"], "ip saddr 10.0.0.0/8"),
    (["ip", "saddr", "10.0.0.1"], "ip saddr 10.0.0.1"),
    (["ip saddr 10.0.0.1", "iifname \"eth*\""], 'ip saddr 10.0.0.1 iifname "eth*"'),
    (["  ct\tstate  new "], "ct state new"), (["ip saddr { 10.0.0.1, 10.0.0.2 }"], "ip saddr { 10.0.0.1, 10.0.0.2 }"),
    (["ip saddr {10.0.0.1,10.0.0.2}"], "ip saddr {10.0.0.1,10.0.0.2}"),
    (["ip saddr != 10.0.0.1"], "ip saddr != 10.0.0.1"), (["meta mark & 0xff == 0x1"], "meta mark & 0xff == 0x1"),
    (["tcp sport 1024-65535"], "tcp sport 1024-65535"), (["ip saddr @trusted"], "ip saddr @trusted"),
    (["meta mark | 1 < 7"], "meta mark | 1 < 7"), (["-s 10.0.0.0/8"], "ip saddr 10.0.0.0/8"),
    (["-s", "10.0.0.0/8"], "ip saddr 10.0.0.0/8"), (["! -s 10.0.0.1"], "ip saddr != 10.0.0.1"),
    (["!", "-d", "10.0.0.1"], "ip daddr != 10.0.0.1"),
    (["--source 10.0.0.1 --destination 10.0.0.2"], "ip saddr 10.0.0.1 ip daddr 10.0.0.2"),
    (["-s", "10.0.0.1,10.0.0.2"], "ip saddr { 10.0.0.1, 10.0.0.2 }"), (["! -i eth0"], 'iifname != "eth0"'),
    (["-i eth+"], 'iifname "eth*"'), (["--in-interface", "eth0", "-s", "10.0.0.1"],
                                      'iifname "eth0" ip saddr 10.0.0.1')])
def test_conditions(items, expected):
    """nft match text passes, joined with spaces; the reference's documented iptables forms are translated."""
    assert attachment(conditionsV4=items).conditions == {4: expected, 6: ""}
    if items and items[0][:1] in "-!":
        expected = expected.replace("ip saddr", "ip6 saddr").replace("ip daddr", "ip6 daddr")
    assert attachment(conditionsV6=items).conditions == {4: "", 6: expected}


@pytest.mark.parametrize("text", [
    "tcp dport 80; drop", "ip saddr 10.0.0.1\ndrop", "ip saddr 10.0.0.1\r drop", "tcp dport 80 # all",
    "tcp dport 80 \\", "tcp dport $port", "tcp dport 80 `x`", "iifname 'a'", "ip saddr (10.0.0.1)", "ip saddr [a]",
    "tcp dport 80\0", "iifname \"é\"", "tcp dport 80\u2028drop", "}", "{", "ip saddr 1.2.3.4 } }", "} accept {",
    "ip saddr { 1.2.3.4", "ip saddr { { 1.2.3.4 } }", "ip saddr }{", 'iifname "eth0', 'iifname "eth 0"',
    'iifname eth"0"', 'iifname """"', 'comment "x', '"eth0"drop', 'iifname "a""b"',
    *(f"ip saddr 10.0.0.1 {word}" for word in
      ["accept", "drop", "ACCEPT", "Drop", "queue", "return", "jump x", "goto x", "continue", "reject", "log",
       "counter", "dnat to 10.0.0.1", "snat to 1.2.3.4", "masquerade", "redirect", "meta mark set 1", "ct mark set 1",
       "limit rate 1/second", "quota 1 bytes", "notrack", "dup to 1.2.3.4", "fwd to 1.2.3.4", "tproxy to :1",
       "add @s { ip saddr }", "update @s { ip saddr }", "set update ip saddr @s", "delete @s { ip saddr }",
       "flow add @f", "synproxy", "comment \"x\"", "xt target MASQUERADE", "last"]),
    "ip saddr vmap { 10.0.0.1 : drop }", "ip saddr { 10.0.0.1 }accept", "ip saddr {10.0.0.1}accept",
    "ip saddr { 10.0.0.1,drop }",
    # nft's scanner ends a number where the letters of a word begin
    "tcp dport 80accept", "tcp dport 80counter", "tcp dport 80-90log", "ip saddr 10.0.0.1drop",
    "ip saddr 10.0.0.0/8jump x", "meta mark 0x1log", "tcp dport 80limit rate 1/second", "ip saddr @a&accept",
    "ether saddr 02:00:00:00:00:01log", "tcp dport 80masquerade",
    # and takes as many letters into a hexadecimal number or an address as it can
    "@th,16,0xcset 0x16", "@nh,64,0xaset 0x1", "meta mark 0xffnotrack", "meta mark 0xfflog", "meta mark 0xFFLOG",
    "meta mark 0xfreset tcp option maxseg", "meta mark 0xfflimit rate 1/second", "ip6 saddr ::/0log",
    "ip6 saddr ::/64notrack", "ip6 saddr ::/0counter", "ip6 saddr ::/0continue", "ip6 saddr ::/0accept",
    "ip6 saddr ::flog", "ip6 saddr ::1-::flog", "ether saddr 02:00:00:00:00:0fnotrack", "meta mark 0xffreturn"])
def test_conditions_refused(text):
    """Text that could end the match, and a statement, are refused before nft sees them."""
    for key in "conditionsV4", "conditionsV6":
        message, details = refusal(**{key: ["ip saddr 10.0.0.0/8", text]})
        assert key in message and details.startswith("expected ")


@pytest.mark.parametrize("text", [
    "meta mark 0xadd", "ip6 saddr 2001:add::/32", "ip6 saddr fd00::add", "ct mark and 0xfadd == 0x1", "iifname \"log\"",
    "ether saddr de:ad:be:ef:00:01", "ct state established,related", "ip dscp cs1", "fib saddr type unicast",
    "meta cgroup 0xbadd", "ct expiration 1d2h", "tcp flags syn"])
def test_conditions_with_letters(text):
    """A number, an address or a name may have the letters of a statement in it."""
    assert attachment(conditionsV6=[text]).conditions[6] == text


@pytest.mark.parametrize("text", [
    "ip saddr shop.example", "ip saddr localhost", "ip daddr != shop", "ip saddr!=shop", "ip saddr { 10.0.0.1, shop }",
    "ip saddr {10.0.0.1,shop}", "ip saddr 10.0.0.1-shop", "ip saddr shop/24", 'ip saddr "shop"', 'ip saddr "ip"',
    "ip saddr & 255.0.0.0 == shop", "ip saddr shop tcp dport 80", "ip6 daddr shop", "ct original ip saddr shop",
    "ct reply saddr shop", "rt ip nexthop shop", "igmp group shop", "ip saddr . tcp dport { shop . 80 }",
    "tcp dport . ip saddr { 80 . shop }", "ip saddr . meta mark { shop . 1 }", "ip saddr . ip daddr 10.0.0.1 . shop",
    "ip saddr 10.0.0.300", "ip saddr arp", "ip saddr { ether }", "IP SADDR shop", "ip saddr daddr",
    "ip saddr { daddr }", "ip saddr . tcp dport { saddr . 80 }", "-s shop", "! -d shop",
    "-s 10.0.0.1,shop"])
def test_conditions_with_host_names(text):
    """A host name would make ADD ask DNS, and the rule depend on its answer of that moment."""
    message, details = refusal(conditionsV4=[text])
    assert "conditionsV4" in message and "an address" in details and "host names" in details


@pytest.mark.parametrize("text", [
    "tcp dport http", "tcp dport { http, https }", "ip saddr 10.0.0.0/8 tcp sport ssh", "fib saddr type local",
    "fib saddr . iif oif eth0", "ip saddr . tcp dport { 10.0.0.1 . http, 10.0.0.2 . ssh }",
    'iifname . ip saddr { "eth0" . 10.0.0.1 }', "tcp dport . ip saddr http . 10.0.0.1", "ip protocol tcp",
    "ip saddr & 0xff000000 == 0x0a000000", "ip saddr 10.0.0.1-10.0.0.9", "ct original ip saddr 10.0.0.1",
    "meta skuid root", "ip saddr 10.0.0.1 iifname eth0", "ip6 saddr fe80::1-fe80::9 meta mark 1"])
def test_conditions_with_other_names(text):
    """Services, interfaces, users and kinds have names that nobody is asked for."""
    assert attachment(conditionsV4=[text]).conditions[4] == text


@pytest.mark.parametrize("items, instead", [
    (["-p tcp"], "meta l4proto tcp"), (["-p", "tcp", "--dport", "80"], "meta l4proto tcp"),
    (["--dport 80"], "tcp dport 80"), (["-m mark --mark 1"], "ip saddr"), (["--ctstate NEW"], "ct state new"),
    (["! -p udp"], "meta l4proto tcp"), (["-j DROP"], "ip saddr"), (["-s 10.0.0.1", "tcp dport 80"], "ip saddr"),
    (["-s"], "a value after -s"), (["-s", "-d", "1.2.3.4"], "a value after -s"), (["!"], "ip saddr"),
    (["! ! -s 1.2.3.4"], "ip saddr"), (["-s ! 1.2.3.4"], "a value after -s")])
def test_iptables_refused(items, instead):
    """Other iptables syntax is refused with the nft form to write instead."""
    assert instead in refusal(conditionsV4=items)[1]


@pytest.mark.parametrize("item", [1, None, True, [], {}])
def test_condition_no_text(item):
    """A condition that is no text is refused with its index."""
    assert refusal(conditionsV4=["ip saddr 10.0.0.1", item])[0] == problem("conditionsV4[1]", item)


# --- keys in another case ---------------------------------------------------------------------------------------

def read(text):
    """What is read of the members of an object, given as JSON text, and the lines on stderr."""
    cni._warnings.clear()
    found = cni.as_go_reads({key: value for key, (value, _) in cni.members(text).items()}, config.KEYS)
    return found, cni._warnings.copy()


@pytest.mark.parametrize("text, expected, warnings", [
    ('{"snat":1,"unknown":2}', {"snat": 1, "unknown": 2}, 0), ('{"SNAT":1}', {"snat": 1}, 1),
    ('{"ConditionsV4":1}', {"conditionsV4": 1}, 1), ('{"conditionsv4":1}', {"conditionsV4": 1}, 1),
    ('{"snat":1,"SNAT":2}', {"snat": 2}, 1), ('{"SNAT":2,"snat":1}', {"snat": 1}, 2),
    ('{"snat":1,"Snat":2,"snat":3}', {"snat": 3}, 2), ('{"\u017fnat":1}', {"snat": 1}, 1),
    ('{"bac\u212aend":1}', {"backend": 1}, 1), ('{"snat ":1,"s_nat":2}', {"snat ": 1, "s_nat": 2}, 0)])
def test_keys_in_another_case(text, expected, warnings):
    """Go's decoder takes them, so a user of the reference plugin means them; of two the last counts."""
    found, lines = read(text)
    assert found == expected and len(lines) == warnings


def test_no_key_is_ignored_for_its_case():
    """A port that was meant to be restricted is, whichever spelling its conditions have; the protocol's keys too."""
    assert attachment(PORT, ConditionsV4=["ip saddr 10.0.0.1"]).conditions[4] == "ip saddr 10.0.0.1"
    assert names(refusal(MarkMasqBit=99)[0], "markMasqBit")
    given = configuration(PORT)
    given["runtimeConfig"] = {"PortMappings": given["runtimeConfig"]["portMappings"]}
    loud = {key.upper(): value for key, value in given.items()}
    kernels = RecordingKernel(), RecordingKernel()
    assert respond("ADD", loud, kernels[0]) == respond("ADD", configuration(PORT), kernels[1])
    assert kernels[0].written == kernels[1].written != []
    assert names(refusal(runtimeConfig={"PortMappings": 1})[0], "runtimeConfig.portMappings")


# --- GC -------------------------------------------------------------------------------------------------------

A, B = {"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "eth1", "unknown": 1}
OLD, NEW = "cni.dev/attachments", "cni.dev/valid-attachments"


@pytest.mark.parametrize("keys, expected", [
    ({}, None), ({NEW: None}, None), ({NEW: []}, set()), ({OLD: []}, set()),
    ({NEW: [A, B]}, {("a", "eth0"), ("b", "eth1")}), ({OLD: [A]}, {("a", "eth0")}),
    ({NEW: [A], OLD: [A]}, {("a", "eth0")}), ({NEW: [], OLD: None}, set())])
def test_valid_attachments(keys, expected):
    """Both of libcni's keys are read; an absent list is not an empty one."""
    assert explained(config.parse_valid_attachments, request("GC", **keys)) == ("lab", expected)


@pytest.mark.parametrize("key", [OLD, NEW])
@pytest.mark.parametrize("value, step", [({}, ""), ("a", ""), ([1], "[0]"), ([{}], "[0].containerID"),
                                         ([A, {"containerID": "a"}], "[1].ifname"),
                                         ([{**A, "containerID": 1}], "[0].containerID"), ([None], "[0]")])
def test_valid_attachments_refused(key, value, step):
    """A malformed list is refused with its path, rather than taken for an empty one."""
    status, document = respond("GC", configuration(**{key: value}))
    assert (status, document["code"]) == (1, 7) and names(document["msg"], f"{key}{step}")


# --- who it is ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, pod", [
    ("", ""), ("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-7d9f;K8S_POD_UID=1", "shop/web-7d9f"),
    ("IgnoreUnknown=1;K8S_POD_NAME=web;MAC=9a:fa:f0:a2:4b:83", "web"),  # podman
    ("IgnoreUnknown=1;K8S_POD_NAMESPACE=web;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=1", "web"),  # podman 3.0
    ("IgnoreUnknown=1;K8S_POD_NAMESPACE=web;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=1;K8S_POD_UID=", "web"),
    ("K8S_POD_NAMESPACE=web;K8S_POD_NAME=web;K8S_POD_UID=1", "web/web"),
    ("IgnoreUnknown=1;NERDCTL_CNI_DHCP_HOSTNAME=a15e6884b9c5", "a15e6884b9c5"),
    ("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;NERDCTL_CNI_DHCP_HOSTNAME=x", "shop/web"),
    ("K8S_POD_NAMESPACE=shop", ""), ("K8S_POD_NAME=", ""), ("K8S_POD_NAME", ""), (";;=;", ""),
    ("K8S_POD_NAMESPACE=a b;K8S_POD_NAME=web", "web"), ("K8S_POD_NAME=web\" ; flush ruleset", ""),
    ("K8S_POD_NAME=a\nb", ""), ("K8S_POD_NAME=\u00b2", ""), (f"K8S_POD_NAME={'w' * 253}", "w" * 253),
    (f"K8S_POD_NAME={'w' * 254}", "")])
def test_pod(args, pod):
    """People know a container by what its runtime says in CNI_ARGS; what cannot be a name is left out."""
    assert attachment(PORT, environ={**VARIABLES, "CNI_ARGS": args}).pod == pod
    assert attachment(environ={**VARIABLES, "CNI_ARGS": args}).pod == ""  # it publishes nothing


@pytest.mark.parametrize("interfaces, links", [
    ([], ()), (None, ()),
    ([{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/n"}], ("cni0", "veth1")),
    ([{"name": "eth0", "sandbox": "/n"}], ()), ([{"name": "veth1", "sandbox": ""}], ("veth1",)),
    ([{"name": "x" * 16}, {"name": "a/b"}, {"name": "a\"b"}, {"mac": ""}], ())])
def test_links_of_the_host(interfaces, links):
    """The interfaces of a result that are in no sandbox may be the host's end of the container's link."""
    result = {"interfaces": interfaces, "ips": [{"address": "10.88.0.2/16"}]}
    found = explained(config.parse, request(prevResult=result))
    assert found.links == links
