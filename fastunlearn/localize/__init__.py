"""Which parameters may move: saliency, masks, pruning patterns."""

from fastunlearn.localize.wanda import input_norms, nm_violations, prune_nm, wanda_scores

__all__ = ["input_norms", "nm_violations", "prune_nm", "wanda_scores"]
