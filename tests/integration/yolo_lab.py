"""Tiny data and models for real Ultralytics runs on the CPU; nothing is downloaded or written to the home folder."""

import hashlib
import os
import random
import tempfile
from pathlib import Path

# Before ultralytics is imported: its settings and fonts go to a throw-away folder, and it asks nobody for updates.
if 'YOLO_CONFIG_DIR' not in os.environ:
    os.environ['YOLO_CONFIG_DIR'] = tempfile.mkdtemp(prefix='yolo_config_')
os.environ.setdefault('YOLO_OFFLINE', 'true')
os.environ.setdefault('YOLO_VERBOSE', 'true')

import numpy as np
import torch
from PIL import Image, ImageDraw

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
