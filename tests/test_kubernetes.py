"""deploy/kubernetes: each overlay asks for what its comments give a reason for, and for nothing else."""
import pathlib
import re
import shutil
import subprocess
import sys

from cni_portmap import __version__
from cni_portmap.cli.main import main
import pytest
import yaml
from helpers import ROOT

DEPLOY = ROOT / "deploy/kubernetes"
SOURCES = sorted(DEPLOY.rglob("*.yaml"))
IMAGE = f"cni-portmap:{__version__}"
# What stands in a container's or a pod's description when it is more than a process in a box.
PRIVILEGE = re.compile(r"^\s*(- )?(hostNetwork|hostPID|hostIPC|hostPort|privileged|priorityClassName|runAsUser|"
                       r"mountPath|mountPropagation|operator: Exists|type: (spc_t|Unconfined)|name: system:openshift|"
                       r"[A-Z_]+$|pod-security)")
ADDED = {"install": ["DAC_OVERRIDE"], "uninstall": ["DAC_OVERRIDE"], "agent": ["NET_ADMIN", "SYS_PTRACE"]}
MOUNTED = {"install": {"/host/bin": "bin-dir"}, "uninstall": {"/host/bin": "bin-dir"},
           "agent": {"/run": "run", "/var/run": "run", "/var/lib/cni": "libcni"}}


def documents(text):
    return [each for each in yaml.safe_load_all(text) if each]


def daemon_set(text):
    """The one DaemonSet among the objects in a text."""
    found, = [each for each in documents(text) if each["kind"] == "DaemonSet"]
    return found


def bin_dirs():
    """The folder of plugins of each overlay, as docs/kubernetes.md has them."""
    table = (ROOT / "docs/kubernetes.md").read_text().partition("## Which overlay")[2].partition("\n## ")[0]
    return dict(re.findall(r"(?m)^\| [^|]+ \| `deploy/kubernetes/([\w/]+)` \| `([^`]+)` \|", table))


def broken_rules(document, bin_dir):
    """What a DaemonSet asks for against the rules."""
    spec = document["spec"]
    pod = spec["template"]["spec"]
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    names = [each["name"] for each in containers]
    volumes = {each["name"]: each["hostPath"] for each in pod["volumes"]}
    strategy = spec["updateStrategy"]
    if strategy["type"] != "RollingUpdate" or not strategy["rollingUpdate"]["maxUnavailable"]:
        yield "it is not rolled out node by node"
    if {"operator": "Exists"} not in pod["tolerations"] or pod["priorityClassName"] != "system-node-critical":
        yield "it may be missing on a node"
    term, = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    if {"key": "eks.amazonaws.com/compute-type", "operator": "NotIn", "values": ["fargate"]} not in \
            term["matchExpressions"]:
        yield "it is for nodes that take no DaemonSet, too"
    if pod["automountServiceAccountToken"] or pod.get("hostIPC"):
        yield "the pod has what nothing needs"
    if pod.get("hostPID", False) != ("agent" in names):
        yield "hostPID is the agent's"
    if volumes["bin-dir"] != {"path": bin_dir, "type": "Directory"}:
        yield f"the folder of plugins is {volumes['bin-dir']}"
    if {*volumes} != {volume for name in names for volume in MOUNTED[name].values()}:
        yield "the volumes are not those of the containers"
    for container in containers:
        name, security = container["name"], container["securityContext"]
        if container["image"] != IMAGE:
            yield f"{name}: its image is {container['image']}"
        if not security["readOnlyRootFilesystem"] or security["allowPrivilegeEscalation"] or "privileged" in security:
            yield f"{name}: it may write or become more"
        if security["seccompProfile"] != {"type": "RuntimeDefault"}:
            yield f"{name}: its system calls are not filtered"
        if security["capabilities"]["drop"] != ["ALL"] or security["capabilities"].get("add", []) != ADDED[name]:
            yield f"{name}: its capabilities are {security['capabilities']}"
        if not container.get("resources", {}).get("limits", {}).get("memory"):
            yield f"{name}: its memory has no limit"
        if ("appArmorProfile" in security) != (name == "agent"):
            yield f"{name}: AppArmor"
        if {each["mountPath"]: each["name"] for each in container["volumeMounts"]} != MOUNTED[name]:
            yield f"{name}: it mounts {container['volumeMounts']}"
        for mount in container["volumeMounts"]:
            if mount["name"] == "libcni" and not mount.get("readOnly"):
                yield f"{name}: it may write libcni's files"
            if mount["name"] == "run" and mount.get("mountPropagation") != "HostToContainer":
                yield f"{name}: it does not see namespaces that come later"
        if name == "install" and container["readinessProbe"]["exec"]["command"] != \
                ["/cni-portmap", *container["args"][:-1], "--check"]:
            yield f"{name}: ready is something else than that the file is ours"


def built(folder):
    """An overlay as kustomize builds it."""
    places = f"{ROOT}/integration/cluster/bin"
    program = shutil.which("kustomize") or shutil.which("kustomize", path=places)
    if not program:
        pytest.skip("kustomize is not installed: scripts/test cluster fetches it")
    return subprocess.run([program, "build", folder], capture_output=True, text=True, check=True, timeout=60).stdout


def own(tmp_path, overlay, *components, way_back=False):
    """What comes out of a kustomization of one's own (an overlay, components, another registry); or the way back."""
    shutil.copytree(DEPLOY, tmp_path / "deploy/kubernetes")
    for name, resource, *added in (
            ("my-cluster", f"../deploy/kubernetes/{overlay}", *components),
            ("way-back", "../my-cluster", *(() if "agent" in components else ("agent",)), "uninstall")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kustomization.yaml").write_text(yaml.safe_dump({
            "resources": [resource], "components": [f"../deploy/kubernetes/components/{each}" for each in added],
            "images": [{"name": "cni-portmap", "newName": "registry.example.org/cni-portmap"}]}))
    found = built(tmp_path / ("way-back" if way_back else "my-cluster"))
    assert found.count(f"image: registry.example.org/{IMAGE}\n") == found.count("image: ")
    return found.replace("registry.example.org/", "")


def test_overlays_are_those_of_the_documentation():
    """docs/kubernetes.md has each overlay and its folder of plugins."""
    overlays = {str(path.parent.relative_to(DEPLOY)) for path in DEPLOY.glob("overlays/*/kustomization.yaml")}
    assert {*bin_dirs()} == overlays - {"overlays/uninstall"} | {"base"}


def test_base():
    """The base, as it stands in its file, keeps the rules."""
    assert [*broken_rules(daemon_set((DEPLOY / "base/daemonset.yaml").read_text()), bin_dirs()["base"])] == []


@pytest.mark.parametrize("way_back", [False, True], ids=["install", "uninstall"])
@pytest.mark.parametrize("overlay", ["base", "overlays/gke", "overlays/k3s", "overlays/microk8s", "overlays/openshift"])
def test_overlay(overlay, way_back, tmp_path):
    """Each overlay is built, and what comes out keeps the rules; so does the way back from it."""
    found = own(tmp_path, overlay, way_back=True) if way_back else built(DEPLOY / overlay)
    document = daemon_set(found)
    pod = document["spec"]["template"]["spec"]
    assert [*broken_rules(document, bin_dirs()[overlay])] == []
    names = [each["name"] for each in (*pod.get("initContainers", []), *pod["containers"])]
    assert names == (["uninstall", "agent"] if way_back else ["install"])
    assert document["metadata"]["namespace"] == ("cni-portmap" if "openshift" in overlay else "kube-system")
    assert ("spc_t" in found) == ("openshift" in overlay)


def test_way_back_from_base():
    """It needs no kustomization of one's own."""
    assert [*broken_rules(daemon_set(built(DEPLOY / "overlays/uninstall")), bin_dirs()["base"])] == []


@pytest.mark.parametrize("way_back", [False, True], ids=["install", "uninstall"])
@pytest.mark.parametrize("components", [["agent"], ["agent", "selinux"], ["agent", "before-1.30"]], ids=" ".join)
def test_components(components, way_back, tmp_path):
    """A kustomization of one's own keeps the rules, and the way back from it has all that it has."""
    found = own(tmp_path, "overlays/k3s", *components, way_back=way_back)
    document = daemon_set(found)
    old = "before-1.30" in components
    assert [*broken_rules(document, bin_dirs()["overlays/k3s"])] == (["agent: AppArmor"] if old else [])
    assert ("appArmorProfile" in found) != old  # which no API server before 1.30 knows, and so refuses
    annotations = document["spec"]["template"]["metadata"].get("annotations", {})
    assert annotations == ({"container.apparmor.security.beta.kubernetes.io/agent": "unconfined"} if old else {})
    assert ("spc_t" in found) == ("selinux" in components)
    assert {each["name"] for each in document["spec"]["template"]["spec"]["containers"]} == {
        "agent", *([] if way_back else ["install"])}


OWN_AGENT = """
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: cni-portmap}
spec:
  template:
    spec:
      containers:
        - name: agent
          args: [agent, --metrics, "127.0.0.1:9472"]
          ports: null
          readinessProbe: null
          livenessProbe: null
"""


def test_way_back_leaves_the_agent_as_it_is(tmp_path):
    """Its address, its image, its probes are those of one's own kustomization; it only looks more often."""
    own(tmp_path, "base", "agent")
    path = tmp_path / "my-cluster/kustomization.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {
        "images": [{"name": "cni-portmap", "newName": "registry.example.org/cni-portmap", "newTag": "mine"}],
        "patches": [{"patch": OWN_AGENT}]}))
    way_back = tmp_path / "way-back/kustomization.yaml"
    way_back.write_text(yaml.safe_dump({key: each for key, each in yaml.safe_load(way_back.read_text()).items()
                                        if key != "images"}))
    before, after = (daemon_set(built(tmp_path / name))["spec"]["template"]["spec"]
                     for name in ("my-cluster", "way-back"))
    expected, = [each for each in before["containers"] if each["name"] == "agent"]
    found, = after["containers"]
    assert found == expected | {"args": [*expected["args"], "--gc-seconds=2"]}
    assert after["initContainers"][0]["image"] == found["image"] == "registry.example.org/cni-portmap:mine"


def test_way_back_needs_the_agent(tmp_path):
    """Without it nothing is built: the rules of pods that end would stay."""
    own(tmp_path, "base")
    path = tmp_path / "way-back/kustomization.yaml"
    path.write_text(path.read_text().replace("- ../deploy/kubernetes/components/agent\n", ""))
    with pytest.raises(subprocess.CalledProcessError):
        built(tmp_path / "way-back")


MISTAKES = {
    "image": lambda pod, install: install.update(image="cni-portmap:latest"),
    "may write": lambda pod, install: install["securityContext"].update(readOnlyRootFilesystem=False),
    "become more": lambda pod, install: install["securityContext"].update(privileged=True),
    "filtered": lambda pod, install: install["securityContext"].update(seccompProfile={"type": "Unconfined"}),
    "capabilities": lambda pod, install: install["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
    "AppArmor": lambda pod, install: install["securityContext"].update(appArmorProfile={"type": "Unconfined"}),
    "mounts": lambda pod, install: install["volumeMounts"].append({"name": "bin-dir", "mountPath": "/etc"}),
    "ready": lambda pod, install: install["readinessProbe"]["exec"]["command"].remove("--check"),
    "hostPID": lambda pod, install: pod.update(hostPID=True),
    "nothing needs": lambda pod, install: pod.update(hostIPC=True),
    "missing": lambda pod, install: pod.update(tolerations=[]),
    "no DaemonSet": lambda pod, install: pod["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]["matchExpressions"].pop(),
    "limit": lambda pod, install: install["resources"].pop("limits"),
    "folder": lambda pod, install: pod["volumes"][0]["hostPath"].update(type="DirectoryOrCreate"),
    "volumes": lambda pod, install: pod["volumes"].append({"name": "all", "hostPath": {"path": "/"}}),
}


@pytest.mark.parametrize("word", MISTAKES)
def test_rules_are_seen_to_be_broken(word):
    """Each mistake in the base is found."""
    document = daemon_set((DEPLOY / "base/daemonset.yaml").read_text())
    pod = document["spec"]["template"]["spec"]
    MISTAKES[word](pod, pod["containers"][0])
    found, = broken_rules(document, bin_dirs()["base"])
    assert word in found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_source(path):
    """It is YAML; each privilege has its reason beside it; a kustomization names files that exist."""
    text = path.read_text()
    assert documents(text)
    assert [line for line in text.splitlines() if PRIVILEGE.match(line) and "  # " not in line] == []
    assert re.findall(r"image: (.*)", text) in ([], [IMAGE])
    if path.name == "kustomization.yaml":
        found = yaml.safe_load(text)
        named = [*found.get("resources", []), *found.get("components", []),
                 *(each["path"] for each in found.get("patches", []))]
        assert [each for each in named if not (path.parent / each).exists()] == []
        beside = {each.name for each in path.parent.glob("*.yaml")} - {path.name}
        assert beside == {pathlib.Path(each).name for each in named if each.endswith(".yaml")}


def test_roll_outs_are_simulated():
    """The table in docs/scale.md is what the model says."""
    program = ROOT / "integration/measure/roll_outs.py"
    made = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=60).stdout
    text = (ROOT / "docs/scale.md").read_text()
    assert text.partition("<!-- roll-outs -->\n")[2].partition("<!-- end -->")[0] == made


def test_arguments_of_the_installer(monkeypatch):
    """The command takes them, and those of the probe."""
    seen = []
    monkeypatch.setattr("cni_portmap.cli.node_install.run", lambda options, _: seen.append(options) or 0)
    install, = daemon_set((DEPLOY / "base/daemonset.yaml").read_text())["spec"]["template"]["spec"]["containers"]
    pod = daemon_set((DEPLOY / "components/uninstall/uninstall.yaml").read_text())["spec"]["template"]["spec"]
    for words in install["args"], install["readinessProbe"]["exec"]["command"][1:], pod["initContainers"][0]["args"]:
        assert main(words) == 0
    assert [(each.watch, each.check, each.uninstall) for each in seen] == [
        (True, False, False), (False, True, False), (False, False, True)]
    assert {each.bin_dir for each in seen} == {"/host/bin"}


def test_arguments_of_the_agent(monkeypatch):
    """The command takes them."""
    seen = []
    monkeypatch.setattr("cni_portmap.cli.agent.run", lambda options, _: seen.append(options) or 0)
    pod = daemon_set((DEPLOY / "components/agent/agent.yaml").read_text())["spec"]["template"]["spec"]
    more = yaml.safe_load((DEPLOY / "components/uninstall/agent.yaml").read_text())[1]["value"]
    words = [word.replace("$(NODE_IP)", "192.0.2.1") for word in pod["containers"][0]["args"]]
    assert main(words) == main([*words, more]) == 0
    assert [(each.gc_seconds, each.metrics) for each in seen] == [(60, "192.0.2.1:9472"), (2, "192.0.2.1:9472")]
