"""The notebooks run in a real kernel, from an empty folder, and are kept without what they print."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: By file: the package that it needs.
NEEDS = {'mmengine': 'mmengine', 'ultralytics': 'ultralytics'}


def test_there_is_one_for_each_zoo_and_none_holds_outputs():
    files = sorted((ROOT / 'examples').glob('*.ipynb'))
    assert [file.stem for file in files] == sorted(NEEDS)
    for file in files:
        for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
            printed = cell.get('outputs') or cell.get('execution_count')
            assert not printed and not cell['metadata'], f'{file.name}: clear its outputs (Kernel, Restart and clear)'


@pytest.mark.parametrize('name', [n for n, package in NEEDS.items() if find_spec(package)])
def test_it_runs(name, tmp_path, monkeypatch):
    nbclient = pytest.importorskip('nbclient', reason="pip install -e '.[dev]' has the kernel of the notebooks")
    nbformat = pytest.importorskip('nbformat')
    for key, value in dict(
        PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
        YOLO_CONFIG_DIR=str(tmp_path),
        YOLO_OFFLINE='true',
        IPYTHONDIR=str(tmp_path / 'ipython'),
        MPLBACKEND='module://matplotlib_inline.backend_inline',
    ).items():
        monkeypatch.setenv(key, value)
    book = nbformat.read(ROOT / 'examples' / f'{name}.ipynb', 4)
    client = nbclient.NotebookClient(
        book, timeout=600, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))
    )
    client.execute()
    outputs = [output for cell in book.cells for output in cell.get('outputs', ())]
    printed = ''.join(output.get('text', '') for output in outputs)
    assert 'Knowledge distillation is ON' in printed and 'scored ' in printed
    assert any('image/png' in output.get('data', {}) for output in outputs), 'the plot'
