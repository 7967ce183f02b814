"""The options of a distilled run as data: validated, and written to and read from YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_plugins.distiller.schedules import build_schedule
from kd_plugins.distiller.terms import build_named
from kd_plugins.errors import DistillError, check_keys, nearest

BRANCH_CHOICES = ('one2many', 'one2one', 'both')

#: Short names of losses, by option. ``dict(type=...)`` names any other loss with all of its own options.
SHORT_LOSSES: dict[str, dict[str, dict[str, Any]]] = {
    'cls_loss': {
        'bce': dict(type='BinaryKLDivLoss'),
        'l2': dict(type='YOLOLogitLoss', obj_weight=0.0, box_weight=0.0),
        'kl': dict(type='KLDivLoss'),
        'dkd': dict(type='DKDLoss'),
        'hard': dict(type='HardLabelLoss'),
    },
    'box_loss': {
        'ld': dict(type='LocalizationDistillLoss'),
        'iou': dict(type='BoxIoULoss'),
        'l1': dict(type='BoxL1Loss'),
        'l2': dict(type='YOLOLogitLoss', obj_weight=0.0, cls_weight=0.0),
    },
    'feature_loss': {
        'mse': dict(type='FeatureMSELoss'),
    },
}


@dataclass(frozen=True)
class DistillOptions:
    """What to distil and how strongly.

    A weight is a number >= 0 or a schedule ``dict(type='linear' | 'cosine', start=, end=, begin=0.0, until=1.0)``.
    KD losses of detect, segment, pose and obb are multiplied by the batch size, as all losses of these tasks are.

    Attributes:
        teacher: The teacher's ``.pt`` file, or the name of an official model; or a model of another framework:
            ``dict(config='mmdet::...', checkpoint='x.pth')``, ``dict(timm='resnet50', checkpoint='x.pth')``.
        cls: Weight of the class term. Default None: 1.
        box: Weight of the box term. Default None: 1 (0 for classify, which has no boxes).
        mask: Weight of the term on assembled masks. Default None: 1 when student and teacher are segment models
            (nothing else would teach their masks), else off.
        mask_topk: Masks compared per image, of the anchors that the teacher is most confident about.
        feature: Weight of the term on the head's input features (neck outputs). Default None: off. There are no
            trainable projectors in a callback, so the channels must be equal unless the loss does not compare them.
        obj: Must stay 0: Ultralytics' heads have no objectness.
        cls_loss: ``'auto'`` (``'bce'``; ``'kl'`` for classify), ``'bce'``, ``'l2'``, for classify ``'kl'``, ``'dkd'``
            or ``'hard'``, or ``dict(type=...)``.
        box_loss: ``'auto'`` (``'ld'`` when both heads have the same bins, else ``'iou'``, or ``'l1'`` for rotated
            boxes), ``'ld'``, ``'iou'``, ``'l1'``, ``'l2'``, or ``dict(type=...)``.
        feature_loss: ``'mse'`` or ``dict(type=...)``.
        temperature: Of the class term; None: the loss's own default.
        box_temperature: Of localization distillation; None: its default (10).
        foreground: Weight positions by the teacher's confidence. False: all positions alike.
        branch: Which branch of an end-to-end student (YOLOv10, YOLO26) learns: ``'one2many'``, ``'one2one'`` or
            ``'both'``; each is multiplied by the factor that Ultralytics gives to the branch in this epoch.
        classes: Class names of the teacher in the order of its outputs, where its file has none or wrong ones.
        class_map: The teacher's name for a class of the student, ``{student name: teacher name}``, where they differ.
        start: First epoch with KD, counted from 0.
        stop: First epoch without it again. None: to the end.
        trusted: Allow the teacher's file to run code while it is loaded.

    Raises:
        DistillError: A value cannot be right; without importing Ultralytics or looking at the file.
    """

    teacher: str | Mapping[str, Any]
    cls: Any = None
    box: Any = None
    mask: Any = None
    mask_topk: int = 64
    feature: Any = None
    obj: float = 0.0
    cls_loss: Any = 'auto'
    box_loss: Any = 'auto'
    feature_loss: Any = 'mse'
    temperature: float | None = None
    box_temperature: float | None = None
    foreground: bool = True
    branch: str = 'one2many'
    classes: Sequence[str] | None = None
    class_map: Mapping[str, str] | None = None
    start: int = 0
    stop: int | None = None
    trusted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, (str, Mapping)) or not self.teacher:
            raise DistillError(
                f"teacher must be the path of a .pt file, e.g. teacher='yolo11x.pt', got {self.teacher!r}."
            )
        for name in ('cls', 'box', 'mask', 'feature'):
            if getattr(self, name) is not None:
                build_schedule(getattr(self, name), name)
        if isinstance(self.obj, bool) or not isinstance(self.obj, (int, float)) or self.obj != 0:
            raise DistillError(
                f'obj must stay 0, got {self.obj!r}: the heads of Ultralytics have no objectness; use cls and box.'
            )
        for name in ('temperature', 'box_temperature'):
            if getattr(self, name) is not None:
                build_schedule(getattr(self, name), name, 0.0, strict=True)
                if isinstance(getattr(self, name), Mapping):
                    raise DistillError(f'{name} must be a number, got {getattr(self, name)!r}.')
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
        for name in ('start', 'stop'):
            value = getattr(self, name)
            if value is None and name == 'stop':
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DistillError(f'{name} must be a whole number of epochs >= 0, got {value!r}.')
        if self.stop is not None and self.stop <= self.start:
            raise DistillError(f'stop ({self.stop}) must come after start ({self.start}).')

    def _check_loss(self, name: str, short: Mapping[str, Any]) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            choices = (*short, *(['auto'] if name != 'feature_loss' else []))
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
        if self.class_map is not None:
            if not isinstance(self.class_map, Mapping) or not all(
                isinstance(k, str) and isinstance(v, str) for k, v in self.class_map.items()
            ):
                raise DistillError(f'class_map must be {{student name: teacher name}}, got {self.class_map!r}.')

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
        if values.get('teacher') is None:
            raise DistillError(f"{where} needs 'teacher': the .pt file of the teacher.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain data, such that ``from_dict(to_dict())`` is equal."""
        return {name: _plain(getattr(self, name)) for name in self.names()}

    def replace(self, **changes: Any) -> DistillOptions:
        """A copy with some options replaced."""
        return dataclasses.replace(self, **changes)

    def build_loss(self, option: str, name: str | None = None) -> Any:
        """Build the loss module that an option names.

        Args:
            option: ``'cls_loss'``, ``'box_loss'`` or ``'feature_loss'``.
            name: What ``'auto'`` stands for.

        Raises:
            DistillError: Unknown loss or options that it does not have.
        """
        import kd_plugins.losses as losses

        given = getattr(self, option)
        written_out = isinstance(given, Mapping)
        cfg = dict(given) if written_out else dict(SHORT_LOSSES[option][name if given == 'auto' else given])
        if not written_out:
            self._fill(cfg, losses, option)
        elif option != 'feature_loss' and self._temperature(option) is not None:
            raise DistillError(f'Write the temperature inside {option}, which is a dict, not beside it.')
        return build_named(cfg, losses, option, 'loss')

    def _fill(self, cfg: dict[str, Any], losses: Any, option: str) -> None:
        """Add the options that stand beside a short name, where the loss has them."""
        import inspect

        accepted = inspect.signature(getattr(losses, cfg['type'])).parameters
        if 'foreground' in accepted:
            cfg['foreground'] = self.foreground
        temperature = self._temperature(option)
        if temperature is not None:
            if 'temperature' not in accepted:
                raise DistillError(f'{cfg["type"]} has no temperature; remove the option.')
            cfg['temperature'] = temperature

    def _temperature(self, option: str) -> float | None:
        return {'cls_loss': self.temperature, 'box_loss': self.box_temperature}.get(option)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
