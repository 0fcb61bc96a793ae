"""Reports show the numbers they are given, and the page nothing else."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analysis import report


def embedded(page):
    """The data that a page embeds."""
    return json.loads(page.split('const MODELS = ')[1].split(';\n')[0])


def test_json_has_six_digits_and_no_nan():
    value = {'a': np.array([[1.23456789, np.nan]]), ('b', 1): (np.float32(0.1), np.int64(3), True, None, 'text')}
    assert report.plain(value) == {'a': [[1.23457, None]], "('b', 1)": [0.1, 3, True, None, 'text']}
    json.dumps(report.plain(value), allow_nan=False)


def test_markdown_tables_have_one_cell_per_heading():
    lines = report.markdown_table(('a', 'b'), [(1, '2 ± 3'), ('', 4.5)]).splitlines()
    assert lines == ['| a | b |', '|---|---|', '| 1 | 2 ± 3 |', '|  | 4.5 |']


def test_cells_show_a_mean_with_its_interval_or_its_range():
    assert report.spread([1.0, 2.0, 3.0, 4.0]) == '2.500 ± 2.054'
    assert report.spread([0.5, 0.25], '+.2f') == '+0.38 [+0.25, +0.50]' and report.spread([0.5, None]) == '0.500'
    assert report.spread([None]) == 'n/a'
    assert report.when([300, None, 500]) == '400 [300, 500] (2 of 3)' and report.when([None]) == 'never (0 of 1)'
    assert report.when([2.5, 2.5], '.2f') == '2.50'


def test_packed_patterns_are_the_patterns_to_a_255th():
    pattern = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0)).tril()
    packed = np.frombuffer(zlib.decompress(base64.b64decode(report.packed_patterns(pattern))), np.uint8).reshape(
        2, 3, -1
    )
    for i in range(7):  # row by row, as the page reads them
        row = packed[..., i * (i + 1) // 2 : (i + 1) * (i + 2) // 2]
        np.testing.assert_allclose(row / 255, pattern[..., i, : i + 1], atol=0.5 / 255 + 1e-6)


def test_a_token_can_not_end_the_pages_script():
    tokens = ['</script><script>alert(1)</script>', '<!--', 'a;\nb', '__DATA__']
    model = dict(name='m', layers=1, heads=1, scores=dict(induction=np.zeros((1, 1))), called={},
                 sequences=[dict(title='t', tokens=tokens, data='')])  # fmt: skip
    page = report.page([model])
    assert page.count('</script>') == 1 and '<!--' not in page.split('const MODELS')[1]
    assert embedded(page)[0]['sequences'][0]['tokens'] == tokens
    assert not re.search(r'https?:|src=|@import', page)  # nothing is loaded from elsewhere


@pytest.mark.parametrize('name', ['plain.txt', 'figure.png', 'numbers.json'])
def test_files_are_written_whole_or_not_at_all(tmp_path, name):
    path = tmp_path / name
    path.write_text('old')

    class Broken(Figure):
        """Neither text nor JSON nor a figure that can be drawn."""

        def savefig(self, file, **how):
            file.write(b'half')
            raise RuntimeError

    write = {'txt': report.save_text, 'png': report.save_figure, 'json': report.save_json}[name.split('.')[1]]
    with pytest.raises((RuntimeError, TypeError)):
        write(path, Broken())
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('name', ['$', 'out-$x$', r'out-$\frac$', r'a\$b$c$', 'a\x1b[31m', 'caf\udce9', '{_^'])
def test_names_are_drawn_as_they_are(tmp_path, name):
    """A title that begins a formula without ending it would stop a study after hours, when its picture is drawn."""
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 100], [1e-9, 2e-9], label=name)
    axes.set(title=f'losses on {name}', xlabel=name, xscale='log')
    axes.annotate(name, (1, 1e-9))
    axes.legend(title=name)
    figure.suptitle(name)
    report.save_figure(tmp_path / 'figure.png', figure)
    assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')
    assert not axes.title.get_parse_math() and not axes.get_legend().get_texts()[0].get_parse_math()
    assert all(label.get_parse_math() for label in axes.get_xticklabels())  # 10^2
