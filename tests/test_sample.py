"""
Sampling as a user does it:
prompts from anywhere, whole characters, the end of a document, refusals.
"""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script
from test_train import TINY

import sample
import tokenizer
import train
from configurator import configure


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


def test_sample_k_is_the_one_drawn_with_seed_plus_k(trained, capsys):
    both = say(capsys, f'--model={trained}', '-p', 'The', '-m', 8, '--num_samples=2', '--seed=5',
               '--temperature=1.5')
    second = say(capsys, f'--model={trained}', '-p', 'The', '-m', 8, '--seed=6',
                 '--temperature=1.5')
    assert both.split('--- sample 2\n')[1] == second and both.startswith('--- sample 1\n')


def test_greedy_is_the_model_s_likeliest(trained, capsys):
    found = say(capsys, f'--model={trained}', '-p', 'The fox', '-m', 6, '--temperature=0')
    model, encoding = sample.checkpoints.load_model(trained)
    ids = torch.tensor([encoding.encode_ordinary('The fox')])
    expected = encoding.decode(model.generate(ids, 6, temperature=0)[0].tolist())
    assert found == expected + '\n'


def test_prompts_come_from_files_and_standard_input(trained, tmp_path, capsys):
    (tmp_path / 'p.txt').write_text('The fox')
    flags = [f'--model={trained}', '-m', 5]
    expected = say(capsys, *flags, '-p', 'The fox')
    assert say(capsys, *flags, '-p', f'FILE:{tmp_path}/p.txt') == expected
    done = subprocess.run([sys.executable, 'sample.py', '--device=cpu', *map(str, flags),
                           '-p', '-'], cwd=ROOT, input='The fox', capture_output=True, text=True)
    assert done.stdout == expected and str(trained) in done.stderr


def test_text_comes_in_whole_characters_and_ends_at_end_of_text():
    encoding = tokenizer.byte_pairs('bytes', [])
    ids = [*'aé世😀'.encode(), encoding.eot_token, *b'not this']
    pieces = list(sample.as_text((torch.tensor([i]) for i in ids), encoding))
    assert ''.join(pieces) == 'aé世😀' and all('\ufffd' not in piece for piece in pieces)
    broken = ''.join(sample.as_text((torch.tensor([i]) for i in '😀'.encode()[:2]), encoding))
    assert broken == '\ufffd'


def test_without_any_checkpoint_an_untrained_model_says_so(tmp_path):
    done = script(ROOT / 'sample.py', '-m', 3, '--device=cpu', cwd=tmp_path)
    assert 'untrained' in done.stderr or 'checkpoint' in done.stderr


def test_the_newest_checkpoint_under_out_is_found(trained, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/run').symlink_to(trained)
    subprocess.run(['cp', '-rL', tmp_path / 'out/run', tmp_path / 'out/copy'], check=True)
    done = script(ROOT / 'sample.py', '-m', 3, '--device=cpu', cwd=tmp_path)
    assert 'model: out/copy/step_0000040' in done.stderr


@pytest.mark.parametrize('flags, words', [
    (['-p', 'word ' * 40], r'prompt: given \d+ tokens, expected at most 16'),
    (['--temperature=-1'], '0 or more'), (['--top_p=0'], 'more than 0'),
    (['--top_k=-1'], '0 or more'), (['--num_samples=0'], '1 or more')])
def test_refusals(trained, capsys, flags, words):
    with pytest.raises(ValueError, match=words):
        say(capsys, f'--model={trained}', *flags)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    done = script('sample.py', '-p', f'FILE:{tmp_path}/nowhere.txt', '--device=cpu', check=False)
    assert done.returncode == 2 and 'nowhere.txt' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('name, words', [
    ('gpt2', 'openai-community/gpt2: not a folder here, and it could not be had'),
    ('gpt-2', 'is not one of gpt2, '), ('out/nowhere/x', 'there is no such folder')])
def test_a_model_that_cannot_be_had(monkeypatch, name, words):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ValueError, match=words):
        sample.main(sample.Config(model=name, device='cpu'))
