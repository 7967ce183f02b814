"""Taps: paths, what is recorded, and that nothing stays behind."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from kd_plugins.distiller import Capture, Tap, find_module
from kd_plugins.errors import DistillError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 5, 1)])
        self.unused = nn.Identity()

    def forward(self, x):
        x = self.act(self.conv(x))
        return self.head[0](x), self.head[1].forward(x)  # the second call is invisible to forward hooks


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize(
    ('text', 'module', 'index'), [('neck', 'neck', None), ('neck[1]', 'neck', 1), ('a.0.b[-1]', 'a.0.b', -1)]
)
def test_spelling(text, module, index):
    tap = Tap.parse(text, 'term')
    assert (tap.module, tap.index, str(tap)) == (module, index, text)


@pytest.mark.parametrize('text', ['', 'neck[', 'neck[a]', 'neck[1][2]', 'neck 1', None, 3, ['neck']])
def test_misspelt(text):
    with pytest.raises(DistillError, match="term 'x': student must be a module path"):
        Tap.parse(text, "term 'x': student")


def test_unknown_path_names_near_ones_and_children(net):
    with pytest.raises(DistillError, match=r"no module 'head\.2'.*head\.0.*head has the children '0', '1'"):
        find_module(net, 'head.2', 'student')
    with pytest.raises(DistillError, match="did you mean 'conv'"):
        find_module(net, 'convv', 'student')


def test_an_in_place_activation_does_not_change_the_record(net):
    x = torch.randn(2, 3, 4, 4)
    with Capture(net, ['conv'], 'student') as capture:
        net(x)
    expected = net.conv(x)
    assert (expected < 0).any()
    assert torch.equal(capture.call('conv').output, expected)


def test_a_module_called_through_forward_is_recorded(net):
    with Capture(net, ['head.0', 'head.1'], 'student') as capture:
        first, second = net(torch.randn(1, 3, 4, 4))
    assert torch.equal(capture.call('head.0').output, first)
    assert torch.equal(capture.call('head.1').output, second)


def test_records_are_differentiable(net):
    with Capture(net, ['conv'], 'student') as capture:
        net(torch.randn(1, 3, 4, 4))
    capture.call('conv').output.sum().backward()
    assert net.conv.weight.grad.abs().sum() > 0


def test_outputs_keep_their_structure_and_the_mode_of_the_call():
    class Nested(nn.Module):
        def forward(self, x):
            return {'maps': (x, [x + 1, 'text', None])}

    model = nn.Sequential(Nested()).train()
    with Capture(model, ['0'], 'student') as capture:
        model.eval()
        model(torch.zeros(1))
        model.train()
    call = capture.call('0')
    assert call.output['maps'][1][1:] == ['text', None]
    assert call.training is False
    assert [t.item() for t in capture.maps(Tap('0'))] == [0, 1]


def test_index_picks_one_output_and_refuses_others():
    class Three(nn.Module):
        def forward(self, x):
            return x, x + 1, x + 2

    model = nn.Sequential(Three())
    with Capture(model, ['0'], 'student') as capture:
        model(torch.zeros(1))
    assert capture.maps(Tap('0', 1))[0].item() == 1
    assert capture.maps(Tap('0', -1))[0].item() == 2
    for index in (3, -4):
        with pytest.raises(DistillError, match='returned 3 tensors'):
            capture.maps(Tap('0', index))


def test_a_module_that_did_not_run(net):
    with Capture(net, ['unused'], 'student') as capture:
        net(torch.randn(1, 3, 4, 4))
    with pytest.raises(DistillError, match="student module 'unused' exists but did not run"):
        capture.call('unused')


def test_a_module_that_ran_twice_has_no_single_call(net):
    with Capture(net, ['conv'], 'teacher') as capture:
        net(torch.randn(1, 3, 4, 4))
        net(torch.randn(1, 3, 4, 4))
    assert len(capture.maps(Tap('conv'))) == 2
    with pytest.raises(DistillError, match='ran 2 times'):
        capture.call('conv')


def test_reopening_forgets(net):
    capture = Capture(net, ['conv'], 'student')
    for _ in range(2):
        with capture:
            net(torch.randn(1, 3, 4, 4))
    assert len(capture.calls['conv']) == 1


def instance_forwards(model):
    return [n for n, m in model.named_modules() if 'forward' in m.__dict__]


def test_taps_are_off_after_an_exception(net):
    capture = Capture(net, ['conv', 'head.0'], 'student')
    with pytest.raises(RuntimeError), capture:
        assert instance_forwards(net) == ['conv', 'head.0']
        net(torch.randn(1, 7, 4, 4))
    assert instance_forwards(net) == []


def test_an_instance_level_forward_survives(net):
    """What MMEngine's activation checkpointing sets."""
    original = net.conv.forward
    wrapped = net.conv.forward = lambda x: checkpoint(original, x, use_reentrant=False)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with Capture(net, ['conv'], 'student') as capture:
        net(x)
    assert net.conv.forward is wrapped
    capture.call('conv').output.sum().backward()
    assert net.conv.weight.grad is not None


def test_two_captures_at_once_unwind_in_order(net):
    with Capture(net, ['conv'], 'outer') as outer, Capture(net, ['conv'], 'inner') as inner:
        net(torch.randn(1, 3, 4, 4))
    assert len(outer.calls['conv']) == len(inner.calls['conv']) == 1
    assert instance_forwards(net) == []


def test_closing_twice_is_harmless(net):
    capture = Capture(net, ['conv'], 'student').open()
    capture.close()
    capture.close()
    assert instance_forwards(net) == []


class Attention(nn.Module):
    """One head as timm writes it: the probabilities exist only without fused attention."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.attn_drop = nn.Dropout(dropout)
        self.fused_attn = True

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        if self.fused_attn:
            rate = self.attn_drop.p if self.training else 0.0
            return scaled_dot_product_attention(q, k, v, dropout_p=rate).squeeze(1)
        attention = self.attn_drop((q @ k.transpose(-2, -1) / 2).softmax(-1))
        return (attention @ v).squeeze(1)


def attending(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(Attention(dropout)), nn.Sequential(Attention(dropout))).train()


def test_attention_probabilities_exist_while_they_are_tapped():
    model, x = attending(), torch.randn(2, 5, 4)
    fused = model(x)
    with Capture(model, ['1.0.attn_drop'], 'student') as capture:
        assert [model[0][0].fused_attn, model[1][0].fused_attn] == [True, False]
        plain = model(x)
    assert torch.allclose(plain, fused, atol=1e-6)
    assert model[1][0].fused_attn is True
    (found,) = capture.maps(Tap('1.0.attn_drop'))
    assert capture.attention == {'1.0.attn_drop': model[1][0]}
    assert found.shape == (2, 1, 5, 5) and torch.allclose(found.sum(-1), torch.ones(2, 1, 5))
    found[:, :, 0].square().sum().backward()
    # Queries and keys alone make the probabilities, and all that comes before.
    assert model[1][0].qkv.weight.grad[:8].abs().min() > 0 and not model[1][0].qkv.weight.grad[8:].any()
    assert model[0][0].qkv.weight.grad[8:].abs().min() > 0


def test_dropout_does_not_thin_out_recorded_attention():
    model, x = attending(dropout=0.5), torch.randn(2, 5, 4)
    with Capture(model, ['0.0.attn_drop'], 'student') as capture:
        model(x)
    (found,) = capture.maps(Tap('0.0.attn_drop'))
    assert torch.allclose(found.sum(-1), torch.ones(2, 1, 5)) and found.min() > 0


def test_fused_attention_is_back_after_an_exception_and_stays_off_where_it_was():
    model = attending()
    model[0][0].fused_attn = False
    with pytest.raises(RuntimeError), Capture(model, ['0.0.attn_drop', '1.0.attn_drop'], 'student'):
        model(torch.randn(2, 5, 7))
    assert [model[0][0].fused_attn, model[1][0].fused_attn] == [False, True]
    assert instance_forwards(model) == []


def test_a_class_level_switch_leaves_nothing_on_the_instance():
    class ByClass(Attention):
        fused_attn = True

    model = nn.Sequential(ByClass())
    del model[0].fused_attn
    with Capture(model, ['0.attn_drop'], 'teacher') as capture:
        model(torch.randn(2, 5, 4))
    assert len(capture.calls['0.attn_drop']) == 1
    assert 'fused_attn' not in model[0].__dict__ and model[0].fused_attn


def test_the_attention_module_itself_is_its_output():
    model, x = attending(), torch.randn(2, 5, 4)
    with Capture(model, ['0.0'], 'student') as capture:
        assert model[0][0].fused_attn and not capture.attention
        model(x)
    assert torch.equal(capture.call('0.0').output, model[0][0](x))
