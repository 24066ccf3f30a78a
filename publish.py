"""
A trained model as a folder to give away: weights in bfloat16, tokenizer, settings, model card.

    python publish.py --model=out/checkpoint --to=checkpoint --about=FILE:about.md
    python publish.py --model=out/mine --to=mine --prompts=Once,Twice
    hf upload me/mine mine                          # to the hub, with an account there
"""

import math
import platform
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from gpt import checkpoints
from gpt import tokenizer
from gpt.settings import run, settings
from gpt.curves import Curve
from gpt.data.order import load_data
from gpt.world import World, pick_dtype
from gpt.journal import duration
from gpt.validation import validate

# -----------------------------------------------------------------------------
model = ''          # the folder of a run, of which the best step is published
to = ''             # the folder to write; published before, the card there becomes README.md.old
about = ''          # what the card says of the model and its text; FILE:name reads a file
prompts = ('It was a dark night', 'He looked at her and said', 'The house')
num_samples = 2     # of each prompt, drawn with seeds 1337, 1338, …: nobody chooses
max_new_tokens = 120
dtype = 'bfloat16'  # of the weights in the file; 'float32' is exact and twice as large
language = ''       # for the hub's index, such as en
license = ''        # the same, such as mit
data_dir = ''       # where prepared data lies; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

SEED = 1337
FROM_THE_RUN = 'config.py', 'log.jsonl', 'samples.jsonl', 'starts.jsonl'


def main(cfg):
    if not cfg.model or not cfg.to:
        raise ValueError('expected a run and a folder to write, as in: '
                         'python publish.py --model=out/mine --to=mine')
    folder = Path(cfg.model).is_dir() and checkpoints.find(cfg.model)
    if not folder or not folder.name.startswith('step_'):
        raise ValueError(f'model: given {cfg.model!r}, expected the folder of a run of train.py '
                         f'that has saved a step')
    target, ours = Path(cfg.to).resolve(), ('model.safetensors', 'manifest.json', 'README.md')
    if target.exists() and any(target.iterdir()) and not all(
            (target / name).exists() for name in ours):
        raise ValueError(f'{cfg.to} is there and was not written by this program; '
                         f'give another folder')
    about = cfg.about
    if about.startswith('FILE:'):
        about = Path(about[5:]).read_text(encoding='utf-8')
    dtype, _ = pick_dtype(cfg.dtype, torch.device('cpu'))
    gpt, encoding = checkpoints.load_folder(folder, dtype=dtype)
    texts = {name: (folder.parent / name).read_text(encoding='utf-8')
             for name in FROM_THE_RUN if (folder.parent / name).exists()}
    texts['README.md'] = card(cfg, folder, about.strip(), gpt.float(), encoding, dtype)
    checkpoints.publish(target, gpt.to(dtype), encoding, texts)     # the values that were read
    for name in {*FROM_THE_RUN} - {*texts}:             # of a run that was published there before
        (target / name).unlink(missing_ok=True)
    print(f'{cfg.to}: {sum(file.stat().st_size for file in target.iterdir()) / 1e6:.1f} MB; '
          f'`python sample.py --model={cfg.to}` writes with it')


def card(cfg, folder, about, gpt, encoding, dtype):
    """The model card, in Markdown; what it measures, it measures on the published weights, which
    `gpt` has in float32 and the file in `dtype`."""
    curve, step = Curve(folder.parent), int(folder.name[5:])
    record = next(record for record in curve.records if record['step'] == step)
    c, parameters = gpt.config, gpt.num_parameters()
    rows = [('parameters', f'{parameters:,}, {parameters * dtype.itemsize / 1e6:.1f} MB as '
                           f'{str(dtype)[6:]}: {c.n_layer} layers, {c.n_head} heads, '
                           f'{c.n_embd} wide, a block of {c.block_size} tokens'),
            ('tokenizer', f'{encoding.name}, {encoding.n_vocab:,} tokens'),
            ('trained', f"{step:,} updates, {record['tokens']:,} tokens, "
                        f"{duration(curve.seconds_to(record['tokens']))} of updates"),
            ('data set', curve.settings.get('dataset', 'not known')),
            *measured(cfg, curve, gpt),
            ('published with', f'torch {torch.__version__}, Python {platform.python_version()}')]
    return '\n'.join([
        '---', *(f'{key}: {value}' for key, value in (
            ('language', cfg.language), ('license', cfg.license)) if value),
        'pipeline_tag: text-generation', 'library_name: transformers', 'tags: [gpt2]', '---',
        f'# {Path(cfg.to).resolve().name}', '', *([about, ''] if about else []),
        '| | |', '|---|---|',
        *(f'| {key} | {value} |' for key, value in rows), '',
        f'`python train.py {cfg.to}/config.py --out_dir=out/again` trains it again, where that '
        f'data set is prepared. It is a Hugging Face model: '
        f'`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` read this folder.', '',
        '## Samples', '', f'Not chosen: the first {cfg.num_samples} of each prompt, '
        f'temperature 0.8, top-k 200, as `python sample.py --model={cfg.to} -p "…" '
        f'-m {cfg.max_new_tokens} --num_samples={cfg.num_samples}` draws them in float32.', '',
        *(line for prompt in cfg.prompts for line in samples(cfg, prompt, gpt, encoding)), ''])


def measured(cfg, curve, gpt):
    """The rows of the card about the validation text, all of it; none where it is not at hand."""
    try:
        sets, _ = load_data(curve.settings['dataset'], cfg.data_dir)
    except (OSError, ValueError) as error:
        print(f'not validated: {error}')
        return []
    how = SimpleNamespace(eval_iters=0, eval_tokens=2 ** 60, batch_size=16,
                          block_size=gpt.config.block_size)
    loss, others, count = validate(gpt, sets, how, World(0, 1, torch.device('cpu')), nullcontext)
    rows = [('validation loss', f'{loss:.4f} nats a token, a perplexity of {math.exp(loss):.1f}, '
                                f'over {count:,} tokens that it was not trained on')]
    if 'val_bits_per_byte' in others:
        rows.append(('bits per byte', f"{others['val_bits_per_byte']:.3f}"))
    return rows


def samples(cfg, prompt, gpt, encoding):
    ids = torch.tensor([tokenizer.encode(encoding, prompt).tolist()] * cfg.num_samples)
    eot = tokenizer.eot_id(encoding)
    for row in gpt.eval().generate(ids, cfg.max_new_tokens, temperature=0.8, top_k=200, seed=SEED,
                                   stop=() if eot is None else (eot,)).tolist():
        yield from ['> ' + line for line in encoding.decode(
            row[:row.index(eot)] if eot in row else row).splitlines()]
        yield ''


if __name__ == '__main__':
    run(main, Config)
