"""The named recipes: each picks from localize, objectives, updates and parametrize."""

from fastunlearn.methods.hamu import HAMUConfig, HAMUTrainer
from fastunlearn.methods.sau import SAUConfig, SAUTrainer

__all__ = ["HAMUConfig", "HAMUTrainer", "SAUConfig", "SAUTrainer"]
