"""Teachers are scored before the first iteration, by the framework's own evaluator, and no run notices."""

import re
from pathlib import Path

import pytest
import torch

from tests.integration.cls_lab import LOGITS as CLASS_LOGITS
from tests.integration.lab import LOGITS
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


@pytest.mark.parametrize('name', CASES)
def test_scoring_changes_nothing(labs, name):
    """Bit by bit the run without us: generators, modes, statistics, data set and evaluator."""
    lab, (options, term, metric) = labs(name), CASES[name]
    config = lab.plain(val=True, train_cfg__val_interval=1, **options)
    plain = lab.once(config)
    config = lab.hook_form(config, lab.teacher(), dict(logits={**term, 'weight': 0.0}), score_teacher=6)
    distilled = lab.record(config)
    assert all(torch.equal(v, distilled.weights[k]) for k, v in plain.weights.items())
    assert plain.validated == distilled.validated, 'the evaluator'
    line = scored(summary_of(distilled.run))
    assert re.match(rf'\S*({metric}|predictions) \d', line) and 'the student starts at' in line, line
