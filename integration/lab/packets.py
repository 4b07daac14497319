"""Packets made by hand, with any source, sent on a link past all rules of their sender."""
import contextlib
import ipaddress
import socket
import struct

from .links import mac_of
from .servers import NUMBERS


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff


def _crc32c(data: bytes) -> bytes:
    """SCTP's checksum (RFC 9260, appendix A)."""
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return struct.pack("<I", crc ^ 0xffffffff)


def packet(source: str, destination: str, port: int, protocol: str = "udp", source_port: int = 40000) -> bytes:
    """An IP packet with any source: a datagram, a TCP SYN, or an SCTP INIT."""
    packed = [ipaddress.ip_address(ip).packed for ip in (source, destination)]
    ports = struct.pack("!HH", source_port, port)
    if protocol == "sctp":
        init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65536, 1, 1, 1)  # INIT, with one stream each way
        body = ports + bytes(4) + _crc32c(ports + bytes(8) + init) + init
    else:
        body, at = (ports + struct.pack("!HH", 12, 0) + b"data", 6) if protocol == "udp" else \
            (ports + struct.pack("!IIBBHHH", 1, 0, 5 << 4, 2, 65535, 0, 0), 16)  # SYN
        pseudo = b"".join(packed) + struct.pack("!II", len(body), NUMBERS[protocol])
        body = body[:at] + struct.pack("!H", _checksum(pseudo + body)) + body[at + 2:]
    if ":" in source:
        return struct.pack("!IHBB", 6 << 28, len(body), NUMBERS[protocol], 64) + b"".join(packed) + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, NUMBERS[protocol], 0) + b"".join(packed)
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + body


def inject(where: contextlib.AbstractContextManager[object], host_device: str, data: bytes) -> None:
    """Put a packet on the link from a namespace's eth0 to the host's `host_device`, past all rules of its sender."""
    mac = mac_of(host_device)
    with where:
        wire_end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with wire_end:
        kind = b"\x86\xdd" if data[0] >> 4 == 6 else b"\x08\x00"
        wire_end.bind(("eth0", 0))
        wire_end.send(mac + b"\x02\0\0\0\0\x02" + kind + data)
