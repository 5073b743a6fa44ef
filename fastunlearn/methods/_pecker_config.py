"""Settings of PECKER: what its abstract leaves open is an option here, with the default of SFD's runs or of SalUn's mask."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from fastunlearn.arguments import bf16_on_cpu, check_steps
from fastunlearn.localize.granularity import check_granularity
from fastunlearn.objectives.language import closest
from fastunlearn.objectives.score_distillation import SALIENCY_LOSSES, SALIENCY_SUMS

METHODS = ("pecker", "sfd", "gradient_ascent", "sid")
_CHOICES = {
    "method": METHODS, "stages": ("two", "single"), "saliency_loss": SALIENCY_LOSSES, "saliency_reduce": SALIENCY_SUMS,
    "mask_values": ("hard", "soft"), "mask_networks": ("generator", "both"), "mask_terms": ("all", "forget"),
}  # fmt: skip
_ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class PECKERConfig(TrainingArguments):
    """Arguments of `PECKERTrainer`. None: the value of SFD's runs, for class-conditional models or for text-to-image ones."""

    method: str = field(default="pecker", metadata={"help": "pecker, or a baseline: sfd, gradient_ascent, sid."})
    stages: str = field(
        default="two",
        metadata={"help": "two: forgetting starts from a one-step generator; single: from the model itself."},
    )
    density: float = field(default=0.5, metadata={"help": "Share of the units that may move (reconstruction)."})
    granularity: str = field(
        default="weight", metadata={"help": "Units of the mask: weight, tile, row, module (reconstruction)."}
    )
    block: int = field(default=128, metadata={"help": "Side of a tile: 128 or 64."})
    freeze_below: float = field(
        default=0.0, metadata={"help": "Tensors of which a smaller share may move are frozen as a whole."}
    )
    saliency_loss: str = field(
        default="sid", metadata={"help": "Whose gradient is looked at: sid (the forget term), denoising (SalUn's)."}
    )
    saliency_reduce: str = field(
        default="signed", metadata={"help": "Of batches: signed, |sum of g|; abs, sum of |g| (SPARE's)."}
    )
    saliency_batches: int = field(default=20, metadata={"help": "Batches of generated images that saliency sees."})
    mask_values: str = field(
        default="hard", metadata={"help": "hard: 0 or 1; soft: |g| / max |g|, on the update or on the forget term."}
    )
    mask_networks: str = field(default="generator", metadata={"help": "What the mask is put on: generator, both."})
    mask_terms: str = field(default="all", metadata={"help": "Whose gradient is masked: all terms, or forget alone."})
    refresh_every: int = field(default=0, metadata={"help": "Iterations after which the mask is taken anew; 0: never."})
    k_retain: float = field(default=1.0, metadata={"help": "Factor of the retain term, of both networks."})
    k_forget: float | None = field(default=None, metadata={"help": "Of the forget term (classes 0.01, text 1)."})
    sid_alpha: float | None = field(default=None, metadata={"help": "alpha of SiD (classes 1.2, text 1)."})
    t_min: int | None = field(default=None, metadata={"help": "Least noise, of 1000 steps (classes 38, text 20)."})
    t_init: int | None = field(default=None, metadata={"help": "Where the generator starts (440; 625)."})
    t_max: int | None = field(default=None, metadata={"help": "Most noise (712; 980)."})
    kappa: float | None = field(default=None, metadata={"help": "Guidance of both scores (classes 1: none, text 4.5)."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of the generator (1e-5; text 1e-6)."})  # type: ignore[assignment]
    pseudo_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the pseudo-score (two stages 3e-5, single 1e-5; text 3e-6)."}
    )
    clip_value: float | None = field(
        default=1.0, metadata={"help": "Gradients are cut to [-this, this], after the mask."}
    )
    ema_decay: float | None = field(default=None, metadata={"help": "Of the average that is saved (0.9999; text 0)."})
    forget_batch_size: int | None = field(
        default=None,
        metadata={"help": "Images of the forget terms (per_device_train_batch_size, as of the retain terms)."},
    )
    max_steps: int = field(default=50_000, metadata={"help": "Iterations of both networks."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of the retain terms (text: 8)."})
    weight_decay: float = field(default=0.0, metadata={"help": "Decoupled weight decay of both networks."})
    adam_beta1: float = field(default=0.0, metadata={"help": "Of both optimisers."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "0: gradients are cut by value (clip_value), not by norm."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Of both learning rates."})
    save_strategy: str = field(default="steps", metadata={"help": "When to save a checkpoint: no, steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    stochastic_rounding: bool = field(default=True, metadata={"help": "Round bf16 weights at random."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into a folder that holds something already."}
    )

    def __post_init__(self) -> None:
        bf16_on_cpu(self)
        asked, self.learning_rate = self.learning_rate, 0.0 if self.learning_rate is None else self.learning_rate
        super().__post_init__()
        self.learning_rate = asked
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is unknown; {closest(str(getattr(self, name)), list(known))}"
                )
        check_granularity(self.granularity, self.block)
        if not 0 < self.density <= 1:
            raise ValueError(f"density: want a number in (0, 1], got {self.density}")
        for name, least in (
            ("saliency_batches", 1), ("refresh_every", 0), ("max_steps", 1), ("k_retain", 0), ("freeze_below", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}: want at least {least}, got {getattr(self, name)}")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps: two networks take turns every iteration; want 1, got {self.gradient_accumulation_steps}"
            )
        check_steps(self)
        if self.learning_rate is not None and not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: want a finite number >= 0, got {self.learning_rate}")
        if self.clip_value is not None and not self.clip_value > 0:
            raise ValueError(f"clip_value: want a positive number or None, got {self.clip_value}")
        if self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm: gradients are cut by value here, see clip_value; want 0, got {self.max_grad_norm}"
            )
        chosen = str(getattr(self.optim, "value", self.optim))
        if chosen not in _ADAMW:
            raise ValueError(f"optim: both networks take steps of AdamW; want {' or '.join(_ADAMW)}, got {chosen}")
        if self.refresh_every and (self.adam_beta1 or self.weight_decay):
            raise ValueError(
                "refresh_every: a weight that leaves the mask would go on moving by momentum or decay; want adam_beta1=0, weight_decay=0"
            )
        if self.refresh_every and self.mask_values == "soft" and self.mask_terms == "all":
            raise ValueError(
                "refresh_every: mask_values=soft would scale gradients there, and Adam divides any scale out again: it has no effect; "
                "want mask_values=hard, refresh_every=0 (soft on the update) or mask_terms=forget (soft between the terms)"
            )
        if self.fp16:
            raise ValueError("fp16: two optimisers take turns, one loss scale does not serve both; use bf16")
        # Draws come from the seed and the iteration: a resumed run needs nothing to be skipped.
        self.remove_unused_columns, self.ignore_data_skip = False, True

    @property
    def masked(self) -> bool:
        return self.method == "pecker"
