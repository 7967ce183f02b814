"""pixelwise_kl_div against its formula in plain loops, and its lean path against the plain one."""

import itertools
import math
import sys

import pytest
import torch
from torch.nn.functional import interpolate

from kd_plugins.errors import DistillError
from kd_plugins.losses import PixelwiseKLDivLoss, kl_div, pixelwise_kl_div

MODULE = sys.modules[pixelwise_kl_div.__module__]
IGNORE = 255


def random(*shape, seed=0, dtype=torch.float64, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def labels(*shape, classes=5, ignored=0.3, seed=7):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < ignored, IGNORE)


def pair(classes=5, dtype=torch.float64):
    return random(2, classes, 4, 6, dtype=dtype), random(2, classes, 4, 6, seed=1, dtype=dtype), labels(2, 4, 6)


def softmax(values):
    exponents = [math.exp(v - max(values)) for v in values]
    return [e / sum(exponents) for e in exponents]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def divergence(s, t):
    return sum(b * math.log(b / a) for a, b in zip(s, t, strict=True))


def one_pixel(s, t, label, temperature, alpha, independent):
    """Loss of a pixel with the lists of logits ``s`` and ``t``."""
    s_soft, t_soft = ([v / temperature for v in z] for z in (s, t))
    if independent or len(s) == 1:
        two = [
            ([1 - sigmoid(a), sigmoid(a)], [1 - sigmoid(b), sigmoid(b)]) for a, b in zip(s_soft, t_soft, strict=True)
        ]
        soft = sum(divergence(*p) for p in two)
    else:
        soft = divergence(softmax(s_soft), softmax(t_soft))
    soft *= temperature**2
    if alpha is None:
        return soft
    probabilities = [1 - sigmoid(s[0]), sigmoid(s[0])] if len(s) == 1 else softmax(s)
    return alpha * soft - (1 - alpha) * math.log(probabilities[label])


def by_hand(student, teacher, target=None, temperature=1.0, alpha=None, independent=False):
    """Sum over the pixels that count, divided by their number; all maps on one grid."""
    batch, _, height, width = student.shape
    values = []
    for b, y, x in itertools.product(range(batch), range(height), range(width)):
        label = None if target is None else target[b, y, x].item()
        if label != IGNORE:
            s, t = student[b, :, y, x].tolist(), teacher[b, :, y, x].tolist()
            values.append(one_pixel(s, t, label, temperature, alpha, independent))
    return sum(values) / len(values)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of about so many elements, so that a small map has several."""
    return lambda size: monkeypatch.setattr(MODULE, '_chunk_size', lambda logits: size)


either_path = pytest.mark.parametrize('lean', [False, True])


# ---------------------------------------------------------------------- the formula
@either_path
@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('independent', [False, True])
def test_formula(temperature, masked, independent, lean, small_chunks):
    small_chunks(60)
    student, teacher, target = pair()
    target = target if masked else None
    expected = by_hand(student, teacher, target, temperature, independent=independent)
    options = dict(temperature=temperature, sigmoid=independent, lean=lean)
    value = pixelwise_kl_div(student, teacher, target, **options)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(PixelwiseKLDivLoss(**options)(student, teacher, target), value)


@either_path
@pytest.mark.parametrize('alpha', [0, 0.3, 1])
@pytest.mark.parametrize('classes', [1, 2, 5])
def test_alpha_mixes_in_the_cross_entropy(alpha, classes, lean, small_chunks):
    small_chunks(60)
    student, teacher, _ = pair(classes)
    target = labels(2, 4, 6, classes=max(classes, 2))
    expected = by_hand(student, teacher, target, 2.0, alpha)
    value = pixelwise_kl_div(student, teacher, target, temperature=2.0, alpha=alpha, lean=lean)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_formula_with_numbers():
    """Teacher (3/4, 1/4), student (1/2, 1/2) in one pixel, equal in the other: half of 3/4 ln 3/2 + 1/4 ln 1/2."""
    teacher = torch.tensor([[[[math.log(3.0), 0.0]], [[0.0, 0.0]]]])
    value = pixelwise_kl_div(torch.zeros(1, 2, 1, 2), teacher)
    assert value.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-6)


def test_equals_the_classic_divergence_of_all_pixels():
    student, teacher, _ = pair()
    flat = (x.permute(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher))
    value = pixelwise_kl_div(student, teacher, temperature=3.0)
    torch.testing.assert_close(value, kl_div(*flat, temperature=3.0))


@either_path
def test_one_channel_is_two_classes_with_one_logit_at_zero(lean):
    student, teacher, _ = pair(1)
    target = labels(2, 4, 6, classes=2)
    two = (torch.cat([torch.zeros_like(x), x], 1) for x in (student, teacher))
    options = dict(temperature=2.0, alpha=0.4)
    value = pixelwise_kl_div(student, teacher, target, lean=lean, **options)
    torch.testing.assert_close(value, pixelwise_kl_div(*two, target, **options))
    independent = pixelwise_kl_div(student, teacher, target, sigmoid=True, lean=lean)
    assert torch.equal(independent, pixelwise_kl_div(student, teacher, target, lean=lean))


@either_path
def test_gradient_is_t_times_the_difference_of_probabilities(lean):
    """``T^2`` keeps its size independent of the temperature, up to the softening itself."""
    student, teacher, target = pair()
    student.requires_grad_()
    pixelwise_kl_div(student, teacher, target, temperature=5.0, lean=lean).backward()
    valid = (target != IGNORE)[:, None]
    expected = 5.0 * ((student / 5).softmax(1) - (teacher / 5).softmax(1)) * valid / valid.sum()
    torch.testing.assert_close(student.grad, expected.detach())


# ---------------------------------------------------------------------- pixels that do not count
@either_path
@pytest.mark.parametrize('wild', [math.inf, -math.inf, math.nan, 1e38])
@pytest.mark.parametrize('options', [{}, dict(sigmoid=True), dict(alpha=0.5), dict(temperature=0.5)], ids=str)
def test_excluded_pixels_reach_neither_value_nor_gradient(wild, options, lean, small_chunks):
    small_chunks(60)
    student, teacher, target = pair(dtype=torch.float32)
    excluded = (target == IGNORE)[:, None].expand_as(student)
    clean = student.clone().requires_grad_()
    expected = pixelwise_kl_div(clean, teacher, target, lean=lean, **options)
    expected.backward()
    spoilt = student.masked_fill(excluded, wild).requires_grad_()
    value = pixelwise_kl_div(spoilt, teacher.masked_fill(excluded, -wild), target, lean=lean, **options)
    value.backward()
    assert torch.equal(value.detach(), expected.detach()) and torch.equal(spoilt.grad, clean.grad)
    assert not spoilt.grad[excluded].any() and spoilt.grad[~excluded].all()


@either_path
@pytest.mark.parametrize('options', [{}, dict(sigmoid=True), dict(alpha=0.5)], ids=str)
def test_no_valid_pixel_gives_zero_with_a_gradient_of_zeros(options, lean):
    student = torch.full((2, 5, 4, 6), math.nan, requires_grad=True)
    target = torch.full((2, 4, 6), IGNORE)
    value = pixelwise_kl_div(student, torch.full((2, 5, 4, 6), math.inf), target, lean=lean, **options)
    assert value.item() == 0.0 and value.requires_grad
    value.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


@either_path
def test_another_ignore_index(lean):
    student, teacher, target = pair()
    expected = pixelwise_kl_div(student, teacher, target, alpha=0.5)
    moved = target.masked_fill(target == IGNORE, -1)
    assert torch.equal(pixelwise_kl_div(student, teacher, moved, alpha=0.5, ignore_index=-1, lean=lean), expected)
    # -1 is 255 in uint8, which a comparison in that type would take for the ignored label.
    every = pixelwise_kl_div(student, teacher, target.to(torch.uint8), ignore_index=-1, lean=lean)
    assert torch.equal(every, pixelwise_kl_div(student, teacher, lean=lean))


@either_path
def test_mean_over_the_valid_pixels_of_the_batch(lean):
    """An image with three times as many weighs three times as much; twice the batch changes nothing."""
    student, teacher, _ = pair()
    target = torch.full((2, 4, 6), IGNORE)
    target[0, 0, :2] = 1
    target[1, 1] = 1
    whole = pixelwise_kl_div(student, teacher, target, lean=lean)
    first, second = (
        pixelwise_kl_div(student[i : i + 1], teacher[i : i + 1], target[i : i + 1], lean=lean) for i in (0, 1)
    )
    torch.testing.assert_close(whole, first / 4 + 3 * second / 4)
    doubled = pixelwise_kl_div(*(torch.cat([x, x]) for x in (student, teacher, target)), lean=lean)
    torch.testing.assert_close(doubled, whole)


# ---------------------------------------------------------------------- grids
@either_path
@pytest.mark.parametrize(
    'small, large', [((2, 3), (4, 6)), ((3, 5), (8, 7)), ((4, 3), (4, 6)), ((2, 6), (5, 6)), ((1, 1), (3, 2))]
)
def test_the_smaller_map_is_resized_bilinearly(small, large, lean, small_chunks):
    small_chunks(40)
    little, big = random(2, 5, *small), random(2, 5, *large, seed=1)
    resized = interpolate(little, size=large, mode='bilinear', align_corners=False)
    target = labels(2, *large)
    options = dict(temperature=2.0, alpha=0.5)

    def gradient(student, teacher, lean):
        student = student.clone().requires_grad_()
        value = pixelwise_kl_div(student, teacher, target, lean=lean, **options)
        return value.detach(), *torch.autograd.grad(value, student)

    torch.testing.assert_close(gradient(big, little, lean), gradient(big, resized, False))
    value, through = gradient(little, big, lean)
    assert value.item() == pytest.approx(by_hand(resized, big, target, **options), rel=1e-12)
    # The resize is linear: its transpose takes the gradient at the resized map back.
    leaf = little.clone().requires_grad_()
    expected = gradient(resized, big, False)[1]
    interpolate(leaf, size=large, mode='bilinear', align_corners=False).backward(expected)
    torch.testing.assert_close(through, leaf.grad)


def test_bilinear_by_hand():
    """Two pixels to four: 3/4 and 1/4 of the neighbours inside, the border repeated (no align_corners)."""
    student = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    assert pixelwise_kl_div(student, torch.tensor([0.0, 1.0, 3.0, 4.0]).reshape(1, 1, 1, 4)).item() == 0.0


@pytest.mark.parametrize('given, picked', [(8, [1, 3, 5, 7]), (6, [0, 2, 3, 5]), (3, [0, 1, 1, 2]), (1, [0, 0, 0, 0])])
def test_labels_are_sampled_nearest_exact(given, picked):
    """Pixel ``i`` of 4 takes label ``floor((i + 0.5) * n / 4)``, along both axes."""
    student, teacher = random(1, 3, 4, 4), random(1, 3, 4, 4, seed=1)
    for seed in range(5):
        target = labels(1, given, given, classes=3, ignored=0.5, seed=seed)
        target[0, picked[1], picked[2]] = 1
        by_index = torch.stack([torch.stack([target[0, y, x] for x in picked]) for y in picked])[None]
        expected = pixelwise_kl_div(student, teacher, by_index, alpha=0.5)
        assert torch.equal(pixelwise_kl_div(student, teacher, target, alpha=0.5), expected)
        by_torch = interpolate(target[:, None].double(), size=(4, 4), mode='nearest-exact')[:, 0].long()
        assert torch.equal(by_torch, by_index)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type_and_with_a_channel(dtype):
    student, teacher, target = pair()
    expected = pixelwise_kl_div(student, teacher, target, alpha=0.5)
    for given in (target, target[:, None]):
        assert torch.equal(pixelwise_kl_div(student, teacher, given.to(dtype), alpha=0.5), expected)


def test_a_boolean_mask_labels_a_binary_head():
    student, teacher, _ = pair(1)
    target = labels(2, 4, 6, classes=2, ignored=0.0)
    expected = pixelwise_kl_div(student, teacher, target, alpha=0.5)
    assert torch.equal(pixelwise_kl_div(student, teacher, target.bool(), alpha=0.5), expected)


# ---------------------------------------------------------------------- lean
VARIANTS = {
    'softmax': dict(classes=5),
    'sigmoid': dict(classes=5, sigmoid=True),
    'binary': dict(classes=1),
    'alpha': dict(classes=5, alpha=0.3),
    'binary-alpha': dict(classes=1, alpha=0.3),
}
#: Relative tolerances of value and gradient. What is half precision is computed in float32, so the value is as exact;
#: of the gradient the same float32 numbers are rounded to the input's type, by at most one last place differently.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (1e-6, 2**-7),
    torch.float16: (1e-6, 2**-10),
}


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('masked', [False, True])
# On 3 images of 7 rows of 4 pixels: one row, two and three rows, two images, everything at once.
@pytest.mark.parametrize('chunk', [1, 45, 70, 300, 10**6])
def test_lean_equals_plain(dtype, variant, masked, chunk, small_chunks):
    small_chunks(chunk)
    options = dict(VARIANTS[variant])
    classes = options.pop('classes')
    if 'alpha' in options and not masked:
        target = labels(3, 7, 4, classes=max(classes, 2), ignored=0.0)
    else:
        target = labels(3, 7, 4, classes=max(classes, 2)) if masked else None
    teacher = random(3, classes, 7, 4, seed=1, dtype=dtype)
    results = []
    for lean in (False, True):
        student = random(3, classes, 7, 4, dtype=dtype).requires_grad_()
        value = pixelwise_kl_div(student, teacher, target, temperature=2.0, lean=lean, **options)
        # Gradients of half precision need the factor, as a GradScaler gives it.
        (512 * value).backward()
        assert value.dtype == (dtype if dtype == torch.float64 else torch.float32) and student.grad.dtype == dtype
        results.append((value.detach(), student.grad))
    (plain, plain_gradient), (lean, lean_gradient) = results
    rtol, gradient_rtol = TOLERANCES[dtype]
    torch.testing.assert_close(lean, plain, rtol=rtol, atol=0)
    scale = plain_gradient.abs().max().item()
    torch.testing.assert_close(lean_gradient, plain_gradient, rtol=gradient_rtol, atol=gradient_rtol * scale)


@pytest.mark.parametrize('options', [{}, dict(sigmoid=True), dict(alpha=0.3)], ids=str)
@pytest.mark.parametrize('grid', [(3, 4), (2, 2)])
def test_gradcheck_of_the_lean_path(options, grid, small_chunks):
    small_chunks(20)
    student, teacher = random(2, 3, *grid).requires_grad_(), random(2, 3, 3, 4, seed=1)
    target = labels(2, 3, 4, classes=3)
    assert torch.autograd.gradcheck(
        lambda s: pixelwise_kl_div(s, teacher, target, temperature=2.0, lean=True, **options), student
    )


def test_gradient_of_the_lean_path_is_scaled_by_what_follows():
    student, teacher, target = pair()
    student.requires_grad_()
    value = pixelwise_kl_div(student, teacher, target, lean=True)
    single = torch.autograd.grad(value, student, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value.square(), student)[0], 2 * value.detach() * single)


@pytest.mark.parametrize(
    'change',
    [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)],
)
def test_lean_path_takes_any_memory_layout(change, small_chunks):
    small_chunks(45)
    student, teacher, target = pair()
    results = []
    for layout in (lambda x: x, change):
        leaf = layout(student).detach().requires_grad_()
        value = pixelwise_kl_div(leaf, layout(teacher), target, lean=True)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


def test_lean_path_keeps_nothing_but_its_inputs():
    student, teacher, target = pair()
    student.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pixelwise_kl_div(student, teacher, target, lean=True)
    maps = [x for x in kept if x.numel() >= student.numel()]
    assert {x.data_ptr() for x in maps} == {student.data_ptr(), teacher.data_ptr()}


def test_lean_path_cannot_be_differentiated_twice():
    student, teacher, _ = pair()
    student.requires_grad_()
    value = pixelwise_kl_div(student, teacher, lean=True).square()
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()
    value = pixelwise_kl_div(student, teacher, lean=False).square()
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    gradient.square().sum().backward()
    assert student.grad.any()


def test_several_threads_work_on_larger_chunks(monkeypatch):
    for threads, expected in ((1, 2**20), (2, 2**22), (16, 2**22)):
        monkeypatch.setattr(torch, 'get_num_threads', lambda threads=threads: threads)
        assert MODULE._chunk_size(torch.empty(1)) == expected
        assert MODULE._chunk_size(torch.empty(1, device='meta')) == 2**22


def test_chunks_cover_every_pixel_once(small_chunks):
    for shape, size in itertools.product([(3, 5, 7, 4), (1, 2, 3, 1), (4, 1, 1, 9)], [1, 20, 45, 70, 300, 10**6]):
        small_chunks(size)
        count = torch.zeros(shape[0], *shape[2:])
        for part in MODULE._chunks(torch.empty(shape)):
            count[part] += 1
            assert count[part].numel() * shape[1] <= max(size, shape[1] * shape[3])
        assert (count == 1).all()


def test_size_decides_unless_told(small_chunks):
    student, teacher, _ = pair()
    student.requires_grad_()

    def is_lean(**options):
        value = pixelwise_kl_div(student, teacher, **options)
        return '_LeanPixelLoss' in str(value.grad_fn.next_functions[0][0].next_functions[0][0])

    small_chunks(student.numel() // 16)
    assert [is_lean(), is_lean(lean=False)] == [True, False]
    small_chunks(student.numel() // 16 + 1)
    assert [is_lean(), is_lean(lean=True)] == [False, True]


@either_path
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype, lean):
    """Also the resize."""
    student, teacher = random(2, 5, 4, 6, dtype=dtype), random(2, 5, 2, 3, seed=1, dtype=dtype)
    expected = pixelwise_kl_div(student.double(), teacher.double())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = pixelwise_kl_div(student, teacher, lean=lean)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_backward_under_autocast_changes_nothing():
    student, teacher, _ = pair(dtype=torch.float32)
    gradients = []
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
            pixelwise_kl_div(leaf, teacher, lean=True).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize('options', [{}, dict(lean=True, alpha=0.5)], ids=str)
def test_compiles(options, small_chunks):
    small_chunks(60)
    student, teacher, target = pair(dtype=torch.float32)
    student.requires_grad_()
    compiled = torch.compile(pixelwise_kl_div, backend='eager')
    value, expected = (f(student, teacher, target, **options) for f in (compiled, pixelwise_kl_div))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, student) for v in (value, expected)))


# ---------------------------------------------------------------------- what is refused
def test_wrong_maps_are_refused():
    student, teacher, _ = pair()
    for args, message in (
        ((student, teacher[:, :3]), r'\(2, 5, 4, 6\).*\(2, 3, 4, 6\); only the grids'),
        ((student, teacher[:1]), r'\(2, 5, 4, 6\).*\(1, 5, 4, 6\)'),
        ((student[0], teacher[0]), r'student must be \(B, C, H, W\), got \(5, 4, 6\)'),
        ((student, teacher[0]), r'teacher must be \(B, C, H, W\), got \(5, 4, 6\)'),
        ((student, random(2, 5, 3, 7)), r'Neither of the grids \(4, 6\) \(student.*\(3, 7\) \(teacher'),
    ):
        with pytest.raises(DistillError, match=message):
            pixelwise_kl_div(*args)


def test_wrong_labels_are_refused():
    student, teacher, target = pair()
    wrong = target.clone()
    wrong[0, 0, 0] = 5
    negative = target.clone()
    negative[1, 0, 0] = -100
    for given, alpha, message in (
        (target.double(), None, r'integer labels, \(2, H, W\).*float64'),
        (target[:1], None, r'got \(1, 4, 6\)'),
        (target[0], None, r'got \(4, 6\)'),
        (target[:, None].expand(2, 2, 4, 6), None, r'got \(2, 2, 4, 6\)'),
        (target[:, :0], None, r'no pixels: \(2, 0, 6\)'),
        (target.tolist(), None, 'got list'),
        (None, 0.5, r'alpha=0\.5 mixes in the cross-entropy'),
        (wrong, 0.5, 'label 5, but the logits are of 5 classes'),
        (negative, 0.5, 'label -100'),
    ):
        with pytest.raises(DistillError, match=message):
            pixelwise_kl_div(student, teacher, given, alpha=alpha)
    with pytest.raises(DistillError, match='label 2, but the logits are of 2 classes'):
        pixelwise_kl_div(student[:, :1], teacher[:, :1], labels(2, 4, 6, classes=3), alpha=0.5)
    # Without the cross-entropy it does not matter what a label is.
    assert torch.isfinite(pixelwise_kl_div(student, teacher, wrong))


def test_hyper_parameters_that_do_not_go_together_are_refused():
    with pytest.raises(DistillError, match=r'alpha=0\.5 needs one label per pixel'):
        PixelwiseKLDivLoss(alpha=0.5, sigmoid=True)
    with pytest.raises(DistillError, match=r'share in \[0, 1\] or None, got 1\.01'):
        PixelwiseKLDivLoss(alpha=1.01)
    with pytest.raises(DistillError, match='temperature'):
        pixelwise_kl_div(*pair(), temperature=0.0)


def test_hyper_parameters_are_shown():
    shown = 'temperature=2.0, ignore_index=0, alpha=0.5, sigmoid=False, lean=None'
    assert repr(PixelwiseKLDivLoss(2.0, 0, 0.5)) == f'PixelwiseKLDivLoss({shown})'
