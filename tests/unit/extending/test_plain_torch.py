"""The example of a host of one's own: a plain loop, distilled by the engine, whose student is a plain module."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[3] / 'examples' / 'plain_torch.py'
STEPS = 4


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location('plain_torch', EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'plain_torch', module)
    spec.loader.exec_module(module)
    teach, module.opened, module.adapters = module.teach, [], []

    def watched(*given):
        module.opened.append(teach(*given))
        module.adapters += [p.detach().clone() for p in module.opened[-1].bank.parameters()]
        return module.opened[-1]

    module.teach = watched
    return module


def train(example, teacher=None, terms=None):
    """The trained student, and what is drawn next."""
    torch.manual_seed(3)
    if terms is not None:
        example.TERMS = terms
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    student = example.train(example.Net(2), (images, torch.arange(12) % 10), STEPS, teacher, seed=1)
    return student, torch.rand(3)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_it_is_short():
    assert len(EXAMPLE.read_text(encoding='utf-8').splitlines()) < 150


def test_every_iteration_is_distilled_and_the_student_is_a_plain_module(example):
    plain, _ = train(example)
    teacher = example.Net(3)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student, _ = train(example, teacher)
    (session,) = example.opened
    assert session.asked == STEPS and session.finish() is None
    assert not same(plain, student) and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    # The features have other widths: an adapter was trained, and is none of the student's.
    adapter = next(session.bank.parameters())
    assert adapter.shape == (6, 4, 1, 1) and not torch.equal(adapter, example.adapters[0])
    fresh = example.Net(2)
    assert list(student.state_dict()) == list(fresh.state_dict())
    for module, other in zip(student.modules(), fresh.modules(), strict=True):
        assert type(module) is type(other) and set(vars(module)) == set(vars(other))
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_with_weight_0_it_is_the_plain_loop_bit_for_bit(example):
    plain, drawn = train(example)
    terms = {name: {**term, 'weight': 0.0} for name, term in example.TERMS.items()}
    student, drawn_too = train(example, example.Net(3), terms)
    assert same(plain, student) and torch.equal(drawn, drawn_too)
    assert example.opened[0].asked == 0


def test_labels_reach_a_loss_that_needs_them(example):
    terms = dict(logits=dict(loss=dict(type='DKDLoss'), student='logits', teacher='logits'))
    plain, _ = train(example)
    student, _ = train(example, example.Net(3), terms)
    assert example.opened[0].asked == STEPS and not same(plain, student)


def test_what_it_prints(example, monkeypatch, capsys):
    pytest.importorskip('sklearn')
    monkeypatch.setattr(example, 'train', lambda net, few, steps, teacher=None, seed=0: net)
    monkeypatch.setattr(sys, 'argv', ['plain_torch.py', '--seeds', '2', '--test'])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith('% of 600 images') and len(lines) == 4
    number = r'[+-]?\d+\.\d'
    assert re.fullmatch(rf'seed 1   plain {number} %   distilled {number} %   \+0\.0', lines[2])
    assert re.fullmatch(
        rf'mean     plain {number} ± {number} %   distilled {number} ± {number} %   gain \+0\.0 ± 0\.0, '
        r'95 % interval \+0\.0 to \+0\.0',
        lines[3],
    )


def test_what_is_chosen_by_and_what_is_tested_on_are_apart(example):
    pytest.importorskip('sklearn')
    parts = example.digits()
    assert [len(images) for images, _ in parts] == [897, 300, 600]
    # Each of the 1,797 scans once: the parts together have the labels of the whole.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    assert torch.cat([y for _, y in parts]).sort().values.tolist() == sorted(labels.tolist())
    assert sum(x.sum().item() for x, _ in parts) == pytest.approx(pixels.sum() / 16)
