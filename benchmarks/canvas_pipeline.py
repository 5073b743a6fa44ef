"""The study of the canvas pipeline before any unlearning: can its table be trusted?

Accuracy of the two classifiers on drawn pictures that no training saw and on pictures of the pipeline for every pair of style and
object, and a picture with the surest sample of every pair.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import RESULTS, machine
from benchmarks.train_canvas import PAIRS, accuracy, sample
from fastunlearn.data import canvas
from fastunlearn.evaluation.canvas_rows import weights_of
from fastunlearn.evaluation.classifiers import Classifier, load_classifiers
from fastunlearn.evaluation.worlds import canvas_world
from fastunlearn.pipelines import CANVAS, load_pipeline, pipeline_folder
from fastunlearn.report.grid import draw_grid

GRID = RESULTS / "canvas_grid.webp"


#: share of the pictures whose style (object) must be recognised
WANTED = {"drawn, held out": 0.99, "pipeline": 0.98}


def drawn(seed: int) -> torch.Tensor:
    """One picture of every pair, uint8 [pairs, 3, 64, 64]; the seeds are none of the training's."""
    images = [
        canvas.draw(object, style, np.random.default_rng((7_919, seed, i))) for i, (style, object) in enumerate(PAIRS)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@torch.no_grad()
def surest(images: torch.Tensor, judges: Mapping[str, Classifier], labels: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of several pictures of every pair the one whose style and object the classifiers are surest of.

    Args:
        images: uint8 [seeds, pairs, 3, 64, 64].
        labels: "style" and "object" -> int64 [pairs].

    Returns:
        uint8 [pairs, 3, 64, 64].
    """
    seeds, pairs = images.shape[:2]
    sure = torch.zeros(seeds, pairs)
    for kind, truth in labels.items():
        logits = torch.cat([judges[kind](part) for part in images.flatten(0, 1).split(250)]).float()
        sure += logits.log_softmax(1).unflatten(0, (seeds, pairs)).gather(2, truth.expand(seeds, -1)[..., None])[..., 0]
    return images[sure.argmax(0), torch.arange(pairs)]


def grid(images: torch.Tensor, path: Path) -> None:
    """One row a style, one column an object, with their names."""
    from PIL import Image

    cells = images.unflatten(0, (len(canvas.THEMES), len(canvas.OBJECTS)))
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "grid.png"
        draw_grid(cells, drawn, rows=canvas.THEMES, columns=canvas.OBJECTS)
        Image.open(drawn).save(path, quality=85)


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether styles and objects are recognised often enough, in the form of an op's targets."""
    return [
        {
            "op": "canvas pipeline", "case": row["pictures"], "provider": "fastunlearn", "kind": kind, "over": "all pictures",
            "ratio": round(row[kind], 5), "target": WANTED[row["pictures"]], "rule": f">= {WANTED[row['pictures']]:.0%}",
            "met": row[kind] >= WANTED[row["pictures"]],
        }
        for row in rows for kind in ("style", "object")
    ]  # fmt: skip


def run(seed: int = 0, seeds: int = 4, steps: int = 10, guidance: float = 3.0) -> dict[str, Any]:
    """Draws, samples, classifies; writes the grid.

    Args:
        seeds: pictures of every pair from the pipeline.
    """
    facts = machine.meta(torch.device("cpu"))  # before the grid is written: of the tree that is measured
    pipe = load_pipeline(CANVAS, device="cpu")
    judges = load_classifiers(device="cpu")
    style = torch.tensor([canvas.THEMES.index(s) for s, _ in PAIRS])
    object = torch.tensor([canvas.OBJECTS.index(o) for _, o in PAIRS])
    real = torch.cat([drawn(seed * 100 + i) for i in range(seeds)])
    begun = time.perf_counter()
    made = torch.cat(
        [sample(pipe, [canvas.prompt(o, s) for s, o in PAIRS], seed * 100 + i, steps, guidance) for i in range(seeds)]
    )
    seconds = time.perf_counter() - begun
    grid(surest(made.unflatten(0, (seeds, -1)), judges, {"style": style, "object": object}), GRID)
    rows = []
    for name, images in (("drawn, held out", real), ("pipeline", made)):
        right = {k: accuracy(judges[k], images, t.repeat(seeds)) for k, t in (("style", style), ("object", object))}
        rows.append({"pictures": name, "count": len(images), "style": right["style"], "object": right["object"]})
    worst = {
        k: min(
            (accuracy(judges[k], made[t.repeat(seeds) == i], t[t == i].repeat(seeds)), name)
            for i, name in enumerate(names)
        )
        for k, t, names in (("style", style, canvas.THEMES), ("object", object, canvas.OBJECTS))
    }
    files = [f for f in Path(pipeline_folder(CANVAS)).rglob("*") if f.is_file()]
    meta = {
        **{name: digest[:12] for name, digest in weights_of(pipe, canvas_world()).items()},
        "styles": len(canvas.STYLES),
        "objects": len(canvas.OBJECTS),
        "parameters": sum(p.numel() for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()),
        "size in MB": round(sum(f.stat().st_size for f in files) / 1e6, 2),
        "DDIM steps": steps,
        "guidance": guidance,
        "milliseconds a picture": round(1e3 * seconds / len(made), 1),
        "weakest style": f"{worst['style'][1]} {worst['style'][0]:.1%}",
        "weakest object": f"{worst['object'][1]} {worst['object'][0]:.1%}",
        "machine": facts["device"],
        "torch": facts["torch"],
        "commit": facts["commit"],
        "date": facts["date"],
    }
    return {"meta": meta, "rows": rows, "targets": targets_of(rows)}
