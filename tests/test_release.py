"""What a release may be made of: licences that go together, packages as they are locked, sources that are complete."""
import pathlib
import subprocess
import sys

import pytest
from helpers import ROOT

sys.path[:0] = [str(ROOT / "packaging"), str(ROOT / "integration")]
import licences  # noqa: E402
import lock  # noqa: E402
import sources  # noqa: E402


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_licences_go_together(architecture):
    """All that is in the bundle, and this project, can be in one work with libnftables, which is GPL-2.0-only."""
    parts = {package.name: package.licence for package in lock.parts(architecture)}
    assert parts["libnftables1"] == "GPL-2.0-only"
    assert {name: licence for name, licence in parts.items() if not licences.fits(licence)} == {}
    assert licences.fits(licences.ours(ROOT))


@pytest.mark.parametrize("expression, fits", [
    ("Apache-2.0", False), ("Apache-2.0 OR GPL-2.0-or-later", True), ("MIT AND Apache-2.0", False), ("MIT", True),
    ("GPL-3.0-or-later", False), ("LGPL-3.0-or-later", False), ("GPL-2.0-or-later OR LGPL-3.0-or-later", True),
    ("GPL-3.0-or-later WITH GCC-exception-3.1", True), ("Apache-2.0 WITH LLVM-exception", False), ("", False)])
def test_licence_fits(expression, fits):
    """Apache-2.0 alone, and version 3 of the GNU licences, do not go with GPL-2.0-only."""
    assert licences.fits(expression) == fits


def test_texts_of_our_licences():
    """LICENSES has the text of each licence that may be chosen, and of no other."""
    assert {path.stem for path in (ROOT / "LICENSES").iterdir()} == {*licences.choices(licences.ours(ROOT))}


def test_lock():
    """Each line is complete; no package is locked twice; parts have a licence, tools need none."""
    packages = lock.read()
    assert len({(package.suite, package.name, package.architecture) for package in packages}) == len(packages)
    for package in packages:
        assert len(bytes.fromhex(package.sha256)) == 32 and package.architecture in ("amd64", "arm64", "all")
        assert package.use == "cross" or bool(package.licence) == {"part": True, "tool": False}[package.use]


PACKAGE = lock.Package("part", "bookworm", "hello", "1:2.0-1", "amd64", "00" * 32, "GPL-2.0-only")


def refuse(*words, **_):
    raise SystemExit(f"{words[0]} fails")


def test_version_that_is_gone(monkeypatch, tmp_path):
    """A locked version that the mirror has no more is named, and what renews the lock."""
    monkeypatch.setattr(lock, "update", lambda packages, folder: [])
    monkeypatch.setattr(lock, "run", lambda *words, **how: refuse(*words) if words[0] == "apt-get" else
                        "     hello | 1:2.0-2 | mirror bookworm/main amd64 Packages\n")
    with pytest.raises(SystemExit, match=r"(?s)no longer to be had: hello 1:2\.0-1.*scripts/release --renew-lock"):
        lock.fetch([PACKAGE], tmp_path)


def test_network_that_is_gone(monkeypatch, tmp_path):
    """Where the version is there, what apt said is what is wrong."""
    monkeypatch.setattr(lock, "update", lambda packages, folder: [])
    monkeypatch.setattr(lock, "run", lambda *words, **how: refuse(*words) if words[0] == "apt-get" else
                        "     hello | 1:2.0-1 | mirror bookworm/main amd64 Packages\n")
    with pytest.raises(SystemExit, match="apt-get fails"):
        lock.fetch([PACKAGE], tmp_path)


def test_other_bytes(monkeypatch, tmp_path):
    """A package with another sha256 than that of the lock is not taken."""
    monkeypatch.setattr(lock, "update", lambda packages, folder: [])
    monkeypatch.setattr(lock, "run", lambda *words, **how: (tmp_path / PACKAGE.file_name).write_text("evil"))
    with pytest.raises(SystemExit, match=r"not what packaging/lock says: hello_1%3a2\.0-1_amd64\.deb"):
        lock.fetch([PACKAGE], tmp_path)


DSC = """Format: 3.0 (quilt)
Source: hello
Version: 1:2.0-1
Checksums-Sha256:
 {digest} 4 hello_2.0.orig.tar.gz
"""
DIGEST = "3608bca1e44ea6c4d268eb6db02260269892c0b42b86bbf1e77a6fa16c3c9282"  # of "xyz"


def test_sources(monkeypatch, tmp_path):
    """Sources that somebody has brought are taken if they are complete, and those that cannot be had are named."""
    hello, other = lock.Source("hello", "1:2.0-1"), lock.Source("other", "1")
    monkeypatch.setattr(sources, "wanted", lambda architectures, downloads: [hello, other])
    monkeypatch.setattr(lock, "update", lambda packages, folder: [])
    monkeypatch.setattr(sources, "run", refuse)
    assert sources.fetch(["amd64"], tmp_path, tmp_path / "out") == [hello, other]
    folder = sources.folder_of(hello, tmp_path)
    (folder / "hello.dsc").write_text(DSC.format(digest=DIGEST))
    assert not sources.is_complete(hello, folder)
    (folder / "hello_2.0.orig.tar.gz").write_text("xyz")
    assert sources.fetch(["amd64"], tmp_path, tmp_path / "out") == [other]
    assert {path.name for path in (tmp_path / "out" / folder.name).iterdir()} == {"hello.dsc", "hello_2.0.orig.tar.gz"}
    (folder / "hello_2.0.orig.tar.gz").write_text("xyy")
    assert not sources.is_complete(hello, folder) and not sources.is_complete(other, folder)


def test_clean_tree(tmp_path):
    """A release is made of a commit: what is not committed is named."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    (clone / "more").touch()
    done = subprocess.run([clone / "scripts/release", "--out", tmp_path / "out"], text=True, capture_output=True,
                          check=False)
    assert done.returncode == 1 and "?? more" in done.stderr and not pathlib.Path(tmp_path, "out").exists()
