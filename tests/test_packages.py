"""scripts/packages: what a probe misses is installed; what cannot be is one sentence, and what to do."""
import pathlib
import shutil
import subprocess

import pytest
from helpers import ROOT

TOOLS = "sh cat chmod cut date dirname env grep id mktemp readlink rm sed sleep sort tr uniq".split()


@pytest.fixture
def tools(tmp_path):
    """A folder of commands: the shell's, and neither apt-get nor anything that tests need."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def stub(folder, name, script):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def packages(tools, *words, status=0):
    """The script's output, and the apt-get commands that it has run."""
    calls = tools / "calls"
    done = subprocess.run([ROOT / "scripts/packages", *words], capture_output=True, text=True, check=False,
                          env={"PATH": str(tools), "TMPDIR": str(tools.parent), "CALLS": str(calls)})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_nothing_missing(tools):
    """If everything is installed, from whatever source, neither apt-get nor root is needed."""
    stub(tools, "shellcheck", "")
    stub(tools, "apt-get", 'echo "$@" >>"$CALLS"; exit 100')
    said, calls = packages(tools, "run")
    assert (said, calls) == ("", [])


def test_install(tools):
    """Packages that a probe misses are installed, by their names here, and no others; a line a step, with its time."""
    stub(tools, "apt-get", 'echo "$@" >>"$CALLS"; case "$*" in *shellcheck) '
                           f'echo >{tools}/shellcheck; chmod +x {tools}/shellcheck ;; esac')
    stub(tools, "id", "echo 0")
    for name in "unshare", "git":
        stub(tools, name, "")
    said, calls = packages(tools, "rootless", "run")
    assert [call.split()[-1] for call in calls] == ["update", "shellcheck"]
    assert [line.rpartition(": ")[0] for line in said.splitlines()] == ["updating the list of packages",
                                                                       "installing shellcheck"]
    assert not [*tools.parent.glob("*.log")]


def test_still_missing(tools):
    """A package that does not bring what is probed is said, with the probe."""
    stub(tools, "apt-get", "")
    stub(tools, "id", "echo 0")
    said = packages(tools, "rootless", status=1)[0]
    assert "command:shellcheck" in said and "still missing" in said


def test_no_network(tools):
    """apt-get fails: one sentence, with the log that has its words."""
    stub(tools, "apt-get", "echo Temporary failure resolving; exit 100")
    stub(tools, "id", "echo 0")
    said = packages(tools, "rootless", status=1)[0].splitlines()
    assert len(said) == 3 and "is there a network?" in said[-1] and "shellcheck" in said[-1]
    log = pathlib.Path(next(word for word in said[-1].split() if word.endswith(".log")))
    assert "Temporary failure resolving" in log.read_text()


def test_not_root(tools):
    """A user other than root is told the packages' names."""
    stub(tools, "apt-get", 'echo "$@" >>"$CALLS"')
    stub(tools, "id", "echo 1000")
    said, calls = packages(tools, "rootless", status=1)
    assert "shellcheck" in said and "Run it as root" in said and said.count("\n") == 1 and not calls


def test_no_apt(tools):
    """Without apt-get the names are said, too."""
    said = packages(tools, "rootless", status=1)[0]
    assert "shellcheck" in said and "no apt-get" in said and said.count("\n") == 1


def test_wrong_usage(tools):
    """A purpose that there is not is named, with those that there are."""
    assert "rootless" in packages(tools, "nonsense", status=2)[0]
    packages(tools, status=2)


def test_table(tools):
    """Each line has a purpose, a probe of a known kind, and a name for each family; --list prints the names."""
    table = (ROOT / "scripts/packages").read_text().partition("<<EOT\n")[2].partition("EOT\n")[0]
    for line in table.splitlines():
        purpose, probe, debian, fedora = line.split()
        assert probe.partition(":")[0] in ("import", "module", "command", "file")
        assert {debian, fedora}.intersection(packages(tools, "--list", purpose)[0].split())
