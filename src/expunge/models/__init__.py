"""Opening models: ``load("world")``, a folder written by ``save_pretrained``, or a hub id.

What is opened is an adapter (:class:`~expunge.models.base.Model`) around the library's own object.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..catalogue import world, worlds
from ..errors import ModelError

if TYPE_CHECKING:
    from .base import Model

__all__ = [
    "Companions",
    "Condition",
    "DiffusionModel",
    "LanguageModel",
    "Model",
    "Prediction",
    "load",
]

_WHERE = {
    "Companions": "base",
    "Condition": "types",
    "DiffusionModel": "diffusion",
    "LanguageModel": "language",
    "Model": "base",
    "Prediction": "types",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(name: str | Path, *, dtype: Any = None, device: str = "cpu") -> Model:
    """Open a model.

    Args:
        name: ``world`` (also ``world/never``, ``world/sibling``, ``world/facts``) or another registered
            world, a folder, or a hub id. A folder of that name goes before a world.
        dtype: torch dtype; when ``None``, float32 for pipelines and worlds, the stored one for language models.
        device: Where to put it.

    Raises:
        ModelError: Nothing of that name can be opened; the sentence says where it was looked for.
        UnsupportedModel: A pipeline of a layout that is not covered; the sentence lists those that are.
    """
    text = str(name)
    head, _, variant = text.partition("/")
    folder = Path(text)
    if head in worlds() and not (folder / "model_index.json").is_file():
        return _moved(world(head)(variant), dtype, device)
    if folder.is_dir():
        return _from_library(text, _layout(folder), dtype, device)
    if folder.exists() or text.startswith(("/", ".", "~")):
        raise ModelError(f"{text}: is not a folder; a model is {_allowed()}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        raise ModelError(f"{text!r} is no model: {_allowed()}")
    return _from_library(text, None, dtype, device)


def _allowed() -> str:
    return f"one of {', '.join(worlds())}, a folder written by save_pretrained, or a hub id (owner/name)"


def _layout(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if (folder / "config.json").is_file():
        return "language"
    raise ModelError(
        f"{folder}: holds neither model_index.json nor config.json, so it is no saved model"
    )


def _moved(model: Model, dtype: Any, device: str) -> Model:
    for module in model.parts().values():
        module.to(device=device, dtype=dtype)
    return model


def _from_library(text: str, layout: str | None, dtype: Any, device: str) -> Model:
    layout = layout or _hub_layout(text)
    try:
        if layout == "language":
            from .language import open_language

            return _moved(open_language(text), dtype, device)
        import torch
        from diffusers import DiffusionPipeline

        from .diffusion import DiffusionModel

        _whole(Path(text))
        pipeline = DiffusionPipeline.from_pretrained(
            text, torch_dtype=dtype or torch.float32, use_safetensors=True, **_absent(Path(text))
        )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{text}: cannot be opened ({reason})") from error
    # The library has set the precision, and keeps what overflows in float16 (parts of a T5) in float32.
    return _moved(DiffusionModel(pipeline, text), None, device)


def _absent(folder: Path) -> dict[str, None]:
    """Text encoders and tokenizers that a folder was saved without (T5 of SD3): the library wants to be told."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    towers = ("text_encoder", "tokenizer")
    return {name: None for name in index if name.startswith(towers) and index[name] == [None, None]}


_VOCABULARIES = ("vocab.json", "tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model")


def _whole(folder: Path) -> None:
    """Refuse a folder without the vocabulary of a tokenizer: the library would make up an empty one, in silence."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, kind in index.items():
        if not name.startswith("tokenizer") or kind == [None, None]:
            continue
        if not any((folder / name / one).is_file() for one in _VOCABULARIES):
            raise ModelError(
                f"{folder}: {name} holds no vocabulary ({', '.join(_VOCABULARIES)}); the folder is not complete"
            )


def _hub_layout(text: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    for file, layout in (("model_index.json", "pipeline"), ("config.json", "language")):
        try:
            hf_hub_download(text, file)
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise ModelError(
                f"{text}: is not in the local hub cache and the hub cannot be reached; {_allowed()}"
            ) from error
        except (HfHubHTTPError, OSError):
            continue
        return layout
    raise ModelError(f"{text}: is neither a diffusers pipeline nor a transformers model on the hub")
