"""Units of a sparse autoencoder that stand for a concept, what a text is without them, and who is edited at all.

    keep = used(autoencoder, rows of retained prompts, most=128)
    mask = used(autoencoder, rows of target prompts, most=128) & ~keep
    edited = Deactivated(site, autoencoder, mask, tau=-8.0)
    threshold = 0.99 * edited.least_error(rows of target prompts)
    with model.controlled(Deactivation([edited with threshold])): ...

With ``z`` the code of a row and ``F`` the units of the mask, for a text of rows ``x``:

    z'_u = tau z_u  for u in F in all rows but the start token,  z'_u = z_u  elsewhere
    x'   = W_d z' + b
    e    = mean of (x' - x)^2 over the text's real rows and all d numbers
    the text is read as x' where e >= threshold, and as x, bit for bit, where not

Padding is edited too, since the denoiser reads it, but has no say in ``e``: else ``e`` would depend on how far a text
is padded.  Source: arXiv 2503.09446.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError
from ..method import Control
from ..models.types import Context
from .sparse_autoencoder import SparseAutoencoder
from .text_activations import Rows, Site, hidden_rows

__all__ = ["STARTS", "Deactivated", "Deactivation", "Read", "peaks", "used"]

STARTS = ("replaced", "kept")
"""What becomes of the start token's row in an edited text: its reconstruction, or what it was."""


def peaks(autoencoder: SparseAutoencoder, rows: Rows) -> Tensor:
    """The largest value of each unit over all rows of a text but its start token, ``(n, K)``."""
    values, units = autoencoder.encode_sparse(rows.hidden)
    values = values.masked_fill(rows.first[..., None], 0)
    found = values.new_zeros(len(values), autoencoder.config.units)
    return found.scatter_reduce(1, units.flatten(1), values.flatten(1), "amax")


def used(autoencoder: SparseAutoencoder, groups: Iterable[Rows], most: int) -> Tensor:
    """Units among the ``most`` with the largest peaks of any text, bool ``(K,)``; only units that are on count.

    Args:
        autoencoder: Whose units.
        groups: Hidden states of texts, group by group.
        most: Units of one text, ``m``.
    """
    found = torch.zeros(autoencoder.config.units, dtype=torch.bool, device=autoencoder.bias.device)
    for rows in groups:
        values, units = peaks(autoencoder, rows).topk(min(most, len(found)), dim=1)
        found[units[values > 0]] = True
    return found


class Read(NamedTuple):
    """Texts as they are read with a concept's units changed.

    Attributes:
        hidden: ``x'``, ``(n, T, d)`` float32.
        errors: ``e``, ``(n,)``.
        named: Whether a unit of the mask is on in a row that counts for ``e``, bool ``(n,)``.
    """

    hidden: Tensor
    errors: Tensor
    named: Tensor


@dataclasses.dataclass(frozen=True)
class Deactivated:
    """A site with the units that are changed there.

    Attributes:
        site: Which layer of which text encoder.
        autoencoder: Its autoencoder.
        mask: bool ``(K,)``, the units ``F``.
        tau: What their values are multiplied by; below 0 they are turned round, at 0 they are off.
        start: One of :data:`STARTS`; under ``kept`` the start token has no say in the error either.
        threshold: Error from which on a text is edited.
    """

    site: Site
    autoencoder: SparseAutoencoder
    mask: Tensor
    tau: float
    start: str = "replaced"
    threshold: float = 0.0

    def of(self, rows: Rows) -> Read:
        """How texts are read under the change, whatever the threshold says."""
        values, units = self.autoencoder.encode_sparse(rows.hidden)
        changed = self.mask[units] & ~rows.first[..., None]
        named = changed & (values > 0)
        values = torch.where(changed, self.tau * values, values)
        made = self.autoencoder.decode_sparse(values, units, of=rows.hidden)
        counted = rows.real
        if self.start == "kept":
            made = torch.where(rows.first[..., None], rows.hidden, made)
            counted = counted & ~rows.first
        named = named.any(-1) & counted
        counted = counted.to(made.dtype)
        errors = ((made - rows.hidden).square().mean(-1) * counted).sum(1)
        return Read(made, errors / counted.sum(1).clamp_min(1), named.any(1))

    def read(self, groups: Iterable[Rows]) -> tuple[Tensor, Tensor]:
        """``e`` of texts and whether they have a unit of the mask, group by group, ``(n,)`` each on the CPU."""
        found = [(read.errors.cpu(), read.named.cpu()) for read in map(self.of, groups)]
        if not found:
            return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        errors, named = map(torch.cat, zip(*found, strict=True))
        return errors, named

    def errors(self, groups: Iterable[Rows]) -> Tensor:
        """``e`` of texts, group by group, ``(n,)`` on the CPU."""
        return self.read(groups)[0]

    def least_error(self, groups: Iterable[Rows]) -> float:
        """The least ``e`` of the texts with a unit of the mask; of all texts where none has one.

        What changes a text without one is the autoencoder's own loss, as of any text: its error as the threshold would
        let every text in.
        """
        errors, named = self.read(groups)
        return float((errors[named] if bool(named.any()) else errors).min())


class Deactivation(Control):
    """Reads texts without a concept where the autoencoder says that they speak of it; others stay as they are.

    Each site decides for itself.  The unconditional branch of guidance is never shown to a control, so a negative text
    keeps its meaning.

    Args:
        edited: One entry a site.

    Raises:
        SettingError: Two entries for one site.
    """

    def __init__(self, edited: Sequence[Deactivated]) -> None:
        self.edited = {one.site.layer: one for one in edited}
        self.layers = tuple(self.edited)
        if len(self.layers) != len(edited):
            raise SettingError(f"two changes of one layer; the layers are {', '.join(self.layers)}")

    def activations(self, context: Context, hidden: Tensor) -> Tensor:
        """``x'`` for the texts that the error picks out, ``x`` for the others."""
        one = self.edited[context.layer]
        read = one.of(hidden_rows(one.site, context, hidden))
        spoken = read.errors >= one.threshold
        if not bool(spoken.any()):
            return hidden
        return torch.where(spoken[:, None, None], read.hidden.to(hidden.dtype), hidden)
