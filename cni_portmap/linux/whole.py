"""Whether a file that another program brings is a program that runs here, or only a part of what it will be."""
import fcntl
import os
import signal
import stat
import struct
import time
from typing import BinaryIO

# Where the ELF specification has the tables of segments and of sections, for 32 and 64 bits: the formats of the header,
# from its byte 16 on, of a segment, and of a section; and which of their fields count.
HEADERS = {1: ("HHIIIIIHHHHHH", "IIIIIIII", "IIIIIIIIII"), 2: ("HHIQQQIHHHHHH", "IIQQQQQQ", "IIQQQQIIQQ")}
MACHINE, PHOFF, SHOFF, PHENTSIZE, PHNUM, SHENTSIZE, SHNUM = 1, 4, 5, 8, 9, 10, 11
SEGMENT = {1: (1, 4), 2: (2, 5)}  # its offset, and its size in the file
TYPE, OFFSET, SIZE = 1, 4, 5
NOBITS = 8  # a section without bytes in the file
RUN = {"x86_64": (62, 3), "aarch64": (183, 40)}  # the ELF machines whose programs a machine runs: 64 bits and 32


def is_written(path: str) -> bool:
    """Whether somebody has a file open for writing. A link is no file. Raises OSError."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # comes when somebody opens it just while we have the lease
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            return False
        except BlockingIOError:
            return True
        except OSError:  # another user's file, or a file system without leases: two looks
            before = os.stat(path)
            time.sleep(1)
            after = os.stat(path)
            return (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)


def is_program(path: str) -> bool:
    """Whether a file may be run, and is a script, or an ELF file of this machine with all of its segments and sections.

    A link counts as what it leads to. Raises OSError.
    """
    if not os.path.isfile(path) or not os.stat(path).st_mode & 0o111:
        return False
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        identity = file.read(16)
        if not identity.startswith(b"\x7fELF"):
            return identity.startswith(b"#!")
        try:
            bits, order = identity[4], {1: "<", 2: ">"}[identity[5]]
            header, segment, section = (order + each for each in HEADERS[bits])
            fields = struct.unpack(header, file.read(struct.calcsize(header)))
            segments = _table(file, segment, fields[PHOFF], fields[PHENTSIZE], fields[PHNUM])
            sections = _table(file, section, fields[SHOFF], fields[SHENTSIZE], fields[SHNUM])
        except (IndexError, KeyError, struct.error):
            return False
        machine = os.uname().machine
        offset, length = SEGMENT[bits]
        return (machine not in RUN or fields[MACHINE] in RUN[machine]) and \
            all(each[offset] + each[length] <= size for each in segments) and \
            all(each[TYPE] == NOBITS or each[OFFSET] + each[SIZE] <= size for each in sections)


def _table(file: BinaryIO, entry: str, offset: int, length: int, number: int) -> list[tuple[int, ...]]:
    """A table's entries, of `length` bytes each. Raises struct.error for one that ends early, or begins too late."""
    if offset > os.fstat(file.fileno()).st_size:
        raise struct.error  # no offset that one could seek to
    file.seek(offset)
    table = file.read(length * number)
    return [struct.unpack_from(entry, table, length * each) for each in range(number)]
