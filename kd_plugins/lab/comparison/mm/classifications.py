"""What classifiers said in an MMEngine test, for the picture of a report."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from kd_plugins.lab.comparison.classifications import Classifications, Guess, choose_images


def read_classifications(files: Mapping[str, Path], config: Config, count: int) -> Classifications | None:
    """What the models took some images of the test set for.

    Args:
        files: Predictions by model, as ``tools/test.py --out`` writes them.
        config: Config of a model, for its test set: images and class names.
        count: Number of images, half of which the models disagree on where there are enough.

    Returns:
        None where a file is missing, or the models were tested on other images or classes.
    """
    if not all(file.is_file() for file in files.values()):
        return None
    init_default_scope(config.get('default_scope', 'mmengine'))
    dataset = DATASETS.build(config.test_dataloader.dataset)
    tested, guesses = {}, {}
    for model, file in files.items():
        tested[model], guesses[model] = read_guesses(file)
    images, *others = tested.values()
    if any(other != images for other in others) or len(images) != len(dataset):
        return None
    root = os.path.commonpath([os.path.dirname(path) for path, _ in images]) or os.curdir
    groups = choose_images([[g.label for g in found] for found in guesses.values()], count // 2)
    ids = {i: os.path.relpath(images[i][0], root) for group in groups.values() for i in group}
    return Classifications(
        groups={heading: [ids[i] for i in group] for heading, group in groups.items()},
        pictures={name: _pixels(dataset[i]['inputs']) for i, name in ids.items()},
        truth={name: images[i][1] for i, name in ids.items()},
        found={model: {name: found[i] for i, name in ids.items()} for model, found in guesses.items()},
        classes=dataset.metainfo['classes'],
    )


def read_guesses(path: Path) -> tuple[list[tuple[str, int]], list[Guess]]:
    """``(file, class index)`` of each image, and the model's first guess, of what ``tools/test.py --out`` wrote."""
    with path.open('rb') as file:  # a file of our own
        samples = pickle.load(file)
    images = [(sample['img_path'], int(sample['gt_label'])) for sample in samples]
    labels = [int(sample['pred_score'].argmax()) for sample in samples]
    return images, [Guess(i, float(s['pred_score'][i])) for i, s in zip(labels, samples, strict=True)]


def _pixels(image: Any) -> np.ndarray:
    """``(H, W, 3)`` of a ``(C, H, W)`` tensor."""
    pixels = image.permute(1, 2, 0).numpy()
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
