"""
The checkpoints of a run: which there are, which of them are intact, the newest, the best.

    out/NAME/step_0002000/      a checkpoint, see gpt/checkpoints.py
    out/NAME/best.json          which step has the lowest validation loss
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from gpt.files import ROOT, atomic_write, read_json, sha256
from gpt.shapes import Count
from gpt.weights import file_in
from gpt.world import World

MANIFEST, TRAINING = 'manifest.json', 'training.pt'     # of a checkpoint
ONLY_FOR_RESUME = TRAINING,             # most of the bytes: not read where only the model is


class Entry(TypedDict):
    """Of a file, in manifest.json."""
    bytes: Count
    sha256: str


class Best(TypedDict):
    """best.json."""
    step: Count
    val_loss: float


def all_steps(out_dir: str | Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints in out_dir, oldest first, intact or not."""
    folders = (path for path in Path(out_dir).glob('step_*') if path.name[5:].isdigit())
    return dict(sorted((int(path.name[5:]), path) for path in folders))


def newest(out_dir: str | Path, until: float = math.inf, unread: tuple[str, ...] = (),
                ) -> tuple[Path | None, list[tuple[Path, str]]]:
    """(folder of the newest intact checkpoint, None if there are none at all;
    [(folder, what is wrong)] of newer ones). until: the last step to consider.

    Raises ValueError if there are checkpoints but no intact one: no reason to start over.
    """
    listed, problems = all_steps(out_dir), []
    for step, folder in reversed(listed.items()):
        if step <= until:
            wrong = problem(folder, unread)
            if not wrong:
                return folder, problems
            if all_steps(out_dir) != listed:            # the run is being trained
                return newest(out_dir, until, unread)
            problems.append((folder, wrong))
    if problems:
        lines = [f'{folder}: {wrong}' for folder, wrong in problems]
        raise ValueError('\n'.join(['there are checkpoints, but no intact one:', *lines,
                                    'give another --out_dir to start a new run']))
    return None, []


def roll_back(out_dir: str | Path, step: int) -> Path | None:
    """The folder of the newest intact checkpoint of at most `step`, if any; newer ones are then
    deleted."""
    folder, _ = newest(out_dir, step)
    if folder:
        for number, newer in all_steps(out_dir).items():
            if number > step:
                remove(newer)
    return folder


def mark_best(out_dir: str | Path, step: int, val_loss: float) -> None:
    """Note in best.json which step of the run has the lowest validation loss."""
    atomic_write(Path(out_dir) / 'best.json',
                 json.dumps({'step': step, 'val_loss': val_loss}, indent=1))


def best(out_dir: str | Path) -> Path | None:
    """The folder of the step that mark_best() noted; None if there is none, or not intact."""
    step = None
    with suppress(ValueError):
        while step != (found := read_json(Path(out_dir, 'best.json'), Best)['step']):
            step = found                                # again if the run has a better one by now
            folder = all_steps(out_dir).get(step)
            if folder and not problem(folder, ONLY_FOR_RESUME):
                return folder
    return None


def role(folder: Path | str) -> str:
    """'best' or 'newest' if the folder is that step of a run, else ''."""
    run = Path(folder).parent
    with suppress(ValueError):
        if all_steps(run).get(read_json(run / 'best.json', Best)['step']) == folder:
            return 'best'
    return 'newest' if folder in [*all_steps(run).values()][-1:] else ''


def newest_run() -> Path | None:
    """The run under out/ that saved a checkpoint last, else checkpoint/, else None."""
    times = {}
    for place, _, names in os.walk('out'):              # passes over what is deleted meanwhile
        if MANIFEST in names and os.path.basename(place).startswith('step_'):
            with suppress(OSError):
                times[Path(place).parent] = os.stat(Path(place, MANIFEST)).st_mtime
    shipped = ROOT / 'checkpoint'
    if times:
        return max(times, key=times.get)
    return shipped if (shipped / 'config.json').exists() else None


def look_again(world: World, find: Callable[[], Path | str | None], load: Callable) -> Any:
    """load(find()), both on every rank; again if the step was deleted meanwhile, as a run does that
    is being trained."""
    before = None
    while True:
        folder = find()
        try:
            loaded, error = load(folder), None
        except (OSError, ValueError, RuntimeError) as caught:   # the last is of safetensors
            loaded, error = None, caught
        place = Path(folder or '')
        is_gone = (error is not None and folder != before and place.name.startswith('step_')
                   and not (place / MANIFEST).exists())
        if not world.any(is_gone):
            if error:
                raise error
            return loaded
        before = folder


def problem(folder: Path, unread: tuple[str, ...] = ()) -> str:
    """What is wrong with a checkpoint, '' if it is intact: every byte is read and compared, except
    that of the files named in `unread` only the size is."""
    try:
        manifest = file_in(folder, MANIFEST)
        for name, expected in read_json(manifest, dict[str, Entry]).items() if manifest else ():
            file = file_in(folder, name)
            if not file:
                return f'{name} is missing'
            if file.stat().st_size != expected['bytes']:
                return f'{name} is truncated'
            if name not in unread and sha256(file) != expected['sha256']:
                return f'{name} is damaged'
        if not manifest:
            return f'it is incomplete (no {MANIFEST})'
    except (OSError, ValueError) as error:
        return f'it is incomplete ({error})'
    return ''


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it no longer counts as one."""
    damaged = folder.with_name(f'{folder.name}.damaged')
    shutil.rmtree(damaged, ignore_errors=True)
    folder.rename(damaged)


def prune(out_dir: str | Path, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints but the `keep` newest and the step `best`."""
    folders = all_steps(out_dir)
    for step in list(folders)[:-keep]:
        if step != best:
            remove(folders[step])


def remove_partial(out_dir: str | Path) -> None:
    """Delete what a killed process left of a checkpoint it was writing."""
    for leftover in Path(out_dir).glob('.step_*.partial'):
        shutil.rmtree(leftover, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint as far as the disk allows; what is left of it is not intact."""
    with suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)
