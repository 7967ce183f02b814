"""Arrows point one way (DESIGN, section 1): every import of the package, read from its source, against one table."""

import ast
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / 'kd_plugins'

#: What each part may import of the others, those before it in the chain first. An import inside a function or for
#: annotations only is one too; a name in a registration, which is imported when it is asked for, is none.
HEADS = 'errors losses adapters predictions'
ENGINE = f'{HEADS} config_files distiller extras recipes'
TEACHERS = f'{ENGINE} teachers'
HOSTS = f'{TEACHERS} classification mm yolo registry type_names'
MAY_IMPORT = {
    'errors': '',
    'type_names': '',
    'config_files': 'errors',
    'extras': '',
    'recipes': 'config_files errors',
    'losses': 'errors',
    'adapters': 'errors',
    'predictions': 'errors losses adapters',
    'distiller': f'{HEADS} recipes type_names',
    'teachers': ENGINE,
    'registry': 'extras',
    'classification': f'{TEACHERS} registry type_names',
    'mm': f'{TEACHERS} classification registry type_names',
    # Waits for Ultralytics.
    'on_import': '',
    'yolo': f'{TEACHERS} type_names on_import',
    # Called by a start of Python that wants to distil in Ultralytics.
    'autoload': 'errors yolo on_import',
    'analysis': HOSTS,
    'deploy': HOSTS,
    'lab': f'{HOSTS} analysis deploy',
    'info': 'errors extras recipes',
    '__main__': 'cli',
    'cli': f'{HOSTS} autoload analysis deploy lab info',
}

FRAMEWORKS = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'ultralytics', 'timm', 'torchvision'}
#: Who imports which of them; whoever is not named imports none.
OPENMMLAB = {'mmengine', 'mmcv', 'mmdet', 'mmseg'}
MAY_USE = {
    'registry': {'mmengine'},
    'classification': {*OPENMMLAB, 'timm', 'torchvision'},
    'mm': OPENMMLAB,
    'yolo': {'ultralytics'},
    'autoload': {'ultralytics'},
    'analysis': FRAMEWORKS,
    'deploy': FRAMEWORKS,
    'lab': FRAMEWORKS,
    'info': FRAMEWORKS,
}
#: The same, but inside functions only: whoever uses another source of teachers does not need them.
MAY_USE_LATE = {'teachers': {'timm', 'torchvision'}}

#: What is imported at the start of a program that may not want torch at all, nor wait for it.
LIGHT = ('kd_plugins', 'kd_plugins.errors', 'kd_plugins.autoload', 'kd_plugins.on_import')

#: Arrows that point the wrong way today, ``importer -> imported``. Nothing may be added; what is mended is taken out.
KNOWN = {
    # yolo-kd enable | disable | status; autoload in turn imports the callback.
    'kd_plugins.yolo.cli -> kd_plugins.autoload',
}


@dataclass(frozen=True)
class Arrow:
    """One import.

    Attributes:
        importer: Dotted name of the module that it stands in.
        imported: Dotted name of the module that it names, as far as it is known to be a module.
        line: Where it stands.
        late: Whether it stands inside a function.
        names: What it takes from the module; empty for ``import module``.
    """

    importer: str
    imported: str
    line: int
    late: bool = False
    names: tuple = ()

    def __str__(self) -> str:
        return f'{self.importer}:{self.line} imports {self.imported}'


def sources(package=PACKAGE):
    """Source by dotted name of the module; packages without their ``__init__``."""
    found = {}
    for path in sorted(package.rglob('*.py')):
        parts = path.relative_to(package.parent).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path.read_text(encoding='utf-8')
    return found


class _Walker(ast.NodeVisitor):
    def __init__(self, module, is_package, modules):
        self.module, self.is_package, self.modules = module, is_package, modules
        self.depth, self.arrows = 0, []

    def _add(self, node, imported, names=()):
        self.arrows.append(Arrow(self.module, imported, node.lineno, self.depth > 0, tuple(names)))

    def visit_Import(self, node):
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node):
        base = node.module or ''
        if node.level:
            # One dot is the package that the module lies in, which is itself for an __init__.
            parts = self.module.split('.')
            parts = parts[: len(parts) - node.level + self.is_package]
            base = '.'.join([*parts, base] if base else parts)
        names = [alias.name for alias in node.names]
        modules = [name for name in names if f'{base}.{name}' in self.modules]
        for name in modules:
            self._add(node, f'{base}.{name}')
        rest = [name for name in names if name not in modules]
        if rest:
            self._add(node, base, rest)

    def visit_Call(self, node):
        # import_module('kd_plugins.mm') is an import, import_module(name) is one by name.
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', None)
        first = node.args[0] if node.args else None
        if name in ('import_module', '__import__') and isinstance(first, ast.Constant) and isinstance(first.value, str):
            self._add(node, first.value)
        self.generic_visit(node)

    def _function(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function


def arrows(modules):
    """Every import of these modules, source by dotted name."""
    found = []
    for module, source in modules.items():
        is_package = any(other.startswith(f'{module}.') for other in modules)
        walker = _Walker(module, is_package, modules)
        walker.visit(ast.parse(source, module))
        found += walker.arrows
    return found


def part_of(module):
    """The part of the package that a module belongs to: ``'mm'`` of ``'kd_plugins.mm.hook'``, '' of the package."""
    return module.partition('.')[2].partition('.')[0]


def wrong(arrow, root='kd_plugins'):
    """What is wrong with an arrow, in words; None when nothing is."""
    importer, top = part_of(arrow.importer), arrow.imported.partition('.')[0]
    if top == root:
        imported = part_of(arrow.imported)
        if importer == '':
            # The door of the package: `import kd_plugins` must bring nothing along.
            return None if arrow.late else f'{arrow}: the package itself imports inside functions only'
        if imported == '':
            other = set(arrow.names) - {'__version__'}
            return f'{arrow}: {", ".join(sorted(other))} leads back to where all parts are' if other else None
        if importer not in MAY_IMPORT:
            return f'{arrow}: {importer!r} has no place in MAY_IMPORT yet'
        if imported not in (importer, *MAY_IMPORT[importer].split()):
            return f'{arrow}: {importer} may not know {imported}'
    elif top in FRAMEWORKS:
        if top in MAY_USE.get(importer, ()) or (arrow.late and top in MAY_USE_LATE.get(importer, ())):
            return None
        return f'{arrow}: {importer or root} may not use {top}' + ('' if arrow.late else ' there')
    return None


@pytest.fixture(scope='module')
def package():
    return arrows(sources())


def test_arrows_point_one_way(package):
    found = [a for a in package if wrong(a)]
    new = [wrong(a) for a in found if f'{a.importer} -> {a.imported}' not in KNOWN]
    assert not new, '\n'.join(new)
    mended = KNOWN - {f'{a.importer} -> {a.imported}' for a in found}
    assert not mended, f'no longer there, take out of KNOWN: {mended}'


def test_every_part_has_a_place():
    parts = {part_of(module) for module in sources()} - {''}
    assert parts <= MAY_IMPORT.keys(), 'say in MAY_IMPORT what the new part may import'
    assert {name for names in MAY_IMPORT.values() for name in names.split()} <= MAY_IMPORT.keys()


def test_the_table_itself_has_no_circle():
    left = {part: set(names.split()) for part, names in MAY_IMPORT.items()}
    while left:
        free = {part for part, names in left.items() if not names & left.keys()}
        assert free, f'these know each other in a circle: {sorted(left)}'
        left = {part: names for part, names in left.items() if part not in free}


def test_the_table_says_what_the_design_says():
    may = {part: set(names.split()) for part, names in MAY_IMPORT.items()}
    assert may['losses'] == may['adapters'] == {'errors'}
    chain = ('errors', 'predictions', 'distiller', 'teachers', 'mm', 'lab', 'cli')
    for below, above in pairwise(chain):
        assert below in may[above] and above not in may[below]
    for one, other in (('mm', 'yolo'), ('classification', 'yolo')):
        assert one not in may[other] and other not in may[one]
    below = {'losses', 'adapters', 'predictions', 'distiller'}
    assert not below & (MAY_USE.keys() | MAY_USE_LATE.keys()) and 'teachers' not in MAY_USE


@pytest.mark.parametrize('module', LIGHT)
def test_light_modules_import_the_standard_library_only(package, module):
    early = {a.imported for a in package if a.importer == module and not a.late} - set(LIGHT)
    assert {name.partition('.')[0] for name in early} <= sys.stdlib_module_names


# ---------------------------------------------------------------------- the checker itself
def judge(importer, source):
    """What the checker says of this source, as a module of a made-up package."""
    others = 'losses.base', 'distiller.engine', 'mm.hook', 'yolo.callback', 'lab.report', 'registry'
    modules = {f'kd_plugins.{name}': '' for name in others}
    for name in list(modules):
        modules.setdefault(name.rpartition('.')[0], '')
    modules.setdefault('kd_plugins', '')
    modules[f'kd_plugins.{importer}'] = source
    return [text for a in arrows(modules) if (text := wrong(a))]


REVERSED = {
    'plain': ('losses.kl_div', 'import kd_plugins.distiller.engine'),
    'from': ('distiller.terms', 'from kd_plugins.mm.hook import DistillHook'),
    'of a submodule': ('distiller.terms', 'from kd_plugins.mm import hook'),
    'of a part': ('distiller.terms', 'from kd_plugins import mm'),
    'with another name': ('adapters.conv', 'import kd_plugins.losses.base as b'),
    'relative': ('losses.kl_div', 'from ..distiller import engine'),
    'relative to the package': ('losses.kl_div', 'from .. import distiller'),
    'second of two': ('predictions.dense', 'import os, kd_plugins.teachers'),
    'in a function': ('teachers.frozen', 'def f():\n    from kd_plugins.mm.hook import DistillHook'),
    'in a method': ('distiller.bank', 'class A:\n    async def f(self):\n        import kd_plugins.yolo.callback'),
    'for annotations': (
        'losses.box_l1',
        'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kd_plugins.predictions.dense import Dense',
    ),
    'if it works': ('distiller.taps', 'try:\n    import kd_plugins.mm.hook\nexcept ImportError:\n    pass'),
    'by a call': ('distiller.taps', "importlib.import_module('kd_plugins.mm.hook')"),
    'by another call': ('distiller.taps', "engine = __import__('kd_plugins.mm')"),
    'mm to yolo': ('mm.hook', 'from kd_plugins.yolo.callback import DistillCallback'),
    'yolo to mm': ('yolo.callback', 'from kd_plugins.mm.hook import DistillHook'),
    'yolo to classification': ('yolo.callback', 'import kd_plugins.classification.sample'),
    'classification to yolo': ('classification.sample', 'import kd_plugins.yolo.callback'),
    'classification to mm': ('classification.sample', 'import kd_plugins.mm.hook'),
    'a host to the workshop': ('mm.hook', 'def f():\n    import kd_plugins.lab.report'),
    'the workshop to the command': ('lab.report', 'from kd_plugins.cli import main'),
    'through the door': ('distiller.taps', 'from kd_plugins import config'),
    'from an unknown part': ('novelty.new', 'import kd_plugins.losses.base'),
    'to an unknown part': ('losses.kl_div', 'import kd_plugins.novelty.new'),
    'a framework below': ('distiller.taps', 'import mmengine.hooks'),
    'a framework below, late': ('predictions.readers', 'def f():\n    from ultralytics import YOLO'),
    'timm at once': ('teachers.from_timm', 'import timm'),
    'timm at once, in a class': ('teachers.from_timm', 'class A:\n    import timm'),
    'mmdet late': ('teachers.frozen', 'def f():\n    import mmdet'),
    'the zoo of the others': ('yolo.callback', 'from mmengine.config import Config'),
    'the zoo of the others, late': ('mm.hook', 'def f():\n    import ultralytics'),
}


@pytest.mark.parametrize(('importer', 'source'), REVERSED.values(), ids=REVERSED)
def test_a_reversed_arrow_is_found(importer, source):
    (text,) = judge(importer, source)
    assert text.startswith(f'kd_plugins.{importer}:{len(source.splitlines()) if "try" not in source else 2} imports ')


RIGHT = {
    'below': ('distiller.terms', 'from kd_plugins.losses.base import DistillLoss'),
    'itself': ('mm.setup', 'from kd_plugins.mm.hook import DistillHook\nfrom . import hook\nfrom .hook import X'),
    'the version': ('yolo.recipe', 'from kd_plugins import __version__\nimport kd_plugins'),
    'a submodule from the top': ('mm.cli', 'from kd_plugins import registry'),
    'the standard library and torch': ('losses.kl_div', 'import os.path\nfrom torch import nn'),
    'a registration': ('teachers.sources', "register('config', module='kd_plugins.mm.source')"),
    'whatever name comes': ('teachers.sources', 'importlib.import_module(name)'),
    'a comment or a text': ('losses.kl_div', '"""import kd_plugins.mm.hook"""  # import kd_plugins.mm.hook'),
    'a name that only begins alike': ('losses.kl_div', 'import mmengine_like, kd_plugins_of_mine.mm'),
    'its own framework': ('mm.hook', 'from mmengine.hooks import Hook'),
    'timm late': ('teachers.from_timm', 'def f():\n    import timm'),
    'a lambda is late': ('teachers.from_timm', "f = lambda: __import__('timm')"),
    'the workshop': ('lab.report', 'import kd_plugins.mm.hook, kd_plugins.yolo.callback, matplotlib, ultralytics'),
}


@pytest.mark.parametrize(('importer', 'source'), RIGHT.values(), ids=RIGHT)
def test_an_arrow_that_points_the_right_way_is_left_alone(importer, source):
    assert judge(importer, source) == []


def test_the_package_itself_imports_late_only():
    for source, count in (('from kd_plugins.mm.hook import X', 1), ('def f():\n    import kd_plugins.mm.hook', 0)):
        modules = {'kd_plugins': source, 'kd_plugins.mm': '', 'kd_plugins.mm.hook': ''}
        assert len([a for a in arrows(modules) if wrong(a)]) == count


def test_the_walk_sees_the_package(package):
    """Not one file of it goes unseen, and imports of each kind are found."""
    importers = {a.importer for a in package}
    assert len(sources()) == len(list(PACKAGE.rglob('*.py'))) and len(importers) > 100
    assert {'kd_plugins.losses.kl_div', 'kd_plugins.mm.hook', 'kd_plugins.yolo', 'kd_plugins.lab'} & importers
    assert any(a.late for a in package) and any(a.imported.startswith('mmengine') for a in package)
