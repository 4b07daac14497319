"""The peers, from distribution packages: of this machine's release, or unpacked from a newer one."""
import pathlib

import debian
import lab

from .results import say

PACKAGE = "containernetworking-plugins"


def installed_version(package: str, root: pathlib.Path = pathlib.Path("/")) -> str:
    return _upstream(lab.run("dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f", "${Version}", package))


def _upstream(version: str) -> str:
    return version.rpartition(":")[2].partition("-")[0].partition("+")[0]


def fetch(suite: str, package: str, folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Unpack a package of another suite into `folder`; where, and its upstream version. The machine is not changed."""
    say(f"fetching {package} of {suite}")
    found = debian.fetch(suite, package, folder)
    return debian.unpack(found, folder / "root"), _upstream(debian.field(found, "Version"))


def newer_system(folder: pathlib.Path, suite: str) -> str:
    """A system of another suite in `folder`, made if it is not there; its version of libnftables."""
    if not (folder / "usr/bin/python3").exists():
        lab.run(lab.ROOT / "scripts/packages", "system", timeout=900)
        say(f"making a {suite} in {folder}")
        packages = "python3,python3-nftables,nftables"
        script = [] if pathlib.Path("/usr/share/debootstrap/scripts", suite).exists() else ["sid"]  # a newer release
        lab.run("debootstrap", "--variant=minbase", f"--include={packages}", suite, folder, debian.mirror(), *script,
                timeout=900)
    return installed_version("libnftables1", folder)


def enter_system(folder: pathlib.Path, lib: pathlib.Path) -> None:
    """Show `folder` what its plugin needs: this lab's /run and /proc, and the modules in `lib` compiled."""
    for path in "/run", "/proc", "/dev":
        lab.run("mount", "--rbind", path, f"{folder}{path}")
    lab.run("chroot", folder, "/usr/bin/python3", "-IS", "-m", "compileall", "-q", "--invalidation-mode",
            "unchecked-hash", lib)
