"""What `make demo` compares is there."""

import pytest

pytest.importorskip('mmengine')

from kd_plugins import config
from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.demo import ZOOS
from kd_plugins.lab.comparison.mm import PARTS, demo
from kd_plugins.recipes import find_recipe


@pytest.mark.parametrize('part', PARTS)
def test_models_and_recipes_are_there(part):
    found = PARTS[part]
    assert all(config(f'kd_plugins::{name}') for name in (found.teacher, found.student))
    assert found.recipes and all(find_recipe(r) for r in found.recipes)


def test_the_command_runs_every_part_once_in_a_folder_of_its_own():
    parts = [part for _, package, part, _ in ZOOS.values() if package == 'mm']
    assert sorted(parts) == sorted(PARTS)
    folders = [folder for *_, folder in ZOOS.values()]
    assert len(set(folders)) == len(folders)


def test_unknown_part(tmp_path):
    with pytest.raises(DistillError, match=r"no part 'classifikation'; did you mean .*'classification'"):
        demo(tmp_path, part='classifikation', data=tmp_path / 'digits')
    assert not list(tmp_path.iterdir())
