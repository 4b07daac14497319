"""The lab itself: nothing of what it makes stays."""
import os
import pathlib
import socket

import lab


def traces():
    """The namespaces of this process, and those of its host."""
    return {"descriptors": sorted(os.listdir("/proc/self/fd")), "threads": sorted(os.listdir("/proc/self/task")),
            "children": pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
            "links": socket.if_nameindex(), "names": sorted(os.listdir("/run/netns")),
            "namespace": os.readlink("/proc/thread-self/ns/net"), "routes for ::1": lab.localhost_routes()}


def test_a_machine_that_is_removed_leaves_nothing():
    """Wiring a machine starts no process and no thread (pyroute2 could); removed, it leaves no descriptor, no link."""
    before = traces()
    machine = lab.wire("machine", ("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
    during = traces()
    assert [kind for kind in before if during[kind] != before[kind]] == ["links", "names"]
    machine.remove()
    assert traces() == before


def test_the_next_host_of_a_process_has_one_run():
    """What was at /run before is not below it: containerd takes the lowest mount for the one that counts"""
    lab.enter()
    mounts = [line.split()[4] for line in pathlib.Path("/proc/thread-self/mountinfo").read_text().splitlines()]
    assert mounts.count("/run") == 1
