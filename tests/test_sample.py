"""
Sampling as a user does it:
prompts from anywhere, whole characters, the end of a document, refusals.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, script

import sample
from gpt import tokenizer
import train
from gpt.settings import configure


ASCII = tokenizer.byte_pairs('bytes', [])


@pytest.fixture(scope='module')
def trained(stories, tmp_path_factory):
    """The folder of a run of 40 updates."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    train.main(train.Config(**{**TINY, 'data_dir': str(stories), 'out_dir': str(folder),
                               'max_iters': 40, 'eval_interval': 40, 'dropout': 0.0}))
    return folder


def say(capsys, *argv):
    sample.main(configure(sample.Config, [*map(str, argv), '--device=cpu'], sample.SHORT))
    return capsys.readouterr().out


def test_a_prompt_is_continued_and_a_seed_repeats(trained, capsys):
    draw = [say(capsys, f'--model={trained}', '-p', 'The fox counted', '-m', 10, '--top_k=0',
                f'--seed={seed}') for seed in (1, 1, 2)]
    assert draw[0].startswith('The fox counted') and draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize('batch_size', [1, 2, 8])
def test_sample_k_is_the_one_drawn_with_seed_plus_k(trained, capsys, batch_size):
    """In batches of any size, and alone."""
    flags = [f'--model={trained}', '-p', 'The', '-m', 30, '--temperature=1.5', '--dtype=float32']
    three = say(capsys, *flags, '--num_samples=3', '--seed=5', f'--batch_size={batch_size}')
    third = say(capsys, *flags, '--seed=7')
    assert three.split('--- sample 3\n')[1] == third and three.startswith('--- sample 1\n')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_greedy_takes_the_most_likely(trained, capsys, dtype):
    found = say(capsys, f'--model={trained}', '-p', 'The fox', '-m', 6, '--temperature=0',
                f'--dtype={dtype}')
    model, encoding = sample.checkpoints.load_model(trained, dtype=getattr(torch, dtype))
    ids = torch.tensor([encoding.encode_ordinary('The fox')])
    expected = encoding.decode(model.generate(ids, 6, temperature=0)[0].tolist())
    assert found == expected + '\n'


def test_json_holds_what_is_printed_and_explain_what_the_model_gave_each_token(trained, capsys):
    flags = [f'--model={trained}', '-p', 'The fox', '-m', 6, '--seed=3', '--dtype=float32']
    text = say(capsys, *flags)
    line = json.loads(say(capsys, *flags, '--json', '--explain'))
    assert line['prompt'] + line['text'] == text[:-1] and line['new_tokens'] == 6
    assert line['seed'] == 3 and not line['ended']
    model, encoding = sample.checkpoints.load_model(trained)
    ids = [*encoding.encode_ordinary('The fox'), *(t['id'] for t in line['tokens'][-6:])]
    assert encoding.decode(ids) == text[:-1] and len(line['tokens']) == len(ids) - 1
    for n, fact in enumerate(line['tokens'], 1):
        probs = model(torch.tensor([ids[:n]]))[0, -1].softmax(-1)
        order = probs.argsort(descending=True).tolist()
        assert fact['probability'] == pytest.approx(probs[ids[n]].item(), rel=1e-3)
        assert order[fact['rank'] - 1] == ids[n] == fact['id']
        assert [p for _, p in fact['most_likely']] == pytest.approx(
            probs[order[:3]].tolist(), rel=1e-3)
    table = say(capsys, *flags, '--explain').removeprefix(text).splitlines()
    assert table[1] == 'probabilities before temperature, top_k and top_p'
    assert len(table) == 3 + len(ids) - 1 and sum(row.startswith('new') for row in table) == 6


def test_a_conversation_goes_on_with_the_text_on_an_empty_line(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('The fox\n\nHe\n'))
    sample.main(sample.Config(model=str(trained), interactive=True, max_new_tokens=4, device='cpu'))
    out, err = capsys.readouterr()
    assert err.count('4 tokens in ') == 3
    first = out[:out.index('The fox', 1)].removesuffix('\n')
    second = out[len(first) + 1:]
    assert first.startswith('The fox') and second.startswith(first) and '\nHe' in second


def test_a_conversation_goes_on_from_what_was_written(trained, capsys, monkeypatch):
    """Not from the text that stopped it, which nobody saw."""
    whole = say(capsys, f'--model={trained}', '-p', 'The fox', '--temperature=0', '-m', 40)
    real, read, stop = sample.generate, [], whole[25:30]
    monkeypatch.setattr(sample, 'generate', lambda cfg, model, encoding, ids, seconds: (
        read.append(ids) or real(cfg, model, encoding, ids, seconds)))
    monkeypatch.setattr(sys, 'stdin', io.StringIO('The fox\n\n'))
    sample.main(sample.Config(model=str(trained), interactive=True, stop=stop, device='cpu',
                              temperature=0.0, max_new_tokens=40))
    encoding = sample.checkpoints.load_model(trained)[1]
    assert encoding.decode(read[1]) == whole[:whole.index(stop)]


@pytest.mark.slow
def test_ctrl_c_in_a_conversation_keeps_what_was_written(trained):
    """A long first turn and a short second one, which begins with all of it."""
    process = subprocess.Popen([sys.executable, 'sample.py', '--device=cpu', f'--model={trained}',
                                '-i', '-m', '100000', '--temperature=0'], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdin.write('The fox\n')
    process.stdin.flush()
    begun = process.stdout.read(3000)
    process.send_signal(signal.SIGINT)
    process.stdin.write('\n')
    process.stdin.flush()
    begun += process.stdout.readline()                  # the rest of the first turn
    begun += process.stdout.read(len(begun) + 50)       # and the second, a little on its way
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    first, second = (begun + out).split('\n')[:2]
    assert process.returncode == 0 and err.count('tokens per second') == 2
    assert first.startswith('The fox') and second.startswith(first)


def test_explain_tells_what_was_used_beyond_the_block(trained, capsys):
    """Greedy tokens are of rank 1 wherever the window was."""
    line = json.loads(say(capsys, f'--model={trained}', '-p', 'word ' * 20, '-m', 40, '--json',
                          '--temperature=0', '--explain'))
    new = [fact for fact in line['tokens'] if fact['new']]
    assert len(new) == line['new_tokens'] > 16 and {fact['rank'] for fact in new} == {1}


def test_a_prompt_longer_than_the_block_is_read_from_its_end(trained, capsys):
    sample.main(sample.Config(prompt='word ' * 40, max_new_tokens=4, model=str(trained),
                              device='cpu'))
    assert re.search(r'the prompt has \d+ tokens, the block 16: the model reads the last 1\d',
                     capsys.readouterr().err)


def test_a_reader_that_has_enough_is_no_error(trained):
    done = subprocess.run(f'{sys.executable} sample.py --device=cpu --model={trained} -m 300 '
                          f'--num_samples=3 | head -1', shell=True, cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stdout and 'Broken' not in done.stderr and 'Traceback' not in done.stderr


def test_prompts_come_from_files_and_standard_input(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / 'p.txt').write_text('The fox\n')
    flags = [f'--model={trained}', '-m', 5]
    expected = say(capsys, *flags, '-p', 'The fox')
    assert say(capsys, *flags, '-p', f'FILE:{tmp_path}/p.txt') == expected
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'The fox\n')))
    assert say(capsys, *flags, '-p', '-') == expected
    with pytest.raises(ValueError, match='nowhere.txt: cannot read this file'):
        say(capsys, *flags, '-p', 'FILE:nowhere.txt')
    (tmp_path / 'p.txt').write_bytes(b'\xef\xbb\xbfThe\r\nfox\r\n')
    assert sample.read_prompt(f'FILE:{tmp_path}/p.txt') == 'The\nfox'
    os.mkfifo(tmp_path / 'pipe')
    for name in (tmp_path / 'pipe', '/dev/zero', tmp_path):
        with pytest.raises(ValueError, match='expected a plain file'):
            sample.read_prompt(f'FILE:{name}')


def test_a_line_that_is_not_utf8_is_refused_and_the_next_one_answered(trained):
    done = subprocess.run([sys.executable, 'sample.py', '-i', f'--model={trained}', '-m', '3',
                           '--temperature=0', '--device=cpu'], cwd=ROOT, capture_output=True,
                          input=b'The fox\r\ncaf\xe9\nThe fox\n')
    first, second = done.stdout.split(b'The fox')[1:]               # the line end is no prompt
    assert done.returncode == 0 and first == second
    assert b'standard input:1: not UTF-8' in done.stderr


def test_text_comes_in_whole_characters_and_ends_at_end_of_text():
    encoding = tokenizer.byte_pairs('bytes', [])
    ids = [*'aé世😀'.encode(), encoding.eot_token, *b'not this']
    one = sample.Sample(iter(ids), encoding)
    pieces = list(one.pieces())
    assert ''.join(pieces) == one.text == 'aé世😀'
    assert all('\ufffd' not in piece for piece in pieces)
    assert one.ids == ids[:-8] and not one.stopped
    assert ''.join(sample.Sample(iter('😀'.encode()[:2]), encoding).pieces()) == '\ufffd'


def test_without_any_checkpoint_an_untrained_model_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample.steps, 'ROOT', tmp_path)
    sample.main(sample.Config(max_new_tokens=3, device='cpu'))
    assert 'model: untrained' in capsys.readouterr().err


def test_the_newest_checkpoint_under_out_is_found(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/run').symlink_to(trained)
    shutil.copytree(trained, tmp_path / 'out/copy')
    (tmp_path / 'out/copy/step_0000040/manifest.json').touch()
    sample.main(sample.Config(max_new_tokens=3, device='cpu'))
    assert 'model: out/copy/step_0000040' in capsys.readouterr().err


def test_it_says_which_step_of_a_run_it_took(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / 'run')
    newest = max(run.glob('step_*'))
    for best, said in ((40, 'best'), (7, 'newest')):                # 7 is not there
        (run / 'best.json').write_text(json.dumps({'step': best, 'val_loss': 1.0}))
        sample.main(sample.Config(model=str(run), max_new_tokens=3, device='cpu'))
        assert f'model: {newest}, the {said} step of its run; seed' in capsys.readouterr().err


def test_end_of_text_begins_a_prompt_as_a_token(trained, capsys):
    line = json.loads(say(capsys, f'--model={trained}', '-p', '<|endoftext|>The', '-m', 1, '--json',
                          '--explain'))
    assert line['tokens'][0]['token'] == 'The' and len(line['tokens']) == 2
    empty, given = (say(capsys, f'--model={trained}', '-m', 20, '-p', prompt)
                    for prompt in ('', '<|endoftext|>'))
    assert given == '<|endoftext|>' + empty


@pytest.mark.parametrize('rows', [1, 2])
def test_a_sample_ends_before_the_text_that_stops_it(trained, capsys, rows):
    flags = (f'--model={trained}', '-p', 'The fox', '--temperature=0', '--json', '-m', 60,
             f'--num_samples={rows}')
    whole = json.loads(say(capsys, *flags).splitlines()[0])['text']
    stop = whole[20:27]                                             # over several tokens
    found = json.loads(say(capsys, *flags, f'--stop={stop}').splitlines()[-1])
    assert found['text'] == whole[:whole.index(stop)] and found['ended']
    sample.main(configure(sample.Config, [*map(str, flags), f'--stop={stop}', '--device=cpu'],
                          sample.SHORT))
    count = found['new_tokens']
    assert f'{rows * count} tokens in ' in capsys.readouterr().err
    for most, ended in ((count, True), (count - 1, False)):         # at the last token allowed too
        line = say(capsys, *flags, f'--stop={stop}', '-m', most).splitlines()[-1]
        assert json.loads(line)['ended'] == ended
    for stop, pieces in (('abc', ['a', 'aa', 'b', 'ab', 'cd']), ('\n', 'aabab'), ('a', ['abc']),
                         ('abc', ['x', 'ab'])):
        one = sample.Sample([], ASCII, stop)
        one.decoded = lambda: iter(pieces)
        before, found, _ = ''.join(pieces).partition(stop)
        assert ''.join(one.pieces()) == one.text == before and one.stopped == bool(found)
    rows = [[i, i + 3] for i in range(60, 90)]                      # none is drawn in vain
    assert list(sample.until_all_end('C', rows, ASCII)) == rows[:ord('C') - 60 + 1]


def test_a_seed_can_be_drawn_and_is_told(trained, capsys):
    flags = (f'--model={trained}', '-p', 'The', '-m', '30', '--temperature=2', '--device=cpu')
    sample.main(configure(sample.Config, [*flags, '--seed=-1'], sample.SHORT))
    out, err = capsys.readouterr()
    assert say(capsys, *flags, f"--seed={err.partition('; seed ')[2].split()[0]}") == out


def test_what_a_file_cannot_hold_does_not_end_a_sample(trained, tmp_path):
    """As on Windows, where standard output that goes to a file is not UTF-8."""
    done = script('sample.py', f'--model={trained}', '-p', '你', '-m', '0', '--device=cpu',
                  env={**os.environ, 'PYTHONIOENCODING': 'cp1252'})
    assert done.stdout == '\\u4f60\n'


def test_nanogpt_s_names_are_known(trained, capsys):
    assert say(capsys, '--out_dir', trained, '--start', 'The fox', '-m', 5).startswith('The fox')


@pytest.mark.parametrize('flags, words', [
    (['-i', '-p', '-'], 'standard input; expected another'), (['--batch_size=0'], '1 or more'),
    (['--temperature=-1'], '0 or more'), (['--top_p=0'], 'more than 0'),
    (['--top_k=-1'], '0 or more'), (['--num_samples=0'], '1 or more')])
def test_refusals(trained, capsys, flags, words):
    with pytest.raises(ValueError, match=words):
        say(capsys, f'--model={trained}', *flags)


@pytest.mark.parametrize('name, words', [
    ('gpt2', "no such folder '.*gpt2'; .* not .* in the cache.* name a mirror in HF_ENDPOINT"),
    ('gpt-2', r'Did you mean gpt2\?'), ('out/nowhere/x', 'no such folder')])
def test_a_model_that_is_not_there(monkeypatch, name, words):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ValueError, match=words):
        sample.main(sample.Config(model=name, device='cpu'))
