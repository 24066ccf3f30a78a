"""
train.py with a fault injected: FAULT='KIND RANK UPDATE [TIMES]' python tests/faulty.py …

RANK is a number or 'all'. UPDATE counts from 0 by the data that were read, so that a fault stays
with its data when a run rolls back. Signals are not sent again after torchrun has restarted.
"""

import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from gpt import checkpoints, preflight, steps
from gpt.settings import run
from model import GPT

KIND, RANK, UPDATE, TIMES = (*os.environ['FAULT'].split(), '1')[:4]
HERE = RANK in ('all', os.environ.get('RANK', '0'))
UPDATES = range(int(UPDATE), int(UPDATE) + int(TIMES))
FIRST_START = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0'
forward_backward, loss, write = train.forward_backward, GPT.loss, checkpoints.write
factor = 1.0


def faulty_forward_backward(seed, data, trainer, p, batch):
    global factor
    due = HERE and p.position // batch.sequences in UPDATES
    if due and FIRST_START and KIND in ('SIGKILL', 'SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1',
                                        'SIGSTOP'):
        os.kill(os.getpid(), getattr(signal, KIND))
    factor = {'nan': math.nan, 'high_loss': 1000.0}.get(KIND, 1.0) if due else 1.0
    return forward_backward(seed, data, trainer, p, batch)


def faulty_loss(self, x, targets):
    return loss(self, x, targets) * factor if self.training else loss(self, x, targets)


def faulty_write(partial, model, encoding, training):
    """UPDATE is the step that is saved."""
    due = training['progress']['step'] in UPDATES and FIRST_START
    write(partial, model, encoding, training)
    if due and KIND == 'kill_before_manifest':
        (partial / 'manifest.json').unlink()
    if due and KIND.startswith('kill_'):
        os.kill(os.getpid(), signal.SIGKILL)
    if due and KIND.endswith('_in_save'):
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, KIND.removesuffix('_in_save')))
    if due and KIND == 'slow_save':
        time.sleep(60)


def no_data(*args):
    raise ValueError('no data here')


train.forward_backward, GPT.loss = faulty_forward_backward, faulty_loss
checkpoints.write = faulty_write
if KIND == 'blind' and HERE:                    # this rank sees no checkpoint
    steps.all_steps = lambda out_dir: {}
if KIND == 'no_data' and HERE:
    preflight.Data = no_data
if KIND == 'memory':                            # 2 GB beyond what is in use now
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 31, used + 2 ** 31))
if KIND == 'clock':                             # jumps by days, back and forth
    real, jumps = time.time, iter(range(10 ** 9))
    time.time = lambda: real() + (-1) ** next(jumps) * 1e6

if __name__ == '__main__':
    run(train.main, train.Config)
