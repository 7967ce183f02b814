"""Tiny data and models for real Ultralytics runs on the CPU; nothing is downloaded or written to the home folder."""

import hashlib
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before ultralytics is imported: its settings and fonts go to a throw-away folder, and it asks nobody for updates.
if 'YOLO_CONFIG_DIR' not in os.environ:
    os.environ['YOLO_CONFIG_DIR'] = tempfile.mkdtemp(prefix='yolo_config_')
os.environ.setdefault('YOLO_OFFLINE', 'true')
os.environ.setdefault('YOLO_VERBOSE', 'true')

import numpy as np
import torch
from PIL import Image, ImageDraw

from tests.integration.promises import Case, Record, Step, run

#: Classes of the synthetic pictures, by the colour of their rectangles.
COLOURS = {'red': (220, 40, 40), 'green': (40, 200, 60), 'blue': (50, 70, 230)}

#: What every run here has in common: fast, deterministic, nothing to download, nothing to draw.
RUN = dict(
    imgsz=64,
    epochs=1,
    batch=4,
    workers=0,
    device='cpu',
    amp=False,
    plots=False,
    verbose=False,
    seed=0,
    optimizer='SGD',
    lr0=0.01,
    warmup_epochs=0.0,
    cos_lr=False,
    patience=0,
    exist_ok=True,
)


#: Detectors of a few layers, whose building and compiling takes no time, by the widths of their pyramid's levels.
FEW_LAYERS = """
nc: 3
{options}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [{0}, 3, 2]]
  - [-1, 1, Conv, [{1}, 3, 2]]
  - [-1, 1, Conv, [{2}, 3, 2]]
head:
  - [[{levels}], 1, Detect, [nc]]
"""


def write_small(path, widths=(16, 32, 32), end_to_end=False, levels='2, 3, 4'):
    """Write the yaml of a detector of a few layers.

    Args:
        path: Of the file.
        widths: Channels at the strides 8, 16 and 32.
        end_to_end: With two branches and without bins, as YOLO26.
        levels: Layers that the head takes; layer ``i`` has the stride ``2 ** (i + 1)``.

    Returns:
        The path as text.
    """
    options = 'end2end: True\nreg_max: 1' if end_to_end else ''
    Path(path).write_text(FEW_LAYERS.format(*widths, options=options, levels=levels))
    return str(path)


def write_data(root, names=tuple(COLOURS), images=8, size=64, task='detect', empty=0, seed=0):
    """Pictures with coloured rectangles in Ultralytics' layout.

    Args:
        root: Folder to write.
        names: Class names, used in order for the colours.
        images: Pictures per split.
        size: Side in pixels.
        task: ``'detect'``, ``'segment'``, ``'pose'``, ``'obb'`` or ``'classify'``.
        empty: How many of them have no object.
        seed: Of the pictures.

    Returns:
        What ``data=`` takes.
    """
    root = Path(root)
    rng = random.Random(seed)
    colours = list(COLOURS.values())
    for split in ('train', 'val'):
        for i in range(images):
            picture = Image.new('RGB', (size, size), (rng.randrange(80, 140),) * 3)
            draw = ImageDraw.Draw(picture)
            if task == 'classify':
                label = i % len(names)
                draw.rectangle((12, 12, size - 12, size - 12), fill=colours[label])
                folder = root / split / names[label]
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f'{i}.png')
                continue
            lines = []
            for _ in range(2 if i >= empty else 0):
                label = rng.randrange(len(names))
                w, h = rng.randrange(16, 32), rng.randrange(16, 32)
                x, y = rng.randrange(0, size - w), rng.randrange(0, size - h)
                draw.rectangle((x, y, x + w, y + h), fill=colours[label])
                lines.append(_label(task, label, x / size, y / size, w / size, h / size))
            for kind in ('images', 'labels'):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            picture.save(root / 'images' / split / f'{i}.png')
            (root / 'labels' / split / f'{i}.txt').write_text('\n'.join(lines))
    if task == 'classify':
        return str(root)
    text = f'path: {root}\ntrain: images/train\nval: images/val\nnames: {dict(enumerate(names))}\n'
    if task == 'pose':
        text += 'kpt_shape: [2, 3]\nflip_idx: [1, 0]\n'
    (root / 'data.yaml').write_text(text)
    return str(root / 'data.yaml')


def _label(task, label, x, y, w, h):
    corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    box = f'{x + w / 2:.5f} {y + h / 2:.5f} {w:.5f} {h:.5f}'
    if task in ('segment', 'obb'):
        return f'{label} ' + ' '.join(f'{a:.5f} {b:.5f}' for a, b in corners)
    if task == 'pose':
        return f'{label} {box} ' + ' '.join(f'{a:.5f} {b:.5f} 2' for a, b in corners[::2])
    return f'{label} {box}'


def new_model(cfg, seed=0):
    """A ``YOLO`` with random weights that only depend on the seed."""
    from ultralytics import YOLO

    torch.manual_seed(seed)
    return YOLO(cfg, verbose=False)


def save_teacher(path, cfg, names=tuple(COLOURS), seed=1, spread=0.3, **options):
    """A ``.pt`` file of an untrained model with class names, as a training would leave it.

    Training one takes too long for a test of mechanics. Its class scores are spread, so that it is confident about
    some anchors.
    """
    from ultralytics.nn.tasks import guess_model_task
    from ultralytics.utils.patches import torch_save

    model = build(cfg, len(names), seed, **options)
    model.names = dict(enumerate(names))
    model.task = guess_model_task(model)
    head = model.model[-1]
    if spread and hasattr(head, 'cv3'):
        generator = torch.Generator().manual_seed(seed)
        for branch in ('cv3', 'one2one_cv3'):
            for layer in getattr(head, branch, None) or ():
                last = layer[-1]
                last.weight.data = torch.randn(last.weight.shape, generator=generator) * spread
                last.bias.data.fill_(-1.0)
    torch_save({'model': model.half(), 'train_args': {}, 'epoch': -1}, str(path))
    return str(path)


def build(cfg, nc=3, seed=0, **options):
    """A bare model (the ``nn.Module``) of a yaml with random weights and BN statistics that are not the initial
    ones."""
    from ultralytics import YOLO
    from ultralytics.nn import tasks as kinds

    torch.manual_seed(seed)
    task = YOLO(cfg, verbose=False).task
    torch.manual_seed(seed)
    names = dict(
        detect='DetectionModel',
        segment='SegmentationModel',
        pose='PoseModel',
        obb='OBBModel',
        classify='ClassificationModel',
    )
    model = getattr(kinds, names[task])(kinds.yaml_model_load(cfg), nc=nc, verbose=False, **options)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
    return model.eval()


def train(model, data, project, name='run', **options):
    """``model.train`` with :data:`RUN`; returns the run's folder."""
    model.train(data=data, project=str(project), name=name, **{**RUN, **options})
    return Path(project) / name


def weights_hash(path):
    """SHA-256 over the weights and buffers in a checkpoint."""
    from ultralytics.utils.patches import torch_load

    checkpoint = torch_load(str(path), map_location='cpu')
    model = checkpoint.get('ema') or checkpoint['model']
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(value.float().numpy()).tobytes())
    return digest.hexdigest()


def results(run):
    """results.csv as ``{column: [values]}``."""
    lines = (Path(run) / 'results.csv').read_text().strip().splitlines()
    header = [h.strip() for h in lines[0].split(',')]
    rows = [[float(v) for v in line.split(',')] for line in lines[1:]]
    return {h: [row[i] for row in rows] for i, h in enumerate(header)}


# ---------------------------------------------------------------------- promises
@dataclass
class Plan:
    """A run that has not begun.

    Args:
        cfg: The student's yaml.
        options: Of ``train``.
        distill: Options of the callback; None: a plain run.
    """

    cfg: str
    options: dict[str, Any]
    distill: dict[str, Any] | None = None


class YoloLab:
    """What `Lab` is for MMEngine's models, for those of Ultralytics.

    Args:
        root: An empty folder for data, teachers and runs.
    """

    NAME = 'yolo'
    SIZE = 64
    METRIC = 'metrics/mAP50-95(B)'
    run = staticmethod(run)
    #: What the losses of distillation are multiplied with in the total: the size of the batch.
    scale = RUN['batch']
    EXTRA: frozenset = frozenset()
    OPEN = """
from ultralytics import YOLO
from ultralytics.nn.tasks import torch_safe_load
for file in files:
    torch_safe_load(file, safe_only=True)
    assert YOLO(file).names[0] == 'red'
"""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.data = write_data(self.root / 'data', empty=2)
        self._runs = 0
        self._records: dict[str, Record] = {}
        self._callback: Any = None

    # ------------------------------------------------------------------ runs
    def plain(self, family: str = 'yolo11n.yaml', **options: Any) -> Plan:
        """A plain run; ``options`` are those of ``train``."""
        return Plan(family, options)

    def teacher(self, family: str = 'yolov8n.yaml') -> str:
        """The file of a teacher; ``'small'`` is one of a few layers, of other widths than any of Ultralytics' own."""
        file = self.root / f'{Path(family).stem}.pt'
        if not file.exists():
            cfg = write_small(self.root / 'small.yaml', (24, 48, 64)) if family == 'small' else family
            save_teacher(file, cfg)
        return str(file)

    def plain_of(self, case: Case) -> Plan:
        """The plain run of a case."""
        return self.plain(case.family, **case.options)

    def distil(self, case: Case) -> Plan:
        """The distilled run of a case."""
        full = {k: v for k, v in case.terms.items() if isinstance(v, Mapping) and 'loss' in v}
        short = {k: v for k, v in case.terms.items() if k not in full}
        given = dict(teacher=self.teacher(**case.teacher), **short, **case.distill)
        return Plan(case.family, dict(case.options), {**given, **(dict(terms=full) if full else {})})

    def session(self, trainer: Any) -> Any:
        """See `Lab.session`; of the run that is recorded."""
        return self._callback.session

    def record(self, plan: Plan, *, keep: bool = False, check: Callable[[Any], None] | None = None) -> Record:
        """Train in this process and note what happens, see `Lab.record`."""
        from kd_plugins.yolo import DistillCallback

        record = Record()
        model = new_model(plan.cfg)
        callback = None if plan.distill is None else DistillCallback(**plan.distill).register(model)
        self._callback = callback
        image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

        def start(trainer: Any) -> None:
            record.run = trainer
            record.begin(callback and callback.session)
            inner = trainer.preprocess_batch

            def preprocess(batch: dict) -> dict:
                result = inner(batch)
                record.inputs.append(result['img'].clone())
                return result

            def tapped(layer: torch.nn.Module, args: tuple) -> None:
                record.tapped[layer.training] += any('forward' in m.__dict__ for m in trainer.model.modules())

            trainer.preprocess_batch = preprocess
            handles.append(trainer.model.model[0].register_forward_pre_hook(tapped))

        def batch_end(trainer: Any) -> None:
            items = {k: float(v) for k, v in trainer.loss_items.items()}
            kd = {k: v for k, v in items.items() if k.startswith('kd')}
            step = Step(trainer.loss.item(), {k: v for k, v in items.items() if k not in kd}, kd)
            record.step(trainer.model, step, image, lambda teacher: (teacher.head,))
            if keep:
                record.states.append(_weights(trainer))
            if check is not None:
                check(trainer)

        def val_batch(validator: Any) -> None:
            models = record.run.model, record.run.ema.ema
            record.tapped[False] += any('forward' in m.__dict__ for model in models for m in model.modules())

        def save(trainer: Any) -> None:
            record.files.append(trainer.save_dir / f'mid{trainer.epoch}.pt')
            shutil.copy(trainer.last, record.files[-1])

        handles: list[Any] = []
        for event, handler in (
            ('on_train_start', start),
            ('on_train_batch_end', batch_end),
            ('on_train_epoch_end', lambda trainer: record.begin_validation()),
            ('on_val_batch_start', val_batch),
            ('on_fit_epoch_end', lambda trainer: record.end_validation(trainer.metrics)),
            ('on_model_save', save),
        ):
            model.add_callback(event, handler)
        self._runs += 1
        with record.counting():
            run = train(model, self.data, self.root, f'run{self._runs}', **plan.options)
        record.end()
        for handle in handles:
            handle.remove()
        record.files += [run / 'weights/last.pt', run / 'weights/best.pt']
        record.weights, record.model, record.served = _weights(record.run), record.run.model, model.model.eval()
        record.averaged, record.updates = record.run.ema.ema, record.run.ema.updates
        record.optimized = [p for g in record.run.optimizer.param_groups for p in g['params']]
        return record

    def once(self, plan: Plan) -> Record:
        """`record`, but of equal plans the same record."""
        if repr(plan) not in self._records:
            self._records[repr(plan)] = self.record(plan)
        return self._records[repr(plan)]

    def pair(self, case: Case) -> tuple[Record, Record]:
        """The plain run of a case and its distilled one, trained once each."""
        return self.once(self.plain_of(case)), self.once(self.distil(case))

    @staticmethod
    def files(teacher: str) -> list[str]:
        """See `Lab.files`."""
        return [teacher]

    @staticmethod
    def predictions(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        """See `Lab.predictions`."""
        return [model(images)[0]]

    @staticmethod
    def is_tapped(case: Case) -> bool:
        """See `Lab.is_tapped`: what heads return is what the criterion is given."""
        return bool(case.trained)

    # ------------------------------------------------------------------ files
    @staticmethod
    def saved(path: Path) -> dict[str, dict[str, torch.Tensor]]:
        """The state dicts in a checkpoint; while a run goes on that of the average, then that of the model."""
        content = _content(path)
        return {k: content[k].state_dict() for k in ('ema', 'model') if content.get(k) is not None}

    @staticmethod
    def saved_adapters(record: Record) -> dict[str, torch.Tensor]:
        """See `Lab.saved_adapters`."""
        epochs = torch.load(record.files[-1].parent / 'kd_last.pt', weights_only=False)['epochs']
        return epochs[max(epochs)]['adapters']

    @staticmethod
    def entries(path: Path) -> set[str]:
        """See `Lab.entries`."""
        return set(_content(path))

    @staticmethod
    def assert_size(path: Path, plain: Path) -> None:
        """A file has the size of a plain run's."""
        assert abs(path.stat().st_size - plain.stat().st_size) < 4096

    @staticmethod
    def traces(path: Path) -> list[bytes]:
        """Names of this package in a file."""
        with zipfile.ZipFile(path) as archive:
            pickled = next(archive.read(n) for n in archive.namelist() if n.endswith('data.pkl'))
        return [name for name in (b'kd_plugins', b'KDCriterion') if name in pickled]

    @staticmethod
    def load(path: Path, case: Case) -> torch.nn.Module:
        """A plain student with a file's weights, loaded strictly."""
        content = _content(path)
        model = build(case.family)
        model.load_state_dict((content.get('ema') or content['model']).float().state_dict(), strict=True)
        return model.eval()

    @staticmethod
    def served(case: Case, record: Record) -> torch.nn.Module:
        """The student that a run leaves in its user's hands."""
        return record.served

    def stored_teacher(self, case: Case) -> dict[str, torch.Tensor]:
        """What is loaded from the file of a case's teacher, fused as it is to be run."""
        from ultralytics import YOLO

        model = YOLO(self.teacher(**case.teacher)).model.float().eval()
        model.model[-1].fuse = lambda: None
        return model.fuse(verbose=False).state_dict()


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    models = dict(student=trainer.model, ema=trainer.ema.ema)
    return {f'{name}.{k}': v.clone() for name, model in models.items() for k, v in model.state_dict().items()}


def _content(path: Path) -> dict[str, Any]:
    from ultralytics.utils.patches import torch_load

    return torch_load(str(path), map_location='cpu')
