"""Which parameters may move: saliency, masks, pruning patterns."""
