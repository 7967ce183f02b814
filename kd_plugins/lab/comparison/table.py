"""The table of a comparison: one row per model, gains against the plain student of the same seed."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kd_plugins.distiller.summary import WIDTH


@dataclass(frozen=True)
class Metrics:
    """What models are compared by. The first one is that of gains and verdicts.

    Attributes:
        names: Columns of the table.
        keys: Their keys in ``results.json``.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...]

    @property
    def main(self) -> str:
        """Name of the one that gains are measured in."""
        return self.names[0]


#: In place of a figure that nobody measured.
ABSENT = 'not measured'
BOXES = Metrics(('mAP', 'AP50'), ('map', 'map50'))
LABEL_MAPS = Metrics(('mIoU', 'mAcc'), ('miou', 'macc'))


def weights_size(state: Mapping[str, Any]) -> int:
    """Bytes of a model's tensors, numbers with a point in single precision: what can be compared.

    Files of checkpoints hold optimizers, averages and logs too, and frameworks store other precisions.

    Args:
        state: Its state dict; what is no tensor does not count.
    """
    tensors = [v for v in state.values() if isinstance(v, Tensor)]
    return sum(v.numel() * (4 if v.is_floating_point() else v.element_size()) for v in tensors)


@dataclass(frozen=True)
class Result:
    """One trained and evaluated model.

    Attributes:
        seed: Its seed.
        accuracy: Values in [0, 1], one for each of the `Metrics`.
        seconds: Median seconds of training per step (see `header`); NaN when it was not trained here.
        size: Bytes of its weights, see `weights_size`.
        weights: Where its last checkpoint is.
    """

    seed: int
    accuracy: tuple[float, ...]
    seconds: float
    size: int
    weights: str = ''

    @property
    def main(self) -> float:
        """The accuracy that gains are measured in."""
        return self.accuracy[0]


@dataclass
class Arm:
    """One row: a model under one way of training, over one or more seeds.

    Attributes:
        name: What the row says.
        parameters: Parameters of the model.
        results: One per seed, in the same order in every arm of the student.
    """

    name: str
    parameters: int
    results: list[Result] = field(default_factory=list)

    def gains(self, plain: Arm) -> list[float]:
        """Accuracy minus that of the plain arm, seed by seed."""
        return [a.main - b.main for a, b in zip(self.results, plain.results, strict=True)]


#: Metrics, teacher, plain and distilled students of several comparisons, by what these are called.
Groups = Mapping[str, tuple[Metrics, Arm, Arm, Sequence[Arm]]]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is NaN for a single value, both where one is NaN."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def interval(gains: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the mean gain over pairs of students of the same seed, by Student's t.

    The seeds are the sample: it says what other seeds would give, not other data.

    Args:
        gains: One per seed.
        confidence: How often such intervals hold the true mean, were gains normally distributed.

    Returns:
        ``(low, high)``; NaN for fewer than two seeds, or where one was not measured.
    """
    from scipy.stats import t

    mean, spread = mean_and_spread(gains)
    if math.isnan(spread) or math.isnan(mean):
        return math.nan, math.nan
    half = float(t.ppf((1 + confidence) / 2, len(gains) - 1)) * spread / math.sqrt(len(gains))
    return mean - half, mean + half


def _points(values: Sequence[float], signed: bool = False) -> str:
    """Fractions as points of 100, with the spread when there is one."""
    mean, spread = mean_and_spread([100 * v for v in values])
    if math.isnan(mean):
        return ABSENT
    text = f'{mean:+.1f}' if signed else f'{mean:.1f}'
    return text if math.isnan(spread) else f'{text} ± {spread:.1f}'


def _count(number: int) -> str:
    return f'{number / 1e6:.2f} M' if number >= 100_000 else f'{number / 1e3:.1f} k'


def header(metrics: Metrics, step: str = 'iter') -> tuple[str, ...]:
    """Names of the columns.

    Args:
        metrics: What the models are compared by.
        step: What `Result.seconds` is for: ``'iter'`` or ``'epoch'``.
    """
    return ('model', 'parameters', *metrics.names, 'gain', f's/{step}', 'weights')


def rows(teacher: Arm, plain: Arm, distilled: Sequence[Arm]) -> list[tuple[str, ...]]:
    """The cells, without the header. Accuracies and gain are in points (x 100), weights in MB (10^6 bytes)."""
    table = []
    for arm in (teacher, plain, *distilled):
        seconds = [r.seconds for r in arm.results if not math.isnan(r.seconds)]
        table.append(
            (
                arm.name,
                _count(arm.parameters),
                *(_points(values) for values in zip(*(r.accuracy for r in arm.results), strict=True)),
                _points(arm.gains(plain), signed=True) if arm in distilled else '',
                f'{statistics.median(seconds):.3f}' if seconds else '',
                f'{arm.results[-1].size / 1e6:.1f} MB',
            )
        )
    return table


def render(table: Sequence[Sequence[str]], columns: Sequence[str], left: int = 1) -> str:
    """Cells as aligned text: the first columns to the left, the others to the right."""
    lines = [columns, *table]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    rule = '-' * (sum(widths) + 2 * (len(widths) - 1))

    def one(line: Sequence[str]) -> str:
        cells = enumerate(zip(line, widths, strict=True))
        return '  '.join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in cells).rstrip()

    return '\n'.join([one(columns), rule, *(one(line) for line in table)])


def seed_rows(plain: Arm, distilled: Sequence[Arm]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the table per seed: accuracy of every arm in points, and its gain."""
    columns = ('seed', plain.name, *(arm.name for arm in distilled))
    table = []
    for i, result in enumerate(plain.results):
        cells = [f'{100 * arm.results[i].main:.1f} ({100 * arm.gains(plain)[i]:+.1f})' for arm in distilled]
        table.append((str(result.seed), f'{100 * result.main:.1f}', *cells))
    return columns, table


def verdict(plain: Arm, arm: Arm, metric: str) -> str:
    """One honest sentence on a distilled arm: the gain whatever its sign, and how sure it is."""
    gains = [100 * g for g in arm.gains(plain)]
    mean, spread = mean_and_spread(gains)
    if math.isnan(mean):
        return f'{arm.name}: no gain can be told, as {metric} was not measured for every student.'
    if math.isnan(spread):
        return f'{arm.name}: {mean:+.1f} {metric} on one seed; a single pair says nothing about the spread (--seeds 3).'
    better = sum(g > 0 for g in gains)
    low, high = interval(gains)
    return (
        f'{arm.name}: {mean:+.1f} ± {spread:.1f} {metric} over {len(gains)} seeds (95 % interval of the mean '
        f'{low:+.1f} to {high:+.1f}), better than plain in {better} of {len(gains)}.'
    )


def doubt(teacher: Arm, plain: Arm, metric: str) -> str:
    """A sentence when the teacher is not better than the plain student, or not measured; else nothing."""
    theirs, ours = (mean_and_spread([100 * r.main for r in arm.results])[0] for arm in (teacher, plain))
    if math.isnan(theirs):
        return f'The teacher has no {metric}: whether it is better than the plain student is not known.'
    if not theirs <= ours:
        return ''
    return (
        f'The teacher ({theirs:.1f} {metric}) is not better than the plain student ({ours:.1f}): there is little to '
        'learn from it; train it for longer, or take a better one.'
    )


def verdicts(teacher: Arm, plain: Arm, distilled: Sequence[Arm], metric: str) -> list[str]:
    """What the table says, in sentences: one for each distilled arm, and before them a `doubt`."""
    sentences = [doubt(teacher, plain, metric), *(verdict(plain, arm, metric) for arm in distilled)]
    return [sentence for sentence in sentences if sentence]


def files(arms: Sequence[Arm]) -> str:
    """Where the models are, one line each; of several seeds the first."""
    found = [(arm.name, arm.results[0].weights) for arm in arms if arm.results and arm.results[0].weights]
    width = max((len(name) for name, _ in found), default=0)
    return '\n'.join(f'{name:<{width}}  {weights}' for name, weights in found)


def text(teacher: Arm, plain: Arm, distilled: Sequence[Arm], metrics: Metrics, step: str = 'iter') -> str:
    """The tables as they are printed, with what their figures mean."""
    parts = [render(rows(teacher, plain, distilled), header(metrics, step))]
    if len(plain.results) > 1:
        columns, table = seed_rows(plain, distilled)
        parts.append(f'{metrics.main} per seed (gain over plain with the same seed)\n' + render(table, columns))
    parts.append(_paragraphs(verdicts(teacher, plain, distilled, metrics.main)))
    parts.append(files([teacher, plain, *distilled]))
    return '\n\n'.join(filter(None, parts))


JOINT = ('', 'model', 'parameters', 'measured', 'gain')


def joint_rows(groups: Groups) -> list[tuple[str, ...]]:
    """The cells of the table of several comparisons (`JOINT` are its columns): what all have in common."""
    table = []
    for name, (metrics, teacher, plain, distilled) in groups.items():
        for i, (model, parameters, first, *_, gain, _, _) in enumerate(rows(teacher, plain, distilled)):
            table.append((name if i == 0 else '', model, parameters, f'{first} {metrics.main}', gain))
    return table


def joint_verdicts(groups: Groups) -> list[str]:
    """A sentence for each distilled row, and for each teacher that is not better than the plain student."""
    return [
        f'{name}, {sentence}'
        for name, (metrics, teacher, plain, distilled) in groups.items()
        for sentence in verdicts(teacher, plain, distilled, metrics.main)
    ]


def joint_text(groups: Groups) -> str:
    """The table of several comparisons as it is printed, with what its figures mean."""
    parts = [render(joint_rows(groups), JOINT, left=2), _paragraphs(joint_verdicts(groups))]
    return '\n\n'.join(parts)


def _paragraphs(sentences: Sequence[str]) -> str:
    return '\n'.join(textwrap.fill(sentence, WIDTH, subsequent_indent='  ') for sentence in sentences)
