"""What a run leaves behind for its reader: metrics, model card, curves."""
