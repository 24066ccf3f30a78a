"""Runs in this process: the loop, exact resumes, what it leaves on disk, and what it refuses."""

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, curve, losses, script

from gpt import checkpoints
from gpt import distributed
import train
from gpt import validation
from gpt.settings import configure
from gpt.data import order as batches
from gpt.data.order import TokenBatches
from gpt.data.shards import Tokens, read_manifest
from gpt.world import World, data_sheet_peak, pick_dtype
from gpt.journal import StopSignal
from model import GPT, GPTConfig


# What a run does.

def test_a_run_learns_and_logs(config, tmp_path):
    assert train.main(config(max_iters=60, eval_interval=30, dropout=0.0)) == 0
    found = losses(tmp_path / 'run')
    assert abs(found[0] - math.log(300)) < 0.3 and found[-1] < 0.75 * found[0]
    record = json.loads((tmp_path / 'run/log.jsonl').read_text().splitlines()[5])
    assert set(record) == {'step', 'tokens', 'loss', 'lr', 'grad_norm', 'step_ms',
                           'tokens_per_second', 'mfu', 'loss_z', 'grad_norm_z'}
    assert record['tokens'] == 256 * record['step']
    val = losses(tmp_path / 'run', 'val_loss')
    assert len(val) == 3 and val[-1] < val[0]


def test_a_checkpoint_is_a_hugging_face_model(config, tmp_path):
    transformers = pytest.importorskip('transformers')
    train.main(config(max_iters=4))
    folder = tmp_path / 'run/step_0000004'
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, encoding = checkpoints.load_model(folder)
    text = 'The fox counted 12 apples and went home'
    ids = encoding.encode_ordinary(text)
    assert their_tokenizer(text)['input_ids'] == ids and their_tokenizer.decode(ids) == text
    assert their_tokenizer.eos_token_id == encoding.eot_token == theirs.config.eos_token_id
    x = torch.tensor([ids[:16]])
    torch.testing.assert_close(model(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def test_transformers_goes_on_with_our_run_and_we_with_theirs(config, tmp_path):
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
    lines = (tmp_path / 'run/samples.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert ([record['step'] for record in records] == [0, 6, 12]
            and all(record['text'] for record in records))


def test_eval_only_writes_nothing(config, tmp_path, capsys):
    train.main(config(max_iters=4))
    before = sorted(path.name for path in (tmp_path / 'run').rglob('*'))
    log = (tmp_path / 'run/log.jsonl').read_bytes()
    train.main(config(eval_only=True))
    assert f"val_loss {losses(tmp_path / 'run', 'val_loss')[-1]:.4f}" in capsys.readouterr().out
    assert before == sorted(path.name for path in (tmp_path / 'run').rglob('*'))
    assert log == (tmp_path / 'run/log.jsonl').read_bytes()


def with_gradients(optimizer, seed=0):
    """(parameters, optimizers as train.py makes them) of a tiny GPT after one step, and with
    gradients for another."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(16, 61, 2, 2, 32))
    ids = torch.randint(61, (4, 16))
    optimizers = train.make_optimizers(net, train.Config(optimizer=optimizer, learning_rate=0.01))
    net(ids, ids).backward()
    for each in optimizers:
        each.step()
    net.zero_grad()
    (100 * net(ids, ids)).backward()
    return list(net.parameters()), optimizers


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_an_update_clips_as_torch_does(optimizer):
    ours, optimizers = with_gradients(optimizer)
    norm = train.get_total_norm([p.grad for p in ours])
    assert norm > 1
    train.update(optimizers, torch.tensor(1.0), norm, 0.5)
    theirs, references = with_gradients(optimizer)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    for each in references:
        each.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
@pytest.mark.parametrize('loss, bad', [(float('inf'), None), (1.0, float('nan'))])
def test_an_update_that_is_not_finite_changes_neither_weights_nor_moments(optimizer, loss, bad):
    params, optimizers = with_gradients(optimizer)
    if bad:
        params[3].grad.view(-1)[0] = bad
    state = [{key: value.clone() for key, value in each.state[p].items()}
             for each in optimizers for p in each.state]
    before = [p.detach().clone() for p in params]
    norm = train.get_total_norm([p.grad for p in params])
    train.update(optimizers, torch.tensor(loss), norm, 1.0)
    assert all(map(torch.equal, params, before))
    after = [each.state[p] for each in optimizers for p in each.state]
    assert len(after) == len(params)
    for old, new in zip(state, after):
        assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize('has, half, chosen', [
    (True, 4e12, torch.bfloat16), (True, 0.5e12, torch.float32), (False, 4e12, torch.float32)])
def test_a_cpu_trains_in_the_dtype_that_it_is_fast_in(monkeypatch, has, half, chosen):
    """There are CPUs with instructions for bfloat16 that are slower than those for float32."""
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': has})
    monkeypatch.setattr(distributed, 'matmul_rate',
                        lambda dtype: half if dtype == torch.bfloat16 else 1e12)
    assert pick_dtype('auto', torch.device('cpu'), for_training=True)[0] == chosen
    native = torch.bfloat16 if has else torch.float32
    assert pick_dtype('auto', torch.device('cpu'))[0] == native


def test_compiling_is_decided_by_the_length_of_the_run(monkeypatch):
    cpu, pick = torch.device('cpu'), distributed.pick_compile
    monkeypatch.setattr(distributed.shutil, 'which', lambda name: '/usr/bin/g++')
    for dtype, pays in zip((torch.bfloat16, torch.float32), distributed.COMPILE_PAYS):
        assert pick('auto', cpu, dtype, pays + 1)[0]
        assert not pick('auto', cpu, dtype, pays - 1)[0]
    assert not pick(False, cpu, torch.float32, 1e9)[0]
    assert pick('auto', torch.device('cuda'), torch.bfloat16, 1)[0]
    monkeypatch.setattr(distributed.shutil, 'which', lambda name: None)
    found, why = pick('auto', cpu, torch.float32, 1e9)
    assert not found and 'no C++ compiler' in why


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_memory_of_tensors_that_are_gone_is_kept():
    """The sixth pass of a GPT with 16 MB of logits has its pages already; by itself the C library
    would have given them back."""
    words = ('import resource, torch, distributed\n'
             'from model import GPT, GPTConfig\n'
             'faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
             'if KEEP: distributed.join("cpu")\n'
             'net = GPT(GPTConfig(256, 4096, 2, 2, 64))\n'
             'ids = torch.zeros(4, 256, dtype=torch.long)\n'
             'for _ in range(6):\n'
             '    before = faults(); net(ids, ids).backward(); net.zero_grad()\n'
             'print(faults() - before)')
    counts = []
    for keep in (True, False):
        result = subprocess.run([sys.executable, '-c', words.replace('KEEP', str(keep))], cwd=ROOT,
                                capture_output=True, text=True, check=True)
        counts.append(int(result.stdout))
    if counts[1] < 1000:
        pytest.skip('this C library keeps it by itself')
    assert counts[0] < counts[1] / 20


def test_the_newest_and_the_best_checkpoints_are_kept(config, tmp_path):
    """A learning rate that ruins what was learned makes an early step the best;
    it stays, others go."""
    train.main(config(max_iters=12, eval_interval=2, keep=2, warmup_iters=0, decay_lr=False,
                      learning_rate=0.3))
    records = map(json.loads, (tmp_path / 'run/log.jsonl').read_text().splitlines())
    val = {record['step']: record['val_loss'] for record in records if 'val_loss' in record}
    assert set(checkpoints.steps(tmp_path / 'run')) == {10, 12, min(val, key=val.get)}
    train.main(config(max_iters=8, eval_interval=2, always_save_checkpoint=False,
                      out_dir=str(tmp_path / 'b')))
    assert len(checkpoints.steps(tmp_path / 'b')) <= 2 and 8 in checkpoints.steps(tmp_path / 'b')


@pytest.mark.slow
def test_patience_ends_a_run_and_its_best_step_is_the_model(config, tmp_path, capsys):
    """A learning rate that grows until it ruins; a resumed run ends as soon, with more patience it
    goes on."""
    ruin = config(max_iters=40, eval_interval=2, patience=3, warmup_iters=12, lr_decay_iters=1000,
                  learning_rate=0.5, always_save_checkpoint=False)
    assert train.main(ruin) == 0
    val = losses(tmp_path / 'run', 'val_loss')
    best = 2 * val.index(min(val))
    last = 2 * (len(val) - 1)
    assert last == best + 6 < 40
    words = capsys.readouterr().out
    assert f'ended at step {last}, 3 validations after the best' in words
    assert f'best val_loss {min(val):.4f} at step {best}' in words
    assert f'sample.py --model={tmp_path}/run` writes with that one' in words
    assert set(checkpoints.steps(tmp_path / 'run')) == {best, last}
    assert checkpoints.find(tmp_path / 'run').name == f'step_{best:07d}'
    train.main(ruin)
    assert 2 * (len(losses(tmp_path / 'run', 'val_loss')) - 2) == last
    train.main(replace(ruin, patience=0, max_iters=last + 2))
    assert last + 2 in checkpoints.steps(tmp_path / 'run')
    shutil.rmtree(tmp_path / f'run/step_{best:07d}')                # then the newest will do
    assert checkpoints.find(tmp_path / 'run').name == f'step_{last + 2:07d}'


def test_validation_is_the_mean_over_every_token_of_the_split(config, stories):
    """The last, shorter block counts by its tokens;
    asking for more than there is takes all there is."""
    cfg = config(eval_tokens=10 ** 9)
    tokens = Tokens('tiny', 'val', 300, stories)
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 300, 1, 2, 32))
    alone = World(0, 1, torch.device('cpu'))
    found, count = validation.evaluate(model, tokens, cfg, alone, torch.enable_grad)
    ids = torch.from_numpy(tokens.read(0, len(tokens)))
    assert count == len(ids) - 1 and count % 16 and count > 64
    total = 0.0
    for start in range(0, count, 16):
        x, y = ids[start:min(start + 16, count)], ids[start + 1:min(start + 16, count) + 1]
        total += torch.nn.functional.cross_entropy(model(x[None])[0], y, reduction='sum').item()
    assert found == pytest.approx(total / count, rel=1e-6)


def test_bits_per_byte_is_what_it_says(stories):
    """nats / ln 2 over the bytes of the text; xz stands beside it only for the same text."""
    manifest = read_manifest('tiny', stories)
    facts = manifest['splits']['val']
    whole = validation.bits_per_byte(math.log(2), facts['tokens'] - 1, manifest)
    assert whole['val_bits_per_byte'] == pytest.approx(facts['tokens'] / facts['bytes'])
    assert whole['xz_bits_per_byte'] == 8 * facts['xz_bytes'] / facts['bytes']
    assert set(validation.bits_per_byte(1.0, 50, manifest)) == {'val_bits_per_byte'}
    assert validation.bits_per_byte(1.0, 50, {}) == {}


def test_a_gpu_has_the_peak_of_its_data_sheet_or_none():
    names = {'NVIDIA A100-SXM4-80GB': 312e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA L4': 121e12,
             'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA GeForce RTX 4090': 165e12,
             'NVIDIA GeForce RTX 4090 Laptop GPU': None, 'NVIDIA RTX A1000': None,
             'NVIDIA L40': None, 'NVIDIA GeForce RTX 4090 D': None, 'NVIDIA A800-SXM4-80GB': 312e12,
             'NVIDIA GeForce RTX 3090 Ti': None, 'NVIDIA H100 80GB HBM3 MIG 1g.10gb': None}
    assert {name: data_sheet_peak(name) for name in names} == names


def test_a_driver_that_this_torch_has_no_gpu_for_is_told(monkeypatch, capsys):
    if distributed.pick_device('auto').type != 'cpu':
        pytest.skip('there is a GPU')
    monkeypatch.setattr(distributed.shutil, 'which', lambda name: f'/usr/bin/{name}')
    assert distributed.pick_device('auto').type == 'cpu'
    assert 'there is an NVIDIA driver here, but this torch' in capsys.readouterr().err


# What it reads.

@pytest.fixture
def two_sets(stories, tmp_path):
    """A data folder with 'tiny' and 'other', documents of their own in the same bpe:300."""
    from data import prepare
    shutil.copytree(stories / 'tiny', tmp_path / 'data/tiny')
    source = tmp_path / 'other.jsonl'
    texts = [f'{i} ducks swam over the lake; {i % 7} came back. ' * 9 for i in range(30)]
    source.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    make = dict(input=(str(source),), val_fraction=0.2, data_dir=str(tmp_path / 'data'))
    prepare.main(prepare.Config(tokenizer=str(stories / 'tiny'), **make))
    prepare.main(prepare.Config(tokenizer='bytes', name='bytes', **make))
    return tmp_path / 'data'


@pytest.mark.slow
def test_a_mixture_resumes_exactly_and_says_what_each_set_loses(config, two_sets, tmp_path, capsys):
    cfg = config(dataset='tiny:0.7,other:0.3', data_dir=str(two_sets), total_batch_size=64 * 16,
                 eval_tokens=1000)
    train.main(cfg)
    words = capsys.readouterr().out
    blocks = [len(Tokens(name, 'train', 300, two_sets)) // 16 for name in ('tiny', 'other')]
    assert (f'updates in an epoch: tiny {blocks[0] / 64 / 0.7:.1f}, '
            f'other {blocks[1] / 64 / 0.3:.1f}') in words
    stopped = replace(cfg, out_dir=str(tmp_path / 'stopped'))
    train.main(replace(stopped, max_iters=5, lr_decay_iters=12))
    train.main(stopped)
    whole, resumed = curve(tmp_path / 'run'), curve(tmp_path / 'stopped')
    resumed[5] = resumed[5][:3] + whole[5][3:]                      # it validated where it stopped
    assert resumed == whole and len(whole) == 13

    model, _ = checkpoints.load_model(tmp_path / 'run/step_0000012')
    record = json.loads((tmp_path / 'run/log.jsonl').read_text().splitlines()[-1])
    alone, nats, size = World(0, 1, torch.device('cpu')), 0.0, 0.0
    for name, share in (('tiny', 0.7), ('other', 0.3)):
        tokens = Tokens(name, 'val', 300, two_sets)
        part = replace(cfg, eval_tokens=round(1000 * share))
        loss, count = validation.evaluate(model, tokens, part, alone, torch.enable_grad)
        assert record[f'val_loss/{name}'] == pytest.approx(loss, rel=1e-6)
        assert count == 1000 * share
        facts = read_manifest(name, two_sets)['splits']['val']
        nats, size = nats + count * loss, size + count * facts['bytes'] / facts['tokens']
    assert record['val_loss'] == pytest.approx(nats / 1000, rel=1e-6)
    assert record['val_bits_per_byte'] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert f"(tiny {record['val_loss/tiny']:.4f}, other {record['val_loss/other']:.4f})" in words

    path = two_sets / 'other/manifest.json'
    facts = json.loads(path.read_text())
    facts['splits']['train']['shards'][0]['sha256'] = '0' * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match='was prepared anew'):
        train.main(cfg)


@pytest.mark.parametrize('changes, words', [
    ({'dataset': 'tiny,bytes'}, 'data sets tiny and bytes hold tokens of different tokenizers, '
     r'bpe:300 \(300\) and bytes .257.; .*--tokenizer=.*/tiny$'),
    ({'dataset': 'tiny,nowhere'}, 'not prepared; run\n    python data/prepare.py --name=nowhere'),
    ({'dataset': 'tiny,tiny'}, 'each once'), ({'dataset': 'tiny:x,other:1'}, 'a weight above 0')])
def test_mixtures_that_are_refused(config, two_sets, changes, words):
    with pytest.raises(ValueError, match=words):
        train.main(config(data_dir=str(two_sets), **changes))


def test_a_comma_in_the_name_of_a_folder_is_no_mixture(config, stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'data/Plato, Republic')
    assert train.main(config(dataset='Plato, Republic', data_dir=str(tmp_path / 'data'),
                             max_iters=1)) == 0


def test_only_the_first_batch_of_a_run_is_waited_for(config, tmp_path, monkeypatch):
    """All others are read by a thread: each guess of what comes next is right."""
    asked = []

    class Watched(TokenBatches):
        def read(self, position, count):
            asked.append((position, threading.current_thread() is threading.main_thread()))
            return super().read(position, count)

    monkeypatch.setattr(batches, 'TokenBatches', Watched)
    train.main(config(max_iters=3))
    assert [position for position, main in asked if main] == [0, 0]     # one to warm up
    assert sorted(position for position, main in asked if not main)[:11] == list(range(4, 48, 4))


def test_sequences_that_begin_with_a_document(config, stories, tmp_path, monkeypatch):
    made = []
    whole = train.make_batches
    monkeypatch.setattr(train, 'make_batches', lambda *a: made.append(whole(*a)) or made[-1])
    train.main(config(doc_start=True, max_iters=2))
    train.main(config(max_iters=2, out_dir=str(tmp_path / 'b')))
    chosen, plain = made
    x, y = chosen.read(0, chosen.blocks)
    assert (x[:, 0] == 299).sum() > (plain.read(0, plain.blocks)[0][:, 0] == 299).sum()
    assert (x[:, 1:] == y[:, :-1]).all()
    assert losses(tmp_path / 'run', 'val_loss')[0] == losses(tmp_path / 'b', 'val_loss')[0]


def test_characters_know_no_documents(config, tmp_path):
    from data import prepare
    (tmp_path / 'a.txt').write_text('to be or not to be, ' * 100)
    prepare.main(prepare.Config(input=(str(tmp_path / 'a.txt'),), tokenizer='chars', name='letters',
                                data_dir=str(tmp_path / 'data')))
    with pytest.raises(ValueError, match='doc_start: given True, expected False: .*letters'):
        train.main(config(dataset='letters', doc_start=True, data_dir=str(tmp_path / 'data')))


@pytest.mark.slow
def test_nanogpt_s_train_bin_and_val_bin_are_trained_on_as_they_are(
        config, real, tmp_path, capsys):
    """Two headerless files of GPT-2's tokens in a folder, nothing else; nanoGPT puts
    <|endoftext|> behind each document."""
    real('tiktoken_cache')
    encoding = train.tokenizer.gpt2()
    ids = encoding.encode_ordinary('The fox counted 12 apples and went home. ' * 9)
    (tmp_path / 'data/theirs').mkdir(parents=True)
    for split, times in (('train', 30), ('val', 3)):
        np.array([*ids, 50256] * times, np.uint16).tofile(tmp_path / f'data/theirs/{split}.bin')
    cfg = config(dataset='theirs', data_dir=str(tmp_path / 'data'), max_iters=4, doc_start=True)
    assert train.main(cfg) == 0
    val = losses(tmp_path / 'run', 'val_loss')
    assert abs(val[0] - math.log(50257)) < 0.3 and val[-1] < val[0] - 0.1
    found = checkpoints.load_model(tmp_path / 'run/step_0000004')[1]
    assert train.tokenizer.fingerprint(found) == train.tokenizer.fingerprint(encoding)
    assert train.main(replace(cfg, max_iters=5)) == 0               # and goes on
    assert 'bits per byte' not in capsys.readouterr().out           # nothing says how many


# Where it goes on.

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
    train.main(replace(stopped, max_iters=5, lr_decay_iters=12))    # the schedule of the whole run
    train.main(stopped)
    whole, resumed = curve(tmp_path / 'run'), curve(tmp_path / 'stopped')
    resumed[5] = resumed[5][:3] + whole[5][3:]                      # it validated where it stopped
    assert resumed == whole and len(whole) == 13


def test_micro_batches_and_their_number_change_nothing_but_rounding(config, tmp_path):
    """4 x 4 sequences against 1 x 16 without dropout (whose masks belong to a micro-batch)."""
    train.main(config(dropout=0.0))
    train.main(config(dropout=0.0, batch_size=16, out_dir=str(tmp_path / 'b')))
    assert losses(tmp_path / 'b') == pytest.approx(losses(tmp_path / 'run'), rel=1e-5)


@pytest.mark.parametrize('damage', ['truncated', 'flipped', *(
    pytest.param(damage, marks=pytest.mark.slow)
    for damage in ('no manifest', 'manifest is not json', 'half written'))])
def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(
        config, tmp_path, damage, capsys):
    train.main(config())
    whole = curve(tmp_path / 'run')
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
    assert ('passing over' in capsys.readouterr().out) == (damage != 'half written')
    assert curve(tmp_path / 'run') == whole and not checkpoints.problem(newest)
    assert not list((tmp_path / 'run').glob('.*.partial'))
    assert len(list((tmp_path / 'run').glob('*.damaged'))) == (damage != 'half written')


def test_damaged_checkpoints_are_never_counted_as_kept(config, tmp_path):
    """The only whole one survives a resume that is killed before its first save."""
    train.main(config(keep=3))
    for step in (8, 12):
        (tmp_path / f'run/step_{step:07d}/training.pt').write_bytes(b'')
    train.main(config(keep=1, max_iters=5, lr_decay_iters=12, eval_interval=100))
    assert list(checkpoints.steps(tmp_path / 'run'))[-1] == 5
    assert (tmp_path / 'run/step_0000012.damaged').exists()
    assert not any(map(checkpoints.problem, checkpoints.steps(tmp_path / 'run').values()))


def test_data_that_was_prepared_anew_is_refused(config, stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'data/tiny')
    cfg = config(data_dir=str(tmp_path / 'data'), max_iters=4)
    train.main(cfg)
    shard = tmp_path / 'data/tiny/train_000000.bin'
    shard.rename(tmp_path / 'elsewhere.bin')
    with pytest.raises(ValueError, match='train_000000.bin is missing'):
        train.main(cfg)
    (tmp_path / 'elsewhere.bin').rename(shard)
    path = tmp_path / 'data/tiny/manifest.json'
    facts = json.loads(path.read_text())
    facts['splits']['train']['shards'][0]['sha256'] = '0' * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match='was prepared anew'):
        train.main(cfg)


def test_when_no_checkpoint_is_whole_it_does_not_start_over(config, tmp_path):
    train.main(config())
    for folder in checkpoints.steps(tmp_path / 'run').values():
        (folder / 'training.pt').write_bytes(b'')
    with pytest.raises(ValueError, match='none of them is whole:(.|\n)*training.pt is truncated'):
        train.main(config())


def test_changed_settings_win_and_are_named(config, tmp_path, capsys):
    train.main(config(max_iters=4))
    train.main(config(max_iters=6, learning_rate=1e-4, decay_lr=False))
    words = capsys.readouterr().out
    assert 'changed: max_iters 4 -> 6' in words and 'learning_rate 0.003 -> 0.0001' in words
    assert losses(tmp_path / 'run', 'lr')[-1] == 1e-4


def test_another_text_or_seed_is_another_run_unless_it_is_asked_for(config, two_sets, tmp_path):
    """And the best loss of one text is not that of another."""
    cfg = config(data_dir=str(two_sets), max_iters=4)
    train.main(cfg)
    for change in ({'dataset': 'other'}, {'seed': 2}):
        with pytest.raises(ValueError, match='holds a run with .* give another --out_dir'):
            train.main(replace(cfg, max_iters=8, **change))
    train.main(replace(cfg, dataset='other', eval_only=True))
    best = tmp_path / 'run/best.json'
    best.write_text(json.dumps({'step': 4, 'val_loss': 0.0}))
    train.main(replace(cfg, max_iters=8, dataset='other', init_from='resume'))
    assert json.loads(best.read_text())['val_loss'] == min(
        loss for loss in losses(tmp_path / 'run', 'val_loss')[-2:])


def test_fine_tuning_starts_from_the_weights_and_resumes_itself(config, tmp_path, capsys):
    train.main(config(dropout=0.0))
    best = losses(tmp_path / 'run', 'val_loss')[-1]
    tune = config(init_from=str(tmp_path / 'run'), out_dir=str(tmp_path / 'tuned'), block_size=8,
                  total_batch_size=0, max_iters=4, dropout=0.0)
    train.main(tune)
    assert losses(tmp_path / 'tuned', 'val_loss')[0] < best + 0.5
    assert 'reads 8 tokens at a time (--block_size=16 is all it could)' in capsys.readouterr().out
    train.main(replace(tune, max_iters=6))
    assert len(losses(tmp_path / 'tuned')) == 6
    train.main(replace(tune, max_iters=7, init_from='resume', n_layer=4))       # as it began
    train.main(replace(tune, max_iters=8))
    assert f"init_from = '{tune.init_from}'" in (tmp_path / 'tuned/config.py').read_text()
    train.main(replace(tune, out_dir=str(tmp_path / 'worse'), learning_rate=3.0, decay_lr=False))
    assert 'no validation was better than the one before training' in capsys.readouterr().out
    for change, words in (({'init_from': 'gpt2'}, 'holds a run with init_from='),
                          ({'block_size': 16}, 'has block_size=8, given block_size=16')):
        with pytest.raises(ValueError, match=words):
            train.main(replace(tune, max_iters=8, **change))


def test_diverging_ends_with_status_3_and_keeps_what_was_good(config, tmp_path, capsys):
    train.main(config(max_iters=4))
    assert train.main(config(learning_rate=1e20, decay_lr=False, grad_clip=0.0, max_iters=100,
                             eval_interval=1000, max_skipped=3)) == 3
    assert 'not finite' in capsys.readouterr().out
    lines = (tmp_path / 'run/log.jsonl').read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in lines]
    assert strict[-1]['loss'] is None or strict[-1]['grad_norm'] is None
    assert (list(checkpoints.steps(tmp_path / 'run')) == [4]
            and not checkpoints.problem(tmp_path / 'run/step_0000004'))


def test_nothing_is_called_the_best_that_is_not_saved(config, tmp_path, capsys):
    """Step 0 is validated; then the run diverges before its first checkpoint."""
    assert train.main(config(learning_rate=1e20, decay_lr=False, grad_clip=0.0, max_skipped=3,
                             max_iters=100, eval_interval=1000)) == 3
    assert not (tmp_path / 'run/best.json').exists() and not checkpoints.steps(tmp_path / 'run')
    words = capsys.readouterr().out
    assert 'There is no checkpoint from before' in words and 'best val_loss' not in words


def test_a_second_process_in_the_same_folder_is_refused(config, tmp_path):
    held = checkpoints.lock(tmp_path / 'run')
    with pytest.raises(ValueError, match='another process is training in this folder'):
        train.main(config())
    held.close()
    assert train.main(config(max_iters=1)) == 0


def test_a_compiler_that_fails_leaves_an_eager_run_and_one_line(
        config, tmp_path, monkeypatch, capsys):
    def broken(model):
        def call(*_):
            raise RuntimeError('no compiler\nand a long story')
        return call
    monkeypatch.setattr(torch, 'compile', broken)
    train.main(config(compile=True, max_iters=2))
    words = 'compiling failed, going on without (RuntimeError: no compiler)'
    assert words in capsys.readouterr().out
    assert len(losses(tmp_path / 'run')) == 2


@pytest.mark.slow
def test_wandb_offline_keeps_its_id_over_a_resume(config, tmp_path):
    pytest.importorskip('wandb')
    train.main(config(max_iters=3, wandb_log=True))
    name = (tmp_path / 'run/wandb_id.txt').read_text()
    train.main(config(max_iters=5, wandb_log=True))
    files = list((tmp_path / 'run/wandb').glob(f'offline-run-*-{name}/run-{name}.wandb'))
    assert len(files) == 2 and all(file.stat().st_size > 0 for file in files)


def test_wandb_that_fails_stops_nothing(config, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setattr(wandb, 'init', lambda **_: (_ for _ in ()).throw(ConnectionError('down')))
    assert train.main(config(max_iters=3, wandb_log=True)) == 0
    assert 'wandb: ConnectionError: down; going on without it' in capsys.readouterr().out
    assert len(losses(tmp_path / 'run')) == 3


def test_a_run_that_is_stopped_logs_its_last_update(config, tmp_path, monkeypatch):
    real = train.judge
    monkeypatch.setattr(train, 'judge', lambda step, *args: (
        step == 3 and signal.raise_signal(signal.SIGTERM), real(step, *args))[1])
    train.main(config(log_interval=100))
    found = [json.loads(line) for line in (tmp_path / 'run/log.jsonl').read_text().splitlines()]
    assert [record['step'] for record in found if 'loss' in record] == [4]


def test_a_second_ctrl_c_ends_at_once_but_not_the_one_that_torchrun_passes_on(capfd):
    for under_torchrun in (True, False):
        signals = StopSignal(True, under_torchrun)
        try:
            signal.raise_signal(signal.SIGINT)
            assert signals.requested
            if under_torchrun:
                signal.raise_signal(signal.SIGINT)
                signals.since -= 3                                  # later
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        finally:
            signals.restore()
    assert capfd.readouterr().err == 2 * (
        'ending after this update, with a checkpoint; Ctrl-C again ends at once, without one\n'
        'ended, without a checkpoint\n')


# What it refuses.

@pytest.mark.parametrize('changes, words', [
    ({'dataset': 'nowhere'}, 'is not prepared; run\n    python data/prepare.py --name=nowhere F'),
    ({'dataset': 'pydocs'}, 'is not prepared; run\n    python data/prepare.py --data_dir=.*'),
    ({'total_batch_size': 1000}, 'the nearest that can: --total_batch_size=1024'),
    ({'gradient_accumulation_steps': 2}, 'expected one of them'),
    ({'optimizer': 'sgd'}, "'adamw' or 'muon'"), ({'schedule': 'linear'}, "'cosine' or 'wsd'"),
    ({'dtype': 'int8'}, "'float32', 'bfloat16' or 'float16'"),
    ({'batch_size': 0}, 'batch_size: given 0, expected 1 or more'),
    ({'out_dir': __file__}, 'a file, expected the name of a folder'),
    ({'dropout': 1.0}, 'dropout: given 1.0'), ({'learning_rate': 0.0}, 'learning_rate: given 0.0'),
    ({'min_lr': 1e-2}, 'min_lr: given 0.01, above learning_rate=0.003'),
    ({'device': 'tpu'}, "device: given 'tpu'"), ({'n_head': 5}, 'multiple of n_head=5'),
    ({'init_from': 'resume'}, 'there is no checkpoint in'),
    ({'init_from': 'nowhere'}, 'there is no such folder'),
    ({'block_size': 100_000, 'total_batch_size': 0}, 'fewer than one block')])
def test_bad_settings(config, changes, words):
    with pytest.raises(ValueError, match=words):
        train.main(config(**changes))


def test_scratch_over_an_existing_run(config):
    train.main(config(max_iters=4))
    with pytest.raises(ValueError, match="init_from='scratch', but .*step_0000004 holds a run"):
        train.main(config(init_from='scratch'))


def test_a_checkpoint_of_another_shape(config):
    train.main(config(max_iters=4))
    with pytest.raises(ValueError, match='step_0000004 has n_layer=2, given n_layer=3'):
        train.main(config(n_layer=3))


def test_a_checkpoint_of_another_tokenizer(config, stories, tmp_path):
    from data import prepare
    train.main(config(max_iters=4))
    prepare.main(prepare.Config(input=(str(stories / 'tiny.jsonl'),), tokenizer='bytes',
                                name='tiny', val_fraction=0.2, data_dir=str(tmp_path / 'data')))
    words = r'was trained on tokens of bpe:300.*holds those of another tokenizer, bpe:257'
    with pytest.raises(ValueError, match=words):
        train.main(config(data_dir=str(tmp_path / 'data')))


def test_a_checkpoint_of_another_optimizer(config):
    train.main(config(max_iters=4))
    with pytest.raises(ValueError, match='no matching optimizer state for h.0.attn.c_attn.weight'):
        train.main(config(optimizer='muon'))


def test_a_shard_with_a_token_beyond_the_vocabulary(config, stories, tmp_path):
    shutil.copytree(stories / 'tiny', tmp_path / 'data/tiny')
    shard = tmp_path / 'data/tiny/train_000000.bin'
    raw = bytearray(shard.read_bytes())
    raw[1024:] = b'\xff\x7f' * ((len(raw) - 1024) // 2)
    shard.write_bytes(raw)
    words = 'train_000000.bin: holds token id 32767, the vocabulary ends at 299'
    with pytest.raises(ValueError, match=words):
        train.main(config(data_dir=str(tmp_path / 'data')))


@pytest.mark.parametrize('flags, words', [
    (['--max_itres=3'], "did you mean 'max_iters'"),
    (['--max_iters=many'], 'expected a whole number'),
    (['--dataset=nowhere'], 'python data/prepare.py --name=nowhere')])
def test_a_user_sees_one_line_and_status_2(flags, words):
    done = script('train.py', '--device=cpu', *flags, check=False)
    assert done.returncode == 2 and words in done.stderr and 'Traceback' not in done.stderr


def test_a_failure_of_ours_shows_its_traceback_and_status_1():
    code = ('import configurator\nclass C: __module__ = "__main__"\n'
            'configurator.configure = lambda *a: None\nconfigurator.run(lambda cfg: {}["x"], C)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'KeyError' in done.stderr and 'Traceback' in done.stderr


# Pure functions.

def test_the_cosine_schedule_is_nanogpt_s():
    """Values of nanoGPT's get_lr (train.py) for the same settings."""
    cfg = train.Config(learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000,
                       lr_decay_iters=600_000, max_iters=600_000)
    expected = {0: 2.998500749625187e-07, 1000: 3.0014992503748125e-04, 2000: 6e-4,
                301_000: 3.3e-4, 600_001: 6e-5}
    for step, lr in expected.items():
        assert train.learning_rate_at(step, cfg) == pytest.approx(lr, rel=1e-9)
    assert train.learning_rate_at(5, replace(cfg, decay_lr=False)) == 6e-4


def test_a_cooldown_longer_than_the_run_begins_after_the_warmup():
    cfg = train.Config(schedule='wsd', learning_rate=1.0, min_lr=0.0, warmup_iters=2, max_iters=20)
    rates = [train.learning_rate_at(step, cfg) for step in range(21)]
    assert rates[2] == 1.0 and rates[11] == pytest.approx(0.5) and rates[20] == 0.0


def test_warmup_stable_decay():
    cfg = train.Config(schedule='wsd', learning_rate=1.0, min_lr=0.1, warmup_iters=9,
                       max_iters=100, cooldown_iters=20)
    rates = [train.learning_rate_at(step, cfg) for step in range(101)]
    assert (rates[0] == 0.1 and rates[9:81] == [1.0] * 72
            and rates[90] == pytest.approx(0.55) and rates[100] == 0.1)


@pytest.mark.parametrize('changes, world, expected', [
    ({}, 1, (16, 4, 4)), ({}, 2, (16, 4, 2)), ({}, 4, (16, 4, 1)), ({}, 8, (16, 2, 1)),
    ({'total_batch_size': 0, 'gradient_accumulation_steps': 40, 'batch_size': 12},
     8, (480, 12, 5)),                                              # nanoGPT's
    ({'total_batch_size': 0}, 2, (4, 2, 1))])
def test_the_batch_is_the_same_on_any_number_of_processes(changes, world, expected):
    assert train.divide_batch(train.Config(**{**TINY, **changes}), world) == expected


def test_the_batch_grows(config, tmp_path):
    """A quarter of 16 sequences, half of them, all of them; the log counts what was consumed."""
    cfg = config(batch_warmup_iters=4, max_iters=6, dropout=0.0)
    assert [train.batch_at(step, cfg, 1)[0] for step in range(6)] == [4, 4, 8, 8, 16, 16]
    assert train.batch_at(2, cfg, 2) == (8, 4, 1)
    train.main(cfg)
    records = map(json.loads, (tmp_path / 'run/log.jsonl').read_text().splitlines())
    assert [record['tokens'] // 16 for record in records if 'loss' in record] == [
        4, 8, 16, 24, 40, 56]
    with pytest.raises(ValueError, match='1/2 of an update of 384 tokens .*=512'):
        train.main(config(batch_warmup_iters=4, batch_size=8, total_batch_size=24 * 16))


def test_eval_iters_is_nanogpt_s_spelling(config, stories):
    tokens = Tokens('tiny', 'val', 300, stories)
    model = GPT(GPTConfig(16, 300, 1, 2, 32))
    alone = World(0, 1, torch.device('cpu'))
    _, count = validation.evaluate(model, tokens, config(eval_iters=3), alone, torch.enable_grad)
    assert count == 3 * 4 * 16


def test_nanogpt_s_config_files_find_all_their_settings():
    """Every setting of nanoGPT's train.py but `backend`, which follows from the device here."""
    theirs = '''
        out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
        wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size
        block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1
        beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr device dtype compile'''
    assert set(theirs.split()) <= set(train.Config.__dataclass_fields__)
