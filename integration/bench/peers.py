"""The peers, from distribution packages: of this machine's release, or unpacked from a newer one."""
import pathlib
import platform
import subprocess

import lab

from .results import say

PACKAGE = "containernetworking-plugins"


def installed_version(package: str, root: pathlib.Path = pathlib.Path("/")) -> str:
    return _upstream(lab.run("dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f", "${Version}", package))


def _upstream(version: str) -> str:
    return version.rpartition(":")[2].partition("-")[0].partition("+")[0]


def mirror() -> str:
    """Where this machine gets its distribution's packages from."""
    wanted = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Component: main",
              f"Origin: {platform.freedesktop_os_release()['ID'].capitalize()}"]
    found = lab.run(*wanted) or lab.run("apt-get", "-qq", "update", timeout=300) or lab.run(*wanted)
    uris = [uri for uri in found.split() if "security" not in uri]
    if not uris:
        raise SystemExit("bench: /etc/apt names no source of the distribution; see --cache")
    return uris[0]


def fetch(suite: str, package: str, folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Unpack a package of another suite into `folder`; where, and its upstream version. The machine is not changed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not [*folder.glob(f"{package}_*.deb")]:
        say(f"fetching {package} of {suite}")
        keyring = f"/usr/share/keyrings/{platform.freedesktop_os_release()['ID']}-archive-keyring.gpg"
        options = f"[signed-by={keyring}] " if pathlib.Path(keyring).exists() else ""
        (folder / "sources.list").write_text(f"deb {options}{mirror()} {suite} main\n")
        (folder / "lists/partial").mkdir(parents=True, exist_ok=True)
        settings = {"Dir::Etc::SourceList": folder / "sources.list", "Dir::Etc::SourceParts": "-",
                    "Dir::State::Lists": folder / "lists", "Dir::Cache::PkgCache": "", "Dir::Cache::SrcPkgCache": "",
                    "APT::Sandbox::User": "root"}
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
        lab.run(*apt, "update", timeout=300)
        subprocess.run([*apt, "download", package], cwd=folder, check=True, timeout=300)
    (deb,) = folder.glob(f"{package}_*.deb")
    lab.run("dpkg", "-x", deb, folder / "root")
    return folder / "root", _upstream(lab.run("dpkg-deb", "-f", deb, "Version").strip())


def newer_system(folder: pathlib.Path, suite: str) -> str:
    """A system of another suite in `folder`, made if it is not there; its version of libnftables."""
    if not (folder / "usr/bin/python3").exists():
        lab.run(lab.ROOT / "scripts/packages", "system", timeout=900)
        say(f"making a {suite} in {folder}")
        packages = "python3,python3-nftables,nftables"
        lab.run("debootstrap", "--variant=minbase", f"--include={packages}", suite, folder, mirror(), timeout=900)
    return installed_version("libnftables1", folder)


def enter_system(folder: pathlib.Path, lib: pathlib.Path) -> None:
    """Show `folder` what its plugin needs: this lab's /run and /proc, and the modules in `lib` compiled."""
    for path in "/run", "/proc", "/dev":
        lab.run("mount", "--rbind", path, f"{folder}{path}")
    lab.run("chroot", folder, "/usr/bin/python3", "-IS", "-m", "compileall", "-q", "--invalidation-mode",
            "unchecked-hash", lib)
