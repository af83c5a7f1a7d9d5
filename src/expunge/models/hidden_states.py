"""Hidden states of layers, shown to the controls that name them, while a part of a model runs.

Hooks stand on the layers only inside the block, and only where somebody listens.  Only adapters use this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import MissingPart, nearest
from .base import Model
from .types import Context

if TYPE_CHECKING:
    from ..method import Control
    from .diffusion import DiffusionModel

__all__ = ["heard", "listeners", "showing"]


def listeners(controls: Sequence[Control], parts: Sequence[str]) -> tuple[Control, ...]:
    """Controls that ask for hidden states of a layer of one of the parts."""
    return tuple(
        control
        for control in controls
        if "activations" in control.hooks()
        and any(name.partition(".")[0] in parts for name in control.layers)
    )


@contextlib.contextmanager
def showing(
    parts: Mapping[str, nn.Module], controls: Sequence[Control], context: Context
) -> Iterator[None]:
    """Give the outputs of layers to the controls, in their order, and go on with what they return.

    Args:
        parts: The parts that are about to run, by name.
        controls: Who may listen; each is given the layers it names in ``layers``.
        context: ``layer``, ``ids`` and ``attended`` are set as layers and text encoders run; ``changed`` tells
            afterwards which rows a control did not leave as they were.

    Raises:
        MissingPart: A control names a layer that a part does not have.
    """
    heard = listeners(controls, tuple(parts))
    if not heard:
        yield
        return
    with contextlib.ExitStack() as hooks:
        for part, module in parts.items():
            known = {f"{part}.{Model.canonical(n)}": inner for n, inner in module.named_modules()}
            wanted = dict.fromkeys(
                name for c in heard for name in c.layers if name.partition(".")[0] == part
            )
            if wanted:
                reading = module.register_forward_pre_hook(_reading(context), with_kwargs=True)
                hooks.callback(reading.remove)
            for name in wanted:
                if name not in known:
                    raise MissingPart(f"there is no layer {name!r}{nearest(name, known)}")
                own = [control for control in heard if name in control.layers]
                # First of all hooks: transformers collects hidden states by hooks of its own, for pipelines that read
                # them before the last layer.
                handle = known[name].register_forward_hook(_shown(name, own, context), prepend=True)
                hooks.callback(handle.remove)
        yield


def heard(model: DiffusionModel, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, with hidden states of the text encoders shown to whatever acts on the model then."""

    def made(*args: Any) -> Any:
        with showing(model.layout.encoders(), model.acting, Context()):
            return call(*args)

    return made


def _reading(context: Context) -> Callable[..., None]:
    """Notes what a text encoder is given: token ids and their mask, where there is one."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        ids = given.get("input_ids")
        text = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
        context.ids, context.attended = (ids, given.get("attention_mask")) if text else (None, None)

    return note


def _shown(name: str, controls: Sequence[Control], context: Context) -> Callable[..., Any]:
    def show(module: nn.Module, args: Any, output: Any) -> Any:
        # Some layers return a tuple whose first entry are the hidden states.
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        context.layer, context.inputs, made = name, args, hidden
        for control in controls:
            made = control.activations(context, made)
        if made is hidden:
            return None
        if context.ids is not None:  # of a denoiser nobody asks, and it has many layers
            moved = (made != hidden).flatten(1).any(1)
            context.changed = moved if context.changed is None else context.changed | moved
        return (made, *output[1:]) if isinstance(output, tuple) else made

    return show
