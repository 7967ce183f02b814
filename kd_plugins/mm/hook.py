"""The hook that distils: attached to the user's own model inside MMEngine's own Runner."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import Tensor, nn

from kd_plugins import __version__
from kd_plugins.distiller import (
    Capture,
    Session,
    build_terms,
    images_of,
    map_tensors,
    resolver_of,
    summary,
    untouched_rng,
)
from kd_plugins.distiller.balance import PERIOD
from kd_plugins.distiller.ending import Ending, Validations, numbers_of, shorter, write_text
from kd_plugins.distiller.scoring import TeacherScore, best_of, images_wanted
from kd_plugins.errors import DistillError, in_words
from kd_plugins.mm.data import class_names, pipelines
from kd_plugins.mm.distilled import DistillMixin
from kd_plugins.mm.ending import main_metric, write_student
from kd_plugins.mm.example import example_batch
from kd_plugins.mm.host import MMHost, find_in_registries, image_counts, position_of, unit_of
from kd_plugins.mm.inputs import student_format
from kd_plugins.mm.pseudo import refuse_unlabelled, with_labels
from kd_plugins.mm.resume import STATE, forget
from kd_plugins.mm.scoring import MMScorer
from kd_plugins.mm.teacher import TEACHER_KEYS, num_classes
from kd_plugins.registry import HOOKS
from kd_plugins.teachers.run import (
    RunOptions,
    load_teachers,
    match_teachers,
    open_session,
    score_session,
    score_warnings,
)


@HOOKS.register_module()
class DistillHook(Hook):
    """Adds knowledge distillation to a training run.

    .. code-block:: python

        custom_imports = dict(imports=['kd_plugins.mm'], allow_failed_imports=False)
        default_hooks = dict(distill=dict(
            type='kd_plugins.DistillHook',
            teacher=dict(config='mmdet::yolox/yolox_l_8xb8-300e_coco.py', checkpoint='yolox_l.pth'),
            terms=dict(logits=dict(loss=dict(type='YOLOLogitLoss'), student='head', teacher='head'))))

    The losses are computed inside the model's forward, hence inside DDP and autocast. Each term is logged as
    ``loss_kd_<name>``; ``kd_ratio`` is the sum of all KD losses over the task loss. Validation and test never run
    the teacher. Trainable adapters have an optimizer of their own that steps with the student's; they are saved in the
    checkpoint under a key of their own.

    At the end of the training the plain student is written as ``kd_student.pth`` and ``kd_student.py`` beside its
    checkpoint (the best, or the last), and what came out stands in the log, and as ``kd_summary.txt`` and
    ``kd_summary.json`` beside it.

    Args:
        teacher: ``dict(config=, checkpoint=, classes=None, allow_missing=(), allow_unexpected=())``. ``config`` is a
            file or ``'mmdet::path'``. ``classes`` names its classes when neither checkpoint nor config does. Or a
            model of another framework, e.g. ``dict(ultralytics='x.pt', classes=None, trusted=False)``.
        teachers: Several of them by name, ``dict(big=dict(...), small=dict(...))``; terms say ``teacher='big:head'``.
        terms: Mapping of name to ``dict(loss=dict(type=...), student='tap', teacher='tap', adapter='auto', weight=1.0,
            temperature=None, start=0, stop=None, teacher_adapter=None, samples=None)``. ``weight`` and ``temperature``
            may be schedules, see `kd_plugins.distiller.schedules.build_schedule`, and a weight ``'auto:0.5'``, see
            `kd_plugins.distiller.ratio.build_weight`.
        recipe: Name (or file) of a recipe whose terms are taken, or a list of several; ``terms`` changes or completes
            them.
        options: Changes that are applied last, see `kd_plugins.recipes.options`: ``dict(weight=3.0)`` is the weight of
            every term, ``dict(logits=dict(weight=3.0))`` that of one.
        start: First epoch with KD (iteration in an ``IterBasedTrainLoop``), counted from 0.
            None: that of the recipe, or 0.
        stop: First epoch (iteration) without it again. None: to the end.
        alpha: Balance in [0, 1]: while KD is on, ``alpha`` times the KD losses and ``1 - alpha`` times the model's own.
            None: the model's own losses stay as they are, and the terms' weights say it all.
        class_map: ``{student name: teacher name}`` where classes have other names.
        imports: Modules of your own losses, forms, schedules and the like.
        stages: Parts of the run, one after the other, each with terms, frozen parts and a balance of its own:
            ``[dict(until=0.3, terms=['neck'], freeze=['head'], alpha=1), dict()]``.
        pseudo_labels: Lowest score, or ``dict(score=0.4, iou=0.7, nms=0.65)``, of what the teacher detects to become a
            label where there is none, while KD is on. None: labels stay as they are.
        score_teacher: Validation images that the teacher, and the student as it starts, are scored on before the first
            iteration, with the run's own evaluator; False for none. None: 32, but no more than a twentieth of the
            images that the run trains on, and none where that is fewer than 8.
        pixel_format: ``dict(mean=, std=, rgb=, pad=)`` of the student's batches, where it cannot be established.

    ``teacher`` and ``terms`` are omitted when the model is ``kd_plugins.Distilled``, which carries them.

    Attributes:
        session: What distils; None before the training.
        summary: The table that was printed at the start, None before.
        teacher_metric: The teacher's value of the compared metric, of several teachers the best's. None: not measured,
            see ``score_teacher``.

    Raises:
        DistillError: In ``before_train``, before the first iteration, for everything that does not fit.
    """

    # After every stock hook's before_train, so that a copy made there (EMA) does not contain our forward hooks.
    priority = 'VERY_LOW'

    def __init__(
        self,
        teacher: Mapping[str, Any] | None = None,
        terms: Mapping[str, Any] | None = None,
        start: int | None = None,
        stop: int | None = None,
        alpha: float | None = None,
        **more: Any,
    ) -> None:
        given = dict(teacher=teacher, terms=terms, start=start, stop=stop, alpha=alpha, **more)
        self._options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        self.session: Session | None = None
        self._host: MMHost | None = None
        self._handles: list[Any] = []
        self._capture: Capture | None = None
        self._model: nn.Module | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._validations = Validations()
        self._began = (0, 0.0)
        self.summary: str | None = None
        self.teacher_metric: float | None = None
        self._teacher_on = ''

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged, a row per epoch (per interval of the log where the run has no epochs), see `History.rows`.

        ``pandas.DataFrame(hook.history)`` is a table of it.
        """
        return [] if self.session is None else self.session.history.rows

    def __deepcopy__(self, memo: dict) -> DistillHook:
        # A copy of the model made during training copies its forward hooks, and with them this object's references.
        return self

    # ------------------------------------------------------------------ life cycle
    def before_train(self, runner: Any) -> None:
        """Load the teachers, check every term, print the summary and attach to the model."""
        self._refuse_custom_hooks(runner)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        written = self._resolve_options(model)
        pixel_format = written.pop('pixel_format', None)
        host = self._host = MMHost(model)
        options = RunOptions.read(written, host.task.name, more=find_in_registries)
        self._refuse_unread(runner, written, 'model' if isinstance(model, DistillMixin) else 'default_hooks')
        # Before the teachers are loaded: what is misspelt needs no minute to be found.
        terms = build_terms(options.terms, resolver_of(options.imports, find_in_registries))
        example = example_batch(runner, model, images_of(terms.values()))
        dataset = getattr(runner.train_loop.dataloader, 'dataset', None)
        host.counts = lambda: image_counts(dataset, num_classes(model) or 0)
        pixels = student_format(model, pipelines(dataset), example[0], pixel_format)
        teachers, notes = load_teachers(options.teachers, model, host, replace(pixels, size=host.task.size(model)))
        self.session = open_session(model, teachers, options, host, find_in_registries)
        # First: that a head predicts no classes explains why their numbers differ.
        self.session.check_heads()
        # Of data sets whose classes are not compared any will do, several that disagree as well.
        compared = host.task.name == 'classification' or any(map(self.session.by_class, self.session.teachers))
        names = _dataset_classes(runner) if compared else None
        _refuse_data_set(runner, model, names)
        classes = match_teachers(self.session, names, options, num_classes(model))
        if self.session.pseudo is not None:
            refuse_unlabelled(example[1])
        if example[1] is None:
            notes.append('checked on a grey picture: the data set gave no item before the run')
        unit, done, total = unit_of(runner)
        self.session.begin_run(position_of(runner), total)
        with untouched_rng():
            rows = self.session.check(*example)
        host.counts = None  # the data set has no place in copies and pickles of what leads here
        scores, more = self._score(runner, options, names)
        self.teacher_metric, self._teacher_on = best_of(scores.values())
        notes += more
        self._attach(model, runner)
        # Of terms that a resumed run had under another name.
        forget(runner.message_hub.log_scalars, keep=self.session.terms)
        text = summary(
            rows,
            self.session.teachers,
            student=type(model).__name__,
            student_parameters=sum(p.numel() for p in model.parameters()),
            classes=classes,
            schedule=self.session.schedule(unit, total),
            notes=[*notes, *self.session.notes],
            scores=scores,
        )
        self.summary = text
        runner.logger.info(text)
        for sentence in score_warnings(self.session, scores, classes):
            runner.logger.warning(sentence)
        if is_main_process():
            write_text(runner.log_dir, text)
        self._validations, self._began = Validations(), (done, time.monotonic())

    def _score(
        self, runner: Any, options: RunOptions, names: Sequence[str] | None
    ) -> tuple[dict[str, TeacherScore], list[str]]:
        """Score the teachers on some validation images, in every process alike: a sharded student runs in all."""
        loop = runner.train_loop
        images = getattr(loop.dataloader, 'batch_size', None) or 1
        wanted = images_wanted(options.score_teacher, runner.max_iters * images)
        if not wanted:
            return {}, []
        model = self.session.student
        scorer = None if runner.val_loop is None else MMScorer(runner, self.session, self._host, wanted)
        if names is None:
            with contextlib.suppress(DistillError):
                names = _dataset_classes(runner)
        return score_session(self.session, scorer, names, options, num_classes(model), started=bool(runner.iter))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Tell schedules where the run is."""
        released = self.session.begin_iteration(position_of(runner))
        if released is not None:
            runner.logger.info(released)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Without epochs, keep what was logged, and warn when KD was out of proportion for a while."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            return
        last = self.is_last_train_iter(runner)
        if last or self.every_n_train_iters(runner, _log_interval(runner)):
            self.session.close_row('iteration', runner.iter + 1)
        if last or self.every_n_train_iters(runner, PERIOD):
            self._judge(runner, f'iteration {runner.iter + 1}')

    def after_train_epoch(self, runner: Any) -> None:
        """Keep what was logged, and warn when KD was out of proportion for the whole epoch; once per direction."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            self.session.close_row('epoch', runner.epoch + 1)
            self._judge(runner, f'epoch {runner.epoch + 1}')

    def _judge(self, runner: Any, when: str) -> None:
        verdict = self.session.proportion()
        if verdict is not None:
            runner.logger.warning(f'{verdict} ({when}).')

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Keep the best."""
        if self.session is not None and metrics:
            main, self._validations.greater = main_metric(runner, metrics, self._host.task.metrics)
            unit, at, _ = unit_of(runner)
            self._validations.add(metrics, main, at)
            history = self.session.history
            if history.at(unit) < at:
                self.session.close_row(unit, at)
            history.measured(main, numbers_of(metrics).get(main, math.nan))

    def after_train(self, runner: Any) -> None:
        """Leave the model as it was found, write the plain student, and say what came out."""
        if self.session is not None:
            never = self.session.finish()
            if never is not None:
                runner.logger.warning(never)
        model = self._model
        self.detach()
        if model is not None and is_main_process():
            ending = self._ending(runner, model)
            ending.write()
            runner.logger.info(ending.text())

    def _ending(self, runner: Any, model: nn.Module) -> Ending:
        unit, total, _ = unit_of(runner)
        start, began = self._began
        best = self._validations.best
        try:
            student, at, why = write_student(runner, model)
        except Exception as error:
            # The disk may be full; what was trained is saved, and is not to end in a traceback.
            student, at, why = None, None, f'the student could not be written: {in_words(error)}'
        notes = [why] if why else []
        if student is not None and best is not None and best.at != at:
            notes.append(
                f'the student is that of {unit} {at}, not the best: '
                f'default_hooks.checkpoint.save_best={best.main!r} keeps that too'
            )
        if start:
            notes.append(f'best, KD share and time are those since {unit} {start}, where the run was resumed')
        return Ending(
            name=type(model).__name__,
            unit=unit,
            total=total,
            seconds=time.monotonic() - began,
            share=self.session.share,
            asked=self.session.asked,
            teachers=self.session.stopwatch.medians(),
            best=best,
            teacher=self.teacher_metric,
            teacher_on=self._teacher_on,
            student=student,
            notes=tuple(notes),
            folder=shorter(runner.log_dir),
        )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Save the adapters under a key of their own, our version beside the frameworks'; the rest is a plain run's."""
        checkpoint.setdefault('meta', {})['kd_plugins_version'] = __version__
        state = self.session.state() if self.session is not None else {}
        if state:
            checkpoint[STATE] = state

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keep what belongs to the adapters when a run is resumed; they are built when training starts."""
        if getattr(runner, '_resume', False):
            self._resumed = checkpoint.get(STATE, {})

    # ------------------------------------------------------------------ around the student's forward
    def _attach(self, model: nn.Module, runner: Any) -> None:
        self.detach()
        wrapper = runner.optim_wrapper
        clip = getattr(wrapper, 'clip_grad_kwargs', None)
        self.session.attach(
            wrapper.optimizer,
            clip=None if clip is None else functools.partial(_clip, wrapper),
            scaler=lambda: getattr(wrapper, 'loss_scaler', None),
        )
        if self._resumed is not None:
            self.session.load_state(self._resumed, 'the checkpoint')
        self._model = model
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        if isinstance(model, DistillMixin):
            model.kd_attached = True

    def detach(self) -> None:
        """Take everything off the model and its optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if isinstance(self._model, DistillMixin):
            self._model.kd_attached = False
        self._model = None
        if self.session is not None:
            self.session.detach()

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        # A model that was pickled in mid-training has the hook, but no session.
        if self.session is None or model is not self._model or _mode(args, kwargs) != 'loss':
            return None
        if not self.session.active:
            return None
        found = self.session.pseudo_labels(*_batch(args, kwargs))
        if found is not None:
            args, kwargs = _with_samples(args, kwargs, with_labels(_batch(args, kwargs)[1], found, self.session.pseudo))
        self._capture = self.session.capture().open()
        self._host.task.teach(model, tuple(self._capture.modules))
        return None if found is None else (args, kwargs)

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.close()
            self._host.task.teach(model, ())
        # `always_call` also brings us here when the student's forward raised, with no output.
        if output is None or self.session is None or model is not self._model or _mode(args, kwargs) != 'loss':
            return None
        inputs, samples = _batch(args, kwargs)
        if not isinstance(output, dict):
            raise DistillError(f'{type(model).__name__} returned {type(output).__name__} as losses, expected a dict.')
        task = _total(output)
        kd = self.session.losses(capture, inputs, samples, task)
        clash = sorted(set(output) & set(kd))
        if clash:
            raise DistillError(f'{type(model).__name__} already logs {clash[0]!r}; rename the term.')
        taught = _total(kd)
        if capture is not None:
            self.session.refuse_nan(task, kd)
            self.session.balance.add(task, taught)
            if self.session.alpha is not None:
                own = 1 - self.session.alpha
                output = {k: map_tensors(v, lambda x: x * own) if 'loss' in k else v for k, v in output.items()}
                task = task * own
            self.session.history.add(kd, task, taught)
        # No "loss" in its name: logged, not optimised.
        ratio = taught / task.clamp(min=torch.finfo(torch.float32).tiny)
        return {**output, **kd, 'kd_ratio': ratio}

    # ------------------------------------------------------------------ what must not start
    def _resolve_options(self, model: nn.Module) -> dict[str, Any]:
        carried = getattr(model, 'distill', None) if isinstance(model, DistillMixin) else None
        own = {k: v for k, v in self._options.items() if k not in ('start', 'stop') or v}
        if carried is None:
            return dict(self._options)
        if own:
            raise DistillError(
                f'The model is kd_plugins.Distilled with own teacher and terms; take {", ".join(map(repr, own))} out '
                "of default_hooks.distill (dict(type='kd_plugins.DistillHook') is enough)."
            )
        if not isinstance(carried, Mapping):
            raise DistillError(f'distill must be dict(teacher=..., terms=...), got {carried!r}.')
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
        for key, known, needed in (('teacher', TEACHER_KEYS, 'config'), ('terms', options.get('terms') or (), None)):
            written, used = runner.cfg.get(key), options.get(key)
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


def _refuse_data_set(runner: Any, model: nn.Module, names: Sequence[str] | None) -> None:
    """What the data set shows before its first image."""
    number = num_classes(model)
    if MMHost(model).task.name == 'classification' and None not in (names, number) and len(names) != number:
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


def _log_interval(runner: Any) -> int:
    """Iterations after which the run's log has a line."""
    return next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), PERIOD)


def _clip(wrapper: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Clip the adapters' gradients as the student's optimizer wrapper clips its own."""
    options = dict(wrapper.clip_grad_kwargs)
    kind = options.pop('type', 'norm')
    function = torch.nn.utils.clip_grad_norm_ if kind == 'norm' else torch.nn.utils.clip_grad_value_
    function(parameters, **options)


def _mode(args: tuple, kwargs: Mapping[str, Any]) -> str:
    return kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')


def _batch(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Inputs and data samples of a forward pass."""
    inputs = kwargs['inputs'] if 'inputs' in kwargs else args[0]
    return inputs, kwargs.get('data_samples', args[1] if len(args) > 1 else None)


def _with_samples(args: tuple, kwargs: Mapping[str, Any], samples: Any) -> tuple[tuple, dict[str, Any]]:
    if 'data_samples' in kwargs or len(args) < 2:
        return args, {**kwargs, 'data_samples': samples}
    return (args[0], samples, *args[2:]), dict(kwargs)


def _total(losses: Mapping[str, Any]) -> Tensor:
    values = [v for k, v in losses.items() if 'loss' in k]
    flat = [t.detach().float().mean() for v in values for t in (v if isinstance(v, (list, tuple)) else [v])]
    return torch.stack(flat).sum()


def _dataset_classes(runner: Any) -> tuple | None:
    return class_names(getattr(runner.train_loop.dataloader, 'dataset', None))
