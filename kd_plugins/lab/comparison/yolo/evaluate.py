"""One checkpoint through Ultralytics' validator, and what it says of some images: a process of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_plugins.distiller.ending import strict
from kd_plugins.lab.comparison.figures import SCORE
from kd_plugins.lab.comparison.table import weights_size
from kd_plugins.lab.comparison.yolo.tasks import TASKS, image_files


def evaluate(weights: str, data: str, out: Path, *, imgsz: int, scenes: int = 0) -> dict[str, Any]:
    """Validate a model and write what was found.

    Args:
        weights: A ``.pt`` file.
        data: Data set: a YAML, or for classifiers a folder.
        out: JSON file to write; the validator's own files go beside it.
        imgsz: Image size in pixels.
        scenes: Images, at even distances through the validation set, of which is written too what the model says.

    Returns:
        What is written: ``metrics`` by Ultralytics' names, ``parameters``, ``size`` (see
        `kd_plugins.lab.comparison.table.weights_size`), ``names``, and ``images``: per image ``file``, and what
        `objects` or `guess` say.
    """
    from ultralytics import YOLO

    from kd_plugins.lab.comparison.figures import spread

    model = YOLO(weights)
    task = TASKS[model.task]
    # Before the validator fuses layers.
    parameters = sum(p.numel() for p in model.model.parameters())
    size = weights_size(model.model.state_dict())
    metrics = model.val(
        data=data, imgsz=imgsz, plots=False, project=str(out.parent), name='val', exist_ok=True, workers=0
    )
    found = task.check_data(data)
    names = [model.names[i] for i in sorted(model.names)]
    result = dict(
        metrics={k: float(v) for k, v in metrics.results_dict.items()},
        parameters=parameters,
        size=size,
        names=names,
        images=[],
    )
    for file in spread(image_files(found['val']), scenes):
        said = model.predict(file, imgsz=imgsz, conf=SCORE, verbose=False)[0]
        of = objects(file, said) if said.probs is None else guess(file, said, list(found['names'].values()))
        result['images'].append(dict(file=file, **of))
    out.write_text(json.dumps(strict(result), allow_nan=False))
    return result


def objects(file: str, said: Any) -> dict[str, Any]:
    """Objects in an image, as upright boxes.

    Args:
        file: The image.
        said: What the model found.

    Returns:
        ``truth`` ``[[x1, y1, x2, y2, class], ...]`` and ``found`` ``[[x1, y1, x2, y2, class, score], ...]`` in pixels.
    """
    from ultralytics.data.utils import img2label_paths

    boxes = said.boxes if said.obb is None else said.obb
    labels = Path(img2label_paths([file])[0])
    return dict(
        truth=read_labels(labels, *said.orig_shape, keypoints=said.keypoints is not None),
        found=np.column_stack([boxes.xyxy.cpu(), boxes.cls.cpu(), boxes.conf.cpu()]).tolist(),
    )


def guess(file: str, said: Any, names: Sequence[str]) -> dict[str, Any]:
    """What an image is taken for.

    Args:
        file: The image, in the folder of its class.
        said: What the model said.
        names: Classes of the data set.

    Returns:
        ``truth``, ``found`` (class indices) and ``probability``.
    """
    truth = names.index(Path(file).parent.name)
    return dict(truth=truth, found=int(said.probs.top1), probability=float(said.probs.top1conf))


def read_labels(path: Path, height: int, width: int, keypoints: bool = False) -> list[list[float]]:
    """``[x1, y1, x2, y2, class]`` in pixels of a label file; no file, no objects.

    Args:
        path: Of the file: a line has a class and a box, with keypoints after it, or the corners of an outline.
        height: Of the image.
        width: Of the image.
        keypoints: Whether there are keypoints.
    """
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    boxes = []
    for label, *values in (line for line in lines if line):
        numbers = np.array(values, float)
        if keypoints or len(numbers) == 4:
            x, y, w, h = numbers[:4].tolist()
            corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        else:
            xs, ys = numbers[::2].tolist(), numbers[1::2].tolist()
            corners = (min(xs), min(ys), max(xs), max(ys))
        boxes.append([*(v * side for v, side in zip(corners, (width, height) * 2, strict=True)), float(label)])
    return boxes


def main(argv: Sequence[str] | None = None) -> None:
    """The command that `compare` starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('weights')
    parser.add_argument('data')
    parser.add_argument('out', type=Path)
    parser.add_argument('--imgsz', type=int, required=True)
    parser.add_argument('--scenes', type=int, default=0)
    args = parser.parse_args(argv)
    evaluate(args.weights, args.data, args.out, imgsz=args.imgsz, scenes=args.scenes)


if __name__ == '__main__':
    main()
