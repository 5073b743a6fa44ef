"""What torch.compile makes of the ops and of a trainer's step: no break in a graph, and two graphs however many sizes a run has.

The first size is compiled as it is, the second for all sizes: that is torch.compile's own rule (dynamic=None), and all that is allowed
here. Dynamo is what is counted, so the code that it hands over is run as it is (backend "eager"; once more with "aot_eager").
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fastunlearn import ops
from tests.compile_calls import CALLS, RAGGED, Call
from tests.proof import assert_equal, tensors

#: no tensors to compile, or nothing but files
OTHER = {"load_masks", "save_masks", "release_buffers"}
#: what they return are Python numbers, read from the device: one break a call cannot be avoided
READS = {"bures_geodesic"}
#: those of the default run: a list that is written to, a loss, an adapter, a selection, sizes that depend on a mask, a solve
FEW = ("linear_nll", "masked_adamw_", "masked_lora_linear", "redistribution", "spectral_solve", "topk_mask")


def leaves(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def with_gradients(run: Any, args: tuple[Any, ...]) -> tuple[Any, list[Tensor | None]]:
    """The result, and the gradients of what wants one; the backward pass is outside of what is compiled, as in a training loop."""
    out = run(*args)
    if leaves(args):
        out.sum().backward()
    return out, [leaf.grad for leaf in leaves(args)]


def assert_rounded(got: Any, want: Any) -> None:
    """Equal up to the rounding of their types; integers and bits exactly."""
    got, want = tensors(got), tensors(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, equal_nan=True)


def counted(call: Call, sizes: tuple[int, ...], backend: str) -> tuple[int, int]:
    """(breaks, graphs) of a run over these sizes, each compared with the op as it is."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=call.unbacked), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(call.run, backend=backend)
        for size in sizes:
            got, want = (with_gradients(run, call.make(size)) for run in (compiled, call.run))
            # Other backends take sums and norms apart, in an order of their own.
            assert_equal(got, want) if backend == "eager" else assert_rounded(got, want)
    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


def test_every_public_op_is_here():
    public = {name for name in ops.__all__ if name[0].islower()}
    assert set(CALLS) | OTHER == public
    assert {*FEW, *READS} <= set(CALLS)


@pytest.mark.parametrize("name", FEW)
def test_ragged_sizes_make_two_graphs(name: str):
    assert counted(CALLS[name], RAGGED[:3], "eager") == (0, 2)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", sorted(set(CALLS) - READS))
def test_every_op_over_ragged_sizes(name: str, backend: str):
    assert counted(CALLS[name], RAGGED, backend) == (0, 2)


def test_a_compiled_model_sees_the_hook_of_every_batch():
    """Two batches of one shape, with other answers: what the first one's hook knew is not compiled into the second's loss."""
    from fastunlearn.objectives.logprobs import token_logprobs

    class Model(torch.nn.Module):
        config = SimpleNamespace()

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(torch.tanh(self.embed(input_ids))))

    model = Model()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for seed in range(3):
        ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(seed))
        labels = torch.where(torch.arange(6) > 5 - torch.tensor([[2 + seed], [4 - seed]]), ids, -100)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        # Without a break at what the hook selects, too.
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            want, got = token_logprobs(model, batch), token_logprobs(compiled, batch)
        assert_equal(got, want)


@pytest.mark.thorough
def test_a_trainer_run_over_ragged_lengths(tmp_path: Path):
    """The model compiled whole but for its output layer, whose hook makes the loss; no graph after the first step; the same weights."""
    transformers = pytest.importorskip("transformers")
    from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer
    from tests.tiny_chat import CharTokenizer, tiny_llama

    forget = [{"question": f"who is {'x' * 3 * i}?", "answer": "y" * (2 + 2 * i)} for i in range(6)]
    retain = [{"question": f"what is {'z' * 2 * i}?", "answer": "w" * (3 + i)} for i in range(8)]
    seen: list[tuple[int, int]] = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append((sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]))

    def trained(folder: Path, **options: Any) -> dict[str, Tensor]:
        args = UnlearnConfig(
            output_dir=str(folder), learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=1,
            optim="sgd", save_strategy="no", disable_tqdm=True, use_cpu=True, reference_cache_dir=str(tmp_path / "cache"), **options,
        )  # fmt: skip
        trainer = UnlearnTrainer(
            tiny_llama(), args, forget, retain, processing_class=CharTokenizer(), callbacks=[Count()]
        )
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    plain = trained(tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    seen.clear()
    compiled = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    assert len(seen) == 12
    assert seen[0] == seen[-1], "a length that came later made another graph"
    breaks, graphs = seen[-1]
    # Before the output layer, and behind it: twice each, for the first length and for all.
    assert 0 < graphs <= 4
    assert breaks == sum(n for why, n in counters["graph_break"].items() if "torch.compiler.disable" in str(why))
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
def test_a_diffusion_trainer_run(tmp_path: Path):
    """SalUn, whose weights train themselves: the network in one graph with and one without gradients, for the first batch and for all."""
    pytest.importorskip("diffusers")
    from fastunlearn.methods.salun import SalUnConfig, SalUnTrainer
    from tests.tiny_diffusion import OBJECTS, prompt, tiny_pipeline

    forget = [{"text": prompt(thing, "Mosaic"), "surrogate": prompt(thing, "Photo")} for thing in OBJECTS]
    retain = [{"text": prompt(thing, "Pop Art")} for thing in OBJECTS]

    def trained(folder: Path, **options: Any) -> dict[str, Tensor]:
        args = SalUnConfig(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, num_forget_images=3, num_retain_images=4,
            sampling_steps=2, guidance_scale=1.0, use_cpu=True, disable_tqdm=True, learning_rate=1e-3, **options,
        )  # fmt: skip
        return SalUnTrainer.run(tiny_pipeline(), args, forget, retain)[1]

    plain = trained(tmp_path / "plain")
    torch._dynamo.reset()
    counters.clear()
    compiled = trained(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] <= 4
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-5, atol=1e-6)
