"""
A trained model as a folder to give away: weights in bfloat16, tokenizer, settings, model card.

    python publish.py --model=out/checkpoint --to=checkpoint --about=FILE:about.md
    python publish.py --model=out/mine --to=mine --prompts=Once,Twice
    hf upload me/mine mine                          # to the hub, with an account there
"""

import math
import platform
from pathlib import Path

from gpt.settings import run, settings

# -----------------------------------------------------------------------------
model = ''          # the folder of a run, whose best step is published, or of one of its steps
to = ''             # the folder to write; a card published there before becomes README.md.old
about = ''          # what the card says of the model and its text; FILE:name reads a file
prompts = ('It was a dark night', 'He looked at her and said', 'The house')
num_samples = 2     # of each prompt, drawn with seeds 1337, 1338, …: none is chosen
max_new_tokens = 120
dtype = 'bfloat16'  # of the weights in the file; 'float32' is exact and twice as large
language = ''       # for the hub's index, such as en
license = ''        # the same, such as mit
data_dir = ''       # folder of prepared data; '': data/ beside this script
# -----------------------------------------------------------------------------
Config = settings(globals())

import torch

from gpt import checkpoints, tokenizer
from gpt.curves import read_log, seconds_to
from gpt.data.order import load_sets
from gpt.log import duration
from gpt.validation import ValidationConfig, validate
from gpt.world import World, pick_dtype

SEED = 1337
FROM_THE_RUN = 'config.py', 'log.jsonl', 'samples.jsonl', 'starts.jsonl'


def main(cfg):
    if not cfg.model or not cfg.to:
        raise ValueError('expected a run and a folder to write, as in: '
                         'python publish.py --model=out/mine --to=mine')
    folder, target = step_folder(cfg.model), Path(cfg.to).resolve()
    check_target(target, cfg.to)
    about = cfg.about
    if about.startswith('FILE:'):
        about = Path(about[5:]).read_text(encoding='utf-8')
    dtype, _ = pick_dtype(cfg.dtype, torch.device('cpu'))
    model, encoding = checkpoints.load_folder(folder, dtype=dtype)
    texts = {name: (folder.parent / name).read_text(encoding='utf-8')
             for name in FROM_THE_RUN if (folder.parent / name).exists()}
    # the published weights are measured: those of the file, in float32
    rows = properties(cfg, folder, model.float(), encoding, dtype)
    samples = [line for prompt in cfg.prompts for line in quoted(cfg, prompt, model, encoding)]
    texts['README.md'] = card(cfg, about.strip(), rows, samples)
    checkpoints.publish(target, model.to(dtype), encoding, texts)
    for name in FROM_THE_RUN:                       # of a run that was published there before
        if name not in texts:
            (target / name).unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f'{cfg.to}: {size:.1f} MB; `python sample.py --model={cfg.to}` samples from it')


def step_folder(name):
    """The folder of the step to publish."""
    if Path(name).is_dir():
        folder = checkpoints.find(Path(name))
        if folder.name.startswith('step_'):
            return folder
    raise ValueError(f'model: given {name!r}, expected the folder of a run of train.py that has '
                     f'saved a step')


def check_target(target, name):
    """Refuse a folder with files that were not published there."""
    published = ('model.safetensors', 'manifest.json', 'README.md')
    if target.exists() and any(target.iterdir()) and not all(
            (target / file).exists() for file in published):
        raise ValueError(f'{name}: exists and was not written by this program; '
                         f'give another folder')


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
        '## Samples', '', f'Not chosen: the first {cfg.num_samples} of each prompt, '
        f'temperature 0.8, top-k 200, as `python sample.py --model={cfg.to} -p "…" '
        f'-m {cfg.max_new_tokens} --num_samples={cfg.num_samples}` draws them in float32.', '',
        *samples, ''])


def properties(cfg, folder, model, encoding, dtype):
    """[(key, value)] of what the card says of the model, whose file is in `dtype`."""
    saved, records = checkpoints.load_training(folder), read_log(folder.parent / 'log.jsonl')
    progress, run_settings = saved['progress'], saved['settings']
    tokens = progress['position'] * run_settings['block_size']
    c, n_parameters = model.config, model.num_parameters()
    return [('parameters', f'{n_parameters:,}, {n_parameters * dtype.itemsize / 1e6:.1f} MB as '
                           f'{str(dtype)[6:]}: {c.n_layer} layers, {c.n_head} heads, '
                           f'{c.n_embd} wide, a block of {c.block_size} tokens'),
            ('tokenizer', f'{encoding.name}, {encoding.n_vocab:,} tokens'),
            ('trained', f"{progress['step']:,} updates, {tokens:,} tokens, "
                        f'{duration(seconds_to(records, tokens))} of updates'),
            ('data set', run_settings['dataset']),
            *validation(run_settings['dataset'], cfg.data_dir, model),
            ('published with', f'torch {torch.__version__}, Python {platform.python_version()}')]


def validation(dataset, data_dir, model):
    """Properties measured on all of the validation text; none if it is not at hand."""
    try:
        sets, _ = load_sets(dataset, data_dir)
    except (OSError, ValueError) as error:
        print(f'not validated: {error}')
        return []
    config = ValidationConfig(batch_size=16, block_size=model.config.block_size,
                              eval_tokens=2 ** 60)
    result = validate(model, sets, config, World())
    rows = [('validation loss', f'{result.loss:.4f} nats a token, a perplexity of '
                                f'{math.exp(result.loss):.1f}, over {result.tokens:,} tokens that '
                                f'it was not trained on')]
    if 'val_bits_per_byte' in result.others:
        rows.append(('bits per byte', f"{result.others['val_bits_per_byte']:.3f}"))
    return rows


def quoted(cfg, prompt, model, encoding):
    """Samples of a prompt as lines of Markdown."""
    ids = torch.tensor([tokenizer.encode(encoding, prompt).tolist()] * cfg.num_samples)
    eot = tokenizer.eot_id(encoding)
    rows = model.eval().generate(ids, cfg.max_new_tokens, temperature=0.8, top_k=200, seed=SEED,
                                 stop=() if eot is None else (eot,))
    lines = []
    for row in rows.tolist():
        text = encoding.decode(row[:row.index(eot)] if eot in row else row)
        lines += [f'> {line}' for line in text.splitlines()] + ['']
    return lines


if __name__ == '__main__':
    run(main, Config)
