"""relation against the paper's formulas in plain loops over pairs and triplets."""

import itertools
import math

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.losses import RelationLoss, relation


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def huber(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def cosine(a, vertex, b):
    """Of the angle at ``vertex``, by the law of cosines."""
    x, y, z = math.dist(a, vertex), math.dist(b, vertex), math.dist(a, b)
    return (x**2 + y**2 - z**2) / (2 * x * y)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def distance_loss(student, teacher):
    pairs = list(itertools.permutations(range(len(student)), 2))
    s, t = ([math.dist(x[i], x[j]) for i, j in pairs] for x in (student, teacher))
    return mean(huber(a / mean(s), b / mean(t)) for a, b in zip(s, t, strict=True))


def angle_loss(student, teacher):
    triplets = itertools.permutations(range(len(student)), 3)
    return mean(huber(cosine(*(student[i] for i in t)), cosine(*(teacher[i] for i in t))) for t in triplets)


def rotation(size, seed=2):
    return torch.linalg.qr(random(size, size, seed=seed))[0]


@pytest.mark.parametrize('weights', [(25.0, 50.0), (1.0, 0.0), (0.0, 3.0)])
def test_formula(weights):
    student, teacher = random(6, 4), random(6, 7, seed=1)
    student[0] *= 30  # far away: the linear part of the Huber loss
    s, t = student.tolist(), teacher.tolist()
    assert max(math.dist(s[0], p) for p in s) > 2 * mean(math.dist(*p) for p in itertools.permutations(s, 2))
    expected = weights[0] * distance_loss(s, t) + weights[1] * angle_loss(s, t)
    value = relation(student, teacher, distance_weight=weights[0], angle_weight=weights[1])
    assert value.item() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(RelationLoss(*weights)(student, teacher), value)


def test_formula_with_numbers():
    """A right-angled triangle of sides 3, 4, 5 and a line 0, 1, 3."""
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[0.0], [1.0], [3.0]])
    # Distances over their mean: 3/4, 1, 5/4 and 1/2, 3/2, 1; squared differences 1/16, 1/4, 1/16.
    value = relation(student, teacher, distance_weight=1.0, angle_weight=0.0)
    assert value.item() == pytest.approx(0.5 * (1 / 16 + 1 / 4 + 1 / 16) / 3, rel=1e-6)
    # Cosines at each vertex: 0, 3/5, 4/5 and 1, -1, 1; the second differs by more than 1.
    value = relation(student, teacher, distance_weight=0.0, angle_weight=1.0)
    assert value.item() == pytest.approx((0.5 + (1.6 - 0.5) + 0.5 * 0.04) / 3, rel=1e-6)


def test_factors_to_the_authors_code():
    """Means over all B^2 pairs and B^3 triplets, zeros included."""
    count = 5
    student, teacher = random(count, 4), random(count, 7, seed=1)
    s, t = (torch.cdist(x, x) for x in (student, teacher))
    theirs = torch.nn.functional.smooth_l1_loss(s / s[s > 0].mean(), t / t[t > 0].mean())
    ours = relation(student, teacher, distance_weight=1.0, angle_weight=0.0)
    assert theirs.item() == pytest.approx((count - 1) / count * ours.item(), rel=1e-9)
    normalize = torch.nn.functional.normalize
    s, t = (normalize(x[None] - x[:, None], dim=2) for x in (student, teacher))
    theirs = torch.nn.functional.smooth_l1_loss(torch.bmm(s, s.transpose(1, 2)), torch.bmm(t, t.transpose(1, 2)))
    ours = relation(student, teacher, distance_weight=0.0, angle_weight=1.0)
    assert theirs.item() == pytest.approx((count - 1) * (count - 2) / count**2 * ours.item(), rel=1e-9)


@pytest.mark.parametrize('weights', [(1.0, 0.0), (0.0, 1.0)])
def test_relations_ignore_place_orientation_scale_and_order(weights):
    loss = RelationLoss(*weights)
    student, teacher = random(6, 4), random(6, 7, seed=1)
    expected = loss(student, teacher).item()
    moved = 0.3 * student @ rotation(4) + random(1, 4, seed=3)
    assert loss(moved, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert loss(-student, teacher).item() == pytest.approx(expected, rel=1e-9)
    padded = torch.cat([student, torch.zeros(6, 3, dtype=torch.float64)], 1)
    assert loss(padded @ rotation(7), teacher).item() == pytest.approx(expected, rel=1e-9)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert loss(student[order], teacher[order]).item() == pytest.approx(expected, rel=1e-9)
    assert loss(student[order], teacher).item() != pytest.approx(expected, rel=1e-3)
    assert loss(5 * teacher @ rotation(7) - 2, teacher).item() == pytest.approx(0, abs=1e-12)
    assert loss(student * torch.tensor([1.0, 1.0, 1.0, 9.0]), teacher).item() != pytest.approx(expected, rel=1e-3)


def test_the_images_of_a_batch_are_coupled():
    """Not the mean over halves, and a doubled batch has distances of 0 on top."""
    student, teacher = random(6, 4), random(6, 7, seed=1)
    whole = relation(student, teacher).item()
    halves = (relation(student[:3], teacher[:3]) + relation(student[3:], teacher[3:])).item() / 2
    doubled = relation(torch.cat([student] * 2), torch.cat([teacher] * 2)).item()
    assert whole != pytest.approx(halves, rel=1e-3) and whole != pytest.approx(doubled, rel=1e-3)


def test_descent_reaches_the_relations():
    student, teacher = random(6, 4).requires_grad_(), random(6, 3, seed=1)
    before = relation(student, teacher).item()
    optimizer = torch.optim.Adam([student], lr=0.02)
    for _ in range(500):
        optimizer.zero_grad()
        relation(student, teacher).backward()
        optimizer.step()
    assert relation(student, teacher).item() < 1e-3 * before


def test_maps_are_averaged_over_the_positions():
    """Grids may differ like the channels; one side may be an embedding."""
    student, teacher = random(5, 4, 3, 2), random(5, 7, 6, 4, seed=1)
    expected = relation(student.sum((2, 3)) / 6, teacher.flatten(2).sum(2) / 24).item()
    assert relation(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert relation(student, teacher.mean((2, 3))).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('count, distances, angles', [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 1, 1)])
def test_too_few_images_give_zero_with_a_gradient_path(count, distances, angles):
    """Two distances are equal after the division by their mean."""
    for weights, some in (((25.0, 0.0), distances), ((0.0, 50.0), angles), ((25.0, 50.0), distances or angles)):
        student = random(count, 4).requires_grad_()
        value = relation(student, random(count, 7, seed=1), distance_weight=weights[0], angle_weight=weights[1])
        value.backward()
        assert torch.isfinite(student.grad).all()
        assert (value.item() > 1e-3) == bool(some) and (student.grad.abs().sum().item() > 1e-6) == bool(some)
        if not some:
            assert value.item() == 0.0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('value', [0.0, 0.1, 300.0])
def test_identical_embeddings_have_finite_gradients(dtype, value):
    varied = random(5, 4, dtype=dtype)
    same = torch.full_like(varied, value)
    two_alike = varied.clone()
    two_alike[1] = two_alike[0]
    for student in (same, two_alike):
        for teacher in (varied, same, two_alike):
            student = student.detach().clone().requires_grad_()
            loss = relation(student, teacher)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
            assert student.grad.abs().max() < 1e3
            assert (loss.item() == 0.0) == torch.equal(student.detach(), teacher)


def test_coinciding_embeddings_have_cosine_zero():
    """The student's first two images coincide: 0 wherever one is the vertex and the other an end."""
    teacher = random(4, 3, seed=1)
    student = teacher.clone()
    student[1] = student[0]
    t = teacher.tolist()
    expected = 0.0
    for i, j, k in itertools.permutations(range(4), 3):
        s = student.tolist()
        ours = 0.0 if {i, j} == {0, 1} or {k, j} == {0, 1} else cosine(s[i], s[j], s[k])
        expected += huber(ours, cosine(t[i], t[j], t[k])) / 24
    value = relation(student, teacher, distance_weight=0.0, angle_weight=1.0)
    assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    student, teacher = (1e4 * random(6, 8)).to(dtype).requires_grad_(), (1e4 * random(6, 8, seed=1)).to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = relation(student, teacher)
    value.backward()
    exact = relation(student.detach().double(), teacher.double())
    assert value.dtype == torch.float32 and value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert student.grad.dtype == dtype and torch.isfinite(student.grad).all() and student.grad.any()


def test_close_embeddings_far_from_the_origin_stay_exact():
    """A Gram matrix in float32 would lose all digits of their distances."""
    student, teacher = random(6, 8) + 1e3, random(6, 8, seed=1) + 1e3
    student, teacher = student.float(), teacher.float()
    exact = relation(student.double(), teacher.double())
    assert relation(student, teacher).item() == pytest.approx(exact.item(), rel=1e-5)


def test_module_and_messages():
    assert RelationLoss.any_channels is True
    assert repr(RelationLoss(1.0, 2.0)) == 'RelationLoss(distance_weight=1.0, angle_weight=2.0)'
    vectors = torch.zeros(2, 3)
    for call, message in (
        (lambda: relation(vectors, torch.zeros(1, 5)), r'student are \(2, 3\).*teacher are \(1, 5\)'),
        (lambda: relation(torch.zeros(2, 9, 3), vectors), r'student must be .*got \(2, 9, 3\); average the tokens'),
        (lambda: relation(vectors, torch.zeros(2)), r'teacher must be \(B, D\), .*got \(2,\)\.'),
        (lambda: relation(vectors, vectors, distance_weight=0, angle_weight=0.0), 'both 0'),
        (lambda: relation(vectors, vectors, angle_weight=-1.0), r'angle_weight must be .*got -1\.0'),
    ):
        with pytest.raises(DistillError, match=message):
            call()
