"""The schema and the parser say the same: they accept the same documents, and a refusal names its place."""
import copy
import json
import re

import hypothesis
import hypothesis.strategies as st
import jsonschema
import pytest
from helpers import PORT, PREV_RESULT, configuration, explained, request

from cni_portmap import cni, config, explain

SCHEMA = json.loads(explain.SCHEMA.read_text())

# Documents near the valid ones: valid parts, put together at random, then nought to two mutations.

PORTS = st.sampled_from([1, 80, 8080, 65535, 80.0])
HOST_IPS = st.sampled_from(["", None, "0.0.0.0", "::", "192.0.2.1", "::1", "::ffff:1.2.3.4", "2001:DB8::1"])
PROTOCOLS = st.sampled_from(["tcp", "UDP", "Sctp", "", None])
MAPPING = st.fixed_dictionaries({"hostPort": PORTS, "containerPort": PORTS},
                                optional={"protocol": PROTOCOLS, "hostIP": HOST_IPS})
CAPITAL = st.fixed_dictionaries({"HostPort": PORTS, "ContainerPort": PORTS, "Protocol": PROTOCOLS, "HostIP": HOST_IPS})
CIDR = st.sampled_from(["10.88.0.2/16", "fd88::2/64", "10.0.0.1/32", "::ffff:10.0.0.1/104"])
CONDITIONS = st.none() | st.lists(st.sampled_from(["ip saddr 10.0.0.0/8", "", "ct state new", 'iifname "eth*"']),
                                  max_size=3) | \
    st.lists(st.sampled_from(["-s 10.0.0.1", "! -i eth+"]), max_size=2)
ATTACHMENTS = st.none() | st.lists(st.fixed_dictionaries({"containerID": st.just("a"), "ifname": st.just("eth0")}),
                                   max_size=2)
RESULT = st.none() | st.fixed_dictionaries({}, optional={
    "cniVersion": st.just("1.0.0"), "dns": st.just({}),
    "interfaces": st.none() | st.lists(st.none() | st.fixed_dictionaries({}, optional={
        "name": st.sampled_from(["eth0", "cni0"]), "sandbox": st.sampled_from(["/n", "", None])}), max_size=2),
    "ips": st.none() | st.lists(st.fixed_dictionaries({"address": CIDR},
                                                      optional={"interface": st.sampled_from([0, 1.0, -1, None])}),
                                max_size=2),
    "ip4": st.none() | st.fixed_dictionaries({"ip": CIDR}), "ip6": st.sampled_from([None, {}])})
MODE = st.sampled_from([None, "nat", "nat-unprotected", "routed", "isolated"])
EXPOSURE = {
    "gatewayModeV4": MODE, "gatewayModeV6": MODE, "allowDirectRouting": st.sampled_from([None, False, True]),
    "trustedHostInterfaces": st.sampled_from([None, [], ["eth0"], ["a@b", "eth0"]]),
    "defaultHostIP": st.none() | HOST_IPS.filter(bool) | st.lists(HOST_IPS.filter(bool), min_size=1, max_size=2),
    "outgoingSourceV4": st.sampled_from([None, "container", "192.0.2.9"]),
    "outgoingSourceV6": st.sampled_from([None, "container", "2001:db8::9"])}
DOCUMENT = st.fixed_dictionaries({"name": st.sampled_from(["lab", "a.b-c_d"])}, optional={
    "cniVersion": st.sampled_from(["0.4.0", "1.1.0"]), "type": st.just("portmap"),
    "snat": st.sampled_from([True, False, None]), "masqAll": st.sampled_from([True, None]),
    "markMasqBit": st.sampled_from([0, 13, 31, 5.0, None]), "externalSetMarkChain": st.sampled_from([None, "X"]),
    "backend": st.sampled_from([None, "nftables", "iptables"]),
    **EXPOSURE,
    "hostPortInUse": st.sampled_from([None, "ignore", "refuse"]), "localhostIPv6": st.sampled_from([None, False]),
    "conditionsV4": CONDITIONS, "conditionsV6": CONDITIONS, "unknown": st.just([1]),
    "runtimeConfig": st.none() | st.fixed_dictionaries({}, optional={
        "portMappings": st.none() | st.lists(MAPPING | CAPITAL, max_size=3)}),
    "prevResult": RESULT, "cni.dev/valid-attachments": ATTACHMENTS, "cni.dev/attachments": ATTACHMENTS})

JUNK = st.sampled_from([None, True, False, 0, 1, -1, 13.5, 32, 65536, 1e308, float("inf"), 2 ** 80, "", "a", "80",
                        "tcp\n", "a\n", "1.2.3.4/33", "ip saddr 1.2.3.4; drop", "-p tcp", "\ud800", "é", [], [[]],
                        [None], [""], {}, {"": 1}, [{}], {"ip": 1}, [{"hostPort": 1}]]).map(copy.deepcopy)
NEW_KEYS = st.sampled_from(["gatewayModeV4", "defaultHostIP", "outgoingSourceV6", "trustedHostInterfaces",
                            "hostport", "HOSTIP", "Protocol", "hostPort\n", "containerPort ", "ip", "snat",
                            "markMasqBit", "externalSetMarkChain", "x"])


def places(value):
    """Each (container, key) in a document."""
    for key, inner in value.items() if type(value) is dict else enumerate(value) if type(value) is list else ():
        yield value, key
        yield from places(inner)


@st.composite
def documents(draw):
    document = copy.deepcopy(draw(DOCUMENT))
    for _ in range(draw(st.integers(0, 2))):
        inside, key = draw(st.sampled_from([*places(document), (document, "x")]))
        change = draw(st.sampled_from(["replace", "replace", "delete", "insert"]))
        if change == "replace":
            inside[key] = draw(JUNK)
        elif change == "delete" and key != "x":
            del inside[key]
        elif type(inside) is dict:
            inside[draw(NEW_KEYS)] = draw(JUNK)
    return document


def accepted(document):
    """Whether the parser takes the shape of a document; a refusal must name a place."""
    try:
        for parse in config.parse, config.parse_valid_attachments:
            explained(parse, cni.Request("STATUS", "1.1.0", {}, document, ""))
    except cni.CniError as error:
        assert_names_a_place(error)
        return False
    try:
        cni._version_of({key: (value, "") for key, value in document.items()})  # the protocol's part of the parser
    except cni.CniError as error:
        return error.code != cni.INVALID_CONFIG
    return True


def assert_names_a_place(error):
    """It is "invalid value for path: value", "expected ...", and the path begins with a key of the schema."""
    assert error.code == 7 and re.fullmatch(r"(?s)(invalid value for \S.*: .+|\S.*: missing)", error.msg), error.args
    path = error.args[0].removeprefix("invalid value for ")
    assert any(path.startswith((f"{key}:", f"{key}[", f"{key}.")) for key in SCHEMA["properties"]), error.args
    assert error.details.startswith("expected ") and "fits the schema" not in error.details, error.details


@hypothesis.settings(max_examples=1000)
@hypothesis.given(documents())
def test_same_documents(document):
    """Parser and schema accept the same documents."""
    violations = [*explain.violations(document)]
    assert accepted(document) == (not violations), violations


@hypothesis.given(DOCUMENT)
def test_generator(document):
    """The unmutated documents are valid, unless they contradict themselves; so the property above sees both kinds."""
    try:
        config.is_consistent(document)
    except cni.ConfigError:
        hypothesis.reject()
    hypothesis.assume(document.get("markMasqBit") is None or document.get("externalSetMarkChain") is None)
    assert accepted(document)


def test_schema_is_a_schema():
    """It is valid JSON Schema, and describes every property, because descriptions become error messages."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)

    def undescribed(schema, path):
        for name, inner in {**schema.get("properties", {}), **schema.get("patternProperties", {})}.items():
            meant = SCHEMA["definitions"][inner["$ref"].rpartition("/")[2]] if "$ref" in inner else inner
            if "description" not in meant:
                yield f"{path}.{name}"
            yield from undescribed(meant, f"{path}.{name}")
            yield from undescribed(meant.get("items", {}), f"{path}.{name}[]")
    assert [*undescribed(SCHEMA, "")] == []


@pytest.mark.parametrize("keys, path, value", [
    ({"snat": 1}, "snat", 1), ({"runtimeConfig": {"portMappings": [PORT, {**PORT, "HostIP": "x"}]}},
                               "runtimeConfig.portMappings[1].HostIP", "x"),
    ({"prevResult": {"ips": [{"address": "x"}]}}, "prevResult.ips[0].address", "x"), ({"name": "a b"}, "name", "a b"),
    ({"cni.dev/attachments": [{"containerID": "a", "ifname": 1}]}, "cni.dev/attachments[0].ifname", 1),
    ({"cni.dev/attachments": [{"containerID": "a"}]}, "cni.dev/attachments[0].ifname", None),
    ({"prevResult": {"ips": [{}]}}, "prevResult.ips[0].address", None),
    ({"prevResult": {"ip4": {"x": 1}}}, "prevResult.ip4.ip", None)])
def test_violation(keys, path, value):
    """The first violation is the deepest: its path, the value that is there, and what the schema says of it."""
    its_path, its_value, expected = next(explain.violations(configuration(**keys)))
    assert (its_path, its_value) == (path, value) and expected and "fits the schema" not in expected


@pytest.mark.parametrize("keys, message", [
    ({"backend": "x" * 77}, f'invalid value for backend: "{"x" * 77}"'),
    ({"backend": "x" * 78}, f'invalid value for backend: "{"x" * 75} ...'),
    ({"conditionsV4": ["ok", "a;b"]}, 'invalid value for conditionsV4[1]: "a;b"'),
    ({"markMasqBit": 1, "externalSetMarkChain": "X"}, 'invalid value for externalSetMarkChain: "X"')])
def test_message(keys, message):
    """The value at the path is shown, up to 80 letters of it."""
    with pytest.raises(cni.CniError) as caught:
        explained(config.parse, request(**keys))
    assert caught.value.args[0] == message


def test_without_jsonschema(monkeypatch):
    """A refusal names its path even if jsonschema is missing."""
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    with pytest.raises(cni.CniError, match=r"^invalid value for snat$"):
        explained(config.parse, request(snat=1))


def test_ordinary_validator():
    """An editor's validator, which knows none of our formats, accepts what is valid and catches a wrong type."""
    validator = jsonschema.Draft7Validator(SCHEMA)
    assert validator.is_valid(configuration(PORT, conditionsV4=["ip saddr 10.0.0.0/8"], prevResult=PREV_RESULT))
    assert not validator.is_valid(configuration({**PORT, "hostPort": "80"}))
