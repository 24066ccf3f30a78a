"""
A trained model as a folder to give away: weights in bfloat16, tokenizer, settings, model card.

    python publish.py --model=out/checkpoint --to=checkpoint --about=FILE:about.md
    python publish.py --model=out/first --to=my-gpt --prompts=Once,Twice
    hf upload me/my-gpt my-gpt                      # to the hub, with an account there
"""

import math
import platform
from pathlib import Path
from typing import NamedTuple

from gpt.settings import check_bounds, run, settings

# -----------------------------------------------------------------------------
model = ''          # the folder of a run, whose best step is published, or of one of its steps
to = ''             # the folder to write; a card published there before becomes README.md.old
about = ''          # what the card says of the model and its text; FILE:name reads a file
prompts = ('It was a dark night', 'He looked at her and said', 'The house')
num_samples = 2     # of each prompt, drawn with seeds 1337, 1338, …: none is chosen
max_new_tokens = 120
eval_tokens = 1_000_000     # validation tokens: the first of the split; 0: all
device = 'auto'     # of validation and samples: 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else
                    # mps, else cpu
dtype = 'bfloat16'  # of the weights in the file; 'float32' is exact and twice as large
language = ''       # for the hub's index, such as en
license = ''        # the same, such as mit
data_dir = ''       # folder of prepared data; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

import torch

from gpt import checkpoints, steps, tokenizer
from gpt.curves import read_log, seconds_to
from gpt.data.sets import Data, check_tokenizer
from gpt.device import pick_device, pick_dtype
from gpt.files import given_text, read_text
from gpt.log import duration
from gpt.validation import ValidationConfig, validate
from gpt.world import World
from model import GPT

SEED = 1337
FROM_THE_RUN = 'config.py', 'log.jsonl', 'samples.jsonl', 'starts.jsonl'


def main(cfg):
    if not cfg.model or not cfg.to:
        raise ValueError('expected a run and a folder to write, as in: '
                         'python publish.py --model=out/first --to=my-gpt')
    check_bounds(cfg, [('0 or more', lambda value: value >= 0, 'eval_tokens max_new_tokens'),
                       ('1 or more', lambda value: value >= 1, 'num_samples')])
    world, target = World(device=pick_device(cfg.device)), Path(cfg.to).resolve()
    published = ('model.safetensors', 'manifest.json', 'README.md')
    if target.exists() and any(target.iterdir()) and not all(
            (target / name).exists() for name in published):
        raise ValueError(f'{cfg.to}: exists and was not written by this program; give another '
                         f'folder')
    about = given_text(cfg.about, 'about').strip()
    prompts = [given_text(prompt, 'prompts') for prompt in cfg.prompts]
    dtype, _ = pick_dtype(cfg.dtype, torch.device('cpu'))
    step = steps.look_again(world, lambda: step_folder(cfg.model),
                            lambda folder: read_step(folder, world.device, dtype))
    rows = properties(cfg, step, dtype, world)
    samples = [line for prompt in prompts for line in quoted(cfg, prompt, step)]
    texts = {**step.texts, 'README.md': card(cfg, about, rows, samples)}
    checkpoints.publish(target, step.model.to('cpu', dtype), step.encoding, texts)
    for name in FROM_THE_RUN:                       # of a run that was published there before
        if name not in texts:
            (target / name).unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f'{cfg.to}: {size:.1f} MB; `python sample.py --model={cfg.to}` samples from it')


class Step(NamedTuple):
    model: GPT              # the weights of the file to write, but in float32
    encoding: tokenizer.Encoding
    training: dict
    texts: dict             # {name: text} of the run's files
    folder: Path


def step_folder(name):
    """The folder of the step to publish."""
    folder = checkpoints.find(Path(name)) if Path(name).is_dir() else Path()
    if not folder.name.startswith('step_'):
        raise ValueError(f'model: given {name!r}, expected the folder of a run of train.py that '
                         f'has saved a step')
    return folder


def read_step(folder, device, dtype):
    """The Step in `folder`."""
    model, encoding = checkpoints.load_folder(folder, device, dtype=dtype)
    texts = {name: read_text(folder.parent / name) for name in FROM_THE_RUN
             if (folder.parent / name).exists()}
    return Step(model.float(), encoding, checkpoints.load_training(folder), texts, folder)


def card(cfg, about, rows, samples):
    """The model card, in Markdown."""
    index = {'language': cfg.language, 'license': cfg.license,
             'pipeline_tag': 'text-generation', 'library_name': 'transformers', 'tags': '[gpt2]'}
    return '\n'.join([
        '---', *(f'{key}: {value}' for key, value in index.items() if value), '---',
        f'# {Path(cfg.to).resolve().name}', '', *([about, ''] if about else []),
        '| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows), '',
        f'`python train.py {cfg.to}/config.py --out_dir=out/again` trains it again, where that '
        f'data set is prepared. It is a Hugging Face model: '
        f'`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read this folder.', '',
        *(['## Samples', '', f'Not chosen: the first {cfg.num_samples} of each prompt, '
           f'temperature 0.8, top-k 200, as `python sample.py --model={cfg.to} -p "…" '
           f'-m {cfg.max_new_tokens} --num_samples={cfg.num_samples}` draws them in float32.', '',
           *samples, ''] if samples else [])])


def properties(cfg, step, dtype, world):
    """[(key, value)] of what the card says of the model, whose file is in `dtype`."""
    progress, run_settings = step.training['progress'], step.training['settings']
    tokens = progress['position'] * run_settings['block_size']
    seconds = seconds_to(read_log(step.folder.parent / 'log.jsonl'), tokens)
    c, n_parameters = step.model.config, step.model.num_parameters()
    return [('parameters', f'{n_parameters:,}, {n_parameters * dtype.itemsize / 1e6:.1f} MB as '
                           f'{str(dtype)[6:]}: {c.n_layer} layers, {c.n_head} heads, '
                           f'{c.n_embd} wide, a block of {c.block_size} tokens'),
            ('tokenizer', f'{step.encoding.name}, {step.encoding.n_vocab:,} tokens'),
            ('trained', f"{progress['step']:,} updates, {tokens:,} tokens, "
                        f'{duration(seconds)} of updates'),
            ('data set', run_settings['dataset']),
            *validation(cfg, step, world),
            ('published with', f'torch {torch.__version__}, Python {platform.python_version()}')]


def validation(cfg, step, world):
    """Properties measured on the validation text, or why there are none."""
    name = step.training['settings']['dataset']
    try:
        data = Data(name, cfg.data_dir)
        check_tokenizer(name, data.encoding, step.folder, step.encoding)
        if data.shards != step.training['shards']:
            raise ValueError(f'the data set {name} was prepared again since the training')
    except (OSError, ValueError) as error:
        print(f'not validated: {error}')
        return [('not validated', 'the data set of the training is not at hand')]
    config = ValidationConfig(batch_size=16, block_size=step.model.config.block_size,
                              eval_tokens=cfg.eval_tokens or 2 ** 60)
    result = validate(step.model, data.sets, config, world)
    total = sum(len(part.val) - 1 for part in data.sets)
    part = 'all' if result.tokens == total else f'the first {result.tokens:,} of'
    where = f'over {part} {total:,} tokens of the validation text'
    if len(data.sets) > 1:
        shares = ', '.join(f'{one.name} {one.fraction:.1%}' for one in data.sets)
        where = f'the mean of its data sets weighted as in training ({shares}), {where}s'
    rows = [('validation loss', f'{result.loss:.4f} nats a token, a perplexity of '
                                f'{math.exp(result.loss):.1f}, {where}, which it was not trained '
                                f'on')]
    if 'val_bits_per_byte' in result.others:
        rows.append(('bits per byte', f"{result.others['val_bits_per_byte']:.3f}"))
    return rows


def quoted(cfg, prompt, step):
    """Samples of a prompt as lines of Markdown."""
    ids = tokenizer.encode(step.encoding, prompt).tolist()
    eot = step.encoding.eot
    rows = torch.tensor([ids] * cfg.num_samples, device=step.model.wte.weight.device)
    rows = step.model.generate(rows, cfg.max_new_tokens, temperature=0.8, top_k=200, seed=SEED,
                               stop=() if eot is None else (eot,))
    lines = []
    for row in rows.tolist():
        text = step.encoding.decode(row[:row.index(eot)] if eot in row else row)
        lines += [f'> {line}' for line in text.splitlines()] + ['']
    return lines


if __name__ == '__main__':
    run(main, Config)
