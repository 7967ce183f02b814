"""What a distilled training step costs in Ultralytics, next to what it cannot do without and to ``distill_model=``.

Plain, distilled and natively distilled student are each brought up by Ultralytics' own trainer to its first batch; a
step is what its loop does with one: forward, loss, backward, optimizer, EMA.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_plugins.distiller import untouched_rng
from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark.benchmark import Pair, Run, Use, end_distillation
from kd_plugins.lab.benchmark.measure import Moment, random_boxes
from kd_plugins.yolo.callback import DistillCallback, check_version, quiet
from kd_plugins.yolo.teacher import class_names, find_teacher, load_model


class _Attached(Exception):
    """Leaves a trainer that was only brought up."""


@dataclass(frozen=True, kw_only=True)
class YOLOPair(Pair):
    """A pair of detectors.

    Attributes:
        student: Its ``.yaml`` or ``.pt``.
        teacher: Its ``.pt``, or a ``.yaml`` for random weights.
        image_size: Side of the square images in pixels.

    Raises:
        DistillError: A number is not positive, Ultralytics is too old, or the device is not there.
    """

    image_size: int

    summary: ClassVar[str] = (
        'Cost of a distilled training step in Ultralytics against the plain step plus a bare forward of the teacher, '
        'and against a step with distill_model=.'
    )
    plain: ClassVar[str] = 'plain'
    rows: ClassVar[Mapping[str, Sequence[str]]] = {
        'plain student step': ['plain'],
        'bare teacher forward': ['teacher'],
        'both (lower bound)': ['plain', 'teacher'],
        'step with distill_model=': ['native'],
        'step with kd_plugins': ['distilled'],
        'step after its stop': ['over'],
    }
    aims: ClassVar = {
        'ratio': ('kd_plugins / (plain + teacher)', ['plain', 'teacher'], 1.05),
        'native_ratio': ('kd_plugins / distill_model=', ['native'], 0.9),
    }
    sizes: ClassVar = dict(image_size=(320, 640), batch_size=(2, 16), repeats=(10, 40), steps=(1, 5))
    letters: ClassVar = dict(image_size='S')
    pairs: ClassVar[Mapping[str, Sequence[str]]] = {
        'yolo11': ('yolo11n.yaml', 'yolo11l.yaml'),
        'yolo11-x': ('yolo11n.yaml', 'yolo11x.yaml'),
        'yolov8': ('yolov8n.yaml', 'yolov8m.yaml'),
        'yolo26': ('yolo26n.yaml', 'yolo26l.yaml'),
    }
    own: ClassVar = dict(
        student=('MODEL', '.yaml or .pt of a detector'), teacher=('MODEL', '.pt, or .yaml for random weights')
    )
    event: ClassVar[str] = 'on_pretrain_routine_end'
    includes: ClassVar[str] = 'teacher loaded, fused and tried, summary'

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        super().__post_init__()
        if self.image_size % 32:
            raise DistillError(f'image_size must be a multiple of 32, got {self.image_size}.')

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Of Ultralytics."""
        check_version()
        import ultralytics

        return dict(ultralytics=ultralytics.__version__)

    @classmethod
    def cases(cls, args: argparse.Namespace) -> list[YOLOPair]:
        """One for each pair."""
        return [cls(**pair, amp=args.amp, **cls.options(args, cls.sizes)) for pair in cls.chosen(args)]

    def _weights(self, folder: Path) -> str:
        path = Path(self.teacher) if self.teacher.endswith('.pt') else folder / 'teacher.pt'
        if path.parent == folder and not path.is_file():
            random_teacher(self.teacher, path)
        return find_teacher(path)

    def before_memory(self) -> None:
        """Load what counts for none of the variants."""
        import ultralytics.models.yolo.detect  # noqa: F401

    def start(self, variants: Sequence[str], folder: Path, use: Use) -> Any:
        """Bring a trainer per variant to its first batch, one inside the other: leaving one ends its distillation."""
        from ultralytics.models.yolo.detect import DetectionTrainer

        runs: dict[str, Run] = {}
        outcome: list[Any] = []
        weights = self._weights(folder)
        if not (folder / 'data').is_dir():
            names = class_names(load_model(weights).names)
            write_data(folder / 'data', self.image_size, self.batch_size, names)

        def start(rest: Sequence[str]) -> None:
            if not rest:
                outcome.append(use(runs))
                return
            name, *others = rest
            trainer = DetectionTrainer(overrides=self._overrides(folder, name, weights))
            marks: list[Moment] = []

            def mark(trainer: Any) -> None:
                marks.append(Moment.now())

            def started(trainer: Any) -> None:
                startup, attaching = Moment.now() - began, marks[1] - marks[0]
                if name == 'over':
                    end_distillation(callback.session)
                teachers = callback.session.teachers.values() if callback else []
                runs[name] = Run(step_of(trainer), startup, attaching, [teacher.model for teacher in teachers])
                start(others)
                raise _Attached

            stop = dict(distilled=None, over=1)
            callback = DistillCallback(weights, stop=stop[name]) if name in stop else None
            trainer.add_callback(self.event, mark)
            if callback:
                callback.register(trainer)
            trainer.add_callback(self.event, mark)
            # After it, so that the student is distilled by then.
            trainer.add_callback('on_train_start', started)
            began = Moment.now()
            with suppress(_Attached):
                trainer.train()

        with quiet():
            start(variants)
        return outcome[0]

    def _overrides(self, folder: Path, variant: str, weights: str) -> dict[str, Any]:
        return dict(
            model=self.student,
            data=str(folder / 'data' / 'data.yaml'),
            imgsz=self.image_size,
            batch=self.batch_size,
            epochs=100,
            device='0' if self.device == 'cuda' else 'cpu',
            amp=self.amp,
            workers=0,
            project=str(folder),
            name=variant,
            exist_ok=True,
            plots=False,
            verbose=False,
            optimizer='SGD',
            # The same batch again and again.
            mosaic=0.0,
            distill_model=weights if variant == 'native' else None,
        )

    @classmethod
    def title(cls, result: Mapping[str, Any]) -> tuple[str, str, str]:
        """The pair, the shape of a batch, and the precision."""
        setup = result['setup']
        weights, side = '' if setup['teacher'].endswith('.pt') else ' (random weights)', setup['image_size']
        pair = f'{setup["student"]} <- {setup["teacher"]}{weights}'
        return pair, f'{setup["batch_size"]}x3x{side}x{side}', 'AMP' if setup['amp'] else 'float32'


def write_data(folder: Path, side: int, number: int, names: Sequence[str]) -> None:
    """As many random square images as a batch has, with 7 boxes each, and their ``data.yaml``."""
    draw = torch.Generator().manual_seed(0)
    for kind in ('images', 'labels'):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=draw)
        Image.fromarray(np.asarray(pixels)).save(folder / 'images' / f'{i}.png')
        boxes = random_boxes(7, torch.tensor([side, side]), draw) / side
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        labels = torch.randint(len(names), (7,), generator=draw)
        rows = (
            f'{label} ' + ' '.join(f'{v:.6f}' for v in row)
            for label, row in zip(labels.tolist(), torch.cat([centres, sizes], 1).tolist(), strict=True)
        )
        (folder / 'labels' / f'{i}.txt').write_text('\n'.join(rows))
    data = dict(path=str(folder), train='images', val='images', names=dict(enumerate(names)))
    (folder / 'data.yaml').write_text(json.dumps(data))


def random_teacher(spec: str, path: Path) -> None:
    """Write a ``.pt`` with random weights for a model YAML."""
    from ultralytics import YOLO

    with untouched_rng():
        torch.manual_seed(1)
        model = YOLO(spec, task='detect', verbose=False)
        for module in model.model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                # With a bias of 0 activations fade, layer by layer, into denormal numbers, on which a CPU is slow.
                nn.init.normal_(module.bias, std=0.5)
        model.save(path)


def step_of(trainer: Any) -> Callable[[], Any]:
    """One training step of a trainer that was brought up, always on its first batch and with a learning rate of 0."""
    for group in trainer.optimizer.param_groups:
        # Every step costs the same when none changes the model: label assignment depends on what it predicts.
        group['lr'] = 0.0
    trainer.model.train()
    trainer.optimizer.zero_grad()
    batch = next(iter(trainer.train_loader))
    kind = trainer.device.type

    def step() -> None:
        with torch.autocast(kind, enabled=bool(trainer.amp)):
            loss, _ = trainer.model(trainer.preprocess_batch(copy.copy(batch)))
        trainer.scaler.scale(loss.sum()).backward()
        trainer.optimizer_step()

    return step
