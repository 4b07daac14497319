"""Packages of any release of Debian, by way of this machine's own mirror; the machine itself is not changed."""
import pathlib
import platform
import subprocess


def run(*words: object, **how: object) -> str:
    """A command that must succeed; its output. A failure names it, and what it said last."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False,
                          **how)  # type: ignore[call-overload]
    if done.returncode:
        said = (done.stderr or done.stdout)[-500:]
        raise SystemExit(f"{' '.join(map(str, words))}: status {done.returncode}\n{said}")
    return str(done.stdout)


def mirror(security: bool = False) -> str:
    """The source of this machine's distribution packages; of their `security` updates.

    Where it has none of these, they are beside the other, as on Debian's mirrors.
    """
    wanted = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Component: main",
              f"Origin: {platform.freedesktop_os_release()['ID'].capitalize()}"]
    found = run(*wanted) or run("apt-get", "-qq", "update") or run(*wanted)
    uris = [uri for uri in found.split() if ("security" in uri) == security]
    if not uris and not security:
        raise SystemExit("apt has no source of this distribution: expected one in /etc/apt")
    return uris[0] if uris else f"{mirror().rstrip('/')}-security/"


def apt(folder: pathlib.Path, *suites: str) -> list[str]:
    """The options of an apt that knows these suites alone, and their sources; its state is in `folder`."""
    (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
    keyring = f"/usr/share/keyrings/{platform.freedesktop_os_release()['ID']}-archive-keyring.gpg"
    options = f"[signed-by={keyring}] " if pathlib.Path(keyring).exists() else ""
    settings = {"Dir::Etc::SourceList": folder / "sources.list", "Dir::Etc::SourceParts": "-",
                "Dir::State::Lists": folder / "lists", "Dir::Cache::PkgCache": "", "Dir::Cache::SrcPkgCache": "",
                "APT::Sandbox::User": "root"}
    found = ["-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    if not (folder / "sources.list").exists():
        (folder / "sources.list").write_text("".join(
            f"{kind} {options}{mirror(suite.endswith('-security'))} {suite} main\n"
            for suite in suites for kind in ("deb", "deb-src")))
    return found


def fetch(suite: str, package: str, folder: pathlib.Path) -> pathlib.Path:
    """Download a package of a suite into `folder`, if it is not there; the file."""
    found = [*folder.glob(f"{package}_*.deb")]
    if not found:
        options = apt(folder, suite)
        try:
            run("apt-get", *options, "-oAPT::Update::Error-Mode=any", "update")
            run("apt-get", *options, "download", package, cwd=folder)
        except SystemExit as error:
            raise SystemExit(f"{package} of {suite} cannot be had: is there a network? {error}") from None
        found = [*folder.glob(f"{package}_*.deb")]
    return found[0]


def unpack(package: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Unpack a package file into `folder`, which is also returned."""
    run("dpkg", "-x", package, folder)
    return folder


def field(package: pathlib.Path, name: str) -> str:
    """A field of a package file, such as Version."""
    return run("dpkg-deb", "-f", package, name).strip()
