"""CIFAR-10 from a folder with the hub's files: labels, subsets, sizes, what is wrong."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from fastunlearn.data.cifar10 import load_cifar10

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")


def write_cifar10(folder, per_class=4, splits=("train", "test")):
    """Images whose colour says their label, as PNG in parquet."""
    for split in splits:
        rows = []
        rng = np.random.default_rng(len(split))
        for number in range(per_class * 10):
            label = number % 10
            pixels = np.full((32, 32, 3), 25 * label, dtype=np.uint8)
            pixels[number % 32] = rng.integers(0, 255, 3)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": label})
        folder.mkdir(parents=True, exist_ok=True)
        pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def test_all_and_some(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path / "cifar10")
    images, labels = load_cifar10("train", folder=folder)
    assert (images.shape, images.dtype, labels.dtype) == ((40, 3, 32, 32), torch.uint8, torch.int64)
    assert [int(images[i].float().median()) // 25 for i in range(10)] == labels[:10].tolist() == list(range(10))
    monkeypatch.setenv("FASTUNLEARN_DATA", str(tmp_path))
    images, labels = load_cifar10("test", classes=(8, 0), size=16)
    assert images.shape == (8, 3, 16, 16)
    assert {(int(image.float().median()) // 25, int(label)) for image, label in zip(images, labels)} == {(8, 0), (0, 1)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"split": "all"}, ValueError, "split: want train or test, got 'all'"),
        ({"size": 33}, ValueError, "size: want 1 to 32, got 33"),
        ({"classes": [1, 10]}, ValueError, "classes: want different labels of 0 to 9"),
        ({"classes": [1, 1]}, ValueError, "classes: want different labels"),
        ({}, FileNotFoundError, "folder: there is no .*train.parquet"),
    ],
)
def test_bad_input(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        load_cifar10(**{"folder": tmp_path, **options})
