"""What `make demo` compares is there."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip('mmengine')

from kd_plugins.errors import DistillError
from kd_plugins.lab.comparison.mm import PARTS, demo
from kd_plugins.lab.comparison.mm.demo import CONFIGS
from kd_plugins.mm.cli import find_recipe

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize('part', PARTS)
def test_models_and_recipes_are_there(part):
    found = PARTS[part]
    for config in (found.teacher, found.student):
        assert (CONFIGS / f'{config}.py').is_file()
    assert found.recipes and all(find_recipe(r) for r in found.recipes)


def test_the_tool_runs_every_part_once_in_a_folder_of_its_own():
    spec = importlib.util.spec_from_file_location('demo_tool', ROOT / 'tools' / 'demo.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    parts = [part for _, package, part, _ in tool.ZOOS.values() if package == 'mm']
    assert sorted(parts) == sorted(PARTS)
    folders = [folder for *_, folder in tool.ZOOS.values()]
    assert len(set(folders)) == len(folders)


def test_unknown_part(tmp_path):
    with pytest.raises(DistillError, match=r"no part 'classifikation'; did you mean .*'classification'"):
        demo(tmp_path, part='classifikation', data=tmp_path / 'digits')
    assert not list(tmp_path.iterdir())
