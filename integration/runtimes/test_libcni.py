"""libcni's own types: what they make of a result, in every pair of versions, and what this plugin does."""
import json
import os

import lab
import pytest
from cni_portmap.plugin import FORMS
from cni_portmap.result import convert
from lab.machine import UNPACKED

PROGRAM = """
package main

import (
	"encoding/json"
	"os"

	"github.com/containernetworking/cni/pkg/types/create"
)

func main() {
	questions, answers := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	for {
		var question struct {
			From, To string
			Result   json.RawMessage
		}
		if questions.Decode(&question) != nil {
			return
		}
		result, err := create.Create(question.From, question.Result)
		if err == nil {
			result, err = result.GetAsVersion(question.To)
		}
		if err != nil {
			answers.Encode(map[string]string{"error": err.Error()})
		} else {
			answers.Encode(result)
		}
	}
}
"""
MAC = "02:00:00:00:00:01"
ROUTES = [{"dst": "0.0.0.0/0", "gw": "10.88.0.1"}, {"dst": "10.9.0.0/16"}, {"dst": "::/0", "gw": "fd88::1"}]
INTERFACES = [{"name": "cni0", "mac": MAC}, {"name": "eth0", "mac": MAC, "sandbox": "/run/netns/x"}]
FOUR = {"address": "10.88.0.2/16", "gateway": "10.88.0.1", "interface": 1}
SIX = {"address": "fd88::2/64", "gateway": "fd88::1", "interface": 1}
RESULTS = {  # by form
    "0.2.0": [{"ip4": {"ip": "10.88.0.2/16", "gateway": "10.88.0.1", "routes": ROUTES[:2]},
               "ip6": {"ip": "fd88::2/64", "routes": ROUTES[2:]}, "dns": {"nameservers": ["10.0.0.1"]}},
              {"ip4": {"ip": "10.88.0.2/16"}}, {"ip6": {"ip": "fd88::2/64", "gateway": "fd88::1"}}],
    "1.1.0": [{"interfaces": INTERFACES, "ips": [FOUR, SIX], "routes": ROUTES, "dns": {"domain": "x.example"}},
              {"ips": [{"address": "10.88.0.2/16"}]}, {"interfaces": INTERFACES, "ips": [SIX]},
              {"ips": [FOUR, {"address": "10.99.0.2/16"}, SIX, {"address": "fd99::2/64"}], "routes": ROUTES[:1]}]}
RESULTS["0.4.0"] = [{**result, "ips": [{**ip, "version": "6" if ":" in str(ip["address"]) else "4"}
                                       for ip in result["ips"]]} for result in RESULTS["1.1.0"]]
CASES = [(its, version, result) for its in FORMS for version in FORMS for result in RESULTS[FORMS[its]]]


def bare(value):
    """A document without what is null or empty."""
    if isinstance(value, dict):
        return {key: inner for key, item in value.items() if (inner := bare(item)) not in (None, {}, [], "")}
    return [bare(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def libcni(need, tmp_path_factory):
    """A program that converts results, built from the distribution's source of libcni."""
    go = UNPACKED / "go/usr/lib/go-1.24/bin/go"
    need(go, UNPACKED / "cnitool-1.3")
    folder = tmp_path_factory.mktemp("libcni")
    source = folder / "src/github.com/containernetworking/cni"
    source.parent.mkdir(parents=True)
    source.symlink_to(UNPACKED / "cnitool-1.3")
    (folder / "convert.go").write_text(PROGRAM)
    lab.run("env", "GO111MODULE=off", "CGO_ENABLED=0", "GOFLAGS=", f"GOPATH={folder}", f"GOCACHE={UNPACKED}/go-cache",
            f"HOME={os.environ.get('HOME', '/root')}", go, "build", "-o", folder / "convert", folder / "convert.go",
            timeout=900)
    return folder / "convert"


def test_results_are_converted_as_libcni_does(libcni):
    """Each result, from each version to each other."""
    questions = [{"from": its, "to": version, "result": {**result, "cniVersion": its}}
                 for its, version, result in CASES]
    answers = lab.run(libcni, input="".join(map(json.dumps, questions))).splitlines()
    assert len(answers) == len(CASES)
    differences = []
    for (its, version, result), question, answer in zip(CASES, questions, answers, strict=True):
        ours = json.loads(convert(json.dumps(question["result"]), FORMS[its], FORMS[version], version))
        if bare(ours) != bare(json.loads(answer)):
            differences.append((its, version, result, ours, json.loads(answer)))
    assert not differences, f"{len(differences)} of {len(CASES)}: {differences[0]}"
