"""The files of a data set: scenes, in four formats that share the same images and come from the same ink masks.

```
<root>/
  images/{train,val}/000000.png          scenes, RGB; shared by COCO, label maps and Ultralytics
  annotations/{train,val}.json           COCO detection and instance masks; file_name is relative to images/{split}
  label_maps/{train,val}/000000.png      semantic segmentation: 0 background, digit + 1, 255 ignore (never drawn)
  labels/{train,val}/000000.txt          Ultralytics: class cx cy w h, normalised
  digits.yaml                            Ultralytics data file; paths are relative to this file
  cls/{train,val}/{0..9}/000000_00.png   classification crops, 32 x 32: ImageFolder, or Ultralytics' data=<root>/cls
  scans/{train,val}.npz                  the scans themselves: images (N, 8, 8) uint8, ink is bright; labels (N,)
  preview.png                            some validation scenes with boxes, label maps and crops
  kd_digits.json                         settings, scan indices per split, list of files
```
COCO category ids are the values of the label maps (digit + 1); Ultralytics classes are the digits themselves.
The label maps are not called ``masks``: a folder of that name switches Ultralytics (8.4) to semantic segmentation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from kd_plugins.lab.data.scans import CLASSES
from kd_plugins.lab.data.scenes import Scene, bounds

IGNORE_INDEX = 255
"""Label-map value that losses and metrics skip. Reserved: every pixel of these scenes is known, so none carries it."""

CROP = 32  # side of a classification crop in pixels
CONTEXT = 1.25  # side of the cut square over the longer side of the box


def write_scans(root: Path, scans: np.ndarray, labels: np.ndarray, pools: Mapping[str, np.ndarray]) -> None:
    """Write the single digits as arrays, split as the scenes are.

    Args:
        root: Folder of the data set.
        scans: ``(N, 8, 8)`` ink in [0, 1].
        labels: ``(N,)`` digits.
        pools: Indices of the scans of each split.
    """
    (root / 'scans').mkdir()
    for split, pool in pools.items():
        images = np.round(255 * scans[pool]).astype(np.uint8)
        np.savez(root / 'scans' / f'{split}.npz', images=images, labels=labels[pool])


class SplitWriter:
    """Writes the scenes of one split, one by one; :meth:`close` writes what needs all of them."""

    def __init__(self, root: Path, split: str) -> None:
        self.root, self.split = root, split
        self.images: list[dict] = []
        self.annotations: list[dict] = []
        self.used_scans: set[int] = set()
        for kind in ('images', 'label_maps', 'labels'):
            (root / kind / split).mkdir(parents=True)
        (root / 'annotations').mkdir(exist_ok=True)
        for name in CLASSES:  # all of them, even when empty, so that both splits number the classes alike
            (root / 'cls' / split / name).mkdir(parents=True)

    def add(self, scene: Scene) -> None:
        """Write one scene in all formats."""
        stem = f'{len(self.images):06d}'
        height, width = scene.owner.shape
        self.images.append({'id': len(self.images) + 1, 'file_name': f'{stem}.png', 'width': width, 'height': height})
        picture = Image.fromarray(scene.image)
        _save(picture, self.root / 'images' / self.split / f'{stem}.png')
        # Greyscale, not palette: OpenCV would expand a palette into colours.
        _save(Image.fromarray(label_map(scene)), self.root / 'label_maps' / self.split / f'{stem}.png')
        lines = []
        for k, label in enumerate(scene.labels):
            mask = scene.owner == k
            box = bounds(mask)
            x, y, w, h = box
            self.annotations.append(
                {
                    'id': len(self.annotations) + 1,  # from 1: COCOeval reads a match with id 0 as no match
                    'image_id': len(self.images),
                    'category_id': label + 1,
                    'bbox': list(box),
                    'area': int(mask.sum()),
                    'iscrowd': 0,
                    'segmentation': {'size': [height, width], 'counts': run_lengths(mask)},
                    'scan': scene.scans[k],
                }
            )
            values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(f'{label} ' + ' '.join(f'{v:.6f}' for v in values))
            crop = picture.crop(_square(box, width, height)).resize((CROP, CROP), Image.Resampling.BICUBIC)
            _save(crop, self.root / 'cls' / self.split / CLASSES[label] / f'{stem}_{k:02d}.png')
        (self.root / 'labels' / self.split / f'{stem}.txt').write_text('\n'.join(lines) + '\n', newline='\n')
        self.used_scans.update(scene.scans, scene.fragment_scans)

    def close(self) -> None:
        """Write the COCO file."""
        coco = {
            'info': {'description': f'kd_plugins scenes of handwritten digits, {self.split}'},
            'licenses': [],
            'categories': [{'id': i + 1, 'name': name, 'supercategory': 'digit'} for i, name in enumerate(CLASSES)],
            'images': self.images,
            'annotations': self.annotations,
        }
        (self.root / 'annotations' / f'{self.split}.json').write_text(json.dumps(coco), newline='\n')


def label_map(scene: Scene) -> np.ndarray:
    """``(S, S)`` uint8: 0 background, digit + 1 on visible ink."""
    values = np.array([*(label + 1 for label in scene.labels), 0], np.uint8)
    return values[scene.owner]  # owner -1 picks the last entry, the background


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a boolean mask ``(H, W)``: column by column, zeros first."""
    flat = mask.ravel(order='F')
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(changes, prepend=0, append=flat.size).tolist()
    return [0, *runs] if flat[0] else runs


def write_yolo_yaml(root: Path) -> None:
    """Write the Ultralytics data file. It has no ``path:``, so Ultralytics takes the folder that the file lies in."""
    names = ''.join(f"  {i}: '{name}'\n" for i, name in enumerate(CLASSES))
    text = (
        '# Ultralytics data file. There is no `path:` on purpose: train and val are then relative to this file.\n'
        f'train: images/train\nval: images/val\nnames:\n{names}'
    )
    (root / 'digits.yaml').write_text(text, newline='\n')


def _square(box: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """A square with some context around a box, moved inside the image."""
    x, y, w, h = box
    side = min(round(CONTEXT * max(w, h)), width, height)
    left = min(max(round(x + w / 2 - side / 2), 0), width - side)
    top = min(max(round(y + h / 2 - side / 2), 0), height - side)
    return left, top, left + side, top + side


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, compress_level=1)  # noise does not compress: more effort costs seconds and saves little
