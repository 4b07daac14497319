"""cni-portmap node-install."""
import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from .. import __version__
from ..cni import CniError
from ..linux.kernel import Kernel

TYPE_CHECKING = False  # the module is imported late: only a node needs it
if TYPE_CHECKING:
    from ..linux.installation import Installation

HELP = "install the bundle that this command is of into a node's folder of plugins"
REPLACED_TIMES, REPLACED_SECONDS = 3, 600
STOP = ("stop the other first: for Calico set SKIP_CNI_BINARIES=portmap in its container install-cni, or, where an "
        "operator manages that, spec.cni.installMode to CalicoOnly in its Installation; AWS' "
        "aws-vpc-cni-init has no such setting, and needs an image without portmap")


class _Ended(Exception):
    """SIGTERM has come."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--bin-dir", metavar="DIR", type=_folder, required=True, help="where the node's runtime "
                        "finds plugins")
    parser.add_argument("--name", type=_name, default="portmap", help="the plugin's name there (default: portmap)")
    parser.add_argument("--sbin-dir", metavar="DIR", type=_folder, help="a folder for a link to the command "
                        "cni-portmap (default: none; the command is .cni-portmap/cni-portmap in BIN_DIR)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--watch", action="store_true", help="go on until SIGTERM: put the plugin back when it is "
                      "gone or damaged, or another program replaces it: that "
                      f"{REPLACED_TIMES} times in {REPLACED_SECONDS // 60} minutes at most")
    what.add_argument("--check", action="store_true", help="change nothing: exit status 0 if the plugin there is this "
                      "bundle's, and answers, 1 if not")
    what.add_argument("--rollback", action="store_true", help="switch to the version that was installed before; again: "
                      "back to this one")
    what.add_argument("--uninstall", action="store_true", help="restore the plugin that was there before, and remove "
                      "everything else")
    parser.add_argument("--force", action="store_true", help="uninstall even while containers are published: their "
                        "ports stop answering")


def _folder(text: str) -> str:
    if not text.startswith("/") or not text.strip("/"):
        raise argparse.ArgumentTypeError(f"{text}: expected an absolute path of a folder")
    return text


def _name(text: str) -> str:
    if "/" in text or text.startswith(".") or not text:
        raise argparse.ArgumentTypeError(f"{text}: expected a name, not a path")
    return text


def run(options: argparse.Namespace, kernel: Kernel) -> int:
    """Install, watch, check, roll back or uninstall; 1 if something else is the plugin, or stays it."""
    from ..linux.installation import Installation, bundle, may_administer
    if options.force and not options.uninstall:
        print("cni-portmap: --force goes with --uninstall", file=sys.stderr)
        return 2

    def say(event: str, text: str) -> None:
        print(json.dumps({"event": event, "plugin": found.plugin, "text": text}) if options.json else text, flush=True)
    found = Installation(bundle(), options.bin_dir, options.name)
    if options.check:
        current = found.is_current() and found.runs()
        say("current" if current else "other", f"{found.plugin} is {'' if current else 'not '}this bundle's")
        return 0 if current else 1
    if options.uninstall and not found.is_there():
        say("nothing", f"nothing of cni-portmap is in {options.bin_dir}")
        return 0
    os.umask(0o022)
    found.prepare()
    if options.sbin_dir and not options.uninstall and not options.rollback:
        found.check_command(options.sbin_dir)
    for number in signal.SIGTERM, signal.SIGINT:  # which the first process of a container ignores without a handler
        signal.signal(number, _end)
    locked = False
    try:
        if not found.lock():
            say("waiting", f"waiting for another installer, which has locked {found.lock_path}")
            found.wait()
        locked = True
        if options.uninstall:
            return _uninstall(found, kernel if may_administer() else None, options, say)
        if options.rollback:
            say("rolled back", found.roll_back())
            return 0
        if not options.watch:
            found.forget_replaced()
        elif found.is_installed():
            _cause(found, say)  # while this did not run, or was killed
        _install(found, kernel if may_administer() else None, say)
        command = found.command
        if options.sbin_dir and found.put_command(options.sbin_dir):
            command = f"{options.sbin_dir}/cni-portmap"
        elif options.sbin_dir:
            say("left", f"left {options.sbin_dir}/cni-portmap, which is of another installation")
        if options.watch:
            _watch(found, say)
        say("command", f"the command is {command}")
    except _Ended:
        if options.watch and locked:
            found.forget_replaced()  # who ends it, and starts it again, wants it to try again
        return 0 if options.watch else 1
    return 0


def _end(*_: object) -> None:
    raise _Ended


Say = Callable[[str, str], None]  # an event's name for scripts, and a line for people


def _install(found: "Installation", kernel: Kernel | None, say: Say) -> None:
    """Install; `kernel` where this process may write there."""
    kept, changed = found.install()
    if kept:
        say("kept", f"kept what {found.plugin} was, for --uninstall")
    if kernel:  # an older version may have left a table without what this one guards localhost with
        from ..verbs.steps import repair_shared_chains
        try:
            repair_shared_chains(kernel)
        except CniError as error:
            print(f"cni-portmap: the table of published ports could not be brought up to date: {error.msg}",
                  file=sys.stderr, flush=True)
    if changed:
        say("installed", f"installed {found.plugin} (cni-portmap {__version__})")
    else:
        say("unchanged", f"{found.plugin} is cni-portmap {__version__} already")


def _cause(found: "Installation", say: Say) -> str:
    """Why the plugin is not ours. Where another program has replaced it too often, first wait until its file goes.

    What is gone or damaged does nobody's work, so it is no reason to give up.
    """
    if not found.is_others():
        return "which was gone or damaged"
    times = found.note_replaced(REPLACED_SECONDS)
    if times <= REPLACED_TIMES:
        return f"which another program had replaced ({times} of {REPLACED_TIMES} times in " \
            f"{REPLACED_SECONDS // 60} minutes)"
    say("stopped", f"another program replaces {found.plugin} again and again, and so its file stays now. To "
        f"have cni-portmap, {STOP}; then start this again")
    found.unlock()
    while not found.is_installed() or found.is_others():  # who uninstalls meanwhile wants none of it back
        time.sleep(1)
    found.wait()
    return "now that the other program's file is gone"


def _watch(found: "Installation", say: Say) -> NoReturn:
    """Look once a second whether the plugin is ours, and put it back; until SIGTERM."""
    cause = failed = ""
    while True:
        time.sleep(1)
        try:
            if found.is_current():
                found.settle()
                continue
            found.wait()  # again, if somebody has removed all that was installed
            if not failed:
                cause = _cause(found, say)
            found.install()
        except CniError as error:
            if error.msg != failed:
                print(f"cni-portmap: {error.msg}", file=sys.stderr, flush=True)
            failed = error.msg
        else:
            failed = ""
            say("restored", f"put back {found.plugin}, {cause}")


def _uninstall(found: "Installation", kernel: Kernel | None, options: argparse.Namespace, say: Say) -> int:
    """Uninstall; `kernel` where this process may write there: else the table stays, and what is published with it."""
    from ..verbs.teardown import teardown
    from .teardown import run as tear_down
    how = argparse.Namespace(force=options.force, dry_run=False, json=options.json)
    if kernel and teardown(kernel, options.force, dry_run=True).refused:
        return tear_down(how, kernel)  # which names the containers
    if said := found.give_back():
        say("given back", said)
    if user := found.user():
        say("rest", f"the rest stays, for {user}")
        return 0
    if kernel and tear_down(how, kernel):
        return 1
    say("removed", found.remove())
    if not kernel:
        say("table", "what is published stays so until its containers stop and the agent, or cni-portmap gc, removes "
            "their rules: without CAP_NET_ADMIN the table cannot be read")
    return 0
