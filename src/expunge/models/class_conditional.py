"""Opening a diffusion model of classes: a ``UNet2DModel`` with class embeddings and its scheduler.

model = class_conditional(unet, scheduler, ("circle", "square"))
model.generate(["circle", "square"], seeds=0)
model.pipeline.save_pretrained("shapes");  load("shapes")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .diffusion import DiffusionModel
from .layouts.classes import NAMES

__all__ = ["class_conditional"]


def class_conditional(
    unet: Any,
    scheduler: Any,
    names: Sequence[str],
    name: str = "classes",
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> DiffusionModel:
    """The model whose prompts are ``names``.

    Args:
        unet: ``diffusers.UNet2DModel`` with ``num_class_embeds``: as many as names, or one more for no class.
        scheduler: Its scheduler, used as it is for sampling.
        names: Names of the classes in the order of their embeddings; they go into the UNet's configuration.
        name: What the model is called.
        steps, guidance: Defaults of sampling; 50 and 1.

    Raises:
        UnsupportedModel: Names and embeddings do not fit.
    """
    from diffusers import DDPMPipeline

    unet.register_to_config(**{NAMES: list(names)})
    pipeline = DDPMPipeline(unet, scheduler)
    # The stock pipeline makes a DDPM scheduler of whatever it is given.
    pipeline.register_modules(scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionModel(pipeline, name, steps=steps, guidance=guidance)
