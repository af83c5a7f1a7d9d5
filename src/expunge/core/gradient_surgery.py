"""Keeping the gradient of one loss from raising another one ("gradient surgery").

With ``a`` the gradient that a step follows and ``b`` that of a loss the step must not raise, the two are in
conflict where ``<a, b> < 0``.  There, with ``a^`` and ``b^`` of unit length,

    exact      a - strength (<a, b> / <b, b>) b        orthogonal to b at strength 1 (arXiv 2001.06782)
    official   a - strength <a^, b^> b^                what DoCo's published code does (arXiv 2405.15304)

takes the conflicting part away.  ``official`` mixes lengths: where ``||a|| < 1`` it takes too much, and a step
then lowers the second loss as well; where ``||a|| > 1`` some of the conflict stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import SettingError
from .training import HALF_SCALE

__all__ = ["FORMS", "gradients_of", "projected"]

FORMS = ("exact", "official")


def gradients_of(loss: Tensor, pairs: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Gradients of a loss, float32 by tensor name, its graph kept; tensors it does not depend on are left out."""
    names, parameters = zip(*pairs, strict=True)
    # Scaled as the loop scales its losses: in float16 small gradients would vanish.
    found = torch.autograd.grad(HALF_SCALE * loss, parameters, retain_graph=True, allow_unused=True)
    return {n: g.float() / HALF_SCALE for n, g in zip(names, found, strict=True) if g is not None}


def projected(
    gradients: Mapping[str, Tensor],
    protected: Mapping[str, Tensor],
    *,
    form: str = "exact",
    strength: float = 1.0,
    whole: bool = False,
) -> tuple[dict[str, Tensor], float]:
    """The gradients without what conflicts with the protected ones, and the share of comparisons in conflict.

    Args:
        gradients: ``a``, float32 by tensor name; not changed.
        protected: ``b`` by tensor name.  Tensors it lacks, and those where it is zero, are in no conflict.
        form: ``exact`` or ``official``.
        strength: Share of the conflicting part that is taken away.
        whole: Compare all tensors as one long vector instead of each with its own.

    Returns:
        New gradients by name, and conflicts by comparisons made (0 where none was made).

    Raises:
        SettingError: The form is unknown.
    """
    if form not in FORMS:
        raise SettingError(f"form is {form!r}; allowed: {', '.join(map(repr, FORMS))}")
    found = dict(gradients)
    shared = [name for name in gradients if name in protected]
    groups = [shared] if whole else [[name] for name in shared]
    compared, conflicts = 0, 0
    for names in groups:
        product = _product(gradients, protected, names)
        square = _product(protected, protected, names)
        if not square > 0:
            continue
        compared += 1
        if not product < 0:
            continue
        conflicts += 1
        length = _product(gradients, gradients, names)
        # Both forms are a multiple of b.
        share = product / (square if form == "exact" else square * length**0.5)
        for name in names:
            found[name] = gradients[name] - strength * share * protected[name]
    return found, conflicts / max(1, compared)


def _product(one: Mapping[str, Tensor], two: Mapping[str, Tensor], names: Sequence[str]) -> float:
    # float64: a sum over millions of float32 products is no longer exact to what orthogonality needs.
    return sum(float(torch.sum(one[name].double() * two[name].double())) for name in names)
