"""
Loss curves of one or more runs, over tokens.

    python plot.py out/quickstart                           # writes out/quickstart/loss.png
    python plot.py out/a out/b --out=compare.png
"""

import json
from pathlib import Path

from configurator import run, settings

# -----------------------------------------------------------------------------
runs = ()           # folders of runs, given bare: plot.py out/a out/b
out = ''            # the picture to write, '': loss.png in the folder of the first run
smooth = 0          # logged training losses averaged around each point; 0: a hundredth of all
# -----------------------------------------------------------------------------
Config = settings(globals())

COLLECT = 'runs'    # takes the arguments without a flag

REFERENCES = {      # validation loss (nats per token) that others reached on the same data set
    'shakespeare_char': [("nanoGPT's CPU run", 1.88), ("nanoGPT's GPU run", 1.4697)],
    'openwebtext': [('GPT-2 124M', 3.12)],                          # nanoGPT's README
    'fineweb-10B': [('GPT-2 124M', 3.425)],                         # llm.c, dev/vislog.ipynb
    'fineweb-edu-10B': [('GPT-2 124M', 3.2924)],                    # build-nanogpt, play.ipynb
}


def main(cfg):
    if not cfg.runs:
        raise ValueError('runs: expected the folder of a run, as in: python plot.py out/quickstart')
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(8, 5), layout='constrained')
    references = {}
    for folder in map(Path, cfg.runs):
        records = read_log(folder / 'log.jsonl')
        train, val = points(records, 'loss'), points(records, 'val_loss')
        drawn = axes.plot(*smoothed(train, cfg.smooth), linewidth=1, alpha=0.6,
                          label=f'{folder.name}, training')
        axes.plot(*val, 'o-', markersize=3, color=drawn[0].get_color(),
                  label=f'{folder.name}, validation')
        references.update(REFERENCES.get(dataset_of(folder), []))
        print(f'{folder}: {summary(records)}')
    for name, loss in references.items():
        axes.axhline(loss, color='gray', linestyle='--', linewidth=1)
        axes.annotate(f'{name} {loss}', (0.99, loss), xycoords=('axes fraction', 'data'),
                      ha='right', va='bottom', color='gray', fontsize=9)
    axes.set(xlabel='tokens', ylabel='loss (nats per token)')
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = Path(cfg.out) if cfg.out else Path(cfg.runs[0]) / 'loss.png'
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:                                     # a format it does not know
        raise ValueError(f'out: given {path}: {error}') from None
    print(path)


def read_log(path):
    """The records of a log.jsonl in order of their steps;
    what a later one says of a step counts."""
    if not path.exists():
        raise ValueError(f'{path}: there is no log here; expected the folder of a run of train.py')
    steps = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue                                            # the line at which a run was killed
        steps.setdefault(record['step'], {}).update(record)
    if not steps:
        raise ValueError(f'{path}: this log is empty')
    return [steps[step] for step in sorted(steps)]


def points(records, key):
    """([tokens], [value]) of the records that have `key`."""
    chosen = [(record['tokens'], record[key]) for record in records if record.get(key) is not None]
    return tuple(map(list, zip(*chosen))) or ([], [])


def smoothed(curve, width):
    """The curve as the mean of `width` points around each, fewer near its ends; it never lags."""
    tokens, values = curve
    half = (width or max(1, len(values) // 100)) // 2
    around = (values[max(0, i - half):i + half + 1] for i in range(len(values)))
    return tokens, [sum(part) / len(part) for part in around]


def dataset_of(folder):
    """The data set named in the config.py of a run."""
    path = folder / 'config.py'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return next((line.partition('= ')[2].strip("'") for line in lines
                 if line.startswith('dataset = ')), '')


def summary(records):
    best = min((record for record in records if 'val_loss' in record),
               key=lambda record: record['val_loss'], default=None)
    words = f"{records[-1]['step']} updates, {records[-1]['tokens']:,} tokens"
    if best:
        words += f"; best val_loss {best['val_loss']:.4f} at update {best['step']}"
    if best and 'val_bits_per_byte' in best:
        words += f", {best['val_bits_per_byte']:.3f} bits per byte"
    if best and 'xz_bits_per_byte' in best:
        words += f" (xz -9e makes {best['xz_bits_per_byte']:.3f} of the same text)"
    return words


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
