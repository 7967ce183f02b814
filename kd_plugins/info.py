"""``kd-plugins info``: versions, and which frameworks can be used here."""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata

from kd_plugins import __version__
from kd_plugins.errors import in_words
from kd_plugins.extras import how_to_install


@dataclass(frozen=True)
class Zoo:
    """Where students come from.

    Attributes:
        name: What users call it.
        modules: What is imported for it, in this order.
        extra: The extra of this package that installs it.
    """

    name: str
    modules: tuple[str, ...]
    extra: str


ZOOS = (
    Zoo('MMDetection', ('torch', 'mmengine', 'mmcv', 'mmcv.ops', 'mmdet', 'kd_plugins.mm'), 'mm'),
    Zoo('MMSegmentation', ('torch', 'mmengine', 'mmcv', 'mmcv.ops', 'mmseg', 'kd_plugins.mm'), 'mm'),
    Zoo('timm in MMEngine', ('torch', 'mmengine', 'timm', 'kd_plugins.mm'), 'mm,timm'),
    Zoo('Ultralytics', ('torch', 'ultralytics', 'kd_plugins.yolo'), 'yolo'),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Print them.

    Args:
        argv: Command line; default ``sys.argv[1:]``.
    """
    argparse.ArgumentParser(
        prog='kd-plugins info', description='Versions, and which frameworks can be used here.'
    ).parse_args(argv)
    modules = dict.fromkeys(m for zoo in ZOOS for m in zoo.modules if '.' not in m and m != 'kd_plugins')
    rows = [('kd_plugins', __version__), ('python', platform.python_version()), ('system', platform.platform())]
    distributions = metadata.packages_distributions()
    rows += [(name, version_of(name, distributions.get(name, ()))) for name in modules]
    for name, version in rows:
        print(f'{name:17} {version}', flush=True)
    print(f'{"devices":17} {devices()}', flush=True)
    print()
    for zoo in ZOOS:
        print(f'{zoo.name:17} ', end='', flush=True)
        # OneDL's distributions, which the extra brings, would overwrite those of the same import names.
        upstream = 'mmengine' in distributions.get('mmengine', ())
        print(what_is_missing(zoo, upstream) or 'ready', flush=True)


def devices() -> str:
    """What torch can compute on here."""
    try:
        import torch
    except ImportError as error:
        return f'unknown, as torch cannot be imported ({in_words(error)})'
    found = [f'cpu ({torch.get_num_threads()} threads)']
    found += [f'cuda:{i} ({torch.cuda.get_device_name(i)})' for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append('mps')
    return ', '.join(found)


def version_of(module: str, distributions: Sequence[str]) -> str:
    """The version of an import name, with its distribution where that has another name.

    Args:
        module: The name.
        distributions: Those that install it: upstream's mmengine and onedl-mmengine are the same import.
    """
    found = [(metadata.version(d), d) for d in distributions]
    return ', '.join(v if d == module else f'{v} ({d})' for v, d in found) or 'not installed'


def what_is_missing(zoo: Zoo, upstream: bool = False) -> str | None:
    """Why a zoo cannot be used, and what installs it; None where everything can be imported.

    It is really imported: versions that are installed together may still refuse each other.

    Args:
        zoo: The zoo.
        upstream: Whether the frameworks that are there are upstream's.
    """
    for name in zoo.modules:
        # Some print what optional packages they miss.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            try:
                import_module(name)
            except ModuleNotFoundError as error:
                own = upstream and 'mm' in zoo.extra
                return f'needs {error.name}: {f"pip install {error.name}" if own else how_to_install(zoo.extra)}'
            except Exception as error:
                return f'{name} is installed and cannot be imported ({in_words(error)})'
    return None
