"""Docstrings for MkDocs: formulas, written as Sphinx has them, become MathML, which browsers draw without a script."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

# The rest of the line, and the lines below it that are indented further.
BLOCK = re.compile(r'^( *)\.\. math::(.*(?:\n(?:\1 +\S.*|[ ]*(?=\n\1 +\S)))*)', re.MULTILINE)
#: In front of a block of code.
LITERAL = re.compile(r'::(?=\n\n +)')
INLINE = re.compile(r':math:`(.*?)`', re.DOTALL)


class Formulas(griffe.Extension):
    """Rewrites the docstrings before they are taken for Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that has been read."""
        if obj.docstring is not None:
            text = BLOCK.sub(lambda m: f'{m[1]}<div>{_mathml(m[2], "block")}</div>', obj.docstring.value)
            text = INLINE.sub(lambda m: _mathml(m[1], 'inline'), text)
            obj.docstring.value = LITERAL.sub(':', text)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called when all is read: what a package takes from its modules is documented there, not twice."""
        for module in (pkg, *pkg.modules.values()):
            if module.is_package or module.is_subpackage:
                module.exports = None


def _mathml(latex: str, display: str) -> str:
    return convert(' '.join(latex.split()), display=display)
