"""Whole runs in this process: the loop, exact resumes, what is on the disk, what is refused."""

import json
import math
import shutil
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, curve, losses

import train
from gpt import checkpoints, steps, tokenizer
from gpt.data import sets
from gpt.data.order import TokenBatches
from gpt.data.shards import Tokens, read_manifest
from gpt.preflight import doubtful
from gpt.progress import Progress
from gpt.settings import configure
from gpt.validation import ValidationConfig, evaluate
from gpt.world import World


def records(folder, name='log.jsonl'):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# What a run does.

def test_a_run_learns_and_logs(config, tmp_path):
    assert train.main(config(max_iters=60, eval_interval=30, dropout=0.0)) == 0
    found = losses(tmp_path / 'run')
    assert abs(found[0] - math.log(300)) < 0.3 and found[-1] < 0.75 * found[0]
    record = records(tmp_path / 'run')[5]
    assert set(record) == {'step', 'tokens', 'loss', 'lr', 'grad_norm', 'step_ms',
                           'tokens_per_second', 'mfu', 'loss_z', 'grad_norm_z'}
    assert record['tokens'] == 256 * record['step']
    val = losses(tmp_path / 'run', 'val_loss')
    assert len(val) == 3 and val[-1] < val[0]


def test_transformers_continues_our_run_and_we_continue_theirs(config, tmp_path):
    """Trained by us, then by transformers, then by us again: the loss falls each time."""
    transformers = pytest.importorskip('transformers')
    train.main(config(max_iters=30, eval_interval=30, dropout=0.0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'run/step_0000030')
    tokens = Tokens('tiny', 'train', 300, config().data_dir)
    x = torch.from_numpy(tokens.read(0, 64 * 16)).view(64, 16)
    before = theirs(x, labels=x).loss.item()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    for _ in range(20):
        loss = theirs(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < before
    theirs.save_pretrained(tmp_path / 'theirs')
    shutil.copy(tmp_path / 'run/step_0000030/tokenizer.json', tmp_path / 'theirs')
    train.main(config(init_from=str(tmp_path / 'theirs'), out_dir=str(tmp_path / 'ours'),
                      max_iters=30, eval_interval=10, dropout=0.0))
    val = losses(tmp_path / 'ours', 'val_loss')
    assert val[0] < losses(tmp_path / 'run', 'val_loss')[0] - 0.5 and val[-1] < val[0]


def test_the_resolved_settings_repeat_the_run(config, tmp_path):
    train.main(config(max_iters=5))
    again = configure(train.Config,
                      [str(tmp_path / 'run/config.py'), f'--out_dir={tmp_path}/again'])
    train.main(again)
    assert curve(tmp_path / 'again') == curve(tmp_path / 'run')


def test_samples_are_kept(config, tmp_path):
    train.main(config(sample_interval=6))
    found = records(tmp_path / 'run', 'samples.jsonl')
    assert [record['step'] for record in found] == [0, 6, 12]
    assert all(record['text'] for record in found)


def test_eval_only_writes_nothing(config, tmp_path, capsys):
    train.main(config(max_iters=4))
    before = sorted(path.name for path in (tmp_path / 'run').rglob('*'))
    log = (tmp_path / 'run/log.jsonl').read_bytes()
    train.main(config(eval_only=True))
    assert f"val_loss {losses(tmp_path / 'run', 'val_loss')[-1]:.4f}" in capsys.readouterr().out
    assert before == sorted(path.name for path in (tmp_path / 'run').rglob('*'))
    assert log == (tmp_path / 'run/log.jsonl').read_bytes()


def test_the_newest_and_the_best_checkpoints_are_kept(config, tmp_path):
    """With a learning rate so high that it undoes what was learned, an early step is the best: it
    is kept, others are deleted."""
    train.main(config(max_iters=12, eval_interval=2, keep=2, warmup_iters=0, decay_lr=False,
                      learning_rate=0.3))
    val = {record['step']: record['val_loss'] for record in records(tmp_path / 'run')
           if 'val_loss' in record}
    assert set(steps.all_steps(tmp_path / 'run')) == {10, 12, min(val, key=val.get)}
    train.main(config(max_iters=8, eval_interval=2, always_save_checkpoint=False,
                      out_dir=str(tmp_path / 'b')))
    assert len(steps.all_steps(tmp_path / 'b')) <= 2 and 8 in steps.all_steps(tmp_path / 'b')


@pytest.mark.slow
def test_patience_ends_a_run_and_its_best_step_is_the_model(config, tmp_path, capsys):
    """A learning rate that grows until it undoes what was learned. A resumed run ends at once, with
    more patience it continues."""
    cfg = config(max_iters=40, eval_interval=2, patience=3, warmup_iters=12, lr_decay_iters=1000,
                  learning_rate=0.5, always_save_checkpoint=False)
    assert train.main(cfg) == 0
    val = losses(tmp_path / 'run', 'val_loss')
    best = 2 * val.index(min(val))
    last = 2 * (len(val) - 1)
    assert last == best + 6 < 40
    text = capsys.readouterr().out
    assert f'ended at step {last}, no lower loss in 3 validations' in text
    assert f'best val_loss {min(val):.4f} at step {best}' in text
    assert f'sample.py --model={tmp_path}/run` samples from it' in text
    assert set(steps.all_steps(tmp_path / 'run')) == {best, last}
    assert checkpoints.find(tmp_path / 'run').name == f'step_{best:07d}'
    train.main(cfg)
    text = capsys.readouterr().out
    assert f'ended at step {last} before, no lower loss in 3 validations; --patience=0' in text
    assert losses(tmp_path / 'run', 'val_loss') == val
    train.main(replace(cfg, patience=0, max_iters=last + 2))
    assert last + 2 in steps.all_steps(tmp_path / 'run')
    shutil.rmtree(tmp_path / f'run/step_{best:07d}')                # then the newest is used
    assert checkpoints.find(tmp_path / 'run').name == f'step_{last + 2:07d}'


def test_the_batch_grows(config, tmp_path):
    """A quarter of 16 sequences, half of them, all of them: the log counts those consumed."""
    train.main(config(batch_warmup_iters=4, max_iters=6, dropout=0.0))
    assert [tokens // 16 for record in records(tmp_path / 'run') if 'loss' in record
            for tokens in [record['tokens']]] == [4, 8, 16, 24, 40, 56]


def test_a_run_that_has_ended_does_nothing_more(config, tmp_path, monkeypatch, capsys):
    """Unless it was killed before its last validation."""
    train.main(config())
    log, calls = tmp_path / 'run/log.jsonl', []
    text = log.read_text()
    monkeypatch.setattr(train, 'Trainer', lambda *_: calls.append(1))
    for max_iters in (12, 8):
        assert train.main(config(max_iters=max_iters)) == 0
        assert capsys.readouterr().out.splitlines()[-1] == (
            'finished 12 updates before, nothing is left to do; --max_iters=24 trains longer')
    assert log.read_text() == text and not calls
    with pytest.raises(ValueError, match='has n_layer=2, given n_layer=3'):
        train.main(config(n_layer=3))
    monkeypatch.undo()
    log.write_text(''.join(line for line in text.splitlines(True)
                           if '"step": 12' not in line or 'val_loss' not in line))
    train.main(config())
    assert losses(tmp_path / 'run', 'val_loss')[-1] == json.loads(text.splitlines()[-1])['val_loss']


@pytest.mark.parametrize('changes, note', [
    ({'warmup_iters': 12}, 'warmup_iters=12: the learning rate does not reach its maximum'),
    ({'schedule': 'wsd', 'cooldown_iters': 10},
     'warmup_iters=3, cooldown_iters=10: the cooldown follows the warmup, in 9 updates'),
    ({'batch_warmup_iters': 12}, 'the batch never is the full one'),
    ({'patience': 4}, 'patience=4, eval_interval=4: patience has no effect'),
    ({'eval_interval': 13}, 'save_minutes=0: no checkpoint before the end')])
def test_settings_that_contradict_each_other_are_named(config, changes, note):
    assert not doubtful(config())
    line, = doubtful(config(**changes))
    assert line.startswith('note: max_iters=12, ') and line.endswith(note)


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('*.py')), ids=lambda path: path.name)
def test_no_config_contradicts_itself(path):
    files = [path] if path.name == 'train_gpt2.py' or 'gpt2_' not in path.name else [
        ROOT / 'config/train_gpt2.py', path]
    assert not doubtful(configure(train.Config, map(str, files)))


def test_a_run_that_is_stopped_logs_its_last_update(config, tmp_path, monkeypatch):
    judge = Progress.judge

    def stop_after_three(p, m, spike_z):
        if m.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return judge(p, m, spike_z)

    monkeypatch.setattr(Progress, 'judge', stop_after_three)
    train.main(config(log_interval=100))
    found = records(tmp_path / 'run')
    assert [record['step'] for record in found if 'loss' in record] == [4]


# What it reads.

@pytest.mark.slow
def test_a_mixture_resumes_exactly_and_logs_the_loss_of_each_set(config, two_sets, tmp_path,
                                                                 capsys):
    cfg = config(dataset='tiny:0.7,other:0.3', data_dir=str(two_sets), total_batch_size=64 * 16,
                 eval_tokens=1000)
    train.main(cfg)
    text = capsys.readouterr().out
    blocks = [len(Tokens(name, 'train', 300, two_sets)) // 16 for name in ('tiny', 'other')]
    assert (f'updates in an epoch: tiny {blocks[0] / 64 / 0.7:.1f}, '
            f'other {blocks[1] / 64 / 0.3:.1f}') in text
    stopped = replace(cfg, out_dir=str(tmp_path / 'stopped'))
    train.main(replace(stopped, max_iters=5, lr_decay_iters=12))
    train.main(stopped)
    expected, resumed = curve(tmp_path / 'run'), curve(tmp_path / 'stopped')
    resumed[5] = resumed[5][:3] + expected[5][3:]                   # validated where it stopped
    assert resumed == expected and len(expected) == 13

    model, _ = checkpoints.load_model(tmp_path / 'run/step_0000012')
    record, nats, size = records(tmp_path / 'run')[-1], 0.0, 0.0
    for name, fraction in (('tiny', 0.7), ('other', 0.3)):
        tokens = Tokens(name, 'val', 300, two_sets)
        part = ValidationConfig(cfg.batch_size, cfg.block_size, round(1000 * fraction))
        loss, count = evaluate(model, tokens, part, World())
        assert record[f'val_loss/{name}'] == pytest.approx(loss, rel=1e-6)
        assert count == 1000 * fraction
        facts = read_manifest(name, two_sets)['splits']['val']
        nats, size = nats + count * loss, size + count * facts['bytes'] / facts['tokens']
    assert record['val_loss'] == pytest.approx(nats / 1000, rel=1e-6)
    assert record['val_bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert f"(tiny {record['val_loss/tiny']:.4f}, other {record['val_loss/other']:.4f})" in text

    path = two_sets / 'other/manifest.json'
    facts = json.loads(path.read_text())
    facts['splits']['train']['shards'][0]['sha256'] = '0' * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match='was prepared again'):
        train.main(cfg)


def test_a_comma_in_the_name_of_a_folder_is_no_mixture(config, stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'data/Plato, Republic')
    assert train.main(config(dataset='Plato, Republic', data_dir=str(tmp_path / 'data'),
                             max_iters=1)) == 0


def test_only_the_first_batch_of_a_run_is_not_prefetched(config, tmp_path, monkeypatch):
    """A thread reads all others: each guess of the next one is right."""
    asked = []

    class Recorded(TokenBatches):
        def read(self, position, count):
            asked.append((position, threading.current_thread() is threading.main_thread()))
            return super().read(position, count)

    monkeypatch.setattr(sets, 'TokenBatches', Recorded)
    train.main(config(max_iters=3))
    assert [position for position, main in asked if main] == [0, 0]     # one for prepare()
    assert sorted(position for position, main in asked if not main)[:11] == list(range(4, 48, 4))


def test_sequences_that_begin_with_a_document(config, stories, tmp_path, monkeypatch):
    made = []

    class Recorded(TokenBatches):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(sets, 'TokenBatches', Recorded)
    train.main(config(doc_start=True, max_iters=2))
    train.main(config(max_iters=2, out_dir=str(tmp_path / 'b')))
    chosen, plain = made
    x, y = chosen.read(0, chosen.blocks)
    assert (x[:, 0] == 299).sum() > (plain.read(0, plain.blocks)[0][:, 0] == 299).sum()
    assert (x[:, 1:] == y[:, :-1]).all()
    assert losses(tmp_path / 'run', 'val_loss')[0] == losses(tmp_path / 'b', 'val_loss')[0]


def test_characters_have_no_documents(config, tmp_path):
    from data import prepare
    (tmp_path / 'a.txt').write_text('to be or not to be, ' * 100)
    prepare.main(prepare.Config(input=(str(tmp_path / 'a.txt'),), tokenizer='chars', name='letters',
                                data_dir=str(tmp_path / 'data')))
    with pytest.raises(ValueError, match='doc_start: given True, expected False: .*letters'):
        train.main(config(dataset='letters', doc_start=True, data_dir=str(tmp_path / 'data')))


@pytest.mark.slow
def test_nanogpt_s_train_bin_and_val_bin_are_trained_on_as_they_are(
        config, real, tmp_path, capsys):
    """A folder with two headerless files of GPT-2's tokens and nothing else; in nanoGPT's each
    document ends with <|endoftext|>."""
    real('tiktoken_cache')
    encoding = tokenizer.gpt2()
    ids = encoding.encode_ordinary('The fox counted 12 apples and went home. ' * 9)
    (tmp_path / 'data/theirs').mkdir(parents=True)
    for split, times in (('train', 30), ('val', 3)):
        np.array([*ids, 50256] * times, np.uint16).tofile(tmp_path / f'data/theirs/{split}.bin')
    cfg = config(dataset='theirs', data_dir=str(tmp_path / 'data'), max_iters=4, doc_start=True)
    assert train.main(cfg) == 0
    val = losses(tmp_path / 'run', 'val_loss')
    assert abs(val[0] - math.log(50257)) < 0.3 and val[-1] < val[0] - 0.1
    found = checkpoints.load_model(tmp_path / 'run/step_0000004')[1]
    assert tokenizer.fingerprint(found) == tokenizer.fingerprint(encoding)
    assert train.main(replace(cfg, max_iters=5)) == 0               # and resumes
    assert 'bits per byte' not in capsys.readouterr().out           # they are not known


# Where it resumes.

@pytest.mark.parametrize('changes', [{}, {'optimizer': 'muon', 'batch_warmup_iters': 8}, *(
    pytest.param(changes, marks=pytest.mark.slow) for changes in (
        {'dtype': 'bfloat16'}, {'dtype': 'float16'}, {'schedule': 'wsd', 'cooldown_iters': 4}))],
    ids=str)
def test_a_resumed_run_equals_one_that_never_stopped_to_the_last_bit(
        config, tmp_path, stories, changes):
    """Dropout on; 12 updates of 64 sequences pass the end of the epoch several times."""
    tokens = Tokens('tiny', 'train', 300, stories)
    cfg = config(total_batch_size=64 * 16, **changes)
    assert len(tokens) // 16 < 12 * cfg.total_batch_size // 16, 'no epoch ends in this test'
    train.main(cfg)
    stopped = replace(cfg, out_dir=str(tmp_path / 'stopped'))
    train.main(replace(stopped, max_iters=5, lr_decay_iters=12))    # the schedule of all 12
    train.main(stopped)
    expected, resumed = curve(tmp_path / 'run'), curve(tmp_path / 'stopped')
    resumed[5] = resumed[5][:3] + expected[5][3:]                   # validated where it stopped
    assert resumed == expected and len(expected) == 13


def test_micro_batches_and_their_number_change_nothing_but_rounding(config, tmp_path):
    """4 x 4 sequences against 1 x 16 without dropout (whose masks belong to a micro-batch)."""
    train.main(config(dropout=0.0))
    train.main(config(dropout=0.0, batch_size=16, out_dir=str(tmp_path / 'b')))
    assert losses(tmp_path / 'b') == pytest.approx(losses(tmp_path / 'run'), rel=1e-5)


@pytest.mark.parametrize('damage', ['truncated', 'flipped', *(
    pytest.param(damage, marks=pytest.mark.slow)
    for damage in ('no manifest', 'manifest is not json', 'half written'))])
def test_a_damaged_checkpoint_is_skipped_and_the_end_is_the_same(
        config, tmp_path, damage, capsys):
    train.main(config())
    expected = curve(tmp_path / 'run')
    newest = tmp_path / 'run/step_0000012'
    weights = newest / 'model.safetensors'
    raw = bytearray(weights.read_bytes())
    if damage == 'truncated':
        weights.write_bytes(raw[:-4])
    elif damage == 'flipped':
        raw[-100] ^= 4
        weights.write_bytes(raw)
    elif damage == 'no manifest':
        (newest / 'manifest.json').unlink()
    elif damage == 'manifest is not json':
        (newest / 'manifest.json').write_text('{"config')
    else:
        newest.rename(tmp_path / 'run/.step_0000012.partial')
    log = tmp_path / 'run/log.jsonl'
    log.write_bytes(log.read_bytes()[:-20])                         # and a torn line
    train.main(config())
    assert ('skipping' in capsys.readouterr().out) == (damage != 'half written')
    assert curve(tmp_path / 'run') == expected and not steps.problem(newest)
    assert not list((tmp_path / 'run').glob('.*.partial'))
    assert len(list((tmp_path / 'run').glob('*.damaged'))) == (damage != 'half written')


def test_damaged_checkpoints_are_never_counted_as_kept(config, tmp_path):
    """The only intact one survives a resume that is killed before its first save."""
    train.main(config(keep=3))
    for step in (8, 12):
        (tmp_path / f'run/step_{step:07d}/training.pt').write_bytes(b'')
    train.main(config(keep=1, max_iters=5, lr_decay_iters=12, eval_interval=100))
    assert list(steps.all_steps(tmp_path / 'run'))[-1] == 5
    assert (tmp_path / 'run/step_0000012.damaged').exists()
    assert not any(map(steps.problem, steps.all_steps(tmp_path / 'run').values()))


def test_fine_tuning_starts_from_the_weights_and_resumes_itself(config, tmp_path, capsys):
    train.main(config(dropout=0.0))
    best = losses(tmp_path / 'run', 'val_loss')[-1]
    tune = config(init_from=str(tmp_path / 'run'), out_dir=str(tmp_path / 'tuned'), block_size=8,
                  total_batch_size=0, max_iters=4, dropout=0.0)
    train.main(tune)
    assert losses(tmp_path / 'tuned', 'val_loss')[0] < best + 0.5
    assert 'block_size 8 (up to --block_size=16 is possible)' in capsys.readouterr().out
    train.main(replace(tune, max_iters=6))
    assert len(losses(tmp_path / 'tuned')) == 6
    train.main(replace(tune, max_iters=7, init_from='resume', n_layer=4))       # n_layer is its own
    train.main(replace(tune, max_iters=8))
    assert f"init_from = '{tune.init_from}'" in (tmp_path / 'tuned/config.py').read_text()
    train.main(replace(tune, out_dir=str(tmp_path / 'worse'), learning_rate=3.0, decay_lr=False))
    assert 'no validation was better than the one before training' in capsys.readouterr().out
    for change, text in (({'init_from': 'gpt2'}, 'holds a run with init_from='),
                          ({'block_size': 16}, 'has block_size=8, given block_size=16')):
        with pytest.raises(ValueError, match=text):
            train.main(replace(tune, max_iters=8, **change))


def test_fine_tuning_takes_the_block_of_a_model_that_has_a_smaller_one(config, tmp_path, capsys):
    """The same command then resumes, as always."""
    train.main(config(dropout=0.0))
    tune = config(init_from=str(tmp_path / 'run'), out_dir=str(tmp_path / 'tuned'), block_size=64,
                  total_batch_size=0, max_iters=4)
    train.main(tune)
    assert "; block_size 16, the model's (given 64)\n" in capsys.readouterr().out
    assert 'block_size = 16\n' in (tmp_path / 'tuned/config.py').read_text()
    train.main(replace(tune, max_iters=6))
    assert 'resuming from' in capsys.readouterr().out
    assert len(losses(tmp_path / 'tuned')) == 6


# When it goes wrong.

def test_diverging_ends_with_status_3_and_keeps_what_was_good(config, tmp_path, capsys):
    train.main(config(max_iters=4))
    assert train.main(config(learning_rate=1e20, decay_lr=False, grad_clip=0.0, max_iters=100,
                             eval_interval=1000, max_skipped=3)) == 3
    assert 'not finite' in capsys.readouterr().out
    lines = (tmp_path / 'run/log.jsonl').read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert strict[-1]['loss'] is None or strict[-1]['grad_norm'] is None
    assert (list(steps.all_steps(tmp_path / 'run')) == [4]
            and not steps.problem(tmp_path / 'run/step_0000004'))


def test_nothing_is_called_the_best_that_is_not_saved(config, tmp_path, capsys):
    """Step 0 is validated; then the run diverges before its first checkpoint."""
    assert train.main(config(learning_rate=1e20, decay_lr=False, grad_clip=0.0, max_skipped=3,
                             max_iters=100, eval_interval=1000)) == 3
    assert not (tmp_path / 'run/best.json').exists() and not steps.all_steps(tmp_path / 'run')
    text = capsys.readouterr().out
    assert 'There is no checkpoint from before' in text and 'best val_loss' not in text


# What it refuses.

@pytest.mark.parametrize('changes, message', [
    ({'dataset': 'nowhere'}, 'is not prepared; run\n    python data/prepare.py --name=nowhere F'),
    ({'dataset': 'pydocs'}, 'is not prepared; run\n    python data/prepare.py --dataset=pydocs'),
    ({'total_batch_size': 1000}, 'the nearest that can: --total_batch_size=1024'),
    ({'gradient_accumulation_steps': 2}, 'expected one of them'),
    ({'optimizer': 'sgd'}, "'adamw' or 'muon'"), ({'schedule': 'linear'}, "'cosine' or 'wsd'"),
    ({'dtype': 'int8'}, "'float32', 'bfloat16' or 'float16'"),
    ({'batch_size': 0}, 'batch_size: given 0, expected 1 or more'),
    ({'out_dir': __file__}, "test_train.py', expected the name of a folder"),
    ({'dropout': 1.0}, 'dropout: given 1.0'), ({'learning_rate': 0.0}, 'learning_rate: given 0.0'),
    ({'min_lr': 1e-2}, 'min_lr: given 0.01, above learning_rate=0.003'),
    ({'device': 'tpu'}, "device: given 'tpu'"), ({'n_head': 5}, 'multiple of n_head=5'),
    ({'n_embd': 2 ** 24}, 'n_embd=16777216: given weights of .* GB, expected at most'),
    ({'n_layer': 2 ** 24}, 'n_layer=16777216, n_embd=.*: given weights of'),
    ({'n_embd': 2 ** 62}, 'n_embd: given 4,611,.*, expected at most 16,777,216'),
    ({'init_from': 'resume'}, 'there is no checkpoint in'),
    ({'init_from': 'nowhere'}, 'no such folder'),
    ({'block_size': 100_000, 'total_batch_size': 0}, 'fewer than one block')])
def test_bad_settings(config, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(config(**changes))


def test_a_shard_with_a_token_beyond_the_vocabulary(config, stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'data/tiny')
    shard = tmp_path / 'data/tiny/train_000000.bin'
    raw = bytearray(shard.read_bytes())
    raw[1024:] = b'\xff\x7f' * ((len(raw) - 1024) // 2)
    shard.write_bytes(raw)
    text = 'train_000000.bin: holds token id 32767, the vocabulary ends at 299'
    with pytest.raises(ValueError, match=text):
        train.main(config(data_dir=str(tmp_path / 'data')))


def test_nanogpt_s_config_files_find_all_their_settings():
    """Every setting of nanoGPT's train.py but `backend`, which follows from the device here."""
    theirs = '''
        out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
        wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size
        block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1
        beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr device dtype compile'''
    assert set(theirs.split()) <= set(train.Config.__dataclass_fields__)
