"""The catalogue as a document: docs/troubleshooting.md has it between BEGIN and END."""
from . import CHECKS, container, links, localhost, publishing, rules
from .finding import Check

BEGIN, END = "<!-- doctor's catalogue: begin -->", "<!-- doctor's catalogue: end -->"
ROOMS = (("Is it published?", (*publishing.OF_PORT, *publishing.OF_TARGET)),
         ("Does the container answer?", container.OF_TARGET),
         ("Does this host lead there?", (*links.OF_TARGET, *links.OF_HOST)),
         ("Whose rules drop it?", (*rules.OF_TARGET, *rules.OF_HOST)),
         ("Only localhost, or the container itself", localhost.OF_TARGET))


def catalogue() -> str:
    """The table of all checks, in Markdown."""
    lines = []
    for title, checks in ROOMS:
        lines += [f"### {title}", "", "| cause | severity | what it is | what helps |", "|---|---|---|---|",
                  *map(_row, checks), ""]
    assert sum(len(checks) for _, checks in ROOMS) == len(CHECKS)
    return "\n".join(lines)


def _row(check: Check) -> str:
    return f"| `{check.slug}` | {check.severity} | {check.cause} | {check.cure} |"


def replaced(document: str) -> str:
    """A document with the catalogue as it is now."""
    head, _, rest = document.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{catalogue()}\n{END}{rest.partition(END)[2]}"
