"""fastunlearn: make a trained model forget, fast, exactly and honestly.

    from fastunlearn import BitMask, ops, optim

See README.md for the three ways in: drop-in ops, recipes for a whole model, benchmarks.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastunlearn import ops, optim
from fastunlearn._backend import BackendError, Explanation, FallbackWarning, backend, explain
from fastunlearn._version import __version__
from fastunlearn.ops.mask import BitMask, load_masks, save_masks

if TYPE_CHECKING:
    from fastunlearn.methods.hamu import HAMUConfig, HAMUTrainer
    from fastunlearn.methods.pecker import PECKERConfig, PECKERTrainer
    from fastunlearn.methods.sau import SAUConfig, SAUTrainer
    from fastunlearn.methods.scapre import ScaPreConfig, scapre
    from fastunlearn.methods.spare import SPAREConfig, SPARETrainer, spare
    from fastunlearn.parametrize.masked_lora import MaskedLoraConfig
    from fastunlearn.trainer import UnlearnConfig, UnlearnTrainer

__all__ = [
    "BackendError",
    "BitMask",
    "Explanation",
    "FallbackWarning",
    "HAMUConfig",
    "HAMUTrainer",
    "MaskedLoraConfig",
    "PECKERConfig",
    "PECKERTrainer",
    "SAUConfig",
    "SAUTrainer",
    "SPAREConfig",
    "SPARETrainer",
    "ScaPreConfig",
    "UnlearnConfig",
    "UnlearnTrainer",
    "__version__",
    "backend",
    "explain",
    "load_masks",
    "ops",
    "optim",
    "save_masks",
    "scapre",
    "spare",
]

#: names whose modules import transformers: loaded when they are first asked for
_LAZY = {
    "HAMUConfig": "fastunlearn.methods.hamu",
    "HAMUTrainer": "fastunlearn.methods.hamu",
    "MaskedLoraConfig": "fastunlearn.parametrize.masked_lora",
    "PECKERConfig": "fastunlearn.methods.pecker",
    "PECKERTrainer": "fastunlearn.methods.pecker",
    "SAUConfig": "fastunlearn.methods.sau",
    "SAUTrainer": "fastunlearn.methods.sau",
    "SPAREConfig": "fastunlearn.methods.spare",
    "SPARETrainer": "fastunlearn.methods.spare",
    "ScaPreConfig": "fastunlearn.methods.scapre",
    "UnlearnConfig": "fastunlearn.trainer",
    "UnlearnTrainer": "fastunlearn.trainer",
    "scapre": "fastunlearn.methods.scapre",
    "spare": "fastunlearn.methods.spare",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastunlearn' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "fastunlearn":
            raise
        raise ImportError(f"fastunlearn.{name} needs {error.name}: pip install 'fastunlearn[llm]'") from error
