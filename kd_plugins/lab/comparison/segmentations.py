"""The picture of label maps: image, ground truth and every model's prediction side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from kd_plugins.lab.comparison.figures import Picture, save

IGNORED = -1  # label of pixels that no metric counts
STRIPES = np.array([[92, 92, 92], [150, 150, 150]], np.float64)
LARGEST = 512  # pixels: a cell shows fewer, and full resolution would only cost time
STRENGTH = 0.72  # of the class colours over the grey image
NOT_COUNTED = 'not counted'
LEGEND = 32  # classes, the most frequent ones: a longer legend is read by nobody


@dataclass
class Segmentations(Picture):
    """The label maps that several models found for the same images.

    Attributes:
        images: Ids of the images, in the order of the rows.
        files: The image files by id.
        truth: Ground truth by id: ``(H, W)`` class indices, `IGNORED` where nothing is known.
        found: Predictions by model and id, ``(H, W)`` class indices.
        classes: Class names.
        palette: ``(C, 3)`` RGB in [0, 255].
    """

    name: ClassVar[str] = 'segmentations'
    content: ClassVar[str] = (
        'class colours over the image, pixels that no metric counts striped (number: mIoU of that image alone, over '
        'the classes in it or in the prediction, in %)'
    )
    alt: ClassVar[str] = "image, ground truth and every model's label map side by side"
    images: Sequence[Any]
    files: Mapping[Any, str]
    truth: Mapping[Any, np.ndarray]
    found: Mapping[str, Mapping[Any, np.ndarray]]
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]

    def draw(self, path: Path) -> None:
        """See `Picture.draw`."""
        names = ['image', 'ground truth', *self.found]
        pictures = {i: np.asarray(Image.open(self.files[i]).convert('RGB')) for i in self.images}
        ratio = max(p.shape[0] / p.shape[1] for p in pictures.values())
        side = 2.35 if len(names) <= 4 else 2.0
        seen = self._legend()
        columns = max(1, int(side * len(names) / (0.45 + 0.085 * max(len(c) for c in self.classes))))
        lines = -(-len(seen) // columns)
        below, above = 0.14 + 0.21 * lines, 0.34
        figure = Figure(figsize=(side * len(names), side * ratio * len(self.images) + below + above))
        grid = figure.subplots(len(self.images), len(names), squeeze=False)
        height = figure.get_figheight()
        figure.subplots_adjust(0.005, below / height, 0.995, 1 - above / height, 0.02, 0.02)
        for row, image in zip(grid, self.images, strict=True):
            for axes, (cell, score) in zip(row, self._row(image, pictures[image]), strict=True):
                _show(axes, cell, score)
        for axes, name in zip(grid[0], names, strict=True):
            axes.set_title(name, fontsize=11, pad=5)
        figure.legend(
            handles=[_patch(name, rgb) for name, rgb in seen],
            loc='lower center',
            ncols=columns,
            frameon=False,
            fontsize=9,
            handlelength=1.1,
            handleheight=1.0,
            columnspacing=1.2,
            bbox_to_anchor=(0.5, 0.0),
            borderaxespad=0.25,
        )
        # A palette would tint the shades of a class towards other classes.
        save(figure, path, dpi=120, colors=None)

    def _row(self, image: Any, picture: np.ndarray) -> Iterator[tuple[np.ndarray, float]]:
        """The cells of an image, and what each scores; NaN where nothing was predicted."""
        truth = self.truth[image]
        yield picture, math.nan
        yield colour(truth, picture, truth, self.palette), math.nan
        for found in self.found.values():
            yield colour(found[image], picture, truth, self.palette), image_iou(found[image], truth)

    def _legend(self) -> list[tuple[str, Sequence[int]]]:
        """Name and colour of the classes that occur, in their own order."""
        count = np.zeros(len(self.classes), int)
        for maps in (self.truth, *self.found.values()):
            for image in self.images:
                labels = maps[image]
                count += np.bincount(labels[labels >= 0], minlength=len(count))[: len(count)]
        shown = sorted(c for c in np.argsort(-count, kind='stable')[:LEGEND] if count[c])
        legend = [(self.classes[c], self.palette[c]) for c in shown]
        if any((self.truth[i] == IGNORED).any() for i in self.images):
            legend.append((NOT_COUNTED, STRIPES[1]))
        return legend


def _show(axes: Any, cell: np.ndarray, score: float) -> None:
    axes.imshow(cell, interpolation='nearest' if cell.shape[1] < 320 else 'antialiased')
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if not math.isnan(score):
        axes.text(
            0.97,
            0.03,
            f'{100 * score:.0f}',
            transform=axes.transAxes,
            fontsize=8.5,
            color='white',
            ha='right',
            va='bottom',
            bbox=dict(facecolor='black', edgecolor='none', pad=1.5, alpha=0.6),
        )


def _patch(name: str, rgb: Sequence[int]) -> Patch:
    return Patch(
        facecolor=np.asarray(rgb) / 255,
        edgecolor=STRIPES[0] / 255,
        linewidth=0.5,
        hatch='/////' if name == NOT_COUNTED else None,
        label=name,
    )


def colour(labels: np.ndarray, picture: np.ndarray, truth: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """``(h, w, 3)`` uint8: class colours over the grey image, stripes where the truth is not known.

    Args:
        labels: ``(H, W)`` class indices.
        picture: ``(H, W, 3)`` uint8 image.
        truth: ``(H, W)`` class indices, `IGNORED` where it is not known.
        palette: ``(C, 3)`` RGB in [0, 255].
    """
    step = -(-max(labels.shape) // LARGEST)
    labels, ignored = labels[::step, ::step], truth[::step, ::step] == IGNORED
    size = labels.shape[::-1]
    grey = np.asarray(Image.fromarray(picture).convert('L').resize(size, Image.Resampling.BOX), np.float64)[..., None]
    colours = np.asarray(palette, np.float64)[np.where(ignored, 0, labels)]
    mixed = STRENGTH * colours + (1 - STRENGTH) * grey
    ys, xs = np.indices(labels.shape)
    period = max(2, max(labels.shape) // 48)
    striped = STRIPES[(ys + xs) // period % 2]
    return np.rint(np.where(ignored[..., None], striped, mixed)).astype(np.uint8)


def image_iou(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean IoU of one image over the classes in its truth or its prediction; NaN when nothing is counted."""
    counted = truth != IGNORED
    found, truth = found[counted], truth[counted]
    ious = [np.sum((found == c) & (truth == c)) / np.sum((found == c) | (truth == c)) for c in np.union1d(found, truth)]
    return float(np.mean(ious)) if ious else math.nan
