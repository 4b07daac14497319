"""Shared test support: a kernel that only records, one call of the plugin in memory, and small configurations."""
import contextlib
import inspect
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar
from unittest import mock

from cni_portmap import cni, config, explain, plugin, ruleset
from cni_portmap.attachment import Attachment
from cni_portmap.linux.kernel import Kernel
from cni_portmap.verbs.steps import survey

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIABLES = {"CNI_CONTAINERID": "web-1", "CNI_NETNS": "/run/netns/web", "CNI_IFNAME": "eth0"}
CHAIN = "c/web-1/eth0"  # of the attachment that they name
INODE = 4026532001
PORT = {"hostPort": 8080, "containerPort": 80}
PREV_RESULT = {"cniVersion": "1.1.0",
               "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/web"}],
               "ips": [{"address": "10.88.0.2/16", "interface": 1}, {"address": "fd88::2/64", "interface": 1}]}


class RecordingKernel:
    """Stands in for linux.kernel.Kernel, and models nothing but that the base is there once something was written.

    `calls` records each call as (method, arguments...), and ("unlock",). An answer is the value given under the
    method's name, or what it returns if it can be called; without one, that of a host with an empty ruleset. The call
    with the number `fails_at`, counted from 1, fails. `waits`: whether the lock is another's at first.
    """

    EMPTY: ClassVar[dict[str, Any]] = {"has_chain": False, "comments": [], "owners": [], "lookup": {},
                                       "is_empty": False, "owned_elements": [], "owners_of_port": [],
                                       "targets": lambda chains: {chain: set() for chain in chains},
                                       "namespace": INODE, "namespace_soon": INODE, "link": "", "has_link": True,
                                       "owner": lambda chain: ruleset.Owner(chain, ""), "waits": False, "glance": None,
                                       "judge": lambda owners: verdicts(owners, "alive"),
                                       "is_dormant": False, "snapshot": [], "index_of": 0,
                                       "hook": lambda name: ruleset.hook_of(ruleset.SHARED[name].hook),
                                       "references": 0, "dry_run": "", "dry_run_apart": "",
                                       "port_in_use": False, "allow_localhost6": "",
                                       "has_set": False, "element_comments": {}, "members": [],
                                       "home_of": (("cni0",), False), "way_to": ("cni0", True, []),
                                       "localhost_obstacle": "", "localnet": True,
                                       "is_noted": True, "has_localhost6": True,
                                       "wait_for": lambda owner, seconds: seconds,  # in vain, and in no time
                                       "local_addresses": set(), "noted_and_gone": [],
                                       "notes_interfaces": True, "has_table": True, "has_reference": False,
                                       "generation": 1, "write": True, "port_maps": []}

    def __init__(self, fails_at: int = 0, **answers: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.written: list[str] = []  # the text of each transaction, also of one that is sent as messages
        self.fails_at, self.answers = fails_at, {**self.EMPTY, **answers}

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(Kernel, name))  # only what the real one has, as the real one has it

        def call(*arguments: Any) -> Any:
            signature.bind(self, *arguments)
            self.calls.append((name, *arguments))
            if name in ("transact", "write"):
                self.written.append(arguments[0].text() if name == "write" else arguments[0])
            texts = self.written[-1:] if name in ("transact", "write") else arguments[:1] if name == "dry_run" else ()
            assert not any(map(crashes_older_nft, texts)), texts
            if len(self.calls) == self.fails_at:
                raise cni.CniError(cni.IO_FAILURE, f"{name} failed")
            answer = self.answers.get(name)
            if name == "comments":
                answer = self._base_comments(*arguments) or answer
            return answer(*arguments) if callable(answer) else answer
        return call

    @contextlib.contextmanager
    def lock(self) -> Iterator[bool]:
        self.__getattr__("lock")()
        try:
            yield self.answers["waits"]
        finally:
            self.calls.append(("unlock",))

    def _base_comments(self, chain: str) -> list[str]:
        return base_comments(range(32)).get(chain, []) if self.written else []

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        """The calls of these methods."""
        return [call for call in self.calls if call[0] in names]


def crashes_older_nft(text: str) -> bool:
    """Whether an nft text, written by libnftables 1.1.2 or newer, makes an older nft that lists it crash.

    So does a named set or map that is declared with `type`, not `typeof`, and a map within a rule; see
    kubernetes#136786. Every text that a test hands to a RecordingKernel is asked for it.
    """
    named = re.findall(r"^\s*(?:(?:add|create) )?(?:map|set) [^{]*\{[^}]*", text, re.MULTILINE)
    return any(re.search(r"[{;\n]\s*type ", each) for each in named) or bool(re.search(r"\bv?map \{", text))


def verdicts(owners: Iterable[ruleset.Owner], state: str) -> dict[str, tuple[str, str]]:
    """The result of Kernel.judge if all owners are alike."""
    return {owner.chain: (state, f"its network namespace {owner.netns} is {state}") for owner in owners}


def request(verb: str = "ADD", version: str = "1.0.0", environ: dict[str, str] = VARIABLES, **keys: Any) -> cni.Request:
    """A request as `cni.respond` builds it, for a network "lab" with `keys` in its configuration."""
    found = {"name": "lab", "cniVersion": version, "prevResult": PREV_RESULT, **keys}
    previous = found["prevResult"]
    return cni.Request(verb, version, environ, found, "" if previous is None else json.dumps(previous))


def attachment(*ports: dict[str, Any], environ: dict[str, str] = VARIABLES, **keys: Any) -> Attachment:
    """What the plugin reads from a configuration with these port mappings and keys, where cni0 leads to it."""
    asked = request(environ=environ, runtimeConfig={"portMappings": [*ports]}, **keys)
    found: Attachment = explained(config.parse, asked)
    found.inode = INODE
    survey(found, RecordingKernel())  # type: ignore[arg-type]  # it stands in for one
    return found


def respond(verb: str, configuration: object, kernel: RecordingKernel | None = None, *,
            environ: dict[str, str] | None = None) -> tuple[int, Any]:
    """One call of the plugin: its exit status, and the one document that it prints, decoded; None for none.

    `configuration`: bytes as they are, anything else as JSON. Without `kernel` the plugin may not touch one.
    """
    stdin = configuration if type(configuration) is bytes else json.dumps(configuration).encode()
    variables = {"CNI_COMMAND": verb, **(VARIABLES if environ is None else environ)}
    kernels = [kernel] if kernel else AssertionError("the kernel is asked for")
    with mock.patch.object(plugin, "_kernel", side_effect=kernels):
        status, document = cni.respond(plugin.HANDLERS, variables, lambda: stdin)
    return status, json.loads(document) if document else None


def configuration(*ports: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A configuration of the network "lab" that publishes these ports."""
    return {"cniVersion": "1.1.0", "name": "lab", "type": "portmap", "prevResult": PREV_RESULT,
            "runtimeConfig": {"portMappings": [*ports]}, **keys}


def explained(read: Callable[[cni.Request], Any], asked: cni.Request) -> Any:
    """The result of `read` for a request; a refusal is worded as a runtime gets it."""
    try:
        return read(asked)
    except cni.ConfigError as error:
        raise explain.explain(asked.config, error) from None


def problem(path: str, value: object) -> str:
    """The beginning of a message that names a path and its value."""
    return f"{path}: missing" if value is None else f"invalid value for {path}: {json.dumps(value)}"


def names(message: str, path: str) -> bool:
    """Whether a message is about what stands at a path."""
    return message.startswith((f"{path}: missing", f"invalid value for {path}: "))


def elements(attached: Attachment) -> list[tuple[str, bytes]]:
    """The map elements (map, key) of an attachment's ports."""
    return [(ruleset.map_of(port), ruleset.key_of(port)) for port in attached.ports]


def base_comments(bits: Iterable[int] = (13,)) -> dict[str, list[str]]:
    """The comments of each chain of an intact base table."""
    return {chain: [comment for _, comment in ruleset.shared_rules(chain, using(bits))] for chain in ruleset.SHARED}


def using(bits: Iterable[int]) -> list[Attachment]:
    """Attachments that use these mark bits."""
    return [Attachment("any", "eth0", "lab", mark_bit=bit) for bit in bits]


def base(missing: Iterable[str] = ruleset.SHARED, wrong: tuple[str, ...] = (), bits: Iterable[int] = (13,)) -> str:
    """The commands that make the table with these shared chains, the `wrong` ones in place of what is there."""
    users = using(bits)
    return ruleset.base({name: ruleset.shared_rules(name, users) for name in (*missing, *wrong)}, wrong)
