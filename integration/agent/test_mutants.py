"""Each main promise of the agent has a test that fails without it: the code is changed, and the test is to notice."""
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).with_name("test_heal.py")
# The promise; the test of it; the module, the text that keeps it there, and what stands there instead.
MUTANTS = {
    "what DEL removes is forgotten": (
        "what_our_own_calls_remove_stays_removed[DEL]",
        "memory", "        self.forget_owner(text(dict(attributes(body, 4))[NFTA_CHAIN_NAME]))\n", "        pass\n"),
    "the command is known by its name": (
        "what_our_own_calls_remove_stays_removed[teardown]",
        "heal", "name.startswith(PROCESS_NAME) or name in OWN_BEFORE", 'name == "cni-portmap/ADD"'),
    "a port's new owner keeps it": ("a_new_owner", "heal", "        _respect_new_owners(memory)\n", ""),
    "a DEL that found nothing counts": ("deleted_while_lost", "witness", "file not in now[1]", "not file"),
    "the guard is first": (
        "the_guard_is_first", "heal", "for shared_only in (True, False):", "for shared_only in (False,):"),
    "it backs off": ("a_flusher_who_does_not_stop", "heal", "PAUSES = (1, 2, 4, 8, 15)", "PAUSES = (0.05,)"),
    "off means off": ("a_wish", "heal", "            self.resting = True\n", "            pass\n"),
    "a flush is no wish": ("a_wish", "heal", " or each.elsewhere or [*each.messages] != [ours]", ""),
    "off, though files were being read": (
        "a_wish_while_it_looks_at_files",
        "main", "        for task in self._restoring:\n", "        for task in ():\n"),
    "off, though it is told to read again": (
        "a_wish_and_a_reload", "main", "        if self._healer.resting:\n            return\n", ""),
    "after an overrun nothing of memory": (
        "not_heard", "heal", "                memory.read(messages)\n",
        "                if messages: memory.read(messages)\n"
        "                else: memory._lose_table(b''); memory.damaged = True\n"),
    "after an overrun what files prove": (
        "not_heard", "main", "self._healer.on_overrun = lambda: self._start(self._resync())", "pass"),
    "only a file that stays proves": ("in_the_middle_of_a_deletion", "main", "    time.sleep(SETTLED)\n", ""),
    "what is open is guarded": (
        "an_open_interface_keeps_its_guard", "main", "        restore([], kernel, noted=noted)", "        pass"),
}


def run(test: str, *mutant: str) -> "subprocess.CompletedProcess[str]":
    """Run a test of the agent, with a mistake in it."""
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-x", f"{TESTS}::test_{test}"]
    return subprocess.run(words, env={**os.environ, "CNI_PORTMAP_MUTANT": json.dumps(mutant)}, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)


@pytest.fixture(scope="module")
def runs():
    """All of them, each on a host of its own, some at once: most of their time they wait."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        yield {promise: pool.submit(run, *mutant) for promise, mutant in MUTANTS.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("promise", MUTANTS)
def test_it_is_noticed(promise, runs):
    """Without what keeps the promise, its test fails."""
    done = runs[promise].result()
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout


def test_nothing_else_fails():
    """With a mistake that is none, such a test passes."""
    done = run("a_new_owner", "heal", "AT_ONCE = 3", "AT_ONCE = 4")
    assert done.returncode == 0, done.stdout
