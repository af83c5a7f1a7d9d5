"""Everything that says which sparse autoencoder it is and how it is trained, with the defaults of four libraries.

Symbols of the package: ``d`` width of an activation, ``K`` number of units, ``B`` rows of a batch; ``W_e (K, d)``,
``b_e (K)``, ``W_d (K, d)`` whose ROWS are the atoms, ``b (d)``; ``s`` is 1 where the pre-bias is subtracted;

    u = W_e (x - s b) + b_e,    z = activation(u) >= 0 (B, K),    x_hat = z W_d + b
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import SettingError
from ...method import Method, setting

__all__ = ["ARCHETYPAL", "PRESETS", "SparseAutoencoderConfig"]

ARCHETYPAL = ("archetypal", "relaxed-archetypal")
"""Dictionaries made of candidate rows."""

_DICTIONARY_LEARNING = {"warm_up": 1000, "clip": 1.0}
_TOPK = {**_DICTIONARY_LEARNING, "auxiliary": "auxk", "betas": (0.9, 0.999)}
_SAE_LENS = {
    "lr": 3e-4, "warm_up": 0, "clip": None, "batch": 4096, "dictionary": "free", "encoder_norm": 0.1,
    "pre_bias": True, "start_bias": "zero", "normalise": "mean-norm",
}  # fmt: skip
_OVERCOMPLETE = {
    "lr": 5e-4, "schedule": "cosine", "warm_up": 1000, "clip": None, "batch": 1024, "k": None,
    "dictionary": "normalised", "pre_bias": False, "bias": False, "start_bias": "zero",
    "encoder_start": "uniform", "reconstruction": "mean", "normalise": "none",
}  # fmt: skip
_UNBOXED = {
    "variant": "k-sparse", "lr": 1e-4, "adam_eps": 6.25e-10, "warm_up": 1000, "auxiliary": "auxk-k-sparse",
    "aux_k": 256, "fired_above": 1e-3, "median_rows": 32_768, "median_tolerance": 1e-20, "encoder_start": "uniform",
    "reconstruction": "variance", "clip": None, "normalise": "none",
}  # fmt: skip

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dictionary-learning:vanilla": {
        **_DICTIONARY_LEARNING, "variant": "vanilla", "lr": 1e-3, "l1": 0.1, "sparsity_warm_up": 2000,
        "auxiliary": "none", "encoder_norm": 0.1, "clip": None,
    },
    "dictionary-learning:topk": {**_TOPK, "variant": "topk"},
    "dictionary-learning:batch-topk": {**_TOPK, "variant": "batch-topk"},
    "dictionary-learning:jump-relu": {
        **_DICTIONARY_LEARNING, "variant": "jump-relu", "lr": 7e-5, "betas": (0.0, 0.999), "l0_target": 20.0,
        "l0_weight": 1.0, "sparsity_warm_up": 2000, "auxiliary": "none", "pre_bias": False, "start_bias": "zero",
        "log_threshold": False,
    },
    "sae-lens:standard": {**_SAE_LENS, "variant": "vanilla", "l1": 1.0, "l1_by_norm": True, "auxiliary": "none"},
    "sae-lens:topk": {**_SAE_LENS, "variant": "topk", "k": 100, "rescale_by_norm": True, "auxiliary": "auxk-unscaled",
                      "aux_weight": 1.0},
    "sae-lens:batch-topk": {**_SAE_LENS, "variant": "batch-topk", "k": 100, "rescale_by_norm": True,
                            "auxiliary": "auxk-unscaled", "aux_weight": 1.0, "threshold_decay": 0.99,
                            "threshold_after": -1, "threshold_from_zero": True},
    "sae-lens:jump-relu": {**_SAE_LENS, "variant": "jump-relu", "l0_target": None, "l0_weight": 1.0,
                           "sparsity_warm_up": 0, "threshold": 0.01, "bandwidth": 0.05, "auxiliary": "none"},
    "overcomplete:topk": {**_OVERCOMPLETE, "variant": "topk", "auxiliary": "residual", "aux_weight": 0.1},
    "overcomplete:batch-topk": {**_OVERCOMPLETE, "variant": "batch-topk", "auxiliary": "residual", "aux_weight": 0.1,
                                "threshold_decay": 0.9, "threshold_after": -1},
    "overcomplete:jump-relu": {**_OVERCOMPLETE, "variant": "jump-relu", "l0_target": None, "l0_weight": 1.0,
                               "sparsity_warm_up": 0, "threshold": math.exp(-3), "bandwidth": 0.001,
                               "kernel": "silverman", "auxiliary": "reanimation", "aux_weight": 1e-3},
    "overcomplete:ra-topk": {**_OVERCOMPLETE, "variant": "topk", "dictionary": "relaxed-archetypal",
                             "auxiliary": "residual", "aux_weight": 0.1},
    "itd": {**_UNBOXED, "k": 64, "batch": 50 * 77, "tokens_an_item": 77},
    "sdxl": {**_UNBOXED, "k": 10, "batch": 4096},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SparseAutoencoderConfig(Method):
    """Variant, sizes and training of one sparse autoencoder.

    Defaults are a TopK autoencoder as in dictionary_learning, without warm-up and clipping.  A preset takes all
    of a library's, ``configured("dictionary-learning:topk", width=768, units=4096)``; what it leaves open (``k``,
    ``batch``, ``steps``) keeps the default here.

    With ``compat="official"`` known slips of published code are followed:

    ============= ======================================================================================
    jump-relu     the kernel of the L0 penalty looks at kept values, so half of its window is silent
                  (dictionary_learning)
    batch-topk    ``k`` is the number over the whole batch, and values equal to theta are kept (overcomplete)
    k-sparse      atoms are renormalised before the step, not after it; silence is counted in steps, with a window of
                  ``dead_tokens / (batch / tokens_an_item)`` steps; the bias gets a gradient from the auxiliary loss
                  (ItD, SDXL)
    ============= ======================================================================================

    Raises:
        SettingError: A value out of range, or two settings that exclude each other.
    """

    id: ClassVar[str] = "sparse-autoencoders"
    title: ClassVar[str] = "Sparse autoencoders"
    source: ClassVar[str] = (
        "arXiv 2406.04093, 2412.06410, 2407.14435, 2502.12892; dictionary_learning, SAELens, overcomplete"
    )
    version: ClassVar[int] = 1
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    width: int = setting(0, "d: numbers of an activation", minimum=1)
    units: int = setting(0, "K: units, which is atoms of the dictionary", minimum=1)
    variant: str = setting(
        "topk", "What turns u into z",
        choices=("vanilla", "topk", "batch-topk", "jump-relu", "k-sparse"),
    )  # fmt: skip
    k: int | None = setting(
        32, "Units kept a row (batch-topk: on average); none: K / 10", minimum=1
    )  # fmt: skip
    pre_bias: bool = setting(True, "s: the encoder sees x - b")
    bias: bool = setting(True, "Train b; otherwise it is 0")
    dictionary: str = setting(
        "unit-norm", "unit-norm: after every step; normalised: at every call; free; or made of candidate rows",
        choices=("unit-norm", "normalised", "free", *ARCHETYPAL),
    )  # fmt: skip
    rescale_by_norm: bool = setting(False, "u times the norms of the atoms, z over them (SAELens)")
    relaxation: float = setting(1.0, "delta: largest norm of a relaxation row", minimum=0)
    candidates: int = setting(1024, "n': k-means centroids that atoms are made of", minimum=1)
    normalise: str = setting(
        "mean-square", "One factor for mean ||x||^2 = 1, or for mean ||x|| = sqrt(d); or row by row",
        choices=("mean-square", "mean-norm", "row-norm", "layer-norm", "none"),
    )  # fmt: skip
    # -- sparsity
    l1: float = setting(0.1, "Weight of mean_B sum z (vanilla)", minimum=0)
    l1_by_norm: bool = setting(False, "The penalty is sum z_i ||W_d,i||")
    l0_target: float | None = setting(
        20.0, "L0*: penalty (L0 / L0* - 1)^2; none: penalty L0", minimum=1e-6
    )  # fmt: skip
    l0_weight: float = setting(1.0, "Weight of the L0 penalty (jump-relu)", minimum=0)
    sparsity_warm_up: int = setting(0, "Steps over which the penalty rises from 0", minimum=0)
    threshold: float = setting(0.001, "theta at the start (jump-relu)", minimum=1e-12)
    log_threshold: bool = setting(True, "theta = exp(trained value)")
    bandwidth: float = setting(0.001, "eps: width of the straight-through kernel", minimum=1e-12)
    kernel: str = setting("rectangle", "K of the gradient", choices=("rectangle", "silverman"))
    # -- thresholds of the TopK family
    threshold_decay: float = setting(0.999, "Decay of the running theta", minimum=0, maximum=1)
    threshold_after: int = setting(
        1000, "theta runs at steps above this; -1: from the first", minimum=-1
    )  # fmt: skip
    threshold_from_zero: bool = setting(False, "theta starts at 0, not at its first value")
    threshold_inference: bool = setting(
        False, "topk and k-sparse, too, keep what is above theta at inference"
    )  # fmt: skip
    # -- dead units
    auxiliary: str = setting(
        "auxk", "What revives dead units",
        choices=("none", "auxk", "auxk-unscaled", "auxk-k-sparse", "residual", "reanimation"),
    )  # fmt: skip
    aux_weight: float = setting(1 / 32, "a_aux", minimum=0)
    aux_k: int | None = setting(None, "Dead units a row; none: d / 2 (residual: K / 2)", minimum=1)
    dead_tokens: int = setting(
        10_000_000, "T_dead: rows without firing after which a unit is dead", minimum=1
    )  # fmt: skip
    fired_above: float = setting(0.0, "k-sparse: a unit fired where its kept u is above this")
    tokens_an_item: int = setting(
        1, "Rows of one item of the official batch (ItD: a prompt of 77)", minimum=1
    )  # fmt: skip
    resample_steps: int | None = setting(
        None, "N: units silent for N/2 steps start anew every N steps", minimum=2
    )  # fmt: skip
    resample_scale: float = setting(
        0.2, "Norm of a new encoder row over the mean of the live ones", minimum=0
    )  # fmt: skip
    resample_unit: bool = setting(True, "x is normalised for the new encoder row (Anthropic)")
    # -- start
    encoder_start: str = setting(
        "transposed",
        "W_e at the start: the atoms, or uniform in 1 / sqrt(d)",
        choices=("transposed", "uniform"),
    )
    encoder_norm: float = setting(
        1.0, "Norm of the rows of W_e and W_d at the start", minimum=1e-12
    )
    start_bias: str = setting("median", "b at the start", choices=("median", "zero"))
    median_rows: int | None = setting(
        None, "Rows of the geometric median; none: one batch", minimum=1
    )  # fmt: skip
    median_tolerance: float = setting(1e-5, "The median stops where it moves less", minimum=0)
    # -- training
    steps: int = setting(1000, "Updates", minimum=1)
    batch: int = setting(1024, "B: rows of a batch", minimum=1)
    lr: float | None = setting(None, "Learning rate; none: 2e-4 / sqrt(K / 16384)", minimum=0)
    betas: tuple[float, ...] = setting(
        (0.9, 0.999), "Decays of Adam's moments", minimum=0, maximum=0.999999
    )  # fmt: skip
    adam_eps: float = setting(1e-8, "Adam's guard", minimum=0)
    warm_up: int = setting(0, "Steps over which the rate rises, from 0 at the first", minimum=0)
    schedule: str = setting(
        "constant", "After the warm-up", choices=("constant", "linear", "cosine")
    )  # fmt: skip
    clip: float | None = setting(None, "Largest norm of all gradients", minimum=1e-12)
    reconstruction: str = setting(
        "sum", "||x - x_hat||^2 summed over d, or its mean over d, or that over the variance of the first batch",
        choices=("sum", "mean", "variance"),
    )  # fmt: skip
    precision: str = setting("weights", "bfloat16: autocast", choices=("weights", "bfloat16"))
    compat: str = setting(
        "paper", "Follow the slips of official code", choices=("paper", "official")
    )  # fmt: skip
    site: str = setting("", "Where in the model the activations come from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse and self.kept > self.units:
            raise SettingError(
                f"{self.id}: k is {self.kept}; allowed is at most units, which is {self.units}"
            )
        if self.rescale_by_norm and self.variant not in ("topk", "batch-topk"):
            raise SettingError(f"{self.id}: rescale_by_norm is defined for topk, batch-topk")
        if len(self.betas) != 2:
            raise SettingError(f"{self.id}: betas are {len(self.betas)} numbers; allowed are two")

    @property
    def kept(self) -> int:
        """k: units kept a row."""
        return self.k if self.k is not None else max(1, self.units // 10)

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.units / 16384)

    @property
    def auxiliary_units(self) -> int:
        """k_aux before it is cut to the number of dead units."""
        if self.aux_k is not None:
            return self.aux_k
        return max(1, self.units // 2 if self.auxiliary == "residual" else self.width // 2)

    @property
    def official(self) -> bool:
        """Slips of published code are followed."""
        return self.compat == "official"

    @property
    def sparse(self) -> bool:
        """The number of units a row (or a batch) is fixed, so that training needs no dense z."""
        return self.variant in ("topk", "batch-topk", "k-sparse")
