"""The catalogue of `cni-portmap doctor`: one list of checks, in the order of a packet's way.

finding.py     the values: Check, Finding
scene.py       what they look at: port, host, container, and the ways between them
publishing.py  is it published, by whom, where
container.py   does the container answer
links.py       does this host lead there
rules.py       whose rules drop it, or lead it elsewhere
localhost.py   this host's own localhost

Beside them: probe.py, for --probe; podman.py, which plugin podman calls; drawing.py, a picture of all hooks;
catalogue.py, this list for the documentation.
"""
from collections.abc import Iterator

from . import container, links, localhost, publishing, rules
from .finding import ERROR, SEVERITIES, Check, Finding
from .scene import Scene

OF_PORT = publishing.OF_PORT
OF_HOST = (*links.OF_HOST, *rules.OF_HOST)
OF_TARGET = (*publishing.OF_TARGET, *container.OF_TARGET, *links.OF_TARGET, *rules.OF_TARGET, *localhost.OF_TARGET)
CHECKS = (*OF_PORT, *OF_TARGET, *OF_HOST)
MOST = 6  # lines of evidence: many containers may suffer from one rule
_PLACE = {check.slug: index for index, check in enumerate(CHECKS)}


def examine(scene: Scene) -> list[Finding]:
    """All findings, the likeliest cause first: by severity, then by a packet's way."""
    found = [*_all(scene)]
    there = {finding.cause for finding in found if finding.severity == ERROR}
    there |= {finding.cause for finding in found if finding.cause in publishing.ANSWERED}
    causes = {check.slug: check for check in CHECKS}
    roots = [finding for finding in found if there.isdisjoint(causes[finding.cause].unless)]
    return sorted(_folded(roots), key=lambda finding: (SEVERITIES.index(finding.severity), _PLACE[finding.cause]))


def _all(scene: Scene) -> Iterator[Finding]:
    for check in (*OF_PORT, *OF_HOST):
        yield from check.find(scene, None)
    for target in scene.targets:
        for check in (*OF_TARGET, *rules.ALSO_OF_TARGET):
            yield from check.find(scene, target)


def _folded(found: list[Finding]) -> list[Finding]:
    """Findings that say the same of IPv4 and IPv6, or of several ways, are one."""
    folded: dict[tuple[str, ...], Finding] = {}
    for finding in found:
        same = finding.cause, finding.severity, finding.summary, finding.table, finding.chain
        before = folded.get(same)
        if before is None:
            folded[same] = finding
            continue
        evidence = [*dict.fromkeys((*before.evidence, *finding.evidence))][:MOST]
        paths = dict.fromkeys((*before.paths, *finding.paths)) if before.paths and finding.paths else ()
        folded[same] = before._replace(evidence=tuple(evidence), paths=tuple(paths))
    return [*folded.values()]


__all__ = ["CHECKS", "Check", "Finding", "Scene", "examine"]
