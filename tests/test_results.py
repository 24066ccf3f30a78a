"""Intervals, verdicts and the JSON of results, against figures computed by hand or published."""

import io
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, command, script
from test_benchmarks import question

from gpt import checkpoints, results, scoring, tokenizer
import eval_cbt
import eval_lm
import hellaswag
from gpt.world import World
from model import GPT, GPTConfig


def test_wilson_intervals():
    """1 of 10 as in Newcombe's tables (0.018, 0.404); none of ten; GPT-2's HellaSwag."""
    assert results.wilson(1, 10) == pytest.approx((0.0179, 0.4042), abs=1e-4)
    assert results.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert results.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert results.wilson(2967, 10042) == pytest.approx((0.2866, 0.3045), abs=1e-4)


def test_a_perplexity_has_the_interval_of_its_pieces():
    """Pieces of equal weight: the standard error of a mean, exponentiated."""
    nats = [2.0, 3.0, 4.0, 3.0]
    found = results.per_unit(nats, [1] * 4, 'word')
    error = 1.959964 * math.sqrt(2 / 3 / 4)             # sample variance 2/3
    assert found['value'] == pytest.approx(math.exp(3)) and found['count'] == 4
    assert (found['low'], found['high']) == pytest.approx((math.exp(3 - error),
                                                           math.exp(3 + error)))
    bits = results.per_unit(nats, [2] * 4, 'byte', bits=True)
    assert bits['value'] == pytest.approx(1.5 / math.log(2)) and bits['count'] == 8
    assert '95 %' in results.format_measure(found)
    one_piece = results.per_unit([2.0], [1], 'word')                # whose interval is unknown
    assert '95 %' not in results.format_measure(one_piece)


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    draw, hits = random.Random(0), 0
    for _ in range(300):
        weights = [draw.uniform(5, 15) for _ in range(60)]
        nats = [weight * draw.gauss(2, 0.5) for weight in weights]
        found = results.per_unit(nats, weights, 'token')
        hits += found['low'] <= math.exp(2) <= found['high']
    assert 0.91 <= hits / 300 <= 0.98


def result(path, measures, **facts):
    found = {'task': 'T', 'protocol': 'p', 'model': {'name': path.stem}, 'measures': measures,
             'data': {'sha256': 'x'}, **facts}
    results.write(path, found)
    return str(path)


def test_answers_are_compared_question_by_question(tmp_path):
    """McNemar, exactly: of 10 questions that only one model has right, 9 to 1 is p = 22/1024."""
    one = result(tmp_path / 'one.json', {'acc': results.accuracy([True] * 50 + [False] * 9
                                                                 + [True])})
    two = result(tmp_path / 'two.json', {'acc': results.accuracy([True] * 59 + [False])})
    text = results.compare((one, two))
    assert 'two against one' in text
    assert 'better: 98.33%  59/60 against 85.00%  51/60 ' in text
    assert '(p = 0.021; right only here 9, only there 1)' in text
    assert 'worse: 85.00%  51/60 against 98.33%  59/60 (p = 0.021' in results.compare((two, one))
    three = result(tmp_path / 'three.json', {'acc': results.accuracy([False] + [True] * 50
                                                                     + [False] * 9)})
    assert 'within noise: 83.33%' in results.compare((one, three))
    assert '(p = 1; right only here 1, only there 2)' in results.compare((one, three))


def test_texts_are_compared_piece_by_piece(tmp_path):
    """A small gain that is the same everywhere is found, though the pieces differ far more."""
    draw = random.Random(1)
    nats = [draw.uniform(100, 900) for _ in range(50)]
    better = [value - draw.gauss(2, 1) for value in nats]
    one, two = (result(tmp_path / f'{name}.json', {'word': results.per_unit(x, [99] * 50, 'word')})
                for name, x in (('one', nats), ('two', better)))
    text = results.compare((one, two))
    assert 'word         better: ' in text and 'of 50 pieces are better' in text
    noise = [value + draw.gauss(0, 30) for value in nats]
    other = result(tmp_path / 'c.json', {'word': results.per_unit(noise, [99] * 50, 'word')})
    assert 'within noise' in results.compare((one, other))


@pytest.mark.parametrize('facts, words', [
    ({'protocol': 'q'}, "protocol: .*'p'.*'q'; only results of the same"),
    ({'task': 'U'}, "task: .*'T'.*'U'"),
    ({'data': {'sha256': 'y'}}, "data: .*'x'.*'y'"),
    ({'first': 2000}, 'first: .*None.*2000'),                       # of as many pieces
    ({'measures': {'acc': results.accuracy([True])}}, 'do not cover the same items'),
    ({'measures': {}}, 'do not cover the same items')])
def test_what_cannot_be_compared_is_refused(tmp_path, facts, words):
    measures = {'acc': results.accuracy([True, False])}
    one = result(tmp_path / 'a.json', measures)
    two = result(tmp_path / 'b.json', **{'measures': measures, **facts})
    with pytest.raises(ValueError, match=words):
        results.compare((one, two))


@pytest.mark.parametrize('changed, words', [
    ({'measures': {'acc': {'value': 1}}}, 'measures.acc.low: given nothing'),
    ({'measures': {'acc': {**results.accuracy([True]), 'items': [1]}}}, 'acc.items: given a list'),
    ({'measures': {'acc': {**results.accuracy([True]), 'value': None}}}, 'acc.value: given null'),
    ({'measures': []}, 'measures: given a list'), ({'data': {'sha256': 3}}, 'sha256: given 3'),
    ({'model': {}}, 'model.name: given nothing'), ({'first': -1}, 'first: given -1'),
    ({'task': '\ud800'}, 'task: given')])
def test_a_result_of_another_shape_is_refused_with_the_place(tmp_path, changed, words):
    good = result(tmp_path / 'a.json', {'acc': results.accuracy([True])})
    bad = {**json.loads((tmp_path / 'a.json').read_text()), **changed}
    (tmp_path / 'b.json').write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=f'b.json: .*{words}'):
        results.compare((good, str(tmp_path / 'b.json')))


def test_measures_of_two_kinds_are_not_compared(tmp_path):
    one = result(tmp_path / 'a.json', {'x': results.accuracy([True, False])})
    two = result(tmp_path / 'b.json', {'x': results.per_unit([1.0, 2.0], [1, 1], 'word')})
    for pair in ((one, two), (two, one)):
        with pytest.raises(ValueError, match='do not cover the same items'):
            results.compare(pair)


def test_the_test_of_a_million_answers_is_quick():
    better, p, _ = results.mcnemar('10' * 250_000, '01' * 250_000)
    assert not better and p == 1.0
    assert results.mcnemar('1' * 1000, '0' * 1000)[1] == pytest.approx(2.0 ** -999, rel=1e-9)


def test_files_that_are_no_results_are_refused(tmp_path):
    good = result(tmp_path / 'a.json', {})
    for content in ('{}', '[]', 'no', json.dumps({'task': 1, 'measures': {},
                                                    'data': {'sha256': ''}})):
        (tmp_path / 'b.json').write_text(content)
        with pytest.raises(ValueError, match='b.json: .*(given|not JSON)'):
            results.compare((good, str(tmp_path / 'b.json')))
    with pytest.raises(ValueError, match='nothing.json: not the result .*cannot read'):
        results.compare((good, str(tmp_path / 'nothing.json')))
    with pytest.raises(ValueError, match='expected two results'):
        results.compare((good,))


def test_an_output_never_replaces_an_input_or_another_file(tmp_path):
    def check(**flags):
        results.measured_before(SimpleNamespace(**{'data': '', 'file': '', **flags}), {})

    (tmp_path / 'text.txt').write_text('text')
    (tmp_path / 'link').symlink_to('text.txt')
    good, text = result(tmp_path / 'a.json', {}), f'{tmp_path}/text.txt'
    check(out=good, dump=f'{tmp_path}/d.jsonl', data=text)
    check(out=f'{tmp_path}/new/b.json')
    for flags, words in (({'data': text, 'out': text}, 'is an input'),
                         ({'file': text, 'out': f'{tmp_path}/link'}, 'is an input'),
                         ({'out': text}, 'text.txt: not the result .*give another --out'),
                         ({'data': text, 'dump': text, 'out': good}, 'is an input'),
                         ({'out': good, 'dump': f'{tmp_path}/x/../a.json'}, 'which is --out'),
                         ({'out': f'{tmp_path}/e.json', 'dump': f'{tmp_path}/e.json'}, 'is --out'),
                         ({'out': str(tmp_path)}, 'is a folder')):
        with pytest.raises(ValueError, match=words):
            check(**flags)


# Evaluations that are killed, and repeated.

@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
    """A function from a kind of evaluation to its command, with many small batches."""
    folder = tmp_path_factory.mktemp('kinds')
    torch.manual_seed(0)
    encoding = tokenizer.byte_pairs('bytes', [])
    checkpoints.save(folder / 'model', 0, GPT(GPTConfig(
        n_layer=2, n_head=2, n_embd=64, block_size=512, vocab_size=encoding.n_vocab)), encoding, {})
    row = {'ctx': 'A man sits.', 'endings': ['eats.', 'sees it.', 'falls', 'is.'], 'label': 2}
    (folder / 'rows.jsonl').write_text('\n'.join(
        json.dumps({**row, 'ctx': f'{k} men sit.'}) for k in range(400)))
    for name in ('CN', 'NE'):
        (folder / f'cbtest_{name}_valid_2000ex.txt').write_text(''.join(map(question, range(60))))
    (folder / 'book.txt').write_text(''.join(f'Call me {k}. ' for k in range(9000)))
    commands = {'hellaswag': ['hellaswag.py', f'--data={folder}/rows.jsonl'],
                'cbt': ['eval_cbt.py', f'--data={folder}'],
                'lm': ['eval_lm.py', f'--file={folder}/book.txt']}
    return lambda kind: [*commands[kind], f'--model={folder}/model', '--device=cpu',
                         '--batch_tokens=300']


def stopped(command, number, folder, batches=20):
    """Start a command in `folder`, send it a signal after some batches; its stderr."""
    process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], cwd=folder,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while sum(path.read_bytes().count(b'\n') for path in folder.rglob('*.partial')) < batches:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    return process.communicate()[1]


@pytest.mark.parametrize('kind', ['hellaswag', 'cbt', 'lm'])
def test_a_killed_evaluation_continues_with_the_same_numbers(kinds, tmp_path, kind, monkeypatch):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    whole.mkdir(), parts.mkdir()
    monkeypatch.chdir(whole)
    name, *flags = kinds(kind)
    command({'hellaswag': hellaswag, 'cbt': eval_cbt, 'lm': eval_lm}[kind], *flags)
    stopped([name, *flags], signal.SIGKILL, parts)
    partial, = parts.rglob('*.partial')
    with open(partial, 'ab') as file:                   # as a kill within a write leaves it
        file.write(b'\n' + partial.read_bytes().rpartition(b'\n')[2][:100])
    done = script(ROOT / name, *flags, cwd=parts)
    assert 'continuing: ' in done.stderr and 'before it was continued' in done.stdout
    (a,), (b,) = (list(folder.rglob('*.json')) for folder in (whole, parts))
    a, b = (json.loads(path.read_text()) for path in (a, b))
    assert a['measures'] == b['measures'] and a['notes'] == b['notes']
    assert a['tokens'] == b['tokens'] > b['tokens_before'] > a['tokens_before'] == 0
    assert not list(parts.rglob('*.partial'))


def test_an_interrupt_says_that_the_work_is_kept(kinds, tmp_path):
    err = stopped(kinds('lm'), signal.SIGINT, tmp_path)
    assert 'and the same command continues' in err and 'Traceback' not in err
    partial, = tmp_path.rglob('*.partial')
    assert str(partial.relative_to(tmp_path)) in err


def test_numbers_are_printed_before_they_are_written(kinds, tmp_path):
    """As on a full disk: files beyond a hundred bytes are refused, while it is measured too."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    name, *flags = kinds('hellaswag')
    done = script(ROOT / name, *flags, cwd=tmp_path, check=False, preexec_fn=limit)
    assert done.returncode == 2 and 'acc_norm' in done.stdout and 'File too large: ' in done.stderr
    assert 'hellaswag-completion-rows' in done.stderr       # the file
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.rglob('*.json'))


def test_a_place_that_cannot_be_written_is_refused_before_the_work(kinds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, 'evaluate', None)
    (tmp_path / 'out').write_text('a file')
    for flag in ('--out=/proc/x.json', '--dump=/proc/x', '--limit=9'):      # the last: out/results
        with pytest.raises(ValueError, match='cannot be written'):
            command(hellaswag, *kinds('hellaswag')[1:], flag)


def test_lost_output_costs_no_result(kinds, tmp_path, monkeypatch):
    """Neither the numbers nor the progress can be printed; the result is in its file."""
    monkeypatch.setattr(scoring, 'SECONDS_TO_A_LINE', 0)
    monkeypatch.chdir(tmp_path)

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, 'No space left on device')
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stdout', Full())
        patch.setattr(sys, 'stderr', Full())
        command(hellaswag, *kinds('hellaswag')[1:])
    assert list(tmp_path.rglob('*.json'))


def test_progress_is_lines(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    monkeypatch.setattr(scoring, 'SECONDS_TO_A_LINE', 0)
    rows = [scoring.Row(np.arange(3), np.arange(3), np.arange(3)) for _ in range(5)]
    scoring.score_rows(lambda ids: torch.zeros(*ids.shape, 9), rows,
                       scoring.ScoringOptions(batch_tokens=3, progress=True))
    lines = sys.stderr.getvalue().splitlines()
    assert [line.partition(', ')[0] for line in lines] == [
        f'{n}% of 15 tokens' for n in (20, 40, 60, 80, 100)]


def test_what_is_kept_must_be_a_plain_file(kinds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*kinds('hellaswag')[1:], '--out=a.json']
    os.mkfifo('a.json.partial')
    with pytest.raises(ValueError, match='a.json.partial: is a device, pipe or socket, expected'):
        command(hellaswag, *flags)
    os.remove('a.json.partial')
    os.mkdir('a.json.partial')
    with pytest.raises(ValueError, match='a.json.partial: is a folder, expected'):
        command(hellaswag, *flags)


def test_damage_to_what_is_kept_is_noticed(tmp_path):
    """A batch whose line is damaged is measured again; the others are not."""
    row = scoring.Row(np.arange(3), np.arange(3), np.arange(3))
    batches = [[(i, row._replace(targets=np.arange(3) + i))] for i in range(3)]
    new = [[scoring.Score(np.full(3, i, np.float32), np.arange(3))] for i in range(3)]
    kept = scoring.Kept(tmp_path / 'a.partial', 'key', World())
    for batch, scores in zip(batches, new):
        kept.add(batch, scores)
    lines = kept.path.read_bytes().split(b'\n')
    kept.path.write_bytes(b'\n'.join([lines[1], lines[2][:-9] + b'B' + lines[2][-8:], lines[3]]))
    kept = scoring.Kept(kept.path, 'key', World())
    scores = scoring.empty_scores([row] * 3)
    assert kept.restore(batches, scores) == [batches[1]]
    assert [score.logprobs.tolist() for score in scores] == [[0] * 3, [0] * 3, [2] * 3]
    assert scoring.Kept(kept.path, 'other', World()).restore(batches, scores) == batches


def test_a_finished_evaluation_is_not_repeated(kinds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, *flags = [*kinds('hellaswag'), f'--dump={tmp_path}/rows', '--limit=20']
    command(hellaswag, *flags)
    first = capsys.readouterr().out
    monkeypatch.setattr(hellaswag, 'evaluate', None)
    command(hellaswag, *flags)
    path, = tmp_path.rglob('*.json')
    assert capsys.readouterr().out == (
        first.replace('written to', 'measured before, in').rstrip() + '; delete it to measure '
        'again\n')
    for change in (['--limit=21'], ['--batch_tokens=99'], ['--dtype=bfloat16']):
        with pytest.raises(TypeError):
            command(hellaswag, *flags, *change)


def test_results_of_other_numbers_are_other_files(kinds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ('--dtype=float32', '--share=False', '--dtype=bfloat16'):
        command(hellaswag, *kinds('hellaswag')[1:], '--limit=2', flag)
    names = [path.name.partition('-first2')[0] for path in Path('out/results').rglob('*.json')]
    assert sorted(names) == ['hellaswag-completion', 'hellaswag-completion-bfloat16',
                             'hellaswag-completion-unshared']


def test_results_of_two_files_are_two_files(kinds, tmp_path, monkeypatch, capsys):
    """Of the same name in two folders, too."""
    monkeypatch.chdir(tmp_path)
    rows = next(flag for flag in kinds('hellaswag') if 'rows' in flag).partition('=')[2]
    lines = Path(rows).read_text().splitlines()
    for n, place in enumerate(('a/rows.jsonl', 'b/rows.jsonl', 'b/other.jsonl')):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text('\n'.join(lines[n:n + 9]))
        command(hellaswag, *kinds('hellaswag')[1:], f'--data={place}')
        command(eval_lm, *kinds('lm')[1:], f'--file={place}')
    names = sorted(path.name.rpartition('-')[0] for path in Path('out/results').rglob('*.json'))
    assert names == ['file-other', 'file-rows', 'file-rows', 'hellaswag-completion-other',
                     'hellaswag-completion-rows', 'hellaswag-completion-rows']
