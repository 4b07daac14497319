"""The documentation: links lead somewhere, and lists are those of the code."""
import json
import re
import subprocess
import sys

from cni_portmap.cli.checks import CHECKS, catalogue
import pytest
from helpers import ROOT

DOCUMENTS = sorted(path for pattern in ("*.md", "conf/*.md", "docs/**/*.md", ".github/**/*.md")
                   for path in ROOT.glob(pattern))
PROTOCOL_KEYS = {"cniVersion", "name", "type", "prevResult", "cni.dev/valid-attachments", "cni.dev/attachments"}


def without_code(text):
    """The text without indented blocks and inline code, which hold no links."""
    return re.sub(r"`[^`]*`", "", "\n".join(line for line in text.splitlines() if not line.startswith("    ")))


def anchors(text):
    """The anchors of a document's headings, as repository hosts make them."""
    headings = re.findall(r"(?m)^#+ (.*)", "\n".join(line for line in text.splitlines() if line[:4] != "    "))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document):
    """The relative links of a document that lead to no file, or to no heading of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not re.match(r"[a-z]+:", target) and not (
                path.exists() and (not anchor or anchor in anchors(path.read_text()))):
            yield target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    """Each relative link and each anchor exists."""
    assert [*broken_links(document)] == []


def test_broken_links_are_found(tmp_path):
    """A missing file, a missing anchor and a missing heading in the same document are named; the rest is not."""
    (tmp_path / "there.md").write_text("# A `title`, really\n")
    document = tmp_path / "document.md"
    document.write_text("## Here\n[a](there.md) [b](there.md#a-title-really) [c](#here) [d](https://example.org/x)\n"
                        "`[e](code.md)`\n[f](gone.md) [g](there.md#gone) [h](#gone)\n\n    [i](code.md)\n")
    assert [*broken_links(document)] == ["gone.md", "there.md#gone", "#gone"]


def test_every_document_is_reached():
    """The README leads to each document, by whatever links."""
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        new = {(document.parent / target.partition("#")[0]).resolve() for document in new if document.suffix == ".md"
               for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text()))
               if not re.match(r"[a-z]+:", target) and target[0] != "#"} - reached
    assert {*DOCUMENTS} - reached == set()


def page(name):
    """A man page's text: roff's escaped hyphens are hyphens."""
    return (ROOT / "docs" / name).read_text().replace(r"\-", "-")


def options_of(*words):
    """The options that the command's --help names, and its commands."""
    text = subprocess.run([sys.executable, "-m", "cni_portmap", *words, "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=True).stdout
    return {*re.findall(r"(?m)^  (?:-h, )?(--[\w-]+)", text)}, re.findall(r"(?m)^    ([a-z-]+)\b", text)


def test_man_page_of_the_command():
    """cni-portmap(8) has each command and option that --help names, and no other."""
    text = page("cni-portmap.8")
    sections = re.split(r"(?m)^\.SS ", text.partition(".SH OPTIONS")[0])[1:]
    described = {section.partition("\n")[0]: {*re.findall(r"(?m)^\.BI? (--[\w-]+)", section)} for section in sections}
    common = {"--help", "--json"}
    assert described == {name: options_of(name)[0] - common for name in options_of()[1]}
    synopsis = re.sub(r"\\f.", "", text.partition(".SH DESCRIPTION")[0])
    for name, options in described.items():
        usage = synopsis.partition(f".B cni-portmap {name}\n")[2].partition("\n.")[0]
        assert {*re.findall(r"--[\w-]+", usage)} == options | {"--json"}, name


def test_keys():
    """Schema, configuration.md and cni-portmap-plugin(7) have the same keys."""
    schema = json.loads((ROOT / "cni_portmap/portmap.schema.json").read_text())
    keys = {*schema["properties"]} - PROTOCOL_KEYS
    text = (ROOT / "docs/configuration.md").read_text()
    table = text.partition("## Keys")[2].partition("\n## ")[0]
    assert {key for line in re.findall(r"(?m)^\| (`.*?) \|", table) for key in re.findall(r"`(\w+)`", line)} == keys
    assert all(f"`{key}`" in text for key in PROTOCOL_KEYS)
    listed = page("cni-portmap-plugin.7").partition(".SH CONFIGURATION KEYS")[2].partition(".SH PORT")[0]
    names = {name for line in re.findall(r"(?m)^\.TP\n\.BR? (.*)", listed)
             for name in re.findall(r"\w+", re.sub(r'"[^"]*"', " ", line))}
    assert names == keys


def test_error_codes():
    """cni.py, troubleshooting.md and cni-portmap-plugin(7) have the same codes."""
    source = (ROOT / "cni_portmap/cni.py").read_text().partition("# Error codes")[2].partition("\nclass ")[0]
    codes = {*map(int, re.findall(r"(?m)^[A-Z_]+ = (\d+)$", source))}
    text = (ROOT / "docs/troubleshooting.md").read_text()
    assert {*map(int, re.findall(r"(?m)^\| (\d+) \|", text))} == codes
    listed = page("cni-portmap-plugin.7").partition(".SH ERROR CODES")[2].partition(".SH FILES")[0]
    assert {*map(int, re.findall(r"(?m)^\.B (\d+)$", listed))} == codes


def test_catalogue_of_doctor():
    """The causes in troubleshooting.md are doctor's; integration/measure/catalogue.py --write writes them."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    assert catalogue.replaced(text) == text
    assert len({check.slug for check in CHECKS}) == len(CHECKS)
    known = {check.slug for check in CHECKS}
    assert {slug for check in CHECKS for slug in check.unless} <= known


@pytest.mark.parametrize("document", ["docs/promises.md", "SECURITY.md"])
def test_named_tests_exist(document):
    """Each test that a document names exists."""
    named = re.findall(r"`((?:tests/)?test_\w+): (test_\w+)`", (ROOT / document).read_text())
    assert named
    for file, test in named:
        path = ROOT / f"{file if '/' in file else f'integration/{file}'}.py"
        assert f"\ndef {test}(" in path.read_text(), (file, test)


def test_each_defence_has_a_test():
    """Each row of SECURITY.md's tables names one."""
    rows = re.findall(r"(?m)^\| (?!what).* \|$", (ROOT / "SECURITY.md").read_text().partition("### Defended")[2])
    assert len(rows) > 20 and not [row for row in rows if not re.search(r"`(tests/)?test_\w+: ", row)]
