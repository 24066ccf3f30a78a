"""Weights both ways, what is refused as a GPT-2, damage, and that no checkpoint runs code."""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import train
from gpt import checkpoints, model_config, steps, tokenizer, weights
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
    """4,200 tokens are padded to 4,224 in memory; the file has 4,200 rows."""
    config = GPTConfig(16, vocab_size, 2, 2, 32, bias=bias)
    model, folder = save(tmp_path, config=config)
    again = GPT(checkpoints.read_config(folder))
    for p in again.parameters():
        p.data.fill_(math.nan)                              # the memory may hold anything
    weights.fill(again, weights.open_weights(folder))
    assert again.config == config
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name
    stored = dict(weights.to_hugging_face(model))
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
    with pytest.raises(ValueError, match='no tokenizer.json, nor vocab.json'):
        checkpoints.load_model(tmp_path)
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
    model, encoding = checkpoints.load_model(tmp_path)
    ids = torch.arange(16)[None]
    assert model.config.vocab_size == 257 == encoding.n_vocab
    torch.testing.assert_close(model(ids), theirs(ids).logits[..., :257], rtol=1e-4, atol=1e-5)
    larger = tokenizer.byte_pairs('bpe:309', [
        ('a', name) for name in list(tokenizer.byte_characters().values())[:53]])
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(larger))
    with pytest.raises(ValueError, match=r'its tokenizer has 309 tokens, the model 300'):
        checkpoints.load_model(tmp_path)


@pytest.mark.parametrize('content, message', [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n', 'git lfs pull'),
    (b'x' * 100, 'damaged or incomplete'),
    (None, 'no model.safetensors in this folder, nor model.safetensors.index.json, nor')])
def test_incomplete_weights_say_how_to_get_them(tmp_path, content, message):
    _, folder = save(tmp_path)
    folder = folder.rename(tmp_path / 'model')
    (folder / 'manifest.json').unlink()
    (folder / 'model.safetensors').unlink()
    if content:
        (folder / 'model.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(folder)


def test_a_missing_shard_is_named(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.GPT2Config(**checkpoints.config_json(CONFIG, 0))
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path, max_shard_size='60KB')
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
    shards = sorted(tmp_path.glob('*.safetensors'))
    assert len(shards) > 1 and checkpoints.load_model(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f'incomplete .*{shards[1].name}'):
        checkpoints.load_model(tmp_path)
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map"')
    with pytest.raises(ValueError, match='index.json: not JSON'):
        checkpoints.load_model(tmp_path)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc')
def test_nothing_but_torch_is_imported_on_the_way_to_a_word(tmp_path):
    """Not its compiler, which takes seconds."""
    _, folder = save(tmp_path)
    code = ('import sys, torch; from gpt import checkpoints\n'
            'model, _ = checkpoints.load_model(sys.argv[1])\n'
            'model.generate(torch.tensor([[1]]), 3, temperature=0.8, top_k=5)\n'
            'print({"torch._dynamo", "sympy", "transformers", "datasets"} & {*sys.modules})')
    done = subprocess.run([sys.executable, '-c', code, str(folder)], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    assert done.stdout == 'set()\n'


def test_the_weights_are_never_twice_in_memory(tmp_path):
    """A new process loads 150 MB, of tensors up to 17 MB: its peak memory."""
    config = GPTConfig(block_size=16, vocab_size=257, n_layer=3, n_head=2, n_embd=1024)
    _, folder = save(tmp_path, config=replace(config, n_layer=1))
    code = """
import re
import sys
from gpt import checkpoints
peak = lambda: int(re.search('VmHWM: +([0-9]+)',
                             open('/proc/self/status').read().replace('\\t', ' '))[1]) / 1000
checkpoints.load_model(sys.argv[1])                     # what loading takes the first time
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


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'llama'}, 'model_type is'),
    ({'activation_function': 'relu'}, 'activation_function is'),
    ({'n_inner': 7}, 'n_inner is 7'),
    ({'n_embd': 64, 'n_inner': None},
     r'h.0.attn.c_attn.bias: the file holds \(96,\), its config promises \(192,\)'),
    ({'n_layer': 3}, 'n_layer=3; .* 2 layers')])
def test_what_is_not_this_gpt2_is_refused(tmp_path, change, message):
    _, folder = save(tmp_path)
    facts = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(facts | change))
    (folder / 'manifest.json').unlink()
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(folder.rename(tmp_path / 'model'))


@pytest.mark.parametrize('name, message', [
    ('config.json', 'config.json: not JSON'), ('tokenizer.json', 'cannot be used as a tokenizer'),
    ('model.safetensors', 'model: ')])
def test_damaged_files_are_named(tmp_path, name, message):
    """With a manifest by its checksum; without one when the file is read."""
    _, folder = save(tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f'{name} is truncated'):
        checkpoints.load_model(folder)
    (folder / 'manifest.json').unlink()
    with pytest.raises(ValueError, match='step_0000001: it is incomplete'):
        checkpoints.load_model(folder)
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(folder.rename(tmp_path / 'model'))


def test_the_newest_intact_step_wins(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    (tmp_path / 'step_0000010/model.safetensors').write_bytes(b'x')
    folder, problems = steps.newest(tmp_path)
    assert (folder.name == 'step_0000002'
            and problems == [(tmp_path / 'step_0000010', 'model.safetensors is truncated')])
    assert steps.newest(tmp_path / 'none') == (None, [])


def test_a_reader_of_weights_does_not_read_what_a_resume_needs(tmp_path):
    save(tmp_path, 1)
    _, folder = save(tmp_path, 2)
    steps.mark_best(tmp_path, 2, 1.0)
    saved = folder / 'training.pt'
    saved.write_bytes(saved.read_bytes()[:-1] + b'?')
    assert checkpoints.find(tmp_path) == checkpoints.find(folder) == folder
    (tmp_path / 'best.json').unlink()
    assert checkpoints.find(tmp_path) == folder
    assert steps.newest(tmp_path) == (
        tmp_path / 'step_0000001', [(folder, 'training.pt is damaged')])


def test_an_intact_step_is_left_as_it_is_and_a_damaged_one_replaced(tmp_path):
    _, folder = save(tmp_path)
    made = (folder / 'model.safetensors').stat().st_mtime_ns
    save(tmp_path)
    assert (folder / 'model.safetensors').stat().st_mtime_ns == made
    (folder / 'training.pt').write_bytes(b'')
    save(tmp_path)
    assert not steps.problem(folder) and checkpoints.load_training(folder) == {'step': 1}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_written_as_safetensors_writes_them(tmp_path, dtype):
    model, folder = save(tmp_path)[0].to(dtype), tmp_path / 'published'
    checkpoints.publish(folder, model, BYTES, {'README.md': ''})
    save_file(weights.to_hugging_face(model), tmp_path / 'expected', metadata={'format': 'pt'})
    assert (folder / 'model.safetensors').read_bytes() == (tmp_path / 'expected').read_bytes()
    assert not steps.problem(folder)                    # the sha256 that writing found is right


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoints.torch, 'save',
                        lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left')))
    with pytest.raises(OSError):
        save(tmp_path, 2)
    assert list(steps.all_steps(tmp_path)) == [1]
    assert not list(tmp_path.glob('.*.partial'))


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    steps.prune(tmp_path, keep=2, best=1)
    assert list(steps.all_steps(tmp_path)) == [1, 3, 4]


def test_a_pickled_payload_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')
    _, folder = save(tmp_path)
    (folder / 'training.pt').write_bytes(pickle.dumps(Payload()))
    with pytest.raises(Exception):
        checkpoints.load_training(folder)
    assert not (tmp_path / 'ran').exists()


# Settings of a model that transformers does not have.

@dataclass(frozen=True)
class Variant(GPTConfig):
    tied: bool = True


def test_a_setting_that_model_py_lacks_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model_config, 'GPTConfig', Variant)
        _, folder = save(tmp_path, config=Variant(**{**asdict(CONFIG), 'tied': False}))
        assert checkpoints.load_folder(folder).model.config.tied is False
    text = 'its model was built with tied=False, a setting that model.py does not have'
    with pytest.raises(ValueError, match=text):
        checkpoints.load_model(folder)


def test_a_variant_is_called_one_and_transformers_refuses_it(tmp_path, monkeypatch):
    transformers = pytest.importorskip('transformers')
    monkeypatch.setattr(model_config, 'GPTConfig', Variant)
    found = {}
    for step, tied in ((1, True), (2, False)):
        config = Variant(**{**asdict(CONFIG), 'tied': tied})
        found[tied] = save(tmp_path, step, config)[1]
        assert checkpoints.read_config(found[tied]) == config
    facts = {tied: json.loads((folder / 'config.json').read_text())
             for tied, folder in found.items()}
    assert facts[True]['model_type'] == 'gpt2' and facts[False]['model_type'] == 'gpt2-variant'
    assert facts[True]['architectures'] == ['GPT2LMHeadModel']
    assert facts[False]['gpt_config'] == {'tied': False}
    transformers.AutoModelForCausalLM.from_pretrained(found[True])
    with pytest.raises(ValueError, match='gpt2-variant'):
        transformers.AutoModelForCausalLM.from_pretrained(found[False])
    assert 'gpt_config' not in checkpoints.config_json(CONFIG, 0)


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
