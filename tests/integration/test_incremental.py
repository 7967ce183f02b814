"""Classes added later: the old model keeps the old ones alive in data that labels the new ones only."""

from pathlib import Path

import numpy as np
import pytest

from kd_plugins.errors import DistillError

OLD, NEW = ('0', '1'), ('4', '7')
SIDE, IMAGES = 64, 128
#: A short schedule from scratch.
OPTIONS = dict(
    batch=16,
    nbs=16,
    optimizer='AdamW',
    lr0=0.005,
    warmup_epochs=1.0,
    mosaic=0.0,
    fliplr=0.0,
    translate=0.05,
    scale=0.1,
    val=False,
)


def write_scenes(root, names, labelled, seed):
    """Three handwritten digits of four kinds in each picture; only those in ``labelled`` have a label to train on."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, rng, root = load_digits(), np.random.default_rng(seed), Path(root)
    for split, half in (('train', 0), ('val', 1)):
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True)
        for i in range(IMAGES):
            canvas, lines = np.full((SIDE, SIDE), 60, np.uint8), []
            for cell in rng.permutation(4)[:3]:
                name = str(rng.choice(OLD + NEW))
                scan = digits.images[rng.choice(np.flatnonzero(digits.target == int(name))[half::2])]
                side = int(rng.integers(22, 31))
                ink = np.asarray(Image.fromarray((scan * 15).astype(np.uint8)).resize((side, side), Image.BICUBIC))
                corner = np.array([cell // 2, cell % 2]) * 32 + rng.integers(0, 33 - side, 2)
                region = canvas[corner[0] : corner[0] + side, corner[1] : corner[1] + side]
                np.maximum(region, ink, out=region)
                if name in names and (split == 'val' or name in labelled):
                    inside = np.argwhere(ink > 60)
                    low, high = corner + inside.min(0), corner + inside.max(0) + 1
                    (y, x), (h, w) = (low + high) / 2 / SIDE, (high - low) / SIDE
                    lines.append(f'{names.index(name)} {x:.5f} {y:.5f} {w:.5f} {h:.5f}')
            Image.fromarray(canvas).convert('RGB').save(root / 'images' / split / f'{i}.png')
            (root / 'labels' / split / f'{i}.txt').write_text('\n'.join(lines))
    text = f'path: {root}\ntrain: images/train\nval: images/val\nnames: {dict(enumerate(names))}\n'
    (root / 'data.yaml').write_text(text)
    return str(root / 'data.yaml')


def precision(weights, data):
    """AP50-95 of every class in per cent."""
    from ultralytics import YOLO

    options = dict(imgsz=SIDE, batch=16, workers=0, device='cpu', plots=False, verbose=False)
    return 100 * YOLO(weights, verbose=False).val(data=data, **options).box.maps


@pytest.mark.long
def test_what_a_new_training_forgets(tmp_path):
    """Digits: with labels of the new classes only, the plain student loses the old ones, and the recipe keeps them."""
    pytest.importorskip('sklearn')
    from ultralytics import YOLO

    from kd_plugins.yolo import DistillCallback
    from tests.integration.yolo_lab import new_model, train, write_small

    data = write_scenes(tmp_path / 'old_data', OLD, OLD, seed=1)
    train(new_model(write_small(tmp_path / 'small.yaml', (32, 64, 64))), data, tmp_path, 'old', epochs=40, **OPTIONS)
    teacher = str(tmp_path / 'old' / 'weights' / 'last.pt')
    before = precision(teacher, data)
    assert before.min() > 50, 'there is something to forget'

    data = write_scenes(tmp_path / 'new_data', OLD + NEW, NEW, seed=2)
    found = {}
    for arm in ('plain', 'incremental'):
        student = YOLO(teacher, verbose=False)
        if arm != 'plain':
            DistillCallback(teacher, recipe=arm).register(student)
        train(student, data, tmp_path, arm, epochs=20, **OPTIONS)
        found[arm] = precision(tmp_path / arm / 'weights' / 'last.pt', data)
    print({arm: values.round(1) for arm, values in found.items()}, before.round(1))
    assert found['plain'][:2].max() < 10, 'forgotten'
    assert found['incremental'][:2].min() > before.min() - 20
    assert found['incremental'][2:].min() > found['plain'][2:].min() - 10, 'and the new ones are learnt all the same'


def test_mmengine_adds_what_the_teacher_detects(lab, monkeypatch):
    """The student's own loss is given more labels, of the old classes, and only while KD is on; the teacher runs once
    for both."""
    import kd_plugins.mm.hook as module
    from tests.integration.lab import Probe

    counts = []
    plain = module.with_labels

    def count(samples, found, pseudo):
        labelled = plain(samples, found, pseudo)
        counts.append([(len(a.gt_instances), len(b.gt_instances)) for a, b in zip(samples, labelled, strict=True)])
        return labelled

    monkeypatch.setattr(module, 'with_labels', count)
    terms = dict(cls=dict(loss=dict(type='BinaryKLDivLoss'), student='head', teacher='head'))
    runs = {}
    for name, options in (('plain', {}), ('added', dict(pseudo_labels=1e-4))):
        probe = Probe()
        lab.train(lab.hook_form(lab.plain(), lab.teacher(), terms, **options), probe)
        runs[name] = probe.logs
    assert len(counts) == len(runs['added'])
    assert all(any(after > before for before, after in step) for step in counts)
    assert all(after >= before for step in counts for before, after in step)
    # Before the first step nothing but the labels differs.
    assert runs['added'][0]['loss_kd_cls'] == runs['plain'][0]['loss_kd_cls']
    assert runs['added'][0]['loss_bbox'] != runs['plain'][0]['loss_bbox']


def test_weight_zero_adds_nothing(lab, monkeypatch):
    import kd_plugins.mm.hook as module

    monkeypatch.setattr(module, 'with_labels', None)
    terms = dict(cls=dict(loss=dict(type='BinaryKLDivLoss'), student='head', teacher='head', weight=0.0))
    lab.train(lab.hook_form(lab.plain(), lab.teacher(), terms, pseudo_labels=0.01))


def test_features_alone_detect_nothing(lab):
    from tests.integration.lab import FEATURES

    with pytest.raises(DistillError, match='no term compares whole heads of detectors'):
        lab.train(lab.hook_form(lab.plain(), lab.teacher(), dict(neck=FEATURES), pseudo_labels=True))
