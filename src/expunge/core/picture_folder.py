"""A folder of pictures, and the prompts they were drawn from, matched by name and never by order.

Scripts that pair files with prompts in sorted order are off by one from the first missing file on.  Here a picture's
prompt is found by its file name, or by the number that its name begins with (``0012-seed3.png``, ``12_0.png``).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, PromptError
from ..method import Prompt
from .text_lines import lines_of, read_text

__all__ = ["PictureFolder", "prompts_of"]

SUFFIXES = (".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")
NUMBER_KEYS = ("id", "case_number", "index")
TEXT_KEYS = ("text", "prompt", "caption")

_NUMBER = re.compile(r"(\d+)(?:[-_. ]|$)")


class PictureFolder:
    """The pictures of a folder in the order of their names; files are opened when they are read.

    Args:
        folder: Pictures lie directly in it.

    Raises:
        InputError: It is no folder, or holds no picture.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{self.folder} is no folder of pictures")
        files = [path for path in self.folder.iterdir() if path.suffix.lower() in SUFFIXES]
        self.files = sorted(files, key=lambda path: path.name)
        if not self.files:
            raise InputError(f"{self.folder} holds no picture ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        """File names."""
        return [path.name for path in self.files]

    def batches(self, size: int = 64) -> Iterator[tuple[list[str], np.ndarray]]:
        """Names and pictures, uint8 ``(n, h, w, 3)``; a batch ends where the size of the pictures changes.

        Raises:
            InputError: A file is no picture that can be read.
        """
        names: list[str] = []
        held: list[np.ndarray] = []
        for path in self.files:
            picture = _read(path)
            if held and (picture.shape != held[0].shape or len(held) == size):
                yield names, np.stack(held)
                names, held = [], []
            names.append(path.name)
            held.append(picture)
        if held:
            yield names, np.stack(held)

    def same_names(self, other: PictureFolder) -> None:
        """Refuse pairs that have no partner: both folders must hold the same names.

        Raises:
            InputError: One is missing; it is named.
        """
        lonely = sorted(set(self.names) ^ set(other.names))
        if lonely:
            raise InputError(
                f"pairs need the same file names in {self.folder} and {other.folder}; {lonely[0]} is in only one"
            )


def _read(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} cannot be read as a picture ({error})") from None


def prompts_of(names: Sequence[str], file: str | os.PathLike[str]) -> list[Prompt]:
    """The prompt of each picture.

    Args:
        names: File names of pictures.
        file: One prompt a line (the picture's leading number counts lines from 0), JSON lines, or a CSV file.  Rows of
            the latter two hold a text (``text``, ``prompt`` or ``caption``) and either ``file``, a picture's name,
            or a number (``id``, ``case_number`` or ``index``); without either the row's own number counts, from 0.

    Raises:
        PromptError: The file cannot be read, or a picture has no prompt: it is named.
    """
    path = Path(file)
    by_name: dict[str, str] = {}
    by_number: dict[int, str] = {}
    for place, row in enumerate(_rows(path)):
        text = next((row[key] for key in TEXT_KEYS if row.get(key)), None)
        if text is None:
            raise PromptError(f"{path.name}: row {place} holds none of {', '.join(TEXT_KEYS)}")
        if row.get("file"):
            by_name[str(row["file"])] = str(text)
            continue
        number = next((row[key] for key in NUMBER_KEYS if row.get(key) not in (None, "")), place)
        try:
            by_number[int(number)] = str(text)
        except (TypeError, ValueError):
            raise PromptError(f"{path.name}: row {place} has the number {number!r}") from None
    found = []
    for name in names:
        leading = _NUMBER.match(name)
        own = by_name.get(name, by_name.get(Path(name).stem))
        if own is None and leading is not None:
            own = by_number.get(int(leading[1]))
        if own is None:
            raise PromptError(
                f"{path.name} has no prompt for the picture {name}; pictures are matched by name or by the number "
                "their name begins with"
            )
        found.append(Prompt(own))
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    text = read_text(path)
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if path.suffix != ".jsonl":
        return [{"text": line} for _, line in lines_of(text)]
    rows = []
    for number, line in lines_of(text):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise PromptError(f"{path.name}: line {number} is not a JSON object")
        rows.append(row)
    return rows
