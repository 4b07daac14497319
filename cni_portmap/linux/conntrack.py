"""Tracked connections: deletes those that would still send packets where they should not go any more.

Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h; net/netfilter/nf_conntrack_netlink.c.
"""
import posix

from ..attachment import AF
from . import EINVAL, ENOENT, EOPNOTSUPP, read
from .netlink import NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP, attribute, attributes, nested

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .netlink import Socket

    Filter = tuple[int, int, bytes, bytes]  # family, host port, destination, target; b"" for any

IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 1 << 8 | 1, 1 << 8 | 2
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_FILTER = 1, 2, 12, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST = 1, 2, 3, 4
CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 1, 3
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
CTA_FILTER_F_IP_SRC, CTA_FILTER_F_IP_DST, CTA_FILTER_F_PROTO_NUM, CTA_FILTER_F_DST_PORT = 1, 2, 8, 32
IPPROTO_TCP, IPPROTO_UDP = 6, 17
MANY_FLOWS = 1000
TRACKED = "/proc/net/nf_conntrack"
FEW_TRACKED = 4000  # below, the text of all flows (1 us each) is cheaper than the kernel's walk to list some


class Flow:
    """A tracked connection: what its first packet asked for (`destination`, `port`), and who answers (`target`).

    Addresses are packed. `handle`: the attributes that name the flow to the kernel.
    """

    __slots__ = ("family", "destination", "port", "target", "handle")

    def __init__(self, answer: bytes) -> None:
        found = dict(attributes(answer, 4))
        self.destination, _, self.port = _tuple(found[CTA_TUPLE_ORIG])
        _, self.target, _ = _tuple(found[CTA_TUPLE_REPLY])
        self.family = 4 if len(self.destination) == 4 else 6
        self.handle = attribute(CTA_TUPLE_ORIG | NLA_F_NESTED, found[CTA_TUPLE_ORIG]) + \
            attribute(CTA_ID, found.get(CTA_ID, b""))


def _tuple(raw: bytes) -> tuple[bytes, bytes, int]:
    """Destination, source and destination port of one direction of a flow."""
    found = dict(attributes(raw))
    ips, proto = dict(attributes(found.get(CTA_TUPLE_IP, b""))), dict(attributes(found.get(CTA_TUPLE_PROTO, b"")))
    return ips.get(CTA_IP_V4_DST) or ips.get(CTA_IP_V6_DST, b""), \
        ips.get(CTA_IP_V4_SRC) or ips.get(CTA_IP_V6_SRC, b""), \
        int.from_bytes(proto.get(CTA_PROTO_DST_PORT, b""), "big")


class Conntrack:
    """The connections of one protocol (a number) that this host tracks. Source: nf_conntrack_netlink.c.

    A message costs the kernel a look at all of them (0.3 us each), so it should be asked seldom. It filters lists
    (CTA_FILTER, since Linux 5.8); an older one hands over everything, so callers look at what they get.
    """

    def __init__(self, protocol: int, open_socket: "Callable[[], Socket]") -> None:
        self._protocol, self._open_socket = protocol, open_socket
        self._netlink = open_socket()

    def _body(self, family: int, port: int, destination: bytes = b"", target: bytes = b"") -> bytes:
        """A message about the flows to `port` of `destination` (IPv4) that `target` answers; 0 and b"" for any.

        Not for IPv6 addresses: the kernel's filter takes all but the given one (ctnetlink_filter_match_tuple).
        """
        original = nested(CTA_TUPLE_PROTO, attribute(CTA_PROTO_NUM, bytes((self._protocol,))),
                          attribute(CTA_PROTO_DST_PORT, port.to_bytes(2, "big")))
        flags = CTA_FILTER_F_PROTO_NUM | (CTA_FILTER_F_DST_PORT if port else 0)
        if destination:
            original += nested(CTA_TUPLE_IP, attribute(CTA_IP_V4_DST, destination))
            flags |= CTA_FILTER_F_IP_DST
        body = nested(CTA_TUPLE_ORIG, original)
        wanted = attribute(CTA_FILTER_ORIG_FLAGS, flags.to_bytes(4, "little"))
        if target:
            body += nested(CTA_TUPLE_REPLY, nested(CTA_TUPLE_IP, attribute(CTA_IP_V4_SRC, target)))
            wanted += attribute(CTA_FILTER_REPLY_FLAGS, CTA_FILTER_F_IP_SRC.to_bytes(4, "little"))
        # Version 1 of nfgenmsg makes a deletion heed the family (ctnetlink_del_conntrack).
        return bytes((AF[family], 1, 0, 0)) + body + nested(CTA_FILTER, wanted)

    def flows(self, family: int, port: int) -> "Iterator[Flow]":
        """The flows of a family to `port` of anybody, 0 for any port."""
        own = self._open_socket()  # the caller may ask for something meanwhile
        for answer in own.stream(IPCTNL_MSG_CT_GET, self._body(family, port), NLM_F_DUMP):
            yield Flow(answer)

    def delete(self, port: int, destination: bytes, target: bytes) -> bool:
        """Let the kernel delete the IPv4 flows that `_body` describes; False if it cannot choose.

        Deletion heeds filters since Linux 6.11 or so (ctnetlink_flush_conntrack), and never the ports of anything but
        TCP and UDP (ctnetlink_filter_match_tuple).
        """
        if self._protocol not in (IPPROTO_TCP, IPPROTO_UDP):
            return False
        try:
            self._netlink.ask(IPCTNL_MSG_CT_DELETE, self._body(4, port, destination, target))
        except OSError as error:
            if error.errno in (EINVAL, EOPNOTSUPP):
                return False
            if error.errno != ENOENT:
                raise
        return True

    def delete_each(self, flows: "Iterable[Flow]") -> None:
        """Delete these flows; one that is gone already is no error."""
        bodies = [bytes((AF[flow.family], 1, 0, 0)) + flow.handle for flow in flows]
        if not bodies:
            return
        self._netlink.ask_each(IPCTNL_MSG_CT_DELETE, bodies, NLM_F_ACK)


def delete_flows(protocol: int, filters: "Callable[[], list[Filter]]", is_stale: "Callable[[Flow], bool]",
                 open_socket: "Callable[[], Socket]") -> None:
    """Delete stale flows; see Kernel.delete_flows. Raises OSError."""
    count = int(read("/proc/sys/net/netfilter/nf_conntrack_count", 16) or 0)
    wanted = filters() if count else []
    if not wanted:
        return
    conntrack = Conntrack(protocol, open_socket)
    for family in 4, 6:
        mine = [each for each in wanted if each[0] == family]
        # Measured, in units of 0.3 us: a filter looks at every flow, a list also at every empty bucket (10 ms).
        if family == 4 and len(mine) * (400 + count) <= 35_000 + count and \
                all(conntrack.delete(port, host, target) for _, port, host, target in mine):
            continue
        ports = {port for _, port, *_ in mine}
        if not ports or (count < FEW_TRACKED and not _may_track(family, protocol, ports)):
            continue
        port = ports.pop() if len(ports) == 1 else 0
        for _ in range(100):  # an end even where flows stay
            if not _delete_listed(conntrack, family, port, is_stale):
                break


def _may_track(family: int, protocol: int, ports: "set[int]") -> bool:
    """Whether there are flows to any of these ports, as far as /proc says: 0.3 ms in place of 10 for a list.

    It takes no lock for each empty bucket. True where it does not say: a kernel without CONFIG_NF_CONNTRACK_PROCFS, or
    no right to read it.
    """
    text = b""
    try:
        fd = posix.open(TRACKED, posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            while chunk := posix.read(fd, 1 << 16):
                text += chunk
        finally:
            posix.close(fd)
    except OSError:
        return True
    wanted = frozenset(b"%d" % port for port in ports)
    for line in text.splitlines():  # ct_seq_show: family, number, protocol, number, ..., the original direction first
        words = line.split(None, 4)
        if words[0] == b"ipv%d" % family and words[3] == b"%d" % protocol and \
                words[4].partition(b" dport=")[2].partition(b" ")[0] in wanted:
            return True
    return False


def _delete_listed(conntrack: Conntrack, family: int, port: int, is_stale: "Callable[[Flow], bool]") -> bool:
    """Delete the stale flows among those to `port` (0: any); whether there may be more.

    Few are deleted one by one (20 us each). Many to one port lead to few addresses, where the kernel deletes them.
    """
    stale = []
    for flow in conntrack.flows(family, port):
        if is_stale(flow):
            stale.append(flow)
            if len(stale) == MANY_FLOWS and family == 4 and port:
                places = {(flow.destination, flow.target) for flow in stale}
                if all(conntrack.delete(port, *place) for place in places):
                    return True
    conntrack.delete_each(stale)
    return False
