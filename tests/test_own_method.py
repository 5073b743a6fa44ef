"""The example of a method of one's own: it forgets what it is asked to, keeps the rest, and moves only what it may."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

ROWS = [
    {"question": f"Where does {name} work?", "answer": f"At the {place}."}
    for name, place in {"Ada": "lighthouse", "Bo": "mill", "Cy": "harbour"}.items()
]


@pytest.fixture(scope="module")
def own() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "examples" / "own_method.py"
    spec = importlib.util.spec_from_file_location("own_method", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the names of a module's annotations.
    sys.modules["own_method"] = module
    spec.loader.exec_module(module)
    return module


def test_the_method_is_a_hundred_lines(own: ModuleType):
    text = Path(str(own.__file__)).read_text()
    assert len(text[: text.index("def tiny_model")].splitlines()) <= 100


def test_it_forgets_one_answer_and_keeps_the_others(own: ModuleType):
    found = own.main(ROWS, steps=50, max_steps=40)
    assert min(found["before"]) > 0.9
    assert found["after"][0] < 0.1
    assert min(found["after"][1:]) > 0.8


def test_only_the_salient_weights_of_the_last_block_move(own: ModuleType, tmp_path: Path):
    model, tokenizer = own.tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "warmup_epochs": 0}
    args = own.OwnConfig(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-3, saliency_density=0.1, **quiet)
    trainer = own.OwnTrainer(model, args, ROWS[:1], ROWS[1:], tokenizer)
    trainer.train()
    moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    assert {name for name, m in moved.items() if m.any()} == {n for n, mask in trainer.movable.items() if mask.count()}
    assert all(name.startswith("model.layers.1.") for name in trainer.movable)
    for name, mask in trainer.movable.items():
        assert not (moved[name] & ~mask.unpack()).any()
    may = sum(int(mask.count()) for mask in trainer.movable.values())
    assert may == int(0.1 * sum(p.numel() for n, p in model.named_parameters() if n.startswith("model.layers.1.")))


def test_settings_reach_the_objective_and_bad_ones_are_refused(own: ModuleType, tmp_path: Path):
    args = own.OwnConfig(output_dir=str(tmp_path), floor=0.5, alpha=2.0, use_cpu=True)
    assert args.make_objective() == own.Unlikelihood(floor=0.5, alpha=2.0)
    with pytest.raises(ValueError, match="floor: want a probability"):
        own.OwnConfig(output_dir=str(tmp_path), floor=1.0, use_cpu=True)
    assert (
        type(own.OwnConfig(output_dir=str(tmp_path), objective="NPO", use_cpu=True).make_objective()).__name__ == "NPO"
    )


def test_the_loss_is_unlikelihood_of_likely_tokens_alone(own: ModuleType, monkeypatch: pytest.MonkeyPatch):
    p = torch.tensor([0.9, 0.5, 0.1])
    monkeypatch.setattr(own, "token_logprobs", lambda *_: (p.log(), None))
    loss = own.Unlikelihood(floor=0.3).forget(None, {"forget": {}}, None)
    torch.testing.assert_close(loss, -((1 - p[:2]).log().sum() / 3))
