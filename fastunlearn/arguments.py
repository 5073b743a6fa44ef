"""TwoTermConfig: the arguments of a run with a forget and a retain term, and what every trainer wants of its arguments."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from fastunlearn.foreign import check_liger, check_trainer_options
from fastunlearn.objectives.language import closest
from fastunlearn.updates import Update, make_update

LOCALIZE = ("all", "saliency")
#: trackers of which transformers says whether they are installed
_TRACKERS = {
    "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb",
}  # fmt: skip


@dataclass
class TwoTermConfig(TrainingArguments):
    """Arguments of `TwoTermTrainer`: transformers' TrainingArguments and what no kind of data changes.

    An epoch is one pass over the forget set; per_device_train_batch_size counts forget rows.
    """

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay (not on biases and norms)."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the forget set."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Forget rows of one forward pass."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Forward passes of one step."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    warmup_epochs: float = field(
        default=1.0, metadata={"help": "Epochs of linear warm-up, unless warmup_steps is given."}
    )
    update: str = field(
        default="sum", metadata={"help": "How the two gradients become one: sum, hamu-q, hamu-u, pcgrad or gru."}
    )
    hamu_share: float | None = field(
        default=None,
        metadata={
            "help": "Q (hamu-u: U) of a step as a share of the most its trust ball holds (0.5 unless ratio or q is given)."
        },
    )
    hamu_ratio: float | None = field(
        default=None, metadata={"help": "Q (U) / learning_rate, of clipped gradients, as in the paper (0.5 there)."}
    )
    hamu_q: float | None = field(default=None, metadata={"help": "Q (U) of a step."})
    hamu_scope: str = field(
        default="tensor", metadata={"help": "A trust ball for every tensor, or one: tensor, global."}
    )
    hamu_allocation: str | None = field(
        default=None, metadata={"help": "Of Q to tensors: norms (the paper's), joint (the best); joint for groups."}
    )
    hamu_rule: str = field(default="exact", metadata={"help": "When a step is flagged: exact, or paper (sufficient)."})
    hamu_base: str = field(
        default="sgd", metadata={"help": "What takes the step: sgd; adamw passes it on, and the guarantee is void."}
    )
    hamu_geometry: str = field(
        default="euclidean",
        metadata={
            "help": "Of trust balls: euclidean (the paper's), or adam (a reconstruction): short where gradients are large."
        },
    )
    on_flag: str = field(
        default="log",
        metadata={"help": "Where retain damage cannot be avoided: log, stop, or backtrack (halve steps)."},
    )
    on_infeasible: str = field(
        default="stop",
        metadata={"help": "Where a trust ball does not hold Q: stop, error, or largest (as much as it holds)."},
    )
    retain_groups: str | None = field(
        default=None, metadata={"help": "Column of the retain rows that names their group: HAMU keeps each by itself."}
    )
    retain_budgets: list[float] | None = field(
        default=None,
        metadata={
            "help": "By how much the retain term of each group may grow in a step (of all rows, without groups)."
        },
    )
    certificate_every: int = field(
        default=10, metadata={"help": "Steps between two checks of a certificate against the losses, in fp32; 0: none."}
    )
    gru_ema: float = field(default=0.8, metadata={"help": "Share of the new gradient in update=gru's retain mean."})
    localize: str = field(
        default="all",
        metadata={"help": "Which weights may move: all (that the masks of a pruned model leave), or saliency."},
    )
    saliency_density: float = field(
        default=0.05, metadata={"help": "Share of weights that localize=saliency lets move."}
    )
    trainable_params_regex: list[str] | None = field(
        default=None, metadata={"help": "Only parameters whose whole name one of these matches may move."}
    )
    retain_per_forget: int = field(default=1, metadata={"help": "Retain rows for each forget row of a batch."})
    stochastic_rounding: bool = field(
        default=True, metadata={"help": "Round bf16 weights at random: steps below a bf16 place are not lost."}
    )
    master_weights: bool = field(default=False, metadata={"help": "Keep fp32 copies of 16-bit weights that may move."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Write into a folder that holds something already."}
    )

    def __post_init__(self) -> None:
        bf16_on_cpu(self)
        super().__post_init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            update = make_update(self.update, self)
        self._check_update(update)
        if self.localize not in LOCALIZE:
            raise ValueError(f"localize: {self.localize!r} is unknown; {closest(str(self.localize), list(LOCALIZE))}")
        if not 0 < self.saliency_density <= 1:
            raise ValueError(f"saliency_density: want a number in (0, 1], got {self.saliency_density}")
        if self.retain_per_forget < 1:
            raise ValueError(f"retain_per_forget: want at least 1, got {self.retain_per_forget}")
        for name in ("warmup_epochs", "learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: want a finite number >= 0, got {getattr(self, name)}")
        check_steps(self)
        # The Trainer would drop the columns it does not know: all of ours.
        self.remove_unused_columns = False
        check_liger(self)
        check_trainer_options(self)

    def missing_retain_term(self) -> str | None:
        """None where the loss has a retain term; else what has none and how it gets one, for an error."""
        raise NotImplementedError

    def _check_update(self, update: Update) -> None:
        if self.certificate_every < 0:
            raise ValueError(f"certificate_every: want a number >= 0, got {self.certificate_every}")
        missing = self.missing_retain_term()
        if update.separate and missing is not None:
            raise ValueError(f"update: {self.update} needs a retain term; {missing}")
        hamu = self.update.startswith("hamu")
        for name in ("retain_groups", "retain_budgets"):
            if getattr(self, name) is not None and not hamu:
                raise ValueError(f"{name}: is for update=hamu-q and hamu-u, not {self.update}")
        if update.unscaled and (self.fp16 or getattr(self, "mixed_precision", None) == "fp16"):
            raise ValueError(
                f"fp16: update={self.update} computes with gradients that no loss scaler has touched; use bf16 (bf16=true)"
            )
        if update.takes_step and self.master_weights:
            raise ValueError(f"master_weights: update={self.update} rounds bf16 weights at random instead")


def bf16_on_cpu(args: Any) -> None:
    """use_cpu where bf16 is asked for and there is nothing but a CPU: transformers refuses it otherwise."""
    if args.bf16 and not torch.accelerator.is_available():
        args.use_cpu = True


def check_steps(args: Any) -> None:
    """What every trainer wants of TrainingArguments, before a model is loaded.

    Raises:
        ValueError: a batch size or accumulation below 1, a seed that there is not, no epochs and no steps, a tracker that is not
            installed.
    """
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: want at least 1, got {getattr(args, name)}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"seed: want a number from 0 to 2**32 - 1, got {args.seed}")
    if not args.num_train_epochs > 0 and args.max_steps <= 0:
        raise ValueError(f"num_train_epochs: want a number > 0, or max_steps, got {args.num_train_epochs}")
    # Raises for a name it does not know.
    get_reporting_integration_callbacks(args.report_to)
    missing = (_TRACKERS & set(args.report_to)) - set(get_available_reporting_integrations())
    if missing:
        raise ValueError(f"report_to: {', '.join(sorted(missing))} is not installed; install it, or report_to=none")
