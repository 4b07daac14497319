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

PROTOCOL = {"cni_portmap", "cni_portmap.plugin", "cni_portmap.cni", "cni_portmap.config", "_json", "_socket"}
KERNEL = PROTOCOL | {"cni_portmap.portmap", "cni_portmap.ruleset", "cni_portmap.kernel", "cni_portmap.netlink",
                     "_struct"}
LOCK = {"fcntl", "_signal"}  # _signal is part of the bare interpreter, or not
NEVER = {"json", "os", "re", "enum", "typing", "collections", "functools", "dataclasses", "ipaddress", "hashlib",
         "subprocess", "logging", "pathlib", "socket", "signal", "site", "importlib.metadata", "jsonschema", "pyroute2",
         "cni_portmap.explain", "cni_portmap.cli", "cni_portmap.report", "cni_portmap.restore"}


def loaded(verb, given, *prefix, status=0, **variables):
    """The modules that one call loads; `prefix` is a command that starts it."""
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "CNI_COMMAND": verb, **VARIABLES, **variables}
    done = subprocess.run([*prefix, *PYTHON, "-c", CALL, ROOT], input=json.dumps(given), capture_output=True, text=True,
                          env=environ, timeout=60, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return {*done.stderr.rpartition("loaded ")[2].split()}


@pytest.mark.parametrize("verb, given, extra", [
    ("VERSION", {}, set()), ("ADD", configuration(), set()), ("CHECK", configuration(), set()),
    ("GC", configuration(), set()), ("ADD", configuration(backend="iptables", conditionsV4=["-s 10.0.0.1"]), set())])
def test_no_mappings(verb, given, extra):
    """A call that publishes nothing loads the protocol and the parser; neither nftables nor the kernel module."""
    assert loaded(verb, given) == PROTOCOL | extra


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
    """The command that runs another in private namespaces, where the host has the container's address."""
    root = os.geteuid() == 0
    kinds = ["--net", "--mount", *([] if root else ["--user"])]
    script = "mount -t tmpfs tmpfs /run; mkdir /run/netns; touch /run/netns/web; " \
             "mount --bind /proc/self/ns/net /run/netns/web; ip link set lo up; " \
             "ip address add 10.88.0.2/16 dev lo; echo ready; exec cat"
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
    write = KERNEL | LOCK | binding
    expected = [
        ("DEL", configuration(), KERNEL), ("STATUS", configuration(), KERNEL | binding), ("ADD", attached, write),
        ("ADD", attached, write), ("CHECK", attached, write), ("GC", gc, KERNEL | LOCK),
        ("DEL", configuration(), write), ("DEL", configuration(), KERNEL)]
    for verb, given, modules in expected:
        found = loaded(verb, given, *own_kernel)
        assert found - LOCK == modules - LOCK and found & NEVER == set(), verb


def test_own_kernel(own_kernel):
    """The kernel of these tests is not this machine's."""
    inside = subprocess.run([*own_kernel, "readlink", "/proc/self/ns/net"], capture_output=True, text=True, timeout=60,
                            check=True).stdout.strip()
    assert inside.startswith("net:") and inside != os.readlink("/proc/self/ns/net")


# --- who imports whom in the source ---------------------------------------------------------------------------

def sources():
    """Every Python file of the checkout and its text: modules, and scripts whose first line says so."""
    for folder in "cni_portmap", "scripts", "tests", "integration":
        for place, folders, names in os.walk(ROOT / folder):
            folders[:] = {*folders} - {"kept", "unpacked"}  # systems and packages of others
            for path in (pathlib.Path(place, name) for name in names):
                if path.suffix == ".py" or path.read_bytes().startswith(b"#!/usr/bin/python3"):
                    yield str(path.relative_to(ROOT)), path.read_text()


def imported(source):
    """The full names that a file imports, late ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


@pytest.fixture(scope="module")
def imports():
    """Who imports what: path -> names."""
    found = {path: {*imported(source)} for path, source in sources()}
    assert {"integration/lab/links.py", "scripts/bench", "integration/test_faults.py"} <= {*found}
    return found


def test_nothing_imports_a_test(imports):
    """What tests share is in tests/helpers.py, integration/lab and conftest.py: a test that is imported runs twice."""
    assert not [(path, name) for path, names in imports.items() for name in names
                if any(part == "conftest" or part.startswith("test_") for part in name.split("."))]


def test_users_of_pyroute2(imports):
    """It takes 140 ms to import, so the plugin never does; the lab makes links with it."""
    assert {path for path, names in imports.items() for name in names if name.split(".")[0] == "pyroute2"} == \
        {"integration/lab/links.py"}
