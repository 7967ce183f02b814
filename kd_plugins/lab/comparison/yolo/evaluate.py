"""One checkpoint through Ultralytics' validator, and its detections in some images: a process of its own."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def evaluate(weights: str, data: str, out: Path, *, imgsz: int, scenes: int = 0) -> dict[str, Any]:
    """Validate a detector and write what was found.

    Args:
        weights: A ``.pt`` file.
        data: Data set YAML.
        out: JSON file to write; the validator's own files go beside it.
        imgsz: Image size in pixels.
        scenes: Images, at even distances through the validation set, whose detections are written too.

    Returns:
        What is written: ``map``, ``map50`` in [0, 1], ``parameters``, ``names``, and ``images``: per image ``file``,
        ``truth`` ``[[x1, y1, x2, y2, class], ...]`` and ``found`` ``[[x1, y1, x2, y2, class, score], ...]`` in pixels.
    """
    from ultralytics import YOLO
    from ultralytics.data.utils import check_det_dataset, img2label_paths

    from kd_plugins.lab.comparison.figures import SCORE, spread

    model = YOLO(weights)
    parameters = sum(p.numel() for p in model.model.parameters())
    metrics = model.val(
        data=data, imgsz=imgsz, plots=False, project=str(out.parent), name='val', exist_ok=True, workers=0
    )
    result = dict(
        map=float(metrics.box.map),
        map50=float(metrics.box.map50),
        parameters=parameters,
        names=[model.names[i] for i in sorted(model.names)],
        images=[],
    )
    for file in spread(image_files(check_det_dataset(data)['val']), scenes):
        found = model.predict(file, imgsz=imgsz, conf=SCORE, verbose=False)[0]
        labels = Path(img2label_paths([file])[0])
        boxes = found.boxes
        result['images'].append(
            dict(
                file=file,
                truth=read_labels(labels, *found.orig_shape),
                found=np.column_stack([boxes.xyxy.cpu(), boxes.cls.cpu(), boxes.conf.cpu()]).tolist(),
            )
        )
    out.write_text(json.dumps(result))
    return result


def read_labels(path: Path, height: int, width: int) -> list[list[float]]:
    """``[x1, y1, x2, y2, class]`` in pixels of a label file; no file, no objects."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    boxes = []
    for label, *values in (line for line in lines if line):
        x, y, w, h = map(float, values[:4])
        boxes.append(
            [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height, float(label)]
        )
    return boxes


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
