"""A half-open probe: the first packet of a TCP connection, and what comes back.

The kernel knows of no socket for it, so it resets what answers, and the program behind the port sees no connection.
Three tracked connections are left to time out. Source: raw(7), packet(7), RFC 9293.
"""
import time
from socket import AF_INET, AF_INET6, IPPROTO_TCP, SOCK_RAW, inet_ntop, socket
from struct import pack, unpack_from

SYN_ACK, RST = 0x12, 0x04
ANSWERED, REFUSED, NOTHING, FORBIDDEN = "answered", "refused", "nothing", "forbidden"


def probe(source: bytes, destination: bytes, port: int, seconds: float = 1.0) -> str:
    """ANSWERED, REFUSED, NOTHING (within `seconds`), or FORBIDDEN: a rule of this host does not let it out."""
    family = AF_INET if len(source) == 4 else AF_INET6
    with socket(family, SOCK_RAW, IPPROTO_TCP) as raw, socket(family, 1) as reserved:
        reserved.bind((inet_ntop(family, source), 0))  # a port that nobody else has; nothing listens there
        own = reserved.getsockname()[1]
        raw.bind((inet_ntop(family, source), 0))
        raw.settimeout(seconds)
        segment = pack("!HHIIBBHHH", own, port, 0x5ca1ab1e, 0, 5 << 4, 2, 65535, 0, 0)
        segment = segment[:16] + pack("!H", _checksum(source, destination, segment)) + segment[18:]
        try:
            raw.sendto(segment, (inet_ntop(family, destination), 0))
        except PermissionError:
            return FORBIDDEN
        end, late = time.monotonic() + seconds, 0
        while (left := end - time.monotonic()) > 0 or late < 1000:  # what waits to be read by then has come in time
            late += left <= 0
            raw.settimeout(max(left, 0))
            try:
                data = raw.recv(2048)
            except (TimeoutError, BlockingIOError):
                break
            at = (data[0] & 15) * 4 if family == AF_INET else 0
            if len(data) >= at + 14 and unpack_from("!HH", data, at) == (port, own):
                flags = data[at + 13]
                if flags & RST:
                    return REFUSED
                if flags & SYN_ACK == SYN_ACK:
                    return ANSWERED
    return NOTHING


def _checksum(source: bytes, destination: bytes, segment: bytes) -> int:
    """The Internet checksum with the pseudo-header (RFC 1071, RFC 8200)."""
    data = source + destination + pack("!II", len(segment), IPPROTO_TCP) + segment
    total: int = sum(unpack_from(f"!{len(data) // 2}H", data))
    total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff
