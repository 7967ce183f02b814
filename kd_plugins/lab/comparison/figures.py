"""The pictures of a report: curves, and what the models find in some images, side by side."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

from kd_plugins.lab.comparison.history import History

T = TypeVar('T')
COLORS = ('#1f6fb4', '#d9541e', '#2f9e44', '#8e44ad', '#b8860b', '#16a0a0')  # plain first, then the distilled ones
LINES = ('-', ':', '-.')  # the next kind when there are more arms than colours; dashed is the teacher
TEACHER = '#6b7280'
RIGHT, WRONG, MISSED = '#22c55e', '#ff3b30', '#ffd60a'
OUTLINE = [Stroke(linewidth=2.6, foreground='black'), Normal()]  # so that every colour shows on every background
DASHES = (0, (2, 1.5))
SCORE = 0.3  # detections below it are not drawn
IOU = 0.5  # from which a detection has found an object


def save(figure: Figure, path: Path, dpi: int = 110, colors: int | None = 256) -> None:
    """Save as a PNG with a palette: a third of the size, and hardly a difference that shows.

    Args:
        figure: What to save.
        path: PNG to write.
        dpi: Dots per inch.
        colors: Size of the palette; None keeps every colour.
    """
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
    if colors is not None:
        picture = picture.quantize(colors, method=Image.Quantize.MAXCOVERAGE)
    picture.save(path, optimize=True)


def draw_curves(
    path: Path,
    arms: Mapping[str, Sequence[History]],
    teacher: float,
    metric: str,
    name: str = 'mAP',
    unit: str = 'epoch',
) -> None:
    """Task loss and accuracy over training, one thin line per seed.

    The losses are comparable because only the student's own loss is drawn, without the distillation terms.

    Args:
        path: PNG to write.
        arms: Runs of every arm by name, the plain one first.
        teacher: Accuracy of the teacher in [0, 1], drawn as a level; NaN: it was not measured.
        metric: Key of the accuracy in the validation logs.
        name: What it is called.
        unit: What the x axis counts.
    """
    figure = Figure(figsize=(10, 3.8), layout='constrained')
    left, right = figure.subplots(1, 2)
    looks = cycle(product(LINES, COLORS))
    for (arm, runs), (line, color) in zip(arms.items(), looks, strict=False):
        for i, history in enumerate(runs):
            width, alpha = (1.8, 1) if len(runs) == 1 else (1.2, 0.75)
            style = dict(color=color, linestyle=line, linewidth=width, alpha=alpha)
            label = arm if i == 0 else None
            x, total = task_loss(history)
            left.plot(x, _smooth(total), label=label, **style)
            x, values = history.metric_curve(metric)
            right.plot(x, [100 * v for v in values], marker='o', markersize=3.5, label=label, **style)
    if not math.isnan(teacher):
        right.axhline(100 * teacher, color=TEACHER, linestyle='--', linewidth=1.2, label='teacher')
    left.set(title="Student's own loss (without distillation terms)", xlabel=unit, ylabel='loss')
    right.set(title='Validation', xlabel=unit, ylabel=f'{name} (%)')
    right.set_ylim(bottom=0)
    right.set_xlim(left=0)
    left.set_xlim(left=0)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def task_loss(history: History) -> tuple[list[float], list[float]]:
    """``(epochs, losses)`` of the student's own loss: the total without the ``loss_kd_*`` terms."""
    x, total = history.curve('loss')
    steps = [s for s, line in sorted(history.train.items()) if 'loss' in line]
    kd = [sum(v for k, v in history.train[s].items() if k.startswith('loss_kd_')) for s in steps]
    return x, [t - k for t, k in zip(total, kd, strict=True)]


def _smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    """Running mean of ``width`` lines of the log, shorter at both ends."""
    if len(values) < 3 * width:
        return np.asarray(values)
    kernel = np.ones(width)
    return np.convolve(values, kernel, 'same') / np.convolve(np.ones(len(values)), kernel, 'same')


class Picture(ABC):
    """What several models find in the same images, drawn side by side.

    Attributes:
        name: Of the file, without suffix, and of the section in the report.
        content: What each cell shows, for the caption.
        chosen: How the images were picked, for the caption.
        alt: What is seen, for those who cannot see it.
        images: Ids of the images, in the order of the rows.
    """

    name: ClassVar[str]
    content: ClassVar[str]
    chosen: ClassVar[str] = 'Images at even distances through the validation set, picked before any prediction was seen'
    alt: ClassVar[str]
    images: Sequence[Any]

    @abstractmethod
    def draw(self, path: Path) -> None:
        """Write the PNG."""


def spread(items: Sequence[T], count: int) -> list[T]:
    """Some items at even distances."""
    count = min(count, len(items))
    return [items[round((k + 0.5) * len(items) / count - 0.5)] for k in range(count)]


@dataclass
class Objects:
    """Boxes of one image.

    Attributes:
        boxes: ``(N, 4)`` x1, y1, x2, y2 in pixels of the original image.
        labels: ``(N,)`` class indices.
        scores: ``(N,)`` in [0, 1], None for ground truth.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None


@dataclass
class Detections(Picture):
    """The boxes that several models found in the same images.

    Attributes:
        images: Ids of the images, in the order of the rows.
        files: The image files by id.
        truth: Ground truth by id.
        found: Detections by model and id.
        classes: Class names.
    """

    name: ClassVar[str] = 'detections'
    content: ClassVar[str] = f'detections with a score of at least {SCORE:g} (numbers: class, score in %)'
    alt: ClassVar[str] = "ground truth and every model's detections side by side"
    images: Sequence[Any]
    files: Mapping[Any, str]
    truth: Mapping[Any, Objects]
    found: Mapping[str, Mapping[Any, Objects]]
    classes: Sequence[str]

    def draw(self, path: Path) -> None:
        """See `Picture.draw`."""
        draw_detections(path, self)


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``(N, M)`` intersection over union of ``(N, 4)`` and ``(M, 4)`` boxes."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = np.prod(np.clip(high - low, 0, None), -1)
    area_a, area_b = (np.prod(x[:, 2:] - x[:, :2], -1) for x in (a, b))
    return inter / np.maximum(area_a[:, None] + area_b[None] - inter, 1e-9)


def judge(found: Objects, truth: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are right, and which objects were missed.

    As COCO does at IoU 0.5: by falling score, each takes the best free object of its class.

    Returns:
        ``(N,)`` bool for the detections, ``(M,)`` bool for the objects.
    """
    right = np.zeros(len(found.labels), bool)
    free = np.ones(len(truth.labels), bool)
    overlaps = iou(found.boxes, truth.boxes)
    for i in np.argsort(-found.scores, kind='stable'):
        fitting = np.where(free & (truth.labels == found.labels[i]), overlaps[i], 0.0)
        if fitting.size and fitting.max() >= IOU:
            right[i] = True
            free[fitting.argmax()] = False
    return right, free


def draw_detections(path: Path, detections: Detections) -> None:
    """Some images, one row each: ground truth, then every model's detections.

    Args:
        path: PNG to write.
        detections: What to draw.
    """
    truth, images, classes = detections.truth, detections.images, detections.classes
    names = ['ground truth', *detections.found]
    pictures = {i: np.asarray(Image.open(detections.files[i]).convert('RGB')) for i in images}
    ratio = max(p.shape[0] / p.shape[1] for p in pictures.values())
    side = 2.35 if len(names) <= 4 else 2.0
    figure = Figure(figsize=(side * len(names), side * ratio * len(images) + 0.75))
    grid = figure.subplots(len(images), len(names), squeeze=False)
    bottom = 0.36 / figure.get_figheight()
    figure.subplots_adjust(0.005, bottom, 0.995, 1 - 0.34 / figure.get_figheight(), 0.02, 0.02)
    for row, image in zip(grid, images, strict=True):
        for axes, name in zip(row, names, strict=True):
            height, width = pictures[image].shape[:2]
            axes.imshow(pictures[image], interpolation='nearest' if width < 320 else 'antialiased')
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if name == 'ground truth':
                _draw_boxes(axes, truth[image], ['white'] * len(truth[image].labels), classes)
                continue
            found = detections.found[name][image]
            keep = found.scores >= SCORE
            found = Objects(found.boxes[keep], found.labels[keep], found.scores[keep])
            right, missed = judge(found, truth[image])
            _draw_boxes(
                axes, Objects(truth[image].boxes[missed], truth[image].labels[missed]), [MISSED] * missed.sum(), None
            )
            _draw_boxes(axes, found, [RIGHT if r else WRONG for r in right], classes)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=11, pad=5)
    legend = [
        Line2D([], [], color=RIGHT, linewidth=2, label=f'right (class, IoU >= {IOU:g})'),
        Line2D([], [], color=WRONG, linewidth=2, label='wrong'),
        Line2D([], [], color=MISSED, linewidth=2, linestyle=DASHES, path_effects=OUTLINE, label='missed'),
    ]
    figure.legend(
        handles=legend,
        loc='lower center',
        ncols=3,
        frameon=False,
        fontsize=10,
        bbox_to_anchor=(0.5, 0.0),
        title=None,
        borderaxespad=0.3,
    )
    save(figure, path, dpi=120)


def _draw_boxes(axes: Any, objects: Objects, colors: Sequence[str], classes: Sequence[str] | None) -> None:
    for k, (box, label, color) in enumerate(zip(objects.boxes, objects.labels, colors, strict=True)):
        x, y = box[:2]
        frame = Rectangle((x, y), box[2] - x, box[3] - y, fill=False, edgecolor=color, linewidth=1.4)
        frame.set_linestyle(DASHES if classes is None else '-')
        frame.set_path_effects(OUTLINE)
        axes.add_patch(frame)
        if classes is None:
            continue
        text = classes[label] if objects.scores is None else f'{classes[label]} {100 * objects.scores[k]:.0f}'
        axes.text(
            x,
            max(y, 0.06 * axes.get_ylim()[0]),
            text,
            fontsize=6.5,
            color='black',
            va='bottom',
            ha='left',
            clip_on=True,
            bbox=dict(facecolor=color, edgecolor='none', pad=0.6, alpha=0.85),
        )


def choose_images(truth: Mapping[int, Objects], count: int) -> list[int]:
    """Image ids at even distances through the set: picked before any detection is seen."""
    return spread([i for i in truth if len(truth[i].labels)] or list(truth), count)
