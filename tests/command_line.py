"""The command line, called as a person would call it, in this process."""

from __future__ import annotations

import sys
from typing import Any

from expunge import cli


def called(capsys: Any, *arguments: Any) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one call of ``expunge``.

    Args:
        capsys: Pytest's fixture, which caught what was printed.
        arguments: What stands behind ``expunge``; each is written as a text.
    """
    old, sys.argv = sys.argv, ["expunge", *map(str, arguments)]
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = old
    return (status, *capsys.readouterr())
