"""Every recipe for detectors in Ultralytics' trainer, between other widths: ``yolo-kd train kd=NAME``."""

import pytest
import yaml

pytest.importorskip('ultralytics')

from kd_plugins.recipes import load_recipe, names
from kd_plugins.yolo.cli import main
from tests.integration.yolo_lab import RUN, results, save_teacher, write_data, write_small


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('teacher')
    return save_teacher(folder / 'teacher.pt', write_small(folder / 'wide.yaml', widths=(24, 48, 64)))


@pytest.mark.parametrize('recipe', names('detection'))
def test_recipe(recipe, data, teacher, tmp_path):
    words = {'model': write_small(tmp_path / 'small.yaml'), **RUN, 'data': data, 'project': tmp_path, 'name': 'run'}
    assert main(['train', *(f'{k}={v}' for k, v in words.items()), f'kd={recipe}', f'kd_teacher={teacher}']) == 0
    read = load_recipe(recipe, 'detection')
    terms = read['terms']
    written = yaml.safe_load((tmp_path / 'run' / 'kd.yaml').read_text())
    assert set(written['terms']) == set(terms) and 'recipe' not in written, 'recorded in full'
    columns = {k: v for k, v in results(tmp_path / 'run').items() if k.startswith('train/kd')}
    assert len(columns) == len(terms) + 1 and 'train/kd_ratio' in columns
    # The run is one epoch: of a recipe with stages the first of them.
    (first, *_) = read.get('stages', [{}])
    on = [k for k, values in columns.items() if all(v > 0 for v in values)]
    assert len(on) == len(first.get('terms', terms)) + 1 and 'train/kd_ratio' in on
