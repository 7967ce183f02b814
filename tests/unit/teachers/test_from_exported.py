"""Exported files as teachers: the same logits as the network they were exported from, in any batch."""

import io
import pickle
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim

from kd_plugins.errors import DistillError
from kd_plugins.teachers import PixelFormat, build_source, find_source
from kd_plugins.teachers.from_exported import ExportedProgram, TorchScript, kind_of

STUDENT = PixelFormat((127.5,) * 3, (127.5,) * 3, rgb=True)
PLAIN = dict(mean=(0.5,) * 3, std=(0.5,) * 3)


def small(dropout=0.0, channels=3):
    torch.manual_seed(0)
    parts = [nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*parts, nn.Dropout(dropout), nn.Linear(4, 5))
    net[1].running_mean.normal_()
    return net.eval()


class Positions(nn.Module):
    """Makes a tensor on a device that the export writes down."""

    def forward(self, x):
        return x.flatten(1)[:, :5] + torch.arange(5, device=x.device)


def export(net, path, batch=2, size=32, dims=None, channels=3):
    program = torch.export.export(net, (torch.rand(batch, channels, size, size),), dynamic_shapes=dims and (dims,))
    torch.export.save(program, path)
    return str(path)


def trace(net, path, batch=2, size=32):
    torch.jit.save(torch.jit.trace(net, torch.rand(batch, 3, size, size)), path)
    return str(path)


def build(path, **options):
    return build_source(find_source(dict(PLAIN, exported=path, **options)), STUDENT)[0]


def logits_of(teacher, images):
    return teacher.outputs(images, None, ['logits']).call('logits').output


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported')
    net = small()
    torch.jit.save(torch.jit.script(net), folder / 'scripted.pt')
    dims = {0: Dim('batch', min=3, max=4), 2: Dim('height', min=8, max=256), 3: Dim('width', min=8, max=256)}
    return net, {
        'fixed': export(net, folder / 'fixed.pt2', batch=2),
        'fixed4': export(net, folder / 'no_suffix', batch=4),
        'dynamic': export(net, folder / 'dynamic.pt2', dims={0: Dim('batch')}),
        'limited': export(net, folder / 'limited.pt2', batch=4, dims=dims),
        'scripted': str(folder / 'scripted.pt'),
        'traced': trace(net, folder / 'traced.torchscript'),
    }


@pytest.mark.parametrize('kind', ['fixed', 'fixed4', 'dynamic', 'limited', 'scripted', 'traced'])
@pytest.mark.parametrize('batch', [1, 3, 5])
def test_the_logits_of_the_network(files, kind, batch):
    net, paths = files
    teacher = build(paths[kind])
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(images)
    torch.testing.assert_close(logits_of(teacher, images), expected)
    # Whatever the student runs in.
    for given in (images.double(), images.to(memory_format=torch.channels_last)):
        torch.testing.assert_close(logits_of(teacher.to(given), given), expected)
    half = images.bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(teacher.to(half), half), net(half.float()))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(logits_of(teacher, images), expected)
    assert teacher.num_classes == 5 and teacher.head == 'logits' and teacher.kind == 'exported'


def test_another_normalisation_and_resolution(files):
    """The fixed one is given its own resolution, the free ones what they are asked to."""
    net, paths = files
    pixels = torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (255 * torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normal = (pixels - mean) / std
    for kind, options, size in (('fixed', {}, 32), ('traced', {}, 48), ('limited', dict(input_size=64), 64)):
        teacher, _ = build_source(find_source(dict(exported=paths[kind], **options)), STUDENT)
        images = normal
        if size != 48:
            images = nn.functional.interpolate(normal, (size, size), mode='bicubic', antialias=True)
        with torch.no_grad():
            expected = net(images)
        torch.testing.assert_close(logits_of(teacher, (pixels - 127.5) / 127.5), expected, atol=1e-5, rtol=1e-5)
        assert ('resized' in teacher.normalization) == (size != 48)


def test_frozen_and_without_modes(files):
    _, paths = files
    for kind in ('fixed', 'traced'):
        teacher = build(paths[kind])
        before = teacher.fingerprint()
        assert not any(p.requires_grad for p in teacher.model.parameters())
        assert teacher.parameters_count == sum(p.numel() for p in small().parameters())
        teacher.model.train().eval()
        logits_of(teacher, torch.rand(3, 3, 32, 32))
        assert teacher.fingerprint() == before and teacher.dtype == torch.float32


@pytest.mark.parametrize('kind', ['fixed', 'traced'])
def test_it_follows_the_device(files, kind):
    """Without an accelerator: to a device that only knows shapes."""
    _, paths = files
    net = (ExportedProgram if kind == 'fixed' else TorchScript)(paths[kind])
    images = torch.rand(2, 3, 32, 32)
    expected = net(images)
    net.move_to(torch.device('meta'))
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {'meta'}
    assert not any(p.requires_grad for p in net.parameters())
    if kind == 'traced':  # the values of a program stay where it was moved
        net.move_to(torch.device('cpu'))
        torch.testing.assert_close(net(images), expected)


@pytest.mark.gpu
def test_it_follows_to_the_gpu(files):
    net, paths = files
    images = torch.rand(3, 3, 32, 32)
    for path in paths.values():
        teacher = build(path)
        found = logits_of(teacher.to(images.cuda()), images.cuda())
        with torch.no_grad():
            torch.testing.assert_close(found.cpu(), net(images), atol=1e-3, rtol=1e-3)


def test_what_a_program_makes_itself_follows_too(tmp_path):
    net = ExportedProgram(export(Positions(), tmp_path / 'x.pt2'))
    net.move_to(torch.device('meta'))
    assert net.program(torch.rand(2, 3, 32, 32, device='meta')).device.type == 'meta'


def test_only_logits_can_be_tapped(files):
    _, paths = files
    for kind in ('fixed', 'scripted'):
        with pytest.raises(DistillError, match=r"teacher 'net\.1' cannot be tapped: an exported file has no layers"):
            build(paths[kind]).outputs(torch.rand(1, 3, 32, 32), None, ['net.1'])


def test_grey_program(tmp_path):
    teacher, _ = build_source(
        find_source(dict(exported=export(small(channels=1), tmp_path / 'x.pt2', channels=1))),
        PixelFormat((0.0,), (255.0,), rgb=True),
    )
    assert teacher.channels == 1 and logits_of(teacher, torch.rand(3, 1, 32, 32)).shape == (3, 5)


# ------------------------------------------------------------------ told apart by content
def test_kinds(files):
    _, paths = files
    kinds = {name: kind_of(path) for name, path in paths.items()}
    assert kinds == dict.fromkeys(('fixed', 'fixed4', 'dynamic', 'limited'), 'program') | dict.fromkeys(
        ('scripted', 'traced'), 'torchscript'
    )


def test_other_files(tmp_path):
    torch.save(small().state_dict(), tmp_path / 'weights.pt2')
    torch.save(dict(model=small().state_dict(), by='ultralytics.nn.tasks'), tmp_path / 'yolo.pt')
    (tmp_path / 'text.pt2').write_text('nothing')
    with zipfile.ZipFile(tmp_path / 'zip.pt2', 'w') as archive:
        archive.writestr('x/y', 'z')
    with zipfile.ZipFile(tmp_path / 'aoti.pt2', 'w') as archive:
        archive.writestr('x/data/aotinductor/model/x.so', 'z')
    for name, message in (
        ('weights.pt2', r"is a checkpoint, not an exported file; name its network: dict\(timm='...', checkpoint=...\)"),
        ('yolo.pt', r'of Ultralytics: write teacher=dict\(ultralytics=...\)'),
        ('text.pt2', r'is neither a torch.export program \(torch.export.save\) nor TorchScript'),
        ('zip.pt2', 'is neither'),
        ('aoti.pt2', r'compiled for one device \(AOTInductor\)'),
        ('none.pt2', 'does not exist; in '),
    ):
        with pytest.raises(DistillError, match=message):
            find_source(dict(exported=str(tmp_path / name)))


def test_damaged_files(files, tmp_path):
    _, paths = files
    for kind, ending in (('fixed', 'models/model.json'), ('scripted', 'data.pkl')):
        path = tmp_path / kind
        with zipfile.ZipFile(paths[kind]) as old, zipfile.ZipFile(path, 'w') as new:
            for name in old.namelist():
                is_it = name.endswith(ending)
                new.writestr(name, b'{' if is_it else old.read(name))
        with pytest.raises(DistillError, match=r'cannot be loaded .*; export it again, on the CPU'):
            build(str(path))


class Evil:
    def __reduce__(self):
        return print, ('this must not run',)


def test_pickled_objects_are_not_restored(files, tmp_path, capsys):
    """torch.export.load unpickles a program's example inputs without restriction when it must."""
    _, paths = files
    path, content = tmp_path / 'evil.pt2', io.BytesIO()
    torch.save(((Evil(),), {}), content)
    with zipfile.ZipFile(paths['fixed']) as old, zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            new.writestr(name, content.getvalue() if 'sample_inputs' in name else old.read(name))
    with pytest.raises(DistillError, match=r'holds pickled objects .*sample_inputs.* set teacher\.trusted=True'):
        find_source(dict(exported=str(path)))
    assert 'must not run' not in capsys.readouterr().out
    find_source(dict(exported=str(path), trusted=True))


# ------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    'kind, options, message',
    [
        ('fixed', dict(input_size=64), 'input_size is 64x64, but .* was exported for 32x32; leave the option out'),
        ('fixed', dict(in_chans=1, mean=(0.5,), std=(0.5,)), 'in_chans is 1, but .* was exported for 3'),
        ('fixed', dict(num_classes=3), 'predicts 5 classes, but 3 were expected'),
        ('traced', dict(classes=['a', 'b']), 'predicts 5 classes, but 2 were expected'),
        ('fixed', dict(checkpoint=__file__), 'an exported file has its weights in it'),
        ('fixed', dict(trusted=1), 'teacher.trusted must be True or False, got 1'),
        ('fixed', dict(input_sise=3), "no option 'input_sise': did you mean 'input_size'"),
        ('traced', dict(input_size=2), r'cannot be run on two images of 2x2 .* give teacher\.input_size'),
    ],
)
def test_refused(files, kind, options, message):
    with pytest.raises(DistillError, match=message):
        build(files[1][kind], **options)


class Two(nn.Module):
    def forward(self, x, y):
        return (x + y).mean((2, 3))


class Maps(nn.Module):
    def forward(self, x):
        return x, x


class OneImage(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)).reshape(1, 3)


def test_programs_that_are_no_classifiers(tmp_path):
    images = torch.rand(2, 3, 8, 8)
    torch.export.save(torch.export.export(Two(), (images, images)), tmp_path / 'two.pt2')
    with pytest.raises(DistillError, match=r'must take one batch of images, but takes \(2, 3, 8, 8\), \(2, 3, 8, 8\)'):
        build(str(tmp_path / 'two.pt2'))
    with pytest.raises(DistillError, match=r'must return class logits \(B, C\), but returned tuple'):
        build(export(Maps(), tmp_path / 'maps.pt2'))
    with pytest.raises(DistillError, match='cannot be run on two images'):
        build(trace(OneImage(), tmp_path / 'one.ts', batch=1, size=8), input_size=8)


@pytest.mark.parametrize('dropout', [0.0, 0.5])
@pytest.mark.parametrize('write', [export, trace])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_exported_in_training_mode(tmp_path, write, dropout):
    net = small(dropout).train()
    if dropout:
        net[1] = nn.Identity()
    with pytest.raises(DistillError, match=r'was exported in training mode.*call model\.eval\(\) before exporting'):
        build(write(net, tmp_path / 'x'), **(dict(input_size=32)))


def test_a_teacher_is_never_pickled(files):
    assert pickle.loads(pickle.dumps(build(files[1]['fixed']))) is None
