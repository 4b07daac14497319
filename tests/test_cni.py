"""The protocol: verbs, variables, versions, error codes, results; in memory, then as a process."""
import json
import os
import pathlib
import subprocess
import time

import hypothesis
import hypothesis.strategies as st
import pytest
from helpers import PORT, PREV_RESULT, ROOT, VARIABLES, RecordingKernel, configuration, respond

from cni_portmap import cni

VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
OLDEST = {"ADD": "0.1.0", "DEL": "0.1.0", "CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
NEEDS = {"ADD": ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"], "CHECK": ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
         "DEL": ["CNI_CONTAINERID", "CNI_IFNAME"], "GC": [], "STATUS": []}


def call(verb, stdin=b'{"name":"lab","cniVersion":"1.1.0"}', **variables):
    """Exit status and document of a call whose handlers answer with their verb; a variable that is None is unset."""
    environ = {"CNI_COMMAND": verb, **VARIABLES, **variables}
    handlers = {name: lambda request, name=name: json.dumps({"handled": name}) for name in OLDEST}
    status, document = cni.respond(handlers, {key: value for key, value in environ.items() if value is not None},
                                   lambda: stdin)
    return status, json.loads(document)


# --- verbs, variables, versions -------------------------------------------------------------------------------

@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("verb", OLDEST)
def test_version(verb, version):
    """A verb answers from the version on that brought it, and is code 1 before."""
    status, document = call(verb, json.dumps({"name": "lab", "cniVersion": version}).encode())
    if VERSIONS.index(version) >= VERSIONS.index(OLDEST[verb]):
        assert (status, document) == (0, {"handled": verb})
    else:
        assert (status, document["code"], document["cniVersion"]) == (1, 1, version)
        assert verb in document["msg"] and OLDEST[verb] in document["msg"]


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("variable", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"])
@pytest.mark.parametrize("verb", OLDEST)
def test_missing_variable(verb, variable, value):
    """A variable that the verb needs may be neither missing nor empty; one that it doesn't need may be."""
    status, document = call(verb, **{variable: value})
    if variable in NEEDS[verb]:
        assert (status, document["code"]) == (1, 4) and variable in document["msg"]
    else:
        assert (status, document) == (0, {"handled": verb})


def test_missing_variables():
    """All missing variables are named at once."""
    _, document = call("ADD", CNI_CONTAINERID=None, CNI_NETNS=None, CNI_IFNAME=None)
    assert all(name in document["msg"] for name in NEEDS["ADD"])


BAD = [("CNI_CONTAINERID", value) for value in
       ["-a", ".a", "_a", "a b", "a/b", "a;b", "a\nb", "a\n", "a{", "a#", 'a"', "é", "a\u0660", "a\0", " ", "$a",
        "a@b"]]
BAD += [("CNI_IFNAME", value) for value in
        [".", "..", "a/b", "a:b", "a b", "a\tb", "a\n", "0123456789abcdef", "a;b", "a{b", 'a"b', "a#b", "é", "a\0",
         "a\\b", "a'b", "a$b", "a*"]]
BAD += [("CNI_NETNS", "/run/netns/a\0b")]


@pytest.mark.parametrize("verb", OLDEST)
@pytest.mark.parametrize("variable, value", BAD)
def test_bad_variable(verb, variable, value):
    """A bad value is code 4, names the variable and shows the value; who doesn't need it doesn't read it."""
    status, document = call(verb, **{variable: value})
    if variable in NEEDS[verb]:
        assert (status, document["code"]) == (1, 4)
        assert document["msg"].startswith(f"invalid value for {variable}: ")
        assert repr(value) in document["msg"] and document["details"]
    else:
        assert status == 0


@pytest.mark.parametrize("variable, value", [
    *(("CNI_CONTAINERID", value) for value in ["a", "0", "A_b.c-d", "a" * 300]),
    *(("CNI_IFNAME", value) for value in ["e", "eth0", "0123456789abcde", "...", "a.b", "eth0.100", "a@b", "a+b~c=d,e",
                                          "-a"]),
    *(("CNI_NETNS", value) for value in ["/", "relative", "/run/netns/a b;c\n\"é", "x" * 5000])])
def test_good_variable(variable, value):
    """Values that the specification and the kernel allow are accepted."""
    assert call("ADD", **{variable: value}) == (0, {"handled": "ADD"})


@pytest.mark.parametrize("verb", ["", "add", "ADD ", "PING", "ADD\n", "Ä"])
def test_unknown_command(verb):
    """An unknown command is code 4, and names the variable."""
    status, document = call(verb)
    assert (status, document["code"]) == (1, 4) and "CNI_COMMAND" in document["msg"]


def test_both_wrong():
    """With a bad environment and bad input the environment is what is named, in the input's version if it has one."""
    assert call("ADD", b"", CNI_IFNAME="")[1]["code"] == 4
    _, document = call("ADD", b'{"cniVersion":"0.4.0"}', CNI_IFNAME="")
    assert (document["code"], document["cniVersion"]) == (4, "0.4.0")


@pytest.mark.parametrize("version", ["9.9.9", "1.0", "01.0.0", "1.0.0 ", "2.0.0", "latest"])
def test_unsupported_version(version):
    """A version that nobody knows is code 1, answered in the newest that we know."""
    status, document = call("ADD", json.dumps({"cniVersion": version}).encode())
    assert (status, document["code"], document["cniVersion"]) == (1, 1, "1.1.0")
    assert all(known in document["details"] for known in VERSIONS)


@pytest.mark.parametrize("version", [1, 1.0, True, [], {}, ["1.0.0"]])
def test_version_of_wrong_type(version):
    """A version that is no text is code 7 and names the key."""
    status, document = call("ADD", json.dumps({"cniVersion": version}).encode())
    assert (status, document["code"]) == (1, 7) and "cniVersion" in document["msg"]


@pytest.mark.parametrize("stdin", [b"{}", b'{"cniVersion":""}', b'{"cniVersion":null}'])
def test_no_version(stdin):
    """No version, or an empty one as libcni injects it for a conflist without, means 0.1.0."""
    assert call("ADD", stdin) == (0, {"handled": "ADD"})
    _, document = call("CHECK", stdin)
    assert (document["code"], document["cniVersion"]) == (1, "0.1.0")


@pytest.mark.parametrize("variables", [
    {}, {"CNI_CONTAINERID": "", "CNI_IFNAME": "dummy", "CNI_NETNS": "dummy"},
    {"CNI_CONTAINERID": ";", "CNI_IFNAME": "/" * 50, "CNI_NETNS": "\0"},
    dict.fromkeys(["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"])])
@pytest.mark.parametrize("stdin, version", [
    *((json.dumps({"cniVersion": version}).encode(), version) for version in VERSIONS),
    (b"{}", "0.1.0"), (b"", "1.1.0"), (b"\xff", "1.1.0"), (b"[]", "1.1.0"), (b'{"cniVersion":"7"}', "1.1.0"),
    (b'{"cniVersion":7}', "1.1.0")])
def test_version_verb(stdin, version, variables):
    """VERSION echoes a version that it knows, lists all, and minds no other variable (podman sends dummies)."""
    assert call("VERSION", stdin, **variables) == (0, {"cniVersion": version, "supportedVersions": VERSIONS})


# --- input ----------------------------------------------------------------------------------------------------

UNDECODABLE = {
    "empty": b"", "blank": b" \n", "array": b"[]", "text": b'"a"', "number": b"1", "null": b"null", "true": b"true",
    "cut": b'{"a":', "cut-key": b'{"a', "cut-after-key": b'{"a"', "cut-after-comma": b'{"a":1,', "open": b"{",
    "no-colon": b'{"a" 1}', "no-value": b'{"a":}', "no-comma": b'{"a":1 "b":2}', "two-commas": b'{"a":1,,"b":2}',
    "trailing-comma": b'{"a":1,}', "key-number": b'{1:2}', "key-array": b'{[]:2}', "bare-key": b"{a:1}",
    "quote": b"{'a':1}", "comment": b'{"a":1} // b', "two": b"{}{}", "brace": b"{}}", "text-after": b"{} x",
    "nul-after": b"{}\0", "nul": b"\0", "utf8": b'{"a":"\xff"}', "utf8-cut": b'{"a":"\xc3',
    "utf8-surrogate": b'{"a":"\xed\xa0\x80"}', "utf16": "{}".encode("utf-16"), "bom": b"\xef\xbb\xbf{}",
    "nan": b'{"a":NaN}', "infinity": b'{"a":Infinity}', "minus-infinity": b'{"a":[-Infinity]}',
    "control": b'{"a":"\n"}', "escape": b'{"a":"\\x"}', "cut-escape": b'{"a":"\\u12"}', "zeros": b'{"a":01}',
    "plus": b'{"a":+1}', "half": b'{"a":1.}', "deep": b'{"a":' + b"[" * 100_000,
    "deep-closed": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "deep-objects": b'{"a":' * 50_000,
    "huge-integer": b'{"a":' + b"9" * 10_000 + b"}"}


@pytest.mark.parametrize("stdin", UNDECODABLE.values(), ids=UNDECODABLE)
@pytest.mark.parametrize("verb", OLDEST)
def test_undecodable(verb, stdin):
    """Input that is not one JSON object is code 6, in one document."""
    status, document = call(verb, stdin)
    assert (status, document["code"], document["cniVersion"]) == (1, 6, "1.1.0")
    assert set(document) == {"cniVersion", "code", "msg", "details"}


@pytest.mark.parametrize("stdin, expected", [
    (b' {\t"a" :\r\n1 , "b":[ ] } \n', {"a": 1, "b": []}), (b"{}", {}),
    (b'{"a":1,"a":2}', {"a": 2}),
    (b'{"a":{"b":"\\ud83d\\ude00\xf0\x9f\x98\x80"}}', {"a": {"b": "😀😀"}}),
    (b'{"a":"\\ud800","\\udfff":1}', {"a": "\ud800", "\udfff": 1}), (b'{"a\\u0000":"\\u0000"}', {"a\0": "\0"}),
    (b'{"a":-1e-5,"b":12345678901234567890}', {"a": -1e-5, "b": 12345678901234567890}),
    (b'{"a":1e999}', {"a": float("inf")})])
def test_decodable(stdin, expected):
    """Valid JSON (RFC 8259) is read as the json module reads it; of duplicate keys the last counts, as in Go."""
    found = cni.members(stdin.decode())
    assert {key: value for key, (value, _) in found.items()} == expected == json.loads(stdin)
    assert all(json.loads(raw) == value for value, raw in found.values())


# Whatever comes, with whatever verb: these are the plugin's own handlers, so the parser is tried as well.

ODD_VALUES = ["null", "true", "0", "-1", "1e400", "-0.0", "9" * 4000, '"\\ud800"', '"\\u0000"', '"a\\nb"',
              "[" * 900 + "]" * 900, '{"a":' * 200 + "1" + "}" * 200, "[null]", "[[]]", "[{}]", '[""]', "{}", '""',
              '"é"', '{"portMappings":[{}]}', '{"ips":[{}]}']
KEYS = ["cniVersion", "name", "runtimeConfig", "prevResult", "snat", "masqAll", "markMasqBit", "externalSetMarkChain",
        "backend", "conditionsV4", "conditionsV6", "hostPortInUse", "localhostIPv6", "cni.dev/valid-attachments",
        "cni.dev/attachments", "unknown"]


def assert_refused_or_done(status, document):
    assert status in (0, 1) and (document is None or type(document) is dict)
    if status:
        assert set(document) == {"cniVersion", "code", "msg", "details"} and document["code"] != 99, document
        assert "Traceback" not in document["msg"] + document["details"] and "\n" not in document["msg"]


@pytest.mark.parametrize("verb", OLDEST)
@pytest.mark.parametrize("key", KEYS)
def test_odd_values(verb, key):
    """No value of any key breaks a verb."""
    for value in ODD_VALUES:
        members = {name: json.dumps(content) for name, content in configuration(PORT).items()} | {key: value}
        stdin = "{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}"
        assert_refused_or_done(*respond(verb, stdin.encode(), RecordingKernel()))


@pytest.mark.parametrize("key", ["snat", "prevResult"])
def test_depth(key):
    """What is nested just less deeply than the scanner takes is too deep for who converts or explains it: code 6."""
    codes = set()
    for depth in (*range(500, 1000), 100_000):  # a later Python has another limit
        value = "[" * depth + "]" * depth
        value = f'{{"cniVersion":"0.4.0","ips":[],"x":{value}}}' if key == "prevResult" else value
        status, document = respond("ADD", f'{{"cniVersion":"1.0.0","name":"lab","{key}":{value}}}'.encode())
        codes.add(document["code"] if status else 0)
    assert codes == {7 if key == "snat" else 0, 6}


@hypothesis.given(st.binary(max_size=40) | st.text(alphabet='{}[]":,\\u0aeE-+. \n', max_size=40).map(str.encode),
                  st.sampled_from([*OLDEST, "VERSION"]))
def test_any_bytes(stdin, verb):
    """Any bytes get one document or success."""
    assert_refused_or_done(*respond(verb, stdin, RecordingKernel()))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda children: st.lists(children) |
                    st.dictionaries(st.sampled_from(KEYS) | st.text(), children), max_leaves=10)


@hypothesis.given(st.dictionaries(st.sampled_from(KEYS) | st.text(), JSON), st.sampled_from([*OLDEST, "VERSION"]))
def test_any_object(document, verb):
    """Any object gets one document or success."""
    assert_refused_or_done(*respond(verb, {"cniVersion": "1.1.0", "name": "lab", **document}, RecordingKernel()))


def test_failing_handler():
    """A fault of our own is code 99, in one document that says where, and no traceback."""
    def fail(request):
        raise RuntimeError("two\nlines")
    environ = {"CNI_COMMAND": "ADD", **VARIABLES}
    status, document = cni.respond({"ADD": fail}, environ, lambda: b'{"cniVersion":"0.4.0"}')
    found = json.loads(document)
    assert (status, found["code"], found["cniVersion"]) == (1, 99, "0.4.0") and "test_cni.py" in found["details"]


@pytest.mark.parametrize("error, msg", [
    (OSError(24, "Too many open files"), "the system: Too many open files"),
    (OSError(2, "No such file or directory", "/proc/x"), "/proc/x: No such file or directory"),
    (OSError("no interface with this name"), "the system: no interface with this name")], ids=str)
def test_what_the_system_refuses(error, msg):
    """It is code 5 with the system's own words, also those that come without a number."""
    def fail(request):
        raise error
    status, document = cni.respond({"ADD": fail}, {"CNI_COMMAND": "ADD", **VARIABLES}, lambda: b"{}")
    assert (status, json.loads(document)["code"], json.loads(document)["msg"]) == (1, 5, msg)


@pytest.mark.parametrize("error", [MemoryError(), SystemError("error return without exception set")])
def test_too_little_memory(error):
    """It is the system's fault, not the plugin's."""
    def fail(request):
        raise error
    status, document = cni.respond({"ADD": fail}, {"CNI_COMMAND": "ADD", **VARIABLES}, lambda: b"{}")
    assert (status, json.loads(document)["code"]) == (1, 5) and "memory" in document


@pytest.mark.parametrize("error", [MemoryError(), SystemError("error return without exception set")])
def test_too_little_memory_for_an_answer(monkeypatch, error):
    """Where the answer itself takes more than there is, one is ready."""
    def fail(*_):
        raise error
    read_end, write_end = os.pipe()
    monkeypatch.setattr(cni, "respond", fail)
    monkeypatch.setattr(cni.posix, "environ", {b"CNI_COMMAND": b"VERSION"})
    monkeypatch.setattr(cni, "name_process", lambda verb: None)
    monkeypatch.setattr(cni.posix, "write", lambda fd, data, write=os.write: write(write_end if fd == 1 else fd, data))
    try:
        assert cni.serve({}, "") == 1
        assert json.loads(os.read(read_end, 4096))["code"] == 5
    finally:
        cni._answering.pop("process", None)
        os.close(read_end)
        os.close(write_end)


# --- results --------------------------------------------------------------------------------------------------

RESULTS = {
    "0.1.0": {"ip4": {"ip": "10.88.0.2/16", "gateway": "10.88.0.1", "routes": [{"dst": "0.0.0.0/0"}]}, "dns": {}},
    "0.2.0": {"ip4": {"ip": "10.88.0.2/16"}, "ip6": {"ip": "fd88::2/64", "routes": [{"dst": "::/0", "gw": "fd88::1"}]}},
    "0.3.0": {"interfaces": [{"name": "eth0", "sandbox": "/n"}],
              "ips": [{"version": "4", "address": "10.88.0.2/16", "interface": 0}]},
    "0.3.1": {"ips": [{"version": "6", "address": "fd88::2/64"}], "routes": [], "dns": {"nameservers": ["10.0.0.1"]}},
    "0.4.0": {**PREV_RESULT, "ips": [{"version": "4", "address": "10.88.0.2/16", "interface": 1, "gateway": None}]},
    "1.0.0": {**PREV_RESULT, "unknown": {"": [1, None, {"ü": "\ud800\0\\\"/"}]}, "ip4": None},
    "1.1.0": {**PREV_RESULT, "interfaces": [{"name": "eth0", "mtu": 1500, "socketPath": "/s", "pciID": "0:1"}],
              "routes": [{"dst": "0.0.0.0/0", "mtu": 1400, "advmss": 1360, "priority": 100, "table": 5, "scope": 0}]}}


@pytest.mark.parametrize("ports", [(), (PORT,)], ids=["no-ports", "a-port"])
@pytest.mark.parametrize("version", VERSIONS)
def test_result(version, ports):
    """ADD's result is prevResult with every field, in the configuration's version."""
    given = {**configuration(*ports), "cniVersion": version, "prevResult": {"cniVersion": "0.0.0", **RESULTS[version]}}
    status, document = respond("ADD", given, RecordingKernel() if ports else None)
    assert (status, document) == (0, {**RESULTS[version], "cniVersion": version})


def test_result_as_text():
    """Numbers and escapes leave as they came: no integer is rounded, no float is rewritten."""
    raw = r'{ "a" : 12345678901234567890123 , "b":1.10,"c":1E400,"d":"\u00e9é\/\ud800", "cniVersion":0,"f\n":[ 1.0 ]}'
    out = r'{"cniVersion":"1.0.0","a":12345678901234567890123,"b":1.10,"c":1E400,"d":"\u00e9é\/\ud800","f\n":[ 1.0 ]}'
    assert cni.with_version(raw, "1.0.0") == out


# --- the process ----------------------------------------------------------------------------------------------

NO_PORTS = json.dumps(configuration())
PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"


def run(executable, stdin, *variables, shell='exec "$0"', cwd=None):
    """Start the plugin from a shell, with an environment that has nothing else."""
    environ = dict(variable.split("=", 1) for variable in (PATH, *variables))
    return subprocess.run(["/bin/sh", "-c", shell, executable], input=stdin.encode(), capture_output=True, env=environ,
                          cwd=cwd, timeout=60, check=False)


ADD = ["CNI_COMMAND=ADD", *(f"{name}={value}" for name, value in VARIABLES.items())]
ENVIRON = dict(variable.split("=", 1) for variable in (PATH, *ADD))


def test_process(executable):
    """An empty environment but PATH is enough; the result is one line, and nothing is logged."""
    done = run(executable, NO_PORTS, *ADD)
    assert (done.returncode, done.stderr, done.stdout[-1:], done.stdout.count(b"\n")) == (0, b"", b"\n", 1)
    assert json.loads(done.stdout) == PREV_RESULT


def test_process_about(executable):
    """Without CNI_COMMAND it says what it is, on stderr."""
    done = run(executable, "")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"cni-portmap" in done.stderr and b"1.1.0" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("stdin, variables, code", [
    ("", ADD, 6), ("{", ADD, 6), (NO_PORTS, ["CNI_COMMAND=ADD"], 4), (NO_PORTS, ["CNI_COMMAND=nonsense"], 4),
    (NO_PORTS, ["CNI_COMMAND="], 4), ('{"cniVersion":"9.0.0"}', ADD, 1), ('{"cniVersion":"1.0.0","name":"a"}', ADD, 7),
    ('{"cniVersion":"1.0.0","name":"a","snat":1}', ADD, 7)])
def test_process_refuses(executable, stdin, variables, code):
    """A refusal is one document on stdout and a status of its own, with nothing else anywhere."""
    done = run(executable, stdin, *variables)
    assert (done.returncode, json.loads(done.stdout)["code"], done.stderr) == (1, code, b"")


@pytest.mark.parametrize("stdin", UNDECODABLE.values(), ids=UNDECODABLE)
def test_process_undecodable(executable, stdin):
    """A process of its own, where the json module is not loaded: Python 3.11's scanner then has no words (code 99)."""
    done = subprocess.run([executable], input=stdin, capture_output=True, env=ENVIRON, timeout=60, check=False)
    document = json.loads(done.stdout)
    assert (done.returncode, document["code"], done.stderr) == (1, 6, b"") and len(document["msg"]) > 40


@pytest.mark.parametrize("stdin", ['{"name":"lab","cniVersion":"1.1.0","a":{"b" 1}}', '{"a":{"x":1,}}', '{"a":["x}'])
def test_process_malformed_inside(executable, stdin):
    """VERSION minds no malformed value, and other verbs say where it is."""
    version = {**ENVIRON, "CNI_COMMAND": "VERSION"}
    done = subprocess.run([executable], input=stdin.encode(), capture_output=True, env=version, timeout=60, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["supportedVersions"] == VERSIONS
    done = subprocess.run([executable], input=stdin.encode(), capture_output=True, env=ENVIRON, timeout=60, check=False)
    document = json.loads(done.stdout)
    assert document["code"] == 6 and "(char " in document["msg"], document


def test_process_without_end(executable):
    """Standard input that never ends does not fill the memory."""
    with open("/dev/zero", "rb") as zero:
        done = subprocess.run([executable], stdin=zero, capture_output=True, env=ENVIRON, timeout=60, check=False)
    document = json.loads(done.stdout)
    assert (done.returncode, document["code"]) == (1, 6) and "32 MiB" in document["msg"]


def test_process_all_ports(executable):
    """A mapping of each port, and 5 MB of args, are less than the limit."""
    given = configuration(*({"hostPort": port, "containerPort": port} for port in range(1, 65536)),
                          args={"x": "y" * 5_000_000})
    done = subprocess.run([executable], input=json.dumps(given).encode(), capture_output=True, timeout=60, check=False,
                          env={**ENVIRON, "CNI_COMMAND": "STATUS", "CNI_NETNS": ""})
    document = json.loads(done.stdout or "{}")
    assert document.get("code") in (None, 50), document  # it was read; without root there is no nftables


def test_process_version(executable):
    """VERSION with podman's dummies."""
    done = run(executable, '{"cniVersion":"1.0.0"}', "CNI_COMMAND=VERSION", "CNI_CONTAINERID=", "CNI_IFNAME=dummy",
               "CNI_NETNS=dummy", "CNI_ARGS=")
    assert json.loads(done.stdout) == {"cniVersion": "1.0.0", "supportedVersions": VERSIONS}
    assert (done.returncode, done.stderr) == (0, b"")


def test_process_odd_environment(executable, tmp_path):
    """No variable and no folder lends it code, and bytes that are no text are a bad value like any other."""
    for name in "cni_portmap", "posix", "json", "sitecustomize", "usercustomize":
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)")
    done = run(executable, NO_PORTS, *ADD, f"PYTHONPATH={tmp_path}", f"PYTHONSTARTUP={tmp_path}/json.py",
               "PYTHONINSPECT=1", f"PYTHONHOME={tmp_path}", f"HOME={tmp_path}", "LANG=xx", "LC_ALL=xx", "PYTHONUTF8=0",
               cwd=tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (0, PREV_RESULT)
    done = run(executable, NO_PORTS, *ADD, shell="CNI_IFNAME=$(printf 'a\\377') exec \"$0\"")
    assert json.loads(done.stdout)["code"] == 4


@pytest.mark.parametrize("shell, status, code", [
    ('exec "$0" <&-', 1, 5), ('exec "$0" 0>/dev/null', 1, 5), ('exec "$0" >&-', 5, None),
    ('exec "$0" >/dev/full', 5, None), ('exec "$0" 2>&-', 0, None), ('exec "$0" 2>/dev/full', 0, None)])
def test_process_closed(executable, shell, status, code):
    """Closed, unreadable or full standard streams are code or status 5, and a log that nobody reads is no error."""
    warned = json.dumps({**configuration(), "backend": "iptables"})
    done = run(executable, warned, *ADD, shell=shell)
    assert done.returncode == status and b"Traceback" not in done.stderr
    if code:
        assert json.loads(done.stdout)["code"] == code
    elif not status:
        assert json.loads(done.stdout) == PREV_RESULT


def test_process_large(executable):
    """A megabyte passes in pieces, both ways."""
    given = configuration(prevResult={**PREV_RESULT, "unknown": ["x" * 1000] * 1000})
    done = run(executable, json.dumps(given), *ADD)
    assert json.loads(done.stdout) == {**given["prevResult"], "cniVersion": "1.1.0"}


def test_process_reads_to_the_end(executable):
    """Standard input that comes in pieces is read until it ends."""
    with subprocess.Popen([executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=dict(variable.split("=", 1) for variable in (PATH, *ADD))) as process:
        for at in range(0, len(NO_PORTS), 100):
            os.write(process.stdin.fileno(), NO_PORTS[at:at + 100].encode())
        process.stdin.close()
        assert json.loads(process.stdout.read()) == PREV_RESULT


def test_launcher(executable):
    """The launcher names the distribution's interpreter, isolated and without site."""
    assert pathlib.Path(executable).read_text().splitlines()[0] == "#!/usr/bin/python3 -IS"


def test_launcher_without_the_package(executable, tmp_path):
    """What cannot be loaded, for lack of memory or of files, is one document, too, and no traceback."""
    launcher = tmp_path / "portmap"
    launcher.write_text(pathlib.Path(executable).read_text().replace(str(ROOT), str(tmp_path)))
    launcher.chmod(0o755)
    done = run(launcher, NO_PORTS, *ADD)
    assert (done.returncode, done.stderr, json.loads(done.stdout)["code"]) == (1, b"", 5)


@pytest.mark.parametrize("verb", cni.VERBS)
def test_process_name(executable, verb):
    """The kernel names the process that made a transaction, so the agent knows a call of ours. Linux keeps 15 bytes."""
    with subprocess.Popen([executable], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env={**ENVIRON, "CNI_COMMAND": verb}) as process:
        comm, ends = pathlib.Path(f"/proc/{process.pid}/comm"), time.monotonic() + 30
        while (name := comm.read_text()) != f"cni-portmap/{verb}"[:15] + "\n":
            assert time.monotonic() < ends, name
        process.stdin.close()
        process.stdout.read()
