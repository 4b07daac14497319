#!/usr/bin/python3
"""Simulate the roll-out of a DaemonSet to 500 nodes: a table of docs/scale.md.

A node's part is measured (`integration/cluster/test_roll_out.py` prints it), the image's size too; the rest is a model.
"""
import heapq

NODES = 500
NODE = 1e9  # bits per second of one node's link
IMAGE = 8.3e6  # bytes, compressed
REPLACED = 12.0  # seconds until the pod of one node is replaced and ready, without the download
CALLS_PER_SECOND = 20  # of the controller manager to the API server (--kube-api-qps); two for each pod


def roll_out(unavailable: int, registry: float) -> tuple[float, int]:
    """Seconds until all nodes have the new version, and how many fetched the image at once at most.

    `unavailable`: pods that may be missing; `registry`: bits per second, shared equally by those that fetch. The
    controller replaces a pod as soon as another is ready, by CALLS_PER_SECOND; then a node takes the download, and
    REPLACED.
    """
    now, told, ready, started, most = 0.0, 0.0, 0, 0, 0
    queued: list[float] = []  # when the replacement of each is told to the API server, the first at the front
    fetching: list[float] = []  # bits that are missing, of each
    starting: list[float] = []  # when each will be ready, a heap
    while ready < NODES:
        while started < NODES and started - ready < unavailable:
            told = max(now, told) + 2 / CALLS_PER_SECOND
            queued.append(told)
            started += 1
        rate = min(NODE, registry / len(fetching)) if fetching else 0.0
        then = min(queued[:1] + starting[:1] + ([now + min(fetching) / rate] if fetching else []))
        missing = [bits - rate * (then - now) for bits in fetching]
        now, fetching = then, [bits for bits in missing if bits > 1]
        for _ in range(len(missing) - len(fetching)):
            heapq.heappush(starting, now + REPLACED)
        while queued and queued[0] <= now:
            queued.pop(0)
            fetching.append(IMAGE * 8)
        most = max(most, len(fetching))
        while starting and starting[0] <= now:
            heapq.heappop(starting)
            ready += 1
    return now, most


def duration(seconds: float) -> str:
    """A time as people write it."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def table() -> list[str]:
    """The lines of a table: times by maxUnavailable and by the registry's bandwidth."""
    rows = ["| `maxUnavailable` | registry 10 Gbit/s | 1 Gbit/s | 100 Mbit/s | fetch at once, at most |",
            "|---|---|---|---|---|"]
    for share in 1, 5, 25, 50, 125, 500:
        found = [roll_out(share, speed) for speed in (1e10, 1e9, 1e8)]
        name = "1 node" if share == 1 else f"{share * 100 // NODES} %"
        rows.append(f"| {name} | {' | '.join(duration(seconds) for seconds, _ in found)} | "
                    f"{max(most for _, most in found)} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
