"""Void pixels of CamVid: label 11 of 11 classes, which must neither train nor count."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import METRICS, MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image

CONFIG = Path(__file__).parents[2] / 'configs' / 'seg' / 'camvid_fpn_student.py'
VOID = 11


@pytest.fixture
def config(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind in ('images', 'annotations'):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(2):
            labels = np.zeros((180, 240), np.uint8)
            labels[:, :100] = 5
            labels[:90] = VOID
            Image.fromarray(labels).save(tmp_path / 'annotations' / split / f'{i}.png')
            Image.fromarray(rng.integers(0, 255, (180, 240, 3), np.uint8)).save(
                tmp_path / 'images' / split / f'{i}.jpg'
            )
    monkeypatch.setenv('CAMVID_ROOT', f'{tmp_path}/')
    config = Config.fromfile(CONFIG)
    for name in ('train_dataloader', 'val_dataloader'):
        config[name].update(batch_size=2, num_workers=0, persistent_workers=False)
    # Smaller than the crop, so that label maps are filled up too.
    resize = next(step for step in config.train_dataloader.dataset.pipeline if step['type'] == 'RandomResize')
    resize.ratio_range = (0.5, 0.5)
    init_default_scope('mmseg')
    return config


def test_void_is_not_trained(config):
    torch.manual_seed(0)
    model = MODELS.build(config.model).train()
    batch = model.data_preprocessor(next(iter(Runner.build_dataloader(config.train_dataloader))), True)
    labels = torch.stack([s.gt_sem_seg.data[0] for s in batch['data_samples']])
    filled = labels[:, 90:, :]
    assert labels.shape[1:] == config.crop_size and (filled == VOID).all(), 'what is filled up is void'
    assert set(labels.unique().tolist()) == {0, 5, VOID}
    logits = torch.randn(2, 11, *labels.shape[1:], requires_grad=True)
    losses = model.decode_head.loss_by_feat(logits, batch['data_samples'])
    losses['loss_ce'].backward()
    moved = logits.grad.abs().sum(1) > 0
    assert (moved == (labels != VOID)).all()
    # Averaged over what is known, so that much void does not mean a small loss.
    known = labels != VOID
    expected = torch.nn.functional.cross_entropy(logits.detach().movedim(1, -1)[known], labels[known])
    assert losses['loss_ce'].item() == pytest.approx(expected.item(), rel=1e-4)


def test_void_is_not_counted(config):
    metric = METRICS.build(config.val_evaluator)
    loader = Runner.build_dataloader(config.val_dataloader)
    metric.dataset_meta = loader.dataset.metainfo
    found = []
    for wrong in (0, 7):
        for batch in loader:
            for sample in batch['data_samples']:
                labels = sample.gt_sem_seg.data
                guess = torch.where(labels == VOID, wrong, labels)
                metric.process(batch, [dict(gt_sem_seg=dict(data=labels), pred_sem_seg=dict(data=guess), img_path='')])
        found.append(metric.evaluate(2))
    assert found[0] == found[1] and found[0]['mIoU'] == found[0]['aAcc'] == 100
