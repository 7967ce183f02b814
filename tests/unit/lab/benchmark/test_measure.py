"""Statistics and interleaving of the benchmark, on numbers that are known."""

import contextlib
import functools
import gc
import itertools
import mmap
import random

import pytest
import torch

from kd_plugins.errors import DistillError
from kd_plugins.lab.benchmark.measure import (
    Operators,
    Ratio,
    Spread,
    bare_forward,
    highest_memory,
    interleave,
    memory,
    milliseconds,
    random_boxes,
)


def test_quartiles_are_interpolated():
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([2.0, 1.0]) == Spread(median=1.5, low=1.25, high=1.75)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratio_is_paired():
    # A machine that slows down four times during the measurement does not blur a ratio of neighbours.
    drift = [1.0 + 0.1 * i for i in range(30)]
    ratio = Ratio.of([1.03 * d for d in drift], drift)
    assert ratio.value == pytest.approx(1.03)
    assert ratio.low == pytest.approx(1.03) and ratio.high == pytest.approx(1.03)


def test_interval_covers_the_true_median():
    # 95 % nominal; an interval far too narrow or far too wide fails.
    draw = random.Random(0)
    hits, widths = 0, []
    for _ in range(100):
        noisy = [draw.gauss(1.0, 0.1) for _ in range(30)]
        ratio = Ratio.of(noisy, [1.0] * 30, resamples=500)
        hits += ratio.low <= 1.0 <= ratio.high
        widths.append(ratio.high - ratio.low)
    assert 88 <= hits <= 100
    assert 0.05 < sum(widths) / len(widths) < 0.15


def test_verdict_needs_the_whole_interval():
    assert Ratio(1.02, 1.01, 1.04).verdict(1.05) == 'met'
    assert Ratio(1.04, 1.01, 1.06).verdict(1.05) == 'undecided'
    assert Ratio(1.10, 1.06, 1.20).verdict(1.05) == 'missed'


def test_ratio_refuses_what_is_not_paired():
    with pytest.raises(DistillError, match='paired measurements, got 2 and 1'):
        Ratio.of([1.0, 2.0], [1.0])


def test_interleave_runs_every_variant_in_every_repeat(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr('kd_plugins.lab.benchmark.measure.time.perf_counter', lambda: float(next(ticks)))
    order, waits = [], []
    variants = {name: lambda name=name: order.append((name, gc.isenabled())) for name in 'abc'}
    seconds = interleave(variants, 4, warmup=1, steps=2, synchronize=lambda: waits.append(1))
    assert seconds == {name: [0.5] * 4 for name in 'abc'}
    rounds = [order[i : i + 6] for i in range(0, len(order), 6)]
    assert len(rounds) == 5
    assert all(sorted(name for name, _ in r) == list('aabbcc') for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, 'the order varies'
    assert not any(on for _, on in order), 'no garbage collection while timing'
    assert gc.isenabled()
    assert len(waits) == 2 * 15


def test_interleave_switches_the_collector_on_again_after_an_error():
    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave({'a': fail}, 1)
    assert gc.isenabled()


def test_operators_counts_and_knows_what_waits():
    x = torch.ones(3, requires_grad=True)
    with Operators() as quiet:
        (x * 2).sum().backward()
    with Operators() as loud:
        if (x > 0).all():
            x.nonzero()
    assert quiet.waiting == 0 and quiet.total >= 3
    assert loud.waiting == 2


@pytest.mark.parametrize(
    ('call', 'waits'),
    [
        (lambda x: x[x > 0], 1),
        (lambda x: x.__setitem__(x > 0, x[:2] + 1), 1),
        (lambda x: x.unique(), 1),
        (lambda x: torch.empty(2, device='meta').cpu(), 1),
        (lambda x: torch.empty(2, device='meta').to('cpu', torch.float16), 1),
        (lambda x: torch.empty(2).copy_(torch.empty(2, device='meta')), 1),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: x.__setitem__(x > 0, 0.0), 0),
        (lambda x: x.to(torch.float16).copy_(x), 0),
        (lambda x: torch.empty(3, device='meta').copy_(x), 0),
    ],
)
def test_operators_knows_masks_and_copies_to_the_host(call, waits):
    x = torch.tensor([1.0, 2.0, -1.0])
    # There is no such copy, which nobody notices before it was asked for.
    with Operators() as count, contextlib.suppress(NotImplementedError):
        call(x)
    assert count.waiting == waits and count.total >= 1


class Network(torch.nn.Module):
    """A detector as MMEngine's: its parts are called one after the other, the head through ``forward``."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU())
        self.head = torch.nn.Conv2d(4, 2, 1)
        self.head.forward = functools.partial(type(self.head).forward, self.head)


def test_bare_forward_repeats_the_outermost_calls_alone():
    network = Network().requires_grad_(False)
    found, own = [], network.head.forward

    def step():
        images = torch.ones(1, 3, 4, 4) * 2 + 1
        with torch.autocast('cpu', torch.bfloat16):
            found.append(network.head.forward(network.backbone(images)) * 3)

    images = torch.ones(1, 3, 4, 4)
    with Operators() as needed, torch.autocast('cpu', torch.bfloat16):
        network.head.forward(network.backbone(images))
    bare = bare_forward([network], step)
    assert network.head.forward is own and 'forward' not in vars(network.backbone), 'the network is as it was'
    with Operators() as count:
        bare()
    assert len(found) == 1 and count.total == needed.total > 2
    with pytest.raises(DistillError, match='did not run in a distilled step'):
        bare_forward([network], lambda: None)
    assert network.head.forward is own


def use(mebibytes):
    """Touch memory and give it back. Pages of its own: malloc would serve a tensor from what earlier tests freed."""
    with mmap.mmap(-1, mebibytes * 2**20) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1


def test_peak_memory_is_of_now():
    device = torch.device('cpu')
    before = memory(device)
    use(256)
    peak = highest_memory(lambda: use(64), 2, device)
    if None in (before, peak):
        pytest.skip('resident memory cannot be measured on this system')
    assert 48 * 2**20 < peak - before < 96 * 2**20, f'{peak - before} bytes for 64 MiB'


def test_peak_memory_that_cannot_be_forgotten_is_not_reported(monkeypatch):
    def refuse(path, text):
        raise PermissionError(path)

    monkeypatch.setattr('kd_plugins.lab.benchmark.measure.Path.write_text', refuse)
    steps = []
    assert highest_memory(lambda: steps.append(1), 1, torch.device('cpu')) is None and not steps


def test_random_boxes_lie_in_the_image():
    size = torch.tensor([200, 100])
    boxes = random_boxes(500, size, torch.Generator().manual_seed(0))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (boxes >= 0).all() and (boxes[:, 2:] <= size + 1e-3).all()
    assert (sides >= 0.03 * size - 1e-3).all() and (sides <= 0.8 * size + 1e-3).all()
    assert (sides / size).median() < 0.25, 'small ones prevail'


def test_durations_have_three_digits():
    assert [milliseconds(s) for s in (12.3456, 0.123456, 0.00123456, 0)] == ['12346 ms', '123 ms', '1.23 ms', '0 ms']
