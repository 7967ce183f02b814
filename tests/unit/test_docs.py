"""What the manual says exists: links, files, options, recipes, losses; snippets are Python."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import kd_plugins.losses as losses
from kd_plugins.cli import COMMANDS, find_command
from kd_plugins.lab.comparison.yolo.experiment import DEFAULT, NATIVE
from kd_plugins.recipes import find_recipe, is_name, names

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r'^ *```(\w*)\n(.*?)^ *```', re.MULTILINE | re.DOTALL)
TOOLS = {'train', 'test', 'compare', 'demo', 'benchmark', 'coco_to_yolo', 'prepare_digits', 'draw_results'}


def text_of(page):
    return page.read_text()


def blocks(language):
    return [
        pytest.param(body, id=f'{name}-{i}')
        for page, name in zip(PAGES, IDS, strict=True)
        for i, (kind, body) in enumerate(FENCE.findall(text_of(page)))
        if kind == language
    ]


def anchor(heading):
    return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')


def commands():
    """Commands of all pages, in words; continued lines are one."""
    for param in blocks('bash'):
        (body,) = param.values
        for line in body.replace('\\\n', ' ').splitlines():
            if words := shlex.split(line, comments=True):
                # Variables of the environment come first.
                while '=' in words[0]:
                    words = words[1:]
                yield pytest.param(words, id=f'{param.id}-{" ".join(words)[:60]}')


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = text_of(page)
    for target in re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', text)):
        if '://' in target:
            continue
        path, _, part = target.partition('#')
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if part:
            assert part in {anchor(h) for h in re.findall(r'^#+ (.*)$', text_of(found), re.MULTILINE)}, target


def test_the_front_page_is_one_page():
    assert len(text_of(PAGES[0]).splitlines()) <= 150


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r'[\w/]+\.md', (ROOT / 'mkdocs.yml').read_text()))
    assert listed == {p.relative_to(ROOT / 'docs').as_posix() for p in (ROOT / 'docs').rglob('*.md')}


@pytest.mark.parametrize('body', blocks('python'))
def test_snippets_are_python(body):
    ast.parse(body)


@pytest.mark.parametrize('page', PAGES, ids=IDS)
def test_losses_and_recipes_exist(page):
    text = text_of(page)
    for name in re.findall(r"""type(?:=|: )'?(\w+Loss)\b""", text):
        assert hasattr(losses, name), name
    for name in re.findall(r"""recipe='([a-z]\w*)'""", text):
        assert name in names(), name


@pytest.fixture(scope='module')
def options_of():
    """Options that a command knows, from its help."""
    found = {}

    def options(name):
        if name not in found:
            import contextlib
            import io

            pytest.importorskip('mmengine')
            shown = io.StringIO()
            helps = [[*more, '--help'] for more in ([], *MORE.get(name, ()))]
            with contextlib.redirect_stdout(shown):
                for words in helps:
                    with pytest.raises(SystemExit):
                        find_command(name)(words)
            found[name] = set(re.findall(r'--[\w-]+', shown.getvalue()))
        return found[name]

    return options


#: Words behind which a command has other options.
ZOOS = (['--zoo', 'mm'], ['--zoo', 'yolo'])
MORE = dict(compare=ZOOS, benchmark=(*ZOOS, ['--loss']), init=(['coco'], ['segmentation'], ['images']))


@pytest.mark.parametrize('words', list(commands()))
def test_commands_have_their_options(words, options_of):
    if words[0] in ('python', 'torchrun'):
        script = next(w for w in words[1:] if w.endswith('.py'))
        assert (ROOT / script).is_file(), script
        name = Path(script).stem.replace('_', '-')
        rest = words[words.index(script) + 1 :]
    elif words[0] == 'kd-plugins':
        name, rest = words[1], words[2:]
    elif words[0] == 'yolo-kd':
        for word in words:
            key, _, value = word.partition('=')
            if key == 'kd':
                # A file of one's own is not here.
                for recipe in value.split(','):
                    assert not (is_name(recipe) or '::' in recipe) or find_recipe(recipe).is_file(), recipe
        return
    elif words[0] == 'make':
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        assert {w for w in words[1:] if '=' not in w} <= set(targets)
        return
    else:
        # pip, yolo: not ours.
        assert words[0] in ('pip', 'yolo'), words[0]
        return
    if name not in COMMANDS:
        assert name in {t.replace('_', '-') for t in TOOLS} or words[0] == 'python'
        return
    given = {w.partition('=')[0] for w in rest if w.startswith('--')}
    assert given <= options_of(name), given - options_of(name)
    if '--kd' in rest:
        for value in rest[rest.index('--kd') + 1 :]:
            if value.startswith('--'):
                break
            # Of a framework's own words: without --zoo these are another one's arms.
            assert value in {*names(), NATIVE, DEFAULT} or value.endswith(('.py', '.yaml')), value
