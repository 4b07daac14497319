"""Calls of real runtimes, replayed: each line of captures/*.jsonl is one call (label, env, stdin) of portmap."""
import contextlib
import json
import pathlib
import re

import pytest
from helpers import RecordingKernel, respond

from cni_portmap import cni, config, ruleset

CALLS = [(path.stem, number, json.loads(line))
         for path in sorted(pathlib.Path(__file__).parent.glob("captures/*.jsonl"))
         for number, line in enumerate(path.read_text().splitlines(), 1)]


def mappings(call):
    """The ports that a call asks for: (protocol, hostIP, hostPort, containerPort)."""
    found = (json.loads(call["stdin"]).get("runtimeConfig") or {}).get("portMappings") or []
    lower = [{key.lower(): value for key, value in mapping.items()} for mapping in found]
    return [(each.get("protocol", "tcp"), each.get("hostip", ""), each["hostport"], each["containerport"])
            for each in lower]


def families(call):
    """The families that the container has an address of, on the interface that the call is about."""
    result = json.loads(call["stdin"])["prevResult"]
    return {6 if ":" in each["address"] else 4 for each in result.get("ips", ())
            if result["interfaces"][each["interface"]]["name"] == call["env"]["CNI_IFNAME"]}


def first_of_key(ip, families):
    """What a port's map elements begin with: the host's address, or the families that it stands for."""
    every = {"": (4, 6), "0.0.0.0": (4,), "::": (6,)}
    return [f"ipv{family}" for family in every[ip] if family in families] if ip in every else \
        [ip] if (6 if ":" in ip else 4) in families else []


def full(call):
    """A kernel that holds what this call's ADD would have written, and pictures of it that are all alike."""
    environ, given = call["env"], json.loads(call["stdin"])
    previous = json.dumps(given["prevResult"]) if given.get("prevResult") else ""
    request = cni.Request("ADD" if previous else "DEL", given["cniVersion"], environ, given, previous)
    chain = ruleset.chain_of(environ["CNI_CONTAINERID"], environ["CNI_IFNAME"])
    table = dict.fromkeys([(ruleset.map_of(port), ruleset.key_of(port)) for port in config.parse(request).ports], chain)
    kernel = RecordingKernel(
        has_chain=True, lookup=lambda wanted: {each: chain for each in wanted if each in table}, references=len(table),
        snapshot=["hook"], owned_elements=lambda chains: [(each, chain) for each in table if chain in chains],
        targets=lambda chains: {each: set() for each in chains}, owner=lambda its_chain: ruleset.Owner(its_chain, ""))
    kernel.answers["empty_namespace"] = lambda: contextlib.nullcontext(RecordingKernel(snapshot=["hook"]))
    return kernel, table


@pytest.mark.parametrize("file, number, call", CALLS,
                         ids=[f"{file}:{number}:{call['label']}" for file, number, call in CALLS])
def test_replay(file, number, call):
    """Each is answered as it should be: with the result, the versions, or nothing; and does what its ports ask for."""
    verb, given = call["env"]["CNI_COMMAND"], json.loads(call["stdin"])
    environ = {key: value for key, value in call["env"].items() if key != "CNI_COMMAND"}
    kernel, table = full(call) if verb in ("DEL", "CHECK") else (RecordingKernel(), {})
    status, document = respond(verb, call["stdin"].encode(), kernel, environ=environ)
    assert status == 0, document
    if verb == "VERSION":
        assert document == {"cniVersion": given["cniVersion"], "supportedVersions": list(cni.VERSIONS)}
        assert kernel.calls == []
    elif verb == "ADD":
        assert document == given["prevResult"]
        published = set(re.findall(r"(?:ipv[46]|[0-9.]+|[0-9a-f:]+) \. \w+ \. \d+(?= : goto)", "".join(kernel.written)))
        assert published == {f"{first} . {protocol} . {port}" for protocol, ip, port, _ in mappings(call)
                             for first in first_of_key(ip, families(call))}
        assert bool(kernel.calls) == bool(published)
    else:
        assert document is None
        assert len(kernel.written) == (verb == "DEL")
        assert all(f"delete element inet cni_portmap {name}" in text for text in kernel.written for name, _ in table)


def test_all_verbs():
    """The captures are whole: every verb and every client is among them."""
    assert {call["env"]["CNI_COMMAND"] for _, _, call in CALLS} == {"ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"}
    assert {file.rpartition("-")[0] for file, _, _ in CALLS} == {
        "buildah", "chains", "cnitool", "containerd", "crio", "kubelet", "nerdctl", "podman", "podman-rootless"}
