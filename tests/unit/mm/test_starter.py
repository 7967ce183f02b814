"""What a starter's configs say, and what is refused before one is written."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from kd_plugins.errors import DistillError

pytest.importorskip('mmengine')
from kd_plugins.mm.starter import based, coco, images, page, segmentation

IMAGES = dict(model='test_resnet', epochs=20, batch_size=4, lr=1e-3, input_size=None, workers=0, pretrained=False)
IMAGES |= dict(initial_checkpoint=None, amp=False, seed=None)


@pytest.fixture(autouse=True)
def as_written(monkeypatch):
    """yapf takes its time."""
    monkeypatch.setattr(based, 'layout', lambda text: text)
    monkeypatch.setattr(images, 'layout', lambda text: text)


def run(text):
    """The names that a config without a base defines."""
    names = {}
    exec(text, names)
    return names


# ------------------------------------------------------------------ image folders
def folder(root, train='train', val='val', classes=('1', '2', '10')):
    for split in (train, val):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(root / split / name / 'a.png')
    return root


def test_an_image_folder(tmp_path):
    pytest.importorskip('timm')
    args = argparse.Namespace(**{**IMAGES, 'input_size': [1, 32, 48], 'seed': 4, 'amp': True})
    found = images.look(str(folder(tmp_path, 'training', 'validation')))
    config = run(images.text(args, found, dict(type='kd_plugins.DistillHook', recipe='kl'), 'a command'))
    model, train = config['model'], config['train_dataloader']
    assert (model['num_classes'], model['input_size'], model['in_chans']) == (3, (32, 48), 1)
    assert config['optim_wrapper']['type'] == 'AmpOptimWrapper' and config['randomness'] == dict(seed=4)
    assert (train['dataset']['split'], config['val_dataloader']['dataset']['split']) == ('training', 'validation')
    # Of a folder that is not called train the data set of validation would not know the classes.
    assert train['dataset']['classes'] == ('1', '10', '2') and train['drop_last'] is False
    assert [s['begin'] for s in config['param_scheduler']] == [0, 2]
    assert config['default_hooks']['distill']['recipe'] == 'kl'


def test_timm_numbers_the_folders_in_its_own_order(tmp_path):
    pytest.importorskip('timm')
    found = images.look(str(folder(tmp_path)))
    assert images.order_of(dict(timm='x', num_classes=3), found) == dict(classes=['1', '2', '10'])
    for other in (dict(timm='x', num_classes=5), dict(config='x.py'), dict(timm='x', num_classes=3, classes=['a'] * 3)):
        assert images.order_of(other, found) == {}


@pytest.mark.parametrize(
    ('splits', 'message'), [(('cat', 'dog'), 'no train/ and val/ .it holds cat, dog.'), (('train', 'x'), 'no val/ ')]
)
def test_a_folder_without_splits(tmp_path, splits, message):
    with pytest.raises(DistillError, match=message):
        images.look(str(folder(tmp_path, *splits)))


def test_half_of_the_starter(tmp_path):
    for given, message in (
        (dict(config='x.py', model='m'), "leave them out, or 'x.py'"),
        (dict(config=None, model='m', data=None), '--data is missing'),
        (dict(config=None, model=None, data='d'), '--model is missing'),
    ):
        with pytest.raises(DistillError, match=message):
            images.begin(argparse.Namespace(**{**dict(data=None), **given}), [])


def test_what_somebody_changed_stays(tmp_path):
    first = page.free_path(tmp_path / 'a' / 'x.py', 'one\n')
    assert page.free_path(first, 'one\n') == first
    first.write_text('mine\n')
    second = page.free_path(first, 'one\n')
    assert (first.read_text(), second.read_text(), second.name) == ('mine\n', 'one\n', 'x_2.py')


# ------------------------------------------------------------------ COCO
def annotations(path, names=('b', 'a'), **more):
    path.parent.mkdir(exist_ok=True)
    Image.new('RGB', (8, 8)).save(path.parent / 'x.png')
    content = dict(
        images=[dict(id=1, file_name='x.png', width=8, height=8)],
        categories=[dict(id=9 - i, name=n) for i, n in enumerate(names)],
        annotations=[dict(id=1, image_id=1, category_id=9, bbox=[0, 0, 4, 4], area=16, iscrowd=0)],
    )
    path.write_text(json.dumps({**content, **more}))
    return [str(path), str(path.parent)]


def test_categories_are_numbered_in_the_order_of_the_file(tmp_path):
    """As mmdet does, whatever their ids are."""
    assert coco.read(*annotations(tmp_path / 'a.json'), '--train').classes == ('b', 'a')
    other = annotations(tmp_path / 'b.json', ('a', 'b'))
    args = argparse.Namespace(train=annotations(tmp_path / 'a.json'), val=other, student='x')
    with pytest.raises(DistillError, match='list other categories, or in another order'):
        coco.text(args, '')


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (dict(images=[]), '0 images and 1 annotations'),
        (dict(categories=[]), 'no names of their own'),
        (dict(images=[dict(file_name='y.png')]), "'y.png', is not in"),
        (dict(annotations=[]), '1 images and 0 annotations'),
        (dict(annotations=None), 'is no COCO file'),
    ],
)
def test_what_is_no_coco_file(tmp_path, more, message):
    with pytest.raises(DistillError, match=message):
        coco.read(*annotations(tmp_path / 'a.json', **more), '--train')


# ------------------------------------------------------------------ label maps
def maps(root, values=(0, 1, 11), image='{}.jpg', label='{}.png', mode='L'):
    for name in ('images', 'maps'):
        (root / name).mkdir(parents=True)
    for i, value in enumerate(values):
        Image.new('RGB', (40, 30)).save(root / 'images' / image.format(i))
        pixels = np.full((30, 40), value, np.uint8)
        Image.fromarray(pixels).convert(mode).save(root / 'maps' / label.format(i))
    return str(root / 'images'), str(root / 'maps')


@pytest.mark.parametrize(
    ('image', 'label', 'suffixes'),
    [
        ('{}.jpg', '{}.png', ('.jpg', '.png')),
        ('{}.png', '{}.png', ('.png', '.png')),
        ('c_{}_leftImg8bit.png', 'c_{}_gtFine_labelTrainIds.png', ('_leftImg8bit.png', '_gtFine_labelTrainIds.png')),
    ],
)
def test_label_maps(tmp_path, image, label, suffixes):
    found = segmentation.read(*maps(tmp_path, image=image, label=label), '--train')
    assert (found.suffixes, found.size, found.values, found.count) == (suffixes, (40, 30), (0, 1, 11), 3)


def test_label_maps_that_are_none(tmp_path):
    with pytest.raises(DistillError, match='not a label map'):
        segmentation.read(*maps(tmp_path / 'a', mode='RGB'), '--train')
    with pytest.raises(DistillError, match='has no label map'):
        segmentation.read(*maps(tmp_path / 'b', image='x{}.png', label='y{}.png'), '--train')


def test_the_classes_of_label_maps(tmp_path):
    found = [segmentation.read(*maps(tmp_path), '--train')]

    def names(classes, ignore=255, reduce=False):
        args = argparse.Namespace(classes=classes, ignore_index=ignore, reduce_zero_label=reduce)
        return segmentation.class_names(args, found)

    assert names(['a', 'b'], 11) == ('a', 'b') and names(None, 11) == ('class0', 'class1')
    assert names(['a'], 11, True) == ('a',)
    (tmp_path / 'names.txt').write_text('sky\nroad\n')
    assert names([str(tmp_path / 'names.txt')], 11) == ('sky', 'road')
    with pytest.raises(DistillError, match='the label maps also hold 11; pixels of no class are --ignore-index'):
        names(['a', 'b'])


# ------------------------------------------------------------------ on top of a config
def test_every_number_of_classes_is_changed():
    model = dict(
        rpn_head=dict(num_classes=1),
        roi_head=dict(
            bbox_head=[dict(num_classes=80, loss=dict(class_weight=[1.0] * 80 + [0.1])), dict(num_classes=80)]
        ),
        query=dict(num_things_classes=80, num_stuff_classes=0),
    )
    assert dict(based.class_numbers(model, 2)) == {
        '.roi_head.bbox_head[0].num_classes': 2,
        '.roi_head.bbox_head[0].loss.class_weight': [1.0, 1.0, 0.1],
        '.roi_head.bbox_head[1].num_classes': 2,
        '.query.num_things_classes': 2,
    }
    with pytest.raises(DistillError, match='no num_classes'):
        list(based.class_numbers(dict(backbone=dict(depth=18)), 2))


def test_schedulers_are_as_long_as_the_run():
    def short(given, length, steps=1000):
        return based.scheduler(given, True, length / 300, length, steps, 0.5)

    cosine = dict(type='CosineAnnealingLR', eta_min=2e-4, begin=150, end=300, T_max=150, by_epoch=True, _scope_='mmdet')
    assert short(cosine, 30) == dict(type='CosineAnnealingLR', eta_min=1e-4, begin=15, end=30, T_max=15, by_epoch=True)
    # Never empty, as MMEngine refuses that.
    assert (short(cosine, 1)['begin'], short(cosine, 1)['end'], short(cosine, 1)['T_max']) == (0, 1, 1)
    # A warm-up in iterations is kept, but is not to be the whole run.
    warm = dict(type='LinearLR', by_epoch=False, begin=0, end=500)
    assert short(warm, 30, 10_000)['end'] == 500 and short(warm, 30, 100)['end'] == 10
    assert short(dict(type='MultiStepLR', milestones=[240, 290]), 3)['milestones'] == [2, 3]


def test_code_is_python_again():
    value = dict(a=(1,), b=[dict(c=None)], d={'x.y': 'z'})
    assert eval(page.code(value)) == value
    assert len(set(page.colours(30))) == 30
