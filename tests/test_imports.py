"""The import budget: which modules a call loads beyond the bare interpreter, as exact lists; time is the benchmark's.

Calls that need a kernel get one of their own, in private namespaces. That needs no root where the system lets users
make namespaces; where it does not, these tests are skipped.
"""
import ast
import json
import os
import pathlib
import subprocess

import pytest
from helpers import PORT, ROOT, VARIABLES, configuration

PYTHON = ["/usr/bin/python3", "-IS"]
# The plugin's own process, which says at its end what it has loaded.
CALL = """
import sys
import posix
bare, end = {*sys.modules}, posix._exit
def report(status):
    posix.write(2, ("\\nloaded " + " ".join({*sys.modules} - bare)).encode())
    end(status)
posix._exit = report
sys.path.insert(0, sys.argv[1])
from cni_portmap.plugin import main
main()
"""
# What libnftables' binding itself needs, whatever its version, but json and os.
BINDING = """
import posix
import sys
bare = {*sys.modules}
sys.path.insert(0, sys.argv[1])
from cni_portmap import see_packages
see_packages()
lent = sys.modules["json"], sys.modules["os"] = type(sys)("json"), type(sys)("os")
lent[1].name, lent[1].fspath = "posix", posix.fspath
import nftables
del sys.modules["json"], sys.modules["os"]
print(*{*sys.modules} - bare - {"cni_portmap"})
"""

PROTOCOL = {"cni_portmap", "cni_portmap.plugin", "cni_portmap.cni", "cni_portmap.attachment", "cni_portmap.config",
            "_json", "_socket"}
LINUX = {"cni_portmap.linux", "cni_portmap.linux.kernel", "cni_portmap.linux.table", "cni_portmap.linux.netlink",
         "cni_portmap.ruleset", "cni_portmap.verbs", "_struct"}
STEPS = {"cni_portmap.verbs.steps"}
DELETE = LINUX | STEPS | {"cni_portmap.verbs.delete"}
ADD = LINUX | STEPS | {"cni_portmap.verbs.add", "cni_portmap.linux.libnftables"}
FLOWS = {"cni_portmap.verbs.flows", "cni_portmap.linux.conntrack"}
READING = {"cni_portmap.linux.expressions"}
BATCH = {"cni_portmap.linux.batch"}  # instead of libnftables
LOCK = {"fcntl", "_signal"}  # _signal is part of the bare interpreter, or not
NEVER = {"json", "os", "re", "enum", "typing", "collections", "functools", "dataclasses", "ipaddress", "hashlib",
         "subprocess", "logging", "pathlib", "socket", "signal", "site", "importlib.metadata", "jsonschema", "pyroute2",
         "cni_portmap.explain", "cni_portmap.cli", "cni_portmap.libcni_cache"}


def loaded(verb, given, *prefix, status=0, **variables):
    """The modules that one call loads; `prefix` is a command that starts it."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND": verb, **VARIABLES, **variables}
    done = subprocess.run([*prefix, *PYTHON, "-c", CALL, ROOT], input=json.dumps(given), capture_output=True, text=True,
                          env=environ, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return {*done.stderr.rpartition("loaded ")[2].split()}


@pytest.mark.parametrize("verb, given, extra", [
    ("VERSION", {}, set()), ("ADD", configuration(), set()), ("CHECK", configuration(), set()),
    ("GC", configuration(), set()), ("ADD", configuration(backend="iptables"), set()),
    ("ADD", configuration(conditionsV4=["-s 10.0.0.1"]), {"cni_portmap.conditions"}),
    ("ADD", configuration(gatewayModeV4="nat-unprotected"), {"cni_portmap.exposure", "cni_portmap.ruleset"})])
def test_no_mappings(verb, given, extra):
    """A call that publishes nothing loads the protocol and the parser; neither nftables nor the kernel module."""
    assert loaded(verb, given) == PROTOCOL | extra


def test_another_version():
    """Only a result of another version is converted, with the json module."""
    result = {"cniVersion": "0.4.0", "ips": []}
    same = loaded("ADD", {**configuration(prevResult=result), "cniVersion": "0.3.1"})
    assert same == PROTOCOL
    assert {"cni_portmap.result", "json"} <= loaded("ADD", configuration(prevResult=result))


def test_about():
    """So does one without a command."""
    environ = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([*PYTHON, "-c", CALL, ROOT], capture_output=True, text=True, env=environ, timeout=60,
                          check=True)
    assert {*done.stderr.rpartition("loaded ")[2].split()} == PROTOCOL


def test_refused():
    """A refusal that the schema explains is what jsonschema is loaded for: so this would notice it elsewhere."""
    found = loaded("ADD", configuration(PORT, snat=1), status=1)
    assert {"jsonschema", "json", "re", "cni_portmap.explain"} <= found
    assert loaded("ADD", configuration(), status=1, CNI_IFNAME="/") == PROTOCOL


@pytest.fixture(scope="module")
def own_kernel():
    """The command that runs another in private namespaces, where a link leads to the container's address."""
    root = os.geteuid() == 0
    kinds = ["--net", "--mount", *([] if root else ["--user"])]
    script = "mount -t tmpfs tmpfs /run; mkdir /run/netns; touch /run/netns/web; " \
             "mount --bind /proc/self/ns/net /run/netns/web; ip link set lo up; " \
             "ip link add to-web type veth peer name its-end; ip address add 10.88.0.1/16 dev to-web; " \
             "ip link set to-web up; ip link set its-end up; echo ready; exec cat"
    process = subprocess.Popen(["unshare", *kinds, *([] if root else ["--map-root-user"]), "--propagation", "private",
                                "sh", "-ec", script],
                               text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if process.stdout.readline() != "ready\n":
        pytest.skip(f"no namespaces: {process.communicate()[1].strip()}")
    yield ["nsenter", "--target", str(process.pid), "--root", *kinds, *([] if root else ["--preserve-credentials"])]
    process.communicate()


def test_life(own_kernel):
    """An attachment's whole life, on paths that succeed: nothing that is dear, at any step."""
    done = subprocess.run([*PYTHON, "-c", BINDING, ROOT], capture_output=True, text=True, timeout=60, check=True)
    binding = {*done.stdout.split()}
    attached = configuration(PORT, {**PORT, "hostPort": 9000, "protocol": "udp"})
    valid = [{"containerID": VARIABLES["CNI_CONTAINERID"], "ifname": VARIABLES["CNI_IFNAME"]}]
    gc = configuration(**{"cni.dev/valid-attachments": valid})
    adding, removing = PROTOCOL | ADD | LOCK | binding, PROTOCOL | DELETE | LOCK | FLOWS | READING | BATCH
    expected = [
        ("DEL", configuration(), PROTOCOL | DELETE),
        ("STATUS", configuration(), PROTOCOL | LINUX | STEPS | binding | {"cni_portmap.verbs.status",
                                                                         "cni_portmap.linux.libnftables"}),
        ("ADD", attached, adding | FLOWS), ("ADD", attached, adding | FLOWS | READING | BATCH),
        ("ADD", configuration(PORT), adding | FLOWS | READING | BATCH),
        ("ADD", configuration(PORT), adding | READING | BATCH),
        ("CHECK", configuration(PORT), PROTOCOL | LINUX | STEPS | LOCK | READING | binding |
         {"cni_portmap.verbs.check", "cni_portmap.linux.libnftables"}),
        ("GC", gc, PROTOCOL | DELETE | LOCK | {"cni_portmap.verbs.gc"}),
        ("DEL", configuration(), removing), ("DEL", configuration(), PROTOCOL | DELETE),
        ("ADD", configuration(PORT), adding),
        ("GC", configuration(**{"cni.dev/valid-attachments": []}), removing | {"cni_portmap.verbs.gc"})]
    for verb, given, modules in expected:
        found = loaded(verb, given, *own_kernel)
        assert found - LOCK == modules - LOCK, (verb, given)
        assert found & NEVER == set(), verb


REFERENCE = "table ip cni_hostport { chain hostports { }; }"
LEFT = 'add rule ip cni_hostport hostports tcp dport 8080 dnat to 10.88.0.2:80 comment "%s"'


@pytest.fixture
def reference(own_kernel):
    """A function that runs nft commands in the kernel of these tests; the reference plugin has been there."""
    def run(text):
        subprocess.run([*own_kernel, "/usr/bin/python3", "-c", "import nftables, sys\n"
                        "sys.exit(nftables.Nftables().cmd(sys.argv[1])[0])", text], check=True, timeout=60)
    run(REFERENCE)
    yield run
    run("delete table ip cni_hostport")


@pytest.mark.parametrize("verb, given", [
    ("DEL", configuration()), ("ADD", configuration(PORT)),
    ("GC", configuration(**{"cni.dev/valid-attachments": []}))])
def test_where_the_reference_plugin_was(own_kernel, reference, verb, given):
    """libcni's files are read where it has left rules, and then without the modules that are dear."""
    assert {"cni_portmap.reference", "cni_portmap.verbs.leftovers"} <= loaded(verb, given, *own_kernel)
    assert loaded(verb, given, *own_kernel) & NEVER == set()
    reference(LEFT % VARIABLES["CNI_CONTAINERID"])
    assert loaded(verb, given, *own_kernel) & NEVER == {"cni_portmap.libcni_cache"}
    loaded("DEL", configuration(), *own_kernel)


def test_own_kernel(own_kernel):
    """The kernel of these tests is not this machine's."""
    inside = subprocess.run([*own_kernel, "readlink", "/proc/self/ns/net"], capture_output=True, text=True, timeout=60,
                            check=True).stdout.strip()
    assert inside.startswith("net:") and inside != os.readlink("/proc/self/ns/net")


# --- in the whole checkout ------------------------------------------------------------------------------------

def sources():
    """Every Python file of the checkout and its text: modules, and scripts whose first line says so."""
    for folder in "cni_portmap", "scripts", "tests", "integration":
        for place, folders, names in os.walk(ROOT / folder):
            folders[:] = {*folders} - {"kept", "unpacked"}  # systems and packages of others
            for path in (pathlib.Path(place, name) for name in names):
                if path.suffix == ".py" or path.read_bytes().startswith(b"#!/usr/bin/python3"):
                    yield str(path.relative_to(ROOT)), path.read_text()


def names_in(source):
    """The full names that a file imports, late ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def imports():
    """The imports of each file: path -> names."""
    found = {path: {*names_in(source)} for path, source in sources()}
    assert {"integration/lab/links.py", "scripts/bench", "integration/test_faults.py"} <= {*found}
    return found


def test_nothing_imports_a_test(imports):
    """No test is imported, since it would run twice: tests share tests/helpers.py, integration/lab and conftest.py."""
    assert not [(path, name) for path, names in imports.items() for name in names
                if any(part == "conftest" or part.startswith("test_") for part in name.split("."))]


def test_users_of_pyroute2(imports):
    """It takes 140 ms to import, so the plugin never does; the lab makes links with it."""
    assert {path for path, names in imports.items() for name in names if name.split(".")[0] == "pyroute2"} == \
        {"integration/lab/links.py"}


# --- the arrows between the rooms, late imports included --------------------------------------------------------

PACKAGE = ROOT / "cni_portmap"


def imports_of(path):
    """The imports of a file, late ones included: modules of ours as "linux.kernel", others by their first name."""
    package = ["cni_portmap", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            yield from (".".join((*module, alias.name)) for alias in node.names)


def room_of(name):
    """The room that an import leads to, "" for what is not ours."""
    parts = name.split(".")
    return parts[1] if parts[0] == "cni_portmap" and len(parts) > 1 and (
        (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists()) else ""


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
# room: what it may import; `cni` and the package itself may be imported everywhere.
ARROWS = {
    "__init__": set(), "__main__": {"cli"}, "cni": set(), "attachment": set(), "conditions": {"attachment"},
    "config": {"attachment", "conditions", "exposure"}, "explain": {"attachment", "conditions", "config", "exposure"},
    "ruleset": {"attachment"}, "exposure": {"attachment", "ruleset"}, "reference": set(),
    "linux": {"attachment", "reference", "ruleset"},
    "verbs": {"attachment", "exposure", "firewall", "libcni_cache", "linux", "reference", "ruleset"},
    "libcni_cache": {"attachment", "config", "linux", "ruleset"}, "firewall": {"linux"},
    "plugin": {"config", "explain", "linux", "result", "verbs"}, "result": {"attachment"},
    "agent": {"attachment", "config", "libcni_cache", "linux", "ruleset", "verbs"},
    "cli": {"agent", "attachment", "explain", "firewall", "libcni_cache", "linux", "reference", "ruleset", "verbs"},
}


def test_every_room_has_its_arrows():
    """A new room says what it may import."""
    assert {*ROOMS.values()} == {*ARROWS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_go_one_way(path):
    """No room imports one above it: so each can be read, tested and changed with what is below it alone."""
    room = ROOMS[path]
    found = {room_of(name) for name in imports_of(path)} - {"", "cni", room}
    assert found <= ARROWS[room]


def test_no_circles():
    """The arrows have no circle."""
    seen = {"cni"}
    while rest := {room: below for room, below in ARROWS.items() if room not in seen}:
        free = {room for room, below in rest.items() if below <= seen}
        assert free, f"a circle among {sorted(rest)}"
        seen |= free


SYSTEM = {"posix", "os", "fcntl", "ctypes", "nftables", "subprocess", "socket", "shutil"}
ALLOWED = {  # room: what of SYSTEM it may import, and why
    "cni": {"posix"},  # its own standard streams
    "plugin": {"posix"},  # _exit
    "linux": SYSTEM,
    "verbs": {"socket"},  # inet_ntop
    "libcni_cache": {"posix"},  # files
    "agent": {"fcntl", "os", "socket"},  # children, pipes, the sockets that it holds
    "cli": {"os"},  # paths as the user means them
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_linux_makes_system_calls(path):
    """System calls are in one folder, so that a reader has to look only there."""
    found = {name.partition(".")[0] for name in imports_of(path)} & SYSTEM
    assert found <= ALLOWED.get(ROOMS[path], set())
