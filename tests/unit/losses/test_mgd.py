"""mgd against its formula, with generators and masks that can be followed by hand."""

import copy

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import MGDLoss, mgd
from kd_plugins.losses.mgd import MGDGenerator


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def identity(features):
    return features


class Recorder:
    """A generator that keeps what it was given."""

    def __call__(self, features):
        self.seen = features.detach()
        return features


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_formula_without_a_mask():
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = sum((2 * s + 1 - t) ** 2 for s, t in pairs) / (2 * 3 * 4 * 5)
    assert mgd(student, teacher, lambda f: 2 * f + 1, mask_ratio=0.0).item() == pytest.approx(expected, rel=1e-12)
    assert mgd(teacher, teacher, identity, mask_ratio=0.0).item() == 0.0


def test_formula_with_the_mask_that_was_drawn():
    """Hidden positions are zero before generation, and are compared like all others."""
    student, teacher, recorder = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1), Recorder()
    value = mgd(student, teacher, recorder, mask_ratio=0.5)
    hidden = (recorder.seen == 0).all(1)
    assert 0 < hidden.sum() < hidden.numel()
    total = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                for c in range(3):
                    s = 0.0 if hidden[b, y, x] else student[b, c, y, x].item()
                    total += (s - teacher[b, c, y, x].item()) ** 2
    assert value.item() == pytest.approx(total / (2 * 3 * 4 * 5), rel=1e-12)


def test_mask_is_one_per_position_and_image():
    recorder = Recorder()
    mgd(torch.ones(2, 8, 32, 32), torch.ones(2, 8, 32, 32), recorder)
    assert set(recorder.seen.unique().tolist()) == {0.0, 1.0}
    assert (recorder.seen == recorder.seen[:, :1]).all()  # all channels alike
    assert (recorder.seen[0] != recorder.seen[1]).any()
    first = recorder.seen
    mgd(torch.ones(2, 8, 32, 32), torch.ones(2, 8, 32, 32), recorder)
    assert (recorder.seen != first).any()  # anew at every call


@pytest.mark.parametrize('mask_ratio', [0.0, 0.2, 0.65, 0.9])
def test_mask_ratio_is_the_hidden_fraction(mask_ratio):
    recorder = Recorder()
    ones = torch.ones(4, 1, 100, 100)
    mgd(ones, ones, recorder, mask_ratio=mask_ratio)
    deviation = (mask_ratio * (1 - mask_ratio) / ones.numel()) ** 0.5
    assert (recorder.seen == 0).double().mean().item() == pytest.approx(mask_ratio, abs=4 * deviation)


def test_seed_decides_the_mask():
    student, teacher = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1)
    values = []
    for number in (3, 3, 4):
        torch.manual_seed(number)
        values.append(mgd(student, teacher, identity).item())
    assert values[0] == values[1] != values[2]


def test_hidden_positions_send_no_gradient():
    """Also where the student is infinite."""
    student, recorder = random(2, 3, 8, 8), Recorder()
    torch.manual_seed(5)
    mgd(student, torch.ones_like(student), recorder)
    hidden = recorder.seen == 0
    student = student.masked_fill(hidden, float('inf')).requires_grad_()
    torch.manual_seed(5)
    value = mgd(student, torch.ones_like(student), identity)
    value.backward()
    assert torch.isfinite(value) and student.grad[~hidden].all() and not student.grad[hidden].any()


def test_weight_of_the_authors():
    """alpha times the sum over B is alpha * C * H * W times ours."""
    student, teacher = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    theirs = 2e-5 * torch.nn.functional.mse_loss(student, teacher, reduction='sum') / 2
    ours = 2e-5 * 3 * 4 * 5 * mgd(student, teacher, identity, mask_ratio=0.0)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_generator_is_conv_relu_conv():
    generator = MGDGenerator(3).double()
    features = random(2, 3, 4, 5)
    patches = torch.nn.functional.unfold(features, 3, padding=1)

    def convolved(patches, conv):
        return torch.einsum('of,bfp->bop', conv.weight.flatten(1), patches) + conv.bias[:, None]

    hidden = convolved(patches, generator.conv1).clamp(min=0).reshape(2, 3, 4, 5)
    expected = convolved(torch.nn.functional.unfold(hidden, 3, padding=1), generator.conv2).reshape(2, 3, 4, 5)
    torch.testing.assert_close(generator(features), expected)
    assert sum(p.numel() for p in generator.parameters()) == 2 * (3 * 3 * 9 + 3)


def test_gradients_of_student_and_generator():
    generator = MGDGenerator(3).double()
    student, teacher = random(2, 3, 3, 3).requires_grad_(), random(2, 3, 3, 3, seed=1).requires_grad_()

    def value(student, *_):
        torch.manual_seed(7)
        return mgd(student, teacher.detach(), generator)

    assert torch.autograd.gradcheck(value, (student, *generator.parameters()))
    mgd(student, teacher, generator).backward()
    assert teacher.grad is None and student.grad.any()
    assert all(p.grad.any() for p in generator.parameters())


def test_training_recovers_the_teacher_from_a_part():
    """Neighbours tell what is hidden: a smooth map is recovered, below what the mask alone leaves."""
    teacher = torch.linspace(1, 2, 12).view(1, 1, 12, 1).expand(2, 4, 12, 12).contiguous()
    loss = MGDLoss(mask_ratio=0.3, channels=4)
    left_alone = sum(mgd(teacher, teacher, identity, mask_ratio=0.3).item() for _ in range(20)) / 20
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        loss(teacher, teacher).backward()
        optimizer.step()
    with torch.no_grad():
        assert sum(loss(teacher, teacher).item() for _ in range(20)) / 20 < 0.3 * left_alone


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    """300^2 is infinite in float16; the generator runs in float32 too."""
    loss = MGDLoss(mask_ratio=0.5, channels=3)
    student, teacher = 300 * random(2, 3, 4, 5, dtype=dtype), 300 * random(2, 3, 4, 5, seed=1, dtype=dtype)
    torch.manual_seed(1)
    expected = loss(student.float(), teacher.float())
    student.requires_grad_()
    torch.manual_seed(1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32 and torch.equal(value, expected) and value > 0
    assert student.grad.dtype == dtype and torch.isfinite(student.grad).all()
    exact = loss.double()
    torch.manual_seed(1)
    double = exact(student.detach().double(), teacher.double())
    assert double.dtype == torch.float64 and double.item() == pytest.approx(value.item(), rel=1e-5)


def test_loss_of_a_batch_is_the_mean_over_its_images():
    loss = MGDLoss(mask_ratio=0.0, channels=3).double()
    student, teacher = random(3, 3, 4, 5), random(3, 3, 4, 5, seed=1)
    single = [loss(student[i : i + 1], teacher[i : i + 1]).item() for i in range(3)]
    assert loss(student, teacher).item() == pytest.approx(sum(single) / 3, rel=1e-12)


def test_no_images_give_zero_with_a_gradient_path():
    loss, student = MGDLoss(channels=3), torch.zeros(0, 3, 4, 5, requires_grad=True)
    value = loss(student, torch.zeros(0, 3, 4, 5))
    value.backward()
    assert value.item() == 0.0 and student.grad.shape == student.shape
    assert all(not p.grad.any() for p in loss.parameters())


def test_module():
    loss = MGDLoss(mask_ratio=0.4, channels=3)
    assert loss.consumes == 'features' and len(list(loss.parameters())) == 4
    assert repr(loss).startswith('MGDLoss(\n  mask_ratio=0.4, channels=3')
    student, teacher = random(2, 3, 4, 5, dtype=torch.float32), random(2, 3, 4, 5, seed=1, dtype=torch.float32)
    values = []
    for one in (loss, copy.deepcopy(loss)):
        torch.manual_seed(2)
        values.append(one(student, teacher))
    torch.manual_seed(2)
    values.append(mgd(student, teacher, loss.generator, mask_ratio=0.4))
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_for_channels_makes_a_new_loss_with_a_new_generator():
    plain = MGDLoss(mask_ratio=0.4)
    assert not list(plain.parameters()) and not plain.state_dict()
    first, second = plain.for_channels(3), plain.for_channels(3)
    assert plain.generator is None and type(first) is MGDLoss and first.mask_ratio == 0.4
    assert not torch.equal(first.generator.conv1.weight, second.generator.conv1.weight)
    assert first.for_channels(5).generator.conv2.weight.shape == (5, 5, 3, 3)
    assert first.generator.channels == 3
    with pytest.raises(DistillError, match='channels must be an integer >= 1, got 0'):
        plain.for_channels(0)


def test_wrong_use_says_what_to_do():
    maps = torch.zeros(2, 3, 4, 5)
    for call, message in (
        (lambda: MGDLoss()(maps, maps), r'no generator yet.*MGDLoss\(channels=\.\.\.\)'),
        (lambda: MGDLoss(channels=4)(maps, maps), r'built for 4 channels, got \(2, 3, 4, 5\)'),
        (lambda: MGDLoss(channels=3)(maps[:, :2], maps), r"\(2, 2, 4, 5\).*\(2, 3, 4, 5\); .*adapter='auto'"),
        (lambda: mgd(maps, maps, lambda f: f[:1]), r'keep the shape \(2, 3, 4, 5\), it made \(1, 3, 4, 5\)'),
        (lambda: mgd(maps[0], maps[0], identity), r'must be \(B, C, H, W\), got \(3, 4, 5\)'),
        (lambda: mgd((maps,), maps, identity), 'student must be one tensor, got tuple'),
        (lambda: mgd(maps, maps, identity, mask_ratio=1.0), r'mask_ratio must be below 1.*got 1\.0'),
        (lambda: mgd(maps, maps, identity, mask_ratio=-0.1), r'mask_ratio must be .* >= 0, got -0\.1'),
    ):
        with pytest.raises(DistillError, match=message):
            call()
