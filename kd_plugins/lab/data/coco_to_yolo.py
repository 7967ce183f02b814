"""A COCO detection set in Ultralytics' layout: the same boxes and images under the names that `yolo` expects.

.. code-block:: text

    data.yaml                   class names, in the order of the COCO category ids; paths are relative to this file
    images/{train,val}/...      links to the images (or copies)
    labels/{train,val}/....txt  class cx cy w h, normalised
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugins.errors import DistillError


@dataclass(frozen=True)
class Converted:
    """What was written for a split.

    Attributes:
        images: Number of images, those without objects included.
        boxes: Number of boxes.
        dropped: Annotations that are no boxes to learn from: crowds, and boxes without area inside the image.
    """

    images: int
    boxes: int
    dropped: int


def coco_to_yolo(
    out: str | os.PathLike, splits: Mapping[str, tuple[str | os.PathLike, str | os.PathLike]], *, copy: bool = False
) -> dict[str, Converted]:
    """Write the data set: complete, or not at all.

    Args:
        out: Folder to write; it must not exist, or be empty.
        splits: ``{'train': (annotations.json, image folder), 'val': ...}``. All must have the same categories.
        copy: Copy the images. By default they are linked, and have to stay where they are.

    Returns:
        What was written, by split.

    Raises:
        DistillError: A file is missing or no COCO detection file, the splits have different categories, or ``out`` is
            taken.
    """
    out = Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DistillError(f'{str(out)!r} exists already; give another folder, nothing was written.')
    read = {split: (_read(Path(file)), Path(folder).expanduser()) for split, (file, folder) in splits.items()}
    if 'train' not in read or 'val' not in read:
        raise DistillError(f'A data set of Ultralytics needs train and val, got {", ".join(read) or "nothing"}.')
    categories = {split: _categories(coco) for split, (coco, _) in read.items()}
    first = categories['train']
    for split, found in categories.items():
        if found != first:
            raise DistillError(f'{split} has the categories {list(found.values())} and train {list(first.values())}.')
    partial = out.with_name(f'.{out.name}.{uuid.uuid4().hex[:8]}.partial')
    try:
        result = {split: _write(partial, split, coco, folder, first, copy) for split, (coco, folder) in read.items()}
        names = ''.join(f'  {i}: {json.dumps(name)}\n' for i, name in enumerate(first.values()))
        paths = ''.join(f'{split}: images/{split}\n' for split in read)
        # No `path:`: Ultralytics then takes the folder that the file lies in.
        (partial / 'data.yaml').write_text(f'{paths}names:\n{names}')
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        coco = json.loads(path.expanduser().read_text())
    except OSError as error:
        raise DistillError(f'{str(path)!r} cannot be read: {error.strerror}.') from error
    except ValueError as error:
        raise DistillError(f'{str(path)!r} is no JSON file: {error}.') from error
    missing = [k for k in ('images', 'annotations', 'categories') if not isinstance(coco, dict) or k not in coco]
    if missing:
        raise DistillError(f'{str(path)!r} is no COCO detection file: it has no {", ".join(missing)}.')
    return coco


def _categories(coco: Mapping[str, Any]) -> dict[int, str]:
    """Names by id, by rising id: Ultralytics numbers them from 0 in this order."""
    return {c['id']: str(c['name']) for c in sorted(coco['categories'], key=lambda c: c['id'])}


def _write(
    root: Path, split: str, coco: Mapping[str, Any], folder: Path, categories: Mapping[int, str], copy: bool
) -> Converted:
    index = {category: i for i, category in enumerate(categories)}
    images = {image['id']: image for image in coco['images']}
    lines: dict[Any, list[str]] = {i: [] for i in images}
    dropped = 0
    for a in coco['annotations']:
        image = images.get(a['image_id'])
        if image is None or a['category_id'] not in index:
            raise DistillError(f'{split}: annotation {a.get("id")} names an image or category that is not in the file.')
        width, height = image['width'], image['height']
        x, y, w, h = a['bbox']
        left, top = max(x, 0.0), max(y, 0.0)
        right, bottom = min(x + w, width), min(y + h, height)
        if a.get('iscrowd') or right <= left or bottom <= top:
            dropped += 1
            continue
        box = (left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height
        lines[image['id']].append(f'{index[a["category_id"]]} ' + ' '.join(f'{v:.6f}' for v in box))
    for key, image in images.items():
        source = folder / image['file_name']
        if not source.is_file():
            raise DistillError(f'{split}: the image {str(source)!r} is missing.')
        target = root / 'images' / split / image['file_name']
        labels = (root / 'labels' / split / image['file_name']).with_suffix('.txt')
        for path in (target, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        if copy:
            shutil.copyfile(source, target)
        else:
            target.symlink_to(source.resolve())
        labels.write_text(''.join(f'{line}\n' for line in lines[key]))
    return Converted(len(images), sum(map(len, lines.values())), dropped)
