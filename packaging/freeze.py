"""Compile the bundle's modules: those of a call that succeeds into C, all others into a zip.

freeze.py FOLDER...: run by the interpreter whose bytecode is wanted, with PYTHONHASHSEED=0. The first folder has
cni_portmap, the others its libraries and the standard library's. Writes into the current folder: frozen.c, a table of
frozen modules (PyImport_FrozenModules); lib.zip; and extensions, the paths of extension modules, a line each.
Nothing of the time, or of this machine's paths, is in them.
"""
import importlib.util
import marshal
import modulefinder
import pathlib
import sys
import zipfile
from typing import NamedTuple

# Imported by name at run time, where no import statement is to be found.
BY_NAME = ("json.decoder", "encodings.ascii", "encodings.latin_1", "encodings.cp437", "encodings.idna")
# Imported where they are there, and not needed: tests, terminals, other systems, what OpenSSL (Apache-2.0) belongs to.
WITHOUT = ("test", "unittest", "doctest", "pdb", "pydoc", "tkinter", "distutils", "multiprocessing",
           "concurrent.futures.process", "xmlrpc", "ssl", "_ssl", "_hashlib", "ctypes.macholib", "curses", "readline",
           "requests", "rfc3339_validator", "rfc3986_validator", "rfc3987", "webcolors", "jsonpointer", "uri_template",
           "fqdn", "isoduration", "hypothesis", "nftables", "pvectorc", "bz2", "lzma", "asyncio.windows_events",
           "asyncio.windows_utils", "pkg_resources", "setuptools", "jsonschema._suite", "jsonschema.benchmarks",
           "jsonschema.tests", "_uuid", "_decimal")
ENCODINGS = ("encodings", "encodings.aliases", "encodings.utf_8")  # of each start


class Module(NamedTuple):
    """A module: its file, and whether it is a package."""

    path: pathlib.Path
    is_package: bool

    def file(self, name: str) -> str:
        """The file as one in the zip; bytecode calls itself so in messages."""
        return name.replace(".", "/") + ("/__init__.py" if self.is_package else ".py")

    def bytecode(self, name: str) -> bytes:
        """The code object, marshalled."""
        return marshal.dumps(compile(self.path.read_bytes(), self.file(name), "exec"))


Modules = dict[str, Module]


def closure(folders: list[str], roots: list[str], *without: str) -> Modules:
    """All that `roots` import, late imports included, and the packages around it."""
    finder = modulefinder.ModuleFinder(folders, excludes=[*WITHOUT, *without])
    for root in roots:
        finder.import_hook(root)
    found = ((name, vars(module)) for name, module in finder.modules.items())
    return {name: Module(pathlib.Path(about["__file__"]), bool(about["__path__"])) for name, about in found
            if about["__file__"]}


def frozen(modules: Modules) -> str:
    """A table of frozen modules. Source: struct _frozen of Python 3.11, cpython/import.h."""
    lines, table = ["#include <Python.h>"], ["const struct _frozen frozen_modules[] = {"]
    for index, (name, module) in enumerate(sorted(modules.items())):
        code = module.bytecode(name)
        lines += [f"static const unsigned char code{index}[] = {{",
                  *(",".join(map(str, code[at:at + 32])) + "," for at in range(0, len(code), 32)), "};"]
        table.append(f'    {{"{name}", code{index}, {len(code)}, {module.is_package:d}, NULL}},')
    return "\n".join([*lines, *table, "    {NULL, NULL, 0, 0, NULL}};", ""])


def documents(folders: list[str], packages: set[str]) -> dict[str, bytes]:
    """The JSON documents of packages, by their paths in the zip."""
    return {str(path.relative_to(folder)): path.read_bytes() for package in packages for folder in folders
            for path in pathlib.Path(folder, package).rglob("*.json")}


def write_zip(modules: Modules, data: dict[str, bytes]) -> None:
    """Write bytecode without sources, and data, to lib.zip."""
    header = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)  # by a hash that nobody checks
    code = {module.file(name) + "c": header + module.bytecode(name) for name, module in modules.items()}
    with zipfile.ZipFile("lib.zip", "w") as archive:
        for path, content in sorted({**code, **data}.items()):
            entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)


def main(folders: list[str]) -> None:
    """Write the files."""
    root = pathlib.Path(folders[0])
    ours = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            for path in sorted(root.glob("cni_portmap/**/*.py"))]
    called = closure(folders, ["cni_portmap.plugin", *ENCODINGS], "cni_portmap.explain")
    hot = {name: module for name, module in called.items() if name in ENCODINGS or name in ours}
    pathlib.Path("frozen.c").write_text(frozen(hot))
    rest = {name: module for name, module in closure(folders, [*ours, *BY_NAME]).items() if name not in hot}
    extensions = sorted(name for name, module in rest.items() if module.path.suffix == ".so")
    pathlib.Path("extensions").write_text("".join(f"{rest.pop(name).path}\n" for name in extensions))
    write_zip(rest, documents(folders, {"cni_portmap", *(name.partition(".")[0] for name in rest)}))


main(sys.argv[1:])
