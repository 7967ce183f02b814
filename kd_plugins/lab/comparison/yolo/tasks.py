"""What a model of Ultralytics is compared by, as its validator measures it."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.classifications import Classifications, Guess, choose_images
from kd_plugins.lab.comparison.figures import Detections, Objects, Picture
from kd_plugins.lab.comparison.table import BOXES, Metrics


@dataclass(frozen=True)
class Task:
    """A task of Ultralytics with a box for each object.

    Attributes:
        name: Ultralytics' name of it.
        recipes: What recipes call it.
        metrics: What the models are compared by.
        keys: Their keys in ``results.csv`` and in the validator's results, in the same order.
        column: Numbers that stand between ``all`` and the first metric in a line of the validator.
        size: Pixels of a side of the images where ``imgsz`` is not given.
        pictures: Images in the report that take the place of one scene.
        measured: How the figures came about, for the note below the table.
    """

    name: str
    recipes: str
    metrics: Metrics
    keys: tuple[str, ...]
    column: int
    size: int
    measured: str
    pictures: int = 1

    def accuracy(self, results: Mapping[str, Any]) -> tuple[float, ...]:
        """The values of `metrics` in [0, 1]; NaN where one was not measured."""
        values = (results.get(key) for key in self.keys)
        return tuple(math.nan if v is None else float(v) for v in values)

    def find_data(self, data: str) -> str:
        """The absolute path of a data set, one of Ultralytics' own included.

        Raises:
            DistillError: There is none.
        """
        from ultralytics.utils.checks import check_yaml

        try:
            return os.path.abspath(check_yaml(data))
        except (FileNotFoundError, AssertionError) as error:
            raise DistillError(f'--data {data!r} does not exist; it is the YAML of a data set.') from error

    def check_data(self, data: str) -> dict[str, Any]:
        """What Ultralytics finds of a data set: its splits and its class names."""
        from ultralytics.data.utils import check_det_dataset

        found: dict[str, Any] = check_det_dataset(data)
        return found

    def fingerprint(self, data: str, files: Iterable[str]) -> dict[str, Any]:
        """What tells whether another data set is at the same place: the YAML, and names and sizes of the labels.

        Args:
            data: Of the data set.
            files: Its images.
        """
        from ultralytics.data.utils import img2label_paths

        return dict(yaml=Path(data).read_text(), labels=_sizes(map(Path, img2label_paths(list(files)))))

    def picture(self, results: Mapping[str, Mapping[str, Any]], scenes: int) -> Picture | None:
        """What the models say of some images.

        Args:
            results: What `kd_plugins.lab.comparison.yolo.evaluate.evaluate` wrote, by model.
            scenes: Scenes that are shown.
        """
        return _detections(results)


class Classify(Task):
    """Classes of whole images, whose data set is a folder."""

    def find_data(self, data: str) -> str:
        from ultralytics.utils import DATASETS_DIR

        for folder in (data, os.path.join(DATASETS_DIR, data)):
            if os.path.isdir(folder):
                return os.path.abspath(folder)
        raise DistillError(f'--data {data!r} does not exist; for classifiers it is a folder with train/ and val/.')

    def check_data(self, data: str) -> dict[str, Any]:
        from ultralytics.data.utils import check_cls_dataset

        found: dict[str, Any] = check_cls_dataset(data, 'val')
        return found

    def fingerprint(self, data: str, files: Iterable[str]) -> dict[str, Any]:
        return dict(images=_sizes(map(Path, files), data))

    def picture(self, results: Mapping[str, Mapping[str, Any]], scenes: int) -> Picture | None:
        first, *others = ({i['file']: i for i in result['images']} for result in results.values())
        if not first or any(set(other) != set(first) for other in others):
            return None
        files = list(first)
        found = {
            model: [Guess(i['found'], i['probability']) for i in result['images']] for model, result in results.items()
        }
        groups = choose_images([[g.label for g in guesses] for guesses in found.values()], 2 * scenes)
        chosen = [i for group in groups.values() for i in group]
        names = {i: os.path.join(*Path(files[i]).parts[-2:]) for i in chosen}
        return Classifications(
            groups={heading: [names[i] for i in group] for heading, group in groups.items()},
            pictures={names[i]: np.asarray(Image.open(files[i]).convert('RGB')) for i in chosen},
            truth={names[i]: first[files[i]]['truth'] for i in chosen},
            found={model: {names[i]: guesses[i] for i in chosen} for model, guesses in found.items()},
            classes=next(iter(results.values()))['names'],
        )


DETECTORS = "100 × Ultralytics' {} of the IoU thresholds 50 to 95, and of 50"
TASKS = {
    task.name: task
    for task in (
        Task(
            'detect', 'detection', BOXES, ('metrics/mAP50-95(B)', 'metrics/mAP50(B)'), 5, 640, DETECTORS.format('mAP')
        ),
        Task(
            'segment',
            'detection',
            Metrics(('mask mAP', 'mask AP50', 'box mAP'), ('mask_map', 'mask_map50', 'map')),
            ('metrics/mAP50-95(M)', 'metrics/mAP50(M)', 'metrics/mAP50-95(B)'),
            9,
            640,
            DETECTORS.format('mAP of masks and boxes'),
        ),
        Task(
            'pose',
            'detection',
            Metrics(('pose mAP', 'pose AP50', 'box mAP'), ('pose_map', 'pose_map50', 'map')),
            ('metrics/mAP50-95(P)', 'metrics/mAP50(P)', 'metrics/mAP50-95(B)'),
            9,
            640,
            DETECTORS.format('mAP of keypoints and boxes'),
        ),
        Task(
            'obb',
            'detection',
            BOXES,
            ('metrics/mAP50-95(B)', 'metrics/mAP50(B)'),
            5,
            640,
            DETECTORS.format('mAP of rotated boxes'),
        ),
        Classify(
            'classify',
            'classification',
            Metrics(('top-1', 'top-5'), ('top1', 'top5')),
            ('metrics/accuracy_top1', 'metrics/accuracy_top5'),
            0,
            224,
            'share of images whose class is among the first guesses, in %',
            pictures=8,
        ),
    )
}


def image_files(split: Any) -> list[str]:
    """The image files of a split: of a folder, of a list in a text file, or of several of these."""
    from ultralytics.data.utils import IMG_FORMATS

    files: list[str] = []
    for part in split if isinstance(split, (list, tuple)) else [split]:
        path = Path(part)
        if path.is_dir():
            files += (str(f) for f in path.rglob('*.*') if f.suffix[1:].lower() in IMG_FORMATS)
        elif path.is_file():
            root = path.parent
            lines = (line.strip() for line in path.read_text().splitlines())
            files += (str(root / line) if line.startswith('./') else line for line in lines if line)
    return sorted(files)


def _sizes(paths: Iterable[Path], root: str | None = None) -> str:
    digest = hashlib.sha256()
    for path in paths:
        name = path.name if root is None else os.path.relpath(path, root)
        digest.update(f'{name} {path.stat().st_size if path.is_file() else None};'.encode())
    return digest.hexdigest()


def _detections(measured: Mapping[str, Mapping[str, Any]]) -> Detections | None:
    first = next(iter(measured.values()))
    images = [Path(image['file']).name for image in first['images']]
    if not images:
        return None

    def objects(rows: Sequence[Sequence[float]], scored: bool) -> Objects:
        table = np.asarray(rows, np.float64).reshape(-1, 6 if scored else 5)
        return Objects(table[:, :4], table[:, 4].astype(int), table[:, 5] if scored else None)

    return Detections(
        images=images,
        files={name: image['file'] for name, image in zip(images, first['images'], strict=True)},
        truth={name: objects(image['truth'], False) for name, image in zip(images, first['images'], strict=True)},
        found={
            model: {name: objects(i['found'], True) for name, i in zip(images, m['images'], strict=True)}
            for model, m in measured.items()
        },
        classes=first['names'],
    )
