"""Weights both ways, what is refused as a GPT-2, and that nothing in a checkpoint is executed."""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from gpt import checkpoints
from gpt import tokenizer
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32)
BYTES = tokenizer.byte_pairs('bytes', [])


def save(folder, step=1, config=CONFIG):
    torch.manual_seed(step)
    model = GPT(config)
    return model, checkpoints.save(folder, step, model, BYTES, {'step': step})


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('vocab_size', [257, 4200])
def test_what_is_saved_is_loaded_to_the_last_bit(tmp_path, bias, vocab_size):
    """4,200 tokens are padded to 4,224 inside; the file holds 4,200 rows."""
    config = GPTConfig(16, vocab_size, 2, 2, 32, bias=bias)
    model, folder = save(tmp_path, config=config)
    again = GPT(checkpoints.read_config(folder))
    for p in again.parameters():
        p.data.fill_(math.nan)                              # the memory may hold anything
    checkpoints.load_weights(again, folder)
    assert again.config == config
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name
    stored = dict(checkpoints.to_hugging_face(model))
    assert stored['transformer.wte.weight'].shape == (vocab_size, 32)
    assert stored['transformer.h.1.mlp.c_fc.weight'].shape == (32, 128)    # transformers' (in, out)


def test_files_of_transformers_are_read_with_and_without_prefix(tmp_path):
    transformers = pytest.importorskip('transformers')
    from safetensors.torch import save_file
    config = transformers.GPT2Config(**checkpoints.config_json(CONFIG, 0))
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / 'a')
    (tmp_path / 'b').mkdir()
    bare = {name.removeprefix('transformer.'): p.contiguous()
            for name, p in theirs.state_dict().items() if 'lm_head' not in name}
    bare['h.0.attn.bias'] = torch.ones(1, 1, 16, 16)        # OpenAI's files hold the causal masks
    save_file(bare, tmp_path / 'b/model.safetensors')
    (tmp_path / 'b/config.json').write_text((tmp_path / 'a/config.json').read_text())
    for name in 'ab':
        (tmp_path / name / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
        model, encoding = checkpoints.load_model(tmp_path / name)
        ids = torch.arange(16)[None]
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
        assert tokenizer.fingerprint(encoding) == tokenizer.fingerprint(BYTES)


def test_a_padded_vocabulary_is_cut_to_the_tokens(tmp_path):
    """Some save 50,304 rows for 50,257 tokens; ids beyond the tokenizer's would not decode."""
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(**checkpoints.config_json(CONFIG, 0) | {'vocab_size': 300})
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='there is no tokenizer.json'):
        checkpoints.load_model(tmp_path)
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
    model, encoding = checkpoints.load_model(tmp_path)
    ids = torch.arange(16)[None]
    assert model.config.vocab_size == 257 == encoding.n_vocab
    torch.testing.assert_close(model(ids), theirs(ids).logits[..., :257], rtol=1e-4, atol=1e-5)
    larger = tokenizer.build('bpe:310', lambda: ['a text of some length, more or less ' * 9])
    assert larger.n_vocab > 257
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(larger))
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'vocab_size': 257}))
    with pytest.raises(ValueError, match=r'its tokenizer has \d+ tokens, the model knows 257'):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize('content, words', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n', 'git lfs pull'),
    (b'x' * 100, 'damaged or only half there'), (None, 'pytorch_model.bin is not read')])
def test_weights_that_are_not_all_there_say_how_to_get_them(tmp_path, content, words):
    _, folder = save(tmp_path)
    folder = folder.rename(tmp_path / 'model')
    (folder / 'manifest.json').unlink()
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    if content:
        (folder / 'model.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match=words):
        checkpoints.load_model(folder)


def test_a_missing_shard_is_named(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(**checkpoints.config_json(CONFIG, 0))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path, max_shard_size='60KB')
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
    shards = sorted(tmp_path.glob('*.safetensors'))
    assert len(shards) > 1 and checkpoints.load_model(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f'only half there .*{shards[1].name}'):
        checkpoints.load_model(tmp_path)
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map"')
    with pytest.raises(ValueError, match='index.json is damaged'):
        checkpoints.load_model(tmp_path)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc')
def test_the_weights_are_never_twice_in_memory(tmp_path):
    """A new process loads 150 MB, the largest tensor of 17 MB; its peak is read off."""
    config = GPTConfig(block_size=16, vocab_size=257, n_layer=3, n_head=2, n_embd=1024)
    _, folder = save(tmp_path, config=replace(config, n_layer=1))
    code = """
import re
import sys
from gpt import checkpoints
peak = lambda: int(re.search('VmHWM: +([0-9]+)',
                             open('/proc/self/status').read().replace('\\t', ' '))[1]) / 1000
checkpoints.load_model(sys.argv[1])                     # whatever loading takes at its first time
before = peak()
model, _ = checkpoints.load_model(sys.argv[2])
weights = sum(p.numel() for p in model.parameters()) * 4 / 1e6
print(weights, peak() - before)
"""
    _, large = save(tmp_path, 2, config=config)
    done = subprocess.run([sys.executable, '-c', code, folder, large], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    weights, grown = map(float, done.stdout.split())
    assert weights > 150 and grown < weights + 40, (weights, grown)


@pytest.mark.parametrize('change, words', [
    ({'model_type': 'llama'}, 'model_type is'),
    ({'activation_function': 'relu'}, 'activation_function is'),
    ({'n_inner': 7}, 'n_inner is 7'),
    ({'n_embd': 64, 'n_inner': None},
     r'h.0.attn.c_attn.bias: the file holds \(96,\), config.json promises \(192,\)'),
    ({'n_layer': 3}, 'these weights are missing: h.2')])
def test_what_is_not_this_gpt2_is_refused(tmp_path, change, words):
    _, folder = save(tmp_path)
    facts = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(facts | change))
    (folder / 'manifest.json').unlink()
    with pytest.raises(ValueError, match=words):
        checkpoints.load_model(folder.rename(tmp_path / 'model'))


@pytest.mark.parametrize('name, words', [
    ('config.json', 'config.json is damaged'), ('tokenizer.json', 'cannot be used as a tokenizer'),
    ('model.safetensors', 'model: ')])
def test_damaged_files_are_named(tmp_path, name, words):
    """With the manifest its checksum tells; a folder without one is met file by file."""
    _, folder = save(tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f'{name} is truncated'):
        checkpoints.load_model(folder)
    (folder / 'manifest.json').unlink()
    with pytest.raises(ValueError, match='step_0000001: it is incomplete'):
        checkpoints.load_model(folder)
    with pytest.raises(ValueError, match=words):
        checkpoints.load_model(folder.rename(tmp_path / 'model'))


def test_a_checkpoint_of_nanogpt_is_named(tmp_path):
    (tmp_path / 'ckpt.pt').touch()
    with pytest.raises(ValueError, match="of a model; nanoGPT's ckpt.pt is not read"):
        checkpoints.find(tmp_path)


def test_the_newest_whole_step_wins(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    (tmp_path / 'step_0000010/model.safetensors').write_bytes(b'x')
    folder, problems = checkpoints.newest_step(tmp_path)
    assert (folder.name == 'step_0000002'
            and problems == [(tmp_path / 'step_0000010', 'model.safetensors is truncated')])
    assert checkpoints.newest_step(tmp_path / 'none') == (None, [])


def test_a_reader_of_weights_does_not_read_what_a_resume_needs(tmp_path):
    save(tmp_path, 1)
    _, folder = save(tmp_path, 2)
    checkpoints.mark_best(tmp_path, 2, 1.0)
    saved = folder / 'training.pt'
    saved.write_bytes(saved.read_bytes()[:-1] + b'?')
    assert checkpoints.find(tmp_path) == checkpoints.find(folder) == folder
    (tmp_path / 'best.json').unlink()
    assert checkpoints.find(tmp_path) == folder
    assert checkpoints.newest_step(tmp_path) == (
        tmp_path / 'step_0000001', [(folder, 'training.pt is damaged')])


def test_a_step_that_is_there_whole_is_left_alone_and_a_damaged_one_replaced(tmp_path):
    _, folder = save(tmp_path)
    made = (folder / 'model.safetensors').stat().st_mtime_ns
    save(tmp_path)
    assert (folder / 'model.safetensors').stat().st_mtime_ns == made
    (folder / 'training.pt').write_bytes(b'')
    save(tmp_path)
    assert not checkpoints.problem(folder) and checkpoints.load_training(folder) == {'step': 1}


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoints.torch, 'save',
                        lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left')))
    with pytest.raises(OSError):
        save(tmp_path, 2)
    assert list(checkpoints.steps(tmp_path)) == [1]
    checkpoints.lock(tmp_path).close()
    assert not list(tmp_path.glob('.*.partial'))


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    checkpoints.prune(tmp_path, keep=2, best=1)
    assert list(checkpoints.steps(tmp_path)) == [1, 3, 4]


def test_a_pickled_payload_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')
    _, folder = save(tmp_path)
    (folder / 'training.pt').write_bytes(pickle.dumps(Payload()))
    with pytest.raises(Exception):
        checkpoints.load_training(folder)
    assert not (tmp_path / 'ran').exists()
