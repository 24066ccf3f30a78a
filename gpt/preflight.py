"""
--plan: is everything in place that a run needs?
"""

import math
from dataclasses import replace
from typing import Any

import torch

from gpt.budget import BatchConfig, BatchPlan, check_disk
from gpt.data.order import Data
from gpt.model_config import check_size
from gpt.settings import section
from gpt.trainer import should_compile
from gpt.world import World, pick_dtype
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
        self.found['data'] = data = Data(self.cfg.dataset, self.cfg.data_dir)
        return ', '.join(f'{part.name} {len(part.train):,} training and {len(part.val):,} '
                         f'validation tokens' for part in data.sets)

    def vocabulary(self) -> str:
        encoding = self.found['data'].encoding
        return f'{encoding.name}, {encoding.n_vocab:,} tokens'

    def batch(self) -> str:
        warmup = self.cfg.batch_warmup_iters
        text = BatchPlan(section(self.cfg, BatchConfig), self.world.size).describe()
        return text + (f'; less in the first {warmup:,} updates' if warmup else '')

    def disk(self) -> str:
        if self.cfg.init_from not in ('auto', 'scratch', 'resume'):
            return f'not known before {self.cfg.init_from} is loaded'
        vocab_size = self.found['data'].encoding.n_vocab
        config = section(self.cfg, GPTConfig, vocab_size=vocab_size)
        check_size(config)
        with torch.device('meta'):
            model = GPT(config)
        return check_disk(self.cfg, model)
