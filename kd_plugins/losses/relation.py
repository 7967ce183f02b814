"""Relational knowledge distillation: distances and angles between the images of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import smooth_l1_loss

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import as_full, check_not_negative, describe, full_precision
from kd_plugins.losses.base import DistillLoss


def relation(student: Tensor, teacher: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    r"""Huber losses on the distances of pairs and the angles of triplets; the embedding sizes may differ.

    .. math:: w_D \operatorname{mean}_{i \ne j} \ell_\delta \left( \psi_D(s_i, s_j), \psi_D(t_i, t_j) \right)
            + w_A \operatorname{mean}_{i \ne j \ne k \ne i} \ell_\delta
              \left( \psi_A(s_i, s_j, s_k), \psi_A(t_i, t_j, t_k) \right)

    .. math:: \psi_D(t_i, t_j) = \frac{\|t_i - t_j\|_2}{\operatorname{mean}_{k \ne l} \|t_k - t_l\|_2}, \quad
              \psi_A(t_i, t_j, t_k) = \left\langle \frac{t_i - t_j}{\|t_i - t_j\|_2},
              \frac{t_k - t_j}{\|t_k - t_j\|_2} \right\rangle

    and :math:`\ell_\delta` the Huber loss with :math:`\delta = 1`. Park et al., "Relational Knowledge Distillation"
    (CVPR 2019, arXiv 1904.05068), sections 3.2.1 (distance-wise) and 3.2.2 (angle-wise). The weights are the paper's
    for classification; for metric learning the authors take 1 and 2.

    Reduction: mean over the ordered pairs, respectively triplets, of distinct images, over which the paper sums. The
    authors' code takes the mean over all B^2 pairs and B^3 triplets, where those that repeat an image are zeros: its
    distance loss is ``(B - 1) / B`` times, its angle loss ``(B - 1) (B - 2) / B^2`` times this. Fewer than two images
    have no distances to compare, and fewer than three no angles: 0. Only images of one process are related, and the
    loss of a batch is not the mean of its images' losses.

    Images whose embeddings coincide have no direction: cosines with it are 0 and without gradient, where the authors'
    floor of 1e-12 lets gradients of 1e12 through.

    Memory grows with ``B^2 D`` and ``B^3``.

    Args:
        student: ``(B, D)`` embeddings, or ``(B, D, H, W)`` features, which are averaged over the positions.
        teacher: ``(B, D')`` or ``(B, D', H', W')``; no gradient flows into it.
        distance_weight: ``w_D`` >= 0.
        angle_weight: ``w_A`` >= 0.

    Returns:
        Scalar >= 0, in float32 (float64 if the inputs are).

    Raises:
        DistillError: Batch sizes differ, an input is neither embeddings nor maps, or a weight is out of range.
    """
    _check(distance_weight, angle_weight)
    student, teacher = _embeddings(student, 'student'), _embeddings(teacher, 'teacher').detach()
    if len(student) != len(teacher):
        raise DistillError(
            f'Embeddings of the student are {tuple(student.shape)} but those of the teacher are '
            f'{tuple(teacher.shape)}; only their sizes may differ, not the number of images.'
        )
    with full_precision(student):
        student, student_distances = _differences(student)
        teacher, teacher_distances = _differences(teacher)
        terms = []
        if distance_weight:
            terms.append(distance_weight * _distance_loss(student_distances, teacher_distances))
        if angle_weight:
            cosines = _cosines(student, student_distances), _cosines(teacher, teacher_distances)
            terms.append(angle_weight * _angle_loss(*cosines))
        return sum(terms[1:], terms[0])


def _embeddings(features: Tensor, role: str) -> Tensor:
    """``(B, D)`` of embeddings or maps, in full precision."""
    if not isinstance(features, Tensor):
        raise DistillError(f'Embeddings of the {role} must be one tensor, got {type(features).__name__}.')
    if features.dim() not in (2, 4):
        advice = '; average the tokens first, or take the class token' if features.dim() == 3 else ''
        raise DistillError(
            f'Embeddings of the {role} must be (B, D), or maps (B, D, H, W), got {tuple(features.shape)}{advice}.'
        )
    features = as_full(features)
    return features if features.dim() == 2 else features.mean((2, 3))


def _differences(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, B, D)`` ``e_i - e_j`` at ``[j, i]``, and their ``(B, B)`` norms."""
    differences = embeddings[None] - embeddings[:, None]
    # The gradient of this norm at 0, all along the diagonal, is 0; that of a bare root would be nan.
    return differences, vector_norm(differences, dim=-1)


def _distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the ``(B, B)`` distances; both diagonals are 0 and so is what they add to the loss."""
    pairs = max(len(student) * (len(student) - 1), 1)
    student, teacher = (d / (d.sum() / pairs).clamp(min=1e-12) for d in (student, teacher))
    return smooth_l1_loss(student, teacher, reduction='sum') / pairs


def _cosines(differences: Tensor, distances: Tensor) -> Tensor:
    """``(B, B, B)`` cosines of the angles at the first image between the second and the third."""
    coincide = (distances == 0)[..., None]
    directions = (differences / distances[..., None].masked_fill(coincide, 1)).masked_fill(coincide, 0)
    return directions @ directions.transpose(1, 2)


def _angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the ``(B, B, B)`` cosines; they are 0 where the vertex is one of the ends."""
    count = len(student)
    loss = smooth_l1_loss(student, teacher, reduction='none')
    same_ends = torch.eye(count, dtype=torch.bool, device=loss.device)
    return loss.masked_fill(same_ends, 0).sum() / max(count * (count - 1) * (count - 2), 1)


def _check(distance_weight: float, angle_weight: float) -> None:
    check_not_negative(distance_weight=distance_weight, angle_weight=angle_weight)
    if not (distance_weight or angle_weight):
        raise DistillError('distance_weight and angle_weight are both 0; at least one must be > 0.')


class RelationLoss(DistillLoss):
    """Module form of `relation`, which see. Needs neither equal embedding sizes nor equal grids.

    Args:
        distance_weight: Weight of the distance-wise loss.
        angle_weight: Weight of the angle-wise loss.
    """

    consumes = 'features'
    any_channels = True
    any_grid = True
    # Of two, the only distance is divided by itself.
    images = 3

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        _check(distance_weight, angle_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return relation(student, teacher, distance_weight=self.distance_weight, angle_weight=self.angle_weight)

    def extra_repr(self) -> str:
        return describe(distance_weight=self.distance_weight, angle_weight=self.angle_weight)
