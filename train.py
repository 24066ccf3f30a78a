"""
Train a GPT, on one process or many.

    python train.py                                                 # a small GPT, offline corpus
    python train.py config/shakespeare_char_cpu.py --max_iters=500  # a config file, a flag on top
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

The same command again resumes where the run stopped, whatever stopped it.
"""

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from gpt.settings import check_bounds, run as run_script, section, settings

# -----------------------------------------------------------------------------
# The defaults train a small GPT on the offline corpus in minutes, on a laptop.
# the run
out_dir = 'out/pydocs'      # checkpoints, log.jsonl and config.py of this run
init_from = 'auto'          # auto: resume if out_dir holds a checkpoint, else scratch; 'scratch';
                            # 'resume'; or where fine-tuning starts: gpt2, a folder, another run
seed = 1337                 # of weights, data order and dropout
max_iters = 1000            # updates in all
eval_interval = 100         # updates between validations; a checkpoint is saved before each
eval_tokens = 1_000_000     # validation tokens: the first of the split, or all it has
eval_iters = 0              # nanoGPT's spelling: eval_tokens = eval_iters * batch_size * block_size
eval_train = False          # True: also the loss of as many training tokens, as nanoGPT prints it
eval_only = False           # validate once and exit; writes nothing
plan = False                # check everything, measure 20 updates, report the cost and exit
minutes = 0.0               # scale max_iters, schedule and eval_interval to end then; 0: as given
log_interval = 10           # updates between lines in the log
sample_interval = 0         # updates between samples in samples.jsonl; 0: none
hellaswag_interval = 0      # updates between HellaSwag scores, each after a checkpoint; 0: none
hellaswag_limit = 0         # only the first N questions; 0: all 10,042
hellaswag_data = ''         # FILE with the questions; '': the official one, downloaded once
save_minutes = 10.0         # minutes between further checkpoints; 0: only at validations
keep = 2                    # checkpoints kept: the newest ones, and the best besides
always_save_checkpoint = True   # False: keep only the newest and the best
patience = 0                # end after this many validations without a lower loss; 0: never
# wandb
wandb_log = False           # mirror the log there too (WANDB_MODE=offline needs no network)
wandb_project = 'gpt2'
wandb_run_name = ''         # '': the name of out_dir
# data
dataset = 'pydocs'          # a folder in data/, made by data/prepare.py; or several with the
                            # fraction of the sequences from each: books:0.7,openwebtext:0.3
val_datasets = ''           # further data sets, such as a,b, only to validate on
data_dir = ''               # where prepared data is; '': data/ beside this script
total_batch_size = 0        # tokens in an update, over all processes; 0: batch_size * block_size
batch_size = 16             # sequences in a micro-batch of one process, at most
gradient_accumulation_steps = 0     # nanoGPT's spelling: micro-batches over all processes
batch_warmup_iters = 0      # updates before the batch is full: a quarter of it for the first half
                            # of them, half of it for the second; 0: full from the start
block_size = 256            # tokens in a sequence
doc_start = False           # True: training sequences begin with a document, where one begins near
# model
n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0               # 0 for pretraining; 0.1 or more for text seen many times
bias = True                 # in Linear and LayerNorm, as GPT-2 has them
activation = 'gelu_new'     # GPT-2's tanh form, or 'gelu', the exact one, as nanoGPT
# optimizer and schedule
optimizer = 'adamw'         # or 'muon': Muon for the blocks' matrices, AdamW for the rest
learning_rate = 1e-3        # maximum, of AdamW
muon_learning_rate = 0.02   # maximum, of Muon
weight_decay = 0.1          # of matrices; not of biases and LayerNorms
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0             # maximum gradient norm; 0: no clipping
schedule = 'cosine'         # or 'wsd': constant, then linear over the last cooldown_iters
decay_lr = True             # False: learning_rate throughout
warmup_iters = 100
lr_decay_iters = 0          # where min_lr is reached; 0: at max_iters
cooldown_iters = 300        # of 'wsd'
min_lr = 1e-4
max_skipped = 10            # non-finite updates in a row that end the run (exit status 3)
spike_z = 6.0               # standard deviations above recent losses that make a spike
rollback = False            # True: after max_skipped non-finite updates or spikes in a row, go back
                            # to the last good checkpoint and continue with the data that follows
# system
device = 'auto'             # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'auto'              # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where native
compile = 'auto'            # True, False; auto: on CUDA, and on CPUs with a compiler when it pays
parallel = 'ddp'            # each process holds the model; 'fsdp': a part, gathered when used
half_residual = 'auto'      # True: blocks add to the residual stream in half precision, if that is
                            # the dtype; auto: on CUDA
kernels = 'auto'            # False: without the Triton kernels of gpt/kernels.py; auto: on CUDA
checkpoint_activations = False      # True: recompute activations in the backward pass: a third
                            # more work, a fraction of the memory
timeout_minutes = 10.0      # processes wait this long for each other, and for what rank 0
                            # downloads, then give up
# -----------------------------------------------------------------------------
Config = settings(globals())
STARTED = time.monotonic()

import torch

from gpt import budget, cpu
from gpt.budget import BatchConfig, BatchPlan, Forecast
from gpt.data.order import draw
from gpt.data.sets import Data
from gpt.device import pick_dtype
from gpt.log import Stopwatch
from gpt.optim import OptimizerConfig, Schedule
from gpt.preflight import Preflight, doubtful, how_it_ended
from gpt.progress import PendingMetrics, Progress
from gpt.run import Run
from gpt.script import is_out_of_memory
from gpt.start import is_fine_tune, starting_point
from gpt.trainer import Trainer, TrainerConfig
from gpt.validation import ValidationConfig, validate
from gpt.world import World

NOTABLE = 0.1               # a change of max_iters that is printed, with --minutes
OLDER = {'half_residual': False, 'kernels': False,
         'logits_per_slice': 2 ** 26}           # of checkpoints without these
BOUNDS = (                  # what is expected, whether a value fits, of which settings
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
    ("'gelu_new' or 'gelu'", ('gelu_new', 'gelu').__contains__, 'activation'),
    ("'cosine' or 'wsd'", ('cosine', 'wsd').__contains__, 'schedule'),
    ("'auto', True or False", ('auto', True, False).__contains__, 'compile half_residual kernels'),
    ("'ddp' or 'fsdp'", ('ddp', 'fsdp').__contains__, 'parallel'),
    ('the name of a folder', lambda value: value and not Path(value).is_file(), 'out_dir'))


def main(cfg, started=None):
    """started: time.monotonic() of the command, if it was not now."""
    started = started or time.monotonic()
    check(cfg)
    if cfg.plan and not Preflight(cfg).run():
        return 2
    world = World.join(cfg.device, cfg.timeout_minutes)
    try:
        with Run(cfg, world) as run:
            status = start(cfg, world, run, started)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ValueError(budget.less_memory(cfg, world.size, error)) from None
        raise
    world.leave()
    if run.save_error and status != 3:
        raise OSError(f'the last checkpoint of {cfg.out_dir} could not be saved '
                      f'({run.save_error}); the one before is intact, and the same command resumes '
                      f'from it')
    return status


def check(cfg):
    """Refuse settings that would only fail later; ValueError names the first."""
    check_bounds(cfg, BOUNDS)
    if cfg.rollback and cfg.keep < 2:
        raise ValueError(f'rollback=True with keep={cfg.keep}: expected keep=2 or more')
    if cfg.decay_lr and cfg.min_lr > cfg.learning_rate:
        raise ValueError(f'min_lr: given {cfg.min_lr}, above learning_rate={cfg.learning_rate}; '
                         f'give a lower one, or --decay_lr=False')
    if cfg.minutes and not cfg.max_iters:
        raise ValueError(f'max_iters: given 0, expected 1 or more: --minutes={cfg.minutes} scales '
                         f'its schedule')


def start(cfg, world, run, started):
    """All that comes before the first update, what fails fast first; then train(). Or validate, or
    report the cost, if only that was asked for. started: time.monotonic() of the command."""
    if not is_fine_tune(cfg):                           # whose model may have a smaller block
        batch_plan(cfg, world)
    crowded = cpu.crowded() if world.device.type == 'cpu' else ''
    for line in [*doubtful(cfg), *filter(None, [crowded])]:
        world.print(line)
    if world.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # TF32, where float32 is multiplied
    data = Data(cfg.dataset, cfg.data_dir, cfg.val_datasets)
    for line in data.doubtful(cfg.block_size):
        world.print(line)
    questions = load_questions(cfg, world, data.encoding)
    run.lock()
    cfg, model, saved, run.has_changed = starting_point(cfg, world, data)
    data.set_order(cfg.block_size, cfg.seed, cfg.doc_start, world.device.type == 'cuda')
    progress = Progress.restore(saved)
    if saved and not cfg.eval_only and (ended := world.on_main(how_it_ended, cfg, progress, saved)):
        world.print(ended)
        return 0
    world, config = computes(cfg, world, saved)
    run.world = world
    trainer = Trainer(model, world, config, section(cfg, OptimizerConfig))
    if saved and saved['settings']['dataset'] != cfg.dataset:
        progress.forget_validations()                   # of another text
    if cfg.eval_only:
        with trainer.evaluating():
            validation = validate(model, data.sets, section(cfg, ValidationConfig), world,
                                  val_sets=data.val_sets)
        world.print(f'step {progress.step}: {validation}, over {validation.tokens:,} tokens')
        return 0
    world.on_main(budget.check_disk, cfg, model)
    if saved:
        trainer.load_state_dict(saved)
    batches = batch_plan(cfg, world, progress.one_shape)
    update = '' if cfg.plan and not is_fine_tune(cfg) else f'an update is {batches.describe()}; '
    world.print(f'{model.num_parameters():,} parameters; {update}'
                f'{data.describe_epochs(cfg.block_size, batches.full.sequences)}')

    batch = [part.to(world.device) for part in data.order.read(progress.position,
                                                               batches.full.micro_batch)]
    micro_batches = batches.full_updates(cfg.max_iters, progress.step) * batches.full.micro_steps
    trainer.prepare(batch, 60 * cfg.minutes or micro_batches and
                    micro_batches * trainer.eager_seconds(batch))
    tokens = min(section(cfg, ValidationConfig).tokens, sum(len(part.val) for part in data.sets))
    visits = 0 if cfg.minutes else cfg.max_iters / cfg.eval_interval    # not yet known
    trainer.compile_validation((cfg.batch_size, cfg.block_size), visits * tokens)
    forecast = Forecast(cfg, batches, budget.save_seconds(trainer))
    if cfg.plan or (cfg.minutes and not saved):
        measure_cost(data, trainer, progress, forecast)
        if cfg.minutes and not saved:
            forecast.ends = started + 60 * cfg.minutes
            cfg = forecast.use(world.on_main(forecast.fit))
        world.print(world.broadcast(forecast.describe_length(progress.step)))
    if cfg.plan:
        return 0
    run.begin(cfg, progress, data, is_new=not saved)
    return train(data, run, trainer, progress, questions, forecast)


def batch_plan(cfg, world, one_shape=True):
    return BatchPlan(section(cfg, BatchConfig), world.size, one_shape)


def computes(cfg, world, saved):
    """(the World with its dtype, the TrainerConfig). What is 'auto' stays as it was when the same
    run resumes on such a device: a new measurement could round otherwise."""
    before = {**OLDER, **saved.get('computes', {})}
    same = (before.get('device') == world.device.type
            and saved['settings']['max_iters'] == cfg.max_iters)
    if same and cfg.dtype == 'auto':
        dtype, reason = getattr(torch, before['dtype']), 'as before'
    else:
        dtype, reason = world.on_main(pick_dtype, cfg.dtype, world.device, True)
    if same or not cfg.plan:                            # which has said it
        world.print(f'device {world.device}; {str(dtype)[6:]}: {reason}')
    as_before = {key: before[key]
                 for key in ('compile', 'half_residual', 'kernels', 'logits_per_slice')
                 if same and getattr(cfg, key, 'auto') == 'auto'}
    return replace(world, dtype=dtype), section(
        cfg, TrainerConfig, **as_before, compile_as_before='compile' in as_before)


def measure_cost(data, trainer, progress, forecast):
    """Measure what an update and a validation take, and print it."""
    cfg, world, batches = forecast.cfg, trainer.world, forecast.plan
    passes = partial(forward_backward, cfg.seed, data, trainer, progress)
    forecast.cost = budget.measure(trainer, passes, batches, cfg.minutes)
    available = sum(len(part.val) for part in data.sets)
    with trainer.evaluating():
        run_validation = partial(validate, trainer.validator, data.sets, world=world,
                                 val_sets=data.val_sets)
        forecast.took['eval_interval'] = budget.time_validation(
            run_validation, section(cfg, ValidationConfig), available, world)
    world.print(budget.describe_cost(trainer, forecast.cost, batches.tokens_per_update))


def train(data, run, trainer, progress, questions, forecast):
    """The loop; returns the exit status: 0, or 3 if the run diverged."""
    cfg, world = forecast.cfg, trainer.world
    metrics, stopwatch = PendingMetrics(world.device), Stopwatch()
    intervals = cfg.eval_interval, cfg.hellaswag_interval, cfg.sample_interval
    run_validation = partial(validate, trainer.validator, data.sets, section(cfg, ValidationConfig),
                             world, lambda: run.signal.received, data.val_sets)
    while True:
        # once in a while: save first, so that nothing below can lose work
        finished = progress.step >= cfg.max_iters
        validation_due = finished or progress.due(cfg.eval_interval)
        hellaswag_due = questions and progress.due(cfg.hellaswag_interval)
        save_due = validation_due or hellaswag_due or run.save_requested
        if finished or run.stop_requested or (save_due and progress.is_healthy):
            run.save(progress, trainer)
        if validation_due and not run.stop_requested:
            with trainer.evaluating(), forecast.pause('eval_interval'):
                validation = run_validation()
            if validation is None:              # stopped in the middle of it: a resume repeats it
                run.stop_requested = True
                continue
            run.validated(progress, validation)
            finished |= progress.out_of_patience(cfg.patience * cfg.eval_interval)
        run.settle(progress)
        if not run.stop_requested:
            score_and_sample(questions if hellaswag_due or finished else [], data.encoding, run,
                             trainer, progress, forecast)
        if finished or run.stop_requested:
            break

        # one update: forward and backward for each micro-batch, one reduction, one step
        cfg = refit(run, progress, forecast)
        stopwatch.start()
        batch = forecast.plan.at(progress.step)
        learning_rate = section(cfg, Schedule).learning_rate_at(progress.step)
        trainer.set_learning_rate(learning_rate)
        loss = forward_backward(cfg.seed, data, trainer, progress, batch)
        norm = trainer.grad_norm()
        loss, stop, save = world.reduce(torch.stack([loss / world.size, *run.requests(loss)]))
        trainer.step(loss, norm)                # clipped; skipped on the device if not finite
        progress.advance(batch.sequences)

        # what came of it; on a GPU read one update late, so that it never waits for us
        metrics.push(progress.step, torch.stack([loss, stop, save, norm]))
        log_due = progress.step % cfg.log_interval == 0 or progress.step == cfg.max_iters
        for m in metrics.read(everything=log_due or any(map(progress.due, intervals))):
            run.heed(m)
            run.event(m.step, progress.judge(m, cfg.spike_z))
        forecast.updated(batch, stopwatch.stop(batch.sequences * cfg.block_size))
        if log_due or run.stop_requested:
            run.log_update(progress, m, learning_rate, stopwatch.read(), trainer, forecast)
        if progress.bad >= cfg.max_skipped:
            metrics.clear()
            progress = run.recover(progress, trainer)
            if progress.diverged:
                break

    run.finish(progress)
    return 3 if progress.diverged else 0


def refit(run, progress, forecast):
    """Make the rest of the schedule longer or shorter, if the run would not end in time; the
    settings. A resume takes them from the checkpoint."""
    before, fit = forecast.cfg.max_iters, {}
    if forecast.is_due(progress.step):
        fit = run.world.on_main(forecast.refit, progress.step)
    if fit:
        run.cfg, run.has_changed = forecast.use(fit), True
        with suppress(OSError):                         # a full disk does not end a run
            run.world.on_main(run.write_config)
        text = f"max_iters {before} -> {fit['max_iters']}, to end in time"
        notable = abs(fit['max_iters'] - before) > NOTABLE * before
        run.log.event(progress.step, 'fit', text, quiet=not notable, **fit)
    return forecast.cfg


def forward_backward(seed, data, trainer, progress, batch):
    """The forward and backward passes of an update; the mean loss of this rank's micro-batches."""
    world = trainer.world
    loss = torch.zeros((), device=world.device)
    micro_batches = data.micro_batches(progress.position, batch, world.rank)
    for number, (index, x, y) in enumerate(micro_batches, 1):
        x, y = (part.to(world.device, non_blocking=True) for part in (x, y))
        torch.manual_seed(int(draw(f'{seed}:{progress.step}:{index}', 1)[0]))   # for dropout
        loss += trainer.backward(x, y, batch.micro_steps, last=number == batch.micro_steps)
    return loss


# HellaSwag and samples of a run.

def load_questions(cfg, world, encoding):
    """The questions of HellaSwag, if the run is scored by them: checked before it starts."""
    if not cfg.hellaswag_interval:
        return []
    import hellaswag
    questions, _ = world.on_main(hellaswag.benchmarks.hellaswag, cfg.hellaswag_data)
    questions = questions[:cfg.hellaswag_limit or None]
    items = [hellaswag.render(question, encoding, 'completion') for question in questions]
    hellaswag.scoring.check(items, cfg.block_size)
    return questions


def score_and_sample(questions, encoding, run, trainer, progress, forecast):
    """The score on these questions, if any are given, and a sample, if one is due."""
    if questions:
        with forecast.pause('hellaswag_interval'):
            run.write_scores(progress, score_hellaswag(trainer, encoding, questions))
    if progress.due(run.cfg.sample_interval):
        with forecast.pause('sample_interval'):
            run.log.sample(progress.step, draw_sample(trainer, encoding, run.cfg.seed))


def score_hellaswag(trainer, encoding, questions):
    """The scores of `python hellaswag.py` for this step, on the uncompiled model in float32; of a
    sharded model in the dtype it trains in."""
    import hellaswag
    with trainer.evaluating() as model:
        answers = hellaswag.evaluate(model, encoding, questions, world=trainer.world)
    return {'hellaswag': sum(answers['acc_norm']) / len(questions),
            'hellaswag_sum': sum(answers['acc']) / len(questions)}


def draw_sample(trainer, encoding, seed):
    """A document of up to a hundred tokens, drawn with the same random numbers each time, on rank
    0; '' elsewhere. Without <|endoftext|> it is what follows token 0."""
    with trainer.evaluating():
        model = trainer.full_model(keep=trainer.world.is_main)      # of a sharded one on the CPU
        if not trainer.world.is_main:
            return ''
        eot = encoding.eot
        ids = torch.tensor([[eot or 0]], device=model.wte.weight.device)
        ids = model.eval().generate(ids, 100, top_k=200, seed=seed,
                                    stop=() if eot is None else (eot,))
    return encoding.decode([i for i in ids[0, 1:].tolist() if i != eot])


if __name__ == '__main__':
    run_script(partial(main, started=STARTED), Config)
