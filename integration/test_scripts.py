"""demo, test and bench where they cannot work: one sentence that says what to do, status 1, and no traceback."""
import subprocess

import lab
import pytest

DROP = "-sys_admin"
# how it is run, and what the sentence says
POOR = {
    "not root": (["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"], "run it as root"),
    "an unprivileged container": (["setpriv", "--bounding-set", DROP, "--inh-caps", DROP], "privileged container"),
    "no nf_tables": (["unshare", "-m", "--propagation", "private", "sh", "-c",
                      'mount --bind /bin/false "$(readlink -f /usr/sbin/nft)"; exec "$@"', "sh"], "modprobe nf_tables"),
    "no veth": (["unshare", "-m", "--propagation", "private", "sh", "-c",
                 'mount --bind /bin/false "$(readlink -f "$(command -v ip)")"; exec "$@"', "sh"], "modprobe veth"),
}


@pytest.fixture(scope="module")
def checkout():
    """A copy of the scripts that anybody may read."""
    lab.run("mount", "-t", "tmpfs", "none", "/mnt")
    lab.run("cp", "-r", lab.ROOT / "scripts", lab.ROOT / "cni_portmap", "/mnt")
    lab.run("mkdir", "/mnt/integration")
    lab.run("cp", "-r", *(lab.ROOT / "integration" / name for name in ("lab", "measure", "demo.py", "debian.py")),
            "/mnt/integration")
    yield "/mnt"
    lab.run("umount", "/mnt")


@pytest.mark.parametrize("name", POOR)
@pytest.mark.parametrize("script", ["demo", "test integration", "test faults", "bench --quick process"])
def test_poor_environment(checkout, script, name):
    """Nothing is tried that cannot work."""
    wrapped, says = POOR[name]
    done = subprocess.run([*wrapped, *f"{checkout}/scripts/{script}".split()], capture_output=True, text=True,
                          check=False, cwd="/", stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr
