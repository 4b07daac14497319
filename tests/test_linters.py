"""Linters are tests. Their exceptions are in ruff.toml and mypy.ini, each with its reason; a missing tool is a skip."""
import shutil
import subprocess

import pytest
from helpers import ROOT

from cni_portmap.cli.main import main

SHELL = [path for folder in ("scripts", ".ci", "integration/*") for path in sorted(ROOT.glob(f"{folder}/*"))
         if path.is_file() and path.read_bytes().startswith((b"#!/bin/sh\n", b"# shellcheck shell=sh\n"))]


@pytest.mark.parametrize("tool, arguments", [
    ("ruff", ["check", "--no-cache", "--quiet", "--output-format=concise"]),
    ("mypy", ["--cache-dir=/dev/null", "--python-executable=/usr/bin/python3"]),
    ("shellcheck", ["-x", *SHELL]), ("shellcheck", ["--shell=bash", "-"])], ids=["ruff", "mypy", "sh", "completion"])
def test_linter(tool, arguments, capsys):
    """Nothing to complain about."""
    main(["completion", "bash"])
    completion = capsys.readouterr().out
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed: scripts/test installs it where it has a network")
    done = subprocess.run([tool, *arguments], cwd=ROOT, input=completion, capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_are_found():
    """The list that shellcheck gets is not empty for a reason of ours."""
    assert {"install", "test", "run", "packages", "steps"} <= {path.name for path in SHELL}
