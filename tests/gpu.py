"""
What no CPU can test, in about six minutes on one CUDA card, with real processes:

    python tests/gpu.py

Prints a line for each check and exits with status 1 if one failed, 2 without a card. With two cards
or more it also trains on two, with DDP and FSDP.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpt import generate, kernels
from gpt.optim import OptimizerConfig
from gpt.trainer import Trainer, TrainerConfig, use_kernels
from gpt.world import World
from model import GPT, GPTConfig, slice_loss

SMALL = {'dataset': 'text', 'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'block_size': 256,
         'batch_size': 16, 'total_batch_size': 16 * 16 * 256, 'max_iters': 60, 'dropout': 0.1,
         'eval_interval': 20, 'eval_tokens': 20_000, 'log_interval': 1, 'warmup_iters': 5,
         'save_minutes': 0.0, 'compile': False}
HALF = (torch.bfloat16 if torch.cuda.is_available()
        and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16)
NAME = str(HALF)[6:]
SHAPE = GPTConfig(block_size=256, vocab_size=50257, n_layer=4, n_head=4, n_embd=256)


def main():
    if not torch.cuda.is_available():
        print('no CUDA card: nothing was tested')
        return 2
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}', flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run('data/prepare.py', '--name=text', '--tokenizer=bpe:2048', '--data_dir=data',
            str(ROOT / 'docs'), str(ROOT / 'README.md'))
        for check in CHECKS:
            start = time.perf_counter()
            try:
                outcome, found = 'ok', check()
            except Exception as error:
                outcome, found = 'FAILED', f'{type(error).__name__}: {error}'
                failed += 1
            print(f'{outcome:7}{time.perf_counter() - start:6.1f} s  {check.__doc__}: {found}',
                  flush=True)
    return int(failed > 0)


def run(script, *args, processes=0, **settings):
    """Output of a script of the repository; processes: under torchrun."""
    flags = [f'--{key}={value}' for key, value in settings.items()]
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    done = subprocess.run([sys.executable, *(torchrun if processes else []), str(ROOT / script),
                           *args, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-1500:]
    return done.stdout


def train(out_dir, processes=0, **changes):
    return run('train.py', processes=processes, data_dir='data', out_dir=out_dir,
               **{**SMALL, **changes})


def losses(out_dir):
    """{step: loss}, the last record of each step."""
    records = map(json.loads, Path(out_dir, 'log.jsonl').read_text().splitlines())
    return {record['step']: record['loss'] for record in records if 'loss' in record}


def difference(a, b):
    """The largest difference of two curves over the same steps."""
    a, b = losses(a), losses(b)
    assert set(a) == set(b), 'the runs have different steps'
    return max(abs(a[step] - b[step]) for step in a)


def killed_and_resumed(dtype):
    """The largest difference of the losses of a run that was killed and of one that was not."""
    train(f'whole_{dtype}', dtype=dtype)
    flags = [f'--{key}={value}' for key, value in SMALL.items()]
    process = subprocess.Popen([sys.executable, str(ROOT / 'train.py'), '--data_dir=data', *flags,
                                f'--out_dir=killed_{dtype}', f'--dtype={dtype}'],
                               stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path(f'killed_{dtype}/step_0000020/manifest.json').exists():
        assert time.monotonic() < deadline and process.poll() is None, 'no checkpoint to resume'
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 'resuming from' in train(f'killed_{dtype}', dtype=dtype)
    worst = difference(f'whole_{dtype}', f'killed_{dtype}')
    assert worst < 1e-2, worst
    return f'largest difference of a loss {worst:.1e}'


def resume_float32():
    """kill -9 and resume, float32"""
    return killed_and_resumed('float32')


def resume_half():
    """kill -9 and resume, half precision"""
    return killed_and_resumed(NAME)


def float16():
    """float16 with its scaler against float32, no dropout (whose masks differ by kernel)"""
    train('float16', dtype='float16', dropout=0.0)
    train('float32', dtype='float32', dropout=0.0)
    first, second = losses('float16'), losses('float32')
    last = abs(first[60] - second[60])          # the scaler skips updates until its scale fits
    assert last < 0.2, last
    return f'difference of the last loss {last:.4f}'


def compiled():
    """compiled against eager, half precision, no dropout"""
    text = train('compiled', dtype=NAME, compile=True, dropout=0.0)
    assert 'compiled in' in text, text
    train('eager', dtype=NAME, dropout=0.0)
    worst = difference('compiled', 'eager')
    assert worst < 0.05, worst
    seconds = text.partition('compiled in ')[2].partition(' s')[0]
    return f'largest difference of a loss {worst:.4f}; compiled in {seconds} s'


def recomputed_dropout():
    """compiled, with dropout and recomputed activations: resumed against never stopped"""
    options = {'dtype': NAME, 'compile': True, 'checkpoint_activations': True}
    train('recomputed', **options)
    train('again', **options, max_iters=40, lr_decay_iters=60)
    train('again', **options, lr_decay_iters=60)
    worst = difference('recomputed', 'again')
    assert worst < 1e-2, worst
    return f'largest difference of a loss {worst:.1e}'


def one_process_nccl():
    """torchrun with NCCL, one process, Muon"""
    train('nccl', processes=1, optimizer='muon', dtype=NAME)
    train('alone', optimizer='muon', dtype=NAME)
    worst = difference('nccl', 'alone')
    assert worst < 1e-2, worst
    return f'largest difference of a loss {worst:.1e}'


def two_processes():
    """DDP eager and compiled, FSDP, and one resumed as the other, on two cards, Muon"""
    if torch.cuda.device_count() < 2:
        return 'skipped: one card'
    options = {'processes': 2, 'dtype': NAME, 'optimizer': 'muon', 'dropout': 0.0}
    train('ddp', **options)
    train('ddp_compiled', **options, compile=True)
    train('fsdp', **options, parallel='fsdp', max_iters=40, lr_decay_iters=60)
    train('fsdp', **options, lr_decay_iters=60)
    worst = [difference('ddp', name) for name in ('fsdp', 'ddp_compiled')]
    assert max(worst) < 0.05, worst
    return f'largest difference of a loss {worst[0]:.4f}, compiled {worst[1]:.4f}'


def generation():
    """cached generation against full forward passes, float32 and half precision"""
    torch.manual_seed(0)
    model, found = GPT(SHAPE).cuda().eval(), []
    ids = torch.randint(50257, (2, 20), device='cuda')
    torch.set_float32_matmul_precision('highest')
    out = model.generate(ids, 40, temperature=0)
    with torch.no_grad():
        again = model(out[:, :-1])[:, 19:].argmax(dim=-1)
    same = (again == out[:, 20:]).float().mean().item()
    assert same > 0.99, same
    half = model.to(HALF).generate(ids, 40, temperature=0)
    x = torch.randn(2, 256, device='cuda').to(HALF)
    exact = (x.double() @ model.wte.weight.double().t())[:, :50257]
    assert (generate.next_logits(model, x) - exact).abs().max() < 1e-4 * exact.abs().max()
    found.append(f'{same:.1%} of the tokens equal in float32')
    found.append(f'{(half == out).float().mean().item():.1%} in {NAME}')
    return ', '.join(found)


def fixed_step():
    """a captured step, and one compiled before, against the eager one, greedy and sampled"""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('highest')
    ids, never, found = torch.arange(24, device='cuda'), 10 ** 9, []
    models = GPT(SHAPE).cuda().eval(), GPT(GPTConfig()).cuda().to(HALF).eval()
    for p in models[0].parameters():
        p.data *= 4                                     # so that no two ids are equally likely
    cuts = {'temperature': 0.0}, {'temperature': 1.0, 'top_k': 50, 'seed': 5}
    texts, before = {}, (generate.MIN_TOKENS_TO_CAPTURE, generate.MIN_TOKENS_TO_COMPILE)
    modes = {'eager': (never, never), 'captured': (1, never), 'compiled': (1, 1)}

    def write(card, options):                           # over the end of the block
        return models[0].generate(ids.view(2, 12).to(card), 300, lengths=(12, 7), **options).cuda()
    for name, limits in modes.items():
        generate.MIN_TOKENS_TO_CAPTURE, generate.MIN_TOKENS_TO_COMPILE = limits
        # captured on the last card, which is not the current one if there are two
        card = torch.device('cuda', torch.cuda.device_count() - 1 if name == 'captured' else 0)
        models[0].to(card)
        texts[name] = [write(card, options) for options in cuts]
        assert torch.equal(texts[name][1], write(card, cuts[1]))        # with what was kept
        start = time.perf_counter()
        step = generate.stream(models[1], ids[None, :16], 400, temperature=0.8, top_k=200)
        [next(step) for _ in range(100)][-1].tolist()   # waits for the card
        middle = time.perf_counter()
        list(step)[-1].tolist()
        rate = 300 / (time.perf_counter() - middle)
        again = time.perf_counter()
        models[1].generate(ids[None, :16], 400, temperature=0.8, top_k=200)[0].tolist()
        again = 400 / (time.perf_counter() - again)
        for model in models if name != 'eager' else ():
            kept = generate.kept_steps[model]
            assert kept.graph and bool(kept.compiled) == (name == 'compiled')
        same = [(a == b).float().mean().item() for a, b in zip(texts['eager'], texts[name])]
        assert min(same) > 0.99, (name, same)
        found.append(f'{name} {min(same):.1%} equal, {rate:,.0f} tok/s after 100 tokens in '
                     f'{middle - start:.1f} s, {again:,.0f} tok/s of another text of 400')
    generate.MIN_TOKENS_TO_CAPTURE, generate.MIN_TOKENS_TO_COMPILE = before
    return '; '.join(found)


def compiled_validation():
    """the loss without gradients compiled against eager, GPT-2 124M, 16 x 1,024, half precision"""
    torch.manual_seed(0)
    world = World(device=torch.device('cuda'), dtype=HALF)
    trainer = Trainer(GPT(GPTConfig()), world, TrainerConfig(compile=True), OptimizerConfig())
    ids = torch.randint(50257, (16, 1024), device='cuda')
    trainer.replica, trainer.is_compiled = torch.compile(trainer.model, dynamic=False), True
    trainer.compile_validation(ids.shape, 1e12)
    assert trainer.validator is not trainer.model
    losses, times = [], []
    with trainer.evaluating(), torch.no_grad(), world.autocast():
        for model in (trainer.model, trainer.validator):
            for _ in range(2):                          # the first warms up
                start = time.perf_counter()
                losses.append(sum(model(ids, ids) for _ in range(10)).item() / 10)
                seconds = time.perf_counter() - start
            times.append(f'{10 * ids.numel() / seconds:,.0f}')
    assert abs(losses[0] - losses[-1]) < 0.01, losses
    return (f'losses {losses[0]:.4f} and {losses[-1]:.4f}; {times[0]} tok/s eager, {times[1]} '
            f'compiled')


def fused_kernels():
    """the Triton kernels against plain code: loss and gradients, in both precisions; speed"""
    assert use_kernels(GPT(SHAPE), World(device=torch.device('cuda'), dtype=HALF))
    found, ids = [], torch.randint(50257, (8, 256), device='cuda')
    torch.set_float32_matmul_precision('highest')
    for dtype, limit in ((torch.float32, 1e-4), (HALF, 0.03)):
        torch.manual_seed(0)
        model = GPT(SHAPE).cuda()
        results = []
        for compiled in (False, False, True):
            if results:
                kernels.use(model, torch.device('cuda'))
            with torch.autocast('cuda', dtype, enabled=dtype != torch.float32):
                loss = (torch.compile(model, dynamic=False) if compiled else model)(ids, ids)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters())])
            model.zero_grad()
        worst = [max(((a - b).norm() / b.norm()).item() for a, b in zip(result, results[0]))
                 for result in results[1:]]
        assert max(worst) < limit, (dtype, worst)
        found.append(f'{worst[0]:.1e} eager, {worst[1]:.1e} compiled')
    logits = torch.randn(8192, 50304, device='cuda', dtype=HALF)
    ids = torch.arange(8192, device='cuda')[:, None]
    kernels.use(model, torch.device('cuda'))
    for form in (model.slice_loss, torch.compile(slice_loss)):
        times = []
        for _ in range(6):
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record()
            form(logits, ids, 50257, True)
            ends[1].record()
            torch.cuda.synchronize()
            times.append(ends[0].elapsed_time(ends[1]))
        found.append(f'{4 * logits.numel() / min(times) / 1e9:.2f}')
    return '{}; {}; loss of a slice at {} TB/s, plain and compiled {}'.format(*found)


def residual_stream():
    """300 updates with the residual stream in half precision, and of another seed in float32"""
    for name, changes in {'wide': {'half_residual': False}, 'half': {'half_residual': True},
                          'other': {'half_residual': False, 'seed': 2}}.items():
        train(name, dtype=NAME, compile=True, dropout=0.0, max_iters=300, eval_interval=100,
              **changes)
    curves = {name: losses(name) for name in ('wide', 'half', 'other')}
    ends = {name: sum(curve[step] for step in range(251, 301)) / 50
            for name, curve in curves.items()}
    text = ', '.join(f'{name} {end:.4f}' for name, end in ends.items())
    assert abs(ends['half'] - ends['wide']) < 2 * abs(ends['other'] - ends['wide']) + 0.01, text
    return f'mean loss of the last 50: {text}'


def scores():
    """a benchmark on the card against the CPU"""
    text = ROOT / 'README.md'
    values = []
    for device in ('cuda', 'cpu'):
        run('eval_lm.py', model='whole_float32', file=text, device=device, out=f'{device}.json')
        measures = json.loads(Path(f'{device}.json').read_text())['measures']
        values.append(measures['byte']['value'])
    assert abs(values[0] - values[1]) < 1e-2, values
    return f'{values[0]:.4f} and {values[1]:.4f} bits per byte'


def memory():
    """peak memory of an update of GPT-2 124M, 8 x 1,024, half precision"""
    world = World(device=torch.device('cuda'), dtype=HALF)
    model = GPT(GPTConfig())
    trainer = Trainer(model, world, TrainerConfig(compile=False), OptimizerConfig())
    torch.cuda.reset_peak_memory_stats()
    x = torch.randint(50257, (8, 1024), device='cuda')
    for _ in range(2):
        loss = trainer.backward(x, x, micro_steps=1, last=True)
        trainer.step(loss, trainer.grad_norm())
    peak = torch.cuda.max_memory_allocated() / 1e9
    assert peak < 20, peak
    return f'{peak:.1f} GB'


CHECKS = (memory, resume_float32, resume_half, float16, compiled, recomputed_dropout,
          one_process_nccl, two_processes, generation, fixed_step, compiled_validation,
          fused_kernels, residual_stream, scores)

if __name__ == '__main__':
    sys.exit(main())
