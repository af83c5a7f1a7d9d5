"""Text that people write, line by line: UTF-8 with or without its mark, parted at line feeds only.

``str.splitlines`` would cut a prompt at U+2028 and its like, and shift the numbers of all that follow.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from ..errors import PromptError

__all__ = ["decoded", "lines_of", "read_text"]


def decoded(name: str, data: bytes) -> str:
    """The text of a file of this name.

    Raises:
        PromptError: It is not UTF-8: the byte is named.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{name}: byte {error.start} is not UTF-8") from None


def read_text(path: Path) -> str:
    """The file's text, see :func:`decoded`."""
    return decoded(path.name, path.read_bytes())


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Lines that hold something, stripped, with their numbers from 1; blank ones count."""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.strip()
