"""The canonical form that dense detection heads are read into."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from kd_plugins.errors import DistillError
from kd_plugins.losses.base import Declaration, Extras
from kd_plugins.predictions.form import (
    Classes,
    Form,
    common_shape,
    mean_of_sigmoid,
    mean_of_softmax,
    refuse_activation,
)

ACTIVATIONS = ('sigmoid', 'softmax', 'probability')
FIELDS = ('cls', 'obj', 'ltrb', 'dist', 'box', 'coefficients')  # the prediction tensors, (B, A, ...)
#: What ``box`` of an oriented head means; two of them are comparable, with ``ltrb`` of an upright head they are not.
ROTATED = 'distances to the sides of the box, along its own rotated axes, in strides'
_FLOOR = 1e-6  # probabilities are kept this far from 0 and 1 when they are turned into logits


@dataclass(frozen=True)
class DensePredictions(Form):
    """Raw predictions of a dense detection head for one batch of images.

    Positions are ordered level by level (levels by ascending stride), inside a level row by row, and at one
    location prior by prior, so that ``A = sum(h * w * num_priors)``. Instances are immutable; every method
    returns a new one.

    Attributes:
        cls: ``(B, A, C)`` class logits, or probabilities if ``activation`` is ``'probability'``. With
            ``'softmax'`` the last column is the background, so ``C`` is the number of classes plus one.
        activation: How ``cls`` becomes a probability: one of ``ACTIVATIONS``.
        level_sizes: ``(h, w)`` of every level, in grid cells.
        strides: Stride of every level in pixels, ascending.
        points: ``(A, 2)`` reference points ``(x, y)`` in pixels of the network input; ``ltrb`` counts from them.
        obj: ``(B, A, 1)`` objectness (or centerness) logits, or None when the head has none.
        ltrb: ``(B, A, 4)`` signed distances from the point to the left, top, right and bottom side of the
            decoded box, in units of the level's stride; None when the head cannot be decoded.
        dist: ``(B, A, 4, R)`` logits of the distances' bins (GFL), or None. Bin ``k`` means ``k`` strides.
        box: ``(B, A, 4)`` the head's own regression output, undecoded, or None. Heads whose output already is
            the distances, or the box, leave it None: ``ltrb`` says it all.
        box_coding: Names what ``box`` means; two heads' ``box`` are comparable when these are equal.
        num_priors: Priors (anchors) per location.
        obj_coding: What ``obj`` means: ``'objectness'`` (trained everywhere: is there an object) or ``'centerness'``
            (trained on positives only, arbitrary elsewhere). Both scale the class probabilities; comparing them
            with each other makes no sense.
        coefficients: ``(B, A, M)`` of the mask prototypes, see `MaskPredictions`, or None.
        unread: What the head predicts besides, in words.
        absent: Why a field is None, by field name; quoted by :meth:`require`.

    Raises:
        DistillError: Shapes do not fit together.
    """

    name: ClassVar[str] = 'predictions'
    head: ClassVar[str] = 'detection'
    trains_alone: ClassVar[bool] = True
    # VFNetHead is an ATSSHead by inheritance only.
    decoding: ClassVar[tuple[str, ...]] = (
        'forward',
        'forward_single',
        'predict_by_feat',
        '_predict_by_feat_single',
        '_bbox_decode',
        'anchor_center',
    )
    has_class_logits: ClassVar[bool] = True
    unbatched: ClassVar[tuple[str, ...]] = ('points',)

    cls: Tensor
    activation: str
    level_sizes: tuple[tuple[int, int], ...]
    strides: tuple[float, ...]
    points: Tensor
    obj: Tensor | None = None
    ltrb: Tensor | None = None
    dist: Tensor | None = None
    box: Tensor | None = None
    box_coding: str | None = None
    num_priors: int = 1
    obj_coding: str = 'objectness'
    coefficients: Tensor | None = None
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise DistillError(f'activation must be one of {ACTIVATIONS}, got {self.activation!r}.')
        if self.cls.dim() != 3:
            raise DistillError(f'cls must be (B, A, C), got {tuple(self.cls.shape)}.')
        if len(self.level_sizes) != len(self.strides):
            raise DistillError(f'{len(self.level_sizes)} level sizes but {len(self.strides)} strides.')
        if any(a >= b for a, b in itertools.pairwise(self.strides)):
            raise DistillError(f'strides must ascend, got {self.strides}.')
        if (self.box is None) != (self.box_coding is None):
            raise DistillError('box and box_coding must be given together.')
        batch, anchors, _ = self.cls.shape
        expected = sum(self.level_lengths)
        if anchors != expected:
            raise DistillError(
                f'cls has {anchors} positions, but levels {self.level_sizes} with {self.num_priors} prior(s) '
                f'per location have {expected}.'
            )
        if tuple(self.points.shape) != (anchors, 2):
            raise DistillError(f'points must be ({anchors}, 2), got {tuple(self.points.shape)}.')
        for name, last in (
            ('obj', (1,)),
            ('ltrb', (4,)),
            ('box', (4,)),
            ('dist', (4, None)),
            ('coefficients', (None,)),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            shape = tuple(value.shape)
            want = (batch, anchors, *last)
            if len(shape) != len(want) or any(w is not None and s != w for s, w in zip(shape, want, strict=True)):
                shown = ', '.join('R' if w is None else str(w) for w in want)
                raise DistillError(f'{name} must be ({shown}), got {shape}.')

    @property
    def num_classes(self) -> int:
        """Number of foreground classes (the background of a softmax head is not counted)."""
        return self.cls.shape[-1] - (self.activation == 'softmax')

    @property
    def level_lengths(self) -> tuple[int, ...]:
        """Positions of every level: ``h * w * num_priors``."""
        return tuple(h * w * self.num_priors for h, w in self.level_sizes)

    @property
    def stride_of(self) -> Tensor:
        """``(A, 1)`` stride of every position in pixels."""
        # Filled on the device: a repeat_interleave by a tensor of lengths would wait for the GPU.
        lengths = self.level_lengths
        return torch.cat([self.points.new_full((n, 1), s) for n, s in zip(lengths, self.strides, strict=True)])

    def map(self, function: Callable[[Tensor], Tensor]) -> DensePredictions:
        """A copy with ``function`` applied to every prediction tensor (points excluded); itself if none changes."""
        tensors = {n: v for n in FIELDS if (v := getattr(self, n)) is not None}
        changes = {n: new for n, v in tensors.items() if (new := function(v)) is not v}
        return self.replace(**changes) if changes else self

    def detach(self) -> DensePredictions:
        # Not the points: they have no gradient, and the same tensor tells that they are the same.
        return self.map(lambda tensor: tensor.detach() if tensor.requires_grad else tensor)

    def float(self) -> DensePredictions:
        """In float32 (float64 stays)."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor if tensor.dtype == torch.float64 else tensor.float()

        result, points = self.map(cast), cast(self.points)
        return result if points is result.points else result.replace(points=points)

    def require(self, name: str) -> Tensor:
        """The field ``name``, for a loss that cannot do without it.

        Raises:
            DistillError: The field is None; the message says why where that is known.
        """
        value = getattr(self, name)
        if value is None:
            reason = self.absent.get(name, 'the head has no such output')
            raise DistillError(f'These predictions have no {name!r}: {reason}.')
        return value

    def class_probabilities(self) -> Tensor:
        """``(B, A, num_classes)`` foreground class probabilities, objectness not applied."""
        if self.activation == 'sigmoid':
            return self.cls.sigmoid()
        if self.activation == 'softmax':
            return self.cls.softmax(-1)[..., :-1]
        return self.cls

    def class_logits(self) -> Tensor:
        """``(B, A, C)`` class logits; probabilities are inverted with a floor of 1e-6."""
        return self.cls if self.activation != 'probability' else _logit(self.cls)

    def binary_logits(self) -> Tensor:
        """``(B, A, num_classes)`` logits whose sigmoid is the class probability, whatever the activation."""
        if self.activation == 'softmax':
            # logit(p) = log p - log(1 - p), with log p from log_softmax, so that small p keep their precision.
            log_p = self.cls.log_softmax(-1)[..., :-1].clamp(max=-_FLOOR)
            return log_p - (-log_p.expm1()).log()
        return self.class_logits()

    def fold_objectness(self) -> DensePredictions:
        """The same scores without ``obj``: logits of class probability times objectness, as a head without it has.

        Computed from log-probabilities, so that small and large scores keep their precision.
        """
        if self.obj is None:
            return self
        cls, obj = self.binary_logits(), self.obj
        log_p = logsigmoid(cls) + logsigmoid(obj)
        log_not_p = torch.logaddexp(logsigmoid(-cls), logsigmoid(cls) + logsigmoid(-obj))
        reason = 'the other head has no objectness, so it was multiplied into the classes'
        return self.replace(
            cls=log_p - log_not_p, activation='sigmoid', obj=None, absent={**self.absent, 'obj': reason}
        )

    def confidence(self) -> Tensor:
        """``(B, A)`` highest class probability, times objectness where the head has one."""
        # The sigmoid is monotonic: of the best class only.
        best = self.cls.amax(-1).sigmoid() if self.activation == 'sigmoid' else self.class_probabilities().amax(-1)
        return best if self.obj is None else best * self.obj.sigmoid()[..., 0]

    def boxes(self) -> Tensor:
        """``(B, A, 4)`` decoded boxes ``(x1, y1, x2, y2)`` in pixels of the network input, not clipped.

        Raises:
            DistillError: The head's boxes could not be decoded (``ltrb`` is None).
        """
        distances = self.require('ltrb') * self.stride_of
        return torch.cat([self.points - distances[..., :2], self.points + distances[..., 2:]], -1)

    # In this class `float` is the method above.
    def select_levels(self, strides: Sequence[builtins.float]) -> DensePredictions:
        """Keep the levels of these strides only."""
        keep = [i for i, s in enumerate(self.strides) if s in strides]
        if len(keep) == len(self.strides):
            return self
        if not keep:
            raise DistillError(f'There is no level of stride {tuple(strides)}; the levels have {self.strides}.')

        def pick(tensor: Tensor) -> Tensor:
            pieces = tensor.split(self.level_lengths, 1)
            return torch.cat([pieces[i] for i in keep], 1)

        return self.replace(
            **{n: pick(v) for n in FIELDS if (v := getattr(self, n)) is not None},
            points=_levels_of(self.points, self.level_lengths, tuple(keep)),
            level_sizes=tuple(self.level_sizes[i] for i in keep),
            strides=tuple(self.strides[i] for i in keep),
        )

    def select_classes(self, index: Sequence[int]) -> DensePredictions:
        """Keep these foreground classes, in this order.

        Of a softmax head the other classes are added to the background (which stays last), so that the
        probabilities of the kept classes do not change.
        """
        index = list(index)
        total = self.num_classes
        if index == list(range(total)):
            return self
        wrong = [i for i in index if not 0 <= i < total]
        if wrong:
            raise DistillError(f'Class index {wrong[0]} is outside 0..{total - 1}.')
        if len(set(index)) < len(index):
            raise DistillError(f'Class indices must not repeat, got {index}.')
        kept = self.cls[..., index]
        if self.activation == 'softmax':
            rest = [i for i in range(total + 1) if i not in set(index)]
            kept = torch.cat([kept, self.cls[..., rest].logsumexp(-1, keepdim=True)], -1)
        return self.replace(cls=kept)

    @property
    def source(self) -> Tensor:
        return self.cls

    @property
    def besides(self) -> tuple[str, ...]:
        return self.unread

    def tensors(self) -> list[Tensor]:
        return [v for n in ('cls', 'obj', 'ltrb') if (v := getattr(self, n)) is not None]

    def in_full_precision(self) -> DensePredictions:
        return self.float()

    def describe(self) -> str:
        parts = [f'{self.num_classes} classes']
        parts += [n for n in ('obj', 'box', 'dist') if getattr(self, n) is not None]
        if self.box is None and self.ltrb is not None:
            parts.append('ltrb')
        strides = '/'.join(f'{s:g}' for s in self.strides)
        return f'{self.cls.shape[1]} positions, strides {strides}, ' + '+'.join(parts)

    def made_of(self, tensor: Tensor) -> bool:
        if tensor.dim() != 4 or len(tensor) != len(self.cls) or tensor.shape[1] != self.num_priors * self.cls.shape[2]:
            return False
        flat = tensor.permute(0, 2, 3, 1).reshape(len(tensor), -1, self.cls.shape[2]).to(self.cls)
        levels = self.cls.split(self.level_lengths, 1)
        return any(level.shape == flat.shape and torch.allclose(level, flat, atol=1e-4) for level in levels)

    @classmethod
    def align(
        cls, student: DensePredictions, teacher: DensePredictions, classes: Classes = None
    ) -> tuple[DensePredictions, DensePredictions]:
        from kd_plugins.predictions.align import align

        return align(student, teacher, classes)

    @classmethod
    def average(cls, predictions: Sequence[DensePredictions]) -> DensePredictions:
        """See `Form.average`: class probabilities and objectness are averaged, boxes and bins weighted by confidence.

        Where one teacher sees an object and the other nothing, the other's box is arbitrary: weighted by what each is
        sure of, it hardly counts.
        """
        first = predictions[0]
        common_shape(predictions, [p.points for p in predictions])
        kinds = {(p.activation, p.obj is None, p.obj_coding) for p in predictions}
        if len(kinds) > 1:
            predictions = [p.fold_objectness() for p in predictions]
            predictions = [p.replace(cls=p.binary_logits(), activation='sigmoid') for p in predictions]
        common_shape(predictions, [p.cls for p in predictions])
        classes = [p.class_logits() for p in predictions]
        softmax = predictions[0].activation == 'softmax'
        cls_logits = mean_of_softmax(classes) if softmax else mean_of_sigmoid(classes)
        objects = [p.obj for p in predictions if p.obj is not None]
        confidence = torch.stack([p.confidence() for p in predictions])[..., None] + _FLOOR
        weights = confidence / confidence.sum(0)

        def weighted(name: str) -> Tensor | None:
            found = [v for p in predictions if (v := getattr(p, name)) is not None]
            if len(found) < len(predictions) or len({v.shape for v in found}) > 1:
                return None
            return (torch.stack(found) * weights).sum(0)

        bins = [p.dist for p in predictions if p.dist is not None]
        dist = None
        if len(bins) == len(predictions) and len({b.shape for b in bins}) == 1:
            dist = (torch.stack([b.log_softmax(-1) for b in bins]) + weights.log()[..., None]).logsumexp(0)
        box = weighted('box') if len({p.box_coding for p in predictions}) == 1 else None
        reason = 'the teachers that are averaged do not all have it, or not of the same kind'
        return first.replace(
            cls=cls_logits,
            activation='softmax' if softmax else 'sigmoid',
            obj=mean_of_sigmoid(objects) if objects else None,
            ltrb=weighted('ltrb'),
            dist=dist,
            box=box,
            box_coding=None if box is None else first.box_coding,
            coefficients=None,
            absent={**dict.fromkeys(('obj', 'ltrb', 'dist', 'box', 'coefficients'), reason), **first.absent},
        )

    @classmethod
    def compare(
        cls,
        loss: nn.Module,
        declared: Declaration,
        student: DensePredictions,
        teacher: DensePredictions,
        target: Tensor | None = None,
        classes: Classes = None,
    ) -> Tensor:
        if declared.consumes == cls.name:
            return loss(student, teacher)
        if declared.needs_target:
            raise DistillError(
                f'{type(loss).__name__} needs a label per prediction, which the positions of a detector have not; '
                "write loss=dict(type='BinaryKLDivLoss')."
            )
        if declared.activation == 'softmax' and student.activation != 'softmax':
            raise refuse_activation(loss, student.activation, 'this detector', "loss=dict(type='BinaryKLDivLoss')")
        if declared.takes_predictions:
            # It may know what to make of a whole head (its objectness, for one).
            return cast(Extras, loss).from_predictions(student, teacher)
        return loss(student.class_logits(), teacher.class_logits())


# Cached, so that equal points stay the same tensor from one iteration to the next.
@functools.lru_cache(maxsize=16)
def _levels_of(points: Tensor, lengths: tuple[int, ...], keep: tuple[int, ...]) -> Tensor:
    pieces = points.split(lengths)
    return torch.cat([pieces[i] for i in keep])


def _logit(probability: Tensor) -> Tensor:
    """Inverse of the sigmoid, with probabilities kept ``_FLOOR`` away from 0 and 1."""
    p = probability.clamp(_FLOOR, 1 - _FLOOR)
    return p.log() - (-p).log1p()
