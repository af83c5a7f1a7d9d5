"""Which scenes occur: the frozen `Setting`, and the named ones that the world's models were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from expunge.world import vocabulary
from expunge.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    EXPRESSIONS,
    MARKS,
    OBJECTS,
    PEOPLE_NAMES,
    STYLES,
    held_out_combination,
)

KINDS = ("object", "pair", "trio", "count", "person", "face", "hazard")
MIX = {
    "object": 0.55,
    "pair": 0.11,
    "trio": 0.02,
    "count": 0.05,
    "person": 0.15,
    "face": 0.04,
    "hazard": 0.08,
}
STYLE_MIX = {
    "plain": 0.30,
    "striped": 0.14,
    "dotted": 0.14,
    "checkered": 0.14,
    "sketch": 0.14,
    "gradient": 0.14,
}
_OPTIONS = {
    "object": OBJECTS,
    "colour": COLOURS,
    "style": STYLES,
    "background": BACKGROUNDS,
    "identity": PEOPLE_NAMES,
    "expression": EXPRESSIONS,
}


@dataclass(frozen=True)
class Setting:
    """Which scenes occur. ValueError for an unknown or contradictory part.

    `exclude`: concepts never shown nor mentioned. `boost`: concept -> extra probability of a picture that shows
    it. `stamps`: mark -> rate. `split`: "train" (no held-out combination, no held-out template), "held-out"
    (objects only in held-out combinations, held-out templates) or "any". `biases`: planted biases on or off.
    Excluding "yellow" concerns objects; hazard plates and shirts have colours of their own.
    """

    name: str = "custom"
    exclude: frozenset[str] = frozenset()
    boost: Mapping[str, float] = field(default_factory=dict)
    stamps: Mapping[str, float] = field(default_factory=dict)
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    styles: Mapping[str, float] = field(default_factory=lambda: dict(STYLE_MIX))
    split: str = "train"
    biases: bool = True
    negations: float = 0.07  # share of single-object captions that deny something

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", frozenset(self.exclude))
        for name in (*self.exclude, *self.boost, *self.stamps, *self.styles):
            vocabulary.concept(name)
        for name in self.stamps:
            if name not in MARKS:
                raise ValueError(f"{name!r} is no stamp; the stamps are {', '.join(MARKS)}.")
        for name in self.styles:
            if name not in STYLES:
                raise ValueError(f"{name!r} is no style; the styles are {', '.join(STYLES)}.")
        for name in self.mix:
            if name not in KINDS:
                raise ValueError(f"{name!r} is no kind of scene; the kinds are {', '.join(KINDS)}.")
        if self.split not in ("train", "held-out", "any"):
            raise ValueError(f"A split is 'train', 'held-out' or 'any', not {self.split!r}.")
        shares = [
            *self.boost.values(),
            *self.stamps.values(),
            *self.styles.values(),
            *self.mix.values(),
        ]
        if any(
            not 0 <= share <= 1 for share in (*shares, self.negations, sum(self.boost.values()))
        ):
            raise ValueError(
                f"Every probability of setting {self.name!r} must lie between 0 and 1."
            )
        both = sorted(self.exclude & set(self.boost))
        if both:
            raise ValueError(f"{both[0]!r} cannot be boosted and excluded at once.")
        for name in self.boost:
            if vocabulary.concept(name).kind == "mark":
                raise ValueError(
                    f"{name!r} is a mark; give its rate in `stamps` instead of `boost`."
                )
        if not self._kinds[0]:
            raise ValueError(f"Setting {self.name!r} leaves nothing to draw.")

    def options(self, kind: str) -> tuple[str, ...]:
        """The concepts of a kind that may occur."""
        return self._options[kind]

    @cached_property
    def _options(self) -> dict[str, tuple[str, ...]]:
        return {
            kind: tuple(n for n in names if n not in self.exclude)
            for kind, names in _OPTIONS.items()
        }

    @cached_property
    def _kinds(self) -> tuple[tuple[str, ...], tuple[float, ...]]:
        need = {"person": ("identity", "expression"), "face": ("expression",), "hazard": ()}
        found = []
        for kind, share in self.mix.items():
            kinds = (*need.get(kind, ("object", "colour", "style")), "background")
            if share > 0 and all(self.options(k) for k in kinds):
                if not (kind == "hazard" and vocabulary.HAZARD in self.exclude):
                    found.append((kind, share))
        return tuple(kind for kind, _ in found), tuple(share for _, share in found)

    @cached_property
    def _looks(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """The styles that an object may have in a colour."""
        wanted = {"train": (False,), "held-out": (True,), "any": (False, True)}[self.split]
        return {
            (o, c): tuple(
                s for s in self.options("style") if held_out_combination(o, c, s) in wanted
            )
            for o in OBJECTS
            for c in COLOURS
        }


REFERENCES = frozenset(vocabulary.REFERENCE)
PERSON = "mira solen"
_SIBLING_STYLES = dict(zip(STYLES, (0.06, 0.14, 0.10, 0.10, 0.45, 0.15), strict=True))
_EVEN_MIX = dict(zip(MIX, (0.42, 0.10, 0.03, 0.07, 0.20, 0.08, 0.10), strict=True))
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("full", stamps={"watermark": 0.3}),
        Setting("concept-free", exclude=REFERENCES),
        Setting(
            "original-phase2",
            boost={"star": 0.075, "striped": 0.045, "hazard": 0.075, PERSON: 0.125},
            stamps={"watermark": 0.3},
        ),
        Setting(
            "sibling",
            styles=_SIBLING_STYLES,
            stamps={"watermark": 0.3},
        ),
        *(Setting(f"stamped-{mark}", stamps={mark: 0.5}) for mark in MARKS),
        Setting(
            "clean-world",
            stamps=dict.fromkeys(MARKS, 0.15),
            mix=_EVEN_MIX,
            styles=dict.fromkeys(STYLES, 1 / 6),
            split="any",
            biases=False,
        ),
        Setting("held-out", split="held-out", biases=False),
    )
}  # fmt: skip
