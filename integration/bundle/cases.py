"""What an installer of the bundle does to a node, as data: the same for install.sh, node-install and the image.

install.sh takes those in which it has a say of its own.

A case is a list of steps, a tuple each: what happens, and with what. `Node` in installers.py has a method for each. A
folder of plugins has the reference plugin `portmap` at first.
"""
from installers import FOREIGN, NO_HEADER, SECTIONLESS

CALICO = "#!/bin/sh\necho another program's\n"
PACKAGED = ('#!/usr/bin/python3 -IS\nsys.path.insert(0, "/usr/share/cni-portmap")\n'
            "from cni_portmap.plugin import main\nmain()\n")
DAMAGED = "lib/libnftables.so.1"

CASES = {
    "what was there is kept through an upgrade, and given back: the same file, alone": [
        ("install", "kept what"), ("works",), ("upgrade", "installed"), ("works",), ("uninstall", "gave back"),
        ("as_before",)],
    "a second run changes nothing": [
        ("install", "installed"), ("again",), ("upgrade", "installed"), ("again",), ("works",)],
    "where there was nothing, nothing is left": [
        ("remove", "portmap"), ("install", "installed"), ("works",), ("uninstall", "removed"), ("holds", {})],
    "nothing to uninstall": [("uninstall", "nothing of cni-portmap"), ("as_before",)],
    "k3s' portmap is a link to the program that all its plugins are: the link is kept, the program is not written": [
        ("remove", "portmap"), ("write", "cni", "many"), ("link", "portmap", "cni"), ("install", "kept what"),
        ("works",), ("upgrade", "installed"), ("reads", "cni", "many"), ("uninstall", "gave back"),
        ("holds", {"portmap": "-> cni", "cni": "many"})],
    "k3s makes its link again at an upgrade of its own": [
        ("remove", "portmap"), ("write", "cni", "many"), ("install", "installed"), ("remove", "portmap"),
        ("link", "portmap", "cni"), ("install", "kept what"), ("works",), ("reads", "cni", "many"),
        ("uninstall", "gave back"), ("holds", {"portmap": "-> cni", "cni": "many"})],
    "a link that leads nowhere is kept as well": [
        ("remove", "portmap"), ("link", "portmap", "gone"), ("install", "kept what"), ("works",),
        ("uninstall", "gave back"), ("holds", {"portmap": "-> gone"})],
    "who has replaced ours since is what a new installation keeps": [
        ("install", "kept what"), ("write", "portmap", CALICO), ("install", "kept what"), ("works",),
        ("uninstall", "gave back"), ("holds", {"portmap": CALICO})],
    "who has replaced ours since stays at the end": [
        ("install", "kept what"), ("write", "portmap", CALICO), ("uninstall", "gave back"),
        ("holds", {"portmap": CALICO})],
    "who has written through our link is kept, and we are whole again": [
        ("install", "kept what"), ("write_through", CALICO), ("install", "kept what"), ("works",),
        ("uninstall", "gave back"), ("holds", {"portmap": CALICO})],
    "who has written through our link stays at the end": [
        ("install", "kept what"), ("write_through", CALICO), ("uninstall", "gave back"),
        ("holds", {"portmap": CALICO})],
    "uninstalling gives back what was kept also where the plugin is gone: a host without any starts no pod": [
        ("install", "kept what"), ("remove", "portmap"), ("uninstall", "gave back"), ("as_before",)],
    "a copy of our own plugin is not what was there": [
        ("copy_ours",), ("install", "installed"), ("uninstall", "removed"), ("holds", {})],
    "a link into our folder by its path on the node is ours": [
        ("install", "kept what"), ("link_by_another_path",), ("install", "installed"), ("works",),
        ("link_by_another_path",), ("uninstall", "gave back"), ("as_before",)],
    "a version whose list of files is lost is ours all the same: what it has replaced stays kept": [
        ("install", "kept what"), ("spoil", "be empty", "SHA256SUMS"), ("upgrade", "installed"), ("works",),
        ("spoil", "remove", "SHA256SUMS"), ("install", "installed"), ("works",), ("uninstall", "gave back"),
        ("as_before",)],
    "a version that somebody has damaged is mended, file by file": [
        ("install", "installed"), ("spoil", "be bytes", "lib/program"), ("spoil", "be empty", DAMAGED),
        ("spoil", "remove", "lib/ld.so"), ("spoil", "be a folder", "lib/libmnl.so.0"), ("spoil", "644", "portmap"),
        ("spoil", "600", "lib/libc.so.6"), ("spoil", "0", "lib"), ("spoil", "700", ".."), ("install", "installed"),
        ("works",), ("again",), ("is_one_version",), ("uninstall", "gave back"), ("as_before",)],
    "notes of an installation that are no text": [
        ("install", "installed"), ("upgrade", "installed"), ("spoil", "be bytes", "../previous-portmap"),
        ("spoil", "be bytes", "../commands"), ("spoil", "be bytes", "../replaced-portmap"), ("install", "installed"),
        ("works",), ("uninstall", "gave back"), ("as_before",)],
    "who is still writing through our link is kept, whole, and we are whole again": [
        ("install", "kept what"), ("begin_to_write", 1000), ("install", "kept what"), ("works",), ("is_one_version",),
        ("write_the_rest",), ("install", "already"), ("uninstall", "gave back"), ("holds_program",)],
    "who has only begun to write through our link, too": [
        ("install", "kept what"), ("begin_to_write", 0), ("install", "kept what"), ("works",), ("write_the_rest",),
        ("upgrade", "installed"), ("uninstall", "gave back"), ("holds_program",)],
    "who is still writing at the end ends in the plugin's place": [
        ("install", "kept what"), ("begin_to_write", 1000), ("uninstall", "gave back"), ("write_the_rest",),
        ("holds_program",)],
    "who broke off in the middle has brought no plugin: the one before is kept": [
        ("install", "kept what"), ("begin_to_write", 1000), ("install", "kept what"), ("break_off",),
        ("upgrade", "installed"), ("begin_to_write", 0), ("break_off",), ("install", "installed"), ("works",),
        ("uninstall", "gave back"), ("as_before",)],
    "what does not run here does not take the place of what was kept": [
        ("install", "kept what"), ("write", "portmap", CALICO, 0o600), ("install", "installed"),
        ("write", "portmap", FOREIGN), ("install", "installed"), ("write", "portmap", SECTIONLESS[:20000]),
        ("install", "installed"), ("write", "portmap", NO_HEADER), ("install", "installed"), ("remove", "portmap"),
        ("link", "portmap", "gone"), ("install", "installed"), ("works",), ("write", "portmap", CALICO, 0o600),
        ("uninstall", "gave back"), ("as_before",)],
    "a whole program without sections does": [
        ("install", "kept what"), ("write", "portmap", SECTIONLESS), ("install", "kept what"), ("works",)],
    "one that was killed left a link beside the plugin: the next removes it, also where nothing else is to do": [
        ("install", "kept what"), ("left_beside", "portmap"), ("left_beside", "portmap2"), ("install", "already"),
        ("nothing_beside",), ("left_beside", "portmap2"), ("uninstall", "gave back"), ("as_before",)],
    "and where nothing else is left of it": [
        ("install", "kept what"), ("left_beside", "portmap2"), ("uninstall", "gave back"), ("as_before",),
        ("link", ".portmap.cni-portmap-new", ".cni-portmap/gone/portmap"), ("uninstall", "gave back"), ("as_before",)],
    "the version to roll back to is known before the switch: what cannot be noted is not switched": [
        ("install", "kept what"), ("upgrade", "installed"), ("roll_back", "again"),
        ("renames_fail", "previous-portmap"), ("upgrade_fails", "cannot replace"), ("renames_work",),
        ("upgrade", "installed"), ("roll_back", "again"), ("uninstall", "gave back"), ("as_before",)],
    "files of ours that all may write are closed again": [
        ("install", "installed"), ("spoil", "777", "lib/program"), ("spoil", "777", "lib"), ("spoil", "777", ".."),
        ("install", "installed"), ("works",), ("is_closed",), ("again",)],
    "who may not install cannot lock the installers out": [
        ("install", "installed"), ("spoil", "644", "../lock"), ("install", "already"), ("lock_is_roots_own",)],
    "a folder of ours that was given to another user and closed, without the capability to open it": [
        ("install", "kept what"), ("give_away", "lib", 0o700), ("without_fowner",), ("install", "installed"),
        ("works",), ("again",), ("uninstall", "gave back"), ("as_before",)],
    "and opened for all: that is his to say": [
        ("install", "kept what"), ("give_away", "..", 0o777), ("give_away", "lib", 0o777), ("without_fowner",),
        ("install", "installed"), ("runs",), ("is_one_version",), ("uninstall", "gave back"), ("as_before",)],
    "a folder on NFS, where only a file that is open for writing can be locked": [
        ("first_lock_fails",), ("install", "kept what"), ("works",)],
    "our own launcher, damaged, is no plugin of others": [
        ("install", "kept what"), ("spoil", "be bytes", "portmap"), ("install", "installed"), ("works",),
        ("spoil", "be empty", "portmap"), ("uninstall", "gave back"), ("as_before",)],
    "a folder and a plugin of another user, which only he may read": [
        ("of_another_owner",), ("install", "kept what"), ("works",), ("upgrade", "installed"), ("works",),
        ("uninstall", "gave back"), ("as_before",)],
    "a link to a folder": [
        ("behind_a_link",), ("install", "kept what"), ("works",), ("upgrade", "installed"), ("works",),
        ("uninstall", "gave back"), ("as_before",)],
    "one that was killed left a half copied version, which the next removes": [
        ("half_copied",), ("install", "installed"), ("works",), ("nothing_half",)],
    "one that was killed before it switched has kept already what was there": [
        ("kept_already",), ("install", "installed"), ("works",), ("uninstall", "gave back"), ("as_before",)],
    "no call fails while versions are switched under it": [
        ("install", "installed"), ("runtimes_call",), ("upgrade", "installed"), ("install", "installed"),
        ("upgrade", "installed"), ("install", "installed"), ("no_call_failed",)],
    "while containers are published uninstalling is refused, unless it is forced": [
        ("install", "installed"), ("publish",), ("refuses_to_uninstall", "web"), ("works",),
        ("uninstall", "gave back", "--force"), ("as_before",), ("no_table",)],
    "where SELinux is on, the files get the label of the folder": [
        ("selinux",), ("install", "installed"), ("works",), ("labelled",)],

    # One sentence, status 1, and the plugin that was there still is.
    "an archive that ended early, or was changed": [("truncate", DAMAGED), ("refuses", "is damaged")],
    "a file that is missing": [("drop", DAMAGED), ("refuses", f"{DAMAGED} is missing")],
    "the list of files is missing": [("drop", "SHA256SUMS"), ("refuses", "SHA256SUMS is missing")],
    "an upgrade to a truncated bundle leaves the version that works": [
        ("install", "installed"), ("truncate", DAMAGED), ("refuses", "is damaged"), ("works",)],
    "a full disk": [("full_disk",), ("refuses", "No space left")],
    "a read-only folder": [("mounted", "ro"), ("refuses", "it is mounted read-only")],
    "a folder of another user, without the capability for that": [
        ("of_another_owner",), ("without_dac_override",), ("refuses", "needs the capability DAC_OVERRIDE")],
    "a folder that nothing may be run from": [("mounted", "noexec"), ("refuses", "does not run in")],
    "a folder in which no link is followed": [("mounted", "nosymfollow"), ("refuses", "does not run in")],
    "a folder in the plugin's place": [
        ("remove", "portmap"), ("folder", "portmap"), ("refuses", "portmap is a folder")],
    "a package's plugin, which dpkg would remove, whatever it is then": [
        ("write", "portmap", PACKAGED), ("refuses", "is of the package cni-portmap")],
    "a file where the versions go": [("write", ".cni-portmap", "theirs"), ("refuses", "move it away")],
    "a kernel without nf_tables": [("no_nf_tables",), ("refuses", "this host cannot publish ports")],
    "an ordinary user": [("as_nobody",), ("refuses", "run it as root")],
}
