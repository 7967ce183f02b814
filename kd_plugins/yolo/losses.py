"""From the raw outputs of student and teacher to the KD losses of one batch, in Ultralytics' scaling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugins.distiller import Capture, find_module, untouched_rng
from kd_plugins.distiller.protocol import Teacher
from kd_plugins.distiller.schedules import Constant, Schedule, build_schedule
from kd_plugins.distiller.summary import Row
from kd_plugins.distiller.taps import Call
from kd_plugins.errors import DistillError
from kd_plugins.losses import MaskKLDivLoss
from kd_plugins.predictions import DensePredictions, align, find_reader, read
from kd_plugins.yolo.heads import family_of, head_of, is_rotated, raw_predictions, select_branch, strides_of
from kd_plugins.yolo.masks import MaskPair, pair_masks, prototypes
from kd_plugins.yolo.options import DistillOptions
from kd_plugins.yolo.teacher import follow, has_masks, head_path

#: Column of every term. Ultralytics' table has room for 10 characters, and plots what has ``loss`` in its name.
COLUMNS = {'cls': 'kdcls_loss', 'box': 'kdbox_loss', 'mask': 'kdmsk_loss', 'feature': 'kdfea_loss'}
Classes = tuple[Sequence[int], Sequence[int]] | None


@dataclass
class Term:
    """One KD loss: its name (a key of `COLUMNS`), its module and the schedule of its weight."""

    name: str
    loss: nn.Module
    weight: Schedule

    @property
    def column(self) -> str:
        """Name in the progress bar and in results.csv."""
        return COLUMNS[self.name]


class YOLODistiller:
    """Adds KD losses to the task loss of an Ultralytics student.

    Args:
        student: The unwrapped student.
        teacher: The teacher.
        options: What to distil.
        classes: ``(student_index, teacher_index)`` of the classes both know; None when the sets are equal.

    Attributes:
        epoch: Epochs done.
        progress: Fraction of the run that is done, in [0, 1].
        terms: The terms; built by :meth:`check`.

    Raises:
        DistillError: The student cannot be distilled.
    """

    def __init__(self, student: nn.Module, teacher: Teacher, options: DistillOptions, classes: Classes = None) -> None:
        self.student, self.teacher, self.options, self.classes = student, teacher, options, classes
        self.family = family_of(student, 'student')
        self.native = teacher.kind in ('', 'ultralytics')
        theirs = family_of(teacher.model, 'teacher') if self.native else None
        self.teacher_tap = head_path(teacher.model) if self.native else teacher.head
        self.teacher_head = find_module(teacher.model, self.teacher_tap, 'teacher')
        theirs = theirs or ('dense' if _readable(self.teacher_head) else 'classify')
        if theirs != self.family:
            words = {'dense': 'detector', 'classify': 'classifier'}
            raise DistillError(
                f'The student is a {words[self.family]} and the teacher a {words[theirs]}: a teacher must do what its '
                'student does (detect, segment, pose and obb count as detectors).'
            )
        self.terms: list[Term] = []
        self.epoch, self.progress = 0, 0.0
        self._target: Tensor | None = None
        self.task_total: Tensor | None = None
        self.kd_total: Tensor | None = None

    # ------------------------------------------------------------------ position in the run
    @property
    def active(self) -> bool:
        """Whether KD is on in this epoch and at least one weight above 0."""
        late = self.options.stop is not None and self.epoch >= self.options.stop
        return self.epoch >= self.options.start and not late and any(t.weight(self.progress) > 0 for t in self.terms)

    # ------------------------------------------------------------------ every batch
    def add(self, loss: Tensor, items: Mapping[str, Tensor], preds: Any, batch: Mapping[str, Any]) -> tuple:
        """The task loss with the KD losses, and the logged items with the KD columns.

        Args:
            loss: The criterion's loss: ``(n,)`` parts times the batch size, or a scalar mean for classify.
            items: What is logged.
            preds: What the student returned.
            batch: With ``img`` ``(B, C, H, W)``, as the student saw it.

        Returns:
            ``(loss, items)``. In validation as they were given; while KD is off, with columns of 0.
        """
        # The second is torch's own state: a validation of this very model (without EMA) has no gradient.
        if not self.student.training or not torch.is_grad_enabled():
            return loss, items
        zero = torch.zeros((), device=loss.device)
        columns = {t.column: zero for t in self.terms}
        if not self.active:
            # The very same tensor: with all weights 0 the run is bit by bit the plain one.
            return loss, {**items, **columns}
        self._target = batch.get('cls')
        values = self.compute(preds, batch['img'])
        scale = batch['img'].shape[0] if self.family == 'dense' else 1
        total = torch.stack([v.float() for v in values.values()]).sum()
        columns.update({t.column: values[t.name].detach() for t in self.terms if t.name in values})
        self._watch(loss.detach().sum(), total.detach() * scale)
        kd = total * scale
        loss = torch.cat([loss, kd.to(loss.dtype).view(1)]) if loss.dim() else loss + kd
        return loss, {**items, **columns}

    def compute(self, preds: Any, image: Tensor) -> dict[str, Tensor]:
        """Weighted KD losses by term name, each the mean over the images.

        Raises:
            DistillError: The outputs do not fit together.
        """
        live = [t for t in self.terms if t.weight(self.progress) > 0]
        # Autocast is left as it is for the teacher (it follows the student's precision), and off for the losses.
        taught = self.run_teacher(image)
        result: dict[str, Tensor] = {}
        with torch.autocast(image.device.type, enabled=False):
            if self.family == 'classify':
                pair = self._logits(preds), self._logits(taught.output)
                found = [(1.0, lambda term: self._classify(term, *pair))]
            else:
                found = [
                    (factor, self._dense(preds, taught, branch)) for branch, factor in self._branches(preds) if factor
                ]
            for factor, evaluate in found:
                for term in live:
                    value = evaluate(term) * (factor * term.weight(self.progress))
                    result[term.name] = result[term.name] + value if term.name in result else value
        return result

    def run_teacher(self, image: Tensor) -> Call:
        """What the teacher's head returns for a batch ``(B, C, H, W)`` of the student."""
        image = follow(self.teacher, image, self.student)
        return self.teacher.outputs(image, None, [self.teacher_tap]).call(self.teacher_tap)

    def _branches(self, preds: Any) -> list[tuple[str, float]]:
        """Branches that learn, and the factor the criterion gives them in this epoch."""
        if 'boxes' in raw_predictions(preds):
            return [('one2many', 1.0)]
        criterion = getattr(self.student, 'criterion', None)
        factors = {'one2many': getattr(criterion, 'o2m', 1.0), 'one2one': getattr(criterion, 'o2o', 1.0)}
        chosen = ('one2many', 'one2one') if self.options.branch == 'both' else (self.options.branch,)
        return [(b, float(factors[b])) for b in chosen]

    def _dense(self, preds: Any, taught: Call, branch: str) -> Callable[[Term], Tensor]:
        ours, theirs = select_branch(preds, branch), self._teacher_branch(taught, branch)
        student, teacher = self.read_pair(ours, theirs, taught.training)

        def evaluate(term: Term) -> Tensor:
            if term.name == 'feature':
                return self._features(term, ours, theirs)
            if term.name == 'mask':
                masks = self._masks(ours, theirs, teacher)
                return term.loss(masks.student, masks.teacher, masks.inside, masks.weight)
            return term_loss(term.loss, student, teacher)

        return evaluate

    def _teacher_branch(self, taught: Call, branch: str) -> Any:
        """What the teacher's head returned; of an Ultralytics head one branch."""
        return select_branch(taught.output, branch) if self.native else taught.output

    def read_pair(self, ours: Any, theirs: Any, training: bool = False) -> tuple[DensePredictions, DensePredictions]:
        """Aligned predictions of student and teacher.

        Args:
            ours: The student's raw predictions (one branch).
            theirs: What the teacher's head returned (one branch).
            training: Mode of the teacher's head in that call.
        """
        student = read(head_of(self.student), ours, training=True)
        teacher = read(self.teacher_head, theirs, training=training).detach()
        return align(student, teacher, self.classes)

    def _masks(self, ours: Any, theirs: Any, teacher: DensePredictions) -> MaskPair:
        strides = [strides_of(head) for head in (head_of(self.student), self.teacher_head)]
        return pair_masks(ours, theirs, *strides, teacher, self.options.mask_topk)

    def _features(self, term: Term, ours: Any, theirs: Any) -> Tensor:
        values = []
        for stride, student, teacher in self._feature_levels(ours, theirs):
            if student.shape[1] != teacher.shape[1] and not getattr(term.loss, 'any_channels', False):
                raise DistillError(
                    f'At stride {stride:g} the student has {student.shape[1]} feature channels and the teacher '
                    f'{teacher.shape[1]}, which {type(term.loss).__name__} cannot compare; a callback has no trainable '
                    "projectors: use Ultralytics' own distill_model= for features (it can be combined with this), or "
                    'set feature=None.'
                )
            values.append(term.loss(student, teacher.to(student.dtype)))
        return torch.stack(values).mean()

    def _feature_levels(self, ours: Any, theirs: Any) -> list[tuple[float, Tensor, Tensor]]:
        mine = dict(zip(strides_of(head_of(self.student)), ours['feats'], strict=True))
        other = dict(zip(strides_of(self.teacher_head), theirs['feats'], strict=True))
        common = sorted(set(mine) & set(other))
        if not common:
            raise DistillError(f'Student and teacher have no level in common: strides {list(mine)} and {list(other)}.')
        return [(s, mine[s], other[s][..., : mine[s].shape[-2], : mine[s].shape[-1]]) for s in common]

    def _logits(self, preds: Any) -> Tensor:
        # Training returns the logits, evaluation (probabilities, logits).
        return preds[-1] if isinstance(preds, (tuple, list)) else preds

    def _classify(self, term: Term, student: Tensor, teacher: Tensor) -> Tensor:
        if self.classes is not None:
            student, teacher = student[:, list(self.classes[0])], teacher[:, list(self.classes[1])]
        if getattr(term.loss, 'needs_target', False):
            return term.loss(student, teacher, self._target)
        return term.loss(student, teacher)

    # ------------------------------------------------------------------ the balance of an epoch
    def _watch(self, task: Tensor, kd: Tensor) -> None:
        # Sums stay on the device: reading them in every batch would wait for the GPU.
        self.task_total = task if self.task_total is None else self.task_total + task
        self.kd_total = kd if self.kd_total is None else self.kd_total + kd

    def balance(self) -> float | None:
        """KD over task loss since the last call; None when KD was off or the loss is not finite."""
        task, kd, self.task_total, self.kd_total = self.task_total, self.kd_total, None, None
        if task is None or kd is None:
            return None
        ratio = float(kd) / max(float(task), torch.finfo(torch.float32).tiny)
        return ratio if ratio == ratio and ratio != float('inf') else None

    # ------------------------------------------------------------------ before the first batch
    def check(self, image: Tensor) -> list[Row]:
        """Run both models once without gradients, build the losses and check that every term fits.

        Neither weights, buffers, modes nor random generators change.

        Args:
            image: ``(B, C, H, W)`` with sides that the student's largest stride divides.

        Returns:
            One row per term for the summary table.

        Raises:
            DistillError: Something does not fit.
        """
        with untouched_rng(), torch.no_grad():
            with _raw_mode(self.student) as student:
                path = head_path(student)
                with Capture(student, [path], 'student') as capture:
                    student(image)
                preds = capture.call(path).output
            taught = self.run_teacher(image)
        if self.family == 'classify':
            return self._check_classify(self._logits(preds), self._logits(taught.output))
        return self._check_dense(preds, taught)

    def _check_classify(self, student: Tensor, teacher: Tensor) -> list[Row]:
        if any(getattr(self.options, name) not in (None, 0) for name in ('box', 'mask', 'feature')):
            raise DistillError(
                'A classify student has no boxes or pyramid: leave box, mask and feature out and use cls.'
            )
        _finite(teacher)
        self.terms = [Term('cls', self.options.build_loss('cls_loss', 'kl'), self._weight('cls', 1.0))]
        term = self.terms[0]
        if getattr(term.loss, 'consumes', None) != 'logits':
            raise DistillError(f'{type(term.loss).__name__} cannot be used for classify; use kl, dkd or hard.')
        if getattr(term.loss, 'needs_target', False) and self.classes is not None:
            raise DistillError(
                f'{type(term.loss).__name__} compares with the label, so student and teacher must have the same '
                "classes; use cls_loss='kl'."
            )
        self._target = torch.zeros(len(student), dtype=torch.long, device=student.device)
        self._classify(term, student.float(), teacher.float())
        shapes = f'{student.shape[1]} logits', f'{teacher.shape[1]} logits'
        return [self._row(term, *shapes, 'Classify', type(self.teacher_head).__name__)]

    def _check_dense(self, preds: Any, taught: Call) -> list[Row]:
        raw = raw_predictions(preds)
        if 'boxes' in raw and self.options.branch != 'one2many':
            raise DistillError(
                f'branch={self.options.branch!r}, but the student is not end-to-end: it has one branch; leave branch '
                'out.'
            )
        branch = 'one2one' if self.options.branch == 'one2one' else 'one2many'
        ours, theirs = select_branch(preds, branch), self._teacher_branch(taught, branch)
        student, teacher = self.read_pair(ours, theirs, taught.training)
        _finite(teacher.cls)
        weights = {'cls': self._weight('cls', 1.0), 'box': self._weight('box', 1.0)}
        self.terms = [Term('cls', self.options.build_loss('cls_loss', 'bce'), weights['cls'])]
        # Boxes of an upright and a rotated head are never compared; with box=0 the classes still are.
        if is_rotated(student) == is_rotated(teacher):
            self.terms.append(
                Term('box', self.options.build_loss('box_loss', _best_box(student, teacher)), weights['box'])
            )
        elif not _off(weights['box']):
            raise DistillError(
                'The boxes of an obb model are rotated, those of the other model are not: set box=0 to distil the '
                'classes only, or use an obb teacher for an obb student.'
            )
        if self._has_masks():
            self.terms.append(Term('mask', MaskKLDivLoss(), self._weight('mask', 1.0)))
        if self.options.feature is not None:
            if not self.native:
                raise DistillError(
                    'feature compares the inputs of two Ultralytics heads, and this teacher has another kind of head: '
                    'set feature=None.'
                )
            self.terms.append(Term('feature', self.options.build_loss('feature_loss'), self._weight('feature', 0.0)))
        rows = []
        for term in self.terms:
            try:
                if term.name == 'feature':
                    self._features(term, ours, theirs)
                    levels = self._feature_levels(ours, theirs)
                    shapes = tuple(
                        ', '.join('x'.join(map(str, level[i].shape[1:])) for level in levels) for i in (1, 2)
                    )
                elif term.name == 'mask':
                    shapes = tuple('{} prototypes of {}x{}'.format(*prototypes(r).shape[1:]) for r in (ours, theirs))
                    self._masks(ours, theirs, teacher)
                else:
                    if not _off(term.weight):
                        term_loss(term.loss, student, teacher)
                    shapes = describe(student), describe(teacher)
            except DistillError as error:
                raise DistillError(f'{term.name}: {error}') from error
            names = [type(head).__name__ for head in (head_of(self.student), self.teacher_head)]
            mine = names[0] if 'boxes' in raw else f'{names[0]}.{self.options.branch}'
            rows.append(self._row(term, *shapes, mine, names[1]))
        return rows

    def _has_masks(self) -> bool:
        """Whether masks are distilled: by default when both heads have them."""
        if _off(self._weight('mask', 1.0)):
            return False
        sides = (('student', head_of(self.student)), ('teacher', self.teacher_head))
        without = [f'the {who} ({type(head).__name__})' for who, head in sides if not has_masks(head)]
        if without and self.options.mask is not None:
            raise DistillError(
                f'mask: {" and ".join(without)} predicts no masks; leave mask out, or use two segment models.'
            )
        return not without

    def _weight(self, name: str, default: float) -> Schedule:
        value = getattr(self.options, name)
        return build_schedule(default if value is None else value, name)

    def _row(self, term: Term, student_shape: str, teacher_shape: str, student: str, teacher: str) -> Row:
        return Row(
            name=term.column,
            loss=type(term.loss).__name__,
            student=student,
            student_shape=student_shape,
            teacher=teacher,
            teacher_shape=teacher_shape,
            adapter='none',
            parameters=0,
            weight=str(term.weight),
        )


def term_loss(loss: nn.Module, student: DensePredictions, teacher: DensePredictions) -> Tensor:
    """A loss of two aligned heads, whatever it consumes."""
    consumes = getattr(loss, 'consumes', None)
    if consumes == 'predictions':
        return loss(student, teacher)
    if consumes == 'logits':
        if hasattr(loss, 'from_predictions'):
            return loss.from_predictions(student, teacher)
        raise DistillError(
            f'{type(loss).__name__} compares classes that exclude each other, but the classes of a detector are '
            "independent sigmoids: use 'bce' or 'l2'."
        )
    raise DistillError(f'{type(loss).__name__} compares features; use it as feature_loss.')


def describe(predictions: DensePredictions) -> str:
    """What a head gives, for the summary table."""
    strides = '/'.join(f'{s:g}' for s in predictions.strides)
    bins = f', {predictions.dist.shape[-1]} bins' if predictions.dist is not None else ', no bins'
    return f'{predictions.num_classes} classes, strides {strides}{bins}'


def _best_box(student: DensePredictions, teacher: DensePredictions) -> str:
    both = student.dist is not None and teacher.dist is not None
    if both and student.dist.shape[-1] == teacher.dist.shape[-1]:
        return 'ld'
    return 'l1' if is_rotated(student) else 'iou'


def _off(weight: Schedule) -> bool:
    return isinstance(weight, Constant) and weight.value == 0


def _readable(head: nn.Module) -> bool:
    try:
        find_reader(head)
    except DistillError:
        return False
    return True


def _finite(tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise DistillError('The teacher returns NaN or infinite values; its file is damaged.')


@contextmanager
def _raw_mode(student: nn.Module):
    """The student in evaluation mode, but its head in training mode: raw predictions, BN statistics untouched."""
    student = getattr(student, 'student_model', student)
    modes = [(m, m.training) for m in student.modules()]
    try:
        student.eval()
        head_of(student).training = True
        yield student
    finally:
        for module, training in modes:
            module.training = training
