"""
Before a run: --plan, whether all it needs is in place; settings that are hardly meant; whether it
has ended before.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt.budget import BatchConfig, BatchPlan, check_disk
from gpt.curves import read_log
from gpt.data.sets import Data
from gpt.device import pick_dtype, without_memory
from gpt.model_config import check_size
from gpt.progress import Progress
from gpt.settings import section
from gpt.start import is_fine_tune
from gpt.trainer import should_compile
from gpt.world import World
from model import GPT, GPTConfig


class Preflight:
    """Each method checks one thing a run needs and says how it stands, in words; ValueError or
    OSError say what is wrong. Later checks use what earlier ones found."""

    ORDER = 'device', 'dtype', 'compiler', 'data', 'vocabulary', 'batch', 'disk'

    def __init__(self, cfg: Any):
        self.cfg, self.world, self.found = cfg, World(), {}

    def run(self) -> bool:
        """Print a line for each check; whether all passed, on all processes."""
        lines = []
        for name in self.ORDER:
            try:
                text = getattr(self, name)()
            except (ValueError, OSError) as error:
                text = f'FAILS: {error}'
            except KeyError:                            # what an earlier check should have found
                text = 'not checked: needs an earlier check'
            lines.append(f'{name:11} {text}')
        ranks = self.world.gather(lines)
        self.world.print('\n'.join(lines))
        for rank, others in enumerate(ranks):
            for line in others:
                if 'FAILS' in line and line not in ranks[0]:
                    self.world.print(f'{line} (rank {rank})')
        return not any('FAILS' in line for others in ranks for line in others)

    def device(self) -> str:
        self.world = World.join(self.cfg.device, self.cfg.timeout_minutes)
        processes = 'process' if self.world.size == 1 else 'processes'
        return f'{self.world.device}, {self.world.size} {processes}'

    def dtype(self) -> str:
        self.found['dtype'], reason = pick_dtype(self.cfg.dtype, self.world.device, True)
        return f'{str(self.found["dtype"])[6:]}: {reason}'

    def compiler(self) -> str:
        world = replace(self.world, dtype=self.found['dtype'])
        wanted, reason = should_compile(self.cfg.compile, world, math.inf)
        if world.device.type != 'cpu' or self.cfg.compile != 'auto':
            return reason
        if not wanted:
            return f'{reason}; on Debian and Ubuntu: apt-get install g++'
        return f'{reason}; used if the run is long enough'

    def data(self) -> str:
        self.found['data'] = data = Data(self.cfg.dataset, self.cfg.data_dir, self.cfg.val_datasets)
        return ', '.join(f'{part.name} {len(part.train):,} training and {len(part.val):,} '
                         f'validation tokens' for part in data.sets)

    def vocabulary(self) -> str:
        encoding = self.found['data'].encoding
        return f'{encoding.name}, {encoding.n_vocab:,} tokens'

    def batch(self) -> str:
        if is_fine_tune(self.cfg):
            return f'not known before {self.cfg.init_from} is loaded'
        warmup = self.cfg.batch_warmup_iters
        text = BatchPlan(section(self.cfg, BatchConfig), self.world.size).describe()
        return text + (f'; less in the first {warmup:,} updates' if warmup else '')

    def disk(self) -> str:
        if is_fine_tune(self.cfg):
            return f'not known before {self.cfg.init_from} is loaded'
        vocab_size = self.found['data'].encoding.n_vocab
        config = section(self.cfg, GPTConfig, vocab_size=vocab_size)
        check_size(config)
        with without_memory():
            model = GPT(config)
        return check_disk(self.cfg, model)


def doubtful(cfg: Any) -> list[str]:
    """What the settings say that can be meant, but hardly is: lines."""
    end, warmup, cooldown = cfg.max_iters, cfg.warmup_iters, cfg.cooldown_iters
    stop = cfg.lr_decay_iters or end
    cases = [
        (cfg.decay_lr and warmup >= min(end, stop),
         f'warmup_iters={warmup}: the learning rate does not reach its maximum'),
        (cfg.decay_lr and cfg.schedule == 'wsd' and warmup < stop < warmup + cooldown,
         f'warmup_iters={warmup}, cooldown_iters={cooldown}: the cooldown follows the warmup, in '
         f'{stop - warmup} updates'),
        (cfg.batch_warmup_iters >= end,
         f'batch_warmup_iters={cfg.batch_warmup_iters}: the batch never is the full one'),
        (cfg.patience * cfg.eval_interval > end,
         f'patience={cfg.patience}, eval_interval={cfg.eval_interval}: patience has no effect'),
        (cfg.eval_interval > end and not cfg.save_minutes,
         f'eval_interval={cfg.eval_interval}, save_minutes=0: no checkpoint before the end')]
    return [f'note: max_iters={end}, {text}' for applies, text in cases if end and applies]


def how_it_ended(cfg: Any, progress: Progress, saved: dict) -> str:
    """A line, if the run has ended before and nothing is left to do; else ''. One that was killed
    after its last save has the last validation to do."""
    wanted = {'val_loss', 'hellaswag'} if cfg.hellaswag_interval else {'val_loss'}
    try:
        last = read_log(Path(cfg.out_dir) / 'log.jsonl')[-1]
    except (OSError, ValueError):
        return ''
    if (last['step'] != progress.step or not wanted <= set(last)
            or saved['settings']['dataset'] != cfg.dataset):
        return ''
    if progress.step >= cfg.max_iters:
        fixed = '--minutes=0 ' if cfg.minutes else ''
        return (f'finished {progress.step} updates before, nothing is left to do; '
                f'{fixed}--max_iters={2 * progress.step} trains longer')
    if progress.out_of_patience(cfg.patience * cfg.eval_interval) and (
            last['val_loss'] or math.inf) >= progress.lowest_val_loss:
        return (f'ended at step {progress.step} before, no lower loss in {cfg.patience} '
                f'validations; --patience=0 trains longer')
    return ''
