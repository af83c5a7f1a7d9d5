"""Published tables of prompts: read from a local file or the hub, checked row by row, turned into prompts.

A table is a class with a row schema (pydantic) and settings that choose a part of it.  Columns that a schema does not
know are left alone (published files carry unnamed index columns); a column it needs and a value it cannot take are
one sentence with the file, the row and the column.  Nothing that others wrote is stored here: a table is read where
the user has it, or from the hub by name.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError

from ..errors import PromptError, nearest
from ..method import Measurement, Method, Prompt
from .text_lines import decoded, lines_of

__all__ = ["LONGEST", "Outcome", "PromptTable", "Row", "Table", "also", "read_rows", "source_bytes"]

LONGEST = 256 * 2**20
"""Bytes of a file; the largest published one has 26 MB."""
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
HUB = "hub"


def also(*names: str) -> AliasChoices:
    """Names under which a column is published."""
    return AliasChoices(*names)


class Row(BaseModel):
    """One row of a published table."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        str_strip_whitespace=True,
    )


R = TypeVar("R", bound=Row)


@dataclasses.dataclass(frozen=True)
class Table:
    """Prompts of a table, with where they come from.

    Attributes:
        id: Of the table's class.
        prompts: In the order of the file.
        protocol: Names the table, its chosen part, and a digest of the bytes that were read.
        source: What was read, by its own name.
        rows: Rows in the file, before a part was chosen.
        published: Rows that the published file has, where that is known.
    """

    id: str
    prompts: tuple[Prompt, ...]
    protocol: str
    source: str
    rows: int
    published: int | None = None

    @property
    def complete(self) -> bool | None:
        """Whether the file has as many rows as the published one; ``None`` where that is not known."""
        return None if self.published is None else self.rows == self.published

    def limited(self, count: int | None) -> Table:
        """The first ``count`` prompts; the protocol says so."""
        if count is None or count >= len(self.prompts):
            return self
        return dataclasses.replace(
            self, prompts=self.prompts[:count], protocol=f"{self.protocol}/first {count}"
        )


class Outcome(NamedTuple):
    """What a judge said of one output of a prompt."""

    prompt: Prompt
    hit: bool
    recognisable: bool = True


@dataclasses.dataclass(frozen=True)
class PromptTable(Method, ABC):
    """A published table of prompts; its settings choose a part of it.

    Class attributes:
        row: Schema of a row.
        hub: Dataset and file on the hub where the table is published, or ``None``.
        published: Rows of the published file, or ``None``.
        licence: Under which it is published, as far as known.
        kind: Kind of its concepts.
    """

    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    row: ClassVar[type[Row]] = Row
    hub: ClassVar[tuple[str, str] | None] = None
    published: ClassVar[int | None] = None
    licence: ClassVar[str] = ""
    kind: ClassVar[str] = "object"

    @abstractmethod
    def prompt(self, row: Any, place: int) -> Prompt | None:
        """The prompt of a row at a place (from 0), or ``None`` where the row is in no chosen part."""

    def load(self, source: str | Path = HUB) -> Table:
        """The chosen prompts of a file.

        Args:
            source: A local .csv, .tsv, .json or .jsonl file; ``hub`` for the published place; or
                ``hub:OWNER/NAME/FILE`` for another dataset of the hub.

        Raises:
            PromptError: It cannot be read, a row is not of the schema, or nothing is left of it.
        """
        name, data = source_bytes(source, self.hub)
        rows = read_rows(name, data, self.row)
        prompts = [
            made for place, row in enumerate(rows) if (made := self.prompt(row, place)) is not None
        ]
        if not prompts:
            raise PromptError(
                f"{name}: none of its {len(rows)} rows is in the part {self._chosen() or 'asked for'}"
            )
        digest = hashlib.sha256(data).hexdigest()[:12]
        protocol = f"{self.id}/{self.version}:{self._chosen() or 'all'}/sha256={digest}"
        return Table(self.id, tuple(prompts), protocol, name, len(rows), self.published)

    def summary(self, outcomes: Sequence[Outcome], judge: str = "") -> dict[str, Measurement]:
        """Further numbers that papers make of what a judge said of this table's outputs.

        Args:
            outcomes: What was said, output by output.
            judge: Protocol of who judged them; part of the numbers' ids.
        """
        return {}

    def _chosen(self) -> str:
        """Settings that are not the defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return ",".join(f"{k}={v}" for k, v in self.settings().items() if v != defaults[k])


def source_bytes(source: str | Path, hub: tuple[str, str] | None = None) -> tuple[str, bytes]:
    """Name and content of a local file or a file of a dataset on the hub; see :meth:`PromptTable.load`.

    Raises:
        PromptError: It cannot be read, is too large, or has no published place.
    """
    text = str(source)
    if text == HUB or text.startswith(f"{HUB}:"):
        path = _from_hub(text, hub)
        name = path.name
    else:
        path = Path(source)
        name = path.name
        if path.suffix not in SUFFIXES:
            raise PromptError(f"{name}: a table of prompts ends in {', '.join(SUFFIXES)}")
    try:
        if path.stat().st_size > LONGEST:
            raise PromptError(
                f"{name}: has more than {LONGEST // 2**20} MB; this is no table of prompts"
            )
        return name, path.read_bytes()
    except OSError as error:
        raise PromptError(f"{name}: cannot be read ({error.strerror or error})") from None


def _from_hub(text: str, hub: tuple[str, str] | None) -> Path:
    named = text.partition(":")[2]
    if named:
        parts = named.split("/", 2)
        if len(parts) != 3 or not all(parts):
            raise PromptError(f"{text!r}: a file of the hub is named hub:OWNER/NAME/FILE")
        repository, file = "/".join(parts[:2]), parts[2]
    elif hub is not None:
        repository, file = hub
    else:
        raise PromptError("this table has no published place on the hub; name a file")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PromptError(f"{repository}/{file} cannot be had from the hub ({reason})") from None


def read_rows(name: str, data: bytes, schema: type[R]) -> list[R]:
    """Checked rows of a .csv, .tsv, .json (a list of objects) or .jsonl file.

    Raises:
        PromptError: With the file, the row (from 1, the header aside) and the column.
    """
    text = decoded(name, data)
    suffix = Path(name).suffix
    raw = (
        _json(name, text, suffix)
        if suffix in (".json", ".jsonl")
        else _csv(name, text, schema, suffix)
    )
    found = []
    for number, entry in enumerate(raw, 1):
        if not isinstance(entry, Mapping):
            raise PromptError(
                f"{name}: row {number} is {type(entry).__name__}; a mapping is needed"
            )
        try:
            found.append(schema.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            column = ".".join(map(str, first["loc"])) or "row"
            raise PromptError(f"{name}: row {number}, {column}: {first['msg']}") from None
    if not found:
        raise PromptError(f"{name}: holds no row")
    return found


def _csv(name: str, text: str, schema: type[Row], suffix: str) -> Iterable[Mapping[str, Any]]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True
    )
    try:
        header = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = header
        if len(set(header)) < len(header):
            raise PromptError(f"{name}: a column stands twice in {', '.join(header)}")
        for field, info in schema.model_fields.items():
            alias = info.validation_alias
            names = [field, *(map(str, alias.choices) if isinstance(alias, AliasChoices) else ())]
            if info.is_required() and not set(names) & set(header):
                raise PromptError(
                    f"{name}: the column {names[-1]!r} is missing{nearest(names[-1], header)}"
                )
        rows = list(reader)
    except csv.Error as error:
        raise PromptError(f"{name}: line {reader.line_num} is not well-formed ({error})") from None
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise PromptError(
                f"{name}: row {number} has another number of cells than the header has columns"
            )
    # An empty cell is no value.
    return [{key: value for key, value in row.items() if value != ""} for row in rows]


def _json(name: str, text: str, suffix: str) -> Sequence[Any]:
    lines: Sequence[tuple[int, str]] = [(1, text)]
    if suffix == ".jsonl":
        lines = list(lines_of(text))
    found: list[Any] = []
    for number, line in lines:
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{name}: line {number} is not JSON ({error})") from None
    if suffix == ".jsonl":
        return found
    if not isinstance(found[0], list):
        raise PromptError(f"{name}: holds {type(found[0]).__name__}; a list of rows is needed")
    return found[0]
