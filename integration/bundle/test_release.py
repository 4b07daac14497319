"""What scripts/release makes: always the same bytes, complete, with licences that go together."""
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tarfile

import lab
import pytest

sys.path.insert(0, str(lab.ROOT / "packaging"))
import licences
import lock
from cni_portmap import __version__


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_twice_the_same(dist):
    """Another folder, another time, another umask: the same bytes, of each artefact."""
    assert digests(dist) == digests(dist / "again")


def test_artefacts(dist):
    """All are there; the checksums are theirs; what is made without sources says in its name that it is for tests."""
    found, version = digests(dist), __version__
    assert {*found} == {f"cni-portmap-{version}-linux-amd64-unreleasable.tar.gz",
                        f"cni-portmap-{version}-linux-arm64-unreleasable.tar.gz",
                        f"cni-portmap-{version}-oci-unreleasable.tar", f"cni-portmap_{version}_all.deb",
                        f"cni-portmap-{version}-1.noarch.rpm", f"cni-portmap-{version}.spdx.json", "SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=True)
    assert len((dist / "SHA256SUMS").read_text().splitlines()) == len(found) - 1


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_archive(dist, architecture):
    """One top folder, all of it root's, nobody else may write, and no link leads anywhere."""
    with tarfile.open(next(dist.glob(f"*-{architecture}-*.tar.gz"))) as archive:
        entries = archive.getmembers()
    assert {entry.name.partition("/")[0] for entry in entries} == {f"cni-portmap-{__version__}"}
    assert {(entry.uid, entry.gid, entry.uname) for entry in entries} == {(0, 0, "")}
    assert not [entry.name for entry in entries if entry.mode & 0o022 or not (entry.isfile() or entry.isdir())]
    assert len({entry.mtime for entry in entries}) == 1


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_image(dist, architecture, tmp_path):
    """skopeo takes it; its layers are the bundle's archive, byte for byte, and a link to the command; nothing else."""
    source = f"oci-archive:{next(dist.glob('*-oci-*.tar'))}"
    select = "--override-arch", architecture
    about = json.loads(lab.run("skopeo", "inspect", *select, source))
    assert (about["Architecture"], about["Os"]) == (architecture, "linux")
    assert about["Labels"]["org.opencontainers.image.version"] == __version__
    bundle = digests(dist)[f"cni-portmap-{__version__}-linux-{architecture}-unreleasable.tar.gz"]
    first, second = (digest.removeprefix("sha256:") for digest in about["Layers"])
    assert first == bundle
    lab.run("skopeo", "copy", "--quiet", *select, source, f"dir:{tmp_path}")  # which checks each digest
    with tarfile.open(tmp_path / second) as layer:
        link, = layer.getmembers()
        assert (link.name, link.linkname) == ("cni-portmap", f"cni-portmap-{__version__}/cni-portmap")
    config = json.loads(lab.run("skopeo", "inspect", "--config", *select, source))
    assert config["config"]["Entrypoint"] == ["/cni-portmap"] and not config["config"].get("User")
    lab.run("skopeo", "copy", "--quiet", "--all", source, f"oci-archive:{tmp_path}/all.tar:{__version__}")


def test_licences_of_parts(dist, bundle):
    """The list of what is in the bundle has each part, with a licence that goes with GPL-2.0-only, and its text."""
    document = json.loads(next(dist.glob("*.spdx.json")).read_text())
    named = {entry["SPDXID"]: entry for entry in document["packages"]}
    parts = [named[each["relatedSpdxElement"]] for each in document["relationships"]
             if each["relationshipType"] == "CONTAINS"]
    assert {(part["name"], part["versionInfo"]) for part in parts} == \
        {(package.name, package.version) for package in lock.parts("amd64", "arm64")}
    assert not [part["name"] for part in parts if not licences.fits(part["licenseConcluded"])]
    assert licences.fits(named["SPDXRef-cni-portmap"]["licenseDeclared"])
    texts = {path.name for path in (bundle / "LICENSES").iterdir()}
    assert len(texts) == len(lock.parts("amd64")) + 3
    assert {"GPL-2.0-or-later.txt", "LGPL-2.1-or-later.txt"} < texts  # Debian's files only name these
    files = {entry["fileName"]: entry["checksums"][0]["checksumValue"] for entry in document["files"]}
    assert {f"./{name}": digest for name, digest in digests(dist).items()
            if name != "SHA256SUMS" and not name.endswith(".json")} == files


def test_nothing_of_the_builder(bundle):
    """No path of the machine that it was made on."""
    for path in bundle.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert str(lab.ROOT).encode() not in content and b"cni-portmap-release-" not in content, path


@pytest.mark.parametrize("name", ["*.deb", "*.rpm"])
def test_package(dist, name, tmp_path):
    """Distributions' tools find no fault in what theirs have made."""
    package = next(dist.glob(name))
    if name == "*.deb":
        done = subprocess.run(["lintian", "--allow-root", "--pedantic", "--fail-on", "error,warning,info,pedantic",
                               package], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")
        lab.run("dpkg", "--control", package, tmp_path)
        for script in "postinst", "prerm":  # an agent that runs is restarted, and stopped
            text = (tmp_path / script).read_text()
            assert re.search(r"(?m)^\s+deb-systemd-invoke .*cni-portmap-agent\.service", text), script
    else:
        assert lab.run("rpm", "--checksig", "--nosignature", package).split(":")[1].strip() == "digests OK"
        listed = lab.run("rpm", "-qp", "--qf", "[%{FILENAMES} %{FILEUSERNAME} %{FILEMODES:perms}\\n]", package)
        assert "/usr/libexec/cni-portmap/portmap root -rwxr-xr-x" in listed


def test_stage_is_what_packages_have(dist, tmp_path):
    """Both have the modules of the checkout, launched from the folder where they are."""
    lab.run("dpkg", "-x", next(dist.glob("*.deb")), tmp_path)
    assert 'sys.path.insert(0, "/usr/share/cni-portmap")' in (tmp_path / "usr/lib/cni/portmap").read_text()
    ours = {str(path.relative_to(lab.ROOT)): path.read_bytes() for path in (lab.ROOT / "cni_portmap").rglob("*.py")}
    theirs = tmp_path / "usr/share/cni-portmap"
    assert {str(path.relative_to(theirs)): path.read_bytes() for path in theirs.rglob("*.py")} == ours
    rpm = lab.run("rpm", "-qlp", next(dist.glob("*.rpm"))).split()
    assert {pathlib.Path(path).relative_to("/usr/share/cni-portmap").as_posix() for path in rpm
            if path.endswith(".py")} == {*ours}
