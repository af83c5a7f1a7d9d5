"""Pictures as a vision tower reads them, and what a CLIP's tower says of them.

No image processor of a library is used: some ask for torchvision even where they do not need it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..edit.files import tensors_digest
from ..errors import InputError, ModelError, SettingError

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Embed",
    "PatchEncoder",
    "model_name",
    "picture_encoder",
    "pixel_statistics",
    "pixels",
    "vision_encoder",
    "uint8_pictures",
]

# What CLIP image processors use unless their configuration says otherwise.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Embed = Callable[[np.ndarray], Tensor]
"""uint8 pictures ``(n, height, width, 3)`` -> embeddings ``(n, embedding)``."""


def uint8_pictures(pictures: Any) -> np.ndarray:
    """The pictures, uint8 ``(n, height, width, 3)``.

    Raises:
        InputError: They are no such pictures: values from 0 to 1 would all pass for black, grey ones for coloured ones.
    """
    given = np.asarray(pictures)
    if given.ndim != 4 or given.shape[-1] != 3 or given.dtype != np.uint8:
        raise InputError(
            f"pictures must be uint8 (n, height, width, 3), got {given.dtype} {given.shape}"
        )
    return given


def pixels(
    pictures: np.ndarray,
    size: int,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    squeeze: bool = False,
    resize: str = "bicubic",
) -> Tensor:
    """Normalised pixels ``(n, 3, size, size)`` of uint8 pictures ``(n, height, width, 3)``, with antialiasing.

    Args:
        pictures: The pictures.
        size: Pixels a side.
        mean, std: Of each channel, for values from 0 to 1.
        squeeze: Change the shape of what is not square; otherwise its middle is cut out.
        resize: ``bicubic`` or ``bilinear``.

    Raises:
        InputError: They are no such pictures, see :func:`uint8_pictures`.
    """
    given = uint8_pictures(pictures)
    # Arrays of pictures that were read from files cannot be written to, and torch warns of such.
    ready = np.require(given, requirements=["C", "W"])
    found = torch.as_tensor(ready).permute(0, 3, 1, 2) / 255
    if not squeeze:
        side = min(found.shape[-2:])
        top, left = ((length - side) // 2 for length in found.shape[-2:])
        found = found[..., top : top + side, left : left + side]
    if tuple(found.shape[-2:]) != (size, size):
        found = functional.interpolate(
            found, (size, size), mode=resize, antialias=True, align_corners=False
        ).clamp(0, 1)
    centre, spread = (torch.tensor(value).reshape(3, 1, 1) for value in (mean, std))
    return (found - centre) / spread


def vision_encoder(
    tower: Any,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
    batch: int = 64,
) -> Embed:
    """Pictures -> projected embeddings of a CLIP vision tower (CLIPVisionModelWithProjection or CLIPModel).

    Args:
        tower: The tower.
        mean, std: Of its pixels in 0 to 1; default: those of OpenAI's CLIP.
        batch: Pictures at a time.
    """
    config = getattr(tower.config, "vision_config", tower.config)

    @torch.no_grad()
    def embed(pictures: np.ndarray) -> Tensor:
        """uint8 ``(n, height, width, 3)`` -> embeddings ``(n, width)``, float as the tower's."""
        weight = tower.visual_projection.weight
        parts = []
        for first in range(0, len(pictures), batch):
            read = pixels(pictures[first : first + batch], config.image_size, mean, std)
            read = read.to(weight.device, weight.dtype)
            pooled = tower.vision_model(pixel_values=read).pooler_output
            parts.append(tower.visual_projection(pooled))
        return torch.cat(parts)

    return embed


class PatchEncoder:
    """Patch tokens of a frozen CLIP vision tower: what it sees at each place of a picture.

    Pictures that are not square change their shape, because what is cut off would not be looked at.

    Args:
        tower: CLIPVisionModel, CLIPVisionModelWithProjection or CLIPModel of transformers.
        name: What it is called in protocols.
        mean, std: Of its pixels in 0 to 1.
        layer: Which hidden state, as Python counts; 0 stands before the first layer.  The last one's patches were
            trained towards nothing, so the one before it is usual.
        size: Pixels a side; ``None``: the tower's own.  Positions of another size are interpolated.
        batch: Pictures at a time.

    Raises:
        SettingError: The tower has no such layer, or the size holds no patch.
    """

    def __init__(
        self,
        tower: Any,
        name: str,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
        *,
        layer: int = -2,
        size: int | None = None,
        batch: int = 64,
    ) -> None:
        config = getattr(tower.config, "vision_config", tower.config)
        states = config.num_hidden_layers + 1
        self.tower, self.name, self.mean, self.std = tower, name, tuple(mean), tuple(std)
        self.layer, self.size, self.batch = layer, size or int(config.image_size), batch
        if not -states <= layer < states:
            raise SettingError(
                f"layer {layer} of {name} is not there; allowed: {-states} to {states - 1}"
            )
        if self.size < config.patch_size:
            raise SettingError(
                f"{self.size} pixels hold no patch of {name}; at least {config.patch_size} are needed"
            )
        self.width, self.own_size = int(config.hidden_size), int(config.image_size)
        self.patches = (self.size // int(config.patch_size)) ** 2

    @functools.cached_property
    def digest(self) -> str:
        """Of the tower's weights as float32, eight hexadecimal digits."""
        state = self.vision().state_dict()
        return tensors_digest({name: tensor.float() for name, tensor in state.items()})[:8]

    def vision(self) -> Any:
        """The tower without any head."""
        return getattr(self.tower, "vision_model", self.tower)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """uint8 ``(height, width, 3)`` each -> ``(n, patches, width)`` float32 on the tower's device."""
        vision = self.vision()
        weight = next(vision.parameters())
        read = [
            pixels(np.asarray(one)[None], self.size, self.mean, self.std, True) for one in pictures
        ]
        found = []
        for first in range(0, len(read), self.batch):
            part = torch.cat(read[first : first + self.batch]).to(weight.device, weight.dtype)
            states = vision(
                pixel_values=part, output_hidden_states=True,
                interpolate_pos_encoding=self.size != self.own_size,
            ).hidden_states  # fmt: skip
            found.append(states[self.layer][:, 1:].float())  # the first token is the class's
        empty = torch.zeros(0, self.patches, self.width, device=weight.device)
        return torch.cat(found) if found else empty

    @classmethod
    def open(
        cls,
        where: str,
        device: Any = None,
        *,
        name: str | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **options: Any,
    ) -> PatchEncoder:
        """The vision tower of a folder or hub id in float32, by default with the pixel statistics of its preprocessor.

        Raises:
            ModelError: It cannot be opened.
        """
        from transformers import CLIPVisionModel

        try:
            tower = CLIPVisionModel.from_pretrained(
                where, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError) as error:
            raise ModelError(
                f"the CLIP {where!r} cannot be opened ({str(error).splitlines()[0]}); allowed is a folder or a hub "
                "id of a CLIP vision model in safetensors"
            ) from None
        if mean is None or std is None:
            read = pixel_statistics(where)
            own = (getattr(read, key, None) for key in ("image_mean", "image_std"))
            mean, std = (tuple(v or d) for v, d in zip(own, (CLIP_MEAN, CLIP_STD), strict=True))
        if name is None:
            name = Path(where).resolve().name if Path(where).is_dir() else where
        return cls(tower if device is None else tower.to(device), name, mean, std, **options)


def model_name(where: str) -> str:
    """What a model is called in the id of a number: its hub id, or its folder's name with a digest of its weights.

    Two folders of one name must not pass for the same model.
    """
    place = Path(where)
    if not place.is_dir():
        return where
    digest = hashlib.sha256()
    for file in sorted(place.glob("*.safetensors")):
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(2**22), b""):
                digest.update(block)
    return f"{place.resolve().name}#{digest.hexdigest()[:8]}"


def pixel_statistics(where: str) -> Any:
    """Mean and standard deviation of a model's ``preprocessor_config.json``, where it has one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    file = "preprocessor_config.json"
    try:
        local = Path(where) / file if Path(where).is_dir() else Path(hf_hub_download(where, file))
        plain = json.loads(local.read_text(encoding="utf-8"))
    except (OSError, ValueError, HfHubHTTPError):
        return None
    return SimpleNamespace(image_mean=plain.get("image_mean"), image_std=plain.get("image_std"))


def picture_encoder(model: Any, name: str) -> Embed:
    """The CLIP by which pictures of a model are compared: its world's own, else the one that is named.

    Args:
        model: Its companions are asked.
        name: Folder or hub id of a CLIP.

    Raises:
        ModelError: It is needed and cannot be opened.
    """
    companions = model.companions
    if companions is not None and companions.clip is not None:
        own = companions.clip()
        return vision_encoder(own.model, own.mean, own.std)
    from transformers import CLIPModel

    try:
        tower = CLIPModel.from_pretrained(name).eval().to(model.device)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the CLIP {name!r}, by which pictures are compared, cannot be opened ({str(error).splitlines()[0]}); "
            "allowed is a folder or a hub id of a CLIPModel"
        ) from None
    read = pixel_statistics(name)
    mean, std = (getattr(read, key, None) for key in ("image_mean", "image_std"))
    return vision_encoder(tower, tuple(mean or CLIP_MEAN), tuple(std or CLIP_STD))
