"""The CNI protocol: verbs, variables, versions, errors, results. Knows nothing of ports.

Source: containernetworking/cni SPEC.md 1.1.0, sections 2 to 5; older results: spec-v0.2.0 and spec-v0.4.0.

A runtime starts this thousands of times a day, mostly for containers that publish nothing, so imports are
rationed: everything here is part of the interpreter (the json package alone would double the start-up time).
"""
import posix
from _json import encode_basestring_ascii as quote
from _json import make_scanner

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import TypeVar

    _T = TypeVar("_T")

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

# verb: (the oldest cniVersion that has it, the variables it needs)
VERBS = {
    "ADD": ("0.1.0", ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")),
    "DEL": ("0.1.0", ("CNI_CONTAINERID", "CNI_IFNAME")),
    "CHECK": ("0.4.0", ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")),
    "GC": ("1.1.0", ()),
    "STATUS": ("1.1.0", ()),
    "VERSION": ("0.1.0", ()),
}

# The specification's keys of a configuration that anything here reads.
KEYS = ("cniVersion", "name", "type", "prevResult", "runtimeConfig", "cni.dev/valid-attachments", "cni.dev/attachments")

# Error codes: 1 to 99 are the specification's (section 5), 100 and above ours: docs/troubleshooting.md explains each.
INCOMPATIBLE_VERSION = 1
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
UNDECODABLE = 6
INVALID_CONFIG = 7
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
INTERNAL = 99
NFT_REFUSED = 100
PORT_TAKEN = 101
PORT_IN_USE = 102
FOREIGN_TABLE = 103
CHECK_FAILED = 104


class CniError(Exception):
    """A refusal, as the runtime will read it: `code` (above), `msg` (one line), `details` (what to do)."""

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(msg)
        self.code, self.msg, self.details = code, msg, details


class ConfigError(CniError):
    """The configuration is not valid at `path`, such as `runtimeConfig.portMappings[0].hostPort`.

    `reason`: what to write instead; "" where the schema's description of the path says it best, see `explain`.
    """

    def __init__(self, path: str, reason: str = "") -> None:
        super().__init__(INVALID_CONFIG, f"invalid value for {path}",
                         f"expected {reason}" if reason else "see portmap.schema.json for valid values")
        self.path, self.reason = path, reason


class Request:
    """One call of the plugin.

    `verb`, `version` (cniVersion of the configuration); `container_id`, `netns` (path or ""), `ifname`;
    `args`: CNI_ARGS as it is; `config`: the decoded configuration; `prev_result`: its prevResult as raw JSON text, or
    "".
    """

    __slots__ = ("verb", "version", "container_id", "netns", "ifname", "args", "config", "prev_result")

    def __init__(self, verb: str, version: str, environ: dict[str, str], config: dict[str, object],
                 prev_result: str) -> None:
        self.verb, self.version, self.config, self.prev_result = verb, version, config, prev_result
        self.container_id = environ.get("CNI_CONTAINERID", "")
        self.netns = environ.get("CNI_NETNS", "")
        self.ifname = environ.get("CNI_IFNAME", "")
        self.args = environ.get("CNI_ARGS", "")


# --- JSON, decoded by the interpreter's own C scanner ---------------------------------------------------------

class _Json:
    """The attributes of a `json.JSONDecoder` that the scanner reads; NaN and Infinity are refused."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> object:
        raise ValueError(f"{name} is not JSON")


_scan = make_scanner(_Json)  # type: ignore[arg-type]  # any object with these attributes will do


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def members(text: str) -> dict[str, tuple[object, str]]:
    """Read a JSON object: each key's decoded value and its raw text, which may be passed on untouched.

    Raises CniError(6) for anything but one well-formed object (RFC 8259).
    """
    found: dict[str, tuple[object, str]] = {}
    try:
        at = _skip(text, 0)
        if text[at:at + 1] != "{":
            raise ValueError("it is not a JSON object")
        at = _skip(text, at + 1)
        if text[at:at + 1] == "}":
            at += 1
        else:
            while True:
                key, at = _scan(text, at)
                at = _skip(text, at)
                if type(key) is not str or text[at:at + 1] != ":":
                    raise ValueError(f"expected a key and a colon at character {at}")
                start = _skip(text, at + 1)
                value, end = _scan(text, start)
                found.pop(key, None)  # of two the last counts, and keeps its place
                found[key] = value, text[start:end]
                at = _skip(text, end) + 1
                if text[at - 1:at] == "}":
                    break
                if text[at - 1:at] != ",":
                    raise ValueError(f"expected ',' or '}}' at character {at - 1}")
                at = _skip(text, at)
        if _skip(text, at) != len(text):
            raise ValueError(f"more text follows at character {at}")
    except StopIteration as stop:  # the scanner's way to say "no value here"
        raise CniError(UNDECODABLE, f"cannot decode the network configuration: no value at character {stop.value}",
                       "expected one JSON object on standard input") from None
    except SystemError:
        from sys import modules
        if "json.decoder" in modules:
            raise
        __import__("json.decoder")  # has the words in which Python 3.11's scanner tells of an error, once it is loaded
        return members(text)
    except ValueError as error:
        raise CniError(UNDECODABLE, f"cannot decode the network configuration: {error}",
                       "expected one JSON object on standard input") from None
    except RecursionError:
        raise _too_deep() from None
    return found


def _too_deep() -> CniError:
    return CniError(UNDECODABLE, "cannot decode the network configuration: it is nested too deeply",
                    "expected no more than some hundred lists and objects in one another")


def decode(text: str) -> object:
    """Any JSON document, of a file. Raises ValueError."""
    try:
        value, end = _scan(text, _skip(text, 0))
    except (StopIteration, SystemError, RecursionError):  # the second: see `members`
        raise ValueError("it is not JSON") from None
    if _skip(text, end) != len(text):
        raise ValueError("it is not JSON: more text follows")
    return value


def as_go_reads(found: "dict[str, _T]", keys: "Collection[str]") -> "dict[str, _T]":
    """The members of an object, those whose key is one of `keys` in another case under that key.

    Of two the last counts, as in Go's decoder, which libcni and the reference plugin are made with; a line on stderr
    tells of it. Source: encoding/json, foldName.
    """
    folded: dict[str, str] = {}
    for key in found:
        if key not in keys:
            folded = folded or {_fold(name): name for name in keys}
            if _fold(key) in folded:
                break
    else:
        return found
    read: dict[str, _T] = {}
    for key, value in found.items():
        name = key if key in keys else folded.get(_fold(key), key)
        if name != key or name in read:
            warn(f"reading the key {quote(key)} as {name}" + ("; it was given before" if name in read else ""))
        read[name] = value
    return read


def _fold(key: str) -> str:
    return key.lower().replace("\u017f", "s")  # with the Kelvin sign the two letters that fold to one of ASCII


def with_version(raw: str, version: str) -> str:
    """The result object `raw` (JSON text), every member kept as it is, its cniVersion replaced by `version`."""
    kept = (f"{quote(key)}:{text}" for key, (_, text) in members(raw).items() if key != "cniVersion")
    return "{" + ",".join((f'"cniVersion":{quote(version)}', *kept)) + "}"


# --- the environment ------------------------------------------------------------------------------------------

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ALNUM = frozenset(_LETTERS + _LETTERS.upper() + "0123456789")
_NAME = _ALNUM | set("_.-")
_IFNAME = _NAME | set("@+~=,")


def is_name(value: str) -> bool:
    """Whether `value` can name a container or a network (SPEC.md, sections 1 and 2)."""
    return value[:1] in _ALNUM and _NAME.issuperset(value) if value else False


def is_ifname(value: str) -> bool:
    """Whether the kernel (dev_valid_name) takes `value` as an interface name, and it cannot leave nft text."""
    return 0 < len(value) <= 15 and value not in (".", "..") and _IFNAME.issuperset(value)


def _is_path(value: str) -> bool:
    return "\0" not in value


IFNAME = "1 to 15 of letters, digits and '_.-@+~=,', and neither '.' nor '..'"
_VARIABLES = {
    "CNI_CONTAINERID": (is_name, "letters, digits, '_', '.' and '-', beginning with a letter or digit"),
    "CNI_NETNS": (_is_path, "a path"),
    "CNI_IFNAME": (is_ifname, IFNAME),
}


def environment_error(verb: str, environ: dict[str, str]) -> CniError | None:
    """The error for the first variable that `verb` needs and that is missing or invalid; None for none."""
    needed = VERBS[verb][1]
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        return CniError(INVALID_ENVIRONMENT, f"required variable {', '.join(missing)} is missing",
                        f"{verb} needs {', '.join(needed)}")
    for name in needed:
        valid, expected = _VARIABLES[name]
        if not valid(environ[name]):
            return CniError(INVALID_ENVIRONMENT, f"invalid value for {name}: {environ[name]!r}", f"expected {expected}")
    return None


# --- one call -------------------------------------------------------------------------------------------------

def _decode(stdin: bytes) -> dict[str, tuple[object, str]]:
    try:
        return as_go_reads(members(stdin.decode()), KEYS)
    except UnicodeDecodeError as error:
        raise CniError(UNDECODABLE, "cannot decode the network configuration: it is not UTF-8 "
                                    f"({error.reason} at byte {error.start})") from None


def _version_of(config: dict[str, tuple[object, str]]) -> str:
    version = config.get("cniVersion", ("", ""))[0]
    if version is None or version == "":
        version = "0.1.0"  # as in libcni
    if type(version) is not str:
        raise CniError(INVALID_CONFIG, f"cniVersion: {version!r} is not a version", "expected text, such as \"1.0.0\"")
    if version not in VERSIONS:
        raise CniError(INCOMPATIBLE_VERSION, f"cniVersion {version!r} is not supported",
                       f"supported: {', '.join(VERSIONS)}")
    return version


def _versions(stdin: bytes) -> str:
    """VERSION's result. It echoes a version that it knows, and ignores other keys (SPEC.md, section 4)."""
    try:
        version = _version_of(_decode(stdin))
    except CniError:
        version = VERSIONS[-1]
    return f'{{"cniVersion":{quote(version)},"supportedVersions":[{",".join(map(quote, VERSIONS))}]}}'


def respond(handlers: "Mapping[str, Callable[[Request], str | None]]", environ: dict[str, str],
            read: "Callable[[], bytes]") -> tuple[int, str]:
    """Answer one call: the exit status and the one document for standard output ("" for none).

    `handlers` maps each verb but VERSION to a function that returns the document or None, or raises CniError.
    """
    _answering["version"] = VERSIONS[-1]
    try:
        verb = environ.get("CNI_COMMAND", "")
        if verb not in VERBS:
            raise CniError(INVALID_ENVIRONMENT, f"unknown CNI_COMMAND {quote(verb)}",
                           f"expected one of {', '.join(VERBS)}")
        if verb == "VERSION":
            return 0, _versions(read())
        wrong_environment = environment_error(verb, environ)
        try:
            found = _decode(read())
            version = _answering["version"] = _version_of(found)
            oldest = VERBS[verb][0]
            if VERSIONS.index(version) < VERSIONS.index(oldest):
                raise CniError(INCOMPATIBLE_VERSION, f"{verb} requires cniVersion {oldest} or later",
                               f"the configuration has {version}")
        except CniError as wrong_input:
            raise wrong_environment or wrong_input from None
        if wrong_environment:
            raise wrong_environment
        previous, raw = found.get("prevResult", (None, ""))
        config = {key: value for key, (value, _) in found.items()}
        request = Request(verb, version, environ, config, "" if previous is None else raw)
        return 0, handlers[verb](request) or ""
    except CniError as error:
        return 1, _error_document(error)
    except RecursionError:  # what the scanner has just taken may be too deep for those who go on with it
        return 1, _error_document(_too_deep())
    except OSError as error:  # where the system refuses even a module of ours, as with too few descriptors
        return 1, _error_document(CniError(IO_FAILURE, f"{error.filename or 'the system'}: {error.strerror or error}",
                                           "the runtime's limits, or the file system, do not let the plugin work"))
    except (MemoryError, SystemError):  # the second is what the interpreter makes of the first, in some places
        return 1, _no_memory()
    except BaseException as error:  # ours to mend: the runtime still gets its one document, and no traceback
        frame = error.__traceback__
        while frame and frame.tb_next:
            frame = frame.tb_next
        where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
        return 1, _error_document(CniError(INTERNAL, f"internal error: {type(error).__name__}: {error}",
                                           f"please report it: {where}"))
    finally:
        tell()


_answering = {"version": VERSIONS[-1]}  # the call that is being answered, for its error document


def is_serving() -> bool:
    """Whether this process is there to answer one call of a runtime, and for nothing else."""
    return "process" in _answering


def _error_document(error: CniError) -> str:
    return f'{{"cniVersion":{quote(_answering["version"])},"code":{error.code},"msg":{quote(error.msg)},' \
           f'"details":{quote(error.details)}}}'


def _no_memory() -> str:
    return _error_document(CniError(IO_FAILURE, "there is not enough memory",
                                    "the limits of the runtime, or of the host, do not let the plugin work"))


# --- the process ----------------------------------------------------------------------------------------------

PROCESS_NAME = "cni-portmap/"  # begins the name of each process of ours
STDIN_MAX = 32 << 20  # bytes; 65,535 mappings are 5 MB
_warnings: list[str] = []


def warn(line: str) -> None:
    """One line for the runtime's log, once the call's work is done: to write it may take for ever, under a lock too."""
    if line not in _warnings:
        _warnings.append(line)


def tell() -> None:
    """Write the warnings so far. Not under the lock: standard error may be a stopped terminal, or a full pipe."""
    while _warnings:
        _write(2, f"cni-portmap: {_warnings.pop(0)}\n")


def name_process(verb: str) -> None:
    """Name this process `cni-portmap/<verb>`, of which the kernel keeps 15 bytes (TASK_COMM_LEN).

    The kernel tells each listener who made a transaction by that name (NFTA_GEN_PROC_NAME): so the agent knows ours,
    whatever file or interpreter they were started from.
    """
    try:
        fd = posix.open("/proc/self/comm", posix.O_WRONLY | posix.O_CLOEXEC)
        try:
            posix.write(fd, f"{PROCESS_NAME}{verb}".encode())
        finally:
            posix.close(fd)
    except OSError:  # no /proc: nobody knows us, and all else works
        pass


def serve(handlers: "Mapping[str, Callable[[Request], str | None]]", about: str) -> int:
    """Answer the runtime that started this process; returns the exit status."""
    environ = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in posix.environ.items()
               if key.startswith(b"CNI_")}
    if "CNI_COMMAND" not in environ:
        _write(2, f"{about}\nCNI versions: {', '.join(VERSIONS)}\n")
        return 0
    _answering["process"] = "plugin"
    if environ["CNI_COMMAND"] in VERBS:
        name_process(environ["CNI_COMMAND"])
    no_memory = f"{_no_memory()}\n".encode()  # while there is some
    try:
        status, document = respond(handlers, environ, _read_stdin)
        if document and not _write(1, document + "\n"):
            return IO_FAILURE
        return status
    except (MemoryError, SystemError):  # there was none left to answer with
        posix.write(1, no_memory)
        return 1


def give_up(error: CniError) -> None:
    """End the process here and now, with `error` as its answer: a library is about to end it without one."""
    _write(1, _error_document(error) + "\n")
    posix._exit(1)


def _read_stdin() -> bytes:
    chunks, size = [], 0
    try:
        while chunk := posix.read(0, 1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > STDIN_MAX:
                raise CniError(UNDECODABLE, "cannot decode the network configuration: it is larger than "
                                            f"{STDIN_MAX >> 20} MiB", "expected one JSON object on standard input")
    except OSError as error:
        raise CniError(IO_FAILURE, f"cannot read standard input: {error.strerror}") from None
    return b"".join(chunks)


def _write(fd: int, text: str) -> bool:
    data = text.encode(errors="backslashreplace")
    try:
        while data:
            data = data[posix.write(fd, data):]
    except OSError:  # closed or full: nobody is left to tell
        return False
    return True
