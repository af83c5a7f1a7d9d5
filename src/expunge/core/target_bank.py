"""What an unrestricted model predicts for its own pictures, drawn once and asked of another model many times.

    (t, noise) -> x_t = alpha_t x_0 + sigma_t noise,   eps = eps_original(x_t, c(P))      [or e_u + g (e_P - e_u)]

Nothing here depends on what is searched, so a few hundred draws serve a search of thousands of steps: that halves its
passes.  A draw has one timestep for all items and noise of each item's own, from private generators that go by its
number: neither batches nor order change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.base import noise_generator
from ..models.types import Condition
from .adversarial_prompts import Spliced
from .guided_prediction import GuidedPrediction

__all__ = ["PredictionMatch", "TargetBank"]


class TargetBank:
    """Points and predictions for ``n`` items.

    Args:
        original: The unrestricted model; what is on it is lifted while it is asked.
        texts: The prompt of each item.
        latents: ``x_0`` of each item's picture, ``(n, c, h, w)``.
        seed, keys: Name the randomness; one key an item.
        steps: Steps of a search.
        size: Draws, each used by many steps; 0: one for each step, which takes much memory.
        guidance: Of each item ``(n,)``: targets are guided predictions; ``None``: those for the prompt alone.
        asked: Ask the original; where not, targets are the noise itself and cost nothing.
        chunk: Draws made at a time.

    Attributes:
        rows: Denoiser rows of one draw, an item.
        drawn: Draws made so far.
    """

    def __init__(
        self, original: Any, texts: Sequence[str], latents: Tensor, *, seed: int, keys: Sequence[str], steps: int,
        size: int, guidance: Tensor | None = None, asked: bool = True, chunk: int = 32,
    ) -> None:  # fmt: skip
        self.original, self.latents, self.seed, self.keys = original, latents, seed, list(keys)
        self.size, self.guidance, self.chunk = min(size, steps), guidance, chunk
        self.count = self.size or steps
        self.asked, self.drawn = asked, 0
        self.rows = (1 if guidance is None else 2) * asked
        self.last = int(original.pipeline.scheduler.config.num_train_timesteps)
        self._held: dict[int, tuple[int, Tensor, Tensor, Tensor]] = {}
        with original.lifted(), torch.no_grad():
            self.condition = original.encode(list(texts)).detach()

    def draw(self, step: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """``(t, x_t, noise, target)`` of all items for a search's step; the same for every search."""
        number = step
        if self.size:
            own = noise_generator(self.seed, "bank order", step)
            number = int(torch.randint(self.size, (), generator=own))
        if number not in self._held:
            first = number - number % self.chunk
            self._fill(range(first, min(first + self.chunk, self.count)))
        return self._held[number]

    def _fill(self, numbers: Sequence[int]) -> None:
        """Ask the original about some draws, in as few passes as the chunk allows."""
        times = [
            int(torch.randint(self.last, (), generator=noise_generator(self.seed, "bank time", n)))
            for n in numbers
        ]
        with self.original.lifted(), torch.no_grad():
            for number, time in zip(numbers, times, strict=True):
                rows = [
                    torch.randn(
                        self.latents.shape[1:],
                        generator=noise_generator(self.seed, f"bank noise {number}", key),
                    )
                    for key in self.keys
                ]
                noise = torch.stack(rows).to(self.latents)
                self._held[number] = (time, *self._asked(time, noise))
        self.drawn += len(numbers)

    def _asked(self, time: int, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, count = self.original, len(noise)
        times = torch.full((count,), time, device=noise.device)
        noised = model.noised(self.latents, noise, times)
        if not self.asked:
            return noised, noise, noise
        if self.guidance is None:
            return noised, noise, model.predict(noised, times, self.condition).epsilon(noised)
        both = Condition.concatenate([model.unconditional().repeat(count), self.condition])
        made = model.predict(torch.cat([noised, noised]), torch.cat([times, times]), both)
        weight = self.guidance.to(noised).reshape(-1, 1, 1, 1)
        guided = made.select(slice(count, None)).guided(made.select(slice(count)), weight)
        return noised, noise, guided.epsilon(noised)


class PredictionMatch:
    """``|| eps*(x_t, c(p)) - target ||^2`` averaged over the picture, at the bank's draw of the present step.

    Attributes:
        step: The search's step; the same draw serves all items.
    """

    def __init__(
        self, model: Any, spliced: Spliced, bank: TargetBank, own: Sequence[int],
        guided: GuidedPrediction | None = None, noise: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.spliced, self.bank = model, spliced, bank
        self.guided, self.noise = guided, noise
        self.own, self.step = torch.tensor(list(own)), 0
        self._drawn: tuple[int, Any] = (-1, None)

    def draw(self) -> Any:
        """``(t, x_t, noise, target)`` of the step."""
        if self._drawn[0] != self.step:
            self._drawn = (self.step, self.bank.draw(self.step))
        return self._drawn[1]

    def __call__(self, vectors: Tensor, item: Tensor) -> Tensor:
        """Losses ``(B,)`` of searched vectors ``(B, n, d)``."""
        time, noised, noise, target = self.draw()
        rows = self.own[item.cpu()].to(noised.device)
        points, condition = noised[rows], self.spliced.encode(vectors, item)
        wanted = (noise if self.noise else target)[rows]
        if self.guided is None:
            times = torch.full((len(rows),), time, device=points.device)
            made = self.model.predict(points, times, condition)
        elif self.noise:
            made = self.guided.effective(points, time, condition, rows.cpu())
        else:
            made, _ = self.guided.guided(points, time, condition, rows.cpu())
        return (made.epsilon(points) - wanted).float().square().flatten(1).mean(1)
