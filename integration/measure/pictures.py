#!/usr/bin/python3
"""Write docs/pictures/doctor.svg and trace.svg: real runs, in a lab whose firewall drops the packets of a port.

As root. The container's ID and interface names of the lab are what they are.
"""
import pathlib
import subprocess
import sys
import tempfile
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "integration"))
import lab  # noqa: E402
from lab.clinic import Clinic  # noqa: E402

WIDTH, LINE = 118, 17  # characters, pixels


def svg(text: str) -> str:
    """A terminal with this text; long lines are broken, as a terminal does."""
    lines = [line[at:at + WIDTH] for line in text.rstrip().splitlines() for at in range(0, max(len(line), 1), WIDTH)]
    rows = []
    for number, line in enumerate(lines):
        colour = ' fill="#ff7b72" font-weight="bold"' if line.startswith("FOUND") or "DROPPED" in line else ""
        rows.append(f'<text x="12" y="{28 + LINE * number}" xml:space="preserve"{colour}>{escape(line)}</text>')
    height = 24 + LINE * len(lines)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="920" height="{height}" font-family="monospace" '
            f'font-size="12.5" fill="#e6edf3"><rect width="920" height="{height}" rx="6" fill="#0d1117"/>\n'
            + "\n".join(rows) + "\n</svg>\n")


def main() -> None:
    """Run both commands, and write what they print."""
    lab.enter()
    with tempfile.TemporaryDirectory() as folder, Clinic(lab.install(pathlib.Path(folder) / "bin")) as clinic:
        lab.nft("-f", "-", input="table inet filter { chain forward { type filter hook forward priority filter; "
                "policy drop; ct state established,related accept; }; }\n")
        prompt = "# cni-portmap {}\n"
        (ROOT / "docs/pictures/doctor.svg").write_text(
            svg(prompt.format("doctor 8080") + clinic.command("doctor", "8080").stdout))
        with subprocess.Popen([pathlib.Path(folder) / "sbin/cni-portmap", "trace", "8080", "--seconds", "5"],
                              stdout=subprocess.PIPE, text=True) as trace:
            assert trace.stdout is not None
            first = trace.stdout.readline()
            clinic.answers(timeout=0.3)
            story = first + trace.stdout.read()
        (ROOT / "docs/pictures/trace.svg").write_text(svg(prompt.format("trace 8080") + story))


if __name__ == "__main__":
    main()
