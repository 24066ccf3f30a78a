"""
Text from a trained GPT.

    python sample.py                                # from nothing, by the newest run under out/
    python sample.py -p "The import statement" -m 200
    python sample.py -p FILE:prompt.txt --model=out/pydocs --temperature=0
    echo "To be" | python sample.py -p - --model=gpt2 --num_samples=3
    python sample.py -i                             # asks for one prompt after another
    python sample.py -p "To be or not" -m 5 --explain
"""

import codecs
import sys
import time
from contextlib import suppress
from dataclasses import replace
from json import dumps
from pathlib import Path
from random import randrange

import torch

from gpt import checkpoints
from gpt import tokenizer
from gpt.settings import run, settings
from gpt.world import pick_device, pick_dtype
from gpt.cpu import pack
from gpt.generate import slide, stream
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
prompt = ''             # also -p; FILE:name.txt reads a file, - standard input, less the newline
                        # that ends it; '': from <|endoftext|>, which may also begin a prompt
max_new_tokens = 100    # also -m
model = ''              # a run's folder (its best step), a step, a Hugging Face folder, gpt2 to
                        # gpt2-xl, another GPT-2 on the hub; '': the newest run under out/, else
                        # checkpoint/, else an untrained one
num_samples = 1
temperature = 0.8       # 0 always takes the likeliest token, 1 samples as the model predicts
top_k = 200             # sample among so many likeliest tokens, 0: all
top_p = 1.0             # sample among the likeliest that together have this probability
seed = 1337             # sample k is drawn with seed + k; -1: another one each time
stop = ''               # text that ends a sample, as <|endoftext|> does, and is not shown: '\n\n'
interactive = False     # also -i; ask for prompts, one after another
explain = False         # under each sample: every token's probability, rank and alternatives
json = False            # a line of JSON for each sample instead of text
batch_size = 8          # samples drawn at once
device = 'auto'         # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'auto'          # 'float32': a sample is the same alone and in a batch; 'bfloat16',
                        # 'float16'; auto: bfloat16 where native, but float32 for --explain
# -----------------------------------------------------------------------------
Config = settings(globals())

SHORT = {'-p': 'prompt', '-m': 'max_new_tokens', '-i': 'interactive',
         '--start': 'prompt', '--out_dir': 'model'}     # nanoGPT's names


def main(cfg):
    check(cfg)
    device = pick_device(cfg.device)
    dtype, _ = pick_dtype('float32' if cfg.explain and cfg.dtype == 'auto' else cfg.dtype, device)
    text = read_prompt(cfg.prompt)
    gpt, encoding, where = load(cfg.model, device, dtype)
    cfg = replace(cfg, seed=randrange(2 ** 31) if cfg.seed == -1 else cfg.seed,
                  stop=cfg.stop.replace('\\n', '\n').replace('\\t', '\t'))
    print(f'model: {where}; seed {cfg.seed}', file=sys.stderr)
    if dtype == torch.float32 or min(cfg.num_samples, cfg.batch_size) > 1:
        pack(gpt)                                       # one row in bfloat16 is faster as it is
    if cfg.interactive:
        return converse(cfg, gpt, encoding, text)
    write(cfg, gpt, encoding, text, prompt_ids(text, encoding))


def check(cfg):
    for key, right, expected in (
            ('temperature', cfg.temperature >= 0, '0 or more'),
            ('top_k', cfg.top_k >= 0, '0 or more'),
            ('top_p', 0 < cfg.top_p <= 1, 'more than 0, at most 1'),
            ('num_samples', cfg.num_samples >= 1, '1 or more'),
            ('batch_size', cfg.batch_size >= 1, '1 or more'),
            ('max_new_tokens', cfg.max_new_tokens >= 0, '0 or more'),
            ('seed', -1 <= cfg.seed < 2 ** 62, '-1 or more'),
            ('prompt', not (cfg.interactive and cfg.prompt == '-'), 'not - with -i')):
        if not right:
            raise ValueError(f'{key}: given {getattr(cfg, key)}, expected {expected}')


def load(name, device, dtype):
    """(model, encoding, where they come from)."""
    name = name or checkpoints.newest_of_all()
    if name:
        folder = checkpoints.find(name)
        return *checkpoints.load_folder(folder, device, dtype=dtype), folder
    torch.manual_seed(0)
    encoding = tokenizer.byte_pairs('bytes', [])
    config = GPTConfig(block_size=256, vocab_size=encoding.n_vocab, n_layer=2, n_head=2, n_embd=64)
    where = ('untrained, since there is no checkpoint under out/: '
             'expect noise (`make quickstart` trains one)')
    return GPT(config).to(device, dtype).eval(), encoding, where


def read_prompt(prompt):
    try:
        if prompt == '-':
            return sys.stdin.buffer.read().decode('utf-8').removesuffix('\n')
        if prompt.startswith('FILE:'):
            return Path(prompt[5:]).read_bytes().decode('utf-8').removesuffix('\n')
        return prompt.encode('utf-8', 'surrogateescape').decode('utf-8')
    except UnicodeDecodeError as error:
        raise ValueError(f'prompt: not UTF-8 ({error.reason} at byte {error.start})') from None


def converse(cfg, gpt, encoding, text):
    """One prompt after another from the terminal, until its end."""
    with suppress(ImportError):
        import readline                                 # arrow keys, where there are any # noqa
    print('A prompt and Enter; Enter alone goes on with the text; Ctrl-C interrupts it, '
          'Ctrl-D ends.', file=sys.stderr)
    ids, is_terminal = prompt_ids(text, encoding), sys.stdin.isatty()
    while True:
        try:
            if line := input('> ' if is_terminal else ''):
                text, ids = line, prompt_ids(line, encoding)
            text, ids = write(cfg, gpt, encoding, text, ids)
            cfg = replace(cfg, seed=cfg.seed + cfg.num_samples)         # or it would repeat itself
        except EOFError:
            return print(end='\n' if is_terminal else '')
        except ValueError as error:                     # a character the model does not know
            print(error, file=sys.stderr)


def write(cfg, gpt, encoding, text, ids):
    """Print the samples that continue `text`, of which the ids are `ids`, and on stderr how fast.

    (text, ids) of the last sample, from its beginning; in a conversation Ctrl-C ends it early.
    """
    start, eot = window(0, len(ids), gpt), tokenizer.eot_id(encoding)
    if start:
        print(f'the prompt has {len(ids):,} tokens, the block {gpt.config.block_size:,}: the model '
              f'reads the last {len(ids) - start:,}', file=sys.stderr)
    seconds, count, whole, drawn, stopped = [], 0, text, [], False  # seconds: of each row of tokens
    for k, new_ids in enumerate(draw(cfg, gpt, encoding, ids, seconds)):
        if not cfg.json:
            title = f'--- sample {k + 1}\n' if cfg.num_samples > 1 else ''
            print(title + text, end='', flush=True)
        whole, drawn = text, []
        try:
            for piece in until(cfg.stop, as_text(new_ids, encoding, drawn)):
                whole += piece
                if not cfg.json:
                    print(piece, end='', flush=True)
        except KeyboardInterrupt:
            if not cfg.interactive:
                raise
        count += len(drawn)
        stopped = bool(cfg.stop) and cfg.stop in encoding.decode([i for i in drawn if i != eot])
        facts = explain_tokens(gpt, encoding, ids, drawn) if cfg.explain else []
        if cfg.json:
            print(dumps({'prompt': text, 'text': whole[len(text):], 'seed': cfg.seed + k,
                         'new_tokens': len(drawn), 'ended': eot in drawn[-1:] or stopped,
                         **({'tokens': facts} if cfg.explain else {})}), flush=True)
        else:
            print(flush=True)
            print_table(facts)
    if count:
        print(f'{count} tokens in {sum(seconds):.2f} s: {count / sum(seconds):.1f} tokens per '
              f'second, the first after {seconds[0]:.2f} s', file=sys.stderr)
    if stopped:                                             # what stopped it was not written
        return whole, ids + tokenizer.encode(encoding, whole[len(text):]).tolist()
    return whole, ids + [i for i in drawn if i != eot]


def prompt_ids(text, encoding):
    """The prompt as ids. <|endoftext|> at its beginning, after which a document begins, is the
    token, and all there is of an empty one; elsewhere it is text."""
    eot = tokenizer.eot_id(encoding)
    if eot is not None and text.startswith(tokenizer.EOT):
        return [eot, *tokenizer.encode(encoding, text.removeprefix(tokenizer.EOT)).tolist()]
    return tokenizer.encode(encoding, text).tolist() or [eot or 0]


def draw(cfg, gpt, encoding, ids, seconds):
    """For each sample an iterator over its new ids, <|endoftext|> included if it comes to that;
    where there is only one, they come as they are drawn, else until all have ended."""
    device, eot = gpt.wte.weight.device, tokenizer.eot_id(encoding)
    for first in range(0, cfg.num_samples, cfg.batch_size):
        rows = torch.tensor([ids] * min(cfg.batch_size, cfg.num_samples - first), device=device)
        samples = stream(gpt, rows, cfg.max_new_tokens, temperature=cfg.temperature,
                            top_k=cfg.top_k, top_p=cfg.top_p, seed=cfg.seed + first,
                            stop=() if eot is None else (eot,))
        columns = (next_ids.tolist() for next_ids in timed(samples, seconds))
        if len(rows) == 1:
            yield (column[0] for column in columns)
        else:
            columns = until_all_end(cfg.stop, columns, encoding) if cfg.stop else columns
            drawn = list(zip(*columns)) or [()] * len(rows)
            yield from ((row[:row.index(eot) + 1] if eot in row else row) for row in drawn)


def until_all_end(stop, columns, encoding):
    """The columns of ids, one for each sample, until all these came to the text `stop` or to
    <|endoftext|>."""
    texts, ends = None, (stop.encode(), tokenizer.EOT.encode())
    for column in columns:
        yield column
        pieces = map(encoding.decode_single_token_bytes, column)
        texts = [text + piece for text, piece in zip(texts or [b''] * len(column), pieces)]
        if all(any(end in text for end in ends) for text in texts):
            break


def timed(samples, seconds):
    """The items of an iterator; how long each of them took is appended to `seconds`."""
    began = time.perf_counter()
    for item in samples:
        seconds.append(time.perf_counter() - began)
        yield item
        began = time.perf_counter()


def as_text(new_ids, encoding, seen):
    """Pieces of text of an iterator of ids, each ending in a whole character; the ids are appended
    to `seen`, and <|endoftext|>, which ends it, is no text."""
    decode = codecs.getincrementaldecoder('utf-8')('replace').decode
    eot = tokenizer.eot_id(encoding)
    for next_id in new_ids:
        seen.append(next_id)
        if next_id == eot:
            break
        yield decode(encoding.decode_single_token_bytes(next_id))
    yield decode(b'', final=True)


def until(stop, pieces):
    """Of an iterator of pieces what stands before the text `stop`, if that is not empty. What may
    be its beginning is held back until the next piece tells."""
    held = ''
    for piece in pieces:
        held += piece
        if stop and stop in held:
            held = held.partition(stop)[0]
            break
        maybe = next((n for n in range(len(stop) - 1, 0, -1) if held.endswith(stop[:n])), 0)
        yield held[:len(held) - maybe]
        held = held[len(held) - maybe:]
    yield held


def window(start, end, gpt):
    """Where the window begins from which the model predicts the token at `end`."""
    return slide(torch.tensor(start), end, gpt.config.block_size).item()


@torch.no_grad()
def explain_tokens(gpt, encoding, given, new):
    """A dict for every token but the first of `given` + `new` ids: the probability that the model
    gave it, before temperature, top_k and top_p, its rank, and the three likeliest."""
    ids, facts, start, end = torch.tensor(given + new, device=gpt.wte.weight.device), [], 0, 1
    while end < len(ids):
        start, begin = window(start, end, gpt), end             # predicted from start: begin to end
        end = min(len(ids), start + gpt.config.block_size + 1)
        x = gpt.hidden(ids[None, start:end - 1])[0, begin - start - 1:]     # (n, C)
        probs = gpt.head(x).float().softmax(dim=-1)                    # (n, V)
        found = probs.gather(1, ids[begin:end, None])                       # (n, 1)
        ranks = 1 + (probs > found).sum(dim=1)
        top = probs.topk(min(3, probs.size(1)))
        for n, i in enumerate(ids[begin:end].tolist()):
            others = zip(top.indices[n].tolist(), top.values[n].tolist())
            facts.append({'token': shown(encoding, i), 'id': i, 'new': begin + n >= len(given),
                          'probability': found[n].item(), 'rank': ranks[n].item(),
                          'likeliest': [[shown(encoding, j), p] for j, p in others]})
    return facts


def shown(encoding, i):
    return encoding.decode_single_token_bytes(i).decode('utf-8', 'backslashreplace')


def print_table(facts):
    if facts:
        print('\n        token            probability    rank   the likeliest')
    for fact in facts:
        others = '  '.join(f'{token!r} {p:.1%}' for token, p in fact['likeliest'])
        print(f"{'new' if fact['new'] else 'given':6}  {fact['token']!r:16} "
              f"{fact['probability']:11.2%} {fact['rank']:7,}   {others}")


if __name__ == '__main__':
    run(main, Config, short=SHORT)
