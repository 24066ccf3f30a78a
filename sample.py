"""
Text from a trained GPT.

    python sample.py                                # a new text, by the newest run under out/
    python sample.py -p "The import statement" -m 200
    python sample.py -p FILE:prompt.txt --model=out/pydocs --temperature=0
    echo "To be" | python sample.py -p - --model=gpt2 --num_samples=3
    python sample.py -i                             # a conversation
    python sample.py -p "To be or not" -m 5 --explain
"""

import codecs
import sys
import time
from contextlib import suppress
from dataclasses import replace
from json import dumps
from random import randrange

from gpt.settings import check_bounds, run, settings

# -----------------------------------------------------------------------------
prompt = ''             # also -p; FILE:name.txt reads a file, - standard input, both without the
                        # last newline; '': <|endoftext|>, which may also begin a prompt
max_new_tokens = 100    # also -m
model = ''              # a run's folder (its best step), a step, a Hugging Face folder, gpt2 to
                        # gpt2-xl, another GPT-2 on the hub; '': the newest run under out/, else
                        # checkpoint/, else an untrained one
num_samples = 1
temperature = 0.8       # 0 always takes the most likely token, 1 samples as the model predicts
top_k = 200             # sample among the k most likely tokens, 0: all
top_p = 1.0             # sample among the most likely that together have this probability
seed = 1337             # sample k is drawn with seed + k; -1: a new one each time
stop = ''               # text that ends a sample, as <|endoftext|> does; it is not printed
interactive = False     # also -i; ask for one prompt after another
explain = False         # under each sample: every token's probability, rank and alternatives, as
                        # the model gave them, before temperature, top_k and top_p
json = False            # a line of JSON for each sample instead of text
batch_size = 8          # samples drawn at once
device = 'auto'         # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'auto'          # 'float32': a sample is the same alone and in a batch; 'bfloat16',
                        # 'float16'; auto: bfloat16 where native, but float32 for --explain
# -----------------------------------------------------------------------------
Config = settings(globals())

import torch

from gpt import checkpoints, steps, tokenizer
from gpt.cpu import pack
from gpt.device import pick_device, pick_dtype
from gpt.files import decode, given_text
from gpt.generate import slide, stream
from gpt.world import World
from model import GPT, GPTConfig

SHORT = {'-p': 'prompt', '-m': 'max_new_tokens', '-i': 'interactive',
         '--start': 'prompt', '--out_dir': 'model'}     # nanoGPT's names


def main(cfg):
    check(cfg)
    device = pick_device(cfg.device)
    exact = cfg.explain and cfg.dtype == 'auto'
    dtype, _ = pick_dtype('float32' if exact else cfg.dtype, device)
    text = read_prompt(cfg.prompt)
    model, encoding, origin = load(cfg.model, device, dtype)
    cfg = replace(cfg, seed=randrange(2 ** 31) if cfg.seed == -1 else cfg.seed,
                  stop=cfg.stop.replace('\\n', '\n').replace('\\t', '\t'))
    role = steps.role(origin)
    note = f', the {role} step of its run' if role else ''
    print(f'model: {origin}{note}; seed {cfg.seed}', file=sys.stderr)
    if dtype == torch.float32 or min(cfg.num_samples, cfg.batch_size) > 1:
        pack(model)                                     # one row in bfloat16 is faster unpacked
    if cfg.interactive:
        converse(cfg, model, encoding, text)
    else:
        write(cfg, model, encoding, text, tokenizer.prompt_ids(encoding, text))


def check(cfg):
    check_bounds(cfg, [
        ('0 or more', lambda value: value >= 0, 'temperature top_k max_new_tokens'),
        ('more than 0, at most 1', lambda value: 0 < value <= 1, 'top_p'),
        ('1 or more', lambda value: value >= 1, 'num_samples'),
        ('1 or more, at most 65,536', lambda value: 1 <= value <= 2 ** 16, 'batch_size'),
        ('-1 or more', lambda value: -1 <= value < 2 ** 62, 'seed')])
    if cfg.interactive and cfg.prompt == '-':
        raise ValueError("prompt: given '-', which is standard input; expected another one, since "
                         "-i reads its prompts there")


def load(name, device, dtype):
    """(model, encoding, where they come from)."""
    name = name or steps.newest_run()
    if name:
        return checkpoints.load_found(World(), name, device, dtype)
    torch.manual_seed(0)
    encoding = tokenizer.byte_pairs('bytes', [])
    config = GPTConfig(block_size=256, vocab_size=encoding.n_vocab, n_layer=2, n_head=2, n_embd=64)
    origin = ('untrained, since there is no checkpoint under out/: '
              'expect noise (`make quickstart` trains one)')
    return GPT(config).to(device, dtype).eval(), encoding, origin


def read_prompt(prompt):
    """The text of --prompt, which may name a file or be '-'."""
    if prompt == '-':
        return decode(sys.stdin.buffer.read(), 'standard input').removesuffix('\n')
    text = given_text(prompt, 'prompt')
    return text.removesuffix('\n') if prompt.startswith('FILE:') else text


def converse(cfg, model, encoding, text):
    """Read one prompt after another from the terminal, until its end."""
    with suppress(ImportError):
        import readline                                 # for arrow keys, where it exists # noqa
    print('Type a prompt and Enter; Enter alone continues the text; Ctrl-C interrupts it, '
          'Ctrl-D exits.', file=sys.stderr)
    ids, is_terminal = tokenizer.prompt_ids(encoding, text), sys.stdin.isatty()
    while True:
        try:
            raw = input('> ' if is_terminal else '').encode('utf-8', 'surrogateescape')
            line = decode(raw, 'standard input').removesuffix('\n')            # a \r at its end
            if line:
                text, ids = line, tokenizer.prompt_ids(encoding, line)
            text, ids = write(cfg, model, encoding, text, ids)
            cfg = replace(cfg, seed=cfg.seed + cfg.num_samples)     # the same would repeat itself
        except EOFError:
            return print(end='\n' if is_terminal else '')
        except ValueError as error:                     # a character that the model does not know
            print(error, file=sys.stderr)


def write(cfg, model, encoding, text, ids):
    """Print the samples that continue `text`, whose ids are `ids`, and their speed on stderr.

    Returns (text, ids) of the last sample with what it continues. In a conversation Ctrl-C ends a
    sample early.
    """
    start = window_start(0, len(ids), model)
    if start:
        print(f'the prompt has {len(ids):,} tokens, the block {model.config.block_size:,}: the '
              f'model reads the last {len(ids) - start:,}', file=sys.stderr)
    seconds, count = [], 0                              # seconds: of each row of tokens
    for k, new_ids in enumerate(generate(cfg, model, encoding, ids, seconds)):
        sample = Sample(new_ids, encoding, cfg.stop)
        if not cfg.json:
            title = f'--- sample {k + 1}\n' if cfg.num_samples > 1 else ''
            print(title + text, end='', flush=True)
        try:
            for piece in sample.pieces():
                if not cfg.json:
                    print(piece, end='', flush=True)
        except KeyboardInterrupt:
            if not cfg.interactive:
                raise
        count += len(sample.ids)
        tokens = explain_tokens(model, encoding, ids, sample.ids) if cfg.explain else []
        if cfg.json:
            record = {'prompt': text, 'text': sample.text, 'seed': cfg.seed + k,
                      'new_tokens': len(sample.ids),
                      'ended': sample.stopped or sample.eot in sample.ids[-1:]}
            print(dumps({**record, 'tokens': tokens} if cfg.explain else record), flush=True)
        else:
            print(flush=True)
            print_table(tokens)
    if count:
        print(f'{count} tokens in {sum(seconds):.2f} s: {count / sum(seconds):.1f} tokens per '
              f'second, the first after {seconds[0]:.2f} s', file=sys.stderr)
    return text + sample.text, ids + sample.printed_ids()


class Sample:
    """A sample, whose ids and text grow while pieces() is read."""

    def __init__(self, new_ids, encoding, stop=''):
        self.new_ids, self.encoding, self.stop = new_ids, encoding, stop
        self.eot = encoding.eot
        self.ids, self.text, self.stopped = [], '', False

    def pieces(self):
        """Yield the text in pieces of whole characters, up to <|endoftext|> or the text `stop`.

        What may be the beginning of `stop` is held back until the next piece decides.
        """
        held, stop = '', self.stop
        for piece in self.decoded():
            held += piece
            if stop and stop in held:
                held, self.stopped = held.partition(stop)[0], True
                break
            n = next((n for n in range(len(stop) - 1, 0, -1) if held.endswith(stop[:n])), 0)
            ready, held = held[:len(held) - n], held[len(held) - n:]
            self.text += ready
            yield ready
        self.text += held
        yield held

    def decoded(self):
        decode = codecs.getincrementaldecoder('utf-8')('replace').decode
        for i in self.new_ids:
            self.ids.append(i)
            if i == self.eot:
                break
            yield decode(self.encoding.decode_single_token_bytes(i))
        yield decode(b'', final=True)

    def printed_ids(self):
        """The ids of what was printed, which `stop` and <|endoftext|> are not."""
        if self.stopped:
            return tokenizer.encode(self.encoding, self.text).tolist()
        return [i for i in self.ids if i != self.eot]


def generate(cfg, model, encoding, ids, seconds):
    """Yield for each sample an iterable of its new ids, <|endoftext|> included if it is drawn.

    A sample alone in its batch comes as it is drawn, others when all of the batch have ended. How
    long each row of tokens took is appended to `seconds`.
    """
    device, eot = model.wte.weight.device, encoding.eot
    for first in range(0, cfg.num_samples, cfg.batch_size):
        B = min(cfg.batch_size, cfg.num_samples - first)
        rows = stream(model, torch.tensor([ids] * B, device=device), cfg.max_new_tokens,
                      temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
                      seed=cfg.seed + first, stop=() if eot is None else (eot,))
        rows = timed((row.tolist() for row in rows), seconds)       # each the next ids (B,)
        if B == 1:
            yield (row[0] for row in rows)
            continue
        if cfg.stop:
            rows = until_all_end(cfg.stop, rows, encoding)
        for new_ids in list(zip(*rows)) or [()] * B:
            yield new_ids[:new_ids.index(eot) + 1] if eot in new_ids else new_ids


def until_all_end(stop, rows, encoding):
    """Yield rows of ids, one id for each sample, until all samples have drawn the text `stop` or
    the end-of-text token."""
    texts, ended, eot = {}, set(), encoding.eot
    for row in rows:
        yield row
        for k, i in enumerate(row):
            texts[k] = texts.get(k, b'') + encoding.decode_single_token_bytes(i)
            if i == eot or stop.encode() in texts[k]:
                ended.add(k)
        if len(ended) == len(row):
            break


def timed(items, seconds):
    """Yield the items of an iterator; append to `seconds` how long each took."""
    started = time.perf_counter()
    for item in items:
        seconds.append(time.perf_counter() - started)
        yield item
        started = time.perf_counter()


# The probability of each token.

def window_start(start, end, model):
    """Where the window begins in which the model predicts the token at `end`."""
    return slide(torch.tensor(start), end, model.config.block_size).item()


@torch.no_grad()
def explain_tokens(model, encoding, given, new):
    """A dict for every token but the first of `given` + `new` ids: the probability that the model
    gave it, before temperature, top_k and top_p, its rank, and the three most likely."""
    ids, tokens = torch.tensor(given + new, device=model.wte.weight.device), []
    start, end = 0, 1
    while end < len(ids):
        first = end                                             # first to end: from one window
        start = window_start(start, first, model)
        end = min(len(ids), start + model.config.block_size + 1)
        x = model.hidden(ids[None, start:end - 1])[0, first - start - 1:]   # (n, C)
        probs = model.head(x).float().softmax(dim=-1)                       # (n, V)
        chosen = probs.gather(1, ids[first:end, None])                      # (n, 1)
        ranks = 1 + (probs > chosen).sum(dim=1)
        top = probs.topk(min(3, probs.size(1)))
        columns = (ids[first:end], chosen[:, 0], ranks, top.indices, top.values)
        for i, probability, rank, top_ids, top_probs in zip(*(c.tolist() for c in columns)):
            likely = [[token_text(encoding, j), p] for j, p in zip(top_ids, top_probs)]
            tokens.append({'token': token_text(encoding, i), 'id': i,
                           'new': 1 + len(tokens) >= len(given), 'probability': probability,
                           'rank': rank, 'most_likely': likely})
    return tokens


def token_text(encoding, i):
    return encoding.decode_single_token_bytes(i).decode('utf-8', 'backslashreplace')


def print_table(tokens):
    if tokens:
        print('\nprobabilities before temperature, top_k and top_p\n'
              '        token            probability    rank   the most likely')
    for token in tokens:
        alternatives = '  '.join(f'{text!r} {p:.1%}' for text, p in token['most_likely'])
        print(f"{'new' if token['new'] else 'given':6}  {token['token']!r:16} "
              f"{token['probability']:11.2%} {token['rank']:7,}   {alternatives}")


if __name__ == '__main__':
    run(main, Config, short=SHORT)
