"""
Train a GPT, on one process or many.

    python train.py                                                 # a small GPT, offline corpus
    python train.py config/shakespeare_char_cpu.py --max_iters=500  # a config file, a flag on top
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

The same command again goes on where the run stopped, whatever stopped it.
"""

import math
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch.nn.utils import get_total_norm

from gpt import checkpoints
from gpt import distributed
from gpt import budget as planning
from gpt import replicas
from gpt import starting
from gpt import tokenizer
from gpt.settings import run, settings
from gpt.data.order import Ahead, describe_epochs, draw, load_data, make_batches
from gpt.journal import Log, StopSignal, Stopwatch, Watch, duration
from gpt.optimizers import learning_rate_at, make_optimizers, update
from gpt.budget import batch_at, divide_batch
from gpt.validation import describe, validate

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
eval_only = False           # validate once, write nothing, leave
plan = False                # check everything, measure 20 updates, say what the run takes, leave
minutes = 0.0               # fit max_iters and the schedule into so many; 0: as they are given
log_interval = 10           # updates between lines in the log
sample_interval = 0         # updates between samples in samples.jsonl, 0: none
hellaswag_interval = 0      # updates between HellaSwag scores, each after a checkpoint, 0: none
hellaswag_limit = 0         # of its first so many questions, 0: of all 10,042
hellaswag_data = ''         # FILE with them; '': the official one, downloaded once
save_minutes = 10.0         # and a checkpoint every so many minutes; 0: only at validations
keep = 2                    # checkpoints kept: the newest so many, and the best
always_save_checkpoint = True   # False: keep only the newest and the best
patience = 0                # end after so many validations without a lower loss, 0: never
# wandb
wandb_log = False           # mirror the log there too (WANDB_MODE=offline needs no network)
wandb_project = 'gpt2'
wandb_run_name = ''         # '': the name of out_dir
# data
dataset = 'pydocs'          # a folder in data/, made by data/prepare.py; or several and what share
                            # of the sequences each gives: books:0.7,openwebtext:0.3
data_dir = ''               # where prepared data lies; '': data/ beside this script
total_batch_size = 0        # tokens in an update, over all processes; 0: batch_size * block_size
batch_size = 16             # sequences in a micro-batch of one process, as its memory allows
gradient_accumulation_steps = 0     # nanoGPT's way to say it: micro-batches over all processes
batch_warmup_iters = 0      # updates before the batch is whole: a quarter of it for the first half
                            # of them, half of it for the second; 0: whole from the start
block_size = 256            # tokens in a sequence
doc_start = False           # True: training sequences begin with a document, where one begins near
# model
n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.0               # 0 for pretraining; 0.1 or more for text seen many times
bias = True                 # in Linear and LayerNorm, as GPT-2 has them
# optimizer and schedule
optimizer = 'adamw'         # or 'muon': Muon for the blocks' matrices, AdamW for all else
learning_rate = 1e-3        # of AdamW, at its highest
muon_learning_rate = 0.02   # of Muon, at its highest
weight_decay = 0.1          # of matrices; not of biases and LayerNorms
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0             # longest gradient, 0: any
schedule = 'cosine'         # or 'wsd': constant, then linear over the last cooldown_iters
decay_lr = True             # False: learning_rate throughout
warmup_iters = 100
lr_decay_iters = 0          # where min_lr is reached; 0: at max_iters
cooldown_iters = 300        # of 'wsd'
min_lr = 1e-4
max_skipped = 10            # so many non-finite updates in a row end the run (exit status 3)
spike_z = 6.0               # a loss so many standard deviations above the last ones is a spike
rollback = False            # True: after max_skipped non-finite updates or spikes in a row, go back
                            # to the last good checkpoint and on with the data that come next
# system
device = 'auto'             # 'cpu', 'cuda', 'cuda:1', 'mps'; auto: cuda, else mps, else cpu
dtype = 'auto'              # 'float32', 'bfloat16', 'float16'; auto: bfloat16 where native
compile = 'auto'            # True, False; auto: on CUDA, and on CPUs with a compiler when it pays
parallel = 'ddp'            # processes hold all of the model; 'fsdp': each a share, gathered in use
checkpoint_activations = False      # True: blocks compute again in the backward pass what they
                            # would keep: a third more work, a fraction of the memory
timeout_minutes = 10.0      # processes wait for each other so long, then give up
# -----------------------------------------------------------------------------
Config = settings(globals())

MAX_ROLLBACKS = 5           # of a run: what comes again and again is not the data


@dataclass
class Progress:
    """How far a run has come: with weights and optimizer, all that a resume needs."""
    step: int = 0                       # updates done, skipped ones included
    position: int = 0                   # sequences consumed
    skipped: int = 0                    # updates that were not finite
    best_val_loss: float = math.inf
    best_step: int = -1
    spikes: int = 0                     # times that the loss jumped
    rollbacks: int = 0
    bad: int = 0                        # updates in a row, until now, not finite or spikes,
    not_finite: int = 0                 # and of these not finite, in a row
    good_until: int = 0                 # updates done before the first of them


def main(cfg):
    starting.check(cfg)
    if cfg.plan and not planning.look(cfg):
        return 2
    try:
        return train(cfg)
    except (RuntimeError, MemoryError) as error:
        if distributed.is_out_of_memory(error):
            raise ValueError(planning.less_memory(cfg, error)) from None
        raise


def train(cfg):
    began = time.monotonic()
    world = distributed.join(cfg.device, cfg.timeout_minutes)
    say = print if world.is_main else no_one
    for share in reversed(planning.shares(cfg)):        # refuses what could only fail later
        sequences, micro_batch, micro_steps = divide_batch(cfg, world.size, share)
    tokens_per_update = sequences * cfg.block_size
    dtype, why = distributed.on_main(world, distributed.pick_dtype, cfg.dtype, world.device, True)
    say(f'device {world.device}; {str(dtype)[6:]}: {why}')
    if world.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # TF32, where float32 is multiplied

    sets, encoding = load_data(cfg.dataset, cfg.data_dir)
    train_data = make_batches(sets, encoding, cfg.block_size, cfg.seed, cfg.doc_start)
    questions = load_questions(cfg, world, encoding)
    lock = starting.take_lock(cfg, world)
    cfg, model, saved = starting.start(cfg, world, encoding, say)
    shards = starting.check_same_data(saved, sets, cfg)
    if cfg.parallel == 'fsdp' and world.size > 1:
        replicas.shard(model, world.device, dtype)
    model.to(world.device).train()
    model.checkpoint_activations = cfg.checkpoint_activations
    autocast = partial(torch.autocast, world.device.type, dtype, enabled=dtype != torch.float32,
                       cache_enabled=False)             # a weight is used once in a forward pass
    now, watch = Progress(**saved.get('progress', {})), Watch(saved.get('watch'))
    if saved and saved['settings']['dataset'] != cfg.dataset:       # losses of another text
        now.best_val_loss, now.best_step = math.inf, -1
    if cfg.eval_only:
        val_loss, others, count = validate(model, sets, cfg, world, autocast)
        say(f'step {now.step}: {describe(val_loss, others)}, over {count:,} tokens')
        return distributed.leave()
    distributed.on_main(world, planning.check_disk, cfg, model)
    optimizers = make_optimizers(model, cfg, dtype)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
    if saved:
        checkpoints.restore_optimizers(model, optimizers, saved.pop('optimizer'))
        scaler.load_state_dict(saved['scaler'])

    say(f'{model.num_parameters():,} parameters; an update is '
        f'{tokens_per_update:,} tokens = {world.size} process{"es" * (world.size > 1)} x '
        f'{micro_steps} micro-batch{"es" * (micro_steps > 1)} x {micro_batch} x {cfg.block_size}; '
        f'{describe_epochs(sets, cfg.block_size, sequences)}')
    first = [part.to(world.device) for part in train_data.read(now.position, micro_batch)]
    ahead = Ahead(train_data, pin=world.device.type == 'cuda')
    peak = distributed.measure_peak(world.device, dtype)
    seconds = (model.flops_per_token() * tokens_per_update * max(0, cfg.max_iters - now.step) /
               (peak * world.size) if peak else math.inf)           # at the least
    seconds = 60 * cfg.minutes or seconds
    replica = replicas.make_replica(model, cfg, world, autocast, first, dtype, seconds, say)
    compute = partial(gradients, model, replica, ahead, world=world, scaler=scaler,
                      autocast=autocast)
    if cfg.plan or (cfg.minutes and not saved):
        times = (*planning.trial(compute, now, cfg, optimizers, scaler, world),
                 planning.time_visit(model, sets, cfg, world, autocast))
        spent = distributed.broadcast(time.monotonic() - began)
        say(planning.describe_trial(model, world, times, tokens_per_update, peak))
        cfg = planning.fit(cfg, times, spent) if cfg.minutes and not saved else cfg
        say(planning.describe_length(cfg, now.step, times, tokens_per_update))
        if cfg.plan:
            return distributed.leave()
    distributed.on_main(world, starting.write_config, cfg)
    log, clock = Log(cfg, world, say), Stopwatch()
    stop = StopSignal(world.is_main, distributed.joined())
    log.start(now.step, world, dtype)
    saved_at, saved_time, validated = now.step if saved else 0, time.monotonic(), -1
    asked_to_stop = save_due = diverged = False
    save = partial(save_checkpoint, cfg, world, model, encoding, optimizers, scaler, shards)
    underway, unsaved = [], None

    while True:
        # once in a while: save, and only then validate: if validating fails, nothing is lost
        finished = now.step >= cfg.max_iters
        due = finished or now.step % cfg.eval_interval == 0
        quiz = questions and now.step % cfg.hellaswag_interval == 0
        calm = not now.bad                              # what may be rolled back is not kept
        if ((due or quiz or save_due) and calm or finished or asked_to_stop) and (
                saved_at != now.step and not diverged):
            if unsaved := save(now, watch):             # a full disk: perhaps there is room later
                log.event(now.step, 'save failed', f'cannot save: {unsaved}; going on')
            else:
                saved_at = now.step
            saved_time = time.monotonic()
        if due and not asked_to_stop and validated != now.step:
            found = validate(model, sets, cfg, world, autocast, stop)
            if asked_to_stop := found is None:          # in the middle of it: a resume repeats it
                continue
            val_loss, others, _ = found
            validated = now.step
            if val_loss < now.best_val_loss and saved_at == now.step:
                now.best_val_loss, now.best_step = val_loss, now.step
                with suppress(OSError):                     # the next checkpoint knows it too
                    if now.step:                            # nothing is saved before the first
                        distributed.on_main(world, checkpoints.mark_best, cfg.out_dir, now.step,
                                            val_loss)
            rest = cfg.patience * cfg.eval_interval         # as long without a better one
            finished = finished or 0 < rest <= now.step - now.best_step
            log.write(step=now.step, tokens=now.position * cfg.block_size, val_loss=val_loss,
                      **others)
            say(f'step {now.step}: {describe(val_loss, others)}')
        if saved_at == now.step and calm and world.is_main:
            checkpoints.prune(cfg.out_dir, planning.newest_kept(cfg), now.best_step)
        if (quiz or questions and finished) and not asked_to_stop:
            scores = score_hellaswag(model, encoding, questions, world)
            log.write(step=now.step, tokens=now.position * cfg.block_size, **scores)
            say(f"step {now.step}: hellaswag {scores['hellaswag']:.2%} of {len(questions):,}")
        if cfg.sample_interval and now.step % cfg.sample_interval == 0:
            log.sample(now.step, draw_sample(model, encoding, cfg.seed, world))
        if finished or asked_to_stop or diverged:
            break

        # one update: a forward and a backward pass for each micro-batch, then one step
        clock.start()
        lr = learning_rate_at(now.step, cfg)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = group['initial_lr'] * lr / cfg.learning_rate
        loss, norm, sequences = compute(now, cfg, optimizers)
        save_due = world.is_main and 0 < cfg.save_minutes < (time.monotonic() - saved_time) / 60
        wishes = [torch.full_like(loss, wish) for wish in (stop.requested, save_due)]
        votes = distributed.all_reduce(torch.stack([loss / world.size, *wishes]))
        update(optimizers, votes[0], norm, cfg.grad_clip)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        now.step, now.position = now.step + 1, now.position + sequences

        # what came of it: on a GPU read an update later, so that it never waits for us
        underway.append(Numbers(now.step, torch.cat([votes, norm[None]])))
        logging = now.step % cfg.log_interval == 0 or now.step == cfg.max_iters
        pause = logging or any(every and now.step % every == 0 for every in (
            cfg.eval_interval, cfg.hellaswag_interval, cfg.sample_interval))
        asked_to_stop = save_due = False
        while len(underway) > (world.device.type == 'cuda'
                               and not (pause or asked_to_stop or save_due)):
            step, (loss, stops, saves, norm) = underway.pop(0).read()
            asked_to_stop, save_due = stops > 0, saves > 0  # on all ranks, if any wishes so
            scores = judge(step, loss, norm, now, watch, cfg, log)
        clock.stop(sequences * cfg.block_size)

        if logging or asked_to_stop:
            seconds, rate = clock.read()
            left = planning.whole_updates(cfg, now.step) * tokens_per_update / rate
            mfu = peak and model.flops_per_token() * rate / (peak * world.size)
            log.write(step=now.step, tokens=now.position * cfg.block_size, loss=loss, lr=lr,
                      grad_norm=norm, loss_z=scores[0], grad_norm_z=scores[1],
                      step_ms=1000 * seconds, tokens_per_second=rate, mfu=mfu)
            say(f'step {now.step}/{cfg.max_iters}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  '
                f'{1000 * seconds:.0f} ms  {rate:,.0f} tok/s  {f"mfu {mfu:.0%}  " if mfu else ""}'
                f'left {duration(left)}')
        if now.bad >= cfg.max_skipped:
            underway.clear()
            back = cfg.rollback and now.rollbacks < MAX_ROLLBACKS and roll_back(
                now, model, optimizers, scaler, cfg, world, log)
            if back:
                now, watch = back
                saved_at = validated = now.step
                asked_to_stop = save_due = False
            elif cfg.rollback or now.not_finite >= cfg.max_skipped:
                diverged = True
            elif not now.not_finite:                    # it has come to stay
                log.event(now.step, 'level', f'the loss stays near {loss:.4f}; that is normal now')
                watch, now.bad = Watch(), 0

    say(closing_words(cfg, now, diverged, finished and not asked_to_stop))
    log.finish()
    stop.restore()
    distributed.leave()
    lock.close()
    if unsaved and not diverged:
        raise OSError(f'the last checkpoint of {cfg.out_dir} could not be saved ({unsaved}); '
                      f'the one before is whole, and the same command goes on from it')
    return 3 if diverged else 0


def save_checkpoint(cfg, world, model, encoding, optimizers, scaler, shards, now, watch):
    """Save where `now` stands, and what it takes to go on from there; the error on every rank if
    rank 0 cannot."""
    state = {'progress': asdict(now), 'settings': asdict(cfg), 'shards': shards,
             'optimizer': checkpoints.optimizer_state(model, optimizers, world.is_main),
             'scaler': scaler.state_dict(), 'watch': watch.state}
    try:
        distributed.on_main(world, checkpoints.save, cfg.out_dir, now.step,
                            replicas.unsharded(model, world.is_main), encoding, state)
    except OSError as error:
        return error


def gradients(model, replica, ahead, now, cfg, optimizers, *, world, scaler, autocast):
    """The forward and backward passes of one update: (mean loss of this rank's micro-batches,
    norm of the gradients, which then lie in the parameters; sequences in the update)."""
    sequences, micro_batch, micro_steps = batch_at(now.step, cfg, world.size)
    loss = torch.zeros((), device=world.device)
    for i in range(micro_steps):
        index = world.rank * micro_steps + i                # of the micro-batch within the update
        here = now.position + index * micro_batch
        last = i == micro_steps - 1
        after = sequences - i * micro_batch if last else micro_batch        # to this rank's next
        x, y = ahead.read(here, micro_batch, then=here + after)
        x, y = (part.to(world.device, non_blocking=True) for part in (x, y))
        torch.manual_seed(int(draw(f'{cfg.seed}:{now.step}:{index}', 1)[0]))        # for dropout
        with replicas.reduce_gradients(replica, last):
            with autocast():
                micro_loss = replica(x, y) / micro_steps
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in model.parameters()])
    return loss, norm.full_tensor() if replicas.is_sharded(norm) else norm, sequences


def judge(step, loss, norm, now, watch, cfg, log):
    """Note in `now`, `watch` and the log how the update number `step` went; its z-scores."""
    finite = math.isfinite(norm) and math.isfinite(loss)
    scores = watch.score(loss, norm)
    spike = finite and cfg.spike_z and scores[0] is not None and scores[0] > cfg.spike_z
    if finite and not spike:
        watch.learn(loss, norm)
        now.bad = now.not_finite = 0
        now.good_until = step
        return scores
    now.bad += 1
    now.not_finite = 0 if finite else now.not_finite + 1
    if not finite:
        now.skipped += 1
        log.event(step, 'skipped', f'loss {loss}, norm {norm}: skipped ({now.skipped} so far)')
    elif now.bad == 1:
        now.spikes += 1
        log.event(step, 'spike', f'loss {loss:.4f}, {scores[0]:.1f} standard deviations above the '
                                 f'last ones; norm {norm:.2f}')
    return scores


def roll_back(now, model, optimizers, scaler, cfg, world, log):
    """(Progress, Watch) of the last checkpoint from before things went wrong, with its weights and
    moments in place, and the position where we are: what was read since is left out. None if there
    is no such checkpoint."""
    folder = distributed.on_main(world, checkpoints.back_to, cfg.out_dir, now.good_until)
    if not folder:
        return None
    saved, (gpt, _) = checkpoints.load_training(folder), checkpoints.load_folder(folder)
    with torch.no_grad():
        for p, q in zip(model.parameters(), gpt.parameters(), strict=True):
            p.copy_(replicas.like(q, p))
    checkpoints.restore_optimizers(model, optimizers, saved['optimizer'])
    scaler.load_state_dict(saved['scaler'])
    back = replace(Progress(**saved['progress']), position=now.position, skipped=now.skipped,
                   spikes=now.spikes, rollbacks=now.rollbacks + 1, best_step=now.best_step,
                   best_val_loss=now.best_val_loss)
    left_out = (now.position - saved['progress']['position']) * cfg.block_size
    log.event(now.step, 'rollback', f'{now.bad} bad updates in a row: back to step {back.step}; '
              f'{left_out:,} tokens are left out', to_step=back.step, left_out=left_out)
    return back, Watch(saved['watch'])


def no_one(*words):
    """What a rank other than 0 says."""


class Numbers:
    """What an update found, on its way from the device; read() waits until it is there."""

    def __init__(self, step, numbers):
        self.step, self.there = step, torch.cuda.Event() if numbers.is_cuda else None
        self.numbers = numbers.to('cpu', non_blocking=numbers.is_cuda)
        if self.there:
            self.there.record()

    def read(self):
        if self.there:
            self.there.synchronize()
        return self.step, self.numbers.tolist()


# HellaSwag and samples.

def load_questions(cfg, world, encoding):
    """HellaSwag's rows, if the run is to be scored by them: what could fail, fails at the start."""
    if not cfg.hellaswag_interval:
        return []
    import hellaswag
    rows, _ = distributed.on_main(world, hellaswag.benchmarks.hellaswag, cfg.hellaswag_data)
    rows = rows[:cfg.hellaswag_limit or None]
    items = [hellaswag.render(row, encoding, 'completion') for row in rows]
    hellaswag.likelihood.check(items, cfg.block_size)
    return rows


def score_hellaswag(model, encoding, rows, world):
    """What `python hellaswag.py` would say of this step, on the uncompiled model in float32."""
    import hellaswag
    gpt = replicas.unsharded(model).to(world.device).eval()
    answers = hellaswag.evaluate(gpt, encoding, rows, world=world)
    model.train()
    return {'hellaswag': sum(answers['acc_norm']) / len(rows),
            'hellaswag_sum': sum(answers['acc']) / len(rows)}


def draw_sample(model, encoding, seed, world):
    """A document of up to a hundred tokens (where there is no <|endoftext|>, what comes after token
    0), by the same random numbers each time; '' on all ranks but 0."""
    gpt = replicas.unsharded(model, world.is_main)
    if not world.is_main:
        return ''
    eot = tokenizer.eot_id(encoding)
    ids = torch.tensor([[eot or 0]], device=world.device)
    out = gpt.to(world.device).eval().generate(ids, 100, top_k=200, seed=seed,
                                               stop=() if eot is None else (eot,))
    model.train()
    return encoding.decode([i for i in out[0, 1:].tolist() if i != eot])


def closing_words(cfg, now, diverged, finished):
    there = checkpoints.steps(cfg.out_dir)
    if diverged:
        what = 'not finite' if now.not_finite >= cfg.max_skipped else 'not finite or far too high'
        words = (f'stopped at step {now.step}: {cfg.max_skipped} updates in a row were {what}. '
                 f'Common causes: a learning rate too high, float16, damaged data. ' + (
                     f'The last checkpoint in {cfg.out_dir} is from before' if there else
                     'There is no checkpoint from before'))
    elif not finished:
        words = f'stopped at step {now.step}, the same command goes on'
    elif now.step < cfg.max_iters:
        words = f'ended at step {now.step}, {cfg.patience} validations after the best'
    else:
        words = f'finished {now.step} updates'
    if finished and now.best_step == 0 < now.step:
        words += (f'; no validation was better than the one before training '
                  f'({now.best_val_loss:.4f}): try a lower --learning_rate, in another --out_dir')
    for count, what in ((now.skipped, 'skipped'), (now.spikes, 'spikes'),
                        (now.rollbacks, 'rolled back')):
        words += f', {count} {what}' * bool(count)
    if now.best_step in there:
        words += (f'; best val_loss {now.best_val_loss:.4f} at step {now.best_step}. '
                  f'`python sample.py --model={cfg.out_dir}` writes with that one, the best')
    return words


if __name__ == '__main__':
    run(main, Config)
