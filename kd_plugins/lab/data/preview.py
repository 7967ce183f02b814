"""A contact sheet of a written data set, drawn from its files, so that it shows what a trainer will read."""

from __future__ import annotations

import colorsys
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from kd_plugins.lab.data.scans import CLASSES

_GAP = 6
_PALETTE = [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / 10, 0.75 - 0.35 * (i % 2), 1.0)) for i in range(10)]


def contact_sheet(
    root: str | os.PathLike, path: str | os.PathLike, *, split: str = 'val', columns: int = 3, rows: int = 4
) -> Path:
    """Draw scenes with their COCO boxes, next to each its label map, and below one row of classification crops.

    Args:
        root: A folder written by :func:`kd_plugins.lab.data.prepare_digits`.
        path: PNG file to write.
        split: ``'train'`` or ``'val'``.
        columns: Pairs of scene and label map per row.
        rows: Rows of scenes.

    Returns:
        ``path``.
    """
    root = Path(root)
    coco = json.loads((root / 'annotations' / f'{split}.json').read_text())
    images = coco['images'][: columns * rows]
    zoom = max(1, 256 // images[0]['width'])
    cell = images[0]['width'] * zoom
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width = columns * 2 * (cell + _GAP) + _GAP
    crop = (width - _GAP) // len(CLASSES) - _GAP
    sheet = Image.new('RGB', (width, rows * (cell + _GAP) + _GAP + crop + _GAP), 'white')
    for i, info in enumerate(images):
        x, y = _GAP + i % columns * 2 * (cell + _GAP), _GAP + i // columns * (cell + _GAP)
        boxes = [a for a in coco['annotations'] if a['image_id'] == info['id']]
        sheet.paste(_scene(root / 'images' / split / info['file_name'], boxes, zoom), (x, y))
        sheet.paste(_labels(root / 'label_maps' / split / info['file_name'], zoom), (x + cell + _GAP, y))
    for i, name in enumerate(CLASSES):
        first = min((root / 'cls' / split / name).glob('*.png'), default=None)
        if first is not None:
            with Image.open(first) as picture:
                tile = picture.convert('RGB').resize((crop, crop), Image.Resampling.BICUBIC)
            sheet.paste(tile, (_GAP + i * (crop + _GAP), sheet.height - crop - _GAP))
    sheet.save(path)
    return Path(path)


def _scene(path: Path, annotations: list[dict], zoom: int) -> Image.Image:
    with Image.open(path) as picture:
        scene = picture.convert('RGB').resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(scene)
    for annotation in annotations:
        digit = annotation['category_id'] - 1
        x, y, w, h = (zoom * v for v in annotation['bbox'])
        draw.rectangle((x, y, x + w - 1, y + h - 1), outline=_PALETTE[digit], width=max(1, zoom // 2))
        left, top = x, max(0, y - 11)  # above the box, so that no ink is hidden
        draw.rectangle((left, top, left + 8, top + 10), fill=_PALETTE[digit])
        draw.text((left + 2, top), CLASSES[digit], fill='black')
    return scene


def _labels(path: Path, zoom: int) -> Image.Image:
    colours = np.zeros((256, 3), np.uint8)
    colours[1:11] = _PALETTE
    with Image.open(path) as picture:
        shown = Image.fromarray(colours[np.asarray(picture)])
    return shown.resize((shown.width * zoom, shown.height * zoom), Image.Resampling.NEAREST)
