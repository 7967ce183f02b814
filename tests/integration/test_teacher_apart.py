"""Promise 15: the teacher does not change, and nothing but the distiller reaches it."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from tests.integration.lab import DROPOUT, FEATURES, LOGITS, Probe, distill_hook, ema


def run(lab, form, check=None):
    config = lab.plain('gfl')
    terms = (
        dict(logits=LOGITS)
        if form == 'hook_form'
        else dict(features={**FEATURES, 'student': 'backbone[0]', 'teacher': 'backbone[0]'})
    )
    return lab.train(getattr(lab, form)(config, lab.teacher('gfl', extra=DROPOUT), terms), Probe(check))


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_teacher_is_bit_identical_after_training(lab, form):
    prints, bits = [], []

    def check(runner):
        teacher = distill_hook(runner).session.teacher
        prints.append(teacher.fingerprint())
        bits.append({k: v.clone() for k, v in teacher.model.state_dict().items()})

    runner = run(lab, form, check)
    teacher = distill_hook(runner).session.teacher
    stored = torch.load(lab.teacher('gfl', extra=DROPOUT)['checkpoint'])['state_dict']
    assert len(prints) == 4 and len(set(prints)) == 1
    assert set(stored) == set(bits[-1])
    assert all(torch.equal(stored[k], v) for k, v in bits[-1].items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_dropout_and_statistics_are_inactive_while_the_student_trains(lab, form):
    agreed = []

    def check(runner):
        assert runner.model.training
        teacher = distill_hook(runner).session.teacher
        assert isinstance(teacher.model.neck.lateral_convs[0].norm, nn.BatchNorm2d)
        noisy = [m for m in teacher.model.modules() if getattr(m, 'p', 0) == 0.5 or getattr(m, 'drop_prob', 0) > 0.2]
        assert noisy
        assert not [n for n, m in teacher.model.named_modules() if m.training]
        image = torch.rand(2, 3, 96, 96)
        once, again = (teacher.outputs(image, None, ['neck', 'bbox_head']) for _ in range(2))
        for path in ('neck', 'bbox_head'):
            (a,), (b,) = once.calls[path], again.calls[path]
            flat = [(x, y) for x, y in zip(_flat(a.output), _flat(b.output), strict=True)]
            agreed.append(all(torch.equal(x, y) for x, y in flat))

    run(lab, form, check)
    assert agreed and all(agreed)


def _flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in _flat(v)]


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_teacher_is_in_no_module_tree_optimizer_or_average(lab, form):
    runner = lab.train(getattr(lab, form)(lab.plain(), lab.teacher()))
    teacher = distill_hook(runner).session.teacher
    theirs = {id(p) for p in teacher.model.parameters()} | {id(m) for m in teacher.model.modules()}
    sizes = [tuple(p.shape) for p in lab.build(lab.plain()).parameters()]
    adapters = getattr(runner.model, 'kd_adapters', nn.Module())
    extra = [tuple(p.shape) for p in adapters.parameters()]
    for model in (runner.model, ema(runner).module):
        assert not theirs & ({id(p) for p in model.parameters()} | {id(m) for m in model.modules()})
        assert [tuple(p.shape) for p in model.parameters()] == sizes + extra
    optimized = [p for g in runner.optim_wrapper.param_groups for p in g['params']]
    assert not theirs & {id(p) for p in optimized}
    assert {id(p) for p in optimized} == {id(p) for p in runner.model.parameters()}


def _teachers(width=32):
    """Living detectors of the teacher's width."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o).__name__ in ('YOLOX', 'DistilledYOLOX')]
    return [m for m in found if m.bbox_head.feat_channels == width]


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_copies_and_pickles_made_in_mid_training_leave_the_teacher_out(lab, form):
    sizes = {}

    def check(runner):
        if runner.iter != 1:
            return
        before = len(_teachers())
        assert before >= 1
        copied = copy.deepcopy(runner.model)
        assert len(_teachers()) == before, 'the copy copied the teacher'
        sizes['copy'] = sum(p.numel() for p in copied.parameters())
        # A copy trains and predicts without distilling: the hook belongs to the original.
        data = copied.data_preprocessor(next(iter(runner.train_dataloader)), True)
        assert not [k for k in copied(**data, mode='loss') if 'kd' in k]
        assert copied.eval()(data['inputs'], mode='tensor')
        stored = pickle.dumps(runner.model)
        sizes['pickle'] = len(stored)
        loaded = pickle.loads(stored)
        assert len(_teachers()) == before, 'the pickle holds the teacher'
        assert list(loaded.state_dict()) == list(runner.model.state_dict())
        assert not [k for k, _ in loaded.named_parameters() if 'kd_adapters' in k]

    runner = lab.train(getattr(lab, form)(lab.plain(), lab.teacher()), Probe(check))
    plain = lab.build(lab.plain())
    assert sizes['copy'] == sum(p.numel() for p in runner.model.parameters())
    teacher = sum(p.numel() for p in distill_hook(runner).session.teacher.model.parameters()) * 4
    assert sizes['pickle'] < len(pickle.dumps(plain)) + 0.2 * teacher


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_the_model_is_left_as_it_was_found(lab, form):
    runner = lab.train(getattr(lab, form)(lab.plain(), lab.teacher()))
    assert not runner.model._forward_hooks and not runner.model._forward_pre_hooks
    assert not [n for n, m in runner.model.named_modules() if 'forward' in m.__dict__]


@pytest.mark.parametrize('form', ['hook_form', 'model_form'])
def test_taps_are_off_after_an_exception_in_the_students_forward(lab, form):
    runner = lab.runner(getattr(lab, form)(lab.plain(), lab.teacher()))
    original = runner.model.bbox_head.loss_by_feat
    seen = []

    def broken(*args, **kwargs):
        seen.append([n for n, m in runner.model.named_modules() if 'forward' in m.__dict__])
        raise RuntimeError('out of memory')

    runner.model.bbox_head.loss_by_feat = broken
    with pytest.raises(RuntimeError, match='out of memory'):
        runner.train()
    assert seen == [['bbox_head'] if form == 'hook_form' else ['neck']]
    assert not [n for n, m in runner.model.named_modules() if 'forward' in m.__dict__]
    runner.model.bbox_head.loss_by_feat = original
