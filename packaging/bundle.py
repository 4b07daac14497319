"""Make the bundle's folder from a tree of sources and the locked packages.

Nothing of this machine is compiled in: compiler, headers and interpreter are those of packages of the lock, and run in
a root folder made of them. Paths there are always the same, so the same sources and lock give the same bytes.
"""
import os
import pathlib
import re
import shutil
from typing import NamedTuple

import lock
from debian import run, unpack

from cni_portmap.linux.installation import PROGRAMS


class Target(NamedTuple):
    """What a bundle is for: uname's machine, Debian's triple, the compiler, the loader, where its packages are."""

    machine: str
    triple: str
    compiler: str
    loader: str
    system: str


TARGETS = {"amd64": Target("x86_64", "x86_64-linux-gnu", "gcc-12", "ld-linux-x86-64.so.2", ""),
           "arm64": Target("aarch64", "aarch64-linux-gnu", "aarch64-linux-gnu-gcc-12", "ld-linux-aarch64.so.1",
                           "/target")}
BUILDER = TARGETS["amd64"]
PYTHON = "python3.11"
SUITE = "bookworm"  # of compiler and interpreter; of other suites come the libraries to run with
STDLIB = f"/usr/lib/{PYTHON}"
CC = ("-O2", "-g0", "-Wall", "-Wextra", "-Werror", "-fno-ident", "-Wl,--build-id=none", "-s")
STUB = ("-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "stub.c")
LATER = "libnftables.so.1"  # loaded by native.c
DOCUMENTS = ("docs/cni-portmap.8", "docs/cni-portmap-plugin.7", "CHANGELOG.md")


class Root:
    """A root folder of unpacked packages. Commands run in its folder /build."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.build = folder, folder / "build"
        self.build.mkdir(parents=True)
        (folder / "tmp").mkdir()

    def run(self, *words: object) -> str:
        """Run a command; its output."""
        user = () if os.geteuid() == 0 else ("--map-root-user",)
        return run("unshare", *user, f"--root={self.folder}", "--wd=/build", *words,
                   env={"PATH": "/usr/bin", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"})


def make(tree: pathlib.Path, architecture: str, folder: pathlib.Path, scratch: pathlib.Path,
         downloads: pathlib.Path) -> None:
    """Make `folder` from the sources in `tree`, by way of `scratch`; neither exists."""
    target = TARGETS[architecture]
    root, libraries = Root(scratch / "root"), scratch / "libraries"
    for package in lock.needed(architecture):
        unpack(downloads / package.file_name, _place(package, target, root, libraries))
    _compile(tree, target, root)

    lib = folder / "lib"
    lib.mkdir(parents=True)
    for name in "portmap", "cni-portmap":
        shutil.copy(root.build / name, folder)
    for name in "program", "lib.zip":
        shutil.copy(root.build / name, lib)
    shutil.copy(_find(target.loader, libraries), lib / "ld.so")
    system = pathlib.Path(f"{root.folder}{target.system}")
    waiting = [LATER, *_needed(root, target, lib / "program")]
    for extension in (root.build / "extensions").read_text().split():
        shutil.copy(f"{system}{extension}".replace(BUILDER.triple, target.triple), lib)
    for path in lib.glob("*.so"):
        waiting += _needed(root, target, path)
    while waiting:
        name = waiting.pop()
        if name != target.loader and not (lib / name).exists():
            shutil.copy(_find(name, libraries, system), lib / name)
            waiting += _needed(root, target, lib / name)

    for name in DOCUMENTS:
        shutil.copy(tree / name, folder)
    script = (tree / "packaging/install.sh").read_text()
    (folder / "install.sh").write_text(script.replace("@MACHINE@", target.machine))
    shutil.copytree(tree / "LICENSES", folder / "LICENSES")
    shutil.copy(tree / "packaging/LGPL-2.1-or-later.txt", folder / "LICENSES")  # of parts, which only name it
    for package in lock.parts(architecture):
        shutil.copy(_copyright(package, _place(package, target, root, libraries)),
                    folder / f"LICENSES/{package.name}-{package.suite}")
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.name in PROGRAMS or file.is_dir() else 0o644)


def _place(package: lock.Package, target: Target, root: Root, libraries: pathlib.Path) -> pathlib.Path:
    """Where a package is unpacked; a target's libraries to run with apart from all else, which has others."""
    foreign = target is not BUILDER and TARGETS.get(package.architecture) is target
    if package.suite != SUITE:
        return libraries
    return pathlib.Path(f"{root.folder}{target.system}") if foreign else root.folder


def _compile(tree: pathlib.Path, target: Target, root: Root) -> None:
    for source in "freeze.py", "program.c", "native.c", "stub.c":
        shutil.copy(tree / "packaging" / source, root.build)
    shutil.copytree(tree / "cni_portmap", root.build / "cni_portmap")
    root.run(PYTHON, "-sS", "freeze.py", "/build", "/usr/lib/python3/dist-packages", STDLIB, f"{STDLIB}/lib-dynload")
    stdlib, include = f"{target.system}{STDLIB}", f"{target.system}/usr/include"
    # The module of JSON is needed by each call, so it is linked and not looked for.
    root.run(target.compiler, *CC, "-fno-pie", "-no-pie", "-Wl,-E", f"-I{include}/{PYTHON}", f"-I{include}",
             "program.c", "native.c", "frozen.c", f"{stdlib}/config-3.11-{target.triple}/libpython3.11.a",
             f"-L{target.system}/usr/lib/{target.triple}", "-l:libexpat.a", "-l:libz.a", f"-L{stdlib}/lib-dynload",
             f"-l:_json.cpython-311-{target.triple}.so", "-lm", "-o", "program")
    for name in "portmap", "cni-portmap":
        root.run(target.compiler, *CC, *STUB, f'-DROLE="{name}"', "-o", name)


def _needed(root: Root, target: Target, path: pathlib.Path) -> list[str]:
    """The libraries that an ELF file needs."""
    shutil.copy(path, root.build / "elf")
    return re.findall(r"NEEDED +(\S+)", root.run(f"{target.triple}-objdump", "-p", "elf"))


def _find(name: str, *folders: pathlib.Path) -> pathlib.Path:
    """The file of that name in the first folder that has it."""
    for folder in folders:
        for path in sorted(folder.rglob(name)):
            if path.exists():
                return path
    raise SystemExit(f"release: no package of packaging/lock has {name}: add the one that has")


def _copyright(package: lock.Package, system: pathlib.Path) -> pathlib.Path:
    """A package's statement of its licences. Its folder may be a link to another package's."""
    folder = system / f"usr/share/doc/{package.name}"
    return (folder.parent / os.readlink(folder) if folder.is_symlink() else folder) / "copyright"
