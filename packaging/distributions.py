"""The packages of distributions, by their own tools: debhelper's and rpm's. They hold no interpreter and no library."""
import datetime
import email.utils
import pathlib
import shutil

from debian import run

MACROS = {"use_source_date_epoch_as_buildtime": "1", "clamp_mtime_to_source_date_epoch": "1", "_buildhost": "localhost",
          "_source_date_epoch_from_changelog": "0"}


def make_deb(tree: pathlib.Path, version: str, epoch: int, out: pathlib.Path, scratch: pathlib.Path) -> None:
    """Build the package for Debian and Ubuntu from the files in `tree`, and put it into `out`."""
    build = scratch / "deb" / f"cni-portmap-{version}"
    shutil.copytree(tree, build)
    shutil.copytree(tree / "packaging/debian", build / "debian")
    maintainer = next(line.removeprefix("Maintainer: ") for line in (build / "debian/control").read_text().splitlines()
                      if line.startswith("Maintainer: "))
    time = email.utils.format_datetime(datetime.datetime.fromtimestamp(epoch, datetime.UTC))
    (build / "debian/changelog").write_text(f"cni-portmap ({version}) unstable; urgency=medium\n\n"
                                            f"  * Version {version}.\n\n -- {maintainer}  {time}\n")
    # No compiler is needed, which each build is taken to need.
    run("dpkg-buildpackage", "--build=binary", "--no-check-builddeps", "--no-sign", cwd=build)
    shutil.copy(build.parent / f"cni-portmap_{version}_all.deb", out)


def make_rpm(tree: pathlib.Path, version: str, out: pathlib.Path, scratch: pathlib.Path) -> None:
    """Build the package for Fedora and its kin from the files in `tree`, and put it into `out`."""
    top = scratch / "rpm"
    defined = {**MACROS, "_topdir": top, "version": version, "tree": tree}
    run("rpmbuild", "-bb", *(word for name, value in defined.items() for word in ("--define", f"{name} {value}")),
        tree / "packaging/rpm/cni-portmap.spec")
    shutil.copy(top / f"RPMS/noarch/cni-portmap-{version}-1.noarch.rpm", out)
