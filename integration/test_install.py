"""scripts/install: twice, over itself while it is in use, beside others' files, and away again; and the pip package."""
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import lab
import pytest

REFERENCE = "/usr/lib/cni/portmap"
OLD_INIT = '"""cni-portmap: publish container ports on Linux with nftables, as a CNI plugin."""\n'


class Installation:
    """Folders to install into: `lib` (the prefix), `bin`, `sbin`."""

    def __init__(self, root: pathlib.Path) -> None:
        self.lib, self.bin, self.sbin = root / "lib", root / "bin", root / "sbin"

    def run(self, *options: object, **how: object) -> "subprocess.CompletedProcess[str]":
        command = [lab.ROOT / "scripts/install", "--prefix", self.lib, "--bin-dir", self.bin, "--sbin-dir", self.sbin]
        done = subprocess.run([str(word) for word in (*command, *options)], capture_output=True, text=True,
                              check=False, **how)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def install(self, *options: object, **how: object) -> str:
        done = self.run(*options, **how)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refuses(self, *options: object, status: int = 1, **how: object) -> str:
        done = self.run(*options, **how)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stderr

    def versions(self) -> list[pathlib.Path]:
        return sorted(self.lib.glob("[0-9]*"))

    def files(self) -> dict[str, str]:
        """All that there is, but who has locked."""
        found = itertools.chain(*(folder.rglob("*") for folder in (self.lib, self.bin, self.sbin)))
        return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else ""
                for path in found}

    def age(self) -> None:
        """Let two hours pass for all that is installed."""
        lab.run("find", self.lib, "-exec", "touch", "-d", "2 hours ago", "{}", "+")


@pytest.fixture
def site(tmp_path):
    found = Installation(tmp_path)
    yield found
    lab.run("nft", "delete", "table", "inet", "cni_portmap", check=False)


def works(executable: pathlib.Path) -> bool:
    """Whether the plugin answers, and loads a late module, too."""
    assert lab.call_plugin(executable, "VERSION", {"cniVersion": "1.0.0"})["cniVersion"] == "1.0.0"
    with pytest.raises(lab.CniFailed, match="name"):  # explained by a module that is loaded then
        lab.call_plugin(executable, "STATUS", {"cniVersion": "1.1.0", "name": "/"})
    return True


def test_install_again_and_uninstall(site):
    """Installing twice is installing once; uninstalling leaves nothing, in the file system or in the kernel."""
    site.install("--name", "portmap2")
    site.install("--name", "portmap2")
    assert works(site.bin / "portmap2")
    assert [path.name for path in (*site.bin.iterdir(), *site.sbin.iterdir())] == ["portmap2", "cni-portmap"]
    lab.run("nft", "add", "table", "inet", "cni_portmap")
    site.install("--name", "portmap2", "--uninstall")
    assert not site.files() and not site.lib.exists() and lab.table() == ""
    assert "nothing of cni-portmap" in site.install("--name", "portmap2", "--uninstall")


def test_upgrade_in_place(site):
    """A runtime that goes on calling during upgrades never sees a half-installed plugin."""
    site.install()
    done, failures, calls = threading.Event(), [], 0

    def call() -> None:
        nonlocal calls
        while not done.is_set():
            try:
                works(site.bin / "portmap")
                calls += 1
            except (AssertionError, lab.CniFailed, OSError) as failure:
                failures.append(failure)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for _ in range(4):
        site.install()
    lab.until(lambda: failures or calls > 10)  # a busy host makes fewer in the same time
    done.set()
    for caller in callers:
        caller.join()
    assert not failures and calls > 10


def test_calls_under_way(site):
    """A call that began before an upgrade ends well, however old the version is that it began with."""
    site.install()
    site.age()
    config = json.dumps({"cniVersion": "1.0.0", "name": "/", "type": "portmap"})
    call = subprocess.Popen([site.bin / "portmap"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={"CNI_COMMAND": "CHECK", "CNI_CONTAINERID": "abc", "CNI_IFNAME": "eth0",
                                 "CNI_NETNS": "/x"})
    while not any("/stdin" in link or "pipe:" in link for link in waits_in(call.pid)):
        time.sleep(0.01)
    site.install()
    site.install()
    assert json.loads(call.communicate(config, timeout=60)[0])["code"] == 7


def waits_in(pid: int) -> list[str]:
    """The file that a process waits to read; [] while it does something else."""
    words = pathlib.Path(f"/proc/{pid}/syscall").read_text().split()
    return [os.readlink(f"/proc/{pid}/fd/0")] if words[:2] == ["0", "0x0"] else []


def test_old_versions_go(site):
    """A version that no launcher has named for an hour is removed by the next installation; not sooner."""
    site.install()
    first = site.versions()
    site.install()
    assert len(site.versions()) == 2
    site.age()
    site.install()
    assert len(site.versions()) == 2 and first[0] not in site.versions()
    assert works(site.bin / "portmap")


def test_prefix_behind_a_link(site, tmp_path):
    """Old versions go there, too, and uninstalling leaves nothing, whichever of the two names is used."""
    (tmp_path / "real").mkdir()
    for names in itertools.product(("lib", "real"), repeat=2):
        site.lib.symlink_to("real")
        for _ in range(3):
            site.install("--prefix", tmp_path / names[0])
            site.age()
            lab.run("find", tmp_path / "real", "-exec", "touch", "-d", "2 hours ago", "{}", "+")
        assert len([*(tmp_path / "real").glob("[0-9]*")]) == 2 and works(site.bin / "portmap")
        site.install("--prefix", tmp_path / names[1], "--uninstall")
        assert not (site.bin / "portmap").exists() and not (tmp_path / "real").exists()
        site.lib.unlink()
        (tmp_path / "real").mkdir()


def test_man_pages(site):
    """The command in the default folder brings its man pages and completion, and takes them away."""
    share, sbin = pathlib.Path("/usr/local/share"), pathlib.Path("/usr/local/sbin")
    with contextlib.ExitStack() as stack:
        for folder in share, sbin:
            lab.run("mount", "-t", "tmpfs", "none", folder)
            stack.callback(lab.run, "umount", folder)
        for _ in range(2):
            site.install("--sbin-dir", sbin)
            found = {path.relative_to(share): path.read_text() for path in share.rglob("*") if path.is_file()}
            pages = {path for path in found if path.parts[0] == "man"}
            assert {path.name for path in pages} == {path.name for path in (lab.ROOT / "docs").glob("*.[1-8]")}
            assert all(path.parent.name == f"man{path.suffix[1:]}" for path in pages)
            assert all(found[path] == (lab.ROOT / "docs" / path.name).read_text() for path in pages)
            assert {*found} - pages == {pathlib.Path("bash-completion/completions/cni-portmap")}
        site.install("--sbin-dir", sbin, "--uninstall")
        assert not [path for path in (*share.rglob("*"), *sbin.iterdir()) if path.is_file()]


def test_foreign_files_in_the_prefix(site):
    """Neither an installation nor its end touches what others have in the prefix, however old it is."""
    foreign = [site.lib / name for name in ("data/important", "1.0.0-abcdef/cni_portmap/__init__.py", ".hidden",
                                            "2.0-ghijkl/.keep", "0.1.0-empty1/x")]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("theirs")
    (site.lib / "0.1.1-link00").symlink_to("data")
    for _ in range(2):
        site.age()
        site.install()
    site.install("--uninstall")
    assert {path: path.read_text() for path in foreign} == dict.fromkeys(foreign, "theirs")
    assert (site.lib / "0.1.1-link00").is_symlink()
    assert {path.name for path in site.lib.iterdir()} == {"data", "1.0.0-abcdef", ".hidden", "2.0-ghijkl",
                                                          "0.1.0-empty1", "0.1.1-link00"}


def test_several_bin_dirs(site, tmp_path):
    """Launchers in several folders share a prefix: none breaks another, and the last to go takes the rest along."""
    other = Installation(tmp_path)
    other.bin = tmp_path / "bin2"
    site.install()
    for _ in range(3):
        site.age()
        other.install()
        assert works(site.bin / "portmap") and works(other.bin / "portmap")
    lab.run("nft", "add", "table", "inet", "cni_portmap")
    assert str(other.bin) in site.install("--uninstall")
    assert lab.table() and works(other.bin / "portmap") and not [*site.bin.iterdir()]
    assert str(other.bin) in site.refuses("--uninstall")
    other.install("--uninstall")
    assert not other.files() and not lab.table()


def test_several_sbin_dirs(site, tmp_path):
    """The last plugin to go takes every command along."""
    other = Installation(tmp_path)
    other.bin, other.sbin = tmp_path / "bin2", tmp_path / "sbin2"
    site.install()
    other.install()
    site.install("--uninstall")
    lab.run(other.sbin / "cni-portmap", "version")
    other.install("--uninstall")
    assert not site.files() and not other.files()


# --- what others have in our places ---------------------------------------------------------------------------

def multi_call(site):
    """k3s: a link to one program that is all plugins."""
    (site.bin / "cni").write_text("all plugins")
    (site.bin / "portmap").symlink_to("cni")


def dangling(site):
    (site.bin / "portmap").symlink_to("nowhere/portmap")


def binary(site):
    shutil.copy(REFERENCE, site.bin / "portmap")
    (site.bin / "portmap").chmod(0o711)


def script(site):
    (site.bin / "portmap").write_text("#!/bin/sh\nexec /usr/lib/cni/portmap\n")


@pytest.mark.parametrize("put", [multi_call, dangling, binary, script])
@pytest.mark.parametrize("times", [1, 3])
def test_foreign_plugin_comes_back(site, put, times):
    """A foreign file, link or folder in our place is kept as it was, and comes back, after upgrades too."""
    site.bin.mkdir()
    put(site)
    before = {path.name: (path.lstat().st_mode, path.lstat().st_size, path.is_symlink() and os.readlink(path))
              for path in site.bin.iterdir()}
    content = site.files()
    for _ in range(times):
        site.install()
        assert works(site.bin / "portmap") and not (site.bin / "portmap").is_symlink()
    site.install("--uninstall")
    assert {path.name: (path.lstat().st_mode, path.lstat().st_size, path.is_symlink() and os.readlink(path))
            for path in site.bin.iterdir()} == before
    assert site.files() == content and not site.lib.exists()


def test_foreign_command_comes_back(site):
    """The same for the command, which pip may have put there."""
    site.sbin.mkdir()
    (site.sbin / "cni-portmap").write_text("#!/usr/bin/python3\nfrom cni_portmap.cli import main\nmain()\n")
    content = site.files()
    site.install()
    site.install("--uninstall")
    assert site.files() == content


def test_somebody_replaces_our_plugin(site):
    """Another installer's newer plugin is its own: it stays at the end; an upgrade keeps it in the older's place."""
    site.bin.mkdir()
    (site.bin / "portmap").write_text("first")
    site.install()
    (site.bin / "portmap").write_text("second")
    assert "left" in site.run("--uninstall").stdout
    assert (site.bin / "portmap").read_text() == "second"
    (kept,) = (site.lib / ".cni-portmap/kept").iterdir()  # it is not ours to lose
    assert kept.read_text() == "first"
    site.install()
    assert works(site.bin / "portmap")
    site.install("--uninstall")
    assert (site.bin / "portmap").read_text() == "second" and not site.lib.exists()


def test_nothing_of_ours(site):
    """Uninstalling where only others are leaves them."""
    site.bin.mkdir()
    (site.bin / "portmap").write_text("theirs")
    site.install("--uninstall")
    assert (site.bin / "portmap").read_text() == "theirs"


def old_installation(site: Installation) -> pathlib.Path:
    """The leftovers of scripts/install of 0.1.0: launchers, a version's folder, and no notes."""
    folder = site.lib / "0.1.0-abcdef"
    (folder / "cni_portmap").mkdir(parents=True)
    (folder / "cni_portmap/__init__.py").write_text(OLD_INIT)
    for path, module in (site.bin / "portmap", "plugin"), (site.sbin / "cni-portmap", "cli"):
        path.parent.mkdir()
        path.write_text(f'#!/usr/bin/python3 -IS\nimport sys\nsys.path.insert(0, "{folder}")\n'
                        f"from cni_portmap.{module} import main\nmain()\n")
    return folder


def test_upgrade_from_0_1_0(site):
    """Its launchers are ours, so they are replaced and not kept; its modules stay for an hour."""
    folder = old_installation(site)
    site.install()
    assert folder.exists() and not [*(site.lib / ".cni-portmap/kept").iterdir()]
    site.age()
    site.install()
    assert not folder.exists()
    site.install("--uninstall")
    assert not site.files()


def test_uninstall_0_1_0(site):
    """The uninstaller of this version removes the older one, too."""
    old_installation(site)
    site.install("--uninstall")
    assert not site.files() and not site.lib.exists()


# --- what goes wrong ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mask", [0, 0o002, 0o077])
def test_any_umask_leaves_it_readable_and_safe(site, mask):
    """All users may read and run it, and none but root may write it, under any umask."""
    site.install(umask=mask)
    site.install(umask=mask)
    modes = {path: path.stat().st_mode & 0o777 for path in map(pathlib.Path, site.files()) if not path.is_symlink()}
    modes |= {folder: folder.stat().st_mode & 0o777 for folder in (site.lib, site.bin, site.sbin)}
    state = site.lib / ".cni-portmap"
    assert state.stat().st_mode & 0o777 == 0o744  # who may open the lock may keep it
    assert not {path: oct(mode) for path, mode in modes.items() if mode & 0o022 or mode & 0o444 != 0o444}


def test_cdpath_does_not_choose_what_is_installed(site, tmp_path):
    """CDPATH does not choose what is installed."""
    (tmp_path / "evil/scripts").mkdir(parents=True)
    site.install(cwd=lab.ROOT, env={**os.environ, "CDPATH": str(tmp_path / "evil")})
    assert works(site.bin / "portmap")


def test_killed_at_any_moment_leaves_a_plugin(site):
    """Killed at any moment, an installation leaves the old plugin or the new one; the next leaves nothing else."""
    site.bin.mkdir()
    (site.bin / "portmap").write_text("#!/bin/sh\necho theirs\n")
    (site.bin / "portmap").chmod(0o755)
    begin = time.monotonic()
    site.install()
    whole = time.monotonic() - begin
    site.install("--uninstall")
    killed = 0
    for moment in range(1, 12):
        started = subprocess.Popen([lab.ROOT / "scripts/install", "--prefix", site.lib, "--bin-dir", site.bin,
                                    "--sbin-dir", site.sbin], stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            started.wait(whole * moment / 12)
            whole /= 2  # the host is less busy than it was
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            killed += started.wait() != 0
        text = (site.bin / "portmap").read_text()
        assert text == "#!/bin/sh\necho theirs\n" or works(site.bin / "portmap")
    assert killed
    site.install()  # none may have got as far as to make a folder
    site.age()
    site.install()
    assert [path.name for path in (*site.bin.iterdir(), *site.sbin.iterdir())] == ["portmap", "cni-portmap"]
    assert len(site.versions()) <= 2
    site.install("--uninstall")
    assert [path.name for path in site.bin.iterdir()] == ["portmap"] and not site.lib.exists()
    assert (site.bin / "portmap").read_text() == "#!/bin/sh\necho theirs\n"


@pytest.mark.parametrize("options", [[], ["--uninstall"]])
def test_power_cut(site, tmp_path, options):
    """What takes the plugin's place, and what is kept of it, is on the disk before the switch.

    Otherwise a file may be there after a power cut that has no bytes. And what was kept goes only after the switch is
    on the disk, too.
    """
    site.bin.mkdir()
    shutil.copy(REFERENCE, site.bin / "portmap")
    if options:
        site.install()
    trace = tmp_path / "trace"
    lab.run("strace", "-f", "-qqq", "-o", trace, "-e", "trace=syncfs,rename,renameat,renameat2,unlink,unlinkat",
            lab.ROOT / "scripts/install", "--prefix", site.lib, "--bin-dir", site.bin, "--sbin-dir", site.sbin,
            *options)
    kept = f"{site.lib}/.cni-portmap/kept/{str(site.bin / 'portmap').replace('/', '%')}"
    steps = ""
    for line in trace.read_text().splitlines():
        if "syncfs(" in line:
            steps += "s"
        elif f'{site.bin}/portmap"' in line and "rename" in line:
            steps += "P"
        elif f'{kept}"' in line:
            steps += "K"
    assert re.search("Ks+P" if not options else "^[^P]*s+P[^K]*s+[^K]*K", steps), steps


def test_waits_for_the_bundles_installer(site):
    """Which may be watching, and would put its own back at once; and for no ordinary user, who could wait for ever."""
    (site.bin / ".cni-portmap").mkdir(parents=True)
    theirs, ours = site.bin / ".cni-portmap/lock", site.lib / ".cni-portmap/lock"
    with theirs.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen([lab.ROOT / "scripts/install", "--prefix", site.lib, "--bin-dir", site.bin,
                                    "--sbin-dir", site.sbin], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == f"waiting for another installer, which has locked {theirs}\n"
        assert not (site.bin / "portmap").exists() and stat.S_IMODE(ours.parent.stat().st_mode) == 0o744
    assert "installed" in process.communicate(timeout=300)[0] and works(site.bin / "portmap")


def broken_python(site, tmp_path):
    """The new plugin does not run there: a file system without executables."""
    site.bin.mkdir()
    lab.run("mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", site.bin)
    return "does not run", {}


def read_only(site, tmp_path):
    site.bin.mkdir()
    lab.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", site.bin)
    return "read-only", {}


def a_folder(site, tmp_path):
    (site.bin / "portmap").mkdir(parents=True)
    return "is a folder", {}


def a_file(site, tmp_path):
    site.bin.write_text("")
    return "is not a folder", {}


def everybodys(site, tmp_path):
    site.lib.mkdir()
    site.lib.chmod(0o777)
    return "chmod o-w", {}


def of_a_package(site, tmp_path):
    """dpkg would delete ours with it, and our uninstaller its."""
    site.bin.mkdir()
    there = 'sys.path.insert(0, "/usr/share/cni-portmap")'
    (site.bin / "portmap").write_text(re.sub(r"(?m)^sys\.path\.insert.*", there,
                                             (lab.ROOT / "scripts/portmap").read_text()))
    return "is of the package cni-portmap", {}


def no_systemctl(site, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in "/usr/sbin", "/usr/bin":
        for tool in pathlib.Path(folder).iterdir():
            if tool.name != "systemctl" and not (tools / tool.name).is_symlink():
                (tools / tool.name).symlink_to(tool)
    return "no systemctl", {"env": {"PATH": str(tools)}}


@pytest.mark.parametrize("break_it", [broken_python, read_only, a_folder, a_file, everybodys, of_a_package,
                                      no_systemctl])
def test_nothing_is_written_where_it_cannot_work(site, tmp_path, break_it):
    """One sentence, status 1, and all is as it was: everything is checked before anything is written."""
    says, how = break_it(site, tmp_path)
    before = site.files()
    try:
        error = site.refuses(*(["--systemd"] if break_it is no_systemctl else []), **how)
        after = site.files()
    finally:
        lab.run("umount", site.bin, check=False)
    assert says in error and error.count("\n") <= 2
    assert {path for path in after if not re.search("/lib(/.cni-portmap)?(/|$)", path)} == \
        {path for path in before if not re.search("/lib(/.cni-portmap)?(/|$)", path)}
    assert not site.versions() and not [path for path in after if "/kept/" in path or "/launchers/" in path]


def test_not_root(site):
    """A user who may not write there is told so, in one sentence."""
    anybody = pathlib.Path("/mnt")  # pytest's own folders are root's alone, and the checkout may be
    lab.run("mount", "-t", "tmpfs", "none", anybody)
    try:
        lab.run("cp", "-r", lab.ROOT / "scripts", lab.ROOT / "cni_portmap", anybody)
        done = subprocess.run([anybody / "scripts/install", "--prefix", anybody / "lib"], capture_output=True,
                              text=True, check=False, user=65534, group=65534, extra_groups=[])
    finally:
        lab.run("umount", anybody)
    assert done.returncode == 1 and "run it as root" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", [["--prefix", "relative"], ["--name", "a/b"], ["--name", ".."], ["--prefix"],
                                    ["--bin-dir", "/tmp/a'b"], ["--what"], ["--force"]])
def test_wrong_usage(option):
    """A path that could break out of the launcher, or an unknown option, is refused."""
    done = subprocess.run([lab.ROOT / "scripts/install", *option], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr


# --- what is published ----------------------------------------------------------------------------------------

CONTAINERS = "first", "web", "theirs"
PORTS = [{"hostPort": 8080, "containerPort": 80}, {"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]


@pytest.fixture
def network(bin_dir):
    """A network of the session's plugin, which is installed elsewhere; all share the one table."""
    yield lab.Network(lab.bridge_conflist("installed", "ins0"), bin_dir)
    lab.delete_link("ins0", missing_ok=True)
    lab.run("rm", "-rf", "/run/lab-ipam/installed")
    for name in CONTAINERS:
        lab.delete_namespace(name, missing_ok=True)


def localnet(device: str = "ins0") -> str:
    return pathlib.Path(f"/proc/sys/net/ipv4/conf/{device}/route_localnet").read_text().strip()


def ipv6_routes() -> list[str]:
    """The interfaces for which this plugin has opened ::1."""
    return [device for device, metric in lab.localhost_routes() if metric == 4096]


def test_uninstall_refuses_while_containers_are_published(site, network):
    """It says which, and changes nothing; --force unpublishes them, and closes localhost before the guard goes."""
    site.install()
    web = lab.Container(network, "web", PORTS)
    before, files = lab.table(), site.files()
    error = site.refuses("--uninstall")
    assert web.id in error and "--force" in error
    assert (lab.table(), site.files(), localnet(), bool(ipv6_routes())) == (before, files, "1", True)
    site.install("--uninstall", "--force")
    assert (lab.table(), site.files(), localnet(), ipv6_routes()) == ("", {}, "0", [])
    assert not [flow for flow in lab.flows("udp", 5353) if flow.target == web.ipv4]
    web.remove()


def test_uninstall_closes_what_was_opened(site, network):
    """After the last container localhost is guarded still; when the guard goes, nothing is open any more."""
    site.install()
    web = lab.Container(network, "web", PORTS)
    web.remove()
    assert (localnet(), bool(ipv6_routes()), "127.0.0.0/8" in lab.table()) == ("1", True, True)
    output = site.install("--uninstall")
    assert "127.0.0.0/8 on ins0" in output and "::1 on ins0" in output
    assert (lab.table(), localnet(), ipv6_routes()) == ("", "0", [])


def test_uninstall_leaves_open_what_was_open(site, network):
    """An interface that somebody else has opened is neither noted nor closed."""
    site.install()
    lab.Container(network, "first").remove()  # makes the bridge
    lab.sysctl("net.ipv4.conf.ins0.route_localnet", 1)
    lab.Container(network, "web", PORTS).remove()
    assert "sysctl -w net.ipv4.conf.ins0.route_localnet=0" in site.install("--uninstall")
    assert (lab.table(), localnet(), ipv6_routes()) == ("", "1", [])


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_uninstall_leaves_open_what_the_reference_plugin_needs(site, network, backend, reference):
    """A container that the reference plugin publishes on the same bridge goes on answering on localhost."""
    site.install()
    web = lab.Container(network, "web", PORTS)
    theirs = lab.Network(lab.bridge_conflist("installed", "ins0", backend=backend), reference)
    other = lab.Container(theirs, "theirs", [{"hostPort": 8090, "containerPort": 80, "protocol": "tcp"}])
    web.remove()
    with lab.Server("theirs", other, 80):
        output = site.install("--uninstall")
        assert "stays open on ins0" in output and "reference" in output
        assert lab.exchange(lab.HOST, "127.0.0.1", 8090).server == "theirs"
    assert (lab.table(), localnet(), ipv6_routes()) == ("", "1", [])
    other.remove()


def test_upgrade_of_a_table_of_0_1_0(site, network):
    """Installing brings the guard up to date at once, and notes what the older version has opened, without a note."""
    web = lab.Container(network, "web", PORTS)
    as_of_0_1_0()
    assert "localhost_interfaces" not in lab.table()
    site.install()
    assert "iifname @localhost_interfaces" in lab.table() and '"ins0" comment "route_localnet was 0"' in lab.table()
    web.check()
    web.remove()
    site.install("--uninstall")
    assert (lab.table(), localnet(), ipv6_routes()) == ("", "0", [])


def test_uninstall_of_a_table_of_0_1_0(site, network):
    """A table without notes: the interfaces that lead to published containers are closed, and those with ::1."""
    web = lab.Container(network, "web", PORTS)
    as_of_0_1_0()
    site.install()  # its --base-only has no say here: the table is made old again
    as_of_0_1_0()
    site.install("--uninstall", "--force")
    assert (lab.table(), localnet(), ipv6_routes()) == ("", "0", [])
    web.remove()


def as_of_0_1_0() -> None:
    """Make the table what 0.1.0 has left: another guard, and no set."""
    table = "inet cni_portmap"
    lab.nft_script(f"""
        delete chain {table} guard
        delete chain {table} guard_input
        delete set {table} localhost_interfaces
        add chain {table} guard {{ type filter hook prerouting priority raw; policy accept;
            iiftype != loopback ip daddr 127.0.0.0/8 counter drop comment "cni-portmap 1: no wire leads to our loopback"
            iiftype != loopback ip saddr 127.0.0.0/8 counter drop comment "cni-portmap 1: nor comes from it"
        }}""")


# --- the package ----------------------------------------------------------------------------------------------

def test_runs_from_compiled_bytecode(site):
    """The installed package is loaded from bytecode, and nothing is written next to it by a call."""
    site.install()
    before = site.files()
    assert any(path.endswith(".pyc") for path in before)
    assert works(site.bin / "portmap")
    assert site.files() == before


def test_pip_package(tmp_path):
    """The checkout is an ordinary pip package, with the operator's command."""
    source = tmp_path / "source"
    source.mkdir()
    for name in "setup.cfg", "pyproject.toml", "README.md", "cni_portmap":
        lab.run("cp", "-r", lab.ROOT / name, source)
    target = tmp_path / "target"
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                           "--target", target, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = subprocess.run([sys.executable, "-c", "from cni_portmap.cli.main import main; main(['version', '--json'])"],
                         cwd=target, capture_output=True, text=True, check=True).stdout
    assert "1.1.0" in json.loads(out)["cniVersions"]
    assert (target / "cni_portmap/portmap.schema.json").exists()
    assert (target / "bin/cni-portmap").exists()
