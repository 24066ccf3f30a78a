"""
What a run starts from: the newest checkpoint in its folder, another model, or new weights.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt import checkpoints, steps
from gpt.budget import fitted
from gpt.data.sets import Data, check_tokenizer
from gpt.model_config import check_size
from gpt.settings import section
from gpt.world import World
from model import GPT, GPTConfig


class Start(NamedTuple):
    cfg: Any                # the settings, where the folder, the model or --minutes set some
    model: GPT
    saved: dict             # by checkpoints.save(); {} for a new run
    changed: bool           # whether a resume has other settings than the run before


def starting_point(cfg: Any, world: World, data: Data) -> Start:
    """Where a run with the settings of train.py starts.

    Raises ValueError if the settings or the data do not fit what the folder holds.
    """
    def start_from(folder: Path | None) -> Start:
        if folder and cfg.init_from == 'scratch':
            raise ValueError(f"init_from='scratch', but {folder} holds a run; --init_from=resume "
                             f'continues it, another --out_dir leaves it alone')
        if not folder and cfg.init_from == 'resume':
            raise ValueError(f"init_from='resume', but there is no checkpoint in {cfg.out_dir}")
        torch.manual_seed(cfg.seed)
        if folder:
            return resume(cfg, world, folder, data)
        return fine_tune(cfg, world, data) if is_fine_tune(cfg) else new_run(cfg, world, data)

    return steps.look_again(world, lambda: newest_checkpoint(cfg, world), start_from)


def is_read_only(cfg: Any) -> bool:
    """Whether this command only looks at a run."""
    return cfg.eval_only or cfg.plan


def is_fine_tune(cfg: Any) -> bool:
    """Whether a run starts from the weights of another model."""
    return cfg.init_from not in ('auto', 'scratch', 'resume')


def newest_checkpoint(cfg: Any, world: World) -> Path | None:
    """The newest intact checkpoint; damaged ones are renamed, so that they count no more."""
    folder, problems = world.on_main(steps.newest, cfg.out_dir)
    for damaged, wrong in problems:
        world.print(f'skipping {damaged}: {wrong}')
        if not is_read_only(cfg):
            world.on_main(steps.set_aside, damaged)
    return folder


def new_run(cfg: Any, world: World, data: Data) -> Start:
    config = section(cfg, GPTConfig, vocab_size=data.encoding.n_vocab)
    check_size(config)
    announce(cfg, world, '')
    return Start(cfg, GPT(config), {}, changed=False)


def announce(cfg: Any, world: World, origin: str) -> None:
    if not is_read_only(cfg):
        world.print(f'new run in {cfg.out_dir}{origin}')


def resume(cfg: Any, world: World, folder: Path, data: Data) -> Start:
    """From `folder`, a checkpoint of the same run."""
    saved, on_request = checkpoints.load_training(folder), cfg.init_from == 'resume'
    before = saved['settings']
    for key in ('dataset', 'seed'):
        if before[key] != getattr(cfg, key) and not (on_request or cfg.eval_only):
            raise ValueError(f'{cfg.out_dir} holds a run with {key}={before[key]}, given '
                             f'{getattr(cfg, key)}; give another --out_dir, or '
                             f'--init_from=resume to continue this run anyway')
    if on_request:
        cfg = replace(cfg, init_from=before['init_from'])   # so that config.py repeats the run
    model = load_checked(cfg, world, folder, data)
    cfg = replace(cfg, **fitted(cfg, before))
    if is_fine_tune(cfg):
        if before['init_from'] != cfg.init_from:
            raise ValueError(f'{cfg.out_dir} holds a run with init_from={before["init_from"]}, '
                             f'given {cfg.init_from}; give another --out_dir to start from that')
        own = given_by(model, cfg)
        if cfg.block_size != saved.get('block_size_asked'):     # else the model's was smaller
            own['block_size'] = cfg.block_size
        cfg = replace(cfg, **own)
    check_shape(model.config, section(cfg, GPTConfig, vocab_size=data.encoding.n_vocab), folder)
    if before['dataset'] == cfg.dataset and saved['shards'] != data.shards:
        raise ValueError(f'the data set {cfg.dataset} was prepared again since {cfg.out_dir} '
                         f'was trained on it; to continue from these weights, give another '
                         f'--out_dir and --init_from={cfg.out_dir}')
    before = {field.name: field.default for field in fields(cfg)} | before      # of old runs
    changed = [f'{key} {before[key]!r} -> {value!r}' for key, value in asdict(cfg).items()
               if before[key] != value and key not in ('eval_only', 'plan')]
    note = f"; changed: {', '.join(changed)}" if changed else ''
    world.print(f"{'reading' if is_read_only(cfg) else 'resuming from'} {folder}{note}")
    return Start(cfg, model, saved, bool(changed))


def fine_tune(cfg: Any, world: World, data: Data) -> Start:
    source, model = steps.look_again(
        world, lambda: world.on_main(checkpoints.find, cfg.init_from),
        lambda folder: (folder, load_checked(cfg, world, folder, data)))
    given, longest = given_by(model, cfg), model.config.block_size
    note = f' (up to --block_size={longest} is possible)' if cfg.block_size < longest else ''
    if cfg.block_size > longest:
        note = f", the model's (given {cfg.block_size})"
    own = ', '.join(f'{key}={value!r}' for key, value in given.items() if key != 'block_size')
    announce(cfg, world, f', from the weights in {source}, which set {own}; '
                         f'block_size {given["block_size"]}{note}')
    model.crop_block(given['block_size'])
    return Start(replace(cfg, **given), model, {}, changed=False)


def load_checked(cfg: Any, world: World, folder: Path, data: Data) -> GPT:
    """The model in `folder`, whose tokenizer must be that of the data set."""
    device = 'cpu' if cfg.parallel == 'fsdp' else world.device      # before it is sharded
    model, own = checkpoints.load_folder(folder, device, dropout=cfg.dropout)
    check_tokenizer(cfg.dataset, data.encoding, folder, own)
    return model


def given_by(model: GPT, cfg: Any) -> dict[str, Any]:
    """The settings that a run takes from the model it starts from: the model's block_size is the
    largest that is possible."""
    return {key: min(value, cfg.block_size) if key == 'block_size' else value
            for key, value in asdict(model.config).items()
            if hasattr(cfg, key) and key != 'dropout'}


def check_shape(config: GPTConfig, given: GPTConfig, folder: Path) -> None:
    """Refuse a model whose config is not the one `given`."""
    for key, value in asdict(given).items():
        if value != getattr(config, key):
            raise ValueError(f'{folder} has {key}={getattr(config, key)}, given {key}={value}; '
                             f'pass that value ({folder.parent}/config.py holds all settings of '
                             f'the run), or give another --out_dir')
