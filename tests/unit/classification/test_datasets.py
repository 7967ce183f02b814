"""Data sets: the right image with the right label, and clear words about everything that is wrong with a folder."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.runner import Runner, set_random_seed
from PIL import Image

from kd_plugins.classification.datasets import ArrayDataset, CocoMultiLabel, ImageFolder
from kd_plugins.errors import DistillError
from kd_plugins.lab.data import prepare_digits


def save(path, value=0, mode='RGB', size=(6, 4)):
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two splits; 'ten' sorts naturally after '2', but alphabetically '10' comes first; val has no image of '2'."""
    root = tmp_path / 'pets'
    for i, name in enumerate(['10', '2', 'cat']):
        for j in range(2):
            save(root / 'train' / name / f'{j}.png', 10 * i + j)
    save(root / 'val' / 'cat' / 'x.png', 99)
    save(root / 'val' / '10' / 'sub' / 'y.JPG', 98)
    (root / 'val' / 'cat' / 'readme.txt').write_text('no image')
    return root


def test_items(folder):
    data = ImageFolder(folder, 'train')
    assert len(data) == 6 and data.metainfo == dict(classes=('10', '2', 'cat'))
    item = data[3]
    assert set(item) == {'inputs', 'data_samples'}
    assert item['inputs'].dtype == torch.uint8 and item['inputs'].shape == (3, 4, 6)
    assert item['inputs'].unique().tolist() == [11]
    sample = item['data_samples']
    assert sample.gt_label.dtype == torch.long and sample.gt_label.shape == () and sample.gt_label == 1
    assert sample.img_path == str(folder / 'train' / '2' / '1.png') and sample.img_shape == (4, 6)


def test_classes_and_files_are_torchvisions(folder):
    from torchvision.datasets import ImageFolder as Reference

    expected, ours = Reference(folder / 'train'), ImageFolder(folder, 'train')
    assert ours.metainfo['classes'] == tuple(expected.classes)
    found = [(d['data_samples'].img_path, int(d['data_samples'].gt_label)) for d in (ours[i] for i in range(len(ours)))]
    assert found == [(str(path), label) for path, label in expected.samples]


def test_splits_number_classes_alike(folder):
    """val has no image, nor even a folder, of class '2'."""
    data = ImageFolder(folder, 'val')
    assert data.metainfo['classes'] == ('10', '2', 'cat')
    labels = {d['data_samples'].img_path[-5:]: int(d['data_samples'].gt_label) for d in (data[0], data[1])}
    assert labels == {'y.JPG': 0, 'x.png': 2}


def test_without_a_split_the_own_folders_count(folder):
    assert ImageFolder(folder / 'val').metainfo['classes'] == ('10', 'cat')
    data = ImageFolder(folder / 'val', classes=['cat', 'dog', '10'])
    assert sorted(int(d['data_samples'].gt_label) for d in (data[0], data[1])) == [0, 2]


@pytest.mark.parametrize('mode', ['L', 'P', 'RGBA', 'CMYK', 'LA', '1'])
@pytest.mark.parametrize('in_chans', [1, 3])
def test_every_mode_is_converted(tmp_path, mode, in_chans):
    save(tmp_path / 'a' / f'0.{"tif" if mode == "CMYK" else "png"}', 255, mode)
    inputs = ImageFolder(tmp_path, in_chans=in_chans)[0]['inputs']
    assert inputs.shape == (in_chans, 4, 6) and inputs.min() == 255


@pytest.mark.parametrize(
    'options,message',
    [
        (dict(root='petz'), "root: there is no folder .*petz: did you mean 'pets'"),
        (dict(root='no/where'), 'does not exist either'),
        (dict(root=3), 'root must be a path, got 3'),
        (dict(split='vall'), "split: there is no folder .*vall: did you mean 'val'"),
        (dict(split=None), "splits, not classes: write split='train'"),
        (
            dict(classes=['10', '2', 'cta']),
            "no known class: 'cat'; the classes are those of the option classes: did you mean 'cta'",
        ),
        (dict(classes='cat'), 'must be a list of names'),
        (dict(classes=[]), 'must be a list of names'),
        (dict(classes=['cat', '2', 'cat', '10']), "'cat' more than once"),
        (dict(extensions=['.gif']), 'holds no images: .*.gif'),
        (dict(in_chans=4), r'in_chans must be 3 \(RGB\) or 1 \(grey\), got 4'),
        (dict(on_corrupt='skipp'), "on_corrupt cannot be 'skipp': did you mean 'skip'"),
        (dict(transform=dict(input_sice=3)), "no option 'input_sice'"),
    ],
)
def test_image_folder_refuses(folder, options, message):
    options = dict(root='pets', split='train') | options
    if isinstance(options['root'], str):
        options['root'] = str(folder.parent / options['root'])
    with pytest.raises(DistillError, match=message):
        ImageFolder(**options)


def test_a_class_that_training_lacks_is_named(folder):
    save(folder / 'val' / 'dog' / '0.png')
    with pytest.raises(DistillError, match=r"no known class: 'dog'; the classes are the folders of .*train"):
        ImageFolder(folder, 'val')


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DistillError, match='holds no images'):
        ImageFolder(tmp_path)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def fill(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [truncate, lambda p: fill(p, b''), lambda p: fill(p, b'not an image')])
def test_a_corrupt_file_is_named(tmp_path, damage):
    rng = np.random.default_rng(0)
    for name in 'ab':
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / name / '0.jpg')
    damage(tmp_path / 'a' / '0.jpg')
    data = ImageFolder(tmp_path)
    assert data[1]['data_samples'].gt_label == 1
    with pytest.raises(DistillError, match=r"a/0.jpg cannot be read .*on_corrupt='skip'"):
        data[0]


def test_skip_takes_the_next_readable_image(folder, monkeypatch):
    warnings = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'log', lambda level, text: warnings.append(text))
    files = sorted((folder / 'train').rglob('*.png'))
    for i in (1, 2, 5):
        truncate(files[i])
    data = ImageFolder(folder, 'train', on_corrupt='skip')
    for _ in range(2):
        taken = [d['data_samples'] for d in (data[i] for i in range(6))]
        assert [s.img_path for s in taken] == [str(files[i]) for i in (0, 3, 3, 3, 4, 0)]
        assert [int(s.gt_label) for s in taken] == [0, 1, 1, 1, 2, 0]
    assert len(data) == 6
    assert len(warnings) == 3 and all(str(files[i]) in '\n'.join(warnings) for i in (1, 2, 5))  # once each
    for i in (0, 3, 4):
        truncate(files[i])
    with pytest.raises(DistillError, match='None of the 6 images'):
        data[2]


def test_deep_images_are_refused_instead_of_clipped(tmp_path):
    (tmp_path / 'a').mkdir()
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / 'a' / 'x.png')
    with pytest.raises(DistillError, match=r'x.png has more than 8 bits'):
        ImageFolder(tmp_path, on_corrupt='skip')[0]


def test_a_failing_transform_names_the_image(folder):
    data = ImageFolder(folder, 'train', transform=[dict(type='RandomCrop', size=32)])
    with pytest.raises(DistillError, match=r'10/0.png \(6 x 4 pixels\)'):
        data[0]
    data = ImageFolder(folder, 'train', transform=[dict(type='FiveCrop', size=2)])
    with pytest.raises(DistillError, match=r'10/0.png: transform must give a uint8'):
        data[0]


def test_memory_is_small_and_pickles(folder):
    data = ImageFolder(folder, 'train')
    held = [v for v in vars(data).values() if isinstance(v, (list, tuple, dict)) and len(v) > 3]
    assert not held  # a million Python objects would be copied into every worker, count by count
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[4]['inputs'], data[4]['inputs']) and again.metainfo == data.metainfo


def loader(dataset, **options):
    cfg = dict(
        dataset=dataset,
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='pseudo_collate'),
    )
    return Runner.build_dataloader(cfg | options, seed=0)


@pytest.mark.parametrize('workers', [0, 2])
def test_the_runners_loader(folder, workers):
    transform = dict(input_size=8, training=True, auto_augment='rand-m9-mstd0.5-inc1')
    cfg = dict(type='kd_plugins.ImageFolder', root=str(folder), split='train', transform=transform)
    labels = []
    for batch in loader(cfg, num_workers=workers):
        assert [i.shape for i in batch['inputs']] == [(3, 8, 8)] * 2
        labels += [int(s.gt_label) for s in batch['data_samples']]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize('workers', [0, 2])
def test_the_loader_is_reproducible(folder, workers):
    transform = dict(input_size=8, training=True, auto_augment='rand-m9-mstd0.5-inc1', color_jitter=None)
    cfg = dict(type='kd_plugins.ImageFolder', root=str(folder), split='train', transform=transform)
    runs = []
    for _ in range(2):
        set_random_seed(0)
        runs.append(torch.stack([i for batch in loader(cfg, num_workers=workers) for i in batch['inputs']]))
    assert torch.equal(*runs)


def test_names_build_in_an_unedited_config(folder):
    """No custom_imports: the scope imports what registers them; and timm, torchvision, scikit-learn stay out of it."""
    code = (
        'import sys\n'
        'from mmengine.registry import DATASETS, METRICS\n'
        "print([METRICS.get(f'kd_plugins.{n}').__name__ for n in ('Accuracy', 'MultiLabelAP')])\n"
        "print({'timm', 'torchvision', 'sklearn'} & set(sys.modules))\n"
        f"data = DATASETS.build(dict(type='kd_plugins.ImageFolder', root={str(folder)!r}, split='val'))\n"
        "print(len(data), [DATASETS.get(f'kd_plugins.{n}').__name__ for n in ('ArrayDataset', 'CocoMultiLabel')])\n"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        "['Accuracy', 'MultiLabelAP']",
        'set()',
        "2 ['ArrayDataset', 'CocoMultiLabel']",
    ]


IMAGES = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)


def test_arrays():
    data = ArrayDataset(IMAGES, [2, 0, 1])
    assert len(data) == 3 and data.metainfo == dict(classes=('0', '1', '2'))
    assert np.array_equal(data[1]['inputs'].permute(1, 2, 0), IMAGES[1])
    sample = data[-1]['data_samples']
    assert sample.gt_label == 1 and sample.gt_label.dtype == torch.long
    assert sample.img_path == 'images[2]' and sample.img_shape == (4, 5)
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize('images', [IMAGES[..., 0], IMAGES[..., :1]])
def test_grey_arrays(images):
    assert np.array_equal(ArrayDataset(images, [0, 0, 0], in_chans=1)[1]['inputs'][0], IMAGES[1, ..., 0])
    assert ArrayDataset(images, [0, 0, 0])[1]['inputs'].shape == (3, 4, 5)


def test_multi_hot_labels():
    labels = np.array([[1, 0], [1, 1], [0, 0]])
    data = ArrayDataset(IMAGES, labels, classes=('cat', 'dog'))
    label = data[1]['data_samples'].gt_label
    assert label.dtype == torch.float32 and label.tolist() == [1, 1] and data.metainfo['classes'] == ('cat', 'dog')


def test_array_files(tmp_path):
    np.save(tmp_path / 'x.npy', IMAGES)
    np.savez(tmp_path / 'd.npz', images=IMAGES, labels=np.array([0, 1, 2]), x_train=IMAGES[::-1])
    np.savez(tmp_path / 'y.npz', anything=np.array([1, 1, 0]))
    data = ArrayDataset(tmp_path / 'x.npy', str(tmp_path / 'y.npz'))
    assert isinstance(data._images, np.memmap)
    assert torch.equal(pickle.loads(pickle.dumps(data))[2]['inputs'], data[2]['inputs'])
    assert data[1]['data_samples'].img_path == f'{tmp_path / "x.npy"}[1]'
    data = ArrayDataset(tmp_path / 'd.npz', tmp_path / 'd.npz')
    assert np.array_equal(data[0]['inputs'].permute(1, 2, 0), IMAGES[0]) and data[2]['data_samples'].gt_label == 2
    data = ArrayDataset(f'{tmp_path}/d.npz:x_train', [0, 0, 1])
    assert np.array_equal(data[0]['inputs'].permute(1, 2, 0), IMAGES[2])
    with pytest.raises(DistillError, match="no array 'x_tran': did you mean 'x_train'"):
        ArrayDataset(f'{tmp_path}/d.npz:x_tran', [0, 0, 1])
    with pytest.raises(DistillError, match=r'labels: there is no file .*z.npz: did you mean'):
        ArrayDataset(IMAGES, tmp_path / 'z.npz')
    (tmp_path / 'bad.npy').write_text('no array')
    with pytest.raises(DistillError, match=r'bad.npy is no .npy or .npz file'):
        ArrayDataset(tmp_path / 'bad.npy', [0])


@pytest.mark.parametrize(
    'images,labels,classes,message',
    [
        (IMAGES / 255.0, [0, 0, 0], None, r'not float64; convert with \(255 \* images\)'),
        (IMAGES.astype(np.float32), [0, 0, 0], None, r'not float32; convert with images.astype'),
        (IMAGES.astype(int), [0, 0, 0], None, 'not int64'),
        (IMAGES.transpose(0, 3, 1, 2), [0, 0, 0], None, 'channels first'),
        (IMAGES[0, 0], [0, 0, 0], None, r'must be \(N, H, W, 3\)'),
        (IMAGES[:0], [], None, 'images is empty'),
        (IMAGES, [0, 0], None, '3 images and 2 labels'),
        (IMAGES, [0, -1, 0], None, r'labels\[1\] is -1'),
        (IMAGES, [0.0, 1.0, 0.0], None, r'must be whole numbers \(N,\).*not float64'),
        (IMAGES, [0, 1, 2], ['a', 'b'], 'classes has 2 names, but the greatest label is 2'),
        (IMAGES, [[0], [1], [7]], None, r'must be 0 or 1, but hold 7.*labels.reshape\(-1\)'),
        (IMAGES, [[0, 1]] * 3, ['a', 'b', 'c'], 'classes has 3 names, but labels has 2 columns'),
        (IMAGES, [], None, 'must be whole numbers'),
    ],
)
def test_array_dataset_refuses(images, labels, classes, message):
    with pytest.raises(DistillError, match=message):
        ArrayDataset(images, labels, classes=classes)


@pytest.fixture
def coco(tmp_path):
    content = dict(
        images=[dict(id=7, file_name='b.png'), dict(id=3, file_name='a.png'), dict(id=9, file_name='c.png')],
        categories=[dict(id=5, name='dog'), dict(id=2, name='cat')],
        annotations=[
            dict(image_id=7, category_id=5),
            dict(image_id=7, category_id=5),
            dict(image_id=7, category_id=2, iscrowd=1),
            dict(image_id=9, category_id=5),
        ],
    )
    for i, name in enumerate('abc'):
        save(tmp_path / 'images' / f'{name}.png', i)
    (tmp_path / 'train.json').write_text(json.dumps(content))
    return tmp_path


def test_coco(coco):
    data = CocoMultiLabel(coco, 'train.json', 'images')
    assert data.metainfo == dict(classes=('cat', 'dog'))  # by id
    labels = [data[i]['data_samples'].gt_label for i in range(3)]
    assert [label.tolist() for label in labels] == [[1, 1], [0, 0], [0, 1]] and labels[0].dtype == torch.float32
    assert [int(data[i]['inputs'].max()) for i in range(3)] == [1, 0, 2]
    assert data[0]['data_samples'].img_path == str(coco / 'images' / 'b.png')


def test_coco_classes_are_chosen_and_ordered_by_name(coco):
    data = CocoMultiLabel(coco, 'train.json', 'images', classes=['dog', 'cat'])
    assert data[2]['data_samples'].gt_label.tolist() == [1, 0]
    assert CocoMultiLabel(coco, 'train.json', 'images', classes=['cat'])[2]['data_samples'].gt_label.tolist() == [0]


def test_the_embedded_scenes_are_a_multi_label_data_set(tmp_path):
    root = prepare_digits(tmp_path / 'digits', train=6, val=2, size=64, progress=False)
    data = CocoMultiLabel(root, 'annotations/train.json', 'images/train')
    labels = torch.stack([data[i]['data_samples'].gt_label for i in range(len(data))])
    assert data.metainfo['classes'] == tuple('0123456789') and labels.sum(1).max() > 1
    for i, row in enumerate(labels):  # the same as in Ultralytics' files
        lines = (root / 'labels' / 'train' / f'{i:06d}.txt').read_text().splitlines()
        assert set(row.nonzero().flatten().tolist()) == {int(line.split()[0]) for line in lines}


@pytest.mark.parametrize(
    'options,change,message',
    [
        (dict(ann_file='trian.json'), {}, "ann_file: there is no file .*did you mean 'train.json'"),
        (dict(img_prefix='image'), {}, "img_prefix: there is no folder .*did you mean 'images'"),
        (dict(img_prefix='.'), {}, "b.png, the first image of .*does not exist: is img_prefix='.' right"),
        (dict(classes=['catt']), {}, "no category 'catt': did you mean 'cat'"),
        ({}, dict(annotations=None), 'is no COCO annotation file'),
        ({}, dict(images=[]), 'lists no images'),
        ({}, dict(annotations=[dict(image_id=1, category_id=5)]), 'annotates image 1 with category 5: one of them'),
        ({}, dict(categories=[dict(id=1, name='a'), dict(id=2, name='a')]), "'a' more than once"),
    ],
)
def test_coco_refuses(coco, options, change, message):
    path = coco / 'train.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DistillError, match=message):
        CocoMultiLabel(**dict(root=coco, ann_file='train.json', img_prefix='images') | options)


def test_coco_files_may_be_corrupt_too(coco):
    truncate(coco / 'images' / 'b.png')
    with pytest.raises(DistillError, match=r'b.png cannot be read'):
        CocoMultiLabel(coco, 'train.json', 'images')[0]
    taken = CocoMultiLabel(coco, 'train.json', 'images', on_corrupt='skip')[0]['data_samples']
    assert taken.img_path.endswith('a.png') and taken.gt_label.tolist() == [0, 0]


def test_inside_the_wrappers_of_mmengine(tmp_path):
    """What RepeatDataset, ConcatDataset and ClassBalancedDataset ask of a data set."""
    from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset

    images = np.zeros((6, 4, 4, 3), np.uint8)
    one = dict(type='kd_plugins.ArrayDataset', images=images, labels=[0, 0, 0, 0, 0, 1], classes=('a', 'b'))
    several = {**one, 'labels': np.array([[1, 0], [1, 1], [0, 0]] * 2)}
    for cfg in (one, several):
        data = RepeatDataset(dict(cfg), 2)
        assert len(data) == 12 and data.metainfo == dict(classes=('a', 'b')) and data[7]['inputs'].shape == (3, 4, 4)
        data = ConcatDataset([dict(cfg), dict(cfg)])
        assert len(data) == 12 and data.get_data_info(7)['sample_idx'] == 1
    balanced = ClassBalancedDataset(dict(one), 0.5)
    # The rare class once per sqrt(0.5 / (1 / 6)), rounded up.
    assert balanced.repeat_indices == [0, 1, 2, 3, 4, 5, 5]
    assert ClassBalancedDataset(dict(several), 0.9).repeat_indices == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]


def test_what_is_known_of_an_image():
    data = ArrayDataset(np.zeros((3, 4, 4, 3), np.uint8), [0, 2, 1])
    assert data.get_data_info(-2) == dict(img_path='images[1]', gt_label=2, sample_idx=1)
    assert data.get_cat_ids(1) == [2]
    several = ArrayDataset(np.zeros((2, 4, 4, 3), np.uint8), np.array([[1, 0, 1], [0, 0, 0]]))
    assert several.get_cat_ids(0) == several.get_data_info(0)['gt_label'] == [0, 2] and several.get_cat_ids(1) == []
    with pytest.raises(IndexError):
        data.get_data_info(3)
    data.metainfo['classes'] = ()
    assert data.metainfo == dict(classes=('0', '1', '2'))
