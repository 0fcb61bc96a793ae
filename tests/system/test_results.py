"""results/: pages are short and alike, and say no number that no file holds; tables are those of the JSON files."""

import json
import re

import pytest
from support import ROOT, forking

PAGES = sorted((ROOT / 'results').glob('*.md'))
STUDIES = [page for page in PAGES if page.name not in ('README.md', 'LOG.md')]
NUMBER = re.compile(r'(?<![\w.,/-])[-+]?\d[\d,]*(?:\.\d+)?(?![\w])')
# what no file holds, and why
EXCEPTIONS = {
    '0.015': 'the difference that five seeds can show, of the standard deviation of the differences',
    '0.006': 'the same for 20 seeds',
    '0.009': 'that standard deviation; and 0.0085, rounded',
    '0.035': 'what version 0.1.0 said',
    '1,742': 'windows of tinyshakespeare, a fact of the data set',
    '283': 'how many numbers a review recomputed',
    '135': 'million parameters of SmolLM2',
    '200': 'iterations of fine-tuning in studies/contest.py of commit 7a111e7',
    '128': 'tokens of a row, ids and sequences in the repeats study, settings of scripts that its page does not name',
}


def values(found):
    """All numbers in a value of a JSON file."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        return {value for part in found for value in values(part)}
    return {abs(found)} if isinstance(found, (int, float)) and not isinstance(found, bool) else set()


def numbers(text):
    """The numbers of a page with three digits or more, as they are written, without code, links, dates and papers."""
    text = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)|arXiv:\S+|\d{4}-\d\d-\d\d', ' ', text, flags=re.DOTALL)
    return [found.strip('+-,') for found in NUMBER.findall(text) if sum(map(str.isdigit, found)) > 2]


def known(page):
    """
    {decimals: the numbers that a page may say, rounded to so many}: of the tables, JSON files and studies that it
    names, and of the JSON files that the tables name. README.md and LOG.md, which are about all studies, may say any.
    """
    tables = [(ROOT / 'results' / path) for path in re.findall(r'\((tables/[\w-]+\.md)\)', page.read_text('utf-8'))]
    if page.name in ('README.md', 'LOG.md'):
        tables = [*(ROOT / 'results' / 'tables').glob('*.md')]
    texts = [path.read_text('utf-8') for path in tables]
    named = re.findall(r'(?:assets/)?([\w*]+\.json)', ' '.join([page.read_text('utf-8'), *texts]))
    files = {path for name in named for path in (ROOT / 'assets').glob(name)}
    found = set().union(*(values(json.loads(path.read_text())) for path in files))
    scripts = {ROOT / name for name in re.findall(r'(?:studies|config)/\w+\.py', page.read_text('utf-8'))}
    texts += [path.read_text('utf-8') for path in scripts]  # their settings
    found |= {float(number.strip('+-,').replace(',', '') or 0) for text in texts for number in NUMBER.findall(text)}
    return {decimals: {round(value, decimals) for value in found} for decimals in range(7)}


def unsupported(text, known):
    """The numbers of a text that are neither known nor EXCEPTIONS."""
    plain = {number: number.replace(',', '') for number in numbers(text) if number not in EXCEPTIONS}
    return [n for n, value in plain.items() if float(value) not in known[len(value.partition('.')[2])]]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_number_is_in_a_table_or_a_json_file(page):
    assert unsupported(page.read_text(encoding='utf-8'), known(page)) == []


def test_a_number_that_no_file_holds_is_found():
    text = 'MHA ends at 1.7217, or 9.8765 in `9.8764`, after 2,000 and 987,654 steps ([x](y-1.999), 2026-11-28), .12'
    assert unsupported(text, known(ROOT / 'results' / 'earlier-contest.md')) == ['9.8765', '987,654']
    assert '1.7217' in unsupported(text, known(ROOT / 'results' / 'induction-text.md'))  # another study's
    assert len(EXCEPTIONS) <= 10


def test_pages_are_short():
    assert len((ROOT / 'results' / 'README.md').read_text(encoding='utf-8').split()) <= 400
    for page in STUDIES:
        text = page.read_text(encoding='utf-8')
        assert len(text.split()) <= 1500, page.name
        table = re.search(r'(?:^\|.*\n)+', text, flags=re.MULTILINE).group()
        assert len(table.splitlines()) <= 7 + 2, page.name


@pytest.mark.parametrize('page', STUDIES, ids=lambda page: page.name)
def test_pages_have_one_layout(page):
    text = page.read_text(encoding='utf-8')
    parts = ['**Question.**', '**Answer.**', '## Method', '## Limits', '## Reproduce']
    places = [text.find(part) for part in parts]
    assert places == sorted(places) and places[0] > 0
    assert text.count('](../assets/') == 1 or '<!-- figure -->' in text
    assert all(len(line) <= 130 for line in text.splitlines() if not line.startswith(('|', '![')))


@pytest.mark.slow
@pytest.mark.parametrize('command', re.findall(r'\$\(BIN\)/python (studies/.*)', (ROOT / 'Makefile').read_text()))
def test_tables_are_those_of_the_json_files(command, tmp_path):
    """`make figures`, with its files elsewhere."""
    script, *keys = command.replace('$(ARGS)', '').split()
    if not any(key.startswith(('--reuse', '--tables')) for key in keys):
        pytest.skip('trains or measures')
    moved = [re.sub(r'^--(figure|tables?|pictures)=', rf'--\1={tmp_path}/', key) for key in keys]
    (tmp_path / 'results' / 'tables').mkdir(parents=True)
    (tmp_path / 'assets').mkdir()
    done = forking.run(script, [*moved, f'--out_dir={tmp_path}'] if '--reuse' in command else moved, 300)
    assert done.returncode == 0, done.stderr
    made = sorted((tmp_path / 'results' / 'tables').iterdir())
    assert made and all((tmp_path / 'assets').iterdir())
    for path in made:
        assert path.read_text() == (ROOT / 'results' / 'tables' / path.name).read_text()


def test_colors_stand_in_the_style_and_the_diagram_alone():
    places = [*ROOT.glob('*.py'), *(p for folder in ('analysis', 'assets', 'core', 'ops', 'studies', 'data', 'config')
                                    for p in (ROOT / folder).rglob('*.py'))]  # fmt: skip
    colored = {
        p.relative_to(ROOT).as_posix() for p in places if re.search(r"'#[0-9a-fA-F]{3,8}'", p.read_text('utf-8'))
    }
    assert colored == {'analysis/style.py', 'assets/draw_diagram.py'}
