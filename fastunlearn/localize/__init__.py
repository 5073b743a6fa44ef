"""Which parameters may move: saliency, masks, pruning patterns."""

from fastunlearn.localize.granularity import structured_masks, unit_mask, unit_scores
from fastunlearn.localize.magnitude import magnitude_scores
from fastunlearn.localize.patterns import Pattern, nm_violations, parse_pattern
from fastunlearn.localize.prune import check_options, check_prunable, find_blocks, prune
from fastunlearn.localize.saliency import SaliencyCollector
from fastunlearn.localize.sparsegpt import input_hessians, obs_compensate, sparsegpt_sweep
from fastunlearn.localize.wanda import input_norms, wanda_scores

__all__ = [
    "Pattern",
    "SaliencyCollector",
    "check_options",
    "check_prunable",
    "find_blocks",
    "input_hessians",
    "input_norms",
    "magnitude_scores",
    "nm_violations",
    "obs_compensate",
    "parse_pattern",
    "prune",
    "sparsegpt_sweep",
    "structured_masks",
    "unit_mask",
    "unit_scores",
    "wanda_scores",
]
