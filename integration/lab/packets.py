"""Packets made by hand, with any source, sent on a link past all rules of their sender."""
import contextlib
import ipaddress
import secrets
import socket
import struct
import threading
from collections.abc import Iterator

from .links import mac_of
from .servers import NUMBERS, PATIENT


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


def packet(source: str, destination: str, port: int, protocol: str = "udp", source_port: int = 40000,
           data: bytes = b"data") -> bytes:
    """An IP packet with any source: a datagram with `data`, a TCP SYN, or an SCTP INIT."""
    packed = [ipaddress.ip_address(ip).packed for ip in (source, destination)]
    ports = struct.pack("!HH", source_port, port)
    if protocol == "sctp":
        init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65536, 1, 1, 1)  # INIT, with one stream each way
        body = ports + bytes(4) + _crc32c(ports + bytes(8) + init) + init
    else:
        body, at = (ports + struct.pack("!HH", 8 + len(data), 0) + data, 6) if protocol == "udp" else \
            (ports + struct.pack("!IIBBHHH", 1, 0, 5 << 4, 2, 65535, 0, 0), 16)  # SYN
        pseudo = b"".join(packed) + struct.pack("!II", len(body), NUMBERS[protocol])
        body = body[:at] + struct.pack("!H", _checksum(pseudo + body)) + body[at + 2:]
    if ":" in source:
        return struct.pack("!IHBB", 6 << 28, len(body), NUMBERS[protocol], 64) + b"".join(packed) + body
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, NUMBERS[protocol], 0) + b"".join(packed)
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + body


def source_routed(source: str, via: str, destination: str, port: int, data: bytes) -> bytes:
    """A datagram over IPv4 whose sender wants it to go on from the host `via` to `destination` (RFC 791, 3.1)."""
    plain = packet(source, destination, port, data=data)
    options = bytes((131, 7, 4)) + plain[16:20] + b"\x01"  # loose source and record route
    fields = b"\x47" + plain[1:2] + struct.pack("!H", len(plain) + 8) + plain[4:10] + bytes(2) + plain[12:16] + \
        ipaddress.ip_address(via).packed + options
    return fields[:10] + struct.pack("!H", _checksum(fields)) + fields[12:] + plain[20:]


def inject(where: contextlib.AbstractContextManager[object], host_device: str, data: bytes) -> None:
    """Put a packet on the link from a namespace's eth0 to the host's `host_device`, past all rules of its sender."""
    with _wire_end(where) as wire_end:
        wire_end.send(_frame(host_device, data))


@contextlib.contextmanager
def flood(where: contextlib.AbstractContextManager[object], host_device: str, data: bytes) -> Iterator[None]:
    """Put it there again and again, 2,000 times a second, while the block runs."""
    frame, stop = _frame(host_device, data), threading.Event()

    def send() -> None:
        while not stop.wait(0.0005):
            wire_end.send(frame)
    with _wire_end(where) as wire_end:
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _wire_end(where: contextlib.AbstractContextManager[object]) -> socket.socket:
    with where:
        wire_end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    wire_end.bind(("eth0", 0))
    return wire_end


def _frame(host_device: str, data: bytes) -> bytes:
    kind = b"\x86\xdd" if data[0] >> 4 == 6 else b"\x08\x00"
    return mac_of(host_device) + b"\x02\0\0\0\0\x02" + kind + data


def ping(where: contextlib.AbstractContextManager[object], ip: str, timeout: float = PATIENT) -> bool:
    """Whether an address answers an echo request from a namespace."""
    v6 = ":" in ip
    with where:
        raw = socket.socket(*((socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) if v6 else
                              (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)))
    request, reply = (128, 129) if v6 else (8, 0)
    number = secrets.randbits(32)
    packet = struct.pack("!BBHI", request, 0, 0, number)
    with raw:
        raw.settimeout(timeout)
        try:
            raw.connect((ip, 0))
            raw.send(packet if v6 else struct.pack("!BBHI", request, 0, _checksum(packet), number))
            while True:
                answer = raw.recv(2048)[0 if v6 else 20:]
                if answer[0] == reply and answer[4:8] == packet[4:8]:
                    return True
        except OSError:
            return False


def too_big(router: str, sender: str, receiver: str, ports: tuple[int, int]) -> bytes:
    """What a `router` sends to `sender`: its TCP segment to `receiver` (`ports`: from, to) is larger than 1,280 bytes.
    """
    inner = packet(sender, receiver, ports[1], "tcp", ports[0])
    packed = [ipaddress.ip_address(ip).packed for ip in (router, sender)]
    if ":" in router:
        body = struct.pack("!BBHI", 2, 0, 0, 1280) + inner
        checksum = _checksum(b"".join(packed) + struct.pack("!II", len(body), 58) + body)
        return struct.pack("!IHBB", 6 << 28, len(body), 58, 64) + b"".join(packed) + body[:2] + \
            struct.pack("!H", checksum) + body[4:]
    body = struct.pack("!BBHHH", 3, 4, 0, 0, 1280) + inner[:28]
    body = body[:2] + struct.pack("!H", _checksum(body)) + body[4:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, 1, 0) + b"".join(packed)
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + body
