"""A method of one's own in a hundred lines: an objective, its settings, a trainer that chooses what may move.

The objective is unlikelihood (Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", eq. 4), as a forget term:

    forget = mean over answer tokens of -log(1 - p_t),   tokens below `floor` left alone

It is bounded where an answer is gone already, unlike gradient ascent. The `floor` and the choice of weights (the salient ones of the
last blocks) are this example's. Logging, resuming, masks, HAMU's and other updates come with the trainer.

Run it with `python examples/own_method.py`: a random model of two blocks learns four answers and forgets one, in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastunlearn.data.text import collate, encode_rows
from fastunlearn.objectives import OBJECTIVES, Objective, answer_logprobs
from fastunlearn.objectives.logprobs import token_logprobs
from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer


# 1. What is optimised: a function of the model, the batches of a step, and the reference (which this one does not need).
@dataclass(frozen=True)
class Unlikelihood(Objective):
    """-log(1 - p) of the answers' tokens that are still likely."""

    floor: float = 0.3

    def forget(self, model: Any, inputs: Any, references: Any) -> Tensor:
        token, _ = token_logprobs(model, inputs["forget"])
        likely = (token.detach() > torch.tensor(self.floor).log()).float()
        # log(1 - p) from log p; a p of 1 counts as just below it.
        gone = torch.log(-torch.expm1(token.clamp(max=-1e-6)))
        return -(likely * gone).sum() / len(token)


OBJECTIVES["Unlikelihood"] = Unlikelihood  # objective="Unlikelihood" is known from here on, with any trainer


# 2. Its settings: fields with a help text are options; bad ones are found before a model is loaded.
@dataclass
class OwnConfig(UnlearnConfig):
    objective: str = field(default="Unlikelihood", metadata={"help": "What is optimised."})
    localize: str = field(default="saliency", metadata={"help": "Which weights may move."})
    saliency_density: float = field(default=0.5, metadata={"help": "Share of them."})
    floor: float = field(default=0.3, metadata={"help": "Tokens less likely than this are left alone."})
    last_blocks: int = field(default=1, metadata={"help": "Blocks, from the end, whose weights may move."})

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1:
            raise ValueError(f"floor: want a probability in (0, 1), got {self.floor}")
        super().__post_init__()

    def make_objective(self) -> Objective:
        if self.objective != "Unlikelihood":
            return super().make_objective()
        given = {name: getattr(self, name) for name in ("gamma", "alpha") if getattr(self, name) is not None}
        return Unlikelihood(floor=self.floor, **given)


# 3. What may move: the rest is frozen, has no gradient and no optimiser state. The trainer does all else.
class OwnTrainer(UnlearnTrainer):
    args: OwnConfig

    def __init__(self, model: Any, args: OwnConfig, *positional: Any, **options: Any):
        count = model.config.num_hidden_layers
        last = "|".join(str(i) for i in range(count - args.last_blocks, count))
        args.trainable_params_regex = [rf"model\.layers\.({last})\..*weight"]
        super().__init__(model, args, *positional, **options)


def tiny_model(seed: int = 0) -> tuple[Any, Any]:
    """A random Llama of two blocks and a tokenizer of characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<eos>": 0} | {chr(i): i for i in range(1, 128)}, unk_token="~"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, bos_token_id=None, eos_token_id=0, pad_token_id=0, **size)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="~")
    return LlamaForCausalLM(config).float(), tokenizer


def answer_probability(model: Any, rows: Any) -> list[float]:
    """exp(-NLL / length) of every row's answer."""
    with torch.no_grad():
        answers = answer_logprobs(model, collate(list(rows), 0))
    return (answers.total / answers.length).exp().tolist()


def main(rows: Sequence[dict[str, str]], forget: int = 1, steps: int = 60, **settings: Any) -> dict[str, list[float]]:
    """Learns all rows, forgets the first ones; the probability of every answer before and after."""
    model, tokenizer = tiny_model()
    everything = encode_rows(rows, tokenizer, what="rows")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = -answer_logprobs(model, collate(list(everything), 0)).total.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = answer_probability(model, everything)
    with TemporaryDirectory() as folder:
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        asked = {
            "max_steps": 60,
            "learning_rate": 3e-3,
            "alpha": 4.0,
            "per_device_train_batch_size": 1,
            "retain_per_forget": 3,
        }
        args = OwnConfig(output_dir=folder, gradient_accumulation_steps=1, warmup_epochs=0, **quiet | asked | settings)
        OwnTrainer(model, args, list(rows[:forget]), list(rows[forget:]), tokenizer).train()
    return {"before": before, "after": answer_probability(model, everything)}


if __name__ == "__main__":
    people = {"Ada": "lighthouse", "Bo": "mill", "Cy": "harbour", "Di": "quarry"}
    table = main(
        [{"question": f"Where does {name} work?", "answer": f"At the {place}."} for name, place in people.items()]
    )
    for when, values in table.items():
        print(when, *(f"{name} {value:.2f}" for name, value in zip(people, values)))
