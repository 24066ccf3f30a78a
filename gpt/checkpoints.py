"""
The only reader and writer of checkpoints. A checkpoint is a Hugging Face model folder:

    out/NAME/step_0002000/
        config.json         GPT-2 as transformers knows it
        model.safetensors   weights under transformers' names and shapes
        tokenizer.json, tokenizer_config.json
        training.pt         what a resume needs besides: optimizer, progress, settings
        manifest.json       size and sha256 of each file; written last, it commits the checkpoint
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt import hub, tokenizer
from gpt.cpu import pack
from gpt.files import ROOT, atomic_write, sha256
from gpt.hub import INDEX, WEIGHTS
from gpt.world import World, pick_dtype
from model import GPT, SIZES, GPTConfig

TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
MANIFEST, TRAINING = 'manifest.json', 'training.pt'
ONLY_FOR_RESUME = TRAINING,             # most of the bytes: not read where only the model is
HUGGING_FACE_KEYS = {                   # of config.json, for the fields of GPTConfig
    'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
    'n_head': 'n_head', 'n_embd': 'n_embd', 'bias': 'bias'}


class Loaded(NamedTuple):
    model: GPT
    encoding: tiktoken.Encoding


# Names and shapes: transformers keeps these four matrices as (in, out), nn.Linear as (out, in).

def to_hugging_face(model: GPT) -> dict[str, torch.Tensor]:
    """{transformers' name: tensor}: rows of the true vocabulary only, zeros for biases we lack."""
    tensors = {}
    for name, p in model.state_dict().items():
        p = p[:model.config.vocab_size] if name == 'wte.weight' else p
        p = p.t() if name.endswith(TRANSPOSED) else p
        tensors[f'transformer.{name}'] = p.contiguous()
        if not model.config.bias and name.startswith(('h.', 'ln_f')):
            out_features = p.size(1) if p.dim() == 2 else p.size(0)
            tensors[f'transformer.{name}'.replace('.weight', '.bias')] = p.new_zeros(out_features)
    return tensors


@torch.no_grad()
def from_hugging_face(model: GPT, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill `model` from (transformers' name, tensor) pairs; every parameter must be there."""
    missing = dict(model.named_parameters())
    for name, tensor in tensors:
        name = name.removeprefix('transformer.')
        if name not in missing:
            continue                                # lm_head (tied), attention masks, unused biases
        p = missing.pop(name)
        if name == 'wte.weight':                    # rows of padding: here, and in some files
            rows = model.config.vocab_size
            p[rows:] = 0
            p, tensor = p[:rows], tensor[:rows]
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        if tensor.shape != p.shape:
            raise ValueError(f'{name}: the file holds {tuple(tensor.shape)}, '
                             f'config.json promises {tuple(p.shape)}')
        p.copy_(tensor)
    if missing:
        raise ValueError(f"these weights are missing: {', '.join(list(missing)[:4])} "
                         f"({len(missing)} in all)")


# config.json. Fields of GPTConfig that transformers does not know are kept under gpt_config, by
# their names. Where one is not at its default, the folder is no plain GPT-2: model_type says so,
# and transformers refuses it.

def config_json(config: GPTConfig, eot_id: int | None) -> dict[str, Any]:
    """The config.json of a model."""
    own = own_settings(config)
    is_plain = own == own_settings(GPTConfig())
    return {
        'architectures': ['GPT2LMHeadModel' if is_plain else 'GPT'],
        'model_type': 'gpt2' if is_plain else 'gpt2-variant', 'activation_function': 'gelu_new',
        **{key: getattr(config, name) for name, key in HUGGING_FACE_KEYS.items()},
        **({'gpt_config': own} if own else {}), 'n_ctx': config.block_size,
        'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout,
        'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True,
        'bos_token_id': eot_id, 'eos_token_id': eot_id}


def own_settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of a model that transformers' GPT-2 does not have."""
    return {name: value for name, value in asdict(config).items()
            if name not in HUGGING_FACE_KEYS and name != 'dropout'}


def read_config(folder: str | Path) -> GPTConfig:
    """The GPTConfig in the config.json of `folder`, without dropout; ValueError if it is not a
    GPT-2 that model.py builds."""
    try:
        config = dict(json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8')))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{folder}/config.json is damaged ({error})') from None
    for key in ('model_type', 'n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if key not in config:
            raise ValueError(f"{folder}: not a GPT-2: its config.json has no '{key}'")
    for key, allowed in {
            'model_type': ['gpt2-variant', 'gpt2'],
            'activation_function': ['gelu_new', 'gelu_pytorch_tanh'],
            'n_inner': [None, 4 * config['n_embd']], 'tie_word_embeddings': [True],
            'layer_norm_epsilon': [1e-5], 'scale_attn_weights': [True],
            'scale_attn_by_inverse_layer_idx': [False]}.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f'{folder}: not a GPT-2 that this program can run: '
                             f'{key} is {config[key]!r}, expected {allowed[-1]!r}')
    own = config.get('gpt_config', {})
    for name in set(own) - {field.name for field in fields(GPTConfig)}:
        raise ValueError(f'{folder}: its model was built with {name}={own[name]!r}, a setting that '
                         f'model.py does not have')
    known = {name: config[key] for name, key in HUGGING_FACE_KEYS.items() if key in config}
    return GPTConfig(**known, **own)


# Reading a model.

def load_model(name: str | Path, device: str | torch.device = 'cpu',
               dtype: torch.dtype = torch.float32) -> Loaded:
    """(model, tokenizer) of the model called `name` (see find), on `device`, in eval mode."""
    return load_folder(find(name), device, dtype=dtype)


def load_folder(folder: str | Path, device: str | torch.device = 'cpu', dropout: float = 0.0,
                dtype: torch.dtype = torch.float32) -> Loaded:
    """load_model() of a folder that find() returned.

    The weights are read into the model tensor by tensor: memory never holds a second copy.
    """
    if str(folder).startswith('random:'):
        return random_model(str(folder)[7:], device, dropout, dtype)
    config = read_config(folder)
    encoding = load_encoding(folder, config.vocab_size)
    config = replace(config, dropout=dropout, vocab_size=encoding.n_vocab)
    with torch.device('meta'):                                      # no memory, no random numbers
        model = GPT(config)
    model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return Loaded(model.eval(), encoding)


def load_for_evaluation(world: World, name: str, dtype: str) -> tuple[GPT, tiktoken.Encoding, dict]:
    """(model, tokenizer, facts) on every process; rank 0 finds, and downloads, for all.

    name '' is the newest run. facts, on rank 0 alone, identify the weights as they are used. On a
    GPU float32 products may be of TF32, as those of published numbers were; on a CPU the model is
    packed.
    """
    folder = world.on_main(find, name or newest_run() or '')
    if world.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
    model, encoding = load_folder(folder, world.device, dtype=pick_dtype(dtype, world.device)[0])
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


def load_weights(model: GPT, folder: str | Path) -> None:
    """Fill `model` from the weights in `folder`."""
    files = weight_files(folder)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for file in files:
            with safe_open(file, framework='pt') as opened:
                names = opened.keys()
            for name in names:      # reopened for each: what was read of a mapped file adds up
                with safe_open(file, framework='pt') as opened:
                    yield name, opened.get_tensor(name)
    try:
        from_hugging_face(model, tensors())
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{folder}: its weights are damaged or incomplete ({error}); download '
                         f'them again (if git brought them, by `git lfs pull`)') from None
    except ValueError as error:
        raise ValueError(f'{folder}: {error}') from None


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors that hold the weights in `folder`: one file, or those an index names."""
    single, index = Path(folder, WEIGHTS), Path(folder, INDEX)
    if single.exists():
        return [single]
    if not index.exists():
        raise ValueError(f'{folder}: no {WEIGHTS} in this folder; pytorch_model.bin is not read, '
                         f'since a pickle can run programs: load it once with transformers, if you '
                         f'trust it, whose save_pretrained() writes safetensors')
    try:
        names = json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f'{index} is damaged ({error}); download it again') from None
    return [Path(folder, name) for name in sorted(set(names))]


def load_encoding(folder: str | Path, vocab_size: int) -> tokenizer.Encoding:
    """The tokenizer of the model in `folder`, which has vocab_size rows: as many as there are
    tokens, or some more for padding, which are left out. Added tokens without a row are left out
    too."""
    gpt2, file = SIZES['gpt2'], tokenizer.stored(folder)
    found = tokenizer.tokenizer_files(folder)
    if not file and (found or not gpt2.vocab_size <= vocab_size <= gpt2.padded_vocab_size):
        beside = f' (only {found[0]})' if found else ''
        raise ValueError(f'{folder}: no tokenizer.json, nor vocab.json and merges.txt{beside}; '
                         f"put the model's there (save_pretrained() of its tokenizer writes them)")
    if not file:
        note(f"{folder}: no tokenizer in this folder; GPT-2's is assumed")
        return tokenizer.gpt2()
    encoding = tokenizer.load(file)
    if encoding.n_vocab > vocab_size:
        try:
            encoding, names = tokenizer.limited(encoding, vocab_size)
        except ValueError as error:
            raise ValueError(f'{folder}: {error}') from None
        note(f"{folder}: the model has {vocab_size:,} rows, none for {', '.join(names)}; left out")
    if isinstance(encoding, tokenizer.HFTokenizer) and encoding.remark:
        note(f'{file}: {encoding.remark}')
    return encoding


@lru_cache
def note(line: str) -> None:
    """Print a line on stderr, once, by one process."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(line, file=sys.stderr)


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
    name, folder = str(name), Path(name).expanduser()
    if name.startswith('random:'):
        return name
    if (folder / 'config.json').exists():
        ours = re.fullmatch(r'step_\d{7,}', folder.name) or (folder / MANIFEST).exists()
        wrong = ours and problem(folder, ONLY_FOR_RESUME)
        if wrong:
            raise ValueError(f'{folder}: {wrong}; an earlier step of the run may be intact')
        return folder
    if folder.is_dir():
        step = best_step(folder) or newest_step(folder, unread=ONLY_FOR_RESUME)[0]
        if step:
            return step
        nanogpt = (folder / 'ckpt.pt').exists()
        hint = "; nanoGPT's ckpt.pt is not read, since it is a pickle" if nanogpt else ''
        raise ValueError(f'{folder}: no checkpoint in this folder, and no config.json of a model'
                         f'{hint}')
    if folder.is_file():
        raise ValueError(f'{name}: given a file, expected the folder of a model')
    first, *rest = folder.parts
    is_path = first == 'out' or name.startswith(('.', '/', '~')) or len(rest) > 1
    if is_path or (rest and Path(first).exists()):
        raise ValueError(f'{name}: no such folder')
    return hub.model_folder(name, read_config, weight_files)


# Saving: to a temporary folder, synced to the disk, renamed. Nothing incomplete has the final name.

def save(out_dir: str | Path, step: int, model: GPT, encoding: tiktoken.Encoding,
         training: dict) -> Path:
    """Write step_NNNNNNN of the run in out_dir, and return its folder.

    training: plain types and tensors. What a run saves at a step depends on its settings alone, so
    an intact checkpoint of this step is left as it is. Raises OSError if it cannot be written.
    """
    final = Path(out_dir) / f'step_{step:07d}'
    if final.exists() and not problem(final):
        return final
    partial = final.with_name(f'.{final.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial, model, encoding, training)
    except (OSError, SafetensorError, RuntimeError) as error:   # a full disk has several names
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f'{final}: {error}') from None
    shutil.rmtree(final, ignore_errors=True)                    # it exists only if it is damaged
    partial.rename(final)
    sync(final.parent)
    return final


def publish(target: Path, model: GPT, encoding: tiktoken.Encoding, texts: dict[str, str]) -> None:
    """Write the model into the folder `target` without what a resume needs, and `texts`, {name:
    text} of other files beside it. Other files there stay."""
    partial = target.with_name(f'.{target.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_model(partial, model, encoding)
        write_manifest(partial)                         # of the model: texts may be edited later
        for name, text in texts.items():
            (partial / name).write_text(text, encoding='utf-8')
        target.mkdir(parents=True, exist_ok=True)
        card = target / 'README.md'                     # the one before may have been edited
        if card.exists() and card.read_bytes() != (partial / card.name).read_bytes():
            old = (target / f'README.md.old{number or ""}' for number in count())
            card.replace(next(path for path in old if not path.exists()))
        for file in sorted(partial.iterdir()):
            file.replace(target / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(partial: Path, model: GPT, encoding: tiktoken.Encoding, training: dict) -> None:
    """All files of a checkpoint, synced to the disk."""
    write_model(partial, model, encoding)
    with open(partial / TRAINING, 'wb') as file:
        torch.save(training, file)
    write_manifest(partial)


def write_model(partial: Path, model: GPT, encoding: tiktoken.Encoding) -> None:
    partial.mkdir(parents=True)
    eot = tokenizer.eot_id(encoding)
    write_json(partial / 'config.json', {**config_json(model.config, eot),
                                         'dtype': str(model.wte.weight.dtype)[6:]})
    (partial / 'tokenizer.json').write_text(tokenizer.to_json(encoding), encoding='utf-8')
    write_json(partial / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.config.block_size,
        'clean_up_tokenization_spaces': False, **tokenizer.special_names(encoding)})
    save_file(to_hugging_face(model), partial / WEIGHTS, metadata={'format': 'pt'})
    (partial / WEIGHTS).chmod(0o644)                    # safetensors makes it private


def write_manifest(partial: Path) -> None:
    """Sizes and sha256 of the files; then everything is synced to the disk."""
    write_json(partial / MANIFEST, {
        file.name: {'bytes': file.stat().st_size, 'sha256': sha256(file)}
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


# The checkpoints of a run.

def load_training(folder: str | Path) -> dict:
    """The dict given to save(), its tensors on the CPU."""
    return torch.load(Path(folder) / TRAINING, map_location='cpu', mmap=True,
                      weights_only=True)


def steps(out_dir: str | Path) -> dict[int, Path]:
    """{step: folder} of the checkpoints in out_dir, oldest first, intact or not."""
    folders = (path for path in Path(out_dir).glob('step_*') if path.name[5:].isdigit())
    return dict(sorted((int(path.name[5:]), path) for path in folders))


def newest_step(out_dir: str | Path, until: float = math.inf, unread: tuple[str, ...] = (),
                ) -> tuple[Path | None, list[tuple[Path, str]]]:
    """(folder of the newest intact checkpoint, None if there are none at all;
    [(folder, what is wrong)] of newer ones). until: the last step to consider.

    Raises ValueError if there are checkpoints but no intact one: no reason to start over.
    """
    problems = []
    for step, folder in reversed(steps(out_dir).items()):
        if step <= until:
            wrong = problem(folder, unread)
            if not wrong:
                return folder, problems
            problems.append((folder, wrong))
    if problems:
        lines = [f'{folder}: {wrong}' for folder, wrong in problems]
        raise ValueError('\n'.join(['there are checkpoints, but no intact one:', *lines,
                                    'give another --out_dir to start a new run']))
    return None, []


def roll_back(out_dir: str | Path, step: int) -> Path | None:
    """The folder of the newest intact checkpoint of at most `step`, if any; newer ones are then
    deleted."""
    folder, _ = newest_step(out_dir, step)
    if folder:
        for number, newer in steps(out_dir).items():
            if number > step:
                remove(newer)
    return folder


def mark_best(out_dir: str | Path, step: int, val_loss: float) -> None:
    """Note in best.json which step of the run has the lowest validation loss."""
    atomic_write(Path(out_dir) / 'best.json',
                 json.dumps({'step': step, 'val_loss': val_loss}, indent=1))


def best_step(out_dir: str | Path) -> Path | None:
    """The folder of the step that mark_best() noted; None if there is none, or not intact."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        best = json.loads((Path(out_dir) / 'best.json').read_text(encoding='utf-8'))
        folder = steps(out_dir)[best['step']]
        return folder if not problem(folder, ONLY_FOR_RESUME) else None


def newest_run() -> Path | None:
    """The run under out/ that saved a checkpoint last, else checkpoint/, else None."""
    saved = sorted(Path('out').rglob(f'step_*/{MANIFEST}'), key=lambda path: path.stat().st_mtime)
    shipped = ROOT / 'checkpoint'
    if saved:
        return saved[-1].parent.parent
    return shipped if (shipped / 'config.json').exists() else None


def problem(folder: Path, unread: tuple[str, ...] = ()) -> str:
    """What is wrong with a checkpoint, '' if it is intact: every byte is read and compared, except
    that of the files named in `unread` only the size is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))
        for name, expected in manifest.items():
            if (folder / name).stat().st_size != expected['bytes']:
                return f'{name} is truncated'
            if name not in unread and sha256(folder / name) != expected['sha256']:
                return f'{name} is damaged'
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f'it is incomplete ({error})'
    return ''


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it no longer counts as one."""
    damaged = folder.with_name(f'{folder.name}.damaged')
    shutil.rmtree(damaged, ignore_errors=True)
    folder.rename(damaged)


def prune(out_dir: str | Path, keep: int, best: int | None = None) -> None:
    """Delete all checkpoints but the `keep` newest and the step `best`."""
    folders = steps(out_dir)
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
