"""
Regenerate the pictures of the documents, the outputs of the walkthrough's code blocks and those of
play.ipynb from checkpoint/, after publish.py has replaced it or the code has changed.

    python docs/refresh.py
"""

import re
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                       # this file runs from docs/
import plot
from gpt.checkpoints import load_model
from gpt.optim import Schedule

WALKTHROUGHS = ROOT / 'docs/walkthrough.md', ROOT / 'docs/walkthrough_zh.md'
BLOCK = re.compile(r'```python\n(.*?)```\n\n```text\n(.*?)```', re.DOTALL)
MARK = '-- end of a block --'
PICTURES = ROOT / 'docs/pictures'
SENTENCE = 'The old man looked at the girl, and the girl looked at the old man.'
# Of an update of GPT-2 124M, 32 x 1,024 tokens, on an H100 (docs/benchmarks.md): milliseconds in
# the first profile, in that of two prototypes, and by the arithmetic of step 16.
PROFILE = {'matrix products': (33.7, 32.9, 31.6), 'attention': (9.0, 9.1, 2.8),
           'head: softmax\nand gradient': (9.0, 4.4, 2.3),
           'LayerNorm,\nbackward': (5.3, 1.9, 1.7), 'GELU': (4.0, 4.0, 4.2),
           'everything else': (9.8, 8.9, None)}


def main():
    for path in WALKTHROUGHS:
        text = path.read_text(encoding='utf-8')
        outputs = iter(run_blocks(text))
        text = BLOCK.sub(lambda match: f'```python\n{match[1]}```\n\n```text\n{next(outputs)}```',
                         text)
        path.write_text(text, encoding='utf-8')
    model, encoding = load_model('checkpoint')
    for theme, suffix in ('light', ''), ('dark', '_dark'):
        colours = plot.THEMES[theme]
        with rc_context({**plot.style(colours), 'axes.grid': False, 'savefig.dpi': 120}):
            for draw in attention, schedules, sampling, profile:
                figure = draw(model, encoding, colours)
                figure.savefig(PICTURES / f'{draw.__name__}{suffix}.png')
        plot.main(plot.Config(runs=('checkpoint',), theme=theme,
                              out=str(PICTURES / f'curve{suffix}.png')))
    notebook(ROOT / 'play.ipynb')


def notebook(path):
    """Run all cells in place, in the notebook's own folder. Outputs are stored without what differs
    each time: timestamps, and the name of the temporary folder."""
    import nbformat
    from nbclient import NotebookClient
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, kernel_name='python3', record_timing=False,
                   coalesce_streams=True, resources={'metadata': {'path': str(path.parent)}}
                   ).execute()
    book.metadata.language_info = {'name': 'python'}
    text = re.sub(r'[^\s"\'`=]*/play-\w+', '/tmp/play', nbformat.writes(book))
    path.write_text(text + '\n', encoding='utf-8')


def run_blocks(text):
    """What each block of Python prints; they run one after another in one process."""
    blocks = [match[1] for match in BLOCK.finditer(text)]
    program = f"\nprint('{MARK}')\n".join(blocks)
    done = subprocess.run([sys.executable, '-'], input=program, cwd=ROOT, text=True,
                          capture_output=True, encoding='utf-8')
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.split(MARK + '\n')


def weights_of(model, ids):
    """Attention weights (n_layer, n_head, T, T), from the queries and keys of the model."""
    caught = []
    hooks = [block.attn.c_attn.register_forward_hook(lambda module, x, y: caught.append(y[0]))
             for block in model.h]
    with torch.no_grad():
        model.hidden(ids[None])
    for hook in hooks:
        hook.remove()
    q, k, _ = (part.view(model.config.n_layer, len(ids), model.config.n_head, -1).transpose(1, 2)
               for part in torch.stack(caught).chunk(3, dim=2))     # (n_layer, n_head, T, hs)
    later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    return (q @ k.mT / q.size(-1) ** 0.5).masked_fill(later, -torch.inf).softmax(dim=-1)


def attention(model, encoding, colours):
    """Three heads on one sentence: those that attend most to the previous token, to the first
    token, and to what followed an earlier copy of the same token."""
    ids = torch.tensor(encoding.encode_ordinary(SENTENCE))
    weights, T = weights_of(model, ids), len(ids)
    followed = torch.zeros(T, T)                        # 1 where the token before j equals token i
    followed[:, 1:] = (ids[:, None] == ids[None, :-1]).tril(-1).float()
    scores = {'the previous token': weights.diagonal(offset=-1, dim1=2, dim2=3).mean(dim=2),
              'the first token': weights[..., 1:, 0].mean(dim=2),
              'what followed this token': (weights * followed).sum(dim=(2, 3))}
    shades = LinearSegmentedColormap.from_list('', [colours['page'], colours['runs'][0]])
    figure = Figure((5.2, 14.2), layout='constrained')
    tokens = [encoding.decode([i]) for i in ids.tolist()]
    for axis, (name, score) in zip(figure.subplots(3), scores.items()):
        layer, head = divmod(score.argmax().item(), model.config.n_head)
        axis.imshow(weights[layer, head], cmap=shades, vmin=0, vmax=1)
        axis.set_xticks(range(T), tokens, rotation=90)
        axis.set_yticks(range(T), tokens)
        axis.tick_params(length=0)
        axis.set_title(f'layer {layer}, head {head}: {name}')
    return figure


def schedules(model, encoding, colours):
    figure = Figure((5.2, 3), layout='constrained')
    axis = figure.subplots()
    for name, colour in zip(('cosine', 'wsd'), colours['runs']):
        schedule = Schedule(name, learning_rate=1.0, min_lr=0.0, decay_lr=True, max_iters=1000,
                            warmup_iters=50, lr_decay_iters=0, cooldown_iters=500)
        axis.plot([schedule.learning_rate_at(step) for step in range(1001)],
                  color=colour, linewidth=2, label=name)
    axis.set(xlabel='update', ylabel='fraction of the maximum', ylim=(0, 1.05))
    axis.legend()
    return figure


def sampling(model, encoding, colours, prompt='She opened the door and'):
    """The 20 most likely next tokens at three temperatures, and what top-k and top-p keep."""
    ids = torch.tensor([encoding.encode_ordinary(prompt)])
    with torch.no_grad():
        logits = model(ids)[0, -1]
    order, (blue, orange) = logits.sort(descending=True).indices[:20], colours['runs'][:2]
    figure = Figure((5.2, 8), layout='constrained')
    axes = figure.subplots(3, sharex=True)
    for axis, temperature in zip(axes, (0.5, 1.0, 1.5)):
        probs = (logits / temperature).softmax(dim=-1)[order]
        kept = int((probs.cumsum(0) < 0.4).sum()) + 1
        axis.bar(range(20), probs, color=[(blue, 1 if i < kept else 0.35) for i in range(20)])
        axis.axvline(4.5, color=orange, linewidth=1.5, linestyle='--')
        axis.yaxis.set_major_formatter('{x:.1%}')
        axis.set_title(f'temperature {temperature}')
    axes[-1].set_xticks(range(20), [encoding.decode([i]) for i in order.tolist()], rotation=90)
    figure.suptitle(f'“{prompt} …”\nstrong: top_p = 0.4; left of the line: top_k = 5',
                    size=11)
    return figure


def profile(model, encoding, colours):
    figure = Figure((5.2, 5.2), layout='constrained')
    axis = figure.subplots()
    (before, after, limits), (blue, orange) = zip(*PROFILE.values()), colours['runs'][:2]
    for offset, times, colour, label in ((-0.2, before, blue, f'at first: {sum(before):.1f} ms'),
                                         (0.2, after, orange, f'changed: {sum(after):.1f} ms')):
        bars = axis.barh([i + offset for i in range(len(times))], times, 0.4, color=colour,
                         label=label)
        axis.bar_label(bars, fmt='%.1f', padding=8, fontsize=10)
    known = [i for i, limit in enumerate(limits) if limit]
    axis.vlines([limits[i] for i in known], [i - 0.45 for i in known], [i + 0.45 for i in known],
                color=colours['ink'], linewidth=2, label='limit')
    axis.set_yticks(range(len(PROFILE)), PROFILE)
    axis.invert_yaxis()
    axis.set(xlabel='ms of an update', xlim=(0, 38))
    axis.legend(loc='lower right')
    return figure


if __name__ == '__main__':
    main()
