"""The lab itself: nothing of what it makes stays."""
import json
import os
import pathlib
import socket
import threading

import lab


def traces():
    """What this process has, and its host; of tests before, some of it may be about to go."""
    return {"descriptors": {*os.listdir("/proc/self/fd")}, "threads": {*os.listdir("/proc/self/task")},
            "children": {*pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()},
            "links": {*socket.if_nameindex()}, "names": {*os.listdir("/run/netns")},
            "namespace": {os.readlink("/proc/thread-self/ns/net")}, "routes for ::1": {*lab.localhost_routes()}}


def came(before):
    """The kinds of what has come since."""
    return [kind for kind, now in traces().items() if now - before[kind]]


def test_a_machine_that_is_removed_leaves_nothing():
    """Wiring a machine starts no process and no thread (pyroute2 could); removed, it leaves no descriptor, no link."""
    before = traces()
    machine = lab.wire("machine", ("192.0.2.1/24", "2001:db8::1/64"), ("192.0.2.2/24", "2001:db8::2/64"))
    assert came(before) == ["links", "names"]
    machine.remove()
    assert came(before) == []


def test_a_late_answer_is_not_taken_for_the_next():
    """A client that did not wait for an answer knows it when it comes, and goes on waiting for its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 7777))

        def serve():
            asked = [server.recvfrom(2048) for _ in range(2)]
            for name, (data, address) in zip(("late", "own"), asked):
                server.sendto(json.dumps([name, "127.0.0.1", 7777, data.split()[0].decode()]).encode(), address)
        thread = threading.Thread(target=serve)
        thread.start()
        with lab.Client(lab.HOST, "127.0.0.1", 7777, "udp") as client:
            assert client.ask(lab.HASTY) is None
            assert client.ask().server == "own"
        thread.join()


def test_the_next_host_of_a_process_has_one_run():
    """What was at /run before is not below it: containerd takes the lowest mount for the one that counts"""
    lab.enter()
    mounts = [line.split()[4] for line in pathlib.Path("/proc/thread-self/mountinfo").read_text().splitlines()]
    assert mounts.count("/run") == 1
