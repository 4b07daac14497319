"""Tests without root: no namespace, no ruleset, nothing outside of temporary folders (one exception: test_imports)."""
import pathlib
import re
import sys

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import helpers  # noqa: E402  # it imports the package from the path above
from cni_portmap import cni  # noqa: E402

# No deadline: the machine may be busy. No database: a test leaves nothing behind, and prints how to repeat a failure.
hypothesis.settings.register_profile("rootless", deadline=None, database=None, print_blob=True,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("rootless")


@pytest.fixture
def kernel() -> helpers.RecordingKernel:
    """A host with an empty ruleset."""
    return helpers.RecordingKernel()


@pytest.fixture(autouse=True)
def no_warnings() -> None:
    """Warnings wait until a call has done its work; none waits from the test before."""
    cni._warnings.clear()


@pytest.fixture(scope="session")
def executable(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The plugin as runtimes start it, with this checkout's modules."""
    path = tmp_path_factory.mktemp("bin") / "portmap"
    launcher = (ROOT / "scripts/portmap").read_text()
    path.write_text(re.sub(r"(?m)^sys\.path\.insert.*", f'sys.path.insert(0, "{ROOT}")', launcher))
    path.chmod(0o755)
    return path
