"""Classic YOLO logit distillation: L2 on objectness, box and class outputs."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import (
    aligned,
    as_full,
    check_choice,
    check_not_negative,
    describe,
    full_precision,
    mean_over_positions,
    reason_for_absence,
)
from kd_plugins.losses._dense import Dense
from kd_plugins.losses.base import DistillLoss

FOREGROUND = (False, True, 'box')


def l2(student: Tensor, teacher: Tensor, weight: Tensor | None = None, *, what: str = 'Predictions') -> Tensor:
    """Squared difference: mean over the last dimension, then over positions (weighted) and images.

    Args:
        student: ``(B, A, D)``.
        teacher: ``(B, A, D)``; no gradient flows into it.
        weight: ``(B, A)`` weight >= 0 of every position, normalised per image by its sum, which is clamped to at
            least 1; or None for uniform.
        what: Named in the message when shapes differ.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).
    """
    student, teacher = aligned(student, teacher, what)
    with full_precision(student):
        return mean_over_positions((student - teacher).square().mean(-1), weight)


def yolo_logit(
    student: Dense,
    teacher: Dense,
    *,
    obj_weight: float = 1.0,
    box_weight: float = 1.0,
    cls_weight: float = 1.0,
    scale: float = 1.0,
    foreground: bool | str = True,
) -> Tensor:
    r"""L2 between the raw outputs of two YOLO-style heads.

    .. math:: s \, ( w_{obj} \, \overline{(o^s - o^t)^2}
                   + w_{box} \, \overline{(b^s - b^t)^2} + w_{cls} \, \overline{(z^s - z^t)^2} )

    This is the logit distillation of the YOLOv3 to YOLOv7 code bases. Its source is the objectness scaled loss of
    Mehta & Ozturk, "Object detection at 200 Frames Per Second" (ECCV workshops 2018, arXiv 1805.06361): the
    student follows the teacher's class and box outputs in proportion to the teacher's objectness (so that it does
    not learn boxes of the background), and its objectness everywhere. Deviations:

    * The weighted sum is divided by the sum of the weights (per image, clamped to at least 1), not by the number of
      positions as the code bases do: there the size of the loss falls with the share of background.
    * Objectness is not weighted, as in the paper; some code bases weight it too.
    * The weight is the teacher's confidence, highest class probability times objectness: also defined for heads
      that have no objectness, and without the inflated class scores that a YOLO head gives to the background.

    Reduction: each of the three is the mean over images, positions (weighted, see ``foreground``) and channels (1, 4
    and C); the three are added.

    Boxes are compared as the heads' own outputs when both have the same ``box_coding``, otherwise as decoded
    distances (``ltrb``, in strides). Objectness is compared when both heads have it. Classes are compared as
    logits; those of heads that give probabilities are inverted.

    Args:
        student: Predictions of the student.
        teacher: Predictions of the teacher at the same positions; no gradient flows into it.
        obj_weight: Weight of the objectness term; 0 skips it.
        box_weight: Weight of the box term; 0 skips it.
        cls_weight: Weight of the class term; 0 skips it.
        scale: Factor on the sum of the three.
        foreground: Which terms weight positions by ``teacher.confidence()``: True box and classes, ``'box'`` the box
            only, False none.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: The predictions have nothing that is comparable for a term whose weight is not 0, or a
            hyper-parameter is out of range.
    """
    _check(obj_weight, box_weight, cls_weight, scale, foreground)
    with full_precision(student.cls):
        weight = None
        if foreground and (box_weight or cls_weight):
            # Before confidence() multiplies: in float16 the product of two small probabilities is 0.
            weight = teacher.float().confidence()
        terms = []
        objectness = _comparable_objectness(student, teacher)
        if obj_weight and objectness is not None:
            terms.append(obj_weight * l2(*objectness, what='Objectness logits'))
        if box_weight:
            boxes = _comparable_boxes(student, teacher)
            terms.append(box_weight * l2(*boxes, weight, what='Boxes'))
        if cls_weight:
            classes = _comparable_classes(student, teacher)
            cls_foreground = weight if foreground is True else None
            terms.append(cls_weight * l2(*classes, cls_foreground, what='Class logits'))
        if not terms:
            raise DistillError(
                'YOLOLogitLoss has nothing to compare: only obj_weight is not 0, but one of the heads has no '
                'objectness; set cls_weight or box_weight.'
            )
        return scale * sum(terms[1:], terms[0])


def _comparable_boxes(student: Dense, teacher: Dense) -> tuple[Tensor, Tensor]:
    same_coding = student.box_coding is not None and student.box_coding == teacher.box_coding
    if same_coding and student.box is not None and teacher.box is not None:
        return student.box, teacher.box
    if student.ltrb is None or teacher.ltrb is None:
        role, predictions = ('student', student) if student.ltrb is None else ('teacher', teacher)
        raise DistillError(
            f'YOLOLogitLoss cannot compare boxes: the codings differ (student {student.box_coding!r}, teacher '
            f'{teacher.box_coding!r}) and the {role} has no decoded boxes'
            f'{reason_for_absence(predictions, "ltrb")}; set box_weight=0.'
        )
    return student.ltrb, teacher.ltrb


def _comparable_classes(student: Dense, teacher: Dense) -> tuple[Tensor, Tensor]:
    if (student.activation == 'softmax') != (teacher.activation == 'softmax'):
        raise DistillError(
            f'YOLOLogitLoss cannot compare class logits of a {student.activation!r} student with those of a '
            f'{teacher.activation!r} teacher; set cls_weight=0 and use BinaryKLDivLoss for the classes.'
        )
    # In full precision before probabilities are inverted: 1 - 1e-6 is 1 in half precision, and its logit infinite.
    student, teacher = (p.replace(cls=as_full(p.cls)) for p in (student, teacher))
    return student.class_logits(), teacher.class_logits()


def _comparable_objectness(student: Dense, teacher: Dense) -> tuple[Tensor, Tensor] | None:
    # Centerness is arbitrary on the background, objectness is not: they cannot be compared with each other.
    if student.obj is None or teacher.obj is None or student.obj_coding != teacher.obj_coding:
        return None
    return student.obj, teacher.obj


def _check(obj_weight: float, box_weight: float, cls_weight: float, scale: float, foreground: bool | str) -> None:
    check_not_negative(obj_weight=obj_weight, box_weight=box_weight, cls_weight=cls_weight, scale=scale)
    check_choice(FOREGROUND, foreground=foreground)
    if not (obj_weight or box_weight or cls_weight):
        raise DistillError('obj_weight, box_weight and cls_weight are all 0; at least one must be > 0.')


class YOLOLogitLoss(DistillLoss):
    """Module form of `yolo_logit`, which see for the arguments. Consumes two aligned ``DensePredictions``."""

    consumes = 'predictions'

    def __init__(
        self,
        obj_weight: float = 1.0,
        box_weight: float = 1.0,
        cls_weight: float = 1.0,
        scale: float = 1.0,
        foreground: bool | str = True,
    ) -> None:
        super().__init__()
        _check(obj_weight, box_weight, cls_weight, scale, foreground)
        self.obj_weight = obj_weight
        self.box_weight = box_weight
        self.cls_weight = cls_weight
        self.scale = scale
        self.foreground = foreground

    def forward(self, student: Dense, teacher: Dense) -> Tensor:
        return yolo_logit(
            student,
            teacher,
            obj_weight=self.obj_weight,
            box_weight=self.box_weight,
            cls_weight=self.cls_weight,
            scale=self.scale,
            foreground=self.foreground,
        )

    def extra_repr(self) -> str:
        return describe(
            obj_weight=self.obj_weight,
            box_weight=self.box_weight,
            cls_weight=self.cls_weight,
            scale=self.scale,
            foreground=self.foreground,
        )
