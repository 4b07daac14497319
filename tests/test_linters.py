"""Linters as tests. Their settings are in pyproject.toml, each exception with its reason. In CI none may be missing."""
import os
import shutil
import subprocess

import pytest
from helpers import ROOT

from cni_portmap.cli.main import main

SHELL = [path for folder in ("scripts", ".ci", "integration/*") for path in sorted(ROOT.glob(f"{folder}/*"))
         if path.is_file() and path.read_bytes().startswith((b"#!/bin/sh\n", b"# shellcheck shell=sh\n"))]


def need(tool):
    """Skip the test where a linter is not installed; in CI, where a skip would go unnoticed, that is a failure."""
    if not shutil.which(tool):
        missing = f"{tool} is not installed: scripts/test installs it where it has a network"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.mark.parametrize("tool, arguments", [
    ("ruff", ["check", "--no-cache", "--quiet", "--output-format=concise"]),
    ("mypy", ["--cache-dir=/dev/null", "--python-executable=/usr/bin/python3"]),
    ("shellcheck", ["-x", *SHELL]), ("shellcheck", ["--shell=bash", "-"])], ids=["ruff", "mypy", "sh", "completion"])
def test_linter(tool, arguments, capsys):
    """No findings."""
    need(tool)
    main(["completion", "bash"])
    completion = capsys.readouterr().out
    done = subprocess.run([tool, *arguments], cwd=ROOT, input=completion, capture_output=True, text=True, timeout=600,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_are_found():
    """The shellcheck file list is not empty by mistake."""
    assert {"install", "test", "run", "packages", "steps"} <= {path.name for path in SHELL}


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_missing_linter(monkeypatch, tmp_path, ci, outcome):
    """It is a failure in CI, and a skip elsewhere."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="ruff is not installed"):
        need("ruff")
