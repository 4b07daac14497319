"""Chains and rules in our table that nft would not let pass: their names and comments may be any bytes."""
import socket
import struct

from .processes import ROOT  # noqa: F401  # puts the checkout on the path

from cni_portmap.linux.netlink import attribute, named, nested

NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE = 10 << 8 | 3, 10 << 8 | 6
NFNL_BATCH_BEGIN, NFNL_BATCH_END = 16, 17
REQUEST_ACK_CREATE = 1 | 4 | 0x400
COUNTER = nested(1, named(1, "counter"), nested(2))


def write(*messages: tuple[int, bytes]) -> None:
    """Write to our table without nft, which would not let such names pass."""
    subsystem = struct.pack("=BBH", 0, 0, 10 << 8)
    table = b"\1\0\0\0" + named(1, "cni_portmap")
    batch = [(NFNL_BATCH_BEGIN, 1, subsystem), *((kind, REQUEST_ACK_CREATE, table + body) for kind, body in messages),
             (NFNL_BATCH_END, 1, subsystem)]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
        netlink.send(b"".join(struct.pack("=IHHII", 16 + len(body) + -len(body) % 4, kind, flags, 1, 0) + body +
                              bytes(-len(body) % 4) for kind, flags, body in batch))
        for _ in messages:
            answer = netlink.recv(4096)
            assert struct.unpack_from("=i", answer, 16) == (0,), answer


def chain(name: str) -> tuple[int, bytes]:
    return NFT_MSG_NEWCHAIN, named(3, name)


def rule(name: str, comment: str) -> tuple[int, bytes]:
    data = comment.encode() + b"\0"
    return NFT_MSG_NEWRULE, named(2, name) + nested(4, COUNTER) + attribute(7, bytes((0, len(data))) + data)
