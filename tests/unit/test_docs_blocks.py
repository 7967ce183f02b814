"""Every block of the manual is run by tests/integration/test_docs_run.py, or says why not."""

import re
from dataclasses import replace

import pytest

pytest.importorskip('markdown_it')

from tests.doc_blocks import PAGES, REASONS, ROOT, read

BLOCKS = [block for page in PAGES for block in read(page)]
IDS = [f'{b.page}:{b.line}' for b in BLOCKS]


@pytest.mark.parametrize('block', BLOCKS, ids=IDS)
def test_a_block_is_run_or_excused(block):
    assert '' in block.excuses or block.language in ('bash', 'python'), f'nothing runs {block.language!r}'
    for reason in block.excuses.values():
        assert reason.startswith(REASONS), reason
        for path, name in re.findall(r'(tests/[\w/]+\.py)(?:::(\w+))?', reason):
            assert f'def {name}' in (ROOT / path).read_text(), reason


@pytest.mark.parametrize('block', BLOCKS, ids=IDS)
def test_an_excuse_excuses_something(block):
    for start in filter(None, block.excuses):
        commands = [' '.join(words) for words in replace(block, excuses={}).commands()]
        assert any(c.startswith(start) for c in commands), start


def test_fences_and_comments_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr('tests.doc_blocks.ROOT', tmp_path)
    page = tmp_path / 'page.md'
    page.write_text(
        '- in a list:\n\n  ```bash\n  a b \\\n    c  # why\n  d\n  ```\n\n'
        '<!-- not run [d]: GPU -->\n```bash\nd e\nf\n```\n\n'
        '<!-- not run: download: x -->\n```python\n1\n```\n\n```text\noutput\n```\n'
    )
    first, second, third = read(page)
    assert list(first.commands()) == [['a', 'b', 'c'], ['d']]
    assert list(second.commands()) == [['f']]
    assert third.excuses == {'': 'download: x'} and third.line == 16
