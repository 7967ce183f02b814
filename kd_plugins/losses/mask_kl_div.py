"""Binary KL divergence between the instance masks that student and teacher predict for the same objects."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import aligned, check_positive, describe, full_precision, mean_over_positions
from kd_plugins.losses.base import DistillLoss


def mask_kl_div(
    student: Tensor,
    teacher: Tensor,
    inside: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Binary KL divergence of the pixels of instance masks, cropped.

    .. math:: T^2 \, \operatorname{mean}_k \frac{1}{|R_k|} \sum_{p \in R_k}
              \left[ \mathrm{BCE}(\sigma(m^s_{kp} / T), q) - H(q) \right], \quad q = \sigma(m^t_{kp} / T)

    The teacher's mask takes the place of the labelled one in the mask loss of prototype-based segmentation, which is a
    cross-entropy per pixel, cropped to the object's box: Bolya et al., "YOLACT" (ICCV 2019, arXiv 1904.02689), section
    3.2. Their coefficients and prototypes are not compared: two networks that predict equal masks need not have any of
    them in common. Deviations: soft targets; the entropy ``H(q)`` is subtracted, so that the loss is 0 at equality;
    divided by the pixels of the region, so that small and large objects count alike.

    Reduction: mean over the pixels inside, mean over masks and images; with ``weight`` the weighted mean over the
    masks of each image, divided by ``max(sum(weight), 1)``, then the mean over images. Masks without a pixel inside
    weigh nothing.

    Args:
        student: ``(B, K, H, W)`` mask logits.
        teacher: ``(B, K, H, W)`` mask logits; no gradient flows into it.
        inside: ``(B, K, H, W)`` bool, the pixels that count. None: all.
        weight: ``(B, K)`` weight >= 0 of every mask, or None for uniform.
        temperature: ``T`` > 0.

    Returns:
        Scalar >= 0 (up to rounding), in float32 (float64 if the inputs are).

    Raises:
        DistillError: Shapes differ, or the temperature is out of range.
    """
    check_positive(temperature=temperature)
    student, teacher = aligned(student, teacher, 'Mask logits', 'bring them to one resolution first')
    if student.dim() != 4:
        raise DistillError(f'Mask logits must be (B, K, H, W), got {tuple(student.shape)}.')
    if weight is not None and weight.shape != student.shape[:2]:
        raise DistillError(f'weight must be {tuple(student.shape[:2])}, got {tuple(weight.shape)}.')
    if inside is not None and inside.shape != student.shape:
        raise DistillError(f'inside must be {tuple(student.shape)}, got {tuple(inside.shape)}.')
    with full_precision(student):
        student, teacher = student / temperature, teacher / temperature
        with torch.no_grad():
            target = teacher.sigmoid()
            # The same kernel as below: at equality both are equal to the last bit.
            entropy = binary_cross_entropy_with_logits(teacher, target, reduction='none')
        divergence = binary_cross_entropy_with_logits(student, target, reduction='none') - entropy
        if inside is None:
            pixels = student.new_full(student.shape[:2], student.shape[2] * student.shape[3])
        else:
            # Not a product: a logit that is infinite outside would give NaN.
            divergence = divergence.masked_fill(~inside, 0)
            pixels = inside.sum((2, 3)).to(student.dtype)
            seen = (pixels > 0).to(student.dtype)
            weight = seen if weight is None else weight * seen
        return temperature**2 * mean_over_positions(divergence.sum((2, 3)) / pixels.clamp(min=1), weight)


class MaskKLDivLoss(DistillLoss):
    """Module form of `mask_kl_div`, which see. Consumes the assembled masks of the same objects.

    Args:
        temperature: Softening of both sigmoids.
        topk: Masks compared per image, at the positions that the teacher is most confident about.

    Raises:
        DistillError: An option is out of range.
    """

    consumes = 'masks'

    def __init__(self, temperature: float = 1.0, topk: int = 64) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
            raise DistillError(f'topk must be a whole number >= 1, got {topk!r}.')
        self.temperature = temperature
        self.topk = topk

    def forward(
        self, student: Tensor, teacher: Tensor, inside: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return mask_kl_div(student, teacher, inside, weight, temperature=self.temperature)

    def extra_repr(self) -> str:
        return describe(temperature=self.temperature, topk=self.topk)
