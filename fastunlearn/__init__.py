"""fastunlearn: make a trained model forget, fast, exactly and honestly.

    from fastunlearn import BitMask, ops, optim

See README.md for the three ways in: drop-in ops, recipes for a whole model, benchmarks.
"""

from fastunlearn import ops, optim
from fastunlearn._backend import BackendError, Explanation, FallbackWarning, backend, explain
from fastunlearn._version import __version__
from fastunlearn.ops.mask import BitMask, load_masks, save_masks

__all__ = [
    "BackendError",
    "BitMask",
    "Explanation",
    "FallbackWarning",
    "__version__",
    "backend",
    "explain",
    "load_masks",
    "ops",
    "optim",
    "save_masks",
]
