"""
The only reader and writer of checkpoints. A checkpoint is a Hugging Face model folder:

    out/NAME/step_0002000/
        config.json         GPT-2 as transformers knows it
        model.safetensors   weights under transformers' names and shapes
        tokenizer.json, tokenizer_config.json
        training.pt         what a resume needs besides: optimizer, progress, settings
        manifest.json       size and sha256 of each file; written last, it commits the checkpoint

Folders of others, which model_config.py and weights.py judge, open too if they hold a GPT-2.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from gpt import hub, steps, tokenizer
from gpt.cpu import pack
from gpt.device import pick_dtype, without_memory
from gpt.files import sha256
from gpt.hub import WEIGHTS
from gpt.model_config import config_json, read_config
from gpt.shapes import bounded
from gpt.steps import MANIFEST, ONLY_FOR_RESUME, TRAINING
from gpt.weights import (NANOGPT, HashedFile, file_in, fill, fit, load_pickle, open_weights,
                         to_hugging_face, weight_files, write_safetensors)
from gpt.world import World
from model import GPT, SIZES


class Loaded(NamedTuple):
    model: GPT
    encoding: tokenizer.Encoding


# Reading a model.

def load_model(name: str | Path, device: str | torch.device = 'cpu',
               dtype: torch.dtype = torch.float32) -> Loaded:
    """(model, tokenizer) of the model called `name` (see find), on `device`, in eval mode."""
    model, encoding, _ = load_found(World(), name, device, dtype)
    return Loaded(model, encoding)


def load_found(world: World, name: str | Path, device: str | torch.device,
               dtype: torch.dtype) -> tuple[GPT, tokenizer.Encoding, Path | str]:
    """load_model() on every process, and the folder; rank 0 finds, and downloads, for all."""
    return steps.look_again(
        world, lambda: world.on_main(find, name),
        lambda folder: (*load_folder(folder, device, dtype=dtype), folder))


def load_folder(folder: str | Path, device: str | torch.device = 'cpu', dropout: float = 0.0,
                dtype: torch.dtype = torch.float32) -> Loaded:
    """load_model() of a folder that find() returned.

    The weights are read into the model tensor by tensor: memory never holds a second copy.
    """
    if str(folder).startswith('random:'):
        return random_model(str(folder)[7:], device, dropout, dtype)
    config, weights = read_config(folder), open_weights(folder)
    config = fit(config, weights)
    encoding = load_encoding(folder, config.vocab_size)
    config = replace(config, dropout=dropout, vocab_size=encoding.n_vocab)
    with without_memory():
        model = GPT(config)
    # not to_empty(), which imports sympy
    model.load_state_dict({name: torch.empty(p.shape, dtype=dtype, device=device)
                           for name, p in model.named_parameters()}, assign=True)
    fill(model, weights)
    check_output(model.eval(), folder)
    return Loaded(model, encoding)


@torch.no_grad()
def check_output(model: GPT, folder: str | Path) -> None:
    """Refuse a model whose finite weights give NaN or infinite logits for a few tokens."""
    n = min(8, model.config.block_size, model.config.vocab_size)
    logits = model(torch.arange(n, device=model.wte.weight.device)[None])
    if not logits.isfinite().all():
        raise ValueError(f'{folder}: the model gives NaN: its weights are damaged, or the dtype is '
                         f'too narrow for them')


def load_for_evaluation(world: World, name: str,
                        dtype: str) -> tuple[GPT, tokenizer.Encoding, dict]:
    """(model, tokenizer, facts) on every process.

    name '' is the newest run. facts, on rank 0 alone, identify the weights as they are used. On a
    GPU float32 products may be of TF32, as those of published numbers were; on a CPU the model is
    packed.
    """
    if world.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
    model, encoding, folder = load_found(world, name or steps.newest_run() or '', world.device,
                                         pick_dtype(dtype, world.device)[0])
    facts = {}
    if world.is_main:
        facts = {'name': name or str(folder), 'folder': str(folder), 'sha256': weights_hash(model),
                 'parameters': model.num_parameters(), 'dtype': str(model.wte.weight.dtype)[6:]}
    return pack(model), encoding, facts


def weights_hash(model: GPT) -> str:
    """sha256 over the names and bytes of all parameters."""
    total = hashlib.sha256()
    for key, p in sorted(model.state_dict().items()):
        total.update(key.encode() + p.cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def load_encoding(folder: str | Path, vocab_size: int) -> tokenizer.Encoding:
    """The tokenizer of the model in `folder`, which has vocab_size rows: as many as there are
    tokens, or some more for padding, which are left out. Added tokens without a row are left out
    too."""
    found = tokenizer.tokenizer_files(folder)
    for name in found:
        file_in(folder, name)                           # refuses what is no plain file
    file, gpt2 = tokenizer.stored(folder), SIZES['gpt2']
    if not file and found:
        name = next((name for name in found if name in hub.OLDER_TOKENIZERS), found[0])
        raise ValueError(f'{folder}: no tokenizer.json, nor vocab.json and merges.txt (only '
                         f'{name}); put a tokenizer.json there, as save_pretrained() of its fast '
                         f'tokenizer writes')
    if not file and not gpt2.vocab_size <= vocab_size <= gpt2.padded_vocab_size:
        raise ValueError(
            f"{folder}: no tokenizer.json, nor vocab.json and merges.txt; put the model's there "
            f"(save_pretrained() of its tokenizer writes them; for characters of nanoGPT, whose "
            f"meta.pkl is a pickle and not read, data/prepare.py --tokenizer=chars makes it of "
            f"the same text)")
    if not file:
        note(f"{folder}: no tokenizer in this folder: GPT-2's is assumed, as the model has "
             f"{vocab_size:,} rows")
        return tokenizer.gpt2()
    encoding = tokenizer.load(file)
    if encoding.n_vocab > vocab_size:
        try:
            encoding, names = tokenizer.limited(encoding, vocab_size)
        except ValueError as error:
            raise ValueError(f'{folder}: {error}') from None
        names = ', '.join(name if name.isprintable() else repr(name) for name in names)
        note(f'{folder}: the model has {vocab_size:,} rows, none for {names}; left out')
    if isinstance(encoding, tokenizer.HFTokenizer) and encoding.remark:
        note(f'{file}: {encoding.remark}')
    return encoding


@lru_cache
def note(line: str) -> None:
    """Print a line on stderr, once, by one process."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(bounded(line), file=sys.stderr)


def official_name(name: str) -> str:
    """'gpt2' … 'gpt2-xl' if `name` stands for OpenAI's weights, else ''."""
    name = name.removeprefix('openai-community/')
    return name if name in SIZES else ''


def random_model(size: str, device: str | torch.device, dropout: float,
                 dtype: torch.dtype) -> Loaded:
    """What 'random:gpt2' stands for: an untrained model of that size, made with seed 0."""
    if size not in SIZES:
        raise ValueError(f"random:{size}: expected random: and one of {', '.join(SIZES)}")
    torch.manual_seed(0)
    model = GPT(replace(SIZES[size], dropout=dropout)).to(device, dtype).eval()
    return Loaded(model, tokenizer.gpt2())


def find(name: str | Path) -> Path | str:
    """The folder of the model called `name`: a Hugging Face folder, one of our steps, a run (its
    best step, else its newest), 'gpt2' … 'gpt2-xl', or another GPT-2 on the hub. 'random:gpt2'
    stands for itself.

    Raises ValueError if there is none, saying what to do.
    """
    folder, is_text, name = Path(name).expanduser(), isinstance(name, str), str(name)
    if name.startswith('random:'):
        return name
    if is_text and name in {*hub.FULL_NAMES, *hub.FULL_NAMES.values()}:
        if folder.exists():
            note(f'{name}: the model of the hub; ./{name} is the folder here')
        return hub.model_folder(name, read_config, weight_files)
    if folder.name == NANOGPT and folder.is_file():
        folder = folder.parent
    if (folder / 'config.json').exists():
        ours = re.fullmatch(r'step_\d{7,}', folder.name) or (folder / MANIFEST).exists()
        wrong = ours and steps.problem(folder, ONLY_FOR_RESUME)
        if wrong:
            raise ValueError(f'{folder}: {wrong}; an earlier step of the run may be intact')
        return folder
    if folder.is_dir():
        step = steps.best(folder) or steps.newest(folder, unread=ONLY_FOR_RESUME)[0]
        if step:
            return step
        if (folder / NANOGPT).exists():
            return folder
        raise ValueError(f'{folder}: no checkpoint in this folder, and no config.json of a model')
    if folder.is_file():
        raise ValueError(f'{name}: given a file, expected the folder of a model')
    first, *rest = folder.parts
    is_path = first == 'out' or name.startswith(('.', '/', '~')) or len(rest) > 1
    if is_path or (rest and Path(first).exists()):
        raise ValueError(f'{name}: no such folder')
    return hub.model_folder(name, read_config, weight_files)


def load_training(folder: str | Path) -> dict:
    """The dict given to save(), its tensors on the CPU. ValueError for any other file."""
    file = file_in(folder, TRAINING)
    if not file:
        raise ValueError(f'{folder}: no {TRAINING} in this folder; --init_from={folder} starts a '
                         f'new run from its weights')
    return load_pickle(file)


# Saving: to a temporary folder, synced to the disk, renamed. Nothing incomplete has the final name.

def save(out_dir: str | Path, step: int, model: GPT, encoding: tokenizer.Encoding,
         training: dict) -> Path:
    """Write step_NNNNNNN of the run in out_dir, and return its folder.

    training: plain types and tensors. What a run saves at a step depends on its settings alone, so
    an intact checkpoint of this step is left as it is. Raises OSError if it cannot be written.
    """
    final = Path(out_dir) / f'step_{step:07d}'
    if final.exists() and not steps.problem(final):
        return final
    partial = final.with_name(f'.{final.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial, model, encoding, training)
    except (OSError, RuntimeError) as error:            # a full disk has several names
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f'{final}: {error}') from None
    shutil.rmtree(final, ignore_errors=True)                    # it exists only if it is damaged
    partial.rename(final)
    sync(final.parent)
    return final


def publish(target: Path, model: GPT, encoding: tokenizer.Encoding, texts: dict[str, str]) -> None:
    """Write the model into the folder `target` without what a resume needs, and `texts`, {name:
    text} of other files beside it. Other files there stay."""
    partial = target.with_name(f'.{target.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        hashes = write_model(partial, model, encoding)
        write_manifest(partial, hashes)                 # of the model: texts may be edited later
        for name, text in texts.items():
            (partial / name).write_text(text, encoding='utf-8')
        target.mkdir(parents=True, exist_ok=True)
        card = target / 'README.md'                     # the one before may have been edited
        if card.exists() and card.read_bytes() != (partial / card.name).read_bytes():
            old = (target / f'README.md.old{number or ""}' for number in count())
            card.replace(next(path for path in old if not path.exists()))
        for file in sorted(partial.iterdir()):
            file.replace(target / file.name)
    except OSError as error:
        if error.errno and not error.filename:          # a full disk
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(partial: Path, model: GPT, encoding: tokenizer.Encoding, training: dict) -> None:
    """All files of a checkpoint, synced to the disk."""
    hashes = write_model(partial, model, encoding)
    with HashedFile(partial / TRAINING) as file:
        torch.save(training, file)
    write_manifest(partial, {**hashes, TRAINING: file.digest.hexdigest()})


def write_model(partial: Path, model: GPT, encoding: tokenizer.Encoding) -> dict[str, str]:
    """The files of a model; returns {name: sha256} of the large one."""
    partial.mkdir(parents=True)
    eot = encoding.eot
    write_json(partial / 'config.json', {**config_json(model.config, eot),
                                         'dtype': str(model.wte.weight.dtype)[6:]})
    (partial / 'tokenizer.json').write_text(tokenizer.to_json(encoding), encoding='utf-8')
    write_json(partial / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.config.block_size,
        'clean_up_tokenization_spaces': False, **tokenizer.special_names(encoding)})
    with HashedFile(partial / WEIGHTS) as file:
        write_safetensors(file, to_hugging_face(model))
    return {WEIGHTS: file.digest.hexdigest()}


def write_manifest(partial: Path, hashes: dict[str, str]) -> None:
    """Sizes and sha256 of the files, where they are not in `hashes`; then everything is synced to
    the disk."""
    write_json(partial / MANIFEST, {
        file.name: {'bytes': file.stat().st_size, 'sha256': hashes.get(file.name) or sha256(file)}
        for file in sorted(partial.iterdir())})
    for path in [*partial.iterdir(), partial]:
        sync(path)


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=1), encoding='utf-8')


def sync(path: Path) -> None:
    if os.name == 'nt':
        return                                                      # Windows syncs no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
