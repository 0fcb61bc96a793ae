"""patterns.html in a real browser, headless Chromium by WebDriver: skipped where chromedriver is missing."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import torch

from analysis import report

LAYERS, HEADS, T = 30, 9, 101
pytestmark = pytest.mark.skipif(
    not (shutil.which('chromedriver') and shutil.which('chromium')), reason='tests/install.sh browser installs Chromium'
)


def model(name, seed):
    """What the page holds of a model like SmolLM2-135M; head 5.3 attends to the token before."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(LAYERS, HEADS, T, T, generator=generator).pow(20).tril() + 1e-3 * torch.ones(T, T).tril()
    patterns /= patterns.sum(-1, keepdim=True)
    patterns[5, 3] = torch.eye(T).roll(-1, -1).tril()
    patterns[5, 3, 0, 0] = 1
    scores = {s: np.random.default_rng(seed).random((LAYERS, HEADS)) / 2 for s in ('induction', 'previous_token')}
    scores['induction'][7, 2], scores['copying'] = 0.9, np.linspace(-1, 1, LAYERS * HEADS).reshape(LAYERS, HEADS)
    data = report.packed_patterns(patterns)
    sequences = [
        dict(title=title, tokens=tokens, data=data)
        for title, tokens in (
            ('random tokens, twice', ['<bos>', *(f'Ġunspeakable{i % 50}' for i in range(T - 1))]),
            ('text', [f' word{i}' + '\\n' * (i % 20 == 19) for i in range(T)]),
        )
    ]
    called = {'induction': scores['induction'] > 0.8}
    return dict(name=name, layers=LAYERS, heads=HEADS, sequences=sequences, scores=scores, called=called)


class Browser:
    """The few commands of WebDriver (w3.org/TR/webdriver2) that the tests need."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.url = f'http://127.0.0.1:{free.getsockname()[1]}'
        self.driver = subprocess.Popen(['chromedriver', f'--port={self.url.split(":")[2]}'], stdout=subprocess.DEVNULL)
        options = {'args': ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage']}
        wanted = {'goog:chromeOptions': options, 'goog:loggingPrefs': {'browser': 'ALL'}}
        for _ in range(100):
            try:
                found = self.send('/session', capabilities={'alwaysMatch': wanted})
                break
            except OSError:  # it isn't listening yet
                time.sleep(0.1)
        self.url += f'/session/{found["sessionId"]}'
        self.send('/timeouts', script=120_000)

    def send(self, path, method='POST', **body):
        content = json.dumps(body).encode()
        headers = {'Content-Type': 'application/json'}
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)['value']

    def run(self, script):
        """What a script returns; it may await."""
        code = f'const done = arguments[0]; (async () => {{ {script} }})().then(done, error => done(String(error)))'
        return self.send('/execute/async', script=code, args=[])

    def cdp(self, command, **params):
        """A command of Chromium's own protocol."""
        return self.send('/goog/cdp/execute', cmd=command, params=params)

    def width(self, pixels):
        sizes = dict(width=pixels, height=900, deviceScaleFactor=1, mobile=False)
        self.cdp('Emulation.setDeviceMetricsOverride', **sizes)

    def point(self, selector, across=0.5, down=0.5, click=False):
        """Moves the mouse into an element, or its first line, at parts of its width and height, and may click."""
        x, y = self.run(f"""const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});
            const b = e.getClientRects()[0]; return [b.left + {across} * b.width, b.top + {down} * b.height]""")
        moves = [dict(type='pointerMove', x=round(x), y=round(y))]
        moves += [dict(type='pointerDown', button=0), dict(type='pointerUp', button=0)] if click else []
        self.send('/actions', actions=[dict(type='pointer', id='mouse', actions=moves)])

    def press(self, key):
        keys = [dict(type='keyDown', value=key), dict(type='keyUp', value=key)]
        self.send('/actions', actions=[dict(type='key', id='keys', actions=keys)])

    def text(self, selector):
        return self.run(f'return document.querySelector({selector!r}).textContent')

    def close(self):
        self.send('', method='DELETE')  # the session: its browser would outlive the driver
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    page = tmp_path_factory.mktemp('page') / 'patterns.html'
    page.write_text(report.page([model('a model <b>', 1), model('the same as MLA ' * 12, 2)]), encoding='utf-8')
    assert page.stat().st_size < 10e6
    found = Browser()
    try:
        found.send('/url', url=page.as_uri())
        found.page = page
        yield found
        assert found.send('/se/log', type='browser') == []  # neither errors nor warnings
    finally:
        found.close()


def test_two_models_are_drawn_within_a_second(browser):
    """Of processor time of the page's main thread, so that it doesn't depend on what else runs."""
    browser.cdp('Performance.enable', timeDomain='threadTicks')
    browser.send('/refresh')
    browser.run('while (!panes.every(p => p.bytes)) await new Promise(requestAnimationFrame)')
    assert browser.run("return document.querySelectorAll('.map b').length") == 2 * LAYERS * HEADS
    metrics = {m['name']: m['value'] for m in browser.cdp('Performance.getMetrics')['metrics']}
    assert 0.01 < metrics['TaskDuration'] < 1


@pytest.mark.parametrize('width', [800, 1280, 1920])
@pytest.mark.parametrize('sequence', [0, 1])
def test_nothing_scrolls_sideways(browser, width, sequence):
    browser.width(width)
    browser.run(f"$('sequence').value = '{sequence}'; $('sequence').onchange()")
    wide, visible, outer = browser.run("""
        const e = document.documentElement;
        return [e.scrollWidth, e.clientWidth, innerWidth]""")
    assert wide == visible <= outer == width
    edges = browser.run("return [...document.querySelectorAll('.words span, canvas, .map')]"
                        '.map(e => e.getBoundingClientRect().right)')  # fmt: skip
    assert max(edges) <= visible
    if width == 1280:  # the two models side by side
        tops = browser.run("return [...document.querySelectorAll('.pane')].map(e => e.getBoundingClientRect().top)")
        assert tops[0] == tops[1]


def test_a_click_keys_and_hovering_show_what_the_text_says(browser):
    browser.width(1280)
    browser.run("$('sequence').value = '0'; await $('sequence').onchange()")
    assert browser.text('.name').startswith('head 7.2: induction 0.90*')  # the best one is chosen at first
    browser.point('.map b[data-at="5.2"]', click=True)
    assert browser.text('.name').startswith('head 5.2: ')
    browser.press('\ue014')  # right
    assert browser.text('.name').startswith('head 5.3: ') and browser.text('.map b.on') == ''
    for key in ('\ue015', '\ue012', '\ue013', '\ue014'):  # down, left, up, right
        browser.press(key)
    assert browser.text('.name').startswith('head 5.3: ')
    browser.point('.big', across=39.5 / T, down=40.5 / T)
    assert browser.text('.say') == 'query 40 "Ġunspeakable39" -> key 39 "Ġunspeakable38": 1.0'
    browser.point('.words span:nth-child(61)')
    assert browser.text('.say') == 'query 60 "Ġunspeakable9"' and browser.text('.words span.q') == 'Ġunspeakable9'
    shades = browser.run("return [...document.querySelector('.words').children].map(e => e.style.background)")
    assert [i for i, shade in enumerate(shades) if not shade.endswith(', 0)')] == [59]
    # the keys move within the model that was clicked last
    browser.point('.pane:nth-child(2) .map b[data-at="0.0"]', click=True)
    browser.press('\ue015')
    assert browser.text('.pane:nth-child(2) .name').startswith('head 1.0: ')
    assert browser.text('.name').startswith('head 5.3: ')


def test_the_map_is_colored_by_the_chosen_score_and_one_model_can_stand_alone(browser):
    color = 'return document.querySelector(\'.map b[data-at="{}"]\').style.background'
    before = browser.run(color.format('0.0'))
    browser.run("$('score').value = 'copying'; $('score').onchange()")
    red, blue = (browser.run(color.format(at)) for at in ('0.0', '29.8'))
    assert before != red == 'rgb(195, 65, 55)' and blue == 'rgb(25, 65, 145)'
    browser.run("$('beside').value = ''; $('beside').onchange()")
    assert browser.run("return document.querySelectorAll('.pane').length") == 1
