"""The values of `cni-portmap doctor`: a check looks for one cause, a finding says that it is there."""
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .scene import Scene

ERROR, WARNING, INFO = "error", "warning", "info"
SEVERITIES = (ERROR, WARNING, INFO)
OUTSIDE, HOST, LOCALHOST, ITSELF = "outside", "host", "localhost", "itself"


class Finding(NamedTuple):
    """A cause that is there. `paths`: the ways to the port that it is about, () for all.

    `summary`, `advice`: sentences; `evidence`: sentences, each with the command that shows the same. `table`, `chain`,
    `backend`: of a rule, "" else.
    """

    cause: str
    severity: str
    summary: str
    evidence: tuple[str, ...]
    advice: str
    paths: tuple[str, ...] = ()
    table: str = ""
    chain: str = ""
    backend: str = ""

    def as_json(self) -> dict[str, object]:
        """The form of `--json`."""
        rule = {"table": self.table, "chain": self.chain, "backend": self.backend} if self.table else {}
        return {"cause": self.cause, "severity": self.severity, "summary": self.summary, "paths": [*self.paths],
                "evidence": [*self.evidence], "advice": self.advice, **rule}


class Check(NamedTuple):
    """One cause: its slug, what it is and what helps (for the documentation), and how it is found.

    `severity`: the usual one. `find(scene, target)`: a Target, or None for the port as a whole and for the host.
    `unless`: causes that explain this one, so that it is not told beside them.
    """

    slug: str
    severity: str
    cause: str
    cure: str
    find: "Callable[[Scene, Any], Iterator[Finding]]"
    unless: tuple[str, ...] = ()

    def found(self, summary: str, evidence: "tuple[str, ...] | list[str]", advice: str, paths: tuple[str, ...] = (),
              severity: str = "") -> Finding:
        """A finding of this check."""
        return Finding(self.slug, severity or self.severity, summary, tuple(evidence), advice, paths)
