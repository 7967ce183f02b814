"""What packages say of their own optional packages stays off the terminal; what they register is there."""

import sys
import warnings

import pytest

pytest.importorskip('mmengine')
from kd_plugins.mm.imports import import_package

UTILS = """
import warnings
registered = []

def register_all_modules(init_default_scope=True):
    print('Could not import something')
    warnings.warn('something is not installed')
    registered.append(init_default_scope)
    {more}
"""


@pytest.mark.parametrize('more', ['pass', "raise ImportError('needs more')"])
def test_it_is_imported_in_silence(more, tmp_path, monkeypatch, capsys):
    (tmp_path / 'chatty').mkdir()
    (tmp_path / 'chatty' / '__init__.py').touch()
    (tmp_path / 'chatty' / 'utils.py').write_text(UTILS.format(more=more))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('chatty', 'chatty.utils'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        import_package('chatty')
        warnings.warn('others are heard', stacklevel=1)
    assert sys.modules['chatty.utils'].registered == [False], 'the scope of the run is not changed'
    out = capsys.readouterr()
    assert (out.out, out.err) == ('', '') and [str(w.message) for w in caught] == ['others are heard']


@pytest.mark.parametrize('scope', [None, '', 'mmengine', 'no_such_package'])
def test_what_is_no_package_is_left_to_the_run(scope):
    import_package(scope)
