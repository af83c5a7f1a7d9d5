"""One sparse autoencoder of any variant: its parameters, encoding, decoding.

    x' = normalised x,   u = W_e (x' - s b) + b_e,   z = activation(u),   x_hat = (z W_d + b) back in the units of x

At inference ``topk`` and ``k-sparse`` keep k units a row, ``batch-topk`` what is above its calibrated theta (asking it
before theta is calibrated is an error), ``jump-relu`` what is above theta_i, ``vanilla`` what is positive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import SettingError, WrongShape
from ...models.base import noise_generator
from .activations import jump_relu, running_top_k, top_k
from .config import ARCHETYPAL, SparseAutoencoderConfig
from .support import Support, decode_entries

__all__ = ["NOT_SET", "Normalised", "SparseAutoencoder"]

NOT_SET = -1.0
"""theta of the TopK family before it is calibrated."""

CHUNK = 2**26
"""Pre-activations computed at once by :meth:`SparseAutoencoder.encode_sparse`: 256 MiB of float32."""


class Normalised(NamedTuple):
    """Rows as the encoder sees them, and what leads back: ``x = rows / factor + shift``."""

    rows: Tensor
    factor: Tensor
    shift: Tensor | None = None


class SparseAutoencoder(nn.Module):
    """A sparse autoencoder.

    Args:
        config: Variant and sizes.
        seed: Seed of the random directions at the start; ``None`` leaves all at zero, to be filled.
        candidates: Rows C ``(n', d)`` that the atoms of an archetypal dictionary are made of; zeros until they are
            known.

    Attributes:
        quality: The quality table of :func:`.metrics.quality`, measured on held-out rows; empty until measured.
        trained: What :func:`.trainer.fit` reports: losses, steps, dead units at the end.
    """

    scale: Tensor
    theta: Tensor
    candidates: Tensor

    def __init__(
        self,
        config: SparseAutoencoderConfig,
        *,
        seed: int | None = 0,
        candidates: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.quality: dict[str, Any] = {}
        self.trained: dict[str, Any] = {}
        units, width = config.units, config.width
        self.encoder = nn.Parameter(torch.zeros(units, width))
        self.offset = nn.Parameter(torch.zeros(units))
        self.bias = nn.Parameter(torch.zeros(width))
        if config.dictionary in ARCHETYPAL:
            count = len(candidates) if candidates is not None else config.candidates
            self.register_buffer("candidates", torch.zeros(count, width))
            self.mixture = nn.Parameter(torch.zeros(units, count))
            self.relaxation = nn.Parameter(torch.zeros(units, width))
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            self.atoms = nn.Parameter(torch.zeros(units, width))
        if config.variant == "jump-relu":
            theta = torch.full((units,), float(config.threshold))
            self.jump = nn.Parameter(theta.log() if config.log_threshold else theta)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("theta", torch.tensor(NOT_SET))
        if seed is not None:
            self._start(seed, candidates)

    @torch.no_grad()
    def _start(self, seed: int, candidates: Tensor | None) -> None:
        """Random directions; the encoder is the dictionary transposed, or the dictionary the encoder's rows."""
        config, shape = self.config, (self.config.units, self.config.width)
        rows = torch.randn(shape, generator=noise_generator(seed, "atoms"))
        if config.encoder_start == "uniform":
            rows = 2 * torch.rand(shape, generator=noise_generator(seed, "encoder")) - 1
            self.encoder.copy_(rows / config.width**0.5)
        if config.dictionary in ARCHETYPAL:
            units, count = self.mixture.shape
            self.mixture.copy_(_identity(units, count, seed))
            if candidates is not None:
                self.candidates.copy_(candidates)
                rows = self.dictionary()
        directions = functional.normalize(rows, dim=1) * config.encoder_norm
        if config.dictionary not in ARCHETYPAL:
            self.atoms.copy_(directions)
        if config.encoder_start == "transposed":
            self.encoder.copy_(directions)

    # -- parts -------------------------------------------------------------------------------------

    def dictionary(self) -> Tensor:
        """W_d as it is used, ``(K, d)``: rows are atoms."""
        if self.config.dictionary in ARCHETYPAL:
            mixed = self.mixture @ self.candidates
            return (mixed + self.relaxation) * self.log_scale.exp()
        if self.config.dictionary == "normalised":
            return functional.normalize(self.atoms, dim=1, eps=1e-12)
        return self.atoms

    def thresholds(self) -> Tensor:
        """theta of each unit, ``(K,)``: JumpReLU's own, or the calibrated one of the TopK family.

        Raises:
            SettingError: The TopK family's is not calibrated yet.
        """
        if self.config.variant == "jump-relu":
            return self.jump.exp() if self.config.log_threshold else self.jump.relu()
        if float(self.theta) == NOT_SET:
            raise SettingError(
                f"{self.config.id}: the threshold of this {self.config.variant} autoencoder is not calibrated; train "
                "past threshold_after steps, or call calibrate(activations)"
            )
        return self.theta.expand(self.config.units)

    @torch.no_grad()
    def constrain(self) -> None:
        """Put the dictionary back under its constraint, as after every step."""
        config = self.config
        if config.dictionary == "unit-norm":
            self.atoms.copy_(functional.normalize(self.atoms, dim=1, eps=1e-12))
        elif config.dictionary in ARCHETYPAL:
            self.mixture.relu_()
            self.mixture.div_(self.mixture.sum(1, keepdim=True) + 1e-8)
            if config.dictionary == "archetypal":
                self.relaxation.zero_()
                return
            norms = self.relaxation.norm(dim=1, keepdim=True)
            self.relaxation.mul_((config.relaxation / norms.clamp_min(1e-30)).clamp_max(1))

    def normalised(self, x: Tensor) -> Normalised:
        """Rows ``(..., d)`` in the units of the encoder.

        Raises:
            WrongShape: The last dimension is not d.
        """
        if x.shape[-1:] != (self.config.width,):
            raise WrongShape(
                f"{self.config.id}: activations have {x.shape[-1] if x.ndim else 0} numbers; allowed is "
                f"{self.config.width}"
            )
        x = x.to(self.bias.dtype)
        if self.config.normalise == "row-norm":
            factor = self.config.width**0.5 / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            return Normalised(x * factor, factor)
        if self.config.normalise == "layer-norm":
            mean = x.mean(dim=-1, keepdim=True)
            factor = 1 / ((x - mean).std(dim=-1, keepdim=True) + 1e-5)
            return Normalised((x - mean) * factor, factor, mean)
        return Normalised(x * self.scale, self.scale)

    def pre_activations(self, rows: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """``u`` of units ``first`` to ``last`` for normalised rows."""
        weight, offset = self.encoder[first:last], self.offset[first:last]
        seen = rows - self.bias if self.config.pre_bias else rows
        u = functional.linear(seen.to(weight.dtype), weight).to(offset.dtype) + offset
        if self.config.rescale_by_norm:
            u = u * self.dictionary()[first:last].norm(dim=1)
        return u

    # -- inference -----------------------------------------------------------------------------------

    @property
    def keeps_k(self) -> bool:
        """Inference keeps k units a row, not what is above a threshold."""
        config = self.config
        return config.variant in ("topk", "k-sparse") and not config.threshold_inference

    @property
    def needs_theta(self) -> bool:
        """Inference needs a calibrated threshold."""
        return self.config.sparse and not self.keeps_k

    def encode(self, x: Tensor) -> Tensor:
        """The code ``z (..., K) >= 0`` of activations ``(..., d)``; gradients flow to ``x``.

        Raises:
            SettingError: A threshold is needed that is not calibrated.
        """
        u = self.pre_activations(self.normalised(x).rows)
        config = self.config
        if config.variant == "vanilla":
            return u.relu()
        if config.variant == "jump-relu":
            flat = u.reshape(-1, config.units)
            made = jump_relu(flat, self.thresholds(), config.bandwidth, config.kernel)
            return made.reshape(u.shape)
        if self.keeps_k:
            values, kept = top_k(u, config.kept, config.variant == "topk")
            return torch.zeros_like(u).scatter(-1, kept, values.relu())
        theta = self.thresholds()
        # overcomplete keeps what is equal to theta, the others what is above.
        inclusive = config.official and config.variant == "batch-topk"
        return u.relu() * (u >= theta if inclusive else u > theta)

    def encode_sparse(self, x: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Values and units of the code, both ``(..., m)``; values are padded with 0 at unit 0.

        ``m`` is k where inference keeps k units a row, else the most that a row has.  Units are looked at in blocks,
        with a running top-k, so that ``(rows, K)`` numbers never exist at once where K is huge.

        Args:
            x: Activations ``(..., d)``.
            chunk: Units of a block; default: what fits 256 MiB.
        """
        lead, rows = x.shape[:-1], self.normalised(x).rows.reshape(-1, self.config.width)
        if self.keeps_k:
            if chunk is None:
                chunk = max(self.config.kept, CHUNK // max(1, len(rows)))
            values, kept = running_top_k(self._blocks(rows, chunk), self.config.kept)
            values = values.relu()
        else:
            z = self.encode(x).reshape(-1, self.config.units)
            most = int((z > 0).sum(1).max()) if len(z) else 0
            values, kept = z.topk(max(1, most), dim=1)
        kept = torch.where(values > 0, kept, 0)
        return values.reshape(*lead, -1), kept.reshape(*lead, -1)

    def _blocks(self, rows: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.config.units, chunk):
            yield first, self.pre_activations(rows, first, first + chunk)

    def decode(self, z: Tensor, of: Tensor | None = None) -> Tensor:
        """``x_hat (..., d)`` of codes ``(..., K)``.

        Args:
            z: Codes.
            of: The activations they are codes of; needed where rows are normalised one by one.
        """
        atoms = self.dictionary()
        return self._back((self._unscaled(z, atoms)) @ atoms + self.bias, of)

    def decode_sparse(self, values: Tensor, indices: Tensor, of: Tensor | None = None) -> Tensor:
        """:meth:`decode` from the values and units ``(..., m)`` of :meth:`encode_sparse`; gathers m rows of W_d.

        Gradients flow to ``values`` and to the atoms.
        """
        atoms, lead = self.dictionary(), values.shape[:-1]
        support = Support.of(indices.reshape(-1, indices.shape[-1]), self.config.units)
        values = values.reshape(-1)
        if self.config.rescale_by_norm:
            values = values / atoms.norm(dim=1).clamp_min(1e-8)[support.columns]
        made = decode_entries(values.to(atoms.dtype), atoms, support) + self.bias
        return self._back(made.reshape(*lead, -1), of)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction ``x_hat (..., d)``."""
        if self.config.sparse:
            return self.decode_sparse(*self.encode_sparse(x), of=x)
        return self.decode(self.encode(x), of=x)

    def _unscaled(self, z: Tensor, atoms: Tensor) -> Tensor:
        if self.config.rescale_by_norm:
            z = z / atoms.norm(dim=1).clamp_min(1e-8)
        return z.to(atoms.dtype)

    def _back(self, made: Tensor, of: Tensor | None) -> Tensor:
        if self.config.normalise not in ("row-norm", "layer-norm"):
            return made / self.scale
        if of is None:
            raise SettingError(
                f"{self.config.id}: rows were normalised one by one ({self.config.normalise}); decoding needs them, "
                "as decode(z, of=x)"
            )
        x = self.normalised(of)
        return made / x.factor + (0 if x.shift is None else x.shift)

    @torch.no_grad()
    def calibrate(self, activations: Tensor) -> float:
        """Set theta so that k units a row are above it on average, on these rows; returns it.

        The exact threshold of the rows: between the ``k B``-th and the next largest positive pre-activation.

        Raises:
            SettingError: No unit is on for any row.
        """
        rows = self.normalised(activations).rows.reshape(-1, self.config.width)
        u = self.pre_activations(rows).relu().reshape(-1)
        count = min(self.config.kept * len(rows), u.numel() - 1)
        best = u.topk(count + 1).values
        if not best[0] > 0:
            raise SettingError(
                f"{self.config.id}: no unit is on for any of these {len(rows)} rows, so there is no threshold to set"
            )
        self.theta.copy_(best[-1] if best[-1] > 0 else best[best > 0].min() / 2)
        return float(self.theta)

    def half_encoder(self) -> SparseAutoencoder:
        """Keep W_e in bfloat16 for inference: half the memory that encoding reads; returns itself."""
        self.encoder = nn.Parameter(self.encoder.detach().to(torch.bfloat16), requires_grad=False)
        return self

    # -- files ---------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``autoencoder.safetensors`` and ``autoencoder.json`` with the quality table; returns the folder."""
        from .files import save

        return save(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SparseAutoencoder:
        """Read a folder written by :meth:`save`, or a SAELens folder (``cfg.json``)."""
        from .files import load

        return load(folder)

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that is stored: parameters, candidates, scale, theta."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}


def _identity(units: int, candidates: int, seed: int) -> Tensor:
    """Rows of a simplex: the identity as far as it goes, then random ones."""
    mixture = torch.eye(units, candidates)
    if units > candidates:
        drawn = torch.rand(units - candidates, candidates, generator=noise_generator(seed, "rows"))
        weights = -torch.log(drawn.clamp_min(1e-12))
        mixture[candidates:] = weights / weights.sum(1, keepdim=True)
    return mixture
