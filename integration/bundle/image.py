"""The image, run by runc as a container of deploy/kubernetes has it: these privileges, and no others.

The container's fields become runc's configuration. A field that is not known here is an error, so that the tests have
the privileges that the manifest asks for, always. What the kubelet's runtime adds of its own is not here: the default
profiles of seccomp and AppArmor.
"""
import json
import pathlib
import tarfile
import tempfile
from typing import Any

import lab
import yaml

MANIFEST = lab.ROOT / "deploy/kubernetes/base/daemonset.yaml"
BIN_DIR = "/host/bin"  # in the container
OF_NO_RIGHT = {"name", "image", "args", "readinessProbe", "resources", "securityContext", "volumeMounts"}
SECURITY = {"runAsUser", "readOnlyRootFilesystem", "allowPrivilegeEscalation", "capabilities", "seccompProfile"}


def unpack(archive: pathlib.Path, folder: pathlib.Path, architecture: str = "amd64") -> list[str]:
    """Unpack an image's layers, as a runtime does it, to a root folder; its entry point."""
    with tarfile.open(archive) as layout:
        def document(name: str) -> Any:
            file = layout.extractfile(name)
            assert file
            return json.load(file)

        def blob(of: Any) -> str:
            return f"blobs/sha256/{of['digest'].removeprefix('sha256:')}"
        index = document(blob(document("index.json")["manifests"][0]))
        manifest = document(blob(next(each for each in index["manifests"]
                                      if each["platform"] == {"architecture": architecture, "os": "linux"})))
        for layer in manifest["layers"]:
            with tarfile.open(fileobj=layout.extractfile(blob(layer))) as files:
                files.extractall(folder)
        entry: list[str] = document(blob(manifest["config"]))["config"]["Entrypoint"]
        return entry


def pod() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of the DaemonSet, and its container `install`."""
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]["template"]["spec"]
    assert not spec.get("hostPID") and not spec.get("hostIPC") and not spec.get("initContainers")
    container, = (each for each in spec["containers"] if each["name"] == "install")
    assert {*container} <= OF_NO_RIGHT and {*container["securityContext"]} <= SECURITY
    return spec, container


def configuration(root: pathlib.Path, bin_dir: pathlib.Path, arguments: list[str]) -> dict[str, Any]:
    """runc's configuration of the container, with these arguments. Source: the OCI runtime specification, config.md."""
    spec, container = pod()
    context = container["securityContext"]
    capabilities = [f"CAP_{name}" for name in context["capabilities"]["add"]]
    assert context["capabilities"]["drop"] == ["ALL"]
    mount, = container["volumeMounts"]
    assert mount == {"name": "bin-dir", "mountPath": BIN_DIR}
    namespaces = ["pid", "ipc", "uts", "mount", *([] if spec["hostNetwork"] else ["network"])]
    private = ["nosuid", "noexec", "nodev"]
    return {
        "ociVersion": "1.0.2", "root": {"path": str(root), "readonly": context["readOnlyRootFilesystem"]},
        "process": {
            "args": arguments, "cwd": "/", "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "user": {"uid": context["runAsUser"], "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            "noNewPrivileges": not context["allowPrivilegeEscalation"]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*private, "ro"]},
            {"destination": BIN_DIR, "type": "bind", "source": str(bin_dir), "options": ["rbind", "rprivate", "rw"]}],
        "linux": {
            "namespaces": [{"type": name} for name in namespaces],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]}}


class Runc:
    """Containers of one test; `place` is theirs."""

    def __init__(self, place: pathlib.Path) -> None:
        self._place, self.last = place, ""
        self._state = place / "runc"

    def run(self, root: pathlib.Path, bin_dir: pathlib.Path, arguments: list[str]) -> list[object]:
        """The command line that runs a new container."""
        folder = pathlib.Path(tempfile.mkdtemp(prefix="container-", dir=self._place))
        (folder / "config.json").write_text(json.dumps(configuration(root, bin_dir, arguments)))
        self.last = f"cni-portmap-{self._place.name[-40:]}-{folder.name}"
        return ["runc", "--root", self._state, "run", "--bundle", folder, self.last]

    def pid(self) -> int:
        """The first process of the last container, as this host numbers it."""
        state = json.loads(lab.run("runc", "--root", self._state, "state", self.last))
        assert state["status"] == "running"
        return int(state["pid"])

    def probe(self) -> list[object]:
        """The command line that does what the kubelet does to know whether the last container is ready."""
        return ["runc", "--root", self._state, "exec", self.last, *pod()[1]["readinessProbe"]["exec"]["command"]]
