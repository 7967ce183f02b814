"""Ground truth and detections of an MMEngine test, for the picture of a report."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS

from kd_plugins.lab.comparison.figures import Detections, Objects, choose_images


def read_detections(files: Mapping[str, Path], dataset: Mapping[str, Any], count: int) -> Detections | None:
    """What the models found in some images of the test set.

    Args:
        files: Detections by model, as ``tools/test.py --out`` writes them.
        dataset: The test set's config, for ground truth and class names.
        count: Number of images.

    Returns:
        None where the ground truth is no COCO file.
    """
    annotations = Path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    if annotations.suffix != '.json' or not annotations.is_file():
        return None
    kind = DATASETS.get(dataset['type']) if isinstance(dataset['type'], str) else dataset['type']
    names = (dataset.get('metainfo') or {}).get('classes') or kind.METAINFO['classes']
    classes = (names,) if isinstance(names, str) else tuple(names)
    truth = read_ground_truth(annotations, classes)
    found = {name: read_predictions(file) for name, file in files.items()}
    known = set.intersection(*(set(f) for f in found.values()))
    images = choose_images({k: v for k, v in truth.items() if k in known}, count)
    if not images:
        return None
    first = next(iter(found.values()))
    return Detections(
        images=images,
        files={i: first[i][0] for i in images},
        truth={i: truth[i] for i in images},
        found={name: {i: f[i][1] for i in images} for name, f in found.items()},
        classes=classes,
    )


def read_predictions(path: Path) -> dict[int, tuple[str, Objects]]:
    """``image id -> (file, detections)`` of what ``tools/test.py --out`` wrote."""
    with path.open('rb') as file:  # a file of our own
        samples = pickle.load(file)
    result = {}
    for sample in samples:
        found = sample['pred_instances']
        boxes = np.asarray(found['bboxes'], np.float64).reshape(-1, 4)
        detections = Objects(boxes, np.asarray(found['labels']), np.asarray(found['scores'], np.float64))
        result[sample['img_id']] = (sample['img_path'], detections)
    return result


def read_ground_truth(annotations: Path, classes: Sequence[str]) -> dict[int, Objects]:
    """``image id -> objects`` of a COCO file; crowd regions are left out."""
    coco = json.loads(annotations.read_text())
    names = {c['id']: c['name'] for c in coco['categories']}
    index = {name: i for i, name in enumerate(classes)}
    boxes: dict[int, list] = {image['id']: [] for image in coco['images']}
    for a in coco['annotations']:
        if not a.get('iscrowd') and names[a['category_id']] in index:
            x, y, w, h = a['bbox']
            boxes[a['image_id']].append((x, y, x + w, y + h, index[names[a['category_id']]]))
    return {
        image: Objects(
            np.asarray([b[:4] for b in items], np.float64).reshape(-1, 4), np.asarray([b[4] for b in items], int)
        )
        for image, items in boxes.items()
    }
