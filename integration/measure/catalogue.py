#!/usr/bin/python3
"""Print doctor's catalogue; with --write, put it into docs/troubleshooting.md."""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from cni_portmap.cli.checks.catalogue import catalogue, replaced  # noqa: E402

if __name__ == "__main__":
    document = ROOT / "docs/troubleshooting.md"
    if sys.argv[1:] == ["--write"]:
        document.write_text(replaced(document.read_text()))
    else:
        print(catalogue())
