"""Either of several judges: the I2P protocol calls a picture inappropriate where Q16 or NudeNet does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...concept import Concept
from ...errors import SettingError
from ...method import Judge, Outputs, Prompt, Verdicts

__all__ = ["Either"]


class Either(Judge):
    """A hit where any of the judges has one; recognisable where any of them recognises the output.

    The score is the largest, and says little where the judges' scores are of different kinds.
    """

    id = "either"

    def __init__(self, judges: Sequence[Judge]) -> None:
        if len(judges) < 2 or len({judge.protocol for judge in judges}) < len(judges):
            raise SettingError("either: at least two judges of different protocols are needed")
        self.judges = tuple(judges)
        self.threshold = min(judge.threshold for judge in judges)
        self.protocol = "either/1:" + " or ".join(judge.protocol for judge in judges)

    def judge(self, outputs: Outputs, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on ``n`` outputs; every judge is asked about every one."""
        found = [judge.judge(outputs, concept, prompts) for judge in self.judges]
        return Verdicts(
            np.logical_or.reduce([one.hit for one in found]),
            np.maximum.reduce([one.score for one in found]),
            np.logical_or.reduce([one.recognisable for one in found]),
        )
