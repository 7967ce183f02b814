"""The mean teacher: the average of the student, in nobody's way."""

import copy
import io
import pickle
import types

import pytest
import torch
from torch import nn

from kd_plugins.distiller import AdapterBank, AdapterOptimizer, Apart, Host, Tap
from kd_plugins.errors import DistillError
from kd_plugins.predictions import ClassPredictions, DensePredictions
from kd_plugins.teachers import PixelFormat, build_source, find_source, teacher_kind
from kd_plugins.teachers.ema import EMATeacher


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 1, bias=False))
    net.add_module('again', nn.Conv2d(4, 4, 1, bias=False))
    net.again.weight = net[3].weight
    net[1].register_buffer('cache', torch.ones(2), persistent=False)
    return net


def run(model, inputs, samples, modules):
    model(inputs)


HOST = Host()
HOST.run = run


def begun(student=None, momentum=0.001):
    student = network() if student is None else student
    teacher = EMATeacher(momentum)
    teacher.begin(student, HOST)
    return student, teacher


def change(student, step):
    """Other weights and statistics."""
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
        student.train()(torch.randn(4, 3, 5, 5))


def numbers(model):
    return {k: v.double().clone() for k, v in model.state_dict().items()}


def outputs(teacher, images, module='3'):
    return teacher.outputs(images, None, [module]).call(module).output


def test_the_mean_of_all_weights_and_then_a_moving_average():
    momentum = 0.3
    student, teacher = begun(momentum=momentum)
    all_weights = [numbers(student)]
    for step in range(1, 6):
        change(student, step)
        teacher.after_step()
        all_weights.append(numbers(student))
        found = numbers(teacher.model)
        if step <= 2:
            # 1 / 2 and 1 / 3 are more than 0.3.
            expected = {k: sum(w[k] for w in all_weights) / len(all_weights) for k in found}
        else:
            expected = {k: (1 - momentum) * v + momentum * all_weights[-1][k] for k, v in expected.items()}
        for key, value in found.items():
            wanted = all_weights[-1][key] if 'tracked' in key else expected[key]
            torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    assert teacher.updates == 5
    assert found['1.running_mean'].ne(0).all() and found['1.num_batches_tracked'] == 5


def test_it_starts_as_the_student_in_evaluation_without_gradients():
    student = network().train()
    rng = torch.get_rng_state()
    _, teacher = begun(student)
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m.training for m in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(m.training for m in student.modules()) and all(p.requires_grad for p in student.parameters())
    images = torch.randn(2, 3, 4, 4)
    found = outputs(teacher, images)
    assert torch.equal(found, outputs(teacher, images)) and not found.requires_grad
    torch.testing.assert_close(found, student.eval()[3](student[1](student[0](images))).detach())
    with torch.no_grad():
        student[0].weight.add_(1)
    assert torch.equal(outputs(teacher, images), found), 'it shares weights with the student'
    assert teacher.model.again.weight is teacher.model[3].weight


def test_what_the_summary_says():
    _, teacher = begun(momentum=0.01)
    assert teacher.parameters_count == 12 + 4 + 8 + 16
    assert (teacher.kind, teacher.checkpoint) == ('ema', 'those of the student')
    assert teacher.mode == 'average with momentum 0.01, evaluation mode'


class Listener(Apart):
    """What a distillation hangs on a student."""

    def __init__(self):
        self.calls = 0

    def before(self, module, args):
        self.calls += 1

    def after(self, module, args, output):
        self.calls += 1


def test_what_a_run_has_hung_on_the_student_is_not_copied():
    student, listener, images = network(), Listener(), torch.randn(2, 3, 4, 4)
    student.register_forward_pre_hook(listener.before)
    student[0].register_forward_hook(listener.after)
    inner, ran = student[3].forward, []

    def checkpointed(x):
        ran.append(1)
        return inner(x)

    student[3].forward = checkpointed
    _, teacher = begun(student)
    change(student, 1)
    listener.calls = 0
    ran.clear()
    found = outputs(teacher, images)
    assert not listener.calls and not ran
    assert torch.equal(found, outputs(begun(network())[1], images)), "it ran a module of the student's"
    student(images)
    assert listener.calls == 2 and ran, 'the student must keep its own'


class Scale:
    """A hook that is a part of the model, as that of `weight_norm`: without it the weight is an old one."""

    def __call__(self, module, args):
        module.weight = module.scale * module.direction

    def scaled(self, module, args, output):
        return 2 * output


def test_hooks_and_methods_of_the_model_are_copied():
    student, scale = network(), Scale()
    layer = student[3]
    direction = layer.weight.detach()
    for module in (layer, student.again):
        del module._parameters['weight']
    del student.again
    layer.scale, layer.direction = nn.Parameter(torch.ones(())), direction
    layer.register_forward_pre_hook(scale)
    layer.register_forward_hook(scale.scaled)
    # Bound to the module, as a fused layer's: a copy is bound to the copy.
    student[0].forward = types.MethodType(lambda conv, x: -nn.Conv2d.forward(conv, x), student[0])
    images = torch.randn(2, 3, 4, 4)
    _, teacher = begun(student, momentum=1.0)
    with torch.no_grad():
        layer.scale.mul_(3)
        student[0].weight.mul_(2)
    before = outputs(teacher, images)
    teacher.after_step()
    student.eval()
    torch.testing.assert_close(outputs(teacher, images, '0'), student[0](images).detach())
    assert not torch.allclose(before, outputs(teacher, images))
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(images), student(images))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_averages_in_float32_at_least(dtype):
    student, teacher = begun(network().to(dtype))
    assert teacher.dtype == torch.float32
    start = teacher.model[0].bias.clone()
    teacher.updates = 100_000
    with torch.no_grad():
        student[0].bias.add_(1)
    moved = student[0].bias.float() - start
    teacher.after_step()
    torch.testing.assert_close(teacher.model[0].bias - start, 0.001 * moved, atol=1e-6, rtol=1e-3)
    images = torch.randn(2, 3, 4, 4).to(dtype)
    teacher.to(images)
    assert teacher.dtype == torch.float32 and outputs(teacher, images).dtype == torch.float32
    assert begun(network().double())[1].dtype == torch.float64


def test_resumed_in_the_middle():
    def go(student, teacher, steps):
        for step in steps:
            change(student, step)
            teacher.after_step()

    whole = begun(momentum=0.2)
    go(*whole, range(6))
    student, teacher = begun(momentum=0.2)
    go(student, teacher, range(3))
    buffer = io.BytesIO()
    torch.save((student.state_dict(), teacher.state()), buffer)
    go(student, teacher, range(3, 6))
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    student = network()
    student.load_state_dict(weights)
    _, teacher = begun(student, momentum=0.2)
    teacher.load_state(state)
    assert teacher.updates == 3
    go(student, teacher, range(3, 6))
    assert teacher.fingerprint() == whole[1].fingerprint()


@pytest.mark.parametrize(
    ('edit', 'named'),
    [
        (lambda s: s.pop('model.0.bias'), '0.bias'),
        (lambda s: s.update({'model.x': torch.ones(1)}), 'x'),
        (lambda s: s.update({'model.0.bias': torch.ones(7)}), '0.bias'),
        (lambda s: s.pop('updates'), 'no updates'),
    ],
)
def test_the_average_of_another_model_is_refused(edit, named):
    _, teacher = begun()
    state = teacher.state()
    before = teacher.fingerprint()
    state['model.3.weight'].add_(1)
    edit(state)
    with pytest.raises(DistillError, match=rf'not of this student \({named}\); resume with the model'):
        teacher.load_state(state)
    assert teacher.fingerprint() == before


def test_copies_share_it_and_pickles_leave_it_out():
    student, teacher = begun()
    student.teacher = teacher
    assert copy.deepcopy(student).teacher is teacher
    assert pickle.loads(pickle.dumps(student)).teacher is None
    assert not any('teacher' in k for k in student.state_dict())
    # Of a student that holds the last one.
    teacher.begin(student, HOST)
    assert teacher.updates == 0


def test_it_learns_beside_adapters():
    """Both follow the student's optimizer; the student of weight 0 is the plain one."""
    plain, student = network(), network()
    teacher = begun(student)[1]
    bank = AdapterBank()
    bank.add_module('maps', nn.Conv2d(4, 4, 1))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, student)]
    AdapterOptimizer(bank, optimizers[1])
    optimizers[1].register_step_post_hook(lambda *_: teacher.after_step())
    images = torch.randn(3, 4, 3, 5, 5)
    for batch in images:
        for net, optimizer in zip((plain, student), optimizers, strict=True):
            torch.manual_seed(1)
            output = net(batch)
            loss = output.square().mean()
            if net is student:
                loss = loss + 0.0 * (bank.maps(output) - outputs(teacher, batch, 'again')).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert teacher.updates == 3
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in plain.state_dict().items())


def test_built_from_a_config():
    cfg = dict(ema=0.01)
    assert teacher_kind(cfg) == 'ema'
    teacher, notes = build_source(find_source(cfg), PixelFormat())
    assert isinstance(teacher, EMATeacher) and teacher.momentum == 0.01 and not notes
    teacher.begin(network(), HOST)
    assert outputs(teacher, torch.randn(2, 3, 4, 4)).shape == (2, 4, 4, 4)


def test_a_decay_is_a_note():
    teacher, notes = build_source(find_source(dict(ema=0.999)), PixelFormat())
    assert teacher.momentum == 0.999
    assert notes == ['ema=0.999 follows the student at once; a decay of 0.999 is ema=0.001']


@pytest.mark.parametrize('value', [0, -0.1, 1.5, True, '0.001', float('nan')])
def test_no_momentum(value):
    with pytest.raises(DistillError, match=r'teacher\.ema must be the momentum .* in \(0, 1\], e\.g\. 0\.001, got'):
        find_source(dict(ema=value))


def test_misspelt():
    with pytest.raises(DistillError, match="has no option 'momentun'"):
        find_source(dict(ema=0.1, momentun=1))
    with pytest.raises(DistillError, match='must be one model, got both'):
        find_source(dict(ema=0.1, timm='resnet50'))


def test_a_head_answers_as_in_training_and_its_statistics_stay():
    student = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Flatten())
    _, teacher = begun(student)
    teacher.expect([(Tap('1'), DensePredictions), (Tap('0'), None), (Tap('2'), ClassPredictions)])
    assert [n for n, m in teacher.model.named_modules() if m.training] == ['1']
    before = teacher.fingerprint()
    outputs(teacher, torch.randn(2, 3, 4, 4), '1')
    assert teacher.fingerprint() == before
