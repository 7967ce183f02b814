"""Teachers are scored before the first iteration, by the framework's own evaluator, and no run notices."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from tests.integration.cls_lab import LOGITS as CLASS_LOGITS
from tests.integration.lab import LOGITS
from tests.integration.labs import LABS
from tests.integration.seg_lab import LOGITS as PIXEL_LOGITS

#: By lab: the student, its terms at weight 0, and how the compared metric ends.
CASES = {
    'detection': (dict(), LOGITS, 'bbox_mAP'),
    'segmentation': (dict(), PIXEL_LOGITS, 'mIoU'),
    'classification': (dict(), CLASS_LOGITS, 'top1'),
}


def scored(text):
    """The line of a summary that says what was scored."""
    return re.search(r'scored\s+(.*)', text)[1]


def summary_of(runner):
    return Path(runner.log_dir, 'kd_summary.txt').read_text()


@pytest.mark.parametrize('name', [name for name in CASES if name in LABS])
def test_scoring_changes_nothing(labs, name):
    """Bit by bit the run without us: generators, modes, statistics, data set and evaluator."""
    lab, (options, term, metric) = labs(name), CASES[name]
    config = lab.plain(val=True, train_cfg__val_interval=1, **options)
    plain = lab.once(config)
    config = lab.hook_form(config, lab.teacher(), dict(logits={**term, 'weight': 0.0}), score_teacher=6)
    distilled = lab.record(config)
    assert all(torch.equal(v, distilled.weights[k]) for k, v in plain.weights.items())
    assert plain.validated == distilled.validated, 'the evaluator'
    hook = next(hook for hook in distilled.run.hooks if type(hook).__name__ == 'DistillHook')
    row = hook.history[-1]
    assert list(row)[1:] == ['loss_kd_logits', 'weight_logits', 'kd_ratio', 'metric'], row
    assert row['loss_kd_logits'] == row['weight_logits'] == 0 and hook.summary in summary_of(distilled.run)
    line = scored(summary_of(distilled.run))
    assert re.match(rf'\S*({metric}|predictions) \d', line) and 'the student starts at' in line, line


@pytest.mark.skipif('yolo' not in LABS, reason='needs ultralytics')
def test_scoring_changes_nothing_in_ultralytics(labs):
    lab = labs('yolo')
    plan = lab.plain()
    plain = lab.once(plan)
    distil = dict(teacher=lab.teacher(), cls=0.0, box=0.0, score_teacher=6)
    distilled = lab.record(dataclasses.replace(plan, distill=distil))
    assert all(torch.equal(v, distilled.weights[k]) for k, v in plain.weights.items())
    metrics = [{k: v for k, v in m.items() if k.startswith('metrics/')} for m in plain.validated]
    assert metrics == [{k: v for k, v in m.items() if k.startswith('metrics/')} for m in distilled.validated]
    text = Path(distilled.run.save_dir, 'kd_summary.txt').read_text()
    assert 'on 6 of 8 validation images; the student starts at' in scored(text)


class ByColour(torch.nn.Module):
    """A classifier that is right about the synthetic pictures of Ultralytics' runs.

    Args:
        colours: Of its classes in order, RGB.
    """

    def __init__(self, colours):
        super().__init__()
        self.colours = torch.nn.Parameter(torch.tensor(colours) / 255.0)

    def forward(self, images):
        return -40 * torch.cdist(images[:, :, 24:40, 24:40].mean((2, 3)), self.colours)


@pytest.mark.skipif('yolo' not in LABS, reason='needs ultralytics')
def test_a_teacher_of_ultralytics_is_scored_and_its_order_judged(tmp_path, monkeypatch, caplog):
    from ultralytics.utils import LOGGER

    from kd_plugins.yolo import DistillCallback
    from tests.integration.yolo_lab import COLOURS, new_model, train, write_data

    # Ultralytics' logger hands nothing on.
    monkeypatch.setattr(LOGGER, 'propagate', True)
    data = write_data(tmp_path / 'data', images=12, task='classify')

    def run(name, colours, classes):
        weights = tmp_path / f'{name}.pth'
        torch.save(ByColour(colours).state_dict(), weights)
        module = f'{ByColour.__module__}:ByColour'
        made = dict(module=module, options=dict(colours=colours), checkpoint=str(weights))
        teacher = dict(**made, mean=(0, 0, 0), std=(1, 1, 1), classes=classes)
        model = new_model('yolo11n-cls.yaml')
        callback = DistillCallback(teacher, score_teacher=9).register(model)
        caplog.clear()
        folder = train(model, data, tmp_path, name)
        # Where a framework's logger hands on to the root twice, the same record is seen twice.
        records = {id(r): r for r in caplog.records if r.levelname == 'WARNING'}.values()
        warnings = [r.getMessage() for r in records if 'KD was' not in r.message]
        return callback, folder, warnings

    names = ['green', 'red', 'blue']
    colours = [list(COLOURS[name]) for name in names]
    callback, folder, warnings = run('right', colours, names)
    assert callback.teacher_metric == 1.0 and not any('class' in text for text in warnings), 'matched by name'
    assert 'scored   fitness 1 on 9 of 12 validation images' in (folder / 'kd_summary.txt').read_text()
    block = json.loads((folder / 'kd_summary.json').read_text())
    (row,) = callback.history
    assert list(row) == ['epoch', 'loss_kd_cls', 'weight_cls', 'kd_ratio', 'metric'] and row['epoch'] == 1
    assert row['loss_kd_cls'] > 0 and row['kd_ratio'] > 0 and 0 <= row['metric'] <= 1
    assert callback.summary in (folder / 'kd_summary.txt').read_text()
    assert (block['teacher'], block['teacher_on']) == (1.0, 'on 9 of 12 validation images')

    _, _, warnings = run('wrong', colours, sorted(names))
    (sentence,) = (text for text in warnings if 'class' in text)
    assert 'looks permuted' in sentence and "'green' for 'blue'" in sentence
