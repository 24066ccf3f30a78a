"""
Where a run starts: its settings, its folder, and its weights, which are new, resumed or another's.
"""

import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gpt import checkpoints
from gpt import distributed
from gpt import budget as planning
from gpt import tokenizer
from gpt.settings import as_config_file
from model import GPT, GPTConfig


BOUNDS = (                  # which settings must be what: in words, and whether a value is
    ('1 or more', lambda value: value >= 1,
     'batch_size block_size n_layer n_head n_embd eval_interval eval_tokens log_interval '
     'max_skipped keep'),
    ('0 or more', lambda value: value >= 0,
     'seed max_iters eval_iters sample_interval hellaswag_interval hellaswag_limit save_minutes '
     'total_batch_size gradient_accumulation_steps weight_decay grad_clip warmup_iters '
     'lr_decay_iters cooldown_iters min_lr patience batch_warmup_iters minutes spike_z '
     'muon_learning_rate'),
    ('0 or more, less than 1', lambda value: 0 <= value < 1, 'dropout beta1 beta2'),
    ('more than 0', lambda value: value > 0, 'learning_rate timeout_minutes'),
    ("'adamw' or 'muon'", ('adamw', 'muon').__contains__, 'optimizer'),
    ("'cosine' or 'wsd'", ('cosine', 'wsd').__contains__, 'schedule'),
    ("'auto', True or False", ('auto', True, False).__contains__, 'compile'),
    ("'ddp' or 'fsdp'", ('ddp', 'fsdp').__contains__, 'parallel'),
    ('the name of a folder', bool, 'out_dir'))


def check(cfg):
    """Refuse settings that could only fail later; ValueError names the first."""
    for expected, fits, names in BOUNDS:
        for name in names.split():
            if not fits(getattr(cfg, name)):
                raise ValueError(f'{name}: given {getattr(cfg, name)!r}, expected {expected}')
    if Path(cfg.out_dir).is_file():
        raise ValueError(f'out_dir: given {cfg.out_dir}, a file, expected the name of a folder')
    if cfg.rollback and cfg.keep < 2:
        raise ValueError(f'rollback=True with keep={cfg.keep}: expected keep=2 or more')
    if cfg.decay_lr and cfg.min_lr > cfg.learning_rate:
        raise ValueError(f'min_lr: given {cfg.min_lr}, above learning_rate={cfg.learning_rate}; '
                         f'give a lower one, or --decay_lr=False')
    if cfg.minutes and not cfg.max_iters:
        raise ValueError('minutes: the schedule of max_iters=0 cannot be stretched to them')


def take_lock(cfg, world):
    """The lock of the run's folder, held by rank 0; a second run there is refused on all ranks."""
    if cfg.eval_only or cfg.plan:
        return nullcontext()
    held = [open(os.devnull)]
    distributed.on_main(world, lambda: held.insert(0, checkpoints.lock(cfg.out_dir)))
    return held[0]


def start(cfg, world, encoding, say):
    """(cfg, model, what was saved with it): of the newest step in out_dir, another model, or
    scratch.

    {} was saved where a run begins. Raises ValueError when init_from and the folder disagree.
    """
    folder, problems = distributed.on_main(world, checkpoints.newest_step, cfg.out_dir)
    for damaged, wrong in problems:
        say(f'passing over {damaged}: {wrong}')
        if not (cfg.eval_only or cfg.plan):
            distributed.on_main(world, checkpoints.set_aside, damaged)
    if folder and cfg.init_from == 'scratch':
        raise ValueError(f"init_from='scratch', but {folder} holds a run; --init_from=resume goes "
                         f'on with it, another --out_dir leaves it alone')
    if not folder and cfg.init_from == 'resume':
        raise ValueError(f"init_from='resume', but there is no checkpoint in {cfg.out_dir}")
    shape = GPTConfig(cfg.block_size, encoding.n_vocab, cfg.n_layer, cfg.n_head, cfg.n_embd,
                      cfg.dropout, cfg.bias)
    torch.manual_seed(cfg.seed)
    if folder:
        saved = checkpoints.load_training(folder)
        began, as_asked = saved['settings']['init_from'], cfg.init_from == 'resume'
        cfg = replace(cfg, init_from=began) if as_asked else cfg    # which config.py repeats
        for key in ('dataset', 'seed') if not (as_asked or cfg.eval_only) else ():
            if saved['settings'][key] != getattr(cfg, key):
                raise ValueError(f'{cfg.out_dir} holds a run with {key}={saved["settings"][key]}, '
                                 f'given {getattr(cfg, key)}; give another --out_dir, or '
                                 f'--init_from=resume to go on with this one all the same')
        model = load_checked(folder, encoding, cfg, world)
        cfg = planning.as_fitted(cfg, saved['settings'])
        fine_tune = planning.is_fine_tune(cfg)
        if fine_tune and began != cfg.init_from:
            raise ValueError(f'{cfg.out_dir} holds a run with init_from={began}, given '
                             f'{cfg.init_from}; give another --out_dir to begin from that')
        if fine_tune:                                               # all but the block is its own
            shape = replace(model.config, block_size=cfg.block_size)
        check_shape(model.config, shape, folder)
        changed = [f'{key} {saved["settings"].get(key)!r} -> {value!r}'
                   for key, value in asdict(cfg).items() if saved['settings'].get(key) != value]
        say(f'going on from {folder}' + (f"; changed: {', '.join(changed)}" if changed else ''))
    elif planning.is_fine_tune(cfg):
        source = distributed.on_main(world, checkpoints.find, cfg.init_from)
        model, saved = load_checked(source, encoding, cfg, world), {}
        block_size = model.config.block_size
        model.crop_block(cfg.block_size)
        say(f'a new run in {cfg.out_dir}, from the weights in {source}; '
            f'it reads {cfg.block_size} tokens at a time'
            + f' (--block_size={block_size} is all it could)' * (cfg.block_size < block_size))
    else:
        model, saved = GPT(shape), {}
        say(f'a new run in {cfg.out_dir}')
    return cfg, model, saved


def load_checked(folder, encoding, cfg, world):
    """The model in `folder`, whose tokenizer must be that of the data set."""
    device = 'cpu' if cfg.parallel == 'fsdp' else world.device      # a card gets its share only
    model, theirs = checkpoints.load_folder(folder, device, dropout=cfg.dropout)
    if tokenizer.fingerprint(theirs) != tokenizer.fingerprint(encoding):
        raise ValueError(f'{folder} was trained on tokens of {theirs.name} ({theirs.n_vocab:,}), '
                         f'the data set {cfg.dataset} holds those of another tokenizer, '
                         f'{encoding.name} ({encoding.n_vocab:,}); prepare it with '
                         f'--tokenizer={folder}')
    return model


def check_same_data(saved, sets, cfg):
    """The sha256 of all shards, which must be those that the run went on with until now."""
    shards = [shard['sha256'] for data in sets for split in data.manifest.get('splits', {}).values()
              for shard in split['shards']]
    if saved and saved['settings']['dataset'] == cfg.dataset and saved['shards'] != shards:
        raise ValueError(f'the data set {cfg.dataset} was prepared anew since {cfg.out_dir} was '
                         f'trained on it; to go on from these weights, give another --out_dir and '
                         f'--init_from={cfg.out_dir}')
    return shards


def check_shape(found, given, folder):
    for key, value in asdict(given).items():
        if value != getattr(found, key):
            raise ValueError(f'{folder} has {key}={getattr(found, key)}, given {key}={value}; '
                             f'give it so ({folder.parent}/config.py holds all that the run was '
                             f'given), or another --out_dir')


def write_config(cfg):
    """The resolved settings, as a config file that repeats the run."""
    cfg, path = replace(cfg, minutes=0.0), Path(cfg.out_dir) / 'config.py'
    words = f'python train.py {path} --out_dir=out/again   # repeats this run'
    path.with_suffix('.partial').write_text(as_config_file(cfg, words), encoding='utf-8')
    os.replace(path.with_suffix('.partial'), path)
