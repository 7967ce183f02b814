"""The hook that distils: attached to the user's own model inside MMEngine's own Runner."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor, nn

from kd_plugins.distiller import Capture, Distiller, Position, map_tensors, summary
from kd_plugins.errors import DistillError
from kd_plugins.mm.data import class_names, pipelines
from kd_plugins.mm.distilled import BANK, HOOK_LINES, DistillMixin
from kd_plugins.mm.example import example_batch
from kd_plugins.mm.inputs import student_format
from kd_plugins.mm.setup import build_distiller, check_options, dry_run, schedule_text, unit_of
from kd_plugins.mm.teacher import TEACHER_KEYS, build_teacher, is_classifier, num_classes
from kd_plugins.predictions import match_classes
from kd_plugins.registry import HOOKS

STATE = 'kd_plugins'
#: The head of a distillation token. While it is taught, the labels teach the class head alone.
TOKEN = 'dist_logits'


@HOOKS.register_module()
class DistillHook(Hook):
    """Adds knowledge distillation to a training run.

    .. code-block:: python

        custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
        default_hooks = dict(distill=dict(
            type='kd_plugins.DistillHook',
            teacher=dict(config='mmdet::yolox/yolox_l_8xb8-300e_coco.py', checkpoint='yolox_l.pth'),
            terms=dict(logits=dict(loss=dict(type='YOLOLogitLoss'), student='bbox_head', teacher='bbox_head'))))

    The losses are computed inside the model's forward, hence inside DDP and autocast. Each term is logged as
    ``loss_kd_<name>``; ``kd_ratio`` is the sum of all KD losses over the task loss. Validation and test never run
    the teacher.

    Args:
        teacher: ``dict(config=, checkpoint=, classes=None, allow_missing=(), allow_unexpected=())``. ``config`` is a
            file or ``'mmdet::path'``. ``classes`` names its classes when neither checkpoint nor config does. Or
            ``dict(ultralytics='x.pt', classes=None, trusted=False)``: its head is tapped as ``bbox_head`` too.
        terms: Mapping of name to ``dict(loss=dict(type=...), student='tap', teacher='tap', adapter='auto', weight=1.0,
            temperature=None)``. ``weight`` and ``temperature`` may be schedules.
        start: First epoch with KD (iteration in an ``IterBasedTrainLoop``), counted from 0.
        stop: First epoch (iteration) without it again. None: to the end.
        alpha: Balance in [0, 1]: while KD is on, ``alpha`` times the KD losses and ``1 - alpha`` times the model's own.
            None: the model's own losses stay as they are, and the terms' weights say it all.

    ``teacher`` and ``terms`` are omitted when the model is ``kd_plugins.Distilled``, which carries them.

    Raises:
        DistillError: In ``before_train``, before the first iteration, for everything that does not fit.
    """

    # After every stock hook's before_train, so that a copy made there (EMA) does not contain our forward hooks.
    priority = 'VERY_LOW'

    def __init__(
        self,
        teacher: Mapping[str, Any] | None = None,
        terms: Mapping[str, Any] | None = None,
        start: int = 0,
        stop: int | None = None,
        alpha: float | None = None,
        **unknown: Any,
    ) -> None:
        given = dict(teacher=teacher, terms=terms, start=start, stop=stop, alpha=alpha)
        self._options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self._options.update(unknown)
        self.distiller: Distiller | None = None
        self._handles: list[Any] = []
        self._capture: Capture | None = None
        self._model: nn.Module | None = None
        self._checked = False

    def __deepcopy__(self, memo: dict) -> DistillHook:
        # A copy of the model made during training copies its forward hooks, and with them this object's references.
        return self

    # ------------------------------------------------------------------ life cycle
    def before_train(self, runner: Any) -> None:
        """Load the teacher, check every term, print the summary and attach to the model."""
        self._refuse_custom_hooks(runner)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        options = self._resolve_options(model)
        check_options(options)
        self._refuse_self_teaching(runner, model, options)
        self._refuse_unread(runner, options, 'model' if isinstance(model, DistillMixin) else 'default_hooks')
        example = example_batch(runner, model)
        batch = example[0]
        dataset = getattr(runner.train_loop.dataloader, 'dataset', None)
        pixels = student_format(model, pipelines(dataset), batch.shape[1] if isinstance(batch, Tensor) else None)
        teacher, notes = build_teacher(options['teacher'], model, pixels)
        held = getattr(model, BANK, None)
        self.distiller = build_distiller(model, teacher, options, held)
        # First: that a head predicts no classes explains why their numbers differ.
        self.distiller.check_heads()
        names = _dataset_classes(runner)
        _refuse_data_set(runner, model, names)
        if self.distiller.by_class:
            self.distiller.classes = match_classes(
                names,
                teacher.classes,
                student_count=num_classes(model),
                teacher_count=teacher.num_classes,
            )
        rows = dry_run(self.distiller, example=example)
        if held is None and any(True for _ in self.distiller.bank.parameters()):
            raise DistillError(_model_form_lines(self.distiller))
        unit, _, total = unit_of(runner)
        if self.distiller.start >= total:
            raise DistillError(
                f'start={self.distiller.start} is not before the end of the run ({total} {unit}s): KD would never run.'
            )
        runner.logger.info(
            summary(
                rows,
                teacher,
                student=type(model).__name__,
                student_parameters=sum(p.numel() for n, p in model.named_parameters() if not n.startswith(BANK)),
                classes=_classes_text(names, teacher.classes, self.distiller),
                schedule=schedule_text(self.distiller, unit, total),
                notes=notes,
            )
        )
        self._attach(model)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Tell schedules where the run is."""
        _, unit, _ = unit_of(runner)
        self.distiller.position = Position(runner.iter, runner.max_iters, unit)

    def after_train(self, runner: Any) -> None:
        """Leave the model as it was found."""
        self.detach()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Save the adapters under a key of their own; a run without adapters saves what the plain run saves."""
        if self.distiller is not None and any(True for _ in self.distiller.bank.parameters()):
            checkpoint[STATE] = dict(adapters=self.distiller.bank.export_state())

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Restore the adapters when a run is resumed."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        bank = getattr(model, BANK, None)
        if bank is None or not any(True for _ in bank.parameters()) or not getattr(runner, '_resume', False):
            return
        if STATE not in checkpoint:
            raise DistillError(
                'The checkpoint to resume from holds no adapters, so it was not written by this distilled run; to '
                'start a distilled run from its weights use load_from without --resume.'
            )
        bank.import_state(checkpoint[STATE]['adapters'], 'the checkpoint')

    # ------------------------------------------------------------------ around the student's forward
    def _attach(self, model: nn.Module) -> None:
        self.detach()
        self._model, self._checked = model, False
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        if isinstance(model, DistillMixin):
            model.kd_attached = True

    def detach(self) -> None:
        """Take the forward hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if isinstance(self._model, DistillMixin):
            self._model.kd_attached = False
        self._model = None

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if model is self._model and _mode(args, kwargs) == 'loss' and self.distiller.active:
            self._capture = self.distiller.capture().open()
            if hasattr(model, 'separate_heads'):
                model.separate_heads = self.distiller.teaches(TOKEN)

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.close()
            if hasattr(model, 'separate_heads'):
                model.separate_heads = False
        # `always_call` also brings us here when the student's forward raised, with no output.
        if output is None or model is not self._model or _mode(args, kwargs) != 'loss':
            return None
        inputs = kwargs['inputs'] if 'inputs' in kwargs else args[0]
        samples = kwargs.get('data_samples', args[1] if len(args) > 1 else None)
        if not isinstance(output, dict):
            raise DistillError(f'{type(model).__name__} returned {type(output).__name__} as losses, expected a dict.')
        kd = self.distiller.losses(capture, inputs, samples)
        clash = sorted(set(output) & set(kd))
        if clash:
            raise DistillError(f'{type(model).__name__} already logs {clash[0]!r}; rename the term.')
        if not self._checked and self.distiller.active:
            self._checked = True
            _refuse_nan(output, kd)
        if self.distiller.alpha is not None and self.distiller.active:
            own = 1 - self.distiller.alpha
            output = {k: map_tensors(v, lambda x: x * own) if 'loss' in k else v for k, v in output.items()}
        # No "loss" in its name: logged, not optimised.
        ratio = _total(kd) / _total(output).clamp(min=torch.finfo(torch.float32).tiny)
        return {**output, **kd, 'kd_ratio': ratio}

    # ------------------------------------------------------------------ what must not start
    def _resolve_options(self, model: nn.Module) -> dict[str, Any]:
        carried = getattr(model, 'distill', None) if isinstance(model, DistillMixin) else None
        own = {k: v for k, v in self._options.items() if k not in ('start', 'stop') or v}
        if carried is None:
            return dict(self._options)
        if model.kd_error is not None:
            raise model.kd_error
        if own:
            raise DistillError(
                f'The model is kd_plugins.Distilled with own teacher and terms; take {", ".join(map(repr, own))} out '
                "of default_hooks.distill (dict(type='kd_plugins.DistillHook') is enough)."
            )
        return dict(carried)

    @staticmethod
    def _refuse_custom_hooks(runner: Any) -> None:
        listed = runner.cfg.get('custom_hooks') or []
        types = [h.get('type') for h in listed if isinstance(h, Mapping)]
        if any(t is DistillHook or str(t).split('.')[-1] == 'DistillHook' for t in types):
            raise DistillError(
                'DistillHook stands in custom_hooks, where a list in a child config replaces its whole base (EMA, '
                "pipeline switch); write default_hooks=dict(distill=dict(type='kd_plugins.DistillHook', ...)) instead."
            )

    @staticmethod
    def _refuse_unread(runner: Any, options: Mapping[str, Any], place: str) -> None:
        # `--cfg-options teacher.checkpoint=...` makes a new entry at the top level and would change nothing.
        for key, known, needed in (('teacher', TEACHER_KEYS, 'config'), ('terms', options['terms'], None)):
            written, used = runner.cfg.get(key), options[key]
            if not isinstance(written, Mapping) or not isinstance(used, Mapping) or not set(written) <= set(known):
                continue
            # A complete one is a variable of the config, which may differ on purpose from what was made of it.
            parts = [written] if needed else [v for v in written.values() if isinstance(v, Mapping)]
            unread = [k for k, v in written.items() if v != used.get(k)]
            if unread and any((needed or 'loss') not in part for part in parts):
                where = f'{key}.{unread[0]}'
                raise DistillError(
                    f'{where} = {written[unread[0]]!r} stands at the top level of the config, where nothing reads it; '
                    f'write it as {place}.distill.{where}.'
                )

    @staticmethod
    def _refuse_self_teaching(runner: Any, model: nn.Module, options: Mapping[str, Any]) -> None:
        teacher = options['teacher'].get('checkpoint') if isinstance(options['teacher'], Mapping) else None
        starts = {'load_from': getattr(runner, '_load_from', None)}
        if is_classifier(model):
            starts['model.checkpoint'] = getattr(model, 'checkpoint', None)
        for key, start in starts.items():
            if teacher and start and os.path.realpath(str(teacher)) == os.path.realpath(str(start)):
                raise DistillError(
                    f"The student starts from the teacher's own checkpoint {str(teacher)!r} ({key}): they would be "
                    f'equal and nothing would be learned; give another {key} or another teacher.checkpoint.'
                )


def _refuse_data_set(runner: Any, model: nn.Module, names: Sequence[str] | None) -> None:
    """What the data set shows before its first image."""
    number = num_classes(model)
    if is_classifier(model) and None not in (names, number) and len(names) != number:
        raise DistillError(
            f'The data set has {len(names)} classes but the model num_classes={number}; write '
            f'num_classes={len(names)} in the model.'
        )
    loader = runner.train_loop.dataloader
    if isinstance(runner.train_loop, EpochBasedTrainLoop) and not len(loader):
        raise DistillError(
            f'train_dataloader makes not one batch of its {len(loader.dataset)} images: write less than '
            f'batch_size={loader.batch_size}, or keep the last batch (drop_last={loader.drop_last}).'
        )


def _refuse_nan(task: Mapping[str, Any], kd: Mapping[str, Tensor]) -> None:
    """In the first distilled iteration only (it synchronises): real images can overflow what noise did not."""
    wrong = [k for k, v in kd.items() if not torch.isfinite(v)]
    if wrong and torch.isfinite(_total(task)):
        raise DistillError(
            f"{wrong[0]} is {kd[wrong[0]].item()} in its first iteration, while the student's own loss is finite: the "
            "teacher's outputs overflow on these images; check its checkpoint, normalisation and precision."
        )


def _mode(args: tuple, kwargs: Mapping[str, Any]) -> str:
    return kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')


def _total(losses: Mapping[str, Any]) -> Tensor:
    values = [v for k, v in losses.items() if 'loss' in k]
    flat = [t.detach().float().mean() for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]
    return torch.stack(flat).sum()


def _dataset_classes(runner: Any) -> tuple | None:
    return class_names(getattr(runner.train_loop.dataloader, 'dataset', None))


def _classes_text(student: Any, teacher: Any, distiller: Distiller) -> str:
    classes = distiller.classes
    if not distiller.by_class:
        return 'not compared'
    if classes is not None:
        return f'{len(classes[0])} of {len(student)} student classes taught by name (teacher knows {len(teacher)})'
    if student is None or teacher is None:
        return 'same number of classes, names of one side unknown: assumed to be in the same order'
    return f'the same {len(student)} classes'


def _model_form_lines(distiller: Distiller) -> str:
    names = ', '.join(repr(n) for n in distiller.bank._modules)
    return (
        f'term {names} needs trainable adapters, which only the model form can carry to the optimizer and through '
        'resume. Write in your config:\n'
        "    model = dict(type='kd_plugins.Distilled', student_type=_base_.model.type,\n"
        '                 distill=dict(teacher=dict(...), terms=dict(...)))  # moved from default_hooks.distill\n'
        f'    {HOOK_LINES}\n'
        'or add adapter=None and tap layers of equal shape.'
    )
