"""Ground truth and predicted label maps of an mmseg test, for the picture of a report."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from PIL import Image

from kd_plugins.lab.comparison.figures import spread
from kd_plugins.lab.comparison.segmentations import IGNORED, Segmentations
from kd_plugins.type_names import type_name


def read_segmentations(
    folders: Mapping[str, Path], config: Config, ignore_index: int, count: int
) -> Segmentations | None:
    """What the models found in some images of the test set.

    Args:
        folders: Label maps by model, as ``IoUMetric(output_dir=...)`` writes them.
        config: Config of a model, for its test set: images, ground truth, classes and palette.
        ignore_index: The label that the metric leaves out.
        count: Number of images.

    Returns:
        None where there is no ground truth, or not a prediction of every model.
    """
    # mmseg prints which optional packages it has not found when it is imported.
    with contextlib.redirect_stdout(io.StringIO()):
        init_default_scope(config.get('default_scope', 'mmseg'))
    dataset = DATASETS.build(config.test_dataloader.dataset)
    classes, palette = dataset.metainfo['classes'], dataset.metainfo['palette']
    load = TRANSFORMS.build(_loader(config.test_dataloader.dataset))
    files, truth = {}, {}
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in folders}
    for i in spread(range(len(dataset)), count):
        info = dataset.get_data_info(i)
        name = Path(info['img_path']).stem
        predictions = {model: folder / f'{name}.png' for model, folder in folders.items()}
        if 'seg_map_path' not in info or not all(p.is_file() for p in predictions.values()):
            return None
        files[name] = info['img_path']
        # The metric shifts them back to how such data sets number their files.
        shift = int(bool(info.get('reduce_zero_label')))
        for model, path in predictions.items():
            found[model][name] = np.asarray(Image.open(path), int) - shift
        labels = load(info)['gt_seg_map'].astype(int)
        truth[name] = np.where((labels == ignore_index) | (labels >= len(classes)), IGNORED, labels)
    if not files:
        return None
    return Segmentations(
        images=list(files), files=files, truth=truth, found=found, classes=tuple(classes), palette=palette
    )


def _loader(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transform that reads the ground truth of a data set, so that its options count here too."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    steps = (step for step in dataset.get('pipeline') or () if type_name(step['type']) == 'LoadAnnotations')
    return next(steps, dict(type='LoadAnnotations'))
