"""The short examples run, and show what they say. The longer ones: test_demo.py (drop_in_loop), test_own_method.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_a_tenth_of_the_weights_forgets_a_class():
    found = example("masked_optimiser").main(steps=60)
    assert found["forgotten class"] < 0.1
    assert found["other classes"] > 0.9
    assert found["weights that moved"] <= 0.1
    assert found["frozen weights that moved"] == 0


@pytest.mark.thorough
@pytest.mark.slow
def test_a_style_is_erased_in_closed_form(tmp_path: Path):
    pytest.importorskip("diffusers")
    out = tmp_path / "unet.safetensors"
    found = example("erase_concepts").main(["--output", str(out)])
    assert found["Mosaic"][0] > 0.8
    assert found["Mosaic"][1] < 0.5
    assert found["Pop Art"][1] > 0.5
    assert out.is_file()


def test_every_example_is_run_somewhere():
    """By a test here or in another file; in CI all of them run as scripts."""
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for path in (ROOT / "examples").glob("*.py"):
        assert f'"{path.name}"' in text or f'"{path.stem}"' in text, path.name
