"""The Debian packages that the bundle is made of: locked by version and sha256, in the file `lock` beside this one.

Each line there: use, suite, package, version, architecture, sha256, and a licence (SPDX) where something of it is in
the bundle. Uses: `part`, of the bundle of its architecture; `tool`, what makes bundles; `cross`, what makes that of
arm64.
"""
import hashlib
import pathlib
import re
import sys
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "integration"))

from debian import apt, field, run  # noqa: E402

LOCK = HERE / "lock"
RENEW = "scripts/release --renew-lock"


class Package(NamedTuple):
    """A line of the lock."""

    use: str
    suite: str
    name: str
    version: str
    architecture: str
    sha256: str
    licence: str = ""

    @property
    def query(self) -> str:
        """How apt is asked for it."""
        return self.name if self.architecture == "all" else f"{self.name}:{self.architecture}"

    @property
    def file_name(self) -> str:
        """As apt-get calls it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


class Source(NamedTuple):
    """A source package."""

    name: str
    version: str


def read() -> list[Package]:
    """The lines of the lock."""
    lines = (line for line in LOCK.read_text().splitlines() if line and line[0] != "#")
    return [Package(*line.split(maxsplit=6)) for line in lines]


def needed(*architectures: str) -> list[Package]:
    """Those that the bundles of architectures need. What makes them runs on amd64, with that architecture's Python."""
    builders = {package.suite for package in read() if package.use == "tool"}
    return [package for package in read() if package.use in _uses(architectures) and
            (package.architecture in (*architectures, "all") or
             (package.architecture == "amd64" and package.suite in builders))]


def parts(*architectures: str) -> list[Package]:
    """Those that something of is in the bundles of architectures."""
    return [package for package in read() if package.licence and package.use in _uses(architectures) and
            package.architecture in (*architectures, "all")]


def _uses(architectures: tuple[str, ...]) -> tuple[str, ...]:
    return ("tool", "part") if architectures == ("amd64",) else ("tool", "part", "cross")


def update(packages: list[Package], folder: pathlib.Path) -> list[str]:
    """The options of an apt that knows the newest packages of all suites of the lock."""
    suites = sorted({package.suite for package in packages})
    options = apt(folder / "apt", *suites, *(f"{suite}-security" for suite in suites))
    options.append(f"-oAPT::Architectures={','.join({package.architecture for package in packages} - {'all'})}")
    try:
        run("apt-get", *options, "-oAPT::Update::Error-Mode=any", "update")
    except SystemExit as error:
        raise SystemExit(f"release: no lists of packages: is there a network? {error}") from None
    return options


def fetch(packages: list[Package], folder: pathlib.Path) -> None:
    """Download into `folder` what is not there, and check all of it. Raises SystemExit."""
    folder.mkdir(parents=True, exist_ok=True)
    if missing := [package for package in packages if not _is_good(package, folder)]:
        options = update(packages, folder)
        try:
            run("apt-get", *options, "download", *(f"{package.query}={package.version}" for package in missing),
                cwd=folder)
        except SystemExit:
            table = run("apt-cache", *options, "madison", *(package.query for package in missing))
            known = re.findall(r"(?m)^ *(\S+) \| +(\S+) \|", table)
            gone = [f"{package.name} {package.version}" for package in missing
                    if not {(package.name, package.version), (package.query, package.version)} & {*known}]
            if not gone:
                raise
            raise SystemExit(f"release: no longer to be had: {', '.join(gone)}\n"
                             f"  take the newest, and look at what has changed: {RENEW}") from None
    if wrong := [package.file_name for package in packages if not _is_good(package, folder)]:
        raise SystemExit(f"release: not what packaging/lock says: {', '.join(wrong)}, in {folder}\n"
                         f"  remove it, or take the newest: {RENEW}")


def _is_good(package: Package, folder: pathlib.Path) -> bool:
    path = folder / package.file_name
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256


def renew(folder: pathlib.Path) -> None:
    """Write the newest version of each package, security updates included, to the lock."""
    packages = read()
    options = update(packages, folder)
    names = sorted({package.query for package in packages})
    known = re.findall(r"(?m)^ *(\S+) \| +(\S+) \| \S+ (\S+?)(?:-security)?/main \S+ Packages$",
                       run("apt-cache", *options, "madison", *names))
    newest = {(name.partition(":")[0], name.partition(":")[2] or "amd64", suite): version
              for name, version, suite in reversed(known)}  # apt names the newest first
    about = run("apt-cache", *options, "show", *(f"{name}:{architecture}={version}" for (name, architecture, _), version
                                                 in newest.items()))
    records = [dict(re.findall(r"(?m)^(\S+): (\S+)$", record)) for record in about.split("\n\n")]
    found = {(record["Package"], record["Architecture"], record["Version"]): record for record in records if record}
    new = {}
    for package in packages:
        one = "amd64" if package.architecture == "all" else package.architecture
        version = newest.get((package.name, one, package.suite))
        if not version:
            raise SystemExit(f"release: {package.suite} has no {package.query}")
        record = found.get((package.name, one, version)) or found[package.name, "all", version]
        if version != package.version:
            print(f"{package.name}: {package.version} -> {version}")
        new[package] = package._replace(version=version, architecture=record["Architecture"], sha256=record["SHA256"])
    head = [line for line in LOCK.read_text().splitlines() if line.startswith("#")]
    LOCK.write_text("\n".join([*head, *(" ".join(package).rstrip() for package in new.values()), ""]))


def source_of(package: Package, folder: pathlib.Path) -> Source:
    """The source package that a package is made from."""
    name, _, version = field(folder / package.file_name, "Source").partition(" (")
    return Source(name or package.name, version.rstrip(")") or package.version)
