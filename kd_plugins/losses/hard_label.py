"""Hard-label distillation: the teacher's decision as the label."""

from __future__ import annotations

from torch import Tensor

from kd_plugins.losses._common import aligned, full_precision
from kd_plugins.losses.base import DistillLoss


def hard_label(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Cross-entropy of the student against the class that the teacher finds most likely.

    .. math:: \frac{1}{N} \sum_n - \log \operatorname{softmax}(z^s_n)_{y_n}, \quad y_n = \arg\max_c z^t_{nc}

    Touvron et al., "Training data-efficient image transformers & distillation through attention" (ICML 2021, arXiv
    2012.12877), equation 3, without the factor 1/2 and the term of the true label, which are weights of the training.
    Unlike the other losses it is not 0 when student and teacher are equal, but when the student is certain.

    Reduction: mean over all positions N.

    Args:
        student: ``(..., C)`` class logits.
        teacher: ``(..., C)`` class logits; no gradient flows into it. The first of equal maxima decides.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ.
    """
    student, teacher = aligned(student, teacher, 'Class logits', 'map the classes by name first')
    with full_precision(student):
        label = teacher.argmax(-1, keepdim=True)
        loss = -student.log_softmax(-1).gather(-1, label)
        return loss.sum() / max(loss.numel(), 1)


class HardLabelLoss(DistillLoss):
    """Module form of `hard_label`. Consumes ``(..., C)`` logits of classes that exclude each other."""

    consumes = 'logits'
    activation = 'softmax'

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return hard_label(student, teacher)
