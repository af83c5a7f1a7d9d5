"""The manifest of an edit: its provenance, validated at the door.

It is stored as JSON in the safetensors header.  Unknown keys are refused, so that a misspelt field
never vanishes.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .tokens import PARTS

__all__ = ["FORMAT", "WEIGHTLESS", "Kind", "Manifest", "Target"]

FORMAT: Literal[2] = 2
"""Raised when readers of another format would misread a file; format 1 sampled a few tensors of the base only.

``acts`` and ``tokens`` came later without another number: a file without them is written as before, and a reader
that does not know them refuses the key, so nothing is misread.
"""

DTYPES = ("float16", "bfloat16", "float32", "float64")

Kind = Literal["dense", "low-rank", "shared-low-rank", "gated-adapter", "control"]

WEIGHTLESS = ("gated-adapter", "control")
"""Kinds that change no weight."""

MAX_TOKENS, MAX_TOKEN = 10_000, 100
"""Tokens an edit may add to a tokenizer, and the characters of one."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Target(_Strict):
    """One tensor an edit changes: canonical name and shape."""

    name: str
    shape: tuple[int, ...]


class Manifest(_Strict):
    """Where an edit comes from and what it needs.

    Attributes:
        format: Version of this layout.
        kind: ``dense`` (a delta per tensor), ``low-rank`` (two factors per tensor),
            ``shared-low-rank`` (one pair of thin factors ``D`` for all tensors, change ``W_l D``),
            ``gated-adapter`` (factors beside weights that stay as they are, :mod:`expunge.edit.adapters`) and
            ``control`` (no weights change; what the tensors mean is the method's own).
        acts: The method's control is on while the edit is; it is rebuilt by catalogue id and version.
        tokens: Tokenizer (``tokenizer``, ``tokenizer_2``, ...) -> texts of the tokens that the edit adds
            to it; their rows stand in ``tokens.<text encoder>``, in that order.
        method, version, settings: What made it, fully resolved.
        preset: The preset it was configured from, if any; ``settings`` tell what was changed since.
        concepts: The concepts it erases, as plain mappings.
        keep: What the eraser was told to preserve.
        base: Fingerprint of the base weights.
        fitted_on: Digests of the edits that were on the model when it was fitted, in order.
        targets: The tensors it changes.
        seed: Seed of the method.
        libraries: Versions of the libraries that computed it.
        cost: Rows by component.
        seconds: Wall time of erasing.
        data_digest: Digest of example data (training examples, validation prompts), if any.
        report: What the method reports of its own work (condition numbers, losses, drift).
        tensors_digest: Digest of the tensors in the file.
    """

    format: Literal[2] = FORMAT
    kind: Kind
    method: str
    version: int = Field(ge=1)
    preset: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    concepts: list[dict[str, Any]]
    keep: list[str] = Field(default_factory=list)
    base: dict[str, Any]
    fitted_on: list[str] = Field(default_factory=list)
    targets: list[Target] = Field(default_factory=list)
    acts: bool = False
    tokens: dict[str, list[str]] = Field(default_factory=dict)
    seed: int = 0
    libraries: dict[str, str] = Field(default_factory=dict)
    cost: dict[str, int] = Field(default_factory=dict)
    seconds: float | None = None
    data_digest: str | None = None
    report: dict[str, Any] = Field(default_factory=dict)
    tensors_digest: str = ""

    @field_validator("base")
    @classmethod
    def _base_is_a_fingerprint(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Check the inner shape too: it is compared with a model's before anything is applied."""
        if not {"id", "components", "exact"} <= set(value):
            raise ValueError("base must hold id, components and exact")
        exact, components = value["exact"], value["components"]
        if not isinstance(exact, dict) or not isinstance(components, dict):
            raise ValueError("base.components and base.exact must be mappings")
        for name, part in components.items():
            whole = isinstance(part, dict) and {"structure", "dtype", "sample"} <= set(part)
            if not whole or part["dtype"] not in DTYPES or not isinstance(part["sample"], list):
                raise ValueError(f"base.components.{name} must hold structure, dtype and sample")
            if not all(isinstance(number, (int, float)) for number in part["sample"]):
                raise ValueError(f"base.components.{name}.sample must be numbers")
        return value

    @field_validator("tokens")
    @classmethod
    def _tokens_are_words(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for tokenizer, texts in value.items():
            if tokenizer not in PARTS:
                raise ValueError(f"tokens may be added to {', '.join(PARTS)}, not to {tokenizer!r}")
            if not 1 <= len(texts) <= MAX_TOKENS:
                raise ValueError(
                    f"{len(texts)} tokens for {tokenizer}; allowed are 1 to {MAX_TOKENS}"
                )
            if len(set(texts)) != len(texts):
                raise ValueError(f"a token for {tokenizer} stands twice")
            for text in texts:
                # Not printable: control and format characters, lone surrogates, all spaces but one.
                if not 1 <= len(text) <= MAX_TOKEN or " " in text or not text.isprintable():
                    raise ValueError(
                        f"the token {text[:MAX_TOKEN]!r} for {tokenizer} must be 1 to {MAX_TOKEN} printable characters "
                        "without spaces"
                    )
        return value

    @model_validator(mode="after")
    def _kind_fits_the_targets(self) -> Manifest:
        if self.kind in WEIGHTLESS and self.targets:
            raise ValueError(f"a {self.kind} edit changes no weights, but names targets")
        if self.kind == "gated-adapter" and not self.acts:
            raise ValueError("a gated-adapter edit does nothing unless it acts")
        return self

    def plain(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """Plain JSON types; what only some edits have is left out where it is empty, so that older files and
        digests stay what they are."""
        empty = {name for name in ("acts", "tokens") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude={*(exclude or ()), *empty})
