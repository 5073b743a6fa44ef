"""One call from a pipeline to an edited pipeline, for methods that are a `DiffusionTrainer`."""

from __future__ import annotations

import tempfile
from typing import Any

from torch import Tensor

from fastunlearn.diffusion_trainer import DiffusionConfig, DiffusionTrainer


def unlearned(
    trainer_class: type[DiffusionTrainer], config_class: type[DiffusionConfig], pipeline: Any, forget: Any, retain: Any, config: Any
) -> tuple[DiffusionTrainer, dict[str, Tensor]]:  # fmt: skip
    """Trains and merges; the pipeline is edited in place, and is what it was where that fails.

    Args:
        config: None: the defaults, and no files are left behind.

    Returns:
        The trainer, and the weights that moved by their names within the unet or transformer.
    """
    if config is not None:
        return trainer_class.run(pipeline, config, forget, retain)
    with tempfile.TemporaryDirectory() as folder:
        return trainer_class.run(pipeline, config_class(output_dir=folder), forget, retain)
