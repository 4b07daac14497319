"""A result in the form of another version: as libcni's own types convert it (pkg/types/020, 040, 100)."""
import json

import pytest
from helpers import configuration, respond

from cni_portmap import cni, plugin

VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
DNS = {"nameservers": ["10.0.0.1"], "domain": "example"}
ROUTES = [{"dst": "0.0.0.0/0"}, {"dst": "10.0.0.0/8", "gw": "10.88.0.9"}, {"dst": "::/0", "gw": "fd88::1"}]
MAC = {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/n"}
# One result as each form has it; `more`: a key that no version knows.
FORMS = {
    "0.2.0": {"ip4": {"ip": "10.88.0.2/16", "gateway": "10.88.0.1", "more": 1, "routes": ROUTES[:2]},
              "ip6": {"ip": "fd88::2/64", "routes": ROUTES[2:]}, "dns": DNS, "more": {"x": [1.5, None]}},
    "0.4.0": {"interfaces": [{"name": "cni0", "more": 1}, MAC],
              "ips": [{"version": "4", "address": "10.88.0.2/16", "gateway": "10.88.0.1", "interface": 1, "more": 1},
                      {"version": "6", "address": "fd88::2/64", "interface": 1}],
              "routes": ROUTES, "dns": DNS, "more": {"x": [1.5, None]}},
    "1.1.0": {"interfaces": [{"name": "cni0", "more": 1}, MAC],
              "ips": [{"address": "10.88.0.2/16", "gateway": "10.88.0.1", "interface": 1, "more": 1},
                      {"address": "fd88::2/64", "interface": 1}],
              "routes": ROUTES, "dns": DNS, "more": {"x": [1.5, None]}}}


def form(version):
    return {"0.1.0": "0.2.0", "0.2.0": "0.2.0", "1.0.0": "1.1.0", "1.1.0": "1.1.0"}.get(version, "0.4.0")


def converted(result, its, version):
    """ADD's result for a prevResult of the version `its` and a configuration of `version`."""
    given = {**configuration(), "cniVersion": version, "prevResult": {**result, "cniVersion": its}}
    status, document = respond("ADD", given)
    assert (status, document.pop("cniVersion", None)) == (0, version), document
    return document


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("its", VERSIONS)
def test_every_pair_of_versions(its, version):
    """The result has the form of the configuration's version, not its number alone (cni#862, cri-o#2026)."""
    expected = json.loads(json.dumps(FORMS[form(version)]))
    if form(its) == "0.2.0" != form(version):  # which had no interfaces
        del expected["interfaces"]
        for entry in expected["ips"]:
            del entry["interface"]
    assert converted(FORMS[form(its)], its, version) == expected


@pytest.mark.parametrize("its", [None, "", "0.0.0", "9.0.0", 1, []])
def test_no_known_version(its):
    """A result without a version that anybody knows is what the configuration's version says, as in libcni."""
    for version in VERSIONS:
        assert converted(FORMS["0.4.0"], its, version) == FORMS["0.4.0"]


def test_what_an_older_form_cannot_say():
    """0.4.0 has none of an interface's new keys; 0.2.0 has one address a family, and no routes but those of both."""
    interface = {**MAC, "mtu": 1500, "socketPath": "/s", "pciID": "0:1"}
    route = {"dst": "10.0.0.0/8", "gw": "10.88.0.1", "mtu": 1400, "table": 5}
    result = {"interfaces": [interface], "routes": [route, {"dst": "fd00::/8"}],
              "ips": [{"address": "10.88.0.2/16", "interface": 0}, {"address": "10.99.0.2/16", "interface": 0}]}
    assert converted(result, "1.1.0", "0.4.0") == {
        "interfaces": [MAC], "routes": result["routes"], "ips": [{**entry, "version": "4"} for entry in result["ips"]]}
    assert converted(result, "1.1.0", "0.2.0") == {
        "ip4": {"ip": "10.88.0.2/16", "routes": [{"dst": "10.0.0.0/8", "gw": "10.88.0.1"}]}}


@pytest.mark.parametrize("result", [{}, {"ips": None, "interfaces": None, "routes": None}, {"ips": [], "dns": {}},
                                    {"interfaces": [None, MAC], "routes": [None]}])
def test_little(result):
    """What is missing, null or empty is no error in any form."""
    for its in VERSIONS[2:]:
        for version in VERSIONS:
            converted(result, its, version)


@pytest.mark.parametrize("result, path", [
    *(({"routes": routes}, "prevResult.routes") for routes in ({}, [1], [{}], [{"dst": "x"}])),
    ({"more": float("1e400")}, "prevResult")])
def test_malformed(result, path):
    """What cannot be converted is code 7, and names the place."""
    raw = json.dumps({**configuration(), "cniVersion": "0.2.0", "prevResult": {**result, "cniVersion": "1.0.0"}})
    status, document = respond("ADD", raw.replace("Infinity", "1e400").encode())
    assert (status, document["code"]) == (1, 7) and path in document["msg"]


def test_same_version():
    """Where the versions are equal, the result is the text that came."""
    raw = '{ "cniVersion" : "1.0.0",\n "a": 1.10 }'
    request = cni.Request("ADD", "1.0.0", {}, {"prevResult": json.loads(raw)}, raw)
    assert plugin._result(request) == raw
