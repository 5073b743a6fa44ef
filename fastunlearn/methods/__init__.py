"""The named recipes: each picks from localize, objectives, updates and parametrize."""

from fastunlearn.methods.sau import SAUConfig, SAUTrainer

__all__ = ["SAUConfig", "SAUTrainer"]
