"""Archives that have the same bytes whenever they are made: sorted, all of root's, of one time."""
import gzip
import hashlib
import pathlib
import tarfile


def write_tar(target: pathlib.Path, folder: pathlib.Path, epoch: int, top: bool = True) -> None:
    """Archive `folder`, compressed where `target` ends with .gz. `epoch`: seconds, of every file.

    `top`: under the folder's own name, else only what is in it.
    """
    def alike(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = epoch
        return entry

    with target.open("wb") as file:
        stream = gzip.GzipFile("", "wb", 9, file, mtime=0) if target.suffix == ".gz" else file
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
            within = folder.parent if top else folder
            for path in (*([folder] if top else []), *sorted(folder.rglob("*"))):
                archive.add(path, str(path.relative_to(within)), recursive=False, filter=alike)
        if stream is not file:
            stream.close()


def digest(path: pathlib.Path) -> str:
    """A file's sha256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(target: pathlib.Path, paths: list[pathlib.Path]) -> None:
    """Write what `sha256sum --check` reads, with names relative to the folder of `target`."""
    target.write_text("".join(f"{digest(path)}  {path.relative_to(target.parent)}\n" for path in sorted(paths)))
