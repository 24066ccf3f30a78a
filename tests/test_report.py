"""
The page about a run: what it tells, what it escapes, and how a browser shows it.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY, command

import plot
from gpt import report
from gpt import results
import train
from gpt.data.shards import read_manifest
from gpt.log import machine

EVIL = '<script>alert("&")</script>'


@pytest.fixture(scope='module')
def run(stories, tmp_path_factory):
    """A tiny run that went on once, with a spike, a result and texts that look like HTML."""
    folder = tmp_path_factory.mktemp('report') / 'run'
    cfg = train.Config(**{**TINY, 'data_dir': str(stories), 'out_dir': str(folder),
                          'sample_interval': 2})
    train.main(replace(cfg, max_iters=4, lr_decay_iters=12))
    train.main(cfg)
    for name, record in (('log', {'step': 5, 'event': 'spike', 'words': EVIL}),
                         ('samples', {'step': 6, 'text': EVIL + '\x00\x05\ud800'})):
        with open(folder / f'{name}.jsonl', 'a') as file:
            file.write(json.dumps(record) + '\n{"torn')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, 'OUT', folder.parent / 'results')
        evaluated(folder / 'step_0000012', 'here')
        evaluated(folder.parent / 'other/step_0000012', 'not this one')
        yield folder


def evaluated(folder, task):
    """A result, as an evaluation would keep it, of the checkpoint in `folder`."""
    measure = {**results.accuracy([True] * 30 + [False] * 70), 'published': [(31.14, 'lm-eval')]}
    results.write(results.folder_of(str(folder)) / f'{task}.json', {
        'task': task, 'protocol': 'completion', 'name': task, 'first': 100,
        'data': {'official': False, 'sha256': '0', 'path': 'x'}, 'measures': {'acc': measure},
        'model': {'name': str(folder), 'folder': str(folder)}})


def made(*folders):
    command(plot, *folders, '--report')
    return (folders[0] / 'report.html').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def html(run):
    return made(run)


def section(html, title):
    return re.search(f'<h2>{title}</h2>(.*?)</section>', html, re.DOTALL)[1]


def test_a_page_tells_what_the_files_tell(html, stories):
    assert html.startswith('<!doctype html>\n<html lang="en">') and len(html) < 700_000
    assert '<title>run, a run of GPT-2</title>' in html and '12 updates, 3,072 tokens' in html
    assert '2 layers of 32, 2 heads, 16 tokens at a time' in html
    settings, rest = section(html, 'Settings').split('<details>')
    assert re.search('max_iters</td><td class="mono">12</td><td class="mono">1000<', settings)
    assert 'weight_decay' in rest and 'weight_decay' not in settings
    manifest = json.loads((stories / 'tiny/manifest.json').read_text())
    data = section(html, 'Data')
    assert all(word in data for word in (
        manifest['splits']['val']['shards'][0]['sha256'], manifest['tokenizer']['fingerprint'],
        f"{manifest['splits']['train']['tokens']:,}", 'bpe:300', 'tiny.jsonl'))
    found = section(html, 'Samples')
    assert re.findall('Update (\\d+)', found) == ['0', '4', '6', '8', '12']
    assert '5 of 7' in found and 'samples.jsonl has the rest' in found
    found = section(html, 'Evaluation')
    assert 'here, completion' in found and 'not this one' not in found and '30.00%' in found
    assert '31.14 (lm-eval)' in found and 'completion, first 100, not known' in found
    assert '1 spike' in section(html, 'Events')


def test_texts_are_escaped_and_nothing_comes_from_elsewhere(run, html):
    assert html.count('&lt;script&gt;alert(&#34;&amp;&#34;)&lt;/script&gt;') == 2
    assert '/script&gt;\ufffd\ufffd\ufffd<' in html
    assert '<script' not in html and 'alert("' not in html
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)|url\(|@import|https?://', html)
    assert html.count('data:image/svg+xml;base64,') == 4 and 'alt="Curves over tokens' in html
    assert html == made(run)


def test_a_run_notes_what_it_ran_on_at_each_start(run, html):
    starts = [json.loads(line) for line in (run / 'starts.jsonl').read_text().splitlines()]
    assert [record['step'] for record in starts] == [0, 4]
    assert starts[0]['device'] == 'cpu' and starts[0]['dtype'] == 'float32'
    assert starts[0]['machine'] == machine(train.torch.device('cpu'))
    assert starts[0]['torch'] == train.torch.__version__ and starts[0]['processes'] == 1
    found = section(html, 'Environment')
    assert found.count('<tr>') == 3 and starts[1]['time'] in found


def test_what_is_not_there_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(results, 'OUT', tmp_path / 'results')
    (tmp_path / 'log.jsonl').write_text('{"step": 1, "tokens": 5, "loss": 2.0}')
    html = made(tmp_path)
    for words in ('has no config.py', 'The data set is not known', 'drew no samples',
                  'No result under out/results/', 'no update was skipped', 'kept no starts.jsonl'):
        assert words in html
    (tmp_path / 'config.py').write_text("dataset = 'a:0.7,b:0.3'\ndata_dir = 'nowhere'\n"
                                        "init_from = 'gpt2'\nlater = 1\n")
    html = made(tmp_path)
    assert html.count('Its manifest.json is not here') == 2 and 'fine-tuned from gpt2' in html
    assert re.search('later</td><td class="mono">1</td><td class="mono">none<', html)
    command(plot, tmp_path, '--report', '--out', tmp_path / 'page.html')
    assert (tmp_path / 'page.html').read_text(encoding='utf-8') == html


def test_results_name_their_checkpoint_from_the_current_folder(tmp_path, monkeypatch):
    """Under whose out/results/ they are kept, as the run is under its out/."""
    monkeypatch.chdir(tmp_path)
    folder = Path('out/mine')
    folder.mkdir(parents=True)
    (folder / 'log.jsonl').write_text('{"step": 1, "tokens": 5, "loss": 2.0}')
    evaluated(folder / 'step_0000001', 'this one')
    evaluated(Path('out/other/step_0000001'), 'another')
    found = section(made(folder), 'Evaluation')
    assert 'this one, completion' in found and 'another' not in found


def test_a_data_set_without_a_list_of_files_shows_none(run, html, stories, monkeypatch):
    """As that of Python's own library, the default: its manifest names the version alone."""
    assert 'made from' in section(html, 'Data') and '<td class="">files</td>' in html
    manifest = {**read_manifest('tiny', stories), 'source': {'pydocs': 'Python 3.12.1'}}
    monkeypatch.setattr(report, 'read_manifest', lambda name, data_dir: manifest)
    html = section(made(run), 'Data')
    assert 'made from' not in html and '>files<' not in html and 'Python 3.12.1' in html


def test_long_tables_are_cut_and_say_so(tmp_path):
    lines = [{'step': 1, 'tokens': 5, 'loss': 2.0}]
    lines += [{'step': i, 'event': 'spike', 'words': 'x'} for i in range(1234)]
    (tmp_path / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    html = section(made(tmp_path), 'Events')
    assert html.count('<tr>') == 201 and '1,034 more are in log.jsonl' in html
    assert '<td class="mono right">199</td>' in html and '1,199' not in html


# In a browser.

CHROMIUM = next(filter(None, map(shutil.which, (
    'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome'))), None)

LOOK = '''
(() => {
  document.querySelectorAll('details').forEach(part => part.open = true);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92
                         : ((v + 0.055) / 1.055) ** 2.4);
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const behind = part => { for (; part; part = part.parentElement) {
    const c = rgb(getComputedStyle(part).backgroundColor); if (c.length < 4 || c[3]) return c; }
    return null; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), ratios = [];
  while (walk.nextNode()) if (walk.currentNode.data.trim()) {
    const part = walk.currentNode.parentElement;
    const pair = [rgb(getComputedStyle(part).color).slice(0, 3), behind(part).slice(0, 3)]
      .map(light).sort((a, b) => b - a);
    ratios.push([pair[0] / pair[1], part.tagName]); }
  const font = what => getComputedStyle(document.querySelector(what)).fontFamily;
  const image = document.querySelector('img');
  return JSON.stringify({
    wide: document.documentElement.scrollWidth, window: innerWidth, contrast: ratios.sort(
      (a, b) => a[0] - b[0])[0], texts: ratios.length, body: font('body'), heading: font('h1'),
    number: font('td.mono'), image: [image.naturalWidth, image.naturalHeight, image.alt],
    page: getComputedStyle(document.body).backgroundColor, source: image.currentSrc,
    small: Math.min(...[...document.querySelectorAll('body *')].map(
      part => parseFloat(getComputedStyle(part).fontSize))) });
})()'''


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason='NO BROWSER: no chromium and no chrome here, so that '
                                         'nobody looked at the page (apt-get install chromium)')
def test_a_browser_shows_it_in_both_themes_on_a_phone_and_a_screen(run, html, tmp_path):
    pages, shown = set(), set()
    with browser(tmp_path) as tell:
        for domain in ('Page', 'Network', 'Log', 'Runtime'):
            tell(f'{domain}.enable')
        for theme in ('light', 'dark'):
            for width in (390, 1200):
                tell('Emulation.setDeviceMetricsOverride', width=width, height=844,
                     deviceScaleFactor=1, mobile=width < 500)
                tell('Emulation.setEmulatedMedia',
                     features=[{'name': 'prefers-color-scheme', 'value': theme}])
                tell('Page.navigate', url=(run / 'report.html').as_uri())
                events = tell.until('Page.loadEventFired')
                found = json.loads(tell('Runtime.evaluate', expression=LOOK)['result']['value'])
                assert found['wide'] <= found['window'] == width
                assert found['contrast'][0] >= 4.5 and found['texts'] > 100, found['contrast']
                assert found['body'].startswith('system-ui')
                assert found['heading'].startswith('Georgia') and found['small'] >= 13
                assert found['number'].startswith('ui-monospace')
                assert found['image'][0] > 0 and found['image'][2]
                assert (found['image'][0] > found['image'][1]) == (width == 1200)
                asked = [event['params']['request']['url'].partition(':')[0] for event in events
                         if event['method'] == 'Network.requestWillBeSent']
                assert 'file' in asked and set(asked) <= {'file', 'data'}
                assert not [event for event in events if event['method'] in (
                    'Log.entryAdded', 'Runtime.exceptionThrown', 'Runtime.consoleAPICalled')]
                pages.add(found['page'])
                shown.add(found['source'])
    assert len(pages) == 2 and len(shown) == 4                          # each its own picture


@contextmanager
def browser(folder):
    """A function that tells a browser what to do, by the DevTools protocol over two pipes."""
    (theirs, ours), (heard, said) = os.pipe(), os.pipe()
    process = subprocess.Popen(
        ['bash', '-c', f'exec "$0" --headless --no-sandbox --disable-gpu --user-data-dir="$1" '
                     f'--remote-debugging-pipe 3<&{theirs} 4>&{said}', CHROMIUM, folder / 'user'],
        pass_fds=(theirs, said), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    os.close(theirs), os.close(said)
    alarm = threading.Timer(120, process.kill)
    alarm.start()
    try:
        with open(ours, 'wb', 0) as out, open(heard, 'rb') as back:
            yield Tell(out, back)
    finally:
        alarm.cancel()
        process.kill()
        process.wait()


class Tell:
    """tell(method, **parameters) -> result; what happens meanwhile is kept in `events`."""

    def __init__(self, out, back):
        self.out, self.back, self.count, self.session, self.events = out, back, 0, {}, []
        target = self('Target.createTarget', url='about:blank')['targetId']
        found = self('Target.attachToTarget', targetId=target, flatten=True)
        self.session = {'sessionId': found['sessionId']}

    def __call__(self, method, **parameters):
        self.count += 1
        self.out.write(json.dumps({'id': self.count, 'method': method, 'params': parameters,
                                   **self.session}).encode() + b'\0')
        while (message := self.hear()).get('id') != self.count:
            self.events.append(message)
        assert 'result' in message, message
        return message['result']

    def until(self, method):
        """What happened since the last call, up to and with an event of this kind."""
        while not any(event['method'] == method for event in self.events):
            self.events.append(self.hear())
        found, self.events = self.events, []
        return found

    def hear(self):
        letters = []
        while (letter := self.back.read(1)) != b'\0':
            assert letter, 'the browser has left'
            letters.append(letter)
        return json.loads(b''.join(letters))
