"""The picture of the first page shows the numbers of its table."""

import runpy

import pytest

pytest.importorskip('matplotlib')
from PIL import Image

from tests.doc_blocks import ROOT

TOOL = runpy.run_path(str(ROOT / 'tools' / 'draw_results.py'))


def test_the_committed_picture_is_of_the_table():
    picture = ROOT / 'docs' / 'img' / 'results.png'
    found = TOOL['rows']((ROOT / 'README.md').read_text())
    assert len(found) > 3 and picture.stat().st_size < 150_000
    with Image.open(picture) as image:
        assert image.text['Description'] == TOOL['said'](found), 'python tools/draw_results.py'


def test_rows_and_colours(tmp_path):
    text = TOOL['HEAD'] + (
        ' seeds |\n| --- |\n| a, b (mAP) | 1.0 ± 0.5 | `x` 3.0 ± 0.1, `y` 0.5 | **+2.0 ± 0.6**, -0.5 ± 0.9 | 3 |\n'
        "| the same, Ultralytics' own `z=` | 2.0 | 1.0 | -1.0 | 1 |\n\nend"
    )
    found = TOOL['rows'](text)
    assert [(r.data, r.method, r.scores, r.gain) for r in found] == [
        ('a, b (mAP)', 'x', '1.0 → 3.0', '+2.0 ± 0.6'),
        ('a, b (mAP)', 'y', '1.0 → 0.5', '-0.5 ± 0.9'),
        ('the same', 'z=', '2.0 → 1.0', '-1.0'),
    ]
    assert [r.color for r in found] == [TOOL['BETTER'], TOOL['UNDECIDED'], TOOL['WORSE']]
    TOOL['draw'](found, tmp_path / 'x.png')
    assert Image.open(tmp_path / 'x.png').text['Description'] == TOOL['said'](found)
    with pytest.raises(ValueError, match='not as many'):
        TOOL['rows'](text.replace(', -0.5 ± 0.9', ''))
