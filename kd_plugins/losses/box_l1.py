"""L1 between the box distances of two dense heads, for heads that regress them without bins."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import (
    aligned,
    check_choice,
    describe,
    full_precision,
    mean_over_positions,
    reason_for_absence,
)
from kd_plugins.losses._dense import Dense
from kd_plugins.losses.base import DistillLoss


def box_l1(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Absolute difference of the distances to the four sides.

    .. math:: \operatorname{mean}_a \frac{1}{4} \sum_{e \in \{l, t, r, b\}} | d^s_{ae} - d^t_{ae} |

    The imitation of a teacher's box regression goes back to Chen et al., "Learning Efficient Object Detection Models
    with Knowledge Distillation" (NeurIPS 2017), section 3.3. Deviations: L1 instead of their teacher bounded L2, and
    the teacher's confidence as weight instead of positives by label. In strides, so that all levels count alike.

    Reduction: mean over the 4 sides, mean over positions and images; with ``weight`` the weighted mean over the
    positions of each image, divided by ``max(sum(weight), 1)``, then the mean over images.

    Args:
        student: ``(B, A, 4)`` distances in strides.
        teacher: ``(B, A, 4)`` distances; no gradient flows into it.
        weight: ``(B, A)`` weight >= 0 of every position, or None for uniform.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ.
    """
    student, teacher = aligned(student, teacher, 'Box distances')
    with full_precision(student):
        return mean_over_positions((student - teacher).abs().mean(-1), weight)


class BoxL1Loss(DistillLoss):
    """Module form of `box_l1`. Consumes two aligned ``DensePredictions``.

    Boxes are compared as the heads' own outputs when both have the same ``box_coding``, otherwise as decoded
    distances (``ltrb``).

    Args:
        foreground: Weight positions by ``teacher.confidence()``.
    """

    consumes = 'predictions'

    def __init__(self, foreground: bool = True) -> None:
        super().__init__()
        check_choice((False, True), foreground=foreground)
        self.foreground = foreground

    def forward(self, student: Dense, teacher: Dense) -> Tensor:
        weight = None
        if self.foreground:
            with full_precision(teacher.cls):
                # Before confidence() multiplies: in float16 the product of two small probabilities is 0.
                weight = teacher.float().confidence()
        return box_l1(*_distances(student, teacher), weight)

    def extra_repr(self) -> str:
        return describe(foreground=self.foreground)


def _distances(student: Dense, teacher: Dense) -> tuple[Tensor, Tensor]:
    same = student.box_coding is not None and student.box_coding == teacher.box_coding
    if same and student.box is not None and teacher.box is not None:
        return student.box, teacher.box
    if student.ltrb is None or teacher.ltrb is None:
        role, predictions = ('student', student) if student.ltrb is None else ('teacher', teacher)
        raise DistillError(
            f'BoxL1Loss cannot compare boxes: the codings differ (student {student.box_coding!r}, teacher '
            f'{teacher.box_coding!r}) and the {role} has no decoded boxes{reason_for_absence(predictions, "ltrb")}.'
        )
    return student.ltrb, teacher.ltrb
