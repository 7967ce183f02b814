"""The embedded data set: what is written agrees across formats, is deterministic, and overwrites nobody's files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('PIL')
pytest.importorskip('sklearn')

import joblib
from PIL import Image

from kd_plugins.errors import DistillError
from kd_plugins.lab.data import formats, prepare, prepare_digits, render_scene, scans, scenes

REPO = Path(__file__).parents[4]
SMALL = {'train': 6, 'val': 4, 'size': 96, 'progress': False}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return prepare_digits(tmp_path_factory.mktemp('data') / 'digits', **SMALL)


def digest(folder: Path) -> str:
    """Hash of every path and every byte below a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b'\0' + path.read_bytes())
    return total.hexdigest()


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def decode(segmentation: dict) -> np.ndarray:
    """COCO run lengths back to a mask, written from the format's definition."""
    flat = np.repeat(np.arange(len(segmentation['counts'])) % 2, segmentation['counts'])
    return flat.reshape(segmentation['size'], order='F').astype(bool)


def splits(root: Path):
    for split, count in (('train', 6), ('val', 4)):
        yield split, count, json.loads((root / 'annotations' / f'{split}.json').read_text())


# ------------------------------------------------------------------------------------------------ agreement


def test_boxes_masks_and_label_maps_agree_to_the_pixel(root):
    for split, count, coco in splits(root):
        assert len(coco['images']) == count
        assert [c['name'] for c in coco['categories']] == list('0123456789')
        for info in coco['images']:
            image = read(root / 'images' / split / info['file_name'])
            labels = read(root / 'label_maps' / split / info['file_name'])
            assert image.shape == (96, 96, 3) and labels.shape == (96, 96)
            assert (info['height'], info['width']) == labels.shape
            rebuilt = np.zeros_like(labels)
            own = [a for a in coco['annotations'] if a['image_id'] == info['id']]
            assert own
            for a in own:
                mask = decode(a['segmentation'])
                ys, xs = np.nonzero(mask)
                assert a['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert a['area'] == mask.sum() and a['iscrowd'] == 0
                assert not rebuilt[mask].any(), 'two digits own the same pixel'
                rebuilt[mask] = a['category_id']
            np.testing.assert_array_equal(rebuilt, labels)


def test_annotation_ids_are_unique_and_positive(root):
    for _, _, coco in splits(root):
        assert [a['id'] for a in coco['annotations']] == list(range(1, len(coco['annotations']) + 1))
        assert min(i['id'] for i in coco['images']) == 1


def test_annotated_digit_is_the_scans_digit(root):
    _, labels = scans.load_scans()
    for _, _, coco in splits(root):
        assert all(labels[a['scan']] == a['category_id'] - 1 for a in coco['annotations'])


def test_yolo_labels_are_the_coco_boxes(root):
    for split, _, coco in splits(root):
        for info in coco['images']:
            lines = (root / 'labels' / split / info['file_name']).with_suffix('.txt').read_text().splitlines()
            got = [[float(v) for v in line.split()] for line in lines]
            want = []
            for a in coco['annotations']:
                if a['image_id'] == info['id']:
                    x, y, w, h = a['bbox']
                    want.append([a['category_id'] - 1, (x + w / 2) / 96, (y + h / 2) / 96, w / 96, h / 96])
            np.testing.assert_allclose(got, want, atol=1e-6)


def test_one_crop_per_object_in_its_class_folder(root):
    for split, _, coco in splits(root):
        assert sorted(p.name for p in (root / 'cls' / split).iterdir()) == list('0123456789')
        for digit in range(10):
            crops = list((root / 'cls' / split / str(digit)).glob('*.png'))
            assert len(crops) == sum(a['category_id'] == digit + 1 for a in coco['annotations'])
            assert all(read(c).shape == (32, 32, 3) for c in crops)


def test_crop_is_a_square_around_its_object():
    for x, y, w, h in ((0, 0, 10, 30), (80, 60, 16, 36), (40, 40, 5, 5), (0, 0, 96, 96)):
        left, top, right, bottom = formats._square((x, y, w, h), 96, 96)
        assert right - left == bottom - top
        assert 0 <= left <= x and 0 <= top <= y and x + w <= right <= 96 and y + h <= bottom <= 96


@pytest.mark.parametrize('pixels', [[], [0], [5], [0, 1, 5], [2, 3], range(6)])
def test_run_lengths(pixels):
    mask = np.zeros(6, bool)
    mask[list(pixels)] = True
    mask = mask.reshape(2, 3)
    counts = formats.run_lengths(mask)
    assert sum(counts) == 6
    np.testing.assert_array_equal(decode({'size': [2, 3], 'counts': counts}), mask)


def test_pycocotools_reads_boxes_and_masks(root, capsys):
    mask_utils = pytest.importorskip('pycocotools.mask')
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO(str(root / 'annotations' / 'val.json'))
    for a in coco.loadAnns(coco.getAnnIds()):
        rle = coco.annToRLE(a)
        assert mask_utils.area(rle) == a['area']
        assert mask_utils.toBbox(rle).tolist() == a['bbox']
    perfect = [
        {'image_id': a['image_id'], 'category_id': a['category_id'], 'bbox': a['bbox'], 'score': 1.0}
        for a in coco.dataset['annotations']
    ]
    evaluation = COCOeval(coco, coco.loadRes(perfect), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_ultralytics_yaml_is_relative_to_itself(root):
    yaml = pytest.importorskip('yaml')
    data = yaml.safe_load((root / 'digits.yaml').read_text())
    assert 'path' not in data  # absolute paths break on another machine, relative ones in another working folder
    assert (root / data['train']).is_dir() and (root / data['val']).is_dir()
    assert data['names'] == {i: str(i) for i in range(10)}
    assert not (root / 'masks').exists()  # would switch Ultralytics to semantic segmentation
    for path in (root / 'images').rglob('*.png'):
        assert Path(str(path).replace('/images/', '/labels/')).with_suffix('.txt').is_file()


def test_ultralytics_finds_the_images_from_any_folder(root, monkeypatch):
    utils = pytest.importorskip('ultralytics.data.utils')
    monkeypatch.setattr(utils, 'check_font', lambda *_: None)  # would download a font
    for folder, yaml in ((root, 'digits.yaml'), (root.parent, 'digits/digits.yaml'), ('/', root / 'digits.yaml')):
        monkeypatch.chdir(folder)
        data = utils.check_det_dataset(str(yaml), autodownload=False)
        assert Path(data['train']) == root / 'images/train' and Path(data['val']) == root / 'images/val'
        assert data['nc'] == 10 and not data.get('masks_dir')


# --------------------------------------------------------------------------------------------------- scenes


def test_scenes_keep_the_limits():
    images, labels = scans.load_scans()
    pool = scans.split_scans(labels, 0)['train']
    seen, polarity = set(), set()
    for i in range(60):
        scene = render_scene(images, labels, pool, 128, np.random.default_rng(i))
        assert scene.image.shape == (128, 128, 3) and scene.image.dtype == np.uint8
        assert 1 <= len(scene.labels) <= scenes.DIGITS[1]
        assert set(np.unique(scene.owner)) == {-1, *range(len(scene.labels))}
        for k, (x, y, w, h) in enumerate(scene.full_boxes):
            full = np.zeros((128, 128), bool)
            full[y : y + h, x : x + w] = True
            assert full[scene.owner == k].all(), 'visible ink outside the full box'
            for x, y, w, h in scene.full_boxes[:k]:
                assert full[y : y + h, x : x + w].sum() <= scenes.MAX_OVERLAP * min(w * h, full.sum())
        seen.update(scene.labels)
        grey = scene.image @ scenes.LUMA
        for k, (x, y, w, h) in enumerate(scene.boxes()):
            around = scene.owner[y : y + h, x : x + w] == -1
            if around.any():
                inside = grey[scene.owner == k].mean()
                polarity.add(bool(inside > grey[y : y + h, x : x + w][around].mean()))
    assert seen == set(range(10)) and polarity == {True, False}


def test_every_digit_keeps_three_quarters_of_its_ink(monkeypatch):
    images, labels = scans.load_scans()
    pool = scans.split_scans(labels, 0)['val']
    full, blend = [], scenes._blend

    def record(canvas, ink, x, y, rng):
        full.append(int((ink >= scenes.INK).sum()))
        blend(canvas, ink, x, y, rng)

    monkeypatch.setattr(scenes, '_blend', record)
    occluded = 0
    for i in range(40):
        full.clear()
        scene = render_scene(images, labels, pool, 128, np.random.default_rng(i))
        digits = full[len(scene.fragment_scans) :]
        visible = [(scene.owner == k).sum() for k in range(len(digits))]
        assert digits == scene.full_ink and visible == scene.visible_ink
        assert all(v >= scenes.MIN_VISIBLE * f for v, f in zip(visible, digits, strict=True))
        assert visible[-1] == digits[-1], 'the last digit is on top'
        occluded += sum(v < f for v, f in zip(visible, digits, strict=True))
    assert occluded, 'no overlap at all: too easy'


# ---------------------------------------------------------------------------------------- splits and determinism


def test_no_scan_is_in_two_splits(root):
    manifest = json.loads((root / prepare.MANIFEST).read_text())
    pools = {split: set(indices) for split, indices in manifest['scans'].items()}
    used = {split: set(indices) for split, indices in manifest['scans_used'].items()}
    assert pools['train'] & pools['val'] == set()
    assert pools['train'] | pools['val'] == set(range(1797))
    for split, _, coco in splits(root):
        assert used[split] <= pools[split]
        assert {a['scan'] for a in coco['annotations']} < used[split], 'fragments are recorded too'
    images, _ = scans.load_scans()
    contents = {s: {images[i].tobytes() for i in pools[s]} for s in pools}
    assert contents['train'] & contents['val'] == set(), 'the same scan under two indices'


def test_every_class_is_in_both_splits():
    _, labels = scans.load_scans()
    for pool in scans.split_scans(labels, 5).values():
        assert np.bincount(labels[pool], minlength=10).min() >= 50


def test_same_seed_same_bytes_in_another_process(root, tmp_path):
    env = {**os.environ, 'PYTHONHASHSEED': '123', 'PYTHONPATH': str(REPO)}
    command = [sys.executable, str(REPO / 'tools' / 'prepare_digits.py'), '--train', '6', '--val', '4', '--size', '96']
    done = subprocess.run([*command, '--out', 'sub/digits'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'train: 6/6' in done.stderr
    assert digest(tmp_path / 'sub' / 'digits') == digest(root)


def test_other_seed_other_scenes_and_a_small_set_starts_a_big_one(root, tmp_path):
    other = prepare_digits(tmp_path / 'other', **{**SMALL, 'seed': 1})
    bigger = prepare_digits(tmp_path / 'bigger', **{**SMALL, 'val': 5})
    first = (root / 'images/val/000000.png').read_bytes()
    assert (other / 'images/val/000000.png').read_bytes() != first
    assert (bigger / 'images/val/000000.png').read_bytes() == first
    assert first != (root / 'images/train/000000.png').read_bytes()


# ------------------------------------------------------------------------------------------------ the folder


TINY = {'train': 1, 'val': 1, 'size': 64, 'progress': False}


def test_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('years')
    for force in (False, True):
        with pytest.raises(DistillError, match='was not written by prepare_digits'):
            prepare_digits(tmp_path / 'mine', **TINY, force=force)
    assert [p.name for p in tmp_path.rglob('*')] == ['mine', 'thesis.txt']
    (tmp_path / 'mine' / prepare.MANIFEST).write_text('{"format": "something else"}')
    with pytest.raises(DistillError, match='was not written by prepare_digits'):
        prepare_digits(tmp_path / 'mine', **TINY)
    with pytest.raises(DistillError, match='is a file'):
        prepare_digits(tmp_path / 'mine' / 'thesis.txt', **TINY)


def test_empty_folder_is_filled(tmp_path):
    assert (prepare_digits(tmp_path, **TINY) / prepare.MANIFEST).is_file()


def test_same_settings_reuse_other_settings_rewrite(tmp_path, capsys):
    root = prepare_digits(tmp_path / 'd', **TINY)
    before = (root / prepare.MANIFEST).stat().st_mtime_ns
    (root / 'labels' / 'train.cache').write_bytes(b'left by ultralytics')
    prepare_digits(root, **{**TINY, 'progress': True})
    assert (root / prepare.MANIFEST).stat().st_mtime_ns == before
    assert 'reused' in capsys.readouterr().out
    prepare_digits(root, **{**TINY, 'val': 2})
    assert len(list((root / 'images' / 'val').iterdir())) == 2
    assert not (root / 'labels' / 'train.cache').exists()
    assert [p.name for p in tmp_path.iterdir()] == ['d'], 'nothing is left beside the folder'


def test_own_folder_with_foreign_or_edited_files_is_not_lost(tmp_path):
    root = prepare_digits(tmp_path / 'd', **TINY)
    notes = root / 'notes.txt'
    notes.write_text('mine')
    assert prepare_digits(root, **TINY) == root  # nothing to rewrite, nothing to lose
    for wish in ({'seed': 1}, {'force': True}):
        with pytest.raises(DistillError, match=r'notes\.txt'):
            prepare_digits(root, **{**TINY, **wish})
    assert notes.read_text() == 'mine'
    notes.unlink()
    with (root / 'digits.yaml').open('a') as file:
        file.write('# edited\n')
    with pytest.raises(DistillError, match=r'digits\.yaml was changed'):
        prepare_digits(root, **TINY)
    prepare_digits(root, **TINY, force=True)
    assert 'edited' not in (root / 'digits.yaml').read_text()


def test_missing_file_is_written_again(tmp_path):
    root = prepare_digits(tmp_path / 'd', **TINY)
    (root / 'images/val/000000.png').unlink()
    prepare_digits(root, **TINY)
    assert (root / 'images/val/000000.png').is_file()


def test_interrupted_write_leaves_the_old_folder_and_no_debris(tmp_path, monkeypatch):
    root = prepare_digits(tmp_path / 'd', **TINY)
    before = digest(root)
    monkeypatch.setattr(prepare, 'contact_sheet', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_digits(root, **{**TINY, 'seed': 3})
    with pytest.raises(KeyboardInterrupt):
        prepare_digits(tmp_path / 'new', **TINY)
    assert digest(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ['d']


def test_debris_of_a_killed_write_is_removed_later_and_only_that(tmp_path):
    killed, running, foreign = (tmp_path / f'.d.{c * 8}.partial' for c in 'abc')
    for folder in (killed, running, foreign):
        folder.mkdir()
    for folder in (killed, running):
        (folder / prepare._UNFINISHED).touch()
    os.utime(killed / prepare._UNFINISHED, (0, 0))
    prepare_digits(tmp_path / 'd', **TINY)
    assert not killed.exists() and running.exists() and foreign.exists()


def test_a_faster_process_with_the_same_settings_wins(tmp_path, monkeypatch):
    write = prepare._write

    def slow(root, *args):
        monkeypatch.setattr(prepare, '_write', write)
        prepare_digits(tmp_path / 'd', **TINY)
        write(root, *args)

    monkeypatch.setattr(prepare, '_write', slow)
    root = prepare_digits(tmp_path / 'd', **TINY)
    assert (root / prepare.MANIFEST).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ['d']


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'train': -1}, 'train must be a whole number from 1 .*-1'),
        ({'train': 0}, 'train must be'),
        ({'val': 2.5}, r'val must be a whole number .*2\.5'),
        ({'val': '7'}, "val must be a whole number .*'7'"),
        ({'val': True}, 'val must be'),
        ({'seed': -3}, 'seed must be'),
        ({'size': 100}, 'multiple of 32, not 100: did you mean 96 or 128'),
        ({'size': 32}, 'size must be a whole number from 64'),
        ({'size': 4096}, 'size must be'),
    ],
)
def test_bad_arguments(tmp_path, wrong, message):
    with pytest.raises(DistillError, match=message):
        prepare_digits(tmp_path / 'd', **{**TINY, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_missing_scikit_learn_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(DistillError, match=r"; (pip install 'scikit-learn'|in a clone of kd_plugins: )"):
        prepare_digits(tmp_path / 'd', **TINY)
    assert list(tmp_path.iterdir()) == []


def test_command_line_error_is_one_line(tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(REPO)}
    command = [sys.executable, str(REPO / 'tools' / 'prepare_digits.py'), '--size', '100']
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('error: size must be') and done.stderr.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_needs_neither_pillow_nor_scikit_learn():
    code = 'import sys, kd_plugins.lab.data; assert not {"PIL", "sklearn", "numpy", "torch"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, env={**os.environ, 'PYTHONPATH': str(REPO)})


def test_scenes_that_are_rendered_in_processes_are_the_same(monkeypatch):
    """In their order, whatever the number of processes and of scenes that each renders at a time."""
    monkeypatch.setattr(prepare, '_TOGETHER', 2)
    pixels, labels = scans.load_scans()
    pool = scans.split_scans(labels, 0)['val']
    seeds = [[0, 1, i] for i in range(5)]
    asked = []
    monkeypatch.setattr(joblib, 'cpu_count', lambda: asked.append(1) or 2)
    for alone in (0, 100):
        monkeypatch.setattr(prepare, '_ALONE', alone)
        found = list(prepare._rendered(seeds, pixels, labels, pool, 64))
        expected = [render_scene(pixels, labels, pool, 64, np.random.default_rng(seed)) for seed in seeds]
        assert len(found) == 5
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.image, other.image) and one.scans == other.scans
    assert len(asked) == 1
