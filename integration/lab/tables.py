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
def other_root(root: str | pathlib.Path, place: pathlib.Path = OTHER_ROOT) -> Iterator[None]:
    """Show another system's root folder at `place`, for chroot, with this host's /dev, /proc, /run and checkout.

    In the block, `nft` is that system's.
    """
    run("mount", "--make-rshared", "/run")  # so that it sees the namespaces to come
    run("mount", "--bind", root, place)
    for folder in "dev", "proc", "run":
        run("mount", "--rbind", f"/{folder}", place / folder)
    run("mount", "--bind", ROOT, place / "mnt")
    run("mount", "-t", "tmpfs", "none", place / "opt")
    _NFT[:] = "chroot", place, "nft"
    try:
        yield
    finally:
        _NFT[:] = ["nft"]
        run("mount", "--make-rslave", place)  # or what is unmounted there would be unmounted in /run as well
        run("umount", "--recursive", "--lazy", place)


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


@contextlib.contextmanager
def restored_policy() -> Iterator[None]:
    """The whole ruleset is at the end of the block what it was at its beginning, whatever is done to it."""
    before = nft("list", "ruleset")
    try:
        yield
    finally:
        nft("-f", "-", input=f"flush ruleset\n{before}")


def register_again() -> None:
    """Write our table again as it is: its hooks are registered last, so at one priority they come first."""
    nft("-f", "-", input=f"delete table {TABLE}\n{table()}")


def listing(what: str = f"table {TABLE}") -> list[dict[str, Any]]:
    """`nft -j list`, without handles and counters' values; [] if there is no such thing.

    A long one only once it was the same twice: while the kernel enlarges a set's table, some elements are left out.
    """
    context = nftables.Nftables()  # not kept: it belongs to the namespace in which it was made
    context.set_json_output(True)
    context.set_stateless_output(True)
    output = before = None
    while output is None or len(output) > 20_000 and output != before:
        before = output
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


def reset_rules() -> None:
    """Set the counters of all rules to 0, as `nft reset rules` does (nft 1.0.7, Linux 6.2); older kernels cannot."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.send(struct.pack("=IHHIII", 20, _NFT_MSG_GETRULE_RESET, _NLM_F_REQUEST | _NLM_F_DUMP, 0, 0, 0))
        while struct.unpack_from("=H", netlink.recv(1 << 16), 4)[0] not in (_NLMSG_ERROR, _NLMSG_DONE):
            pass


def elements(entries: list[dict[str, Any]] | None = None) -> dict[tuple[str, ...], str]:
    """Which chain each map element leads to: (family or address, protocol, port) -> chain."""
    return {tuple(map(str, key["concat"])): (verdict.get("goto") or {"target": str(verdict)})["target"]
            for entry in entries or listing() for key, verdict in entry.get("map", {}).get("elem", ())
            if "concat" in key}


def chains() -> list[str]:
    """The attachments' chains."""
    return sorted(name for entry in listing() if (name := entry.get("chain", {}).get("name", "")).startswith("c/"))


_NETLINK_NETFILTER, _NFT_MSG_GETGEN, _NLM_F_REQUEST, _NFTA_GEN_ID = 12, 10 << 8 | 16, 1, 1
_NFT_MSG_GETRULE_RESET, _NLM_F_DUMP, _NLMSG_ERROR, _NLMSG_DONE = 10 << 8 | 25, 0x300, 2, 3


def generation() -> int:
    """The number of transactions that nf_tables has committed here."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.send(struct.pack("=IHHIII", 20, _NFT_MSG_GETGEN, _NLM_F_REQUEST, 0, 0, 0))
        reply = netlink.recv(4096)
    length, kind, number = struct.unpack_from("=HH4s", reply, 20)
    assert (length, kind) == (8, _NFTA_GEN_ID), reply
    return int.from_bytes(number, "big")
