"""Trainers, pruning and closed forms on a GPU that is not there (tests/pretend_gpu.py): nothing mixes devices."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.pretend_gpu import CUDA, Generator, pretended
from tests.tiny_chat import CharTokenizer, tiny_llama

pytest.importorskip("transformers")

FORGET = [{"question": f"who is {'x' * 3 * i}?", "answer": "y" * (2 + 2 * i)} for i in range(4)]
RETAIN = [{"question": f"what is {'z' * 2 * i}?", "answer": "w" * (3 + i)} for i in range(5)]
PRUNING = {"method": "magnitude", "pattern": "2:4"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    with pretended(monkeypatch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    monkeypatch.undo()
    AcceleratorState._reset_state(True)


def test_it_refuses_what_a_gpu_refuses(gpu: None):
    x, w = torch.ones(3, 4, device="cuda"), torch.nn.Linear(4, 2).to("cuda")
    w(x).sum().backward()
    assert {x.device, w.weight.device, w.weight.grad.device, (x * torch.tensor(2.0)).device, x[[0, 2]].device} == {CUDA}
    assert x.cpu().device.type == "cpu"
    for wrong in (
        lambda: x + torch.ones(4), lambda: torch.ones(3)[x.argmax(1)], lambda: torch.stack([x, torch.ones(3, 4)]),
        lambda: torch.randn(2, generator=torch.Generator(), device="cuda"), lambda: torch.randn(2, generator=Generator("cuda")),
        lambda: x.normal_(generator=torch.Generator()), lambda: x.pin_memory(),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            wrong()
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()


def trained(trainer: Any) -> None:
    out = trainer.train()
    assert torch.isfinite(torch.tensor(out.training_loss))
    assert {p.device for p in trainer.model.parameters()} == {CUDA}


QUICK = {
    "learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "disable_tqdm": True, "report_to": "none", "save_strategy": "epoch",
}  # fmt: skip
THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "NPO"},
        {"objective": "GradDiff", "update": "hamu-q", "certificate_every": 1},
        {"objective": "GradDiff", "localize": "saliency"},
        *(pytest.param({"objective": name}, marks=THOROUGH) for name in ("KL", "IdkDPO", "UNDIAL", "WGA", "SatImp", "CEU", "PDU", "SimNPO")),
        *(pytest.param({"objective": "NPO", "update": name}, marks=THOROUGH) for name in ("pcgrad", "gru", "hamu-u")),
        pytest.param({"objective": "GradDiff", "update": "hamu-q", "hamu_geometry": "adam"}, marks=THOROUGH),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)  # fmt: skip
def test_language_models(gpu: None, tmp_path: Any, options: dict[str, Any]):
    from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer

    args = UnlearnConfig(str(tmp_path / "out"), reference_cache_dir=str(tmp_path / "cache"), **QUICK | options)
    assert args.device == CUDA
    trained(UnlearnTrainer(tiny_llama(), args, FORGET, RETAIN, processing_class=CharTokenizer()))


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("sparsegpt", {"compressed": True, "update": "hamu-q"}),
        pytest.param("magnitude", {}, marks=THOROUGH),
        pytest.param("wanda", {"redistribution": "update"}, marks=THOROUGH),
        pytest.param("sparsegpt", {"redistribution": "obs"}, marks=THOROUGH),
        pytest.param("wanda", {"redistribution": "retain"}, marks=THOROUGH),
    ],
)
def test_pruned_models_and_their_checkpoints(gpu: None, tmp_path: Any, how: str, options: dict[str, Any]):
    from transformers import AutoModelForCausalLM

    from fastunlearn.localize import prune
    from fastunlearn.methods.sau import SAUConfig, SAUTrainer

    model, dense = tiny_llama().to("cuda"), str(tmp_path / "dense")
    masks = prune(model, method=how, pattern="2:4", calibration=torch.arange(400).reshape(8, 50) % 120 + 1)
    assert {mask.device for mask in masks.values()} == {CUDA}
    if "redistribution" in options:
        tiny_llama().save_pretrained(dense)
        options = {
            **options,
            "dense_model": dense,
            **({"dense_unlearned_model": dense} if options["redistribution"] == "obs" else {}),
        }
    common = QUICK | options | {"objective": "GradDiff"}

    def trainer(model: Any, **more: Any) -> SAUTrainer:
        return SAUTrainer(
            model, SAUConfig(str(tmp_path / "out"), **common | more), FORGET, RETAIN, CharTokenizer(), masks=masks, pruning=PRUNING
        )  # fmt: skip

    first = trainer(model)
    trained(first)
    first.save_model()
    again = trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "out").to("cuda"), num_train_epochs=3)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["spare", "esd", "concept_ablation", "salun"])
def test_text_to_image_models(gpu: None, tmp_path: Any, name: str):
    pytest.importorskip("diffusers")
    from importlib import import_module

    from tests import test_diffusion_trainer as rows
    from tests.tiny_diffusion import tiny_pipeline

    module = import_module(f"fastunlearn.methods.{name}")
    stem = {"spare": "SPARE", "esd": "ESD", "concept_ablation": "ConceptAblation", "salun": "SalUn"}[name]
    options = {
        **rows.QUICK,
        "use_cpu": False,
        **({"r": 2} if name == "spare" else {"ddim_steps": 2} if name == "esd" else {}),
    }
    args = getattr(module, f"{stem}Config")(str(tmp_path), **options)
    assert args.device == CUDA
    trainer = getattr(module, f"{stem}Trainer")(
        tiny_pipeline(), args, rows.FORGET, *([] if name == "esd" else [rows.RETAIN])
    )
    trained(trainer)
    trainer.save_model()


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{}, {"method": "sid"}, {"mask_values": "soft"}], ids=str)
def test_one_step_generators(gpu: None, tmp_path: Any, options: dict[str, Any]):
    pytest.importorskip("diffusers")
    from fastunlearn.methods.pecker import PECKERTrainer
    from tests.methods.test_pecker import config, tiny_unet

    unet, scheduler = tiny_unet()
    trainer = PECKERTrainer(
        unet, config(tmp_path / "out", use_cpu=False, save_strategy="steps", save_steps=2, **options), 0, None, scheduler, override=1
    )  # fmt: skip
    trainer.train()
    trainer.save_model()


@pytest.mark.thorough
def test_closed_forms(gpu: None):
    pytest.importorskip("diffusers")
    from fastunlearn.methods.rece import rece
    from fastunlearn.methods.scapre import scapre
    from fastunlearn.methods.speed import speed
    from fastunlearn.methods.time_edit import time_edit
    from fastunlearn.methods.uce import uce
    from tests.tiny_diffusion import tiny_pipeline

    for edit in (
        lambda p: uce(p, ["Cat"], ["Fish"], ["Tree"]), lambda p: rece(p, ["Cat"], ["Fish"], ["Tree"]),
        lambda p: speed(p, ["Cat"], ["Fish"], ["Tree"]), lambda p: time_edit(p, ["Mosaic"], ["Photo"]),
        lambda p: scapre(p, ["Cat", "Tree"], anchors=["Fish"]),
    ):  # fmt: skip
        edit(tiny_pipeline().to("cuda"))
