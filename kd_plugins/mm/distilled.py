"""The student as a model that carries its teacher and terms, for those who want them in ``model=``."""

from __future__ import annotations

import copyreg
from collections.abc import Mapping
from typing import Any

from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from kd_plugins.errors import DistillError, nearest
from kd_plugins.registry import MODELS

HOOK_LINES = "default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))"


class DistillMixin:
    """What a distilled student has beyond its own class: the options of its distillation, and a guard.

    The distilled model *is* a student (a subclass instance), not a wrapper that holds one: checkpoint keys,
    ``load_from``, activation checkpointing and hooks that look for sub-modules find what they find in the plain model.
    """

    student_class: type[nn.Module]
    distill: Mapping[str, Any]
    kd_attached: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's forward; refuses to train while no ``DistillHook`` is there to distil."""
        mode = kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')
        if mode == 'loss' and not self.kd_attached:
            raise DistillError(f'This model is kd_plugins.Distilled but no DistillHook is running; add {HOOK_LINES}')
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any):
        # Copies are made in __deepcopy__; what is pickled is the plain student, readable without this package.
        state = {k: v for k, v in self.__dict__.items() if k not in ('distill', 'kd_attached')}
        # Not copyreg.__newobj__: pickle refuses it for another class than the object's own.
        rebuild = copyreg._reconstructor  # type: ignore[attr-defined]
        return rebuild, (self.student_class, object, None), state

    def __deepcopy__(self, memo: dict) -> nn.Module:
        import copy

        result = self.__class__.__new__(self.__class__)
        memo[id(self)] = result
        result.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return result


_CLASSES: dict[type, type] = {}


def distilled_class(student: type) -> type:
    """The distilled subclass of a student class (one per class)."""
    if student not in _CLASSES:
        _CLASSES[student] = type(
            f'Distilled{student.__name__}',
            (DistillMixin, student),
            {'student_class': student, '__doc__': f'{student.__name__}, distilled.', '__module__': __name__},
        )
    return _CLASSES[student]


@MODELS.register_module(name='Distilled')
def distilled(student_type: Any, distill: Mapping[str, Any], **student: Any) -> nn.Module:
    """Build a distilled student.

    The same as its own class with a `DistillHook` that has the options: a spelling for configs that want them in
    ``model``.

    .. code-block:: python

        model = dict(type='kd_plugins.Distilled', student_type=_base_.model.type,
                     distill=dict(teacher=dict(config=..., checkpoint=...), terms=dict(...)))
        default_hooks = dict(distill=dict(type='kd_plugins.DistillHook'))

    Args:
        student_type: The student's own ``type``.
        distill: ``dict(teacher=, terms=, start=0, ...)``, the options of :class:`kd_plugins.mm.DistillHook`.
        **student: The student's own options.

    Returns:
        An instance of a subclass of the student's class. What is wrong with ``distill`` is raised when training
        starts, so that a model whose teacher is not at hand can still be tested.

    Raises:
        DistillError: ``student_type`` is unknown.
    """
    with ROOT_MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(student_type) if isinstance(student_type, str) else student_type
        if cls is None:
            known = [n for r in (registry, ROOT_MODELS) for n in r.module_dict]
            raise DistillError(f'student_type {student_type!r} is not a model: {nearest(student_type, known)}')
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise DistillError(f'student_type {student_type!r} must be a model class, got {cls!r}.')
    model = distilled_class(cls)(**student)
    model.distill = distill
    return model
