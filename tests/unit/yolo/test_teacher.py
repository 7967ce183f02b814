"""Loading a .pt file as a teacher: complete, safe, cheap, and equal to the model it came from."""

import copy
import os
import re
import shutil

import pytest
import torch

from kd_plugins.distiller import Tap, resolver_of
from kd_plugins.errors import DistillError
from kd_plugins.predictions import DensePredictions, MaskPredictions, form_named, read
from kd_plugins.teachers import find_source
from kd_plugins.yolo import DistillCallback
from kd_plugins.yolo.heads import head_of, head_path, is_end_to_end, select_branch
from kd_plugins.yolo.host import UltralyticsHost
from kd_plugins.yolo.teacher import crop_levels, find_teacher, load_model, load_teacher

FAMILIES = ['yolov8n.yaml', 'yolov9t.yaml', 'yolov10n.yaml', 'yolo12n.yaml', 'yolo26n.yaml', 'yolo26n-seg.yaml']
FAMILIES += ['yolo26n-pose.yaml', 'yolo11n-obb.yaml', 'yolo26n-obb.yaml', 'yolov8n-p6.yaml']


@pytest.fixture
def image():
    return torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(0))


def output(teacher, image):
    path = head_path(teacher.model)
    return teacher.outputs(image, None, [path]).call(path).output


def expecting(path, *branches, form=DensePredictions):
    """A teacher that has been told which branches are tapped."""
    teacher = load_teacher(path)
    taps = [teacher.tap(Tap(f'head.{b}' if is_end_to_end(head_of(teacher.model)) else 'head')) for b in branches]
    teacher.expect([(tap, form) for tap in taps])
    return teacher


def reference(path, image):
    """Raw predictions of the model in the file, unfused, with only the head in training mode."""
    model = load_model(path)
    head_of(model).training = True
    with torch.no_grad():
        return model(image)


@pytest.mark.parametrize('cfg', FAMILIES)
def test_raw_output_is_that_of_the_model_in_the_file(teacher_file, image, cfg):
    path = teacher_file(cfg)
    teacher = expecting(path, 'one2many', 'one2one')
    found, expected = output(teacher, image), reference(path, image)
    for branch in ('one2many', 'one2one'):
        ours, theirs = select_branch(found, branch), select_branch(expected, branch)
        for key in ('boxes', 'scores'):
            torch.testing.assert_close(ours[key], theirs[key], atol=2e-3, rtol=2e-3)
        assert [f.shape[-2:] for f in ours['feats']] == [f.shape[-2:] for f in theirs['feats']]
    head = head_of(teacher.model)
    assert torch.isfinite(
        read(head, found, training=False).boxes() if 'obb' not in cfg else found['one2many']['boxes']
    ).all()


def test_nothing_is_computed_that_is_not_used(teacher_file, image):
    """No decoding, top-k, prototypes, mask coefficients, BN or second branch."""
    teacher = load_teacher(teacher_file('yolo26n-seg.yaml'))
    head = head_of(teacher.model)
    called = []
    head.proto.forward = lambda *x: called.append('proto')
    head.postprocess = lambda *x: called.append('postprocess')
    for name in ('cv4', 'one2one_cv2', 'one2one_cv3', 'one2one_cv4'):
        for layer in getattr(head, name):
            layer.forward = lambda *x, name=name: called.append(name)
    found = output(teacher, image)
    assert not called and set(found) == {'one2many'} and set(found['one2many']) == {'boxes', 'scores', 'feats'}
    body = [m for layer in list(teacher.model.model)[:-1] for m in layer.modules()]
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in body)


def test_what_is_asked_for_is_computed(teacher_file, image):
    """Each branch that is tapped, and masks where they are compared."""
    path = teacher_file('yolo26n-seg.yaml')
    found = output(expecting(path, 'one2one', form=MaskPredictions), image)
    assert set(found) == {'one2one'} and {'mask_coefficient', 'proto'} < set(found['one2one'])
    assert set(output(expecting(path, 'one2many', 'one2one'), image)) == {'one2many', 'one2one'}


@pytest.mark.parametrize('cfg', ['yolo11n-pose.yaml', 'yolo26n-pose.yaml'])
def test_a_users_form_is_given_all_that_the_head_has(teacher_file, image, own_files, cfg):
    """What it reads of it is the user's affair; keypoints are in none of our forms."""
    path, _ = teacher_file(cfg), resolver_of([own_files['keypoints']])
    found = output(expecting(path, 'one2many', form=form_named('keypoints')), image)
    ours, theirs = (select_branch(raw)['kpts'] for raw in (found, reference(path, image)))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert 'kpts' not in output(expecting(path, 'one2many'), image)['one2many']


def test_what_padding_added_is_cut_off_whatever_a_position_has():
    """Two levels of 2x2 and 1x1 cells that become 1x2 and 1x1."""
    raw = dict(
        boxes=torch.arange(5.0).view(1, 1, 5), kpts=torch.arange(10.0).view(1, 2, 5), proto=torch.zeros(1, 3, 5, 5)
    )
    raw['feats'] = [torch.zeros(1, 0, 2, 2), torch.zeros(1, 0, 1, 1)]
    cut = crop_levels(raw, [(2, 2), (1, 1)], [8, 16], {8: (1, 2)})
    assert cut['boxes'].tolist() == [[[0, 1, 4]]] and cut['kpts'].tolist() == [[[0, 1, 4], [5, 6, 9]]]
    assert cut['proto'] is raw['proto'] and cut['feats'][0].shape == (1, 0, 1, 2)


def test_features_are_the_layers_before_the_head(teacher_file, image):
    path = teacher_file('yolo11n.yaml')
    teacher = load_teacher(path)
    without = output(teacher, image)['one2many']['feats']
    assert [f.numel() for f in without] == [0, 0, 0]
    tap = teacher.tap(Tap('neck'))
    assert list(tap.modules) == ['model.16', 'model.19', 'model.22']
    found = teacher.outputs(image, None, tap.modules).maps(tap)
    for ours, theirs in zip(found, reference(path, image)['feats'], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


def test_frozen_and_never_changed(teacher_file, image):
    teacher = load_teacher(teacher_file('yolo11n.yaml'))
    before = teacher.fingerprint()
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training
    assert not output(teacher, image)['one2many']['scores'].requires_grad
    assert teacher.fingerprint() == before


def test_loading_leaves_random_generators_alone(teacher_file, image):
    path = teacher_file('yolov10n.yaml')
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_teacher(path)
    assert torch.equal(torch.rand(4), expected)


def test_one_branch_is_left_in_a_fused_file(tmp_path, teacher_file, image):
    model = load_model(teacher_file('yolo26n.yaml'))
    model.end2end = True
    model.fuse(verbose=False)
    torch.save({'model': model}, tmp_path / 'fused.pt')
    found = output(load_teacher(str(tmp_path / 'fused.pt')), image)
    expected = model(image)[1]['one2one']
    assert set(found) == {'one2one'}
    torch.testing.assert_close(found['one2one']['scores'], expected['scores'], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('size', [(96, 160), (64, 64), (32, 96)])
def test_padding_for_a_deeper_pyramid_is_cut_off(teacher_file, size):
    """A stride-64 teacher on sides that only 32 divides: its cells keep their places."""
    path = teacher_file('yolov8n-p6.yaml')
    teacher = load_teacher(path)
    head = head_of(teacher.model)
    h, w = size
    image = torch.rand(1, 3, h, w)
    raw = select_branch(output(teacher, image))
    sizes, strides = [tuple(f.shape[-2:]) for f in raw['feats']], head.stride.tolist()
    wanted = {s: (h // s, w // s) for s in (8, 16, 32)}
    cut = read(head, crop_levels(raw, sizes, strides, wanted), training=False)
    assert cut.level_sizes[:3] == tuple(wanted.values())
    padded = torch.full((1, 3, h + -h % 64, w + -w % 64), 114 / 255)
    padded[:, :, :h, :w] = image
    whole = read(head, select_branch(output(teacher, padded)), training=False)
    # Position by position: the cell whose centre is the same pixel.
    index = {
        place: i
        for i, place in enumerate(zip(map(tuple, whole.points.tolist()), whole.stride_of[:, 0].tolist(), strict=True))
    }
    keep = [index[place] for place in zip(map(tuple, cut.points.tolist()), cut.stride_of[:, 0].tolist(), strict=True)]
    torch.testing.assert_close(cut.cls, whole.cls[:, keep])
    torch.testing.assert_close(cut.ltrb, whole.ltrb[:, keep])
    assert crop_levels(raw, sizes, strides, {}) is raw


def test_follows_precision_and_memory_format(teacher_file, build, image):
    teacher = load_teacher(teacher_file('yolo11n.yaml'))
    exact = output(teacher, image)['one2many']['scores']
    student = copy.deepcopy(build('yolo11n.yaml'))
    host = UltralyticsHost(student)
    assert host.for_teacher(image) is image and teacher.to(image).dtype == torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cast = host.for_teacher(image)
        half = output(teacher.to(cast), cast)['one2many']['scores']
    assert teacher.dtype == cast.dtype == half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().mean() < 0.1
    host.match_memory_format(teacher.to(image))
    assert teacher.model.model[1].conv.weight.is_contiguous()
    student.to(memory_format=torch.channels_last)
    host.match_memory_format(teacher)
    weight = teacher.model.model[1].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and teacher.dtype == torch.float32
    # There and back through bfloat16 rounds the weights; the run never goes back.
    assert (output(teacher, image)['one2many']['scores'] - exact).abs().mean() < 0.1


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f'touch {self.target}',)


def test_a_file_cannot_run_code(tmp_path):
    torch.save({'model': Exploit(tmp_path / 'ran')}, tmp_path / 'evil.pt')
    with pytest.raises(DistillError, match=r"evil.pt' .* cannot be loaded: .*trusted=True"):
        load_model(str(tmp_path / 'evil.pt'))
    assert not (tmp_path / 'ran').exists()


def test_damaged_files(tmp_path, teacher_file):
    good = open(teacher_file('yolo11n.yaml'), 'rb').read()
    for name, content in (('cut.pt', good[: len(good) // 2]), ('empty.pt', b''), ('text.pt', b'not a model')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DistillError, match=rf'{name}.*cannot be loaded'):
            load_model(str(tmp_path / name))
    torch.save({'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'mmdet.pt')
    with pytest.raises(DistillError, match='holds no Ultralytics model'):
        load_model(str(tmp_path / 'mmdet.pt'))


def test_nan_weights_are_refused(tmp_path, teacher_file):
    model = load_model(teacher_file('yolo11n.yaml'))
    model.model[3].conv.weight.data[0] = float('nan')
    torch.save({'model': model}, tmp_path / 'nan.pt')
    with pytest.raises(DistillError, match=r"NaN or infinite weights in 'model.3.conv.weight'"):
        load_model(str(tmp_path / 'nan.pt'))


def test_ema_is_the_teacher_of_an_unfinished_run(tmp_path, teacher_file):
    first, second = (load_model(teacher_file('yolo11n.yaml', seed=s)) for s in (1, 2))
    torch.save({'model': first, 'ema': second}, tmp_path / 'last.pt')
    loaded = load_model(str(tmp_path / 'last.pt'))
    assert torch.equal(loaded.model[0].conv.weight, second.model[0].conv.weight)


def test_find_teacher(tmp_path, teacher_file, monkeypatch):
    path = shutil.copy(teacher_file('small.yaml'), tmp_path / 'best.pt').as_posix()
    monkeypatch.chdir(tmp_path)
    assert find_teacher('best.pt') == path and find_teacher(path) == path
    for given, message in (
        ('besst.pt', r"does not exist; in '.': did you mean 'best.pt'"),
        ('runs/none/best.pt', "neither does the folder 'runs/none'"),
        ('yolo11n.yaml', 'not a .pt file'),
        ('', 'must be the path'),
        (None, 'must be the path'),
        (3, 'must be the path'),
    ):
        with pytest.raises(DistillError, match=message):
            find_teacher(given)
    (tmp_path / 'folder.pt').mkdir()
    with pytest.raises(DistillError, match='is a folder'):
        find_teacher('folder.pt')


def one_sentence(error):
    text = str(error.value)
    return len(text) < 400 and '\n' not in text


@pytest.fixture
def places(monkeypatch, tmp_path):
    """An empty folder of weights of Ultralytics, another to be in, and no network: what would be asked is listed."""
    import ultralytics.utils.checks as checks
    import ultralytics.utils.downloads as downloads
    from ultralytics.utils import SETTINGS

    for name in ('here', 'kept'):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setitem(SETTINGS, 'weights_dir', str(tmp_path / 'kept'))
    asked = []

    def fetch(url, file=None, dir=None, **options):
        asked.append(url)
        path = os.path.join(dir or '.', file)
        with open(path, 'wb') as target:
            target.write(b'x')
        return path

    monkeypatch.setattr(downloads, 'safe_download', fetch)
    monkeypatch.setattr(
        checks, 'resolve_platform_uri', lambda uri, hard=True: f'https://signed.invalid/{uri[5:]}.pt?key=1'
    )
    return asked


@pytest.mark.parametrize(
    'given, asked, file',
    [
        ('yolo11x.pt', 'https://github.com/.*/yolo11x.pt', 'here/yolo11x.pt'),
        ('yolo11x', 'https://github.com/.*/yolo11x.pt', 'here/yolo11x.pt'),
        ('yolov5n.pt', 'https://github.com/.*/yolov5nu.pt', 'here/yolov5nu.pt'),
        ('../kept/yolo11x.pt', 'https://github.com/.*/yolo11x.pt', 'kept/yolo11x.pt'),
        ('https://a.invalid/x/teacher.pt?download=true', 'https://a.invalid/x/teacher.pt.*', 'kept/teacher.pt'),
        ('ul://me/project/model', 'https://signed.invalid/me/project/model.pt.*', 'kept/me/project/model/model.pt'),
    ],
)
def test_what_ultralytics_fetches_is_fetched(places, tmp_path, given, asked, file):
    """Once, before training starts."""
    for _ in range(2):
        assert find_teacher(given) == str(tmp_path / file)
        assert len(places) == 1 and re.fullmatch(asked, places[0])


def test_the_folder_of_weights(places, tmp_path):
    """Where ``YOLO('mine.pt')`` looks as well."""
    (tmp_path / 'kept' / 'mine.pt').write_bytes(b'x')
    assert find_teacher('mine.pt') == str(tmp_path / 'kept' / 'mine.pt')
    (tmp_path / 'here' / 'mine.pt').write_bytes(b'x')
    assert find_teacher('mine.pt') == str(tmp_path / 'here' / 'mine.pt') and not places


@pytest.mark.parametrize('given', ['yolo11x.pt', 'https://a.invalid/teacher.pt', 'ul://me/project/model'])
def test_without_a_network(places, monkeypatch, given):
    import ultralytics.utils.downloads as downloads

    def fail(**options):
        raise ConnectionError('no network\nat all')

    monkeypatch.setattr(downloads, 'safe_download', fail)
    with pytest.raises(DistillError, match=r'could not be downloaded \(ConnectionError: no network\); give') as error:
        find_teacher(given)
    assert one_sentence(error) and repr(given) in str(error.value)


def test_an_address_of_something_else(places):
    with pytest.raises(DistillError, match=r"'https://a\.invalid/models/AbC' \(AbC\) is not a \.pt file"):
        find_teacher('https://a.invalid/models/AbC')
    with pytest.raises(DistillError, match=r"teacher 'grpc://a/b' is not a \.pt file"):
        find_teacher('grpc://a/b')


# ------------------------------------------------------------------ objects
def test_a_loaded_model_is_named_by_its_file(teacher_file):
    from ultralytics import YOLO

    path = teacher_file('yolo11n.yaml')
    yolo = YOLO(path)
    for given in (yolo, yolo.model):
        with pytest.raises(
            DistillError, match=rf'type {type(given).__name__}: write teacher={path!r}, the file'
        ) as error:
            DistillCallback(given)
        assert one_sentence(error)
        with pytest.raises(DistillError, match='write teacher='):
            find_source(dict(ultralytics=given))


def test_after_training_the_file_is_the_trained_one(teacher_file, tmp_path):
    """A `YOLO` that was trained still has the path of the file that it started from."""
    from ultralytics import YOLO

    start, best = teacher_file('yolo11n.yaml', name='start.pt'), teacher_file('yolo11n.yaml', name='best.pt', seed=1)
    yolo = YOLO(start)
    yolo.model = YOLO(best).model  # what `train()` does at its end
    assert yolo.ckpt_path == start
    with pytest.raises(DistillError, match=rf'write teacher={best!r}'):
        find_teacher(yolo)


def test_a_model_that_is_in_no_file(build):
    from ultralytics import YOLO

    model = build('yolo11n.yaml')
    yolo = YOLO('yolo11n.yaml')
    for given, how in (
        (model, r"torch\.save\(\{'model': model\}, 'teacher\.pt'\)"),
        (yolo, r"model\.save\('teacher\.pt'\)"),
        (torch.nn.Linear(1, 1), r'torch\.save'),
    ):
        with pytest.raises(DistillError, match=rf'type {type(given).__name__}: save it by {how}') as error:
            DistillCallback(given)
        assert one_sentence(error)
    with pytest.raises(DistillError, match='got an object of type') as error:
        find_teacher(['x' * 99] * 99)
    assert one_sentence(error)


def test_a_whole_network_in_a_file(tmp_path, teacher_file):
    """Ultralytics takes its layers for the model; what is advised loads."""
    network = load_model(teacher_file('yolo11n.yaml'))
    torch.save(network, tmp_path / 'whole.pt')
    with pytest.raises(
        DistillError, match=r'holds a whole network.*torch\.save\(\{.model.: network\}, path\)'
    ) as error:
        load_model(str(tmp_path / 'whole.pt'))
    assert one_sentence(error)
    torch.save({'model': network}, tmp_path / 'teacher.pt')
    assert torch.equal(load_model(str(tmp_path / 'teacher.pt')).model[0].conv.weight, network.model[0].conv.weight)
