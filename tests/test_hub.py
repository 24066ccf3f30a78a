"""
The hub's own client against a hub on the loopback address, with models that transformers made.

The client reads its environment when it is imported: it runs in processes of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script
from loopback_hub import serving

from gpt import tokenizer
from gpt.hub import check_reachable

transformers = pytest.importorskip('transformers')
pytest.importorskip('huggingface_hub')

BYTES = tokenizer.byte_pairs('bytes', [])
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=257)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """(the folder that the hub serves, {repository: transformers' model})."""
    from safetensors.torch import save_file
    root, made = tmp_path_factory.mktemp('hub'), {}
    for seed, repo in enumerate(('someone/one', 'someone/shards', 'openai-community/gpt2',
                                 'someone/private', 'someone/pickle', 'someone/llama',
                                 'someone/large', 'someone/pair', 'someone/old')):
        torch.manual_seed(seed)
        shape = SHAPE | ({'n_embd': 640} if 'large' in repo else {})    # 40 MB: read by 10 MB
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
        folder = root / repo
        model.save_pretrained(folder, max_shard_size='60KB' if 'shards' in repo else '5GB')
        (folder / 'tokenizer.json').write_text(tokenizer.to_json(BYTES))
        made[repo] = model
    bare = {name.removeprefix('transformer.'): p.contiguous()       # as OpenAI's files are
            for name, p in made['openai-community/gpt2'].state_dict().items() if 'lm_' not in name}
    for i in range(2):
        bare[f'h.{i}.attn.bias'] = torch.ones(1, 1, 32, 32).tril()
    save_file(bare, root / 'openai-community/gpt2/model.safetensors')
    (root / 'someone/pickle/model.safetensors').rename(root / 'someone/pickle/pytorch_model.bin')
    old = root / 'someone/old'                                      # of transformers 4
    torch.save(made['someone/old'].state_dict(), old / 'pytorch_model.bin')
    (old / 'model.safetensors').unlink()
    outside = root / 'someone/outside'
    shutil.copytree(old, outside)
    (outside / 'pytorch_model.bin').rename(outside / 'pytorch_model.bin.index.json')
    (outside / 'pytorch_model.bin.index.json').write_text(
        json.dumps({'weight_map': {'wte.weight': '../../one/model.safetensors'}}))
    words = root / 'someone/words'                                  # BERT's vocabulary
    shutil.copytree(old, words)
    (words / 'tokenizer.json').rename(words / 'vocab.txt')
    pair = root / 'someone/pair'                                    # GPT-2's older tokenizer files
    vocab = json.loads((pair / 'tokenizer.json').read_text())['model']['vocab']
    (pair / 'vocab.json').write_text(json.dumps(vocab | {tokenizer.EOT: 256}))
    (pair / 'merges.txt').write_text('#version: 0.2\n')
    (pair / 'tokenizer.json').unlink()
    config = root / 'someone/llama/config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | {'model_type': 'llama'}))
    return root, made


@pytest.fixture
def hub(models, tmp_path):
    with serving(models[0], tmp_path / 'home') as server:
        yield server


LOAD = '''
import json
import sys
import time
import torch
from gpt import checkpoints
time.sleep = lambda seconds: None           # the client waits half a minute between its trials
found = {}
for name in sys.argv[1:]:
    try:
        model, encoding = checkpoints.load_model(name)
        found[name] = [model(torch.arange(9)[None])[0, -1].tolist(), encoding.n_vocab]
    except ValueError as error:
        found[name] = str(error)
print(json.dumps(found), 'transformers' in sys.modules)
'''


def load(hub, *names, **env):
    """{name: its logits after 0 … 8, or the error} as a new process finds them."""
    done = subprocess.run([sys.executable, '-c', LOAD, *names], cwd=ROOT, env={**hub.env, **env},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, imported = done.stdout.rsplit(maxsplit=1)
    assert imported == 'False', 'transformers was imported'
    return json.loads(found)


def check(model, found):
    assert isinstance(found, list), found
    logits, vocab_size = found
    expected = model(torch.arange(9)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-5)
    assert vocab_size == 257


def test_models_of_the_hub_are_those_of_transformers_and_are_cached(hub, models):
    """One file, shards with an index, OpenAI's names with masks, a file of torch.save(); then
    again, without requests."""
    names = {'someone/one': 'someone/one', 'someone/shards': 'someone/shards',
             'someone/old': 'someone/old', 'gpt2': 'openai-community/gpt2',
             'someone/pair': 'someone/pair'}
    first = load(hub, *names)
    gets = [path for method, path, _ in hub.requests if method == 'GET'
            and ('safetensors' in path or '.bin' in path)]
    assert len(gets) == len(set(gets)) > 4, 'something was downloaded twice'
    hub.requests.clear()
    again = load(hub, *names)
    assert not any('/resolve/' in path for _, path, _ in hub.requests), 'the cache was not used'
    for name, repo in names.items():
        check(models[1][repo], first[name])
        assert again[name] == first[name]


def test_the_vocabulary_of_gpt2_comes_from_a_mirror_and_is_verified(gpt2, tmp_path):
    repo = tmp_path / 'hub/openai-community/gpt2'
    repo.mkdir(parents=True)
    text = tokenizer.to_json(gpt2)
    (repo / 'tokenizer.json').write_text(text)
    code = ('from gpt import tokenizer; enc = tokenizer.gpt2()\n'
            'print(enc.name, enc.encode("Hello, I am"))')
    with serving(tmp_path / 'hub', tmp_path / 'home') as hub:
        env = {**hub.env, 'HTTPS_PROXY': 'http://127.0.0.1:9', 'TIKTOKEN_CACHE_DIR': str(tmp_path)}
        for printed, altered in (('gpt2 [15496, 11, 314, 716]', text),
                               ('', text.replace('Ġdark', 'Ġbark!'))):
            (repo / 'tokenizer.json').write_text(altered)
            done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True,
                                  env={**env, 'HF_HOME': str(tmp_path / str(len(printed)))},
                                  capture_output=True)
            assert done.stdout.strip() == printed, done.stderr
            assert bool(printed) or 'name a mirror of the hub' in done.stderr


def test_a_mirror_that_cannot_be_reached_is_not_waited_for(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith('_proxy')}
    env |= {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': '0', 'HF_HOME': str(tmp_path),
            'TIKTOKEN_CACHE_DIR': str(tmp_path)}
    code = ('import time, tiktoken.load; from gpt import tokenizer; start = time.monotonic()\n'
            'tiktoken.load.read_file = None                         # not over the network\n'
            'try: tokenizer.gpt2()\n'
            'except ValueError as error: print(error, time.monotonic() - start, sep="\\n")')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, env=env,
                          capture_output=True)
    words, seconds = done.stdout.splitlines()
    assert 'name a mirror of the hub' in words and float(seconds) < 5


@pytest.mark.slow
def test_weights_cached_without_their_tokenizer_get_it_from_the_hub(hub, models):
    """As transformers' from_pretrained() leaves them. GPT-2's own would be wrong."""
    code = """
from huggingface_hub import hf_hub_download
for name in ('config.json', 'model.safetensors'):
    hf_hub_download('someone/one', name)
"""
    subprocess.run([sys.executable, '-c', code], env=hub.env, check=True, capture_output=True)
    found = load(hub, 'someone/one', HF_HUB_OFFLINE='1')['someone/one']
    assert 'not (completely) in the cache' in found
    check(models[1]['someone/one'], load(hub, 'someone/one')['someone/one'])


@pytest.mark.parametrize('repo, files', [
    ('someone/pair', 'config.json model.safetensors vocab.json merges.txt'),
    ('someone/old', 'config.json pytorch_model.bin tokenizer.json')])
def test_what_others_cached_is_enough_offline(hub, models, repo, files):
    """As transformers 4 left it: nothing is known of the files that it did not ask for."""
    code = """
import sys
from huggingface_hub import hf_hub_download
for name in sys.argv[2:]:
    hf_hub_download(sys.argv[1], name)
"""
    subprocess.run([sys.executable, '-c', code, repo, *files.split()], env=hub.env, check=True,
                   capture_output=True)
    for env in ({'HF_HUB_OFFLINE': '1'}, {'HF_ENDPOINT': 'http://127.0.0.1:9'}):
        check(models[1][repo], load(hub, repo, **env)[repo])
    weights = next(Path(hub.env['HF_HOME']).glob(f'hub/models--*{repo[-3:]}*/snapshots/*/*model*'))
    weights.unlink()
    assert 'not (completely) in the cache' in load(hub, repo, HF_HUB_OFFLINE='1')[repo]


def test_every_refusal_says_what_to_do(hub):
    found = load(hub, 'someone/gated', 'someone/private', 'someone/nothing', 'openai/gpt-2',
                 'gpt-2', 'someone/pickle', 'someone/llama', 'someone/broken', 'not a name',
                 './nowhere', 'tests/nowhere', 'someone/outside', 'someone/words')
    for name, message in {
            'someone/gated': r'hub:someone/gated is gated: accept the terms on its page.*HF_TOKEN',
            'someone/private': r'or it is private \(then set HF_TOKEN\)$',
            'someone/nothing': r'not found at http://127',
            'openai/gpt-2': 'Did you mean gpt2\\?', 'gpt-2': 'Did you mean gpt2\\?',
            'someone/pickle': 'pytorch_model.bin: cannot be read: damaged, of torch before 1.6',
            'someone/outside': "given '../../one/model.safetensors', expected the name",
            'someone/words': r'no tokenizer.json.*\(only vocab.txt\)',
            'someone/llama': 'not a GPT-2 that this program can run: model_type is',
            'someone/broken': r'cannot be reached|could not be downloaded',
            'not a name': "no such folder 'not a name'; hub:.* not found at",
            './nowhere': 'no such folder$',
            'tests/nowhere': 'no such folder$'}.items():
        assert isinstance(found[name], str) and re.search(message, found[name]), found[name]
        assert found[name].count('\n') == 0
    assert not any(method == 'GET' and 'llama' in path and 'safetensors' in path
                   for method, path, _ in hub.requests), 'useless weights were downloaded'


@pytest.mark.slow
def test_a_token_opens_a_private_model(hub, models):
    check(models[1]['someone/private'],
          load(hub, 'someone/private', HF_TOKEN='secret')['someone/private'])


def test_a_hub_that_cannot_be_reached_is_named(hub):
    found = load(hub, 'gpt2', HF_HUB_OFFLINE='1')['gpt2']
    assert re.search("no such folder 'gpt2'; hub:gpt2: not .completely. in the cache .*HF_HUB_"
                     'OFFLINE is set.* give a folder that holds config.json, model.safetens', found)
    found = load(hub, 'gpt2', 'not a name', HF_ENDPOINT='http://127.0.0.1:9')
    assert 'not found at' in found['not a name']
    assert re.search('http://127.0.0.1:9 cannot be reached .*name a mirror in HF_ENDPOINT, or '
                     'give a folder that holds config.json, model.safetensors and', found['gpt2'])


@pytest.mark.slow
def test_a_download_that_breaks_off_resumes_where_it_was(hub, models):
    hub.break_off = 2
    check(models[1]['someone/large'], load(hub, 'someone/large')['someone/large'])
    ranges = [given for method, path, given in hub.requests
              if method == 'GET' and 'safetensors' in path]
    assert ranges == [None, 'bytes=10485760-', 'bytes=20971520-']


@pytest.mark.slow
def test_a_download_that_is_killed_leaves_nothing_that_looks_complete(hub, models):
    hub.stall = True
    process = subprocess.Popen([sys.executable, '-c', LOAD, 'someone/one'], cwd=ROOT, env=hub.env)
    deadline = time.monotonic() + 300
    while not any('safetensors' in path and method == 'GET' for method, path, _ in hub.requests):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.stall, hub.break_off = False, 0
    found = load(hub, 'someone/one', HF_HUB_OFFLINE='1')['someone/one']
    assert 'not (completely) in the cache' in found
    check(models[1]['someone/one'], load(hub, 'someone/one')['someone/one'])


@pytest.mark.slow
def test_fine_tuning_from_download_to_sample(hub, tmp_path):
    """The README's path on a small model: prepare, fine-tune from the hub with a shorter block,
    resume, sample; the last two offline."""
    text, data = tmp_path / 'verse.txt', tmp_path / 'data'
    text.write_text('To be, or not to be, that is the question.\n' * 60)
    script('data/prepare.py', f'--data_dir={data}', '--tokenizer=bytes', text, env=hub.env)
    command = ['train.py', 'config/finetune.py', '--init_from=gpt2', '--dataset=verse',
               f'--data_dir={data}', f'--out_dir={tmp_path}/run', '--block_size=16',
               '--batch_size=4', '--total_batch_size=64', '--device=cpu', '--learning_rate=3e-3',
               '--warmup_iters=0']
    first = script(*command, '--max_iters=10', env=hub.env).stdout
    assert 'new run in' in first and 'block_size 16 (up to --block_size=32' in first
    again = script(*command, '--max_iters=40', env={**hub.env, 'HF_HUB_OFFLINE': '1'}).stdout
    assert 'resuming from' in again
    losses = [float(loss) for loss in re.findall(r'val_loss (\d+\.\d+)', first + again)]
    assert losses[0] > 5 and losses[-1] < 3
    assert f'--model={tmp_path}/run` samples from it' in again and 'best val_loss' in again
    done = script('sample.py', f'--model={tmp_path}/run', '-p', 'To be', '-m', '60',
                  '--temperature=0', '--device=cpu', env={**hub.env, 'HF_HUB_OFFLINE': '1'})
    assert done.stdout.startswith('To be') and len(done.stdout) > 60


@pytest.mark.parametrize('env, is_refused', [
    ({}, True), ({'https_proxy': 'http://127.0.0.1:9'}, False), ({'no_proxy': 'a.org'}, True)])
def test_a_hub_is_tried_once_before_its_client_tries_for_long(monkeypatch, env, is_refused):
    """Through a proxy its host need not be reachable from here."""
    from huggingface_hub import constants
    for name in [name for name in os.environ if name.lower().endswith('_proxy')]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    if is_refused:
        with pytest.raises(ConnectionError, match='http://127.0.0.1:9: .*refused'):
            check_reachable()
    else:
        check_reachable()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    check_reachable()
