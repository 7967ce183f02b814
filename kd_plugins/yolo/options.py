"""The options of a distilled run as data: validated, and written to and read from YAML."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugins.distiller import resolver_of
from kd_plugins.distiller.ratio import build_weight
from kd_plugins.distiller.scoring import check_score_teacher
from kd_plugins.distiller.stages import build_stages
from kd_plugins.distiller.temperature import build_temperature
from kd_plugins.errors import DistillError, check_keys, nearest, shown
from kd_plugins.teachers.pseudo import PseudoLabels
from kd_plugins.teachers.run import RunOptions, check_alpha, check_class_map
from kd_plugins.teachers.sources import of_file

BRANCH_CHOICES = ('one2many', 'one2one', 'both')

#: Short names of losses, by option. ``dict(type=...)`` names any other loss with all of its own options.
#: ``'auto'`` stands for the first one; of classify models see `DistillOptions.expand`.
SHORT_LOSSES: dict[str, dict[str, dict[str, Any]]] = {
    'cls_loss': {
        'bce': dict(type='BinaryKLDivLoss'),
        'l2': dict(type='YOLOLogitLoss', obj_weight=0.0, box_weight=0.0),
        'kl': dict(type='KLDivLoss'),
        'dkd': dict(type='DKDLoss'),
        'hard': dict(type='HardLabelLoss'),
    },
    'box_loss': {
        'auto': dict(type='AutoBoxLoss'),
        'ld': dict(type='LocalizationDistillLoss'),
        'iou': dict(type='BoxIoULoss'),
        'l1': dict(type='BoxL1Loss'),
        'l2': dict(type='YOLOLogitLoss', obj_weight=0.0, cls_weight=0.0),
    },
    'feature_loss': {
        'mse': dict(type='FeatureMSELoss'),
        'cwd': dict(type='ChannelWiseDivLoss'),
        'pkd': dict(type='PearsonLoss'),
        'mgd': dict(type='MGDLoss'),
        'cosine': dict(type='CosineFeatureLoss'),
    },
}

#: Options that only say how a short option is to be done.
HOW = {
    'cls': ('cls_loss', 'temperature'),
    'box': ('box_loss', 'box_temperature'),
    'mask': ('mask_topk',),
    'feature': ('feature_loss',),
}


@dataclass(frozen=True)
class DistillOptions:
    """What to distil and how strongly.

    A weight is a number >= 0 or a schedule ``dict(type='linear' | 'cosine', start=, end=, begin=0.0, until=1.0)``.
    KD losses of detect, segment, pose and obb are multiplied by the batch size, as all losses of these tasks are.

    Attributes:
        teacher: The teacher's ``.pt`` file, or the name of an official model; for classifiers a checkpoint that tells
            its network (``x.pth.tar``), or an exported ``.pt2``; or a model of another framework:
            ``dict(config='mmdet::...', checkpoint='x.pth')``, ``dict(timm='resnet50', checkpoint='x.pth')``.
        teachers: Several of them by name, ``{big: x.pt, small: m.pt}``; ``terms`` say ``teacher: 'big:head'``.
        terms: What is distilled, in full: ``{name: {loss: {type: ...}, student: tap, teacher: tap, adapter: auto,
            weight: 1.0, ...}}`` as in MMEngine's hook. Taps are ``head``, ``neck``, ``backbone``, ``stages[i]``,
            ``model.<layer>``. The options ``cls`` to ``feature`` are short for such terms; beside ``terms`` or a
            ``recipe`` only those that are given count, and for a term of that name in ``terms`` they are its weight.
        recipe: Name (or file) of a recipe whose terms are taken: ``cwd``, ``pkd``, ``mgd``, ``cosine``, ...; several
            with commas or in a list.
        options: Changes to a recipe and to the teacher that are made last: ``{weight: 3}`` is the weight of every term,
            ``{neck: {weight: 3}}`` that of one, ``{teacher: {trusted: true}}`` an entry of the teacher. Beside a
            recipe, ``kd_weight=3`` and ``kd_neck.weight=3`` are short for it.
        imports: Modules of your own losses, forms, schedules and the like, ``[my_package.losses]``.
        alpha: Balance in [0, 1]: alpha x the KD losses + (1 - alpha) x the task loss while KD is on. None: both as
            they are.
        cls: Weight of the class term: a number, a schedule, ``'auto:0.5'``, as of every term. Default None: 1.
        box: Weight of the box term. Default None: 1 (0 for classify, which has no boxes).
        mask: Weight of the term on assembled masks. Default None: 1 when student and teacher are segment models
            (nothing else would teach their masks), else off.
        mask_topk: Masks compared per image, of the anchors that the teacher is most confident about.
        feature: Weight of the term on the head's input features (neck outputs). Default None: off. Other widths are
            brought together by trained 1x1 convolutions, which are no part of the student.
        obj: Must stay 0: Ultralytics' heads have no objectness.
        cls_loss: ``'auto'`` (``'bce'``; ``'kl'`` for classify), ``'bce'``, ``'l2'``, for classify ``'kl'``, ``'dkd'``
            or ``'hard'``, or ``dict(type=...)``.
        box_loss: ``'auto'`` (``'ld'`` when both heads have the same bins, else ``'iou'``, or ``'l1'`` for rotated
            boxes), ``'ld'``, ``'iou'``, ``'l1'``, ``'l2'``, or ``dict(type=...)``.
        feature_loss: ``'mse'``, ``'cwd'``, ``'pkd'``, ``'mgd'``, ``'cosine'`` or ``dict(type=...)``.
        temperature: Of the class term, beside a recipe of every term that has one, a number or a schedule; None: the
            loss's own default.
        box_temperature: Of localization distillation; None: its default (10).
        foreground: Weight positions by the teacher's confidence. False: all positions alike; beside a recipe, in every
            term that has it.
        branch: Which branch of an end-to-end student (YOLOv10, YOLO26) learns: ``'one2many'``, ``'one2one'`` or
            ``'both'``; each is multiplied by the factor that Ultralytics gives to the branch in this epoch.
        classes: Class names of the teacher in the order of its outputs, where its file has none or wrong ones.
        class_map: The teacher's name for a class of the student, ``{student name: teacher name}``, where they differ.
        pseudo_labels: What the teacher detects becomes a label where there is none, while KD is on: the lowest score of
            such a detection, or ``dict(score=0.4, iou=0.7, nms=0.65)``. For data in which classes that the teacher
            knows are not labelled. Default None: labels stay as they are.
        score_teacher: Validation images that the teacher, and the student as it starts, are scored on before the first
            epoch, with the run's own validator; False for none. Default None: 32, but no more than a twentieth of the
            images that the run trains on, and none where that is fewer than 8.
        stages: Parts of the run, one after the other: ``[{until: 0.3, terms: [neck], freeze: [head]}, {}]``.
        start: First epoch with KD, counted from 0.
        stop: First epoch without it again. None: to the end.
        trusted: Allow the teacher's file to run code while it is loaded.

    Raises:
        DistillError: A value cannot be right; without importing Ultralytics or looking at the file.
    """

    teacher: str | Mapping[str, Any] | None = None
    teachers: Mapping[str, Any] | None = None
    terms: Mapping[str, Any] | None = None
    recipe: str | Sequence[Any] | None = None
    options: Mapping[str, Any] | None = None
    imports: Sequence[str] | None = None
    alpha: float | None = None
    cls: Any = None
    box: Any = None
    mask: Any = None
    mask_topk: int = 64
    feature: Any = None
    obj: float = 0.0
    cls_loss: Any = 'auto'
    box_loss: Any = 'auto'
    feature_loss: Any = 'mse'
    temperature: Any = None
    box_temperature: Any = None
    foreground: bool = True
    branch: str = 'one2many'
    classes: Sequence[str] | None = None
    class_map: Mapping[str, str] | None = None
    pseudo_labels: Any = None
    score_teacher: bool | int | None = None
    stages: Any = None
    start: int = 0
    stop: int | None = None
    trusted: bool = False

    def __post_init__(self) -> None:
        # First: a schedule may be one of these modules'.
        resolver_of(self.imports)
        if self.teachers is not None:
            self._check_teachers()
        elif not isinstance(self.teacher, (str, Mapping)) or self.teacher == '':
            raise DistillError(
                f"teacher must be the path of a .pt file, e.g. teacher='yolo11x.pt', got {shown(self.teacher)}."
            )
        for name in ('cls', 'box', 'mask', 'feature'):
            if getattr(self, name) is not None:
                build_weight(getattr(self, name), name)
        if isinstance(self.obj, bool) or not isinstance(self.obj, (int, float)) or self.obj != 0:
            raise DistillError(
                f'obj must stay 0, got {self.obj!r}: the heads of Ultralytics have no objectness; use cls and box.'
            )
        for name in ('temperature', 'box_temperature'):
            if getattr(self, name) is not None:
                build_temperature(getattr(self, name), name)
        if isinstance(self.mask_topk, bool) or not isinstance(self.mask_topk, int) or self.mask_topk < 1:
            raise DistillError(f'mask_topk must be a whole number >= 1, got {self.mask_topk!r}.')
        for name in ('foreground', 'trusted'):
            if not isinstance(getattr(self, name), bool):
                raise DistillError(f'{name} must be True or False, got {getattr(self, name)!r}.')
        if self.branch not in BRANCH_CHOICES:
            raise DistillError(f'branch has no choice {self.branch!r}: {nearest(self.branch, BRANCH_CHOICES)}')
        for name, short in SHORT_LOSSES.items():
            self._check_loss(name, short)
        self._check_classes()
        build_stages(self.stages, check_alpha)
        if self.options is not None and not isinstance(self.options, Mapping):
            raise DistillError(f'options must be a mapping such as {{weight: 3}}, got {self.options!r}.')
        check_alpha(self.alpha)
        PseudoLabels.read(self.pseudo_labels)
        check_score_teacher(self.score_teacher)
        for name in ('start', 'stop'):
            value = getattr(self, name)
            if value is None and name == 'stop':
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DistillError(f'{name} must be a whole number of epochs >= 0, got {value!r}.')
        if self.stop is not None and self.stop <= self.start:
            raise DistillError(f'stop ({self.stop}) must come after start ({self.start}).')

    def _check_teachers(self) -> None:
        if self.teacher is not None:
            raise DistillError('teacher and teachers were both given; write all of them in teachers={name: file}.')
        if not isinstance(self.teachers, Mapping) or not self.teachers:
            raise DistillError(f'teachers must be {{name: file}}, got {self.teachers!r}.')
        if self.terms is None and self.recipe is None:
            raise DistillError("teachers need terms that say which one teaches what, e.g. teacher: 'big:head'.")

    def _check_loss(self, name: str, short: Mapping[str, Any]) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            choices = (*short, *(['auto'] if name == 'cls_loss' else []))
            if value not in choices:
                raise DistillError(
                    f'{name} has no choice {value!r}: {nearest(value, choices)} dict(type=...) names any loss.'
                )
        elif not isinstance(value, Mapping):
            raise DistillError(f'{name} must be one of {", ".join(short)} or dict(type=...), got {value!r}.')
        elif 'type' not in value:
            raise DistillError(f"{name} must be dict(type='...', ...), got {dict(value)!r}.")

    def _check_classes(self) -> None:
        if self.classes is not None:
            if isinstance(self.classes, str) or not isinstance(self.classes, Sequence) or not self.classes:
                raise DistillError(f'classes must be a list of the class names of the teacher, got {self.classes!r}.')
            if not all(isinstance(c, str) for c in self.classes):
                raise DistillError(f'classes must be names, got {list(self.classes)!r}.')
        check_class_map(self.class_map)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all options."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = 'the distillation') -> DistillOptions:
        """Read options from a mapping (a kd.yaml, a command line).

        Raises:
            DistillError: A key is unknown (the nearest valid one is named), ``teacher`` is missing, or a value cannot
                be right.
        """
        if not isinstance(values, Mapping):
            raise DistillError(f'{where} must be a mapping of options, got {values!r}.')
        check_keys([str(k) for k in values], cls.names(), where)
        if values.get('teacher') is None and values.get('teachers') is None:
            raise DistillError(f"{where} needs 'teacher': the file of the teacher, e.g. yolo11x.pt.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain data, such that ``from_dict(to_dict())`` is equal."""
        return {name: _plain(getattr(self, name)) for name in self.names()}

    def replace(self, **changes: Any) -> DistillOptions:
        """A copy with some options replaced."""
        return dataclasses.replace(self, **changes)

    def sources(self) -> dict[str, dict[str, Any]]:
        """The ``teacher`` mappings by name, as `kd_plugins.teachers.sources` has them; the only one is ``''``."""
        given = {'': self.teacher} if self.teachers is None else self.teachers
        found = {}
        for name, teacher in given.items():
            source = dict(teacher) if isinstance(teacher, Mapping) else of_file(teacher) or {'ultralytics': teacher}
            if 'ultralytics' in source:
                source.setdefault('trusted', self.trusted)
            if self.classes is not None:
                source.setdefault('classes', list(self.classes))
            found[name] = source
        return found

    def expand(
        self, *, classifier: bool, end_to_end: bool, masks: bool, teacher_end_to_end: bool = False
    ) -> RunOptions:
        """What the run is told in full: the short options as terms.

        Args:
            classifier: Whether the student is a classify model.
            end_to_end: Whether its head has two branches.
            masks: Whether student and teacher both predict masks.
            teacher_end_to_end: Whether the teacher's head has two branches; one that it has teaches both.

        Raises:
            DistillError: An option means nothing for such a student, or a loss cannot be built.
        """
        if not end_to_end and self.branch != 'one2many':
            raise DistillError(
                f'branch={self.branch!r}, but the student is not end-to-end: it has one branch; leave branch out.'
            )
        written = self.terms is not None or self.recipe is not None
        changes = dict(self.options or {})
        if written:
            changes = {**self._of_recipe(), **changes}
            self._refuse_idle(changes)
        if classifier:
            if any(getattr(self, name) not in (None, 0) for name in ('box', 'mask', 'feature')):
                raise DistillError(
                    'A classify student has no boxes or pyramid: leave box, mask and feature out and use cls.'
                )
            short = {} if written and self.cls is None else {'cls': self._term('cls', 'cls_loss', 'kl')}
        else:
            short = self._dense_terms(written, masks)
        own = dict(self.terms or {})
        terms = {}
        for name, term in short.items():
            there = [n for n in (name, f'{name}_one2one') if isinstance(own.get(n), Mapping)]
            if there and not self._changed(HOW[name]):
                own.update({n: {**own[n], 'weight': term['weight']} for n in there})
                continue
            own = {n: t for n, t in own.items() if n not in there}
            # A weight of 0 is the plain way to leave a term out; with nothing else there it says that KD is off.
            if term['weight'] != 0 or written or all(t['weight'] == 0 for t in short.values()):
                terms.update(self._by_branch(name, term, end_to_end, teacher_end_to_end))
        options = dict(
            teachers=self.sources(),
            terms={**terms, **own},
            recipe=self.recipe,
            start=self.start or None,  # that of the recipe, if it has one
            stop=self.stop,
            alpha=self.alpha,
            class_map=self.class_map,
            imports=self.imports,
            pseudo_labels=self.pseudo_labels,
            score_teacher=self.score_teacher,
            stages=self.stages,
            options=changes or None,
        )
        return RunOptions.read(options, 'classification' if classifier else 'detection', 'the distillation')

    def _changed(self, names: Sequence[str]) -> list[str]:
        """Those of some options that are not their defaults."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    def _of_recipe(self) -> dict[str, Any]:
        """Options of the class term that, without one, are those of every term of a recipe that has them."""
        if self.recipe is None or self.cls is not None:
            return {}
        changed = [n for n in self._changed(('temperature', 'foreground')) if n != 'foreground' or self._all_idle]
        return {name: getattr(self, name) for name in changed}

    @property
    def _all_idle(self) -> bool:
        return all(getattr(self, name) is None for name in HOW)

    def _refuse_idle(self, used: Mapping[str, Any]) -> None:
        """Refuse options that say how a short option is to be done which is not there.

        Args:
            used: Those that mean something else.
        """
        missing = [name for name in HOW if getattr(self, name) is None]
        idle = [option for name in missing for option in self._changed(HOW[name])]
        if self._all_idle:
            idle += self._changed(('foreground', 'branch'))
        idle = [name for name in idle if name not in used]
        if idle:
            raise DistillError(
                f'{idle[0]} belongs to the short options, and beside terms or a recipe it would do nothing; write it '
                'inside the term.'
            )

    def _dense_terms(self, written: bool, masks: bool) -> dict[str, dict[str, Any]]:
        found = {}
        for name, default in (('cls', 'bce'), ('box', 'auto')):
            if getattr(self, name) is not None or not written:
                found[name] = self._term(name, f'{name}_loss', default)
        if self.mask not in (None, 0) and not masks:
            raise DistillError(
                'mask: student and teacher must both predict masks; leave mask out, or use two segment models.'
            )
        if masks and self.mask != 0 and (self.mask is not None or not written):
            found['mask'] = dict(loss=dict(type='MaskKLDivLoss', topk=self.mask_topk), **self._rest('mask', 'head'))
        if self.feature is not None:
            found['feature'] = dict(loss=self.loss('feature_loss'), **self._rest('feature', 'neck'))
        return found

    def _term(self, name: str, option: str, default: str) -> dict[str, Any]:
        temperature = self._temperature(option)
        # A number is an option of the loss, a schedule one of the term.
        scheduled = {'temperature': dict(temperature)} if isinstance(temperature, Mapping) else {}
        return dict(loss=self.loss(option, default), **self._rest(name, 'head'), **scheduled)

    def _rest(self, name: str, tap: str) -> dict[str, Any]:
        weight = getattr(self, name)
        return dict(student=tap, teacher=tap, weight=1.0 if weight is None else weight)

    def _by_branch(
        self, name: str, term: dict[str, Any], end_to_end: bool, teacher_end_to_end: bool
    ) -> dict[str, dict[str, Any]]:
        """A term on the head for each branch that learns; the teacher's branch is the one of the same name, if any."""
        if term['student'] != 'head' or not end_to_end or self.branch == 'one2many':
            return {name: term}
        branches = ('one2many', 'one2one') if self.branch == 'both' else (self.branch,)
        names = {'one2many': name, 'one2one': name if self.branch == 'one2one' else f'{name}_one2one'}
        return {
            names[b]: {
                **term,
                'student': f'head.{b}',
                'teacher': f'head.{b}' if teacher_end_to_end else 'head',
            }
            for b in branches
        }

    def loss(self, option: str, name: str | None = None) -> dict[str, Any]:
        """The config of the loss that an option names.

        Args:
            option: ``'cls_loss'``, ``'box_loss'`` or ``'feature_loss'``.
            name: What ``'auto'`` stands for.

        Raises:
            DistillError: Options that the loss does not have.
        """
        given = getattr(self, option)
        if not isinstance(given, Mapping):
            cfg = dict(SHORT_LOSSES[option][name if given == 'auto' and name is not None else given])
            self._fill(cfg, option)
            return cfg
        if option != 'feature_loss' and self._temperature(option) is not None:
            raise DistillError(f'Write the temperature inside {option}, which is a dict, not beside it.')
        return dict(given)

    def _fill(self, cfg: dict[str, Any], option: str) -> None:
        """Add the options that stand beside a short name, where the loss has them."""
        import kd_plugins.losses as losses

        accepted = inspect.signature(getattr(losses, cfg['type'])).parameters
        if 'foreground' in accepted:
            cfg['foreground'] = self.foreground
        temperature = self._temperature(option)
        if temperature is not None:
            if 'temperature' not in accepted:
                raise DistillError(f'{cfg["type"]} has no temperature; remove the option.')
            if not isinstance(temperature, Mapping):
                cfg['temperature'] = temperature

    def _temperature(self, option: str) -> Any:
        return {'cls_loss': self.temperature, 'box_loss': self.box_temperature}.get(option)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
