"""Reads the code blocks of the manual, and what an HTML comment before one says about running it.

``<!-- not run: REASON -->`` before a block excuses all of it, ``<!-- not run [WORDS]: REASON -->`` the commands
in it that begin with WORDS. A REASON begins with one of `REASONS`; ``elsewhere`` is followed by the test that runs it.
markdown-it-py knows fences inside lists and the line of each block; what runs examples (sybil, pytest-examples) knows
Python, and these pages are mostly commands.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
#: Why something cannot be run by a test.
REASONS = ('installs', 'download', 'GPU', 'own data', 'elsewhere')
#: What is shown, not run.
OUTPUT = ('text', '')
COMMENT = re.compile(r'<!-- not run(?: \[(?P<words>[^]]+)\])?: (?P<reason>.*?) -->', re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: ``language`` and ``body``, and ``excuses`` (``{first words or '': reason}``)."""

    page: str
    line: int
    language: str
    body: str
    excuses: dict[str, str] = field(default_factory=dict)

    def commands(self) -> Iterator[list[str]]:
        """The words of the commands of a shell block that are to be run; continued lines are one."""
        for line in self.body.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            if words and not any(' '.join(words).startswith(start) for start in self.excuses):
                yield words


def read(page: Path) -> list[Block]:
    """All blocks of a page that are no output."""
    found, excuses = [], {}
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == 'html_block':
            excuses.update((m['words'] or '', m['reason']) for m in COMMENT.finditer(token.content))
        elif token.type == 'fence':
            if token.info not in OUTPUT:
                name = str(page.relative_to(ROOT))
                found.append(Block(name, token.map[0] + 1, token.info, token.content, excuses))
            excuses = {}
    return found
