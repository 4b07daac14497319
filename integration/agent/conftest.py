"""With CNI_PORTMAP_MUTANT (JSON: module, text, what stands there instead) the agent that is tested has a mistake."""
import json
import os
import pathlib
import shutil

import lab
import pytest
from lab.agent import Agent

MUTANT = json.loads(os.environ.get("CNI_PORTMAP_MUTANT", "null"))  # see test_mutants
SECONDS = 5  # which its tests may wait for what never comes


@pytest.fixture(scope="session")
def bin_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with this checkout's portmap, installed, and the distribution's other plugins."""
    folder = lab.install(tmp_path_factory.mktemp("cni") / "bin")
    if MUTANT:
        module, kept, instead = MUTANT
        path, = (folder.parent / "lib").rglob(f"cni_portmap/agent/{module}.py")
        text = path.read_text()
        assert text.count(kept) == 1, "the code has changed: so must the mutant"
        path.write_text(text.replace(kept, instead))
        shutil.rmtree(path.parent / "__pycache__")
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mistake, do not wait for long for what never comes."""
    if MUTANT:
        until = lab.until
        monkeypatch.setattr(lab, "until", lambda what, seconds=SECONDS: until(what, min(seconds, SECONDS)))
        monkeypatch.setattr(Agent, "logs", lambda agent, words: lab.until(lambda: words in agent.log))
