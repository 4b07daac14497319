"""The complete sources that go with the bundle: those of each GPL and LGPL part, as Debian has them, and ours."""
import hashlib
import pathlib
import re
import shutil

import lock
from debian import run


def wanted(architectures: list[str], downloads: pathlib.Path) -> list[lock.Source]:
    """The source packages of the parts under a GNU licence; an exception for what a compiler adds needs none."""
    return sorted({lock.source_of(package, downloads) for package in lock.parts(*architectures)
                   if "GPL" in package.licence and " WITH " not in package.licence})


def folder_of(source: lock.Source, downloads: pathlib.Path) -> pathlib.Path:
    """Where a source package's files are kept; who gets them elsewhere puts them there."""
    return downloads / f"sources/{source.name}-{source.version.replace(':', '%3a')}"


def is_complete(source: lock.Source, folder: pathlib.Path) -> bool:
    """Whether all files of a source package are there, as its .dsc says. Source: deb-src-control(5)."""
    for description in folder.glob("*.dsc"):
        text = description.read_text()
        files = re.findall(r"(?m)^ ([0-9a-f]{64}) \d+ (\S+)$", text)
        names = {f"Source: {source.name}", f"Version: {source.version}"} <= {*text.splitlines()}
        return names and all((folder / name).exists() and hashlib.sha256((folder / name).read_bytes()).hexdigest() ==
                             digest for digest, name in files)
    return False


def fetch(architectures: list[str], downloads: pathlib.Path, target: pathlib.Path) -> list[lock.Source]:
    """Copy the source packages to `target`, downloading those that are not there; those that cannot be had."""
    missing: list[lock.Source] = []
    options: list[str] = []
    for source in wanted(architectures, downloads):
        folder = folder_of(source, downloads)
        if not is_complete(source, folder):
            options = options or lock.update(lock.read(), downloads)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                run("apt-get", *options, "source", "--download-only", f"{source.name}={source.version}", cwd=folder)
            except SystemExit:
                missing.append(source)
                continue
        shutil.copytree(folder, target / folder.name)
    return missing
