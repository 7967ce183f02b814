"""Draws the gains in the README's table of results as docs/img/results.png: ``python tools/draw_results.py --help``."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kd_plugins.lab.comparison.figures import save

ROOT = Path(__file__).resolve().parents[1]
BETTER, UNDECIDED, WORSE, INK, PALE = '#2f9e44', '#9aa3ad', '#d9541e', '#1f2937', '#6b7280'
HEAD = '| data, student | plain | distilled | gain |'
NUMBER = r'[+-]?[\d.]+(?: ± [\d.]+)?'


@dataclass(frozen=True)
class Result:
    """One method's gain, as the table says it: ``'+4.2 ± 1.6'``."""

    data: str
    method: str
    scores: str
    gain: str

    @property
    def mean(self) -> float:
        return float(self.gain.split(' ± ')[0])

    @property
    def deviation(self) -> float | None:
        _, _, deviation = self.gain.partition(' ± ')
        return float(deviation) if deviation else None

    @property
    def color(self) -> str:
        """A gain within its deviation is none."""
        if abs(self.mean) <= (self.deviation or 0):
            return UNDECIDED
        return BETTER if self.mean > 0 else WORSE


def rows(text: str) -> list[Result]:
    """The methods of the table of results, in its order.

    Args:
        text: The README.

    Raises:
        ValueError: There is no such table, or a row of it has not as many gains as scores.
    """
    _, found, table = text.partition(HEAD)
    if not found:
        raise ValueError(f'the README has no table that begins with {HEAD!r}.')
    result = []
    for line in table.split('\n\n')[0].splitlines()[2:]:
        data, plain, distilled, gains = (cell.strip().replace('**', '') for cell in line.split('|')[1:5])
        methods = re.findall(rf'(?:`([^`]+)`|([a-z]+))? ?({NUMBER})', distilled)
        gains = re.findall(NUMBER, gains)
        if not methods or len(methods) != len(gains):
            raise ValueError(f'scores and gains are not as many in the row {line!r}.')
        for (recipe, word, score), gain in zip(methods, gains, strict=True):
            # A row without a recipe is of a method that its first cell names.
            method = recipe or word or re.findall('`([^`]+)`', data)[0]
            scores = f'{plain.split()[0]} → {score.split()[0]}'
            result.append(Result(re.sub(', [^,]*`[^`]+`', '', data), method, scores, gain))
    return result


def said(found: list[Result]) -> str:
    """The picture in words."""
    return '\n'.join(f'{one.data}: {one.method} {one.scores}, {one.gain}' for one in found)


def draw(found: list[Result], path: Path) -> None:
    """One bar per method.

    Args:
        found: Of `rows`.
        path: PNG to write.
    """
    figure = Figure(figsize=(9, 0.36 * len(found) + 1.1), facecolor='white')
    axes = figure.add_axes((0.56, 0.145, 0.31, 0.72))
    across = axes.get_yaxis_transform()
    for x, name, side in ((-1.78, 'data, student (measure)', 'left'), (-0.53, 'method', 'center'),
                          (-0.18, 'plain → distilled', 'center'), (1.2, 'gain', 'center')):  # fmt: skip
        axes.text(x, -1, name, transform=across, ha=side, va='center', color=PALE, fontsize=9)
    for y, one in enumerate(found):
        axes.barh(y, one.mean, color=one.color, height=0.62, zorder=2)
        if one.deviation is not None:
            axes.errorbar(one.mean, y, xerr=one.deviation, color=INK, capsize=3, linewidth=1.1, zorder=3)
        if y == 0 or found[y - 1].data != one.data:
            axes.text(-1.78, y, one.data, transform=across, va='center', color=INK, fontsize=9.5)
        axes.text(-0.53, y, one.method, transform=across, ha='center', va='center', color=INK, fontsize=9.5)
        axes.text(-0.18, y, one.scores, transform=across, ha='center', va='center', color=INK, fontsize=9.5)
        axes.text(1.2, y, one.gain.replace('-', '−'), transform=across, ha='center', va='center', color=one.color,
                  weight='bold', fontsize=9.5)  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1, zorder=4)
    axes.set(yticks=[], ylim=(len(found) - 0.4, -0.6))
    axes.grid(axis='x', color='#e5e7eb')
    axes.set_axisbelow(True)
    axes.tick_params(axis='x', labelsize=9, colors=PALE)
    for side in ('top', 'right', 'left', 'bottom'):
        axes.spines[side].set_visible(False)
    axes.set_xlabel('points over the plain student, ± standard deviation over seeds', fontsize=9, color=PALE)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path, dpi=140, colors=64)
    # What it shows, in words, so that a test can tell whether the table has changed since.
    note = PngInfo()
    note.add_itxt('Description', said(found))
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, optimize=True, pnginfo=note)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split(':')[0])
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'img' / 'results.png', help='PNG to write')
    arguments = parser.parse_args()
    draw(rows((ROOT / 'README.md').read_text()), arguments.out)
    print(arguments.out)


if __name__ == '__main__':
    main()
