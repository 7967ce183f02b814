"""The picture of classifiers: some images, and below each of them what every model takes it for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kd_plugins.lab.comparison.figures import Picture, save, spread

#: Colour and sign of a cell: the colour alone would say nothing to some readers.
RIGHT, WRONG = ('#c9efd3', '\N{CHECK MARK}'), ('#ffcdc7', '\N{BALLOT X}')
LONGEST = 15  # characters of a class name, and of a line of a model's
WIDTH = 10.5  # inches of the images of one line
PICTURE, CELL, TITLE, HEADING, GAP = 0.9, 0.24, 0.22, 0.34, 0.1  # inches


@dataclass(frozen=True)
class Guess:
    """What a model takes an image for.

    Attributes:
        label: Class index.
        probability: In [0, 1].
    """

    label: int
    probability: float


@dataclass
class Classifications(Picture):
    """What several models take the same images for.

    Attributes:
        groups: Ids of the images by headline.
        pictures: ``(H, W, 3)`` uint8 images by id.
        truth: Class indices by id.
        found: Guesses by model and id.
        classes: Class names.
    """

    name: ClassVar[str] = 'classifications'
    content: ClassVar[str] = (
        f"each model's first guess with its probability in %, right ({RIGHT[1]}) or wrong ({WRONG[1]}); the class of "
        'an image stands above it'
    )
    chosen: ClassVar[str] = (
        'Of the images that the models disagree on, whoever is right, and of those that they agree on, the same number '
        'at even distances through the validation set'
    )
    alt: ClassVar[str] = 'images, and below each the class that every model takes it for'
    groups: Mapping[str, Sequence[Any]]
    pictures: Mapping[Any, np.ndarray]
    truth: Mapping[Any, int]
    found: Mapping[str, Mapping[Any, Guess]]
    classes: Sequence[str]

    @property
    def images(self) -> list[Any]:
        """See `Picture`."""
        return [image for group in self.groups.values() for image in group]

    def draw(self, path: Path) -> None:
        """See `Picture.draw`."""
        labels = {guess.label for found in self.found.values() for guess in found.values()} | set(self.truth.values())
        # A sign, a space, the name, the probability.
        width = max(PICTURE + GAP, 0.072 * (max(len(_short(self.classes[i])) for i in labels) + 6))
        most, fit = max(map(len, self.groups.values())), int(WIDTH / width)
        columns = math.ceil(most / math.ceil(most / fit))  # lines of the same length
        lines = [
            (heading if i == 0 else None, group[i : i + columns])
            for heading, group in self.groups.items()
            for i in range(0, len(group), columns)
        ]
        heights = [_height(heading, len(self.found)) for heading, _ in lines]
        longest = max(len(images) for _, images in lines)
        beside = 0.2 + 0.066 * max(map(len, self.found))
        # Wide enough for the headline of a single image.
        size = (max(beside + width * longest, 6.0), sum(heights))
        figure = Figure(figsize=size)
        axes = figure.add_axes((0, 0, 1, 1))  # in inches, from the top left corner
        for (heading, images), top in zip(lines, np.cumsum([0.0, *heights]), strict=False):
            self._line(axes, (beside, top), width, heading, images)
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect='auto')
        axes.axis('off')
        save(figure, path, dpi=120, colors=None)  # a palette of so many pictures would dull the cells

    def _line(
        self, axes: Axes, corner: tuple[float, float], width: float, heading: str | None, images: Sequence[Any]
    ) -> None:
        beside, top = corner
        style = dict(va='center', color='black')
        if heading is not None:
            axes.text(0.08, top + HEADING / 2, heading, fontsize=11, weight='bold', **style)
            top += HEADING
        cells = top + TITLE + PICTURE + GAP / 2
        for row, model in enumerate(self.found):
            axes.text(0.08, cells + (row + 0.5) * CELL, model, fontsize=8.5, **style)
        for column, image in enumerate(images):
            left, truth = beside + column * width, self.truth[image]
            middle = left + width / 2
            name = _short(self.classes[truth])
            axes.text(middle, top + TITLE / 2, name, fontsize=9.5, weight='bold', ha='center', **style)
            _picture(axes, self.pictures[image], middle, top + TITLE)
            for row, found in enumerate(self.found.values()):
                guess = found[image]
                color, sign = RIGHT if guess.label == truth else WRONG
                y = cells + row * CELL
                axes.add_patch(Rectangle((left + 0.02, y), width - 0.04, CELL - 0.02, color=color, linewidth=0))
                text = f'{sign} {_short(self.classes[guess.label])}'
                axes.text(left + 0.07, y + CELL / 2 - 0.01, text, fontsize=8, ha='left', **style)
                share = f'{100 * guess.probability:.0f}'
                axes.text(left + width - 0.07, y + CELL / 2 - 0.01, share, fontsize=8, ha='right', **style)


def choose_images(guesses: Sequence[Sequence[int]], count: int) -> dict[str, list[int]]:
    """Images that show where models differ without favouring one of them.

    Args:
        guesses: Class indices that every model gives, in the order of the data set.
        count: Images of each group.

    Returns:
        Indices of images by headline: some that not all models take for the same class, whoever is right, and some
        that they do; both at even distances. A group without images is left out.
    """
    labels = np.asarray(guesses)
    differ = (labels != labels[0]).any(0)
    groups = {}
    for words, chosen in (('disagree', differ), ('agree', ~differ)):
        found = np.flatnonzero(chosen).tolist()
        if found:
            shown = spread(found, count)
            groups[f'The models {words} on {len(found)} of {len(differ)} images; {len(shown)} of these:'] = shown
    return groups


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f'{name[: LONGEST - 1].rstrip()}…'


def _height(heading: str | None, models: int) -> float:
    return (HEADING if heading else 0) + TITLE + PICTURE + GAP / 2 + models * CELL + GAP


def _picture(axes: Axes, picture: np.ndarray, middle: float, top: float) -> None:
    """Draw a picture of any shape into a square of `PICTURE` inches."""
    height, width = (PICTURE * s / max(picture.shape[:2]) for s in picture.shape[:2])
    extent = (middle - width / 2, middle + width / 2, top + (PICTURE + height) / 2, top + (PICTURE - height) / 2)
    axes.imshow(picture, extent=extent, interpolation='nearest' if len(picture) < 128 else 'antialiased')
