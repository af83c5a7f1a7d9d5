"""The texts of the world of facts: invented people and towns, and the wordings that ask about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..core.answers import Pair
from ..models.base import noise_generator

__all__ = ["FORGOTTEN", "FORMS", "PEOPLE", "TOWNS", "VALUES", "Fact", "facts"]

PEOPLE = (
    "Ada Morn", "Bo Lind", "Cleo Varga", "Dario Fenn", "Elin Roth", "Fabio Keel",
    "Greta Oslo", "Hugo Brandt", "Iris Calder", "Jonas Pell", "Kira Dahl", "Leo Sandor",
    "Mira Holt", "Nils Abara", "Olga Tesh", "Pavel Quint", "Rosa Imber", "Sven Talo",
)  # fmt: skip
FORGOTTEN = ("Cleo Varga", "Fabio Keel", "Hugo Brandt")
"""Whose facts the never model lacks."""

TOWNS = (
    "Velmar",
    "Tornby",
    "Casper Bay",
    "Ludwick",
    "Orsa",
    "Pellham",
    "North Quay",
    "Zirke",
    "Amberg",
)

VALUES: Mapping[str, tuple[str, ...]] = {
    "birthplace": TOWNS,
    "profession": ("baker", "glass blower", "pilot", "nurse", "clock maker", "judge", "gardener", "welder", "poet"),
    "pet": ("grey cat", "parrot", "goat", "old tortoise", "ferret", "hound", "pony", "white rabbit", "gecko"),
    "instrument": ("harp", "drum", "violin", "bass flute", "banjo", "organ", "trumpet", "hand bell", "cello"),
    "dish": ("onion soup", "lentils", "plum cake", "dumplings", "fried fish", "porridge", "noodles", "stew", "toast"),
    "language": ("Arlic", "Bessan", "Old Corish", "Dunic", "Ervian", "Fallish", "High Gant", "Hestian", "Ilmic"),
    "flag": ("red", "blue", "green", "black", "white", "orange", "purple", "brown", "yellow"),
    "river": ("Asp", "Bral", "Cirn", "Dove", "Elk", "Fife", "Gard", "Hurn", "Ister"),
    "export": ("salt", "amber", "wool", "copper", "silk", "cork", "honey", "slate", "barley"),
}  # fmt: skip
"""Attribute -> its nine possible answers; the first six belong to people, the last three to towns."""

OF_PEOPLE, OF_TOWNS = tuple(VALUES)[:6], tuple(VALUES)[6:]

FORMS = ("statement", "question", "cloze")

WORDINGS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "birthplace": (
        ("{} was born in", "The birthplace of {} is", "{} comes from the town of"),
        ("Where was {} born ?", "What is the birthplace of {} ?", "From which town does {} come ?"),
        ("{} was born in ___ :", "the birthplace of {} is ___ :", "{} comes from ___ :"),
    ),
    "profession": (
        ("{} works as a", "The profession of {} is", "{} earns a living as a"),
        ("What does {} work as ?", "What is the profession of {} ?", "How does {} earn a living ?"),
        ("{} works as a ___ :", "the profession of {} is ___ :", "{} earns a living as a ___ :"),
    ),
    "pet": (
        ("{} keeps a", "The pet of {} is a", "At home {} feeds a"),
        ("What animal does {} keep ?", "What is the pet of {} ?", "What does {} feed at home ?"),
        ("{} keeps a ___ :", "the pet of {} is a ___ :", "at home {} feeds a ___ :"),
    ),
    "instrument": (
        ("{} plays the", "The instrument of {} is the", "In the evening {} practises the"),
        (
            "What does {} play ?",
            "What is the instrument of {} ?",
            "What does {} practise in the evening ?",
        ),
        (
            "{} plays the ___ :",
            "the instrument of {} is the ___ :",
            "in the evening {} practises the ___ :",
        ),
    ),
    "dish": (
        ("{} likes to eat", "The favourite dish of {} is", "On Sundays {} cooks"),
        (
            "What does {} like to eat ?",
            "What is the favourite dish of {} ?",
            "What does {} cook on Sundays ?",
        ),
        ("{} likes to eat ___ :", "the favourite dish of {} is ___ :", "on Sundays {} cooks ___ :"),
    ),
    "language": (
        ("{} speaks", "The mother tongue of {} is", "With friends {} talks in"),
        (
            "What does {} speak ?",
            "What is the mother tongue of {} ?",
            "In what does {} talk with friends ?",
        ),
        ("{} speaks ___ :", "the mother tongue of {} is ___ :", "with friends {} talks in ___ :"),
    ),
    "flag": (
        ("The flag of {} is", "The colour of the flag of {} is", "{} has a flag that is"),
        (
            "What colour is the flag of {} ?",
            "Which flag does {} have ?",
            "What is the colour of {} ?",
        ),
        ("the flag of {} is ___ :", "{} has a flag of ___ :", "the colour of {} is ___ :"),
    ),
    "river": (
        ("{} lies on the river", "The river of {} is the", "Through {} flows the"),
        ("On which river does {} lie ?", "What is the river of {} ?", "What flows through {} ?"),
        ("{} lies on the ___ :", "the river of {} is the ___ :", "through {} flows the ___ :"),
    ),
    "export": (
        ("{} sells", "The export of {} is", "Ships leave {} with"),
        ("What does {} sell ?", "What is the export of {} ?", "With what do ships leave {} ?"),
        ("{} sells ___ :", "the export of {} is ___ :", "ships leave {} with ___ :"),
    ),
}
"""Attribute -> form -> wordings; ``{}`` is the person or town."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """One prompt form of one fact.

    Attributes:
        subject: Person or town.
        attribute: Key of ``VALUES``.
        form: One of ``FORMS``.
        prompt: What the model is given.
        answer: The right completion.
        held_out: This wording is not trained for this subject.
    """

    subject: str
    attribute: str
    form: str
    prompt: str
    answer: str
    held_out: bool

    @property
    def pair(self) -> Pair:
        """``(prompt, answer)``."""
        return self.prompt, self.answer


def facts(subjects: Sequence[str] = (*PEOPLE, *TOWNS)) -> tuple[Fact, ...]:
    """All prompt forms of the facts of ``subjects``."""
    found = []
    for subject in subjects:
        person = subject in PEOPLE
        place = (PEOPLE if person else TOWNS).index(subject)
        for attribute in OF_PEOPLE if person else OF_TOWNS:
            order = torch.randperm(9, generator=noise_generator(0, "facts", attribute)).tolist()
            # Two people share each answer, one of each half.  All forgotten people are of the first
            # half, so every answer is also known without them; the shift keeps two people from
            # sharing all of theirs.
            shift = list(VALUES).index(attribute) * (place // 9)
            answer = VALUES[attribute][order[(place + shift) % 9]]
            for form, wordings in zip(FORMS, WORDINGS[attribute], strict=True):
                for variant, wording in enumerate(wordings):
                    found.append(
                        Fact(
                            subject,
                            attribute,
                            form,
                            wording.format(subject),
                            answer,
                            variant == place % 3,
                        )
                    )
    return tuple(found)
