"""The image: an OCI layout in an archive, with an index of the architectures. No tool for images is needed to make it.

An image has two layers: the bundle's archive as it is released, byte for byte, and /cni-portmap, a link to its command.
Nothing else is in it. Source: the OCI image specification 1.0, image-layout.md, image-index.md, manifest.md, config.md.
"""
import datetime
import gzip
import hashlib
import json
import pathlib
import shutil

import archives

LAYOUT = "application/vnd.oci.image."
ENTRY = "cni-portmap"  # the bundle's command; the image's program is /cni-portmap


class Layout:
    """A folder that becomes an OCI layout."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs/sha256"
        self._blobs.mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def add(self, kind: str, path: pathlib.Path) -> dict[str, object]:
        """Put a file there; the descriptor that says what and where it is."""
        digest = archives.digest(path)
        shutil.copy(path, self._blobs / digest)
        return {"mediaType": f"{LAYOUT}{kind}", "digest": f"sha256:{digest}", "size": path.stat().st_size}

    def add_document(self, kind: str, document: object) -> dict[str, object]:
        """Put a JSON document there; its descriptor."""
        content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(content).hexdigest()
        (self._blobs / digest).write_bytes(content)
        return {"mediaType": f"{LAYOUT}{kind}+json", "digest": f"sha256:{digest}", "size": len(content)}


def write_image(target: pathlib.Path, bundles: dict[str, pathlib.Path], version: str, epoch: int,
                scratch: pathlib.Path) -> None:
    """Write the image of a version to `target`, a tar. `bundles`: architecture -> the bundle's released archive."""
    layout = Layout(scratch / "layout")
    created = datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = {"org.opencontainers.image.title": "cni-portmap", "org.opencontainers.image.version": version}
    link = scratch / "link"
    link.mkdir()
    (link / ENTRY).symlink_to(f"cni-portmap-{version}/{ENTRY}")
    archives.write_tar(scratch / "link.tar.gz", link, epoch, top=False)
    manifests = []
    for architecture, bundle in bundles.items():
        layers = bundle, scratch / "link.tar.gz"
        config = layout.add_document("config.v1", {
            "architecture": architecture, "os": "linux", "created": created,
            "config": {"Entrypoint": [f"/{ENTRY}"], "Labels": about},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{_digest_inside(layer)}" for layer in layers]},
            "history": [{"created": created, "created_by": f"scripts/release: {what}"} for what in ("bundle", "link")]})
        manifest = layout.add_document("manifest.v1", {
            "schemaVersion": 2, "mediaType": f"{LAYOUT}manifest.v1+json", "config": config, "annotations": about,
            "layers": [layout.add("layer.v1.tar+gzip", layer) for layer in layers]})
        manifests.append({**manifest, "platform": {"architecture": architecture, "os": "linux"}})
    index = layout.add_document("index.v1", {
        "schemaVersion": 2, "mediaType": f"{LAYOUT}index.v1+json", "manifests": manifests, "annotations": about})
    (layout.folder / "index.json").write_text(json.dumps({
        "schemaVersion": 2, "mediaType": f"{LAYOUT}index.v1+json",
        "manifests": [{**index, "annotations": {
            "org.opencontainers.image.ref.name": version,  # for skopeo; for containerd's import:
            "io.containerd.image.name": f"localhost/cni-portmap:{version}"}}]}, sort_keys=True))
    archives.write_tar(target, layout.folder, epoch, top=False)


def _digest_inside(archive: pathlib.Path) -> str:
    """The sha256 of what is compressed, in hexadecimal digits."""
    with gzip.open(archive) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
