"""nft, and what nf_tables holds in the network namespace that this thread is in."""
import contextlib
import json
import pathlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import nftables

from .processes import ROOT, run

TABLE = "inet cni_portmap"  # written here, not imported: its name is a promise
OTHER_ROOT = pathlib.Path("/mnt")  # where `other_root` shows it; in this process's own mount namespace
_NFT: list[object] = ["nft"]


@contextlib.contextmanager
def other_root(root: str) -> Iterator[None]:
    """Show another system's root folder at OTHER_ROOT, for chroot, with this host's /dev, /proc, /run and checkout.

    In the block, `nft` is that system's.
    """
    run("mount", "--make-rshared", "/run")  # so that it sees the namespaces to come
    run("mount", "--bind", root, OTHER_ROOT)
    for folder in "dev", "proc", "run":
        run("mount", "--rbind", f"/{folder}", OTHER_ROOT / folder)
    run("mount", "--bind", ROOT, OTHER_ROOT / "mnt")
    run("mount", "-t", "tmpfs", "none", OTHER_ROOT / "opt")
    _NFT[:] = "chroot", OTHER_ROOT, "nft"
    try:
        yield
    finally:
        _NFT[:] = ["nft"]
        run("mount", "--make-rslave", OTHER_ROOT)  # or what is unmounted there would be unmounted in /run as well
        run("umount", "--recursive", "--lazy", OTHER_ROOT)


def nft(*words: object, input: str | None = None, check: bool = True) -> str:
    """Run nft, of the version that the plugin uses: 1.0.6 crashes where it reads a set that 1.1 has written."""
    return run(*_NFT, *words, input=input, check=check)


def nft_script(*lines: str) -> None:
    """Run nft commands as one transaction."""
    nft("-f", "-", input="\n".join(lines) + "\n")


def keep_conntrack() -> None:
    """Let this namespace track connections, in a table of the lab's.

    In a new namespace conntrack sleeps until something uses it, and sleeps again with the last NAT rule.
    """
    nft_script("table inet lab { chain keep_conntrack {",
               "type filter hook forward priority 0; ct state new counter; }; }")


def table() -> str:
    """Our table as `nft` prints it, without counters; "" if there is none."""
    return nft("-s", "list", "table", *TABLE.split(), check=False)


@contextlib.contextmanager
def restored_table() -> Iterator[None]:
    """The table is at the end of the block what it was at its beginning."""
    before = table()
    yield
    assert table() == before


def listing(what: str = f"table {TABLE}") -> list[dict[str, Any]]:
    """`nft -j list`, without handles and counters' values; [] if there is no such thing."""
    context = nftables.Nftables()  # not kept: it belongs to the namespace in which it was made
    context.set_json_output(True)
    context.set_stateless_output(True)
    code, output, error = context.cmd(f"list {what}")
    assert not code or "No such file" in error, error
    if code or not output:
        return []
    objects: list[dict[str, Any]] = json.loads(output)["nftables"]
    return [entry for entry in map(_without_handles, objects) if "metainfo" not in entry]


def _without_handles(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_handles(item) for key, item in value.items() if key != "handle"}
    return [_without_handles(item) for item in value] if isinstance(value, list) else value


def state() -> list[str]:
    """All that our table holds, a line each, sorted but for the rules of a chain; [] for no table."""
    lines: list[tuple[str, str]] = []
    for entry in listing():
        (kind, thing), = entry.items()
        for element in thing.pop("elem", ()):
            line = f"element of {thing['name']}: {json.dumps(element)}"
            lines.append((line, line))
        line = f"{kind}: {json.dumps(thing)}"
        lines.append((f"rule of {thing['chain']}" if kind == "rule" else line, line))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def elements(entries: list[dict[str, Any]] | None = None) -> dict[tuple[str, ...], str]:
    """Which chain each map element leads to: (family or address, protocol, port) -> chain."""
    return {tuple(map(str, key["concat"])): (verdict.get("goto") or {"target": str(verdict)})["target"]
            for entry in entries or listing() for key, verdict in entry.get("map", {}).get("elem", ())}


def chains() -> list[str]:
    """The attachments' chains."""
    return sorted(name for entry in listing() if (name := entry.get("chain", {}).get("name", "")).startswith("c/"))


_NETLINK_NETFILTER, _NFT_MSG_GETGEN, _NLM_F_REQUEST, _NFTA_GEN_ID = 12, 10 << 8 | 16, 1, 1


def generation() -> int:
    """The number of transactions that nf_tables has committed here."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.send(struct.pack("=IHHIII", 20, _NFT_MSG_GETGEN, _NLM_F_REQUEST, 0, 0, 0))
        reply = netlink.recv(4096)
    length, kind, number = struct.unpack_from("=HH4s", reply, 20)
    assert (length, kind) == (8, _NFTA_GEN_ID), reply
    return int.from_bytes(number, "big")
