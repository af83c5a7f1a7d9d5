"""What a window asks for, as plain values that a file can hold, and the folders that are named after it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..concept import safe_name
from ..errors import RunError

__all__ = ["Comparison", "Erasure", "Examination", "Wanted", "command", "folder_name", "unfinished"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Concepts as they are typed: names, and for a single one what is known of it.

    Attributes:
        names: One or several.
        kind, anchor: Of a single concept; what a world knows stands in for ``None``.
        phrases: Other phrasings of a single concept; likewise.
    """

    names: tuple[str, ...]
    kind: str | None = None
    anchor: str | None = None
    phrases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Erasure:
    """One erasure: everything that can change its result, beside the model and the edits on it."""

    model: str
    wanted: Wanted
    method: str
    preset: str | None = None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keep: tuple[str, ...] = ()
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def read(cls, file: Path) -> Erasure:
        """The request of a run folder.

        Raises:
            RunError: The file is not one, or of another version.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            wanted: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in data.pop("wanted").items()
            }
            data["keep"] = tuple(data["keep"])
            return cls(wanted=Wanted(**wanted), **data)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise RunError(
                f"{file.parent.name}: its request.json cannot be read, so it cannot be taken up"
            ) from None

    def command(self, below: Sequence[Path] = (), out: str = "out") -> str:
        """The same on the command line."""
        words = ["erase", "--model", self.model, *_typed(self.wanted), "--method", self.method]
        words += ["--preset", self.preset] if self.preset else []
        words += [w for key, value in self.settings.items() for w in ("--set", f"{key}={value}")]
        words += [w for name in self.keep for w in ("--keep", name)]
        words += [w for file in below for w in ("--edit", str(file))]
        return command([*words, "--seed", str(self.seed), "--out", out])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Prompts to look at, each with ``seeds`` seeds from ``seed`` on; ``None``: the model's own default."""

    prompts: tuple[str, ...]
    seeds: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


@dataclasses.dataclass(frozen=True)
class Examination:
    """One audit.

    Attributes:
        wanted: The concepts; those the edits name where there are none.
        attacks: Ids; none at all is allowed.
        budget: Name of the allowance for each attacked prompt.
        n, kept_n, attack_n: Prompts for the concept, for each kept concept, and attacked.
        seed: Chooses the prompts, and seeds the attacks.
        judge: Who judges, as on the command line; the model's own where it is ``None``.
    """

    wanted: Wanted = Wanted(())
    attacks: tuple[str, ...] = ()
    budget: str = "quick"
    n: int = 24
    kept_n: int = 4
    attack_n: int = 6
    seed: int = 0
    judge: str | None = None

    def command(self, model: str, edits: Sequence[Path], out: str = "out") -> str:
        """The same on the command line."""
        words = ["audit", "--model", model, *_typed(self.wanted)]
        words += [w for file in edits for w in ("--edit", str(file))]
        words += ["--judge", self.judge] if self.judge else []
        words += ["--attacks", ",".join(self.attacks) or "none", "--budget", self.budget]
        words += [
            "--n",
            str(self.n),
            "--kept-n",
            str(self.kept_n),
            "--attack-n",
            str(self.attack_n),
        ]
        return command([*words, "--seed", str(self.seed), "--out", out])


def _typed(wanted: Wanted) -> list[str]:
    words = [w for name in wanted.names for w in ("--concept", name)]
    words += ["--kind", wanted.kind] if wanted.kind else []
    words += ["--anchor", wanted.anchor] if wanted.anchor else []
    return words + [w for phrase in wanted.phrases for w in ("--phrase", phrase)]


def command(words: Sequence[str]) -> str:
    """A command of ours, quoted for a shell."""
    return shlex.join(["expunge", *words])


def folder_name(first: str, names: Sequence[str], *named: Any) -> str:
    """A folder's name: what it holds in words, and a digest of everything that can change it."""
    slug = re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower()).strip("-")[:40].strip("-")
    digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=list).encode()).hexdigest()
    return safe_name("-".join(filter(None, (first, slug, digest[:10]))), "run")


def unfinished(runs: Path) -> list[tuple[str, Erasure]]:
    """Erasures in a folder of runs that were begun and have no edit yet, the newest first."""
    files = [f for f in runs.glob("*/request.json") if not (f.parent / "edit.safetensors").exists()]
    found = []
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            found.append((file.parent.name, Erasure.read(file)))
        except RunError:
            continue  # of another version; nothing can be done with it here
    return found
