"""COCO boxes arrive in Ultralytics' layout unchanged, and a refused conversion writes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kd_plugins.errors import DistillError
from kd_plugins.lab.data.coco_to_yolo import coco_to_yolo

ROOT = Path(__file__).parents[4]


def write_coco(root, split, categories=((7, 'dog'), (3, 'cat')), **changes):
    (root / split).mkdir(parents=True)
    for name in ('a.png', 'b.png'):
        Image.new('RGB', (40, 20)).save(root / split / name)
    coco = dict(
        images=[
            dict(id=1, file_name='a.png', width=40, height=20),
            dict(id=5, file_name='b.png', width=40, height=20),
        ],
        categories=[dict(id=i, name=n) for i, n in categories],
        annotations=[
            dict(id=1, image_id=1, category_id=7, bbox=[10, 5, 20, 10]),
            dict(id=2, image_id=1, category_id=3, bbox=[30, 10, 20, 20]),  # reaches out of the image
            dict(id=3, image_id=1, category_id=3, bbox=[0, 0, 5, 5], iscrowd=1),
            dict(id=4, image_id=1, category_id=3, bbox=[5, 5, 0, 3]),
        ],
    )
    coco.update(changes)
    file = root / f'{split}.json'
    file.write_text(json.dumps(coco))
    return file, root / split


@pytest.fixture
def splits(tmp_path):
    return {split: write_coco(tmp_path / 'coco', split) for split in ('train', 'val')}


def test_boxes_and_classes(tmp_path, splits):
    done = coco_to_yolo(tmp_path / 'out', splits)
    assert (done['train'].images, done['train'].boxes, done['train'].dropped) == (2, 2, 2)
    # Ids 3 and 7 become 0 and 1.
    labels = (tmp_path / 'out/labels/train/a.txt').read_text().splitlines()
    assert labels == ['1 0.500000 0.500000 0.500000 0.500000', '0 0.875000 0.750000 0.250000 0.500000']
    assert (tmp_path / 'out/labels/train/b.txt').read_text() == ''
    assert Image.open(tmp_path / 'out/images/val/a.png').size == (40, 20)


def test_ultralytics_reads_it(tmp_path, splits):
    utils = pytest.importorskip('ultralytics.data.utils')
    coco_to_yolo(tmp_path / 'out', splits, copy=True)
    data = utils.check_det_dataset(str(tmp_path / 'out' / 'data.yaml'))
    assert data['names'] == {0: 'cat', 1: 'dog'}
    images = sorted(str(p) for p in Path(data['train']).iterdir())
    assert all(Path(p).is_file() for p in utils.img2label_paths(images))
    assert not any(Path(p).is_symlink() for p in images)


def test_refused_without_writing(tmp_path, splits):
    out = tmp_path / 'out'
    others = write_coco(tmp_path / 'other', 'val', categories=((3, 'cat'), (8, 'dog')))
    lost = write_coco(tmp_path / 'lost', 'val', images=[dict(id=1, file_name='c.png', width=40, height=20)])
    astray = write_coco(tmp_path / 'astray', 'val', annotations=[dict(id=9, image_id=2, category_id=3, bbox=[0] * 4)])
    (tmp_path / 'no.json').write_text('{')
    (tmp_path / 'list.json').write_text('[]')
    folder = splits['val'][1]
    for val, words in (
        (others, 'val has the categories'),
        (lost, "c.png' is missing"),
        (astray, 'annotation 9'),
        ((tmp_path / 'none.json', folder), 'No such file'),
        ((tmp_path / 'no.json', folder), 'no JSON file'),
        ((tmp_path / 'list.json', folder), 'no COCO detection file'),
    ):
        with pytest.raises(DistillError, match=words):
            coco_to_yolo(out, {**splits, 'val': val})
        assert not out.exists()
    assert not list(tmp_path.glob('.out*'))
    with pytest.raises(DistillError, match='needs train and val'):
        coco_to_yolo(out, {'train': splits['train']})


def test_a_folder_that_exists_is_left_alone(tmp_path, splits):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.txt').write_text('mine')
    with pytest.raises(DistillError, match='exists already'):
        coco_to_yolo(tmp_path / 'out', splits)
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['thesis.txt']


def test_the_tool(tmp_path, splits):
    words = [str(w) for split, pair in splits.items() for w in (f'--{split}', *pair)]
    command = [sys.executable, str(ROOT / 'tools/coco_to_yolo.py'), '--out', str(tmp_path / 'out'), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'train: 2 images, 2 boxes, 2 annotations left out' in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and again.stderr.startswith('error: ') and 'Traceback' not in again.stderr
