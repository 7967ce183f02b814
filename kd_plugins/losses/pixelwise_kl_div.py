"""Pixel-wise distillation of semantic segmentation: the KL divergence of the class probabilities of every pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from kd_plugins.errors import DistillError
from kd_plugins.losses._common import check_choice, check_not_negative, check_positive, describe, full_precision
from kd_plugins.losses.base import DistillLoss

#: Elements of a logit map that the lean path works on at a time: on one thread what the cache holds, otherwise more.
#: Threads have to meet after every operator, which takes long where they share their cores, so that fewer and larger
#: chunks are faster; on a GPU (not measured) the start of a kernel would count.
CHUNK_ALONE, CHUNK_TOGETHER = 2**20, 2**22
#: Chunks of a map from which ``lean=None`` saves memory. Five are in use at a time, and the C library's allocator was
#: seen to keep eleven: from sixteen on the peak, with both inputs and the gradient, stays below twice the inputs.
LEAN_FROM = 16


def pixelwise_kl_div(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = 255,
    alpha: float | None = None,
    sigmoid: bool = False,
    lean: bool | None = None,
) -> Tensor:
    r"""KL divergence of the class probabilities, averaged over the pixels that count.

    .. math:: \frac{T^2}{|R|} \sum_{i \in R} \mathrm{KL}(q^t_i \,\|\, q^s_i)
              = \frac{T^2}{|R|} \sum_{i \in R} \sum_c q^t_{ic} \log \frac{q^t_{ic}}{q^s_{ic}},
              \quad q = \operatorname{softmax}(z / T)

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation" (CVPR 2019, arXiv 1903.04197), equation 1
    (pixel-wise distillation). Deviations: temperature and ``T^2`` of Hinton et al. (arXiv 1503.02531), 1 as in the
    paper by default; pixels without a label can be left out; the paper's two maps have one size.

    **Grid.** All is computed on the larger of the two grids, to which the smaller logits are resized bilinearly
    (``align_corners=False``). Labels are brought to it by nearest-exact sampling: pixel ``i`` of ``n`` takes label
    ``floor((i + 0.5) * N / n)`` of ``N``.

    **Binary.** A map of one channel is the logit of a single foreground class, compared as the two classes that
    ``softmax((0, z))`` has. With ``sigmoid`` each of the ``C`` channels is such a class of its own, and their
    divergences are summed.

    **Labels.** ``alpha`` adds the ordinary loss: ``alpha * soft + (1 - alpha) * hard``, where ``hard`` is the
    cross-entropy (temperature 1; binary for ``C = 1``) of the student with ``target``, over the same pixels of the
    same grid. Frameworks upsample to the labels' size instead, which differs where the logits are coarser.

    Reduction: sum over the classes, mean over the valid pixels of the whole batch, so that an image with more of them
    weighs more, as in the cross-entropy of the frameworks. No valid pixel: 0, with a gradient of zeros. What lies in
    excluded pixels, be it inf or nan, reaches neither value nor gradient (a resize blends a pixel with its neighbours
    before that, though).

    **Memory.** Autograd holds several maps of the logits' size. The lean path goes through a few rows of an image at a
    time and keeps nothing but its inputs, from which backward computes the gradient anew: with both inputs and the
    gradient, of large maps 1.5 to 1.9 times the inputs. It equals the plain path up to rounding and cannot be
    differentiated twice.

    Args:
        student: ``(B, C, H, W)`` class logits.
        teacher: ``(B, C, h, w)`` class logits; no gradient flows into it.
        target: ``(B, H', W')`` or ``(B, 1, H', W')`` integer labels of any size. None: every pixel counts.
        temperature: ``T`` > 0.
        ignore_index: Label of the pixels that are left out.
        alpha: Share of the divergence in [0, 1], the rest being the cross-entropy with ``target``. None: the
            divergence alone; labels then only say which pixels count.
        sigmoid: Classes are independent sigmoids instead of one softmax.
        lean: Save memory; not twice differentiable. None: for maps of 2^24 elements on (on several threads and on
            other devices 2^26), but not within ``torch.compile``, which fuses the plain formula by itself.

    Returns:
        Scalar >= 0 (up to rounding), in float32 (float64 if one of the inputs is).

    Raises:
        DistillError: Shapes do not fit, neither grid is the larger one, a hyper-parameter is out of range, or
            ``alpha`` comes without labels or with labels that are no class (looked for on the CPU only: elsewhere
            the host would wait, and torch reports an index out of range).
    """
    _check(temperature, ignore_index, alpha, sigmoid, lean)
    _check_maps(student, teacher)
    if alpha is not None and target is None:
        raise DistillError(f'alpha={alpha!r} mixes in the cross-entropy with labels: give target, or alpha=None.')
    teacher = teacher.detach()
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    with full_precision(student):
        student, teacher = _on_one_grid(student, teacher, dtype)
        labels = valid = None
        if target is not None:
            labels = _sampled(target, student)
            valid = labels != ignore_index
            labels = _checked(labels.masked_fill(~valid, 0), student.shape[1]) if alpha is not None else None
        settings = dtype, temperature, alpha, sigmoid or student.shape[1] == 1
        if lean is None:
            lean = not torch.compiler.is_compiling() and student.numel() >= LEAN_FROM * _chunk_size(student)
        if lean:
            loss = _lean_pixel_loss(student, teacher, labels, valid, settings)
        else:
            loss = _pixel_loss(student, teacher, labels, valid, settings)
        count = max(loss.numel(), 1) if valid is None else valid.sum().clamp(min=1)
        return loss.sum() / count


# ---------------------------------------------------------------------- one pixel
_Settings = tuple[torch.dtype, float, 'float | None', bool]


def _pixel_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None, settings: _Settings
) -> Tensor:
    """``(B, H, W)`` losses of ``(B, C, H, W)`` logits; 0 where not ``valid``."""
    dtype, temperature, alpha, sigmoid = settings
    student, teacher = student.to(dtype), teacher.to(dtype)
    if valid is not None:
        # Before anything is computed: the gradient of what is inf or nan would be nan even if its loss is dropped.
        student, teacher = (x.masked_fill(~valid[:, None], 0) for x in (student, teacher))
    loss = temperature**2 * _divergence(student, teacher, temperature, sigmoid)
    if alpha is not None and labels is not None:  # they come together
        loss = alpha * loss + (1 - alpha) * _cross_entropy(student, labels, sigmoid)
    return loss if valid is None else loss.masked_fill(~valid, 0)


def _pixel_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None, settings: _Settings, outer: Tensor
) -> Tensor:
    """``(B, C, H, W)`` gradient of :func:`_pixel_loss` by ``student``, times ``outer`` ``(B, H, W)``."""
    dtype, temperature, alpha, sigmoid = settings
    student, teacher, outer = student.to(dtype), teacher.to(dtype), outer[:, None]
    gradient = _probabilities(student / temperature, sigmoid).sub_(_probabilities(teacher / temperature, sigmoid))
    gradient.mul_(outer * (temperature if alpha is None else alpha * temperature))
    if alpha is not None and labels is not None:
        hard = _probabilities(student, sigmoid)
        if sigmoid:
            hard.sub_(labels[:, None])
        else:
            hard.scatter_add_(1, labels[:, None], hard.new_full((1, 1, 1, 1), -1.0).expand_as(labels[:, None]))
        gradient.add_(hard.mul_(outer * (1 - alpha)))
    return gradient if valid is None else gradient.masked_fill_(~valid[:, None], 0)


def _probabilities(logits: Tensor, sigmoid: bool) -> Tensor:
    return logits.sigmoid() if sigmoid else logits.softmax(1)


def _divergence(student: Tensor, teacher: Tensor, temperature: float, sigmoid: bool) -> Tensor:
    if sigmoid:
        student, teacher = student / temperature, teacher / temperature
        probability = teacher.sigmoid()
        # The same kernel twice: at equality both are equal to the last bit.
        entropy = binary_cross_entropy_with_logits(teacher, probability, reduction='none')
        return (binary_cross_entropy_with_logits(student, probability, reduction='none') - entropy).sum(1)
    log_student, log_teacher = ((x / temperature).log_softmax(1) for x in (student, teacher))
    return (log_teacher.exp() * (log_teacher - log_student)).sum(1)


def _cross_entropy(student: Tensor, labels: Tensor, sigmoid: bool) -> Tensor:
    if sigmoid:
        return binary_cross_entropy_with_logits(student[:, 0], labels.to(student.dtype), reduction='none')
    return -student.log_softmax(1).gather(1, labels[:, None])[:, 0]


# ---------------------------------------------------------------------- lean
class _LeanPixelLoss(torch.autograd.Function):
    """`_pixel_loss` chunk by chunk: only its inputs are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None, settings: _Settings
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, labels, valid)
        ctx.settings = settings
        batch, _, height, width = student.shape
        loss = student.new_empty((batch, height, width), dtype=settings[0])
        for part in _chunks(student):
            loss[part] = _pixel_loss(*_cut(part, student, teacher, labels, valid), settings)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, valid = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for part in _chunks(student):
            images, rows = part
            inputs = _cut(part, student, teacher, labels, valid)
            gradient[images, :, rows] = _pixel_gradient(*inputs, ctx.settings, outer[part])
        return gradient, None, None, None, None


_lean_pixel_loss: Callable[..., Tensor] = _LeanPixelLoss.apply


def _chunks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and rows that are worked on together: some rows of one image, or several whole images."""
    batch, classes, height, width = logits.shape
    size = _chunk_size(logits)
    rows = min(max(size // max(classes * width, 1), 1), max(height, 1))
    # As equal as possible, so that the memory of one chunk fits the next.
    rows = -(-height // -(-height // rows)) if height else 1
    images = max(size // max(classes * height * width, 1), 1)
    for image in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(image, image + images), slice(row, row + rows)


def _chunk_size(logits: Tensor) -> int:
    return CHUNK_ALONE if logits.device.type == 'cpu' and torch.get_num_threads() == 1 else CHUNK_TOGETHER


def _cut(
    part: tuple[slice, slice], student: Tensor, teacher: Tensor, labels: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    images, rows = part
    return (
        student[images, :, rows],
        teacher[images, :, rows],
        None if labels is None else labels[part],
        None if valid is None else valid[part],
    )


# ---------------------------------------------------------------------- grids and labels
def _on_one_grid(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both on the larger grid; the one that is resized in ``dtype``."""
    small, large = student.shape[2:], teacher.shape[2:]
    if small == large:
        return student, teacher
    if all(s <= t for s, t in zip(small, large, strict=True)):
        return _resized(student.to(dtype), large), teacher
    if all(s >= t for s, t in zip(small, large, strict=True)):
        return student, _resized(teacher.to(dtype), small)
    raise DistillError(
        f"Neither of the grids {tuple(small)} (student's) and {tuple(large)} (teacher's) is at least as large as the "
        'other in both dimensions; resize one of the maps first.'
    )


def _resized(logits: Tensor, size: torch.Size) -> Tensor:
    return interpolate(logits, size=tuple(size), mode='bilinear', align_corners=False)


def _sampled(target: Tensor, logits: Tensor) -> Tensor:
    """``(B, H, W)`` int64 labels on the grid of ``(B, C, H, W)`` logits.

    Raises:
        DistillError: They are not ``(B, H', W')`` integers.
    """
    if not isinstance(target, Tensor):
        raise DistillError(f'target must be one tensor of labels, got {type(target).__name__}.')
    labels = target[:, 0] if target.dim() == 4 and target.shape[1] == 1 else target
    if labels.dim() != 3 or len(labels) != len(logits) or labels.is_floating_point() or labels.is_complex():
        raise DistillError(
            f'target must hold integer labels, ({len(logits)}, H, W) or ({len(logits)}, 1, H, W), got '
            f'{tuple(target.shape)} of {target.dtype}.'
        )
    for dim, size in ((1, logits.shape[2]), (2, logits.shape[3])):
        given = labels.shape[dim]
        if given == 0 < size:
            raise DistillError(f'target has no pixels: {tuple(target.shape)}.')
        if given != size:
            # In integers, because float32 indices round wrongly now and then.
            index = (2 * torch.arange(size, device=labels.device) + 1) * given // (2 * size)
            labels = labels.index_select(dim, index)
    # Not earlier: a uint8 compared with a negative ignore_index would wrap around.
    return labels.long()


def _checked(labels: Tensor, classes: int) -> Tensor:
    """The labels themselves.

    Raises:
        DistillError: One is not a class (CPU only).
    """
    if labels.device.type == 'cpu' and not torch.compiler.is_compiling():
        wrong = labels[(labels < 0) | (labels >= max(classes, 2))]
        if wrong.numel():
            raise DistillError(
                f'target has label {wrong[0].item()}, but the logits are of {max(classes, 2)} classes; reduce the '
                'labels, or set ignore_index.'
            )
    return labels


def _check_maps(student: Tensor, teacher: Tensor) -> None:
    for role, value in (('student', student), ('teacher', teacher)):
        if not isinstance(value, Tensor):
            raise DistillError(f'Class logits of the {role} must be one tensor, got {type(value).__name__}.')
        if value.dim() != 4:
            raise DistillError(f'Class logits of the {role} must be (B, C, H, W), got {tuple(value.shape)}.')
    if student.shape[:2] != teacher.shape[:2]:
        raise DistillError(
            f'Class logits of the student are {tuple(student.shape)} but those of the teacher are '
            f'{tuple(teacher.shape)}; only the grids may differ: map the classes by name first.'
        )


def _check(temperature: float, ignore_index: int, alpha: float | None, sigmoid: bool, lean: bool | None) -> None:
    check_positive(temperature=temperature)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise DistillError(f'ignore_index must be an integer, got {ignore_index!r}.')
    check_choice((False, True), sigmoid=sigmoid)
    check_choice((None, False, True), lean=lean)
    if alpha is None:
        return
    check_not_negative(alpha=alpha)
    if alpha > 1:
        raise DistillError(f'alpha must be a share in [0, 1] or None, got {alpha!r}.')
    if sigmoid:
        raise DistillError(
            f'alpha={alpha!r} needs one label per pixel, which sigmoid=True classes, being independent, do not have; '
            'leave alpha=None and keep the cross-entropy in the student.'
        )


class PixelwiseKLDivLoss(DistillLoss):
    """Module form of `pixelwise_kl_div`, which see. Consumes two maps of class logits, and labels if there are any.

    Args:
        temperature: Softening of both.
        ignore_index: Label of the pixels that are left out.
        alpha: Share of the divergence, the rest being the cross-entropy; None for the divergence alone.
        sigmoid: Classes are independent.
        lean: Save memory; None where it pays.
    """

    consumes = 'segmentation'
    needs_target = True

    def __init__(
        self,
        temperature: float = 1.0,
        ignore_index: int = 255,
        alpha: float | None = None,
        sigmoid: bool = False,
        lean: bool | None = None,
    ) -> None:
        super().__init__()
        _check(temperature, ignore_index, alpha, sigmoid, lean)
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.alpha = alpha
        self.sigmoid = sigmoid
        self.activation = 'sigmoid' if sigmoid else 'softmax'
        self.lean = lean

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> Tensor:
        return pixelwise_kl_div(
            student,
            teacher,
            target,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            alpha=self.alpha,
            sigmoid=self.sigmoid,
            lean=self.lean,
        )

    def extra_repr(self) -> str:
        return describe(
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            alpha=self.alpha,
            sigmoid=self.sigmoid,
            lean=self.lean,
        )
