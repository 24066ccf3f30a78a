"""
Text from a trained GPT.

    python sample.py                                # from nothing, by the newest run under out/
    python sample.py -p "The import statement" -m 200
    python sample.py -p FILE:prompt.txt --model=out/pydocs --temperature=0
    echo "To be" | python sample.py -p - --model=gpt2 --num_samples=3
"""

import codecs
import sys
from pathlib import Path

import torch

import checkpoints
import tokenizer
from configurator import run, settings
from distributed import pick_device
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
prompt = ''             # also -p; FILE:name.txt reads a file, - reads standard input;
                        # '': from <|endoftext|>
max_new_tokens = 100    # also -m
model = ''              # a run's folder, one of its steps, a Hugging Face folder or name, 'gpt2';
                        # '': the newest checkpoint under out/, else checkpoint/, else untrained
num_samples = 1
temperature = 0.8       # 0 always takes the likeliest token, 1 samples as the model predicts
top_k = 200             # sample among so many likeliest tokens, 0: all
top_p = 1.0             # sample among the likeliest that together have this probability
seed = 1337             # sample k is drawn with seed + k
device = 'auto'
# -----------------------------------------------------------------------------
Config = settings(globals())

SHORT = {'-p': 'prompt', '-m': 'max_new_tokens'}


def main(cfg):
    check(cfg)
    device = pick_device(cfg.device)
    gpt, encoding, where = load(cfg.model)
    print(f'model: {where}', file=sys.stderr)
    gpt.to(device).eval()
    ids = prompt_ids(read_prompt(cfg.prompt), encoding, gpt.config.block_size)
    for k in range(cfg.num_samples):
        if cfg.num_samples > 1:
            print(f'--- sample {k + 1}', flush=True)
        print(encoding.decode(ids) if cfg.prompt else '', end='', flush=True)
        generator = torch.Generator(device).manual_seed(cfg.seed + k)
        new_ids = gpt.stream(torch.tensor([ids], device=device), cfg.max_new_tokens,
                             temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                             generator=generator)
        for text in as_text(new_ids, encoding):
            print(text, end='', flush=True)
        print(flush=True)


def check(cfg):
    for key, right, expected in (
            ('temperature', cfg.temperature >= 0, '0 or more'),
            ('top_k', cfg.top_k >= 0, '0 or more'),
            ('top_p', 0 < cfg.top_p <= 1, 'more than 0, at most 1'),
            ('num_samples', cfg.num_samples >= 1, '1 or more'),
            ('max_new_tokens', cfg.max_new_tokens >= 0, '0 or more')):
        if not right:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected {expected}')


def load(name):
    """(model, encoding, where they come from)."""
    folder = checkpoints.find(name) if name else checkpoints.newest_of_all()
    if folder:
        return *checkpoints.load_model(folder), folder
    torch.manual_seed(0)
    encoding = tokenizer.byte_pairs('bytes', [])
    config = GPTConfig(block_size=256, vocab_size=encoding.n_vocab, n_layer=2, n_head=2, n_embd=64)
    where = ('untrained, since there is no checkpoint under out/: '
             'expect noise (`make quickstart` trains one)')
    return GPT(config), encoding, where


def read_prompt(prompt):
    raw = prompt.encode('utf-8', 'surrogateescape')
    if prompt == '-':
        raw = sys.stdin.buffer.read()
    elif prompt.startswith('FILE:'):
        raw = Path(prompt[5:]).read_bytes()
    try:
        return raw.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'prompt: not UTF-8 ({error.reason} at byte {error.start})') from None


def prompt_ids(text, encoding, block_size):
    """The prompt as ids; an empty one is <|endoftext|>, after which a document begins."""
    eot = tokenizer.eot_id(encoding)
    ids = tokenizer.encode(encoding, text).tolist() or [0 if eot is None else eot]
    if len(ids) > block_size:
        raise ValueError(f'prompt: given {len(ids):,} tokens, expected at most {block_size:,}, '
                         f'the block of this model; shorten it')
    return ids


def as_text(new_ids, encoding):
    """Pieces of text of an iterator of ids (1,), each ending in a whole character;
    <|endoftext|> ends it."""
    decode = codecs.getincrementaldecoder('utf-8')('replace').decode
    eot = tokenizer.eot_id(encoding)
    for next_id in new_ids:
        if next_id.item() == eot:
            break
        yield decode(encoding.decode_single_token_bytes(next_id.item()))
    yield decode(b'', final=True)


if __name__ == '__main__':
    run(main, Config, short=SHORT)
