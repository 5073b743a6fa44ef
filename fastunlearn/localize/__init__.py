"""Which parameters may move: saliency, masks, pruning patterns."""

from fastunlearn.localize.saliency import SaliencyCollector
from fastunlearn.localize.wanda import input_norms, nm_violations, prune_nm, wanda_scores

__all__ = ["SaliencyCollector", "input_norms", "nm_violations", "prune_nm", "wanda_scores"]
