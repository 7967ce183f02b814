"""``kd-plugins``: a list that is there at once, commands that are imported when they are called, mistakes in a line."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import kd_plugins
from kd_plugins import cli, info
from kd_plugins.cli import COMMANDS, main
from kd_plugins.extras import how_to_install
from kd_plugins.info import Zoo, version_of, what_is_missing
from kd_plugins.recipes import FOLDER, names
from kd_plugins.recipes.command import table

TOOLS = Path(kd_plugins.__file__).parents[1] / 'tools'


def ended(*words):
    """What a command that fails ends with."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return caught.value.code


# ---------------------------------------------------------------------- the list
@pytest.mark.parametrize('words', [[], ['help'], ['-h'], ['--help']])
def test_help(words, capsys):
    main(words)
    text = capsys.readouterr().out
    assert all(f'kd-plugins {name} ' in text for name in COMMANDS) and 'yolo-kd train' in text
    assert max(map(len, text.splitlines())) <= 104


def test_the_list_imports_nothing():
    code = 'import sys; from kd_plugins.cli import main; main(["--help"]); print(*sys.modules, file=sys.stderr)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert {m for m in loaded if m.startswith('kd_plugins')} == {'kd_plugins', 'kd_plugins.cli', 'kd_plugins.errors'}
    assert not loaded & {'torch', 'numpy', 'yaml', 'mmengine', 'ultralytics', 'argparse'}


def test_version(capsys):
    main(['--version'])
    assert capsys.readouterr().out.strip() == kd_plugins.__version__


# ---------------------------------------------------------------------- the commands
@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_explains_itself(name, capsys):
    if name in ('train', 'test', 'benchmark'):
        pytest.importorskip('mmengine')
    assert ended(name, '--help') == 0
    text = capsys.readouterr().out
    assert text.startswith('usage: ') and name in text.splitlines()[0]


def test_a_command_is_one_line(monkeypatch, tmp_path):
    (tmp_path / 'a_command_of_a_test.py').write_text('def main(argv): called.append(argv)\ncalled = []\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(COMMANDS, 'greet', ('a_command_of_a_test:main', 'greets'))
    monkeypatch.setattr(sys, 'argv', ['kd-plugins', 'greet', '--loudly', 'you'])
    main()
    main(['greet'])
    assert sys.modules['a_command_of_a_test'].called == [['--loudly', 'you'], []]
    assert 'greets' in cli.help_text()


def test_mistakes_are_one_sentence(monkeypatch, tmp_path):
    assert ended('trian', 'x') == "error: kd-plugins has no command 'trian'; did you mean 'train'?"
    assert ended('recipes', 'cwdd') == "error: recipes: there is no recipe 'cwdd'; did you mean 'cwd'?"
    assert "no task 'detect'; did you mean 'detection'" in ended('recipes', '--task', 'detect')
    # A framework that is not there, and a mistake of ours, which is one to be reported.
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ('no_such_framework', 'kd_plugins.no_such_module'):
        module = f'needs_{name[-6:]}'
        (tmp_path / f'{module}.py').write_text(f'import {name}\n')
        monkeypatch.setitem(COMMANDS, 'x', (f'{module}:main', ''))
        if name.startswith('kd_plugins'):
            with pytest.raises(ModuleNotFoundError):
                main(['x'])
        else:
            assert ended('x').startswith('error: kd-plugins x needs no_such_framework, which is not installed')


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, 'find_command', lambda name: lambda words: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(['train'])


#: Of the repository, not of the package: setup.cfg leaves them out of the wheel.
KEPT_OUT = ('install.py', 'draw_results.py')


@pytest.mark.parametrize('tool', sorted(p.name for p in TOOLS.glob('*.py') if p.name not in KEPT_OUT))
def test_tools_are_doors(tool, monkeypatch):
    called = []
    monkeypatch.setattr(cli, 'main', called.append)
    monkeypatch.setattr(sys, 'argv', [tool, '--a', 'b'])
    runpy.run_path(str(TOOLS / tool), run_name='__main__')
    assert called == [[tool[:-3].replace('_', '-'), '--a', 'b']] and called[0][0] in COMMANDS
    runpy.run_path(str(TOOLS / tool), run_name='imported')
    assert len(called) == 1


# ---------------------------------------------------------------------- recipes
def test_the_table_of_recipes(capsys):
    lines = table().splitlines()
    assert len(lines) == len(names()) + 2, 'one line each at 100 columns'
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[2:]] == names()
    narrow = table(width=70).splitlines()
    assert max(map(len, narrow)) <= 75 and len(narrow) > len(lines)
    main(['recipes', '--task', 'segmentation'])
    shown = capsys.readouterr().out
    assert 'pixel_kl' in shown and 'cwd' in shown and 'yolo_logit' not in shown


def test_a_recipe_is_printed_as_it_is(capsys):
    main(['recipes', 'cwd'])
    assert capsys.readouterr().out == (FOLDER / 'cwd.yaml').read_text()


# ---------------------------------------------------------------------- info
def test_info(monkeypatch, capsys):
    zoos = (Zoo('Here', ('pytest', 'kd_plugins.errors'), 'dev'), Zoo('Missing', ('pytest', 'no_such_zoo'), 'yolo'))
    monkeypatch.setattr(info, 'ZOOS', zoos)
    main(['info'])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    shown = dict(lines)
    assert shown['kd_plugins'] == kd_plugins.__version__ and shown['python'] == sys.version.split()[0]
    assert shown['pytest'] == pytest.__version__ and shown['no_such_zoo'] == 'not installed'
    assert shown['Here'] == 'ready' and shown['Missing'] == f'needs no_such_zoo: {how_to_install("yolo")}'
    assert shown['devices'].startswith('cpu') and shown['system']


def test_info_tells_what_is_broken(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'broken_zoo.py').write_text('print("noise")\nassert False, "mmcv 9 is incompatible"\n')
    (tmp_path / 'half_zoo.py').write_text('import no_such_part\n')
    found = what_is_missing(Zoo('x', ('broken_zoo',), 'mm'))
    assert found == 'broken_zoo is installed and cannot be imported (AssertionError: mmcv 9 is incompatible)'
    half = Zoo('x', ('half_zoo',), 'mm')
    assert what_is_missing(half) == f'needs no_such_part: {how_to_install("mm")}'
    # OneDL's distributions would overwrite upstream's.
    assert what_is_missing(half, upstream=True) == 'needs no_such_part: pip install no_such_part'


def test_versions_name_their_distribution():
    version = pytest.__version__
    assert version_of('pytest', ['pytest']) == version
    assert version_of('_pytest', ['pytest']) == f'{version} (pytest)'
    assert version_of('x', ()) == 'not installed'


def test_the_frameworks_of_info_are_those_of_the_extras():
    """Each zoo can be installed by what it says."""
    from importlib import metadata

    extras = set(metadata.metadata('kd-plugins').get_all('Provides-Extra'))
    assert all(set(zoo.extra.split(',')) <= extras for zoo in info.ZOOS)
