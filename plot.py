"""
The curves of one or more runs as a picture, a page about a run, or which of several is better.

    python plot.py out/quickstart                           # writes out/quickstart/loss.png
    python plot.py out/a out/b --out=both.png
    python plot.py out/quickstart --report                  # writes out/quickstart/report.html
    python plot.py out/a out/b --compare                    # losses, speed, and a verdict
    python plot.py out/a* out/b* --compare --target=3.28    # with several seeds: is it noise?
"""

import io
import re
from pathlib import Path

from gpt.settings import check_choices, run, settings

# -----------------------------------------------------------------------------
runs = ()           # folders of runs, as plain arguments: plot.py out/a out/b
out = ''            # the file to write, '': loss.png or report.html in the folder of the first run
theme = 'light'     # of the picture, or 'dark'; a report has both
report = False      # True: instead of a picture a page about the first run, with all that its
                    # folder tells; the curves of the others are drawn beside its own
compare = False     # True: instead of a picture a table of final losses and speeds, and a verdict;
                    # runs that differ in nothing but the seed count as one
target = 0.0        # of --compare: a validation loss; 0: the lowest that all of them reached
# -----------------------------------------------------------------------------
Config = settings(globals())

from gpt.curves import compared, limits, points, read_log, smoothed, summary, thinned
from gpt.files import atomic_write, check_output, picture_path, write_picture

COLLECT = 'runs'    # takes the plain arguments

PANELS = {          # keys of the log, and the titles of their panels
    'loss': 'Loss, nats per token',
    'lr': 'Learning rate',
    'grad_norm': 'Gradient norm',
    'tokens_per_second': 'Tokens per second',
    'hellaswag': 'HellaSwag, % right',
}
FROM_ZERO = 'lr', 'grad_norm', 'tokens_per_second'

THEMES = {          # the colours of runs can be told apart by the colour-blind
    'light': {'page': '#fdfdfb', 'ink': '#22262a', 'quiet': '#62686e', 'rule': '#e3e4e1',
              'runs': ('#1f6aa5', '#b8500b', '#2b7d4f', '#8a4a9e', '#a8324a', '#5d6b2d')},
    'dark': {'page': '#15181b', 'ink': '#e3e5e6', 'quiet': '#a0a7ad', 'rule': '#30353a',
             'runs': ('#72b5ea', '#eea266', '#74c795', '#cfa0e2', '#ee8c9d', '#b8c777')},
}


def main(cfg):
    if not cfg.runs:
        raise ValueError('runs: expected the folder of a run, as in: python plot.py out/quickstart')
    check_choices(cfg, theme=THEMES)
    folders = folders_with_logs(cfg.runs)
    if cfg.compare:
        return print('\n'.join(compared(folders, cfg.target)))
    logs = [read_log(folder / 'log.jsonl') for folder in folders]
    for folder, records in zip(folders, logs):
        print(f'{folder}: {summary(records)}')
    path = output(cfg, folders[0])
    if cfg.report:
        from gpt.report import page             # imports torch, which a picture does not need
        pictures = {(theme, wide): as_svg(draw(folders, logs, theme, wide))
                    for theme in THEMES for wide in (False, True)}
        atomic_write(path, page(folders[0], logs[0], pictures))
    else:
        write_picture(path, draw(folders, logs, cfg.theme), dpi=220)
    print(path)


def output(cfg, folder):
    """The file to write; a report is HTML, a picture without a suffix a PNG."""
    out = cfg.out or str(folder / ('report.html' if cfg.report else 'loss.png'))
    if not cfg.report:
        return picture_path(out)
    if not out.endswith(('.html', '.htm')):
        raise ValueError(f'out: given {out!r}, expected the name of a report, such as a.html')
    return check_output(out)


def folders_with_logs(runs):
    """The folders given, each once, without those of runs that did not start."""
    given = list({path.resolve(): path for path in map(Path, runs)}.values())
    folders = [path for path in given if (path / 'log.jsonl').exists() or not path.is_dir()]
    if 0 < len(folders) < len(given):
        print('skipping', *(path for path in given if path not in folders), '(no log.jsonl)')
    return folders or given                     # of which read_log says what is wrong


def draw(folders, logs, theme, wide=False):
    """A figure of panels over tokens: one below the other for a phone, or `wide`, with the small
    ones side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    colours = THEMES[theme]
    rows = layout(logs, wide)
    size = (9, 3.9 + 1.9 * (len(rows) - 1)) if wide else (4.6, 3.7 + 1.35 * (len(rows) - 1))
    with rc_context(style(colours)):
        figure = Figure(size, layout='constrained')
        axes = figure.subplot_mosaic(rows, height_ratios=[2.3, *[1] * (len(rows) - 1)])
        for key, panel in axes.items():
            draw_panel(panel, key, logs, colours)
            panel.tick_params(labelbottom=key in rows[-1])
            panel.set_xlabel('tokens' if key in rows[-1] else '')
        draw_legend(figure, folders, colours)
    return figure


def layout(logs, wide):
    """Rows of keys: a panel for the loss, and one for every other key that a log has."""
    logged = {key for records in logs for record in records for key in record}
    small = [key for key in PANELS if key in logged and key != 'loss']
    if not wide or not small:
        return [['loss'], *([key] for key in small)]
    columns = 2 if len(small) == 4 else len(small)
    return [['loss'] * columns, *(small[i:i + columns] for i in range(0, len(small), columns))]


def style(colours):
    """matplotlib's settings: light axes, text that can be read on a phone."""
    return {'text.parse_math': False,       # a $ in a name is no formula
            'font.size': 10.5, 'axes.titlesize': 10.5, 'axes.titlelocation': 'left',
            'axes.titlecolor': colours['ink'], 'text.color': colours['ink'],
            'axes.labelcolor': colours['quiet'], 'xtick.labelcolor': colours['quiet'],
            'ytick.labelcolor': colours['quiet'], 'xtick.color': colours['rule'],
            'ytick.color': colours['rule'], 'axes.edgecolor': colours['rule'],
            **{f'axes.spines.{side}': False for side in ('top', 'right', 'left')},
            'xtick.major.size': 0, 'ytick.major.size': 0, 'axes.facecolor': 'none',
            'axes.grid': True, 'grid.color': colours['rule'], 'grid.linewidth': 0.8,
            'axes.axisbelow': True, 'figure.facecolor': colours['page'],
            'figure.constrained_layout.h_pad': 0.07, 'legend.frameon': False}


def short(value):
    """2500000.0 -> '2.5M', 0.00025 -> '2.5e-4'."""
    if 0 < abs(value) < 0.01:
        return f'{value:.1e}'.replace('.0e', 'e').replace('e-0', 'e-')
    for unit, letter in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= unit:
            return f'{value / unit:g}{letter}'
    return f'{value:g}'


def draw_panel(axes, key, logs, colours):
    """The curves of all runs under one key of the log."""
    from matplotlib.ticker import MaxNLocator
    drawn = []
    for i, records in enumerate(logs):
        line = {'color': run_colour(i, colours), 'linewidth': 1.3}
        curve = points(records, key)
        if key == 'hellaswag':
            curve = curve[0], [100 * accuracy for accuracy in curve[1]]
            axes.plot(*curve, **dotted(curve), **line)
        else:
            curve = thinned(curve if key == 'lr' else smoothed(curve))
            axes.plot(*curve, alpha=0.7 if key == 'loss' else 1, **line)
        drawn.append(curve)
        if key == 'loss':
            curve = points(records, 'val_loss')
            axes.plot(*curve, **dotted(curve), **line)
            drawn.append(curve)
    axes.set_title(PANELS[key])
    axes.set_ylim(limits(drawn, low=0 if key in FROM_ZERO else None))
    end = max(1, *(records[-1]['tokens'] for records in logs))
    axes.set_xlim(-0.01 * end, 1.01 * end)                          # room for dots at both ends
    for axis, n in ((axes.xaxis, 4), (axes.yaxis, 5 if key == 'loss' else 3)):
        axis.set_major_locator(MaxNLocator(n, steps=(1, 2, 2.5, 5, 10)))
        axis.set_major_formatter(lambda value, _: short(value))


def run_colour(i, colours):
    return colours['runs'][i % len(colours['runs'])]


def dotted(curve):
    """The style of a curve of few measurements: a dot at each, or at about 40 of many."""
    return {'marker': 'o', 'markersize': 3.5, 'markevery': -(-len(curve[0]) // 40) or 1}


def draw_legend(figure, folders, colours):
    """One legend for all panels: the runs by colour, and lines with and without dots."""
    from matplotlib.lines import Line2D
    names = [folder.resolve().name[:40] for folder in folders]
    runs = [Line2D([], [], color=run_colour(i, colours), linewidth=3, label=name)
            for i, name in enumerate(names)]
    kinds = [Line2D([], [], color=colours['quiet'], linewidth=1.3, alpha=0.7, label='training'),
             Line2D([], [], color=colours['quiet'], linewidth=1.3, marker='o', markersize=3.5,
                    label='validation')]
    figure.legend(handles=[*runs, *kinds], loc='outside upper left', columnspacing=1.2,
                  ncols=3 if max(map(len, names)) < 16 else 1, handlelength=1.4, borderpad=0.2)


def as_svg(figure):
    """The figure as the text of an SVG without a background, to a tenth of a point; the same for
    the same curves."""
    from matplotlib import rc_context
    file = io.StringIO()
    with rc_context({'svg.hashsalt': 'gpt'}):
        figure.savefig(file, format='svg', transparent=True, metadata={'Date': None})
    return re.sub(r'(?m)^L .*$', lambda line: re.sub(r'(\.\d)\d+', r'\1', line[0]),
                  file.getvalue())


if __name__ == '__main__':
    run(main, Config, collect=COLLECT)
