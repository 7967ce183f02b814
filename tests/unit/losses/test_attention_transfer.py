"""attention_transfer against both forms of its formula in plain loops."""

import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import AttentionTransferLoss, attention_transfer

FORMS = ['author', 'paper']


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(image, p, reduce):
    """Nested lists (C, P) to the P normalised values."""
    values = [reduce([abs(v) ** p for v in position]) for position in zip(*image, strict=True)]
    norm = math.sqrt(sum(v**2 for v in values))
    return [v / norm for v in values]


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize('reduce', [sum, mean])  # over the channels: the paper and the authors' code
@pytest.mark.parametrize('p', [1.0, 2.0, 3.5])
@pytest.mark.parametrize('form', FORMS)
def test_formula(form, p, reduce):
    student, teacher = random(3, 2, 4, 5), random(3, 6, 4, 5, seed=1)
    images = []
    for s, t in zip(student.flatten(2).tolist(), teacher.flatten(2).tolist(), strict=True):
        pairs = zip(attention(s, p, reduce), attention(t, p, reduce), strict=True)
        squares = [(a - b) ** 2 for a, b in pairs]
        images.append(mean(squares) if form == 'author' else math.sqrt(sum(squares)))
    value = attention_transfer(student, teacher, form=form, p=p)
    assert value.item() == pytest.approx(mean(images), rel=1e-12)
    assert torch.equal(AttentionTransferLoss(form, p)(student, teacher), value)


def test_formula_with_numbers():
    """Attention (1, 0) and (0.6, 0.8) from two channels and one: difference (0.4, -0.8)."""
    student = torch.tensor([[[[2.0, 0.0]], [[-3.0, 0.0]]]])
    teacher = torch.tensor([[[[-(3.0**0.5), 4.0**0.5]]]])
    assert attention_transfer(student, teacher).item() == pytest.approx((0.16 + 0.64) / 2, rel=1e-6)
    assert attention_transfer(student, teacher, form='paper').item() == pytest.approx(math.sqrt(0.8), rel=1e-6)


@pytest.mark.parametrize('form', FORMS)
def test_sign_order_and_number_of_channels_and_scale_do_not_matter(form):
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    expected = attention_transfer(student, teacher, form=form).item()
    for same in (-student, student.flip(1), torch.cat([student, student], 1), 1e3 * student, 1e-5 * student):
        assert attention_transfer(same, teacher, form=form).item() == pytest.approx(expected, rel=1e-9)
    assert attention_transfer(7 * teacher[:, [2, 0, 1]], teacher, form=form).item() == pytest.approx(0, abs=1e-12)
    assert attention_transfer(student.flip(3), teacher, form=form).item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize('form', FORMS)
def test_mean_over_images_of_different_difficulty(form):
    student, teacher = random(3, 2, 4, 5), random(3, 4, 4, 5, seed=1)
    teacher[0] *= 100
    single = [attention_transfer(student[i : i + 1], teacher[i : i + 1], form=form).item() for i in range(3)]
    assert attention_transfer(student, teacher, form=form).item() == pytest.approx(mean(single), rel=1e-12)


def test_author_form_is_a_mean_over_positions_and_the_paper_form_is_not():
    """An attention of one position among P, and of another: distance sqrt(2)."""
    for positions in (2, 50):
        student, teacher = torch.zeros(2, 1, 1, positions), torch.zeros(2, 3, 1, positions)
        student[..., 0], teacher[..., 1] = 1.0, 2.0
        assert attention_transfer(student, teacher, form='paper').item() == pytest.approx(math.sqrt(2))
        assert attention_transfer(student, teacher).item() == pytest.approx(2 / positions)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('p', [1.0, 1.5, 2.0])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_maps_of_zeros_have_finite_gradients(form, p, dtype):
    """One dead image in the student, one in the teacher, one in both."""
    student, teacher = random(4, 2, 4, 5, dtype=dtype), random(4, 3, 4, 5, seed=1, dtype=dtype)
    student[0] = teacher[1] = student[2] = teacher[2] = 0
    student.requires_grad_()
    value = attention_transfer(student, teacher, form=form, p=p)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()
    assert not student.grad[[0, 2]].any() and student.grad[3].any()
    # A map of unit norm is compared with zeros: 1 per image, or 1 / 20 per position.
    alone = attention_transfer(student[3:], teacher[3:], form=form, p=p).item()
    dead = 2.0 if form == 'paper' else 2 / 20
    assert value.item() == pytest.approx((alone + dead) / 4, rel=1e-5)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_zero_with_zero_gradient_at_equality(form, dtype):
    student = random(3, 2, 4, 5, dtype=dtype)
    student[1] = 0
    student.requires_grad_()
    value = attention_transfer(student, student.detach().clone(), form=form)
    value.backward()
    assert value.item() == 0.0 and not student.grad.any()


@pytest.mark.parametrize('p', [1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize('scale', [1e-4, 6e4])
def test_float16_neither_overflows_nor_underflows(p, scale):
    """60000^8 is infinite in float32 too."""
    student = (random(2, 3, 4, 5).clamp(-1, 1) * scale).half().requires_grad_()
    teacher = (random(2, 3, 4, 5, seed=1).clamp(-1, 1) * scale).half()
    value = attention_transfer(student, teacher, p=p)
    value.backward()
    exact = attention_transfer(student.detach().double(), teacher.double(), p=p)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=1e-4)
    assert exact > 1e-3 and torch.isfinite(student.grad).all()


def test_gradient_of_the_scaled_power_is_the_whole_gradient():
    """The largest activation is divided out without gradient; central differences see the full function."""
    student, teacher = random(2, 2, 3, 3).requires_grad_(), random(2, 4, 3, 3, seed=1)
    for form in FORMS:
        assert torch.autograd.gradcheck(lambda s, form=form: attention_transfer(s, teacher, form=form, p=3.0), student)


def test_any_grid():
    student, teacher = random(2, 2, 4, 5), random(2, 3, 4, 5, seed=1)
    for shape in ((20,), (2, 2, 5)):
        value = attention_transfer(student.reshape(2, 2, *shape), teacher.reshape(2, 3, *shape))
        assert value.item() == pytest.approx(attention_transfer(student, teacher).item(), rel=1e-12)


def test_no_images_give_zero_with_a_gradient_path():
    for form in FORMS:
        student = torch.zeros(0, 2, 4, 5, requires_grad=True)
        value = attention_transfer(student, torch.zeros(0, 3, 4, 5), form=form)
        value.backward()
        assert value.item() == 0.0


def test_module_and_messages():
    assert AttentionTransferLoss.any_channels is True
    assert repr(AttentionTransferLoss(p=3.0)) == "AttentionTransferLoss(form='author', p=3.0)"
    maps = torch.zeros(2, 3, 4, 5)
    for call, message in (
        (
            lambda: attention_transfer(maps, maps[..., :4]),
            r"\(2, 4, 5\).*\(2, 4, 4\); only the.*adapter='auto'",
        ),
        (lambda: attention_transfer(maps, maps[:1]), r'\(2, 4, 5\).*\(1, 4, 5\)'),
        (lambda: attention_transfer(maps, torch.zeros(2, 3)), r'of the teacher must be maps.*got \(2, 3\)'),
        (lambda: attention_transfer(maps, maps, form='sum'), "form must be one of 'author', 'paper', got 'sum'"),
        (lambda: attention_transfer(maps, maps, p=0.5), r'p must be >= 1.*got 0\.5'),
    ):
        with pytest.raises(DistillError, match=message):
            call()
