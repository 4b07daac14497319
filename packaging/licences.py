"""SPDX expressions: of ours, of the bundle's parts, and whether all may be in one work.

Source: the SPDX specification, annex "SPDX licence expressions"; the FSF's list of licences and their compatibility.
"""
import configparser
import pathlib

# What a work with GPL-2.0-only parts may contain. Apache-2.0 is not among it, nor is version 3 of the GPL or LGPL.
WITH_GPL_2 = {"GPL-2.0-only", "GPL-2.0-or-later", "LGPL-2.1-or-later", "MIT", "Zlib", "PSF-2.0", "BSD-3-Clause"}
EXCEPTIONS = {"GCC-exception-2.0", "GCC-exception-3.1"}  # what a compiler adds is under any licence


def ours(root: pathlib.Path) -> str:
    """The expression of this project."""
    metadata = configparser.ConfigParser()
    metadata.read(root / "setup.cfg")
    return metadata["metadata"]["license"]


def choices(expression: str) -> list[str]:
    """The licences that an expression leaves the choice of."""
    return expression.split(" OR ")


def fits(expression: str) -> bool:
    """Whether something under these licences may be in one work with parts under GPL-2.0-only."""
    return any(all(term in WITH_GPL_2 or term.partition(" WITH ")[2] in EXCEPTIONS for term in choice.split(" AND "))
               for choice in choices(expression))
