"""
Model folders from outside, made on the spot with transformers, torch and safetensors: opened with
the same logits, or refused by name. And our folders in the programs of others.
"""

import json
import os
import socket
import time
from dataclasses import replace

import pytest
import torch
from conftest import command, script
from safetensors.torch import load_file, save_file
from torch import nn

import sample
import train
from gpt import checkpoints, model_config, tokenizer
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BYTES = tokenizer.byte_pairs('bytes', [])
SHAPE = dict(n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=257, bos_token_id=256,
             eos_token_id=256)
IDS = torch.arange(16)[None]


@pytest.fixture
def folder(tmp_path):
    """A function from changes of the config and of the tensors to a folder of transformers."""
    def make(config=None, tensors=None, **shape):
        torch.manual_seed(0)
        place = tmp_path / 'model'
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE | shape)).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        model.save_pretrained(place)
        (place / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
        edit_json(place / 'config.json', config or {})
        if tensors:
            found = load_file(place / 'model.safetensors')
            tensors(found)
            save_file(found, place / 'model.safetensors', metadata={'format': 'pt'})
        return place
    return make


def edit_json(file, changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def logits_of_transformers(place):
    """The logits, and what transformers says it did not use or made up; None, and why not."""
    try:
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, dtype=torch.float32)
    except Exception as error:
        return None, {type(error).__name__}
    with torch.no_grad():
        return model.eval()(IDS).logits, set().union(*map(set, map(map_str, said.values())))


def map_str(items):
    return [str(item) for item in items]


# Tensors and keys. Each change gives transformers' logits, or a refusal with these words.

def add(**tensors):
    return lambda found: found.update({name.replace('__', '.'): p for name, p in tensors.items()})


def change(name, edit):
    def tensors(found):
        found[f'transformer.{name}'] = edit(found[f'transformer.{name}'])
    return tensors


def rename(old, new):
    return lambda found: found.update({new: found.pop(old)})


def with_head(edit):
    return lambda found: found.update({'lm_head.weight': edit(found['transformer.wte.weight'])})


def bare(found):
    for name in list(found):
        found[name.removeprefix('transformer.')] = found.pop(name)


WTE = 'transformer.wte.weight'
USED_OR_HARMLESS = {
    'as it is': {},
    'without prefix': {'tensors': bare},
    'float16': {'tensors': lambda found: found.update({k: p.half() for k, p in found.items()})},
    'float64': {'tensors': lambda found: found.update({k: p.double() for k, p in found.items()})},
    'an equal head': {'tensors': with_head(torch.clone)},
    'only the head': {'tensors': rename(WTE, 'lm_head.weight')},
    'causal masks': {'tensors': add(transformer__h__0__attn__bias=torch.ones(1, 1, 16, 16).bool())},
    'masked bias': {'tensors': add(transformer__h__1__attn__masked_bias=torch.tensor(-1e4))},
    'cross-attention': {'add_cross_attention': True},
    'unused cross-attention': {'add_cross_attention': True,
                               'config': {'add_cross_attention': False}},
    'n_inner as usual': {'config': {'n_inner': 128}},
    'no activation': {'config': {'architectures': ['GPT2Model'], 'use_cache': False}},
    'reorder_and_upcast_attn': {'config': {'reorder_and_upcast_attn': True}},
    'dropout': {'config': {'resid_pdrop': 0.5, 'embd_pdrop': 0.5, 'attn_pdrop': 0.5}},
    'names of others': {'config': {'hidden_size': 32, 'num_hidden_layers': 2}},
    **{name: {'config': {'activation_function': name}} for name in model_config.ACTIVATIONS}}


@pytest.mark.parametrize('case', USED_OR_HARMLESS)
def test_what_opens_gives_the_logits_of_transformers(folder, case):
    place = folder(**USED_OR_HARMLESS[case])
    expected, said = logits_of_transformers(place)
    assert not said or case in ('masked bias', 'unused cross-attention'), said
    model, encoding = checkpoints.load_model(place)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-5, atol=1e-5)
    assert encoding.n_vocab == 257


def int8(p):
    return (p * 100).to(torch.int8)


REFUSED = {
    'another head': (dict(tensors=with_head(lambda p: p + 1)), 'lm_head.weight differs from wte'),
    'a head of other rows': (dict(tensors=with_head(lambda p: p[:200].clone())), 'lm_head.weight'),
    'an untied head': (dict(tie_word_embeddings=False), 'tie_word_embeddings is False'),
    'a bias of the head': (dict(tensors=add(lm_head__bias=torch.ones(257))), 'lm_head.bias'),
    'an adapter': (dict(tensors=add(**{'base_model.model.transformer.h.0.attn.c_attn.lora_A.weight':
                                       torch.ones(4, 32)})), 'lora_A.*adapters must be merged'),
    'a classifier': (dict(tensors=add(score__weight=torch.ones(2, 32))), 'score.weight'),
    'a value head': (dict(tensors=add(v_head__summary__weight=torch.ones(1, 32))), 'v_head'),
    'rotary positions': (dict(tensors=add(h__0__attn__rotary=torch.ones(4))), 'attn.rotary'),
    'fewer layers': (dict(config={'n_layer': 1}), 'n_layer=1; .* 2 layers, up to h.1'),
    'more layers': (dict(config={'n_layer': 3}), 'n_layer=3; .* 2 layers'),
    'a mask too many': (dict(tensors=add(h__2__attn__bias=torch.ones(1))),
                        'n_layer=2; .* up to h.2'),
    'two prefixes': (dict(tensors=add(wte__weight=torch.ones(257, 32))), 'wte.weight is there twi'),
    'one missing': (dict(tensors=lambda found: found.pop('transformer.ln_f.bias')), 'ln_f.bias'),
    'int8': (dict(tensors=change('h.0.mlp.c_fc.weight', int8)), 'h.0.mlp.c_fc.weight is of I8'),
    'int64': (dict(tensors=change('wpe.weight', torch.Tensor.long)), 'wpe.weight is of I64'),
    'bool': (dict(tensors=change('ln_f.weight', torch.Tensor.bool)), 'ln_f.weight is of BOOL'),
    'float8': (dict(tensors=change('wpe.weight', lambda p: p.to(torch.float8_e4m3fn))), 'is of F8'),
    'NaN': (dict(tensors=change('h.1.mlp.c_fc.bias', lambda p: p * torch.nan)), 'h.1.mlp.c_fc.bias '
            'is not finite in torch.float32, so the model gives NaN: its weights are damaged'),
    'infinity': (dict(tensors=change('wte.weight', lambda p: p / 0)), 'wte.weight is not finite'),
    'overflow': (dict(tensors=change('ln_f.weight', lambda p: p * 0 + 3e38)), 'model gives NaN'),
    'quantized': (dict(config={'quantization_config': {'bits': 8}}), 'quantization_config'),
    **{str(setting): (dict(config=setting), words) for setting, words in (
        ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx is True'),
        ({'scale_attn_weights': False}, 'scale_attn_weights is False'),
        ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon is 1e-06'),
        ({'n_inner': 64}, 'n_inner is 64'),
        ({'activation_function': 'relu'}, "activation_function is 'relu'"),
        ({'activation_function': None}, 'activation_function: given null'),
        ({'activation_function': ['gelu']}, 'activation_function: given'),
        ({'pruned_heads': {'0': [1]}}, 'pruned_heads'),
        ({'is_encoder_decoder': True}, 'is_encoder_decoder'),
        ({'auto_map': {'AutoModelForCausalLM': 'other.Model'}}, 'auto_map'),
        ({'per_layer_config': {'0': {}}}, 'per_layer_config'),
        ({'hidden_size': 64}, 'hidden_size is 64, expected 32'),
        ({'rope_theta': 10000}, "has 'rope_theta' .10000., which may change what the model"),
        ({'alibi': True}, "has 'alibi'"), ({'layer_norm_eps': 1e-6}, "has 'layer_norm_eps'"),
        ({'gpt_config': {'n_layer': 2}}, 'built with n_layer=2, a setting that'),
        ({'gpt_config': ['x']}, 'gpt_config: given'),
        ({'bias': 1}, 'bias: given 1, expected true or false'),
        *(({key: value}, f'{key}: given') for key in ('n_layer', 'n_head', 'n_embd', 'n_positions',
                                                  'vocab_size')
          for value in (0, -2, True, 10 ** 30, 2.0, '2', None, [2])),
        ({'n_layer': 10 ** 7}, 'n_layer=10000000; the files hold 2 layers'),
        ({'n_head': 3}, 'given 32, which must be a multiple of n_head=3'),
        ({'n_positions': 10 ** 7}, r'wpe.weight: the file holds \(16, 32\)'),
        ({'n_embd': 2 ** 20}, 'the file holds'), ({'vocab_size': 10 ** 7}, 'wte.weight: the'))}}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_not_this_gpt2_is_refused_in_one_line(folder, case):
    """Before memory for it is taken: a model of 10**7 layers or positions would not fit."""
    changes, words = REFUSED[case]
    place = folder(**changes)
    started = time.process_time()
    with pytest.raises(ValueError, match=words) as error:
        checkpoints.load_model(place)
    assert time.process_time() - started < 5
    assert str(place) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('changes', [
    {'tensors': with_head(lambda p: p + 1)}, {'config': {'n_layer': 1}},
    {'config': {'n_layer': 3}}, {'tensors': add(score__weight=torch.ones(2, 32))},
    {'tensors': lambda found: found.pop('transformer.ln_f.bias')},
    {'config': {'n_head': 3}}, {'config': {'vocab_size': 256}}])
def test_what_transformers_warns_of_is_refused(folder, changes):
    place = folder(**changes)
    logits, said = logits_of_transformers(place)
    assert said or changes == {'tensors': changes.get('tensors')}
    with pytest.raises(ValueError):
        checkpoints.load_model(place)


TASKS = {'text-generation': {'do_sample': True, 'max_length': 50}}
SUMMARY = dict(summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
               summary_type='cls_index', summary_use_proj=True)
OLD = dict(activation_function='gelu_new', architectures=['GPT2LMHeadModel'], attn_pdrop=0.1,
           bos_token_id=50256, embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02,
           layer_norm_epsilon=1e-05, model_type='gpt2', n_ctx=1024, resid_pdrop=0.1,
           vocab_size=50257, n_positions=1024, n_embd=768, n_head=12, n_layer=12, **SUMMARY)


@pytest.mark.parametrize('changes', [
    {'task_specific_params': TASKS},                                        # gpt2
    {'task_specific_params': TASKS, 'output_past': True, 'n_embd': 1600, 'n_head': 25,
     'n_layer': 48},                                                        # gpt2-xl
    {'task_specific_params': TASKS, '_num_labels': 1, 'id2label': {'0': 'LABEL_0'},
     'label2id': {'LABEL_0': 0}, 'n_layer': 6},                             # distilgpt2
    {'task_specific_params': {'conversational': {'max_length': 1000}}},     # DialoGPT
    {'_name_or_path': 'gpt2', 'gradient_checkpointing': False, 'torch_dtype': 'float32',
     'transformers_version': '4.11.0', 'use_cache': True, 'n_inner': None,
     'scale_attn_weights': True, 'reorder_and_upcast_attn': False, 'pad_token_id': 50256,
     'scale_attn_by_inverse_layer_idx': False, 'problem_type': None},       # fine-tunes of gpt2
    {'activation_function': 'gelu', 'n_inner': 3072}])                      # Cerebras-GPT
def test_configs_of_the_hub_are_known(tmp_path, changes):
    (tmp_path / 'config.json').write_text(json.dumps(OLD | changes))
    config = checkpoints.read_config(tmp_path)
    assert config.n_layer == changes.get('n_layer', 12) and config.vocab_size == 50257


def test_what_transformers_writes_is_known(tmp_path):
    """Every key, those of generation included."""
    config = transformers.GPT2Config(**SHAPE)
    written = config.to_dict() | transformers.GenerationConfig._get_default_generation_params()
    known = {*model_config.HARMLESS_KEYS, *model_config.FIXED_KEYS, 'n_inner',
             *model_config.HUGGING_FACE_KEYS.values()}
    assert not written.keys() - known


def test_activations_are_those_of_transformers(folder):
    place = folder(config={'activation_function': 'gelu'})
    exact = checkpoints.load_model(place).model
    edit_json(place / 'config.json', {'activation_function': 'gelu_new'})
    tanh = checkpoints.load_model(place).model
    assert (exact.config.activation, tanh.config.activation) == ('gelu', 'gelu_new')
    assert not torch.equal(exact(IDS), tanh(IDS))
    with pytest.raises(ValueError, match="activation: given 'relu', expected one of gelu_new, ge"):
        GPT(GPTConfig(activation='relu'))


# A run without biases, trained on elsewhere.

def test_biases_that_transformers_has_trained_are_kept(tmp_path):
    torch.manual_seed(0)
    config = GPTConfig(16, 257, 2, 4, 32, bias=False)
    place = checkpoints.save(tmp_path, 1, GPT(config), BYTES, {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place)
    theirs.save_pretrained(tmp_path / 'same')
    theirs(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(theirs.parameters(), lr=1.0).step()
    theirs.eval().save_pretrained(tmp_path / 'trained')
    for name, bias in (('same', False), ('trained', True)):
        (tmp_path / name / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
        assert json.loads((tmp_path / name / 'config.json').read_text())['bias'] is False
        model = checkpoints.load_model(tmp_path / name).model
        assert model.config == replace(config, bias=bias)
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_model_without_biases_in_its_file_is_one(folder):
    place = folder({'bias': False}, lambda found: [
        found.pop(name) for name in list(found) if name.endswith('bias')])
    assert checkpoints.load_model(place).model.config.bias is False
    edit_json(place / 'config.json', {'bias': True})
    with pytest.raises(ValueError, match='these weights are missing: h.0.ln_1.bias'):
        checkpoints.load_model(place)


# Damaged weights, where they are used.

@pytest.mark.parametrize('case', ['NaN', 'overflow'])
def test_nan_is_said_when_sampling_and_training(folder, stories, tmp_path, case):
    place = folder(**REFUSED[case][0])
    words = 'the model gives NaN: its weights are damaged'
    with pytest.raises(ValueError, match=words):
        command(sample, f'--model={place}', '-p', 'a', '--device=cpu')
    with pytest.raises(ValueError, match=words):
        command(train, f'--init_from={place}', f'--data_dir={stories}', '--dataset=tiny',
                f'--out_dir={tmp_path}/run', '--device=cpu', '--block_size=16')
    if case == 'NaN':
        done = script('sample.py', f'--model={place}', '-p', 'a', check=False)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_a_dtype_too_narrow_is_said(folder):
    place = folder(tensors=change('wpe.weight', lambda p: p * 1e6))
    assert checkpoints.load_model(place)
    with pytest.raises(ValueError, match='not finite in torch.float16.* another --dtype'):
        checkpoints.load_model(place, dtype=torch.float16)


# Files.

def not_plain(kind, path, tmp_path):
    """Put something else where a file is expected; its content, if any, is as it was."""
    outside = tmp_path / f'outside-{path.name}'
    path.rename(outside)
    if kind == 'fifo':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'socket':
        here = os.getcwd()
        os.chdir(path.parent)                           # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif kind == 'circle':
        path.symlink_to(path.name)
    else:
        path.symlink_to({'device': '/dev/zero', 'link': outside}[kind])


@pytest.mark.parametrize('kind', ['fifo', 'folder', 'socket', 'circle', 'device', 'link'])
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_only_plain_files_are_read(folder, tmp_path, name, kind):
    place = folder()
    not_plain(kind, place / name, tmp_path)
    with pytest.raises(ValueError, match=f'{name}: not a plain file, or a link'):
        checkpoints.load_folder(place)


@pytest.mark.parametrize('name', ['../x.safetensors', '/dev/zero', 'a/b', '', '..', 'fifo', 'none',
                                  'a\0b', 'C:\\x', 'x' * 300, 7, None, 'config.json'])
def test_an_index_names_plain_files_in_the_folder(folder, name):
    place = folder()
    (place / 'model.safetensors').unlink()
    os.mkfifo(place / 'fifo')
    (place.parent / 'x.safetensors').touch()
    (place / 'model.safetensors.index.json').write_text(
        json.dumps({'weight_map': {'transformer.wte.weight': name}}))
    with pytest.raises(ValueError, match=str(place)):
        checkpoints.load_model(place)


@pytest.mark.parametrize('name', ['../x', '/dev/zero', 'fifo', 'device', 'a/b', ''])
def test_a_manifest_names_plain_files_in_the_folder(tmp_path, name):
    place = checkpoints.save(tmp_path, 1, GPT(GPTConfig(16, 257, 1, 2, 8)), BYTES, {})
    os.mkfifo(place / 'fifo')
    (place / 'device').symlink_to('/dev/zero')
    edit_json(place / 'manifest.json', {name: {'bytes': 0, 'sha256': ''}})
    with pytest.raises(ValueError, match='expected the name of a file|not a plain file|a link th'):
        checkpoints.load_model(place)


@pytest.mark.parametrize('text', ['[]', '3', '[' * 200_000, '{"a": ', '\ud800', '9' * 5000])
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors.index.json', 'manifest.json'])
def test_json_of_another_kind_is_named(folder, name, text):
    place = folder()
    if 'index' in name:
        (place / 'model.safetensors').unlink()
    (place / name).write_bytes(text.encode(errors='surrogatepass'))
    with pytest.raises(ValueError, match=f'{name}(:|.* given|.* not) '):
        checkpoints.load_model(place)


def test_links_of_the_cache_of_the_hub_are_read(folder, tmp_path):
    place = folder()
    cache = tmp_path / 'models--a--b'
    blobs, snapshot = cache / 'blobs', cache / 'snapshots/0123'
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in place.iterdir():
        file.rename(blobs / f'{file.name}0')
        (snapshot / file.name).symlink_to(f'../../blobs/{file.name}0')
    assert checkpoints.load_model(snapshot)
    (tmp_path / 'link').symlink_to(snapshot)
    assert checkpoints.load_model(tmp_path / 'link')


@pytest.mark.parametrize('pattern, words', [('h.0.crossattention.x{}', ''),
                                            ('x{}', r"'x0', 'x1', 'x2', 'x3' \(30000 in all\)")])
def test_a_file_of_many_tensors_is_opened_once(folder, pattern, words):
    place = folder()
    file = place / 'model.safetensors'
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], 'little')
    header, end = json.loads(data[8:start]), len(data) - start
    for i in range(30_000):
        header[pattern.format(i)] = {'dtype': 'F32', 'shape': [1],
                                     'data_offsets': [end + 4 * i, end + 4 * i + 4]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, 'little') + text + data[start:] + bytes(120_000))
    started = time.process_time()
    if words:
        with pytest.raises(ValueError, match=words):
            checkpoints.load_model(place)
    else:
        assert checkpoints.load_model(place)
    assert time.process_time() - started < 20


def test_an_adapter_beside_the_weights_is_refused(folder):
    place = folder()
    (place / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match='holds an adapter .* merge it into the weights'):
        checkpoints.load_model(place)


# Names and tokenizers.

def test_a_name_of_the_hub_is_not_a_folder_here(folder, tmp_path, monkeypatch, capsys):
    folder().rename(tmp_path / 'gpt2')
    monkeypatch.chdir(tmp_path)
    assert checkpoints.load_model('./gpt2').encoding.n_vocab == 257
    assert not capsys.readouterr().err and not checkpoints.official_name('./gpt2')
    monkeypatch.setattr(checkpoints.hub, 'model_folder', lambda name, *_: f'hub:{name}')
    assert checkpoints.find('gpt2') == 'hub:gpt2'
    assert capsys.readouterr().err == 'gpt2: the model of the hub; ./gpt2 is the folder here\n'
    assert checkpoints.find('openai-community/gpt2') == 'hub:openai-community/gpt2'
    assert not capsys.readouterr().err


def test_special_tokens_without_rows_are_left_out(folder, capsys):
    place = folder()
    data = json.loads((place / 'tokenizer.json').read_text())
    data['added_tokens'] += [{**data['added_tokens'][0], 'id': 257, 'content': '[PAD]'}]
    (place / 'tokenizer.json').write_text(json.dumps(data))
    model, encoding = checkpoints.load_model(place)
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and '257 rows, none for [PAD]; left out' in said
    assert encoding.n_vocab == 257 == model.config.vocab_size
    assert tokenizer.fingerprint(encoding) == tokenizer.fingerprint(BYTES)


def test_gpt2_s_vocabulary_is_assumed_where_there_is_no_tokenizer(folder, gpt2, capsys):
    place = folder(vocab_size=50304, n_layer=1)
    (place / 'tokenizer.json').unlink()
    assert checkpoints.load_model(place).encoding.name == 'gpt2'
    assert capsys.readouterr().err.count("no tokenizer in this folder: GPT-2's is assumed") == 1
    (place / 'vocab.txt').touch()
    with pytest.raises(ValueError, match='only vocab.txt'):
        checkpoints.load_model(place)


# Pickles.

@pytest.mark.parametrize('shards', [1, 2])
@pytest.mark.parametrize('prefix', ['', 'transformer.', '_orig_mod.transformer.'])
def test_pytorch_model_bin_is_read(folder, shards, prefix):
    place = folder()
    expected = checkpoints.load_model(place).model(IDS)
    tensors = {name.replace('transformer.', prefix): p
               for name, p in load_file(place / 'model.safetensors').items()}
    (place / 'model.safetensors').unlink()
    if shards == 1:
        torch.save(tensors, place / 'pytorch_model.bin')
    else:
        names = {name: f'pytorch_model-{i % 2}.bin' for i, name in enumerate(tensors)}
        for file in set(names.values()):
            torch.save({name: p for name, p in tensors.items() if names[name] == file},
                       place / file)
        (place / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': names}))
    assert torch.equal(checkpoints.load_model(place).model(IDS), expected)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def pickled(place, content, **how):
    (place / 'model.safetensors').unlink(missing_ok=True)
    torch.save(content, place / 'pytorch_model.bin', **how)


def test_a_pickle_runs_nothing_and_holds_tensors_alone(folder, tmp_path):
    place = folder()
    tensors = load_file(place / 'model.safetensors')
    huge = tensors | {'transformer.wpe.weight': torch.zeros(1, 1).expand(2 ** 23, 32)}
    tests = {
        'cannot be read': Payload(tmp_path / 'ran'), 'not of tensors and plain': GPT(GPTConfig(
            n_layer=1, n_head=1, n_embd=8, vocab_size=9)),
        'given list, expected a dict': [1], 'expected weights': {**tensors, 'epoch': 3},
        'its tensors have': huge, 'is of int8': tensors | {
            'transformer.ln_f.bias': torch.ones(32, dtype=torch.int8)},
        'sparse': tensors | {'transformer.ln_f.bias': torch.ones(32).to_sparse()}}
    for words, content in tests.items():
        pickled(place, content)
        edit_json(place / 'config.json', {'n_positions': 2 ** 23 if content is huge else 16})
        with pytest.raises(ValueError, match=words):
            checkpoints.load_model(place)
    pickled(place, tensors, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match='of torch before 1.6'):
        checkpoints.load_model(place)
    assert not (tmp_path / 'ran').exists()


# nanoGPT.

class NanoBlock(nn.Module):
    """A block after the published architecture, for comparison: matrices of nn.Linear, exact
    GELU."""

    def __init__(self, C, heads, bias):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(C, 4 * C, bias), nn.Linear(4 * C, C, bias)

    def forward(self, x):
        B, T, C = x.shape
        heads = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                              # each (B, nh, T, hs)
        scores = q @ k.transpose(-1, -2) / k.size(-1) ** 0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(nn.GELU()(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias, dropout=0.0):
        super().__init__()
        self.transformer = nn.ModuleDict({
            'wte': nn.Embedding(vocab_size, n_embd), 'wpe': nn.Embedding(block_size, n_embd),
            'h': nn.ModuleList(NanoBlock(n_embd, n_head, bias) for _ in range(n_layer)),
            'ln_f': nn.LayerNorm(n_embd, bias=bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        t = self.transformer
        x = t.wte(ids) + t.wpe(torch.arange(ids.size(1)))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x))


def nanogpt(place, prefix='', args=None, **changes):
    """Write a run folder as nanoGPT does, and return its model."""
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, bias=True, vocab_size=257,
                 dropout=0.2) | changes
    model = NanoGPT(**shape).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    optimizer = torch.optim.AdamW(model.parameters())
    place.mkdir(exist_ok=True)
    torch.save({'model': {prefix + name: p for name, p in model.state_dict().items()},
                'optimizer': optimizer.state_dict(), 'model_args': shape | (args or {}),
                'iter_num': 9, 'best_val_loss': torch.tensor(1.5),
                'config': {'dataset': 'shakespeare_char', 'compile': True}}, place / 'ckpt.pt')
    return model


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_a_checkpoint_of_nanogpt_gives_its_logits(tmp_path, bias, prefix):
    theirs = nanogpt(tmp_path, prefix, bias=bias)
    with pytest.raises(ValueError, match='no tokenizer.json, .* meta.pkl is a pickle and not read'):
        checkpoints.load_model(tmp_path)
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
    for name in (tmp_path, tmp_path / 'ckpt.pt', str(tmp_path)):
        model, _ = checkpoints.load_model(name)
        torch.testing.assert_close(model(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)
    assert model.config == GPTConfig(16, 257, 2, 4, 32, bias=bias, activation='gelu')
    again = checkpoints.save(tmp_path / 'run', 1, model, BYTES, {})
    torch.testing.assert_close(logits_of_transformers(again)[0], theirs(IDS), rtol=1e-5, atol=1e-5)


def test_the_padded_rows_of_nanogpt_mean_gpt2_s_vocabulary(tmp_path, gpt2, capsys):
    theirs = nanogpt(tmp_path, vocab_size=50304, bias=False)
    model, encoding = checkpoints.load_model(tmp_path)
    assert encoding.name == 'gpt2' and model.config.vocab_size == 50257
    torch.testing.assert_close(model(IDS), theirs(IDS)[..., :50257], rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().err.count('\n') == 1


def test_a_run_starts_from_nanogpt_and_is_sampled(tmp_path, stories, capsys):
    """With its characters, whose file prepare.py writes: the same text, the same ids."""
    place, out = tmp_path / 'nano', tmp_path / 'run'
    place.mkdir()
    text = (stories / 'tiny/tokenizer.json').read_text()
    (place / 'tokenizer.json').write_text(text)
    nanogpt(place, vocab_size=tokenizer.load(place / 'tokenizer.json').n_vocab)
    command(train, f'--init_from={place}', f'--data_dir={stories}', '--dataset=tiny',
            f'--out_dir={out}', '--block_size=16', '--max_iters=2', '--batch_size=2',
            '--device=cpu', '--compile=False', '--dtype=float32', '--eval_tokens=100')
    config = json.loads((out / 'step_0000002/config.json').read_text())
    assert config['activation_function'] == 'gelu' and config['model_type'] == 'gpt2'
    capsys.readouterr()
    command(sample, f'--model={out}', '-p', 'The', '-m', '5', '--device=cpu')
    assert capsys.readouterr().out.startswith('The')


@pytest.mark.parametrize('args, words', [
    ({'rotary': True}, "model_args has 'rotary'"), ({'n_layer': 1}, 'n_layer=1; .* 2 layers'),
    ({'n_layer': 10 ** 9}, 'n_layer: given 1,000,000,000, expected at most'),
    ({'vocab_size': None}, 'vocab_size: given null'), ({'bias': 0}, 'bias: given 0'),
    ({'n_head': 5}, 'model_args: n_embd: given 32, which must be a multiple of n_head=5')])
def test_another_model_in_a_folder_of_nanogpt_is_refused(tmp_path, args, words):
    nanogpt(tmp_path, args=args)
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
    with pytest.raises(ValueError, match=words):
        checkpoints.load_model(tmp_path)


def test_what_is_no_checkpoint_of_nanogpt_is_refused(tmp_path):
    for content in ({}, {'model_args': {}}, {'model_args': 3}, [1], {'model': {}}):
        torch.save(content, tmp_path / 'ckpt.pt')
        with pytest.raises(ValueError, match='ckpt.pt'):
            checkpoints.load_model(tmp_path)


# Our folders, in other programs.

@pytest.fixture(scope='module')
def ours(stories, tmp_path_factory):
    """A step of a short run."""
    out = tmp_path_factory.mktemp('ours') / 'run'
    command(train, f'--data_dir={stories}', '--dataset=tiny', f'--out_dir={out}', '--n_layer=2',
            '--n_head=2', '--n_embd=32', '--block_size=32', '--max_iters=80', '--batch_size=8',
            '--learning_rate=3e-3', '--warmup_iters=0', '--device=cpu', '--compile=False',
            '--dtype=float32', '--eval_tokens=100')
    return out / 'step_0000080'


PROMPT = 'A student counted'


def greedy(place, n=12):
    """The text that our model continues PROMPT with."""
    model, encoding = checkpoints.load_model(place)
    ids = torch.tensor([tokenizer.encode(encoding, PROMPT).tolist()])
    return encoding.decode(model.generate(ids, n, temperature=0)[0].tolist())


def test_transformers_opens_our_model_tokenizer_and_pipeline(ours):
    pipe = transformers.pipeline('text-generation', model=str(ours), device='cpu')
    text = pipe(PROMPT, max_new_tokens=12, do_sample=False)[0]['generated_text']
    assert text == greedy(ours)
    assert pipe.tokenizer.unk_token == pipe.tokenizer.eos_token == '<|endoftext|>'


def test_ctranslate2_converts_our_model_and_writes_the_same_text(ours, tmp_path):
    ctranslate2 = pytest.importorskip('ctranslate2', reason='pip install ctranslate2')
    made = ctranslate2.converters.TransformersConverter(str(ours)).convert(str(tmp_path / 'ct2'))
    own = transformers.AutoTokenizer.from_pretrained(ours)
    start = own.convert_ids_to_tokens(own.encode(PROMPT))
    found = ctranslate2.Generator(made, device='cpu').generate_batch(
        [start], max_length=len(start) - 1 + 12, sampling_topk=1)
    assert own.decode(found[0].sequences_ids[0]) == greedy(ours)


def test_a_finer_head_is_not_the_embedding(folder):
    """Rounded to the dtype of the embedding it would be equal; transformers computes with it."""
    place = folder(tensors=lambda found: found.update({
        'lm_head.weight': found['transformer.wte.weight'].clone(),
        'transformer.wte.weight': found['transformer.wte.weight'].bfloat16()}))
    with pytest.raises(ValueError, match='lm_head.weight differs from wte.weight'):
        checkpoints.load_model(place)


def test_a_flipped_byte_in_a_pickle_is_found(tmp_path):
    nanogpt(tmp_path)
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
    raw = bytearray((tmp_path / 'ckpt.pt').read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / 'ckpt.pt').write_bytes(raw)
    with pytest.raises(ValueError, match='checksum of .* is another'):
        checkpoints.load_model(tmp_path)


def test_a_header_with_more_fields_is_read_and_nested_tensors_are_refused(folder):
    place = folder()
    file = place / 'model.safetensors'
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8:8 + size])
    for entry in header.values():
        if 'dtype' in entry:
            entry['comment'] = 'x'
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, 'little') + text + raw[8 + size:])
    before = logits_of_transformers(place)[0]
    torch.testing.assert_close(checkpoints.load_model(place).model(IDS), before, rtol=1e-5,
                               atol=1e-5)
    file.unlink()
    torch.save({'x': torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
               place / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='expected weights'):
        checkpoints.load_model(place)
