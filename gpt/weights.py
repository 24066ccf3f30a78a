"""
The weights of a GPT-2 in files of ours and of others, judged before anything is read.

    model.safetensors   ours and transformers'; or shards, which model.safetensors.index.json names
    pytorch_model.bin   of older folders, by torch.load(weights_only=True); or shards likewise
    ckpt.pt             a run of nanoGPT, likewise; matrices as nn.Linear has them

Every tensor in them is used, known to be harmless, or refused by name. Files are plain files inside
their folder.
"""

import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from gpt.device import without_memory
from gpt.files import read_json
from gpt.hub import INDEX, PICKLED, PICKLED_INDEX, WEIGHTS
from gpt.shapes import FileName, checked, in_words
from model import GPT, GPTConfig

NANOGPT, ADAPTER = 'ckpt.pt', 'adapter_config.json'
TIED, HEAD = 'wte.weight', 'lm_head.weight'     # one tensor
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
DTYPES = {'F64': torch.float64, 'F32': torch.float32, 'BF16': torch.bfloat16, 'F16': torch.float16}
HARMLESS = (                                # tensors without a part in what GPT-2 computes
    r'h\.\d+\.attn\.(masked_)?bias',                    # the causal mask, and what it masks with
    r'h\.\d+\.(crossattention|ln_cross_attn)\..+')      # reads an encoder, of which there is none
CHUNK = 2 ** 24                             # bytes read at once


Index = TypedDict('Index', {'weight_map': dict[str, FileName]})     # model.safetensors.index.json


class Stored(NamedTuple):
    """A tensor in a file."""
    dtype: torch.dtype | str                    # a name for what is no weight
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]    # its rows from, to


class Weights(NamedTuple):
    """What a folder holds, by names without prefix. `transposed`: as transformers has matrices."""
    folder: Path | str
    tensors: dict[str, Stored]
    transposed: bool = True
    nbytes: float = math.inf                    # of the files


# Files.

def file_in(folder: str | Path, name: str) -> Path | None:
    """The path of the file `name` in `folder`, None if there is none.

    Raises ValueError for anything but a plain file inside the folder. A link may lead to a file
    beside it, and in the hub's cache to the blobs.
    """
    checked(name, folder, FileName)
    path, home = Path(folder, name), Path(folder).resolve()
    homes = [home, home.parent.parent / 'blobs'] if home.parent.name == 'snapshots' else [home]
    if not os.path.lexists(path):
        return None
    with suppress(OSError, RuntimeError):               # of a circle of links
        if path.is_file() and path.resolve().parent in homes:
            return path
    raise ValueError(f'{path}: not a plain file, or a link that leads out of the folder; put the '
                     f'file itself there')


def weight_files(folder: str | Path) -> list[str]:
    """The names of the files that hold the weights in `folder`: one, or those that an index names;
    ValueError if there is neither."""
    for single, index in ((WEIGHTS, INDEX), (PICKLED, PICKLED_INDEX)):
        if file_in(folder, single):
            return [single]
        if file := file_in(folder, index):
            names = {*read_json(file, Index)['weight_map'].values()}
            for name in names:
                file_in(folder, name)                   # before one of these names is downloaded
            return sorted(names)
    raise ValueError(f'{folder}: no {WEIGHTS} in this folder, nor {INDEX}, nor {PICKLED}')


def open_weights(folder: str | Path) -> Weights:
    """The weights in `folder`, of which nothing but the names, types and shapes is read."""
    if os.path.lexists(Path(folder, ADAPTER)):
        raise ValueError(f'{folder}: holds an adapter ({ADAPTER}), which is not read; merge it '
                         f'into the weights (merge_and_unload() of peft), and delete that file')
    is_nanogpt = not file_in(folder, 'config.json')
    tensors, nbytes = {}, 0
    for name in [NANOGPT] if is_nanogpt else weight_files(folder):
        file = file_in(folder, name)
        if not file:
            raise ValueError(f'{folder}: its weights are incomplete ({name} is missing); download '
                             f'them again')
        if is_nanogpt or file.suffix == '.bin':
            pickled = load_pickle(file)
            found = in_memory(pickled.get('model') if is_nanogpt else pickled, file)
        else:
            found = read_header(file)
        for key, stored in found.items():
            key = key.replace('_orig_mod.', '').removeprefix('transformer.')   # if compiled; a head
            if key in tensors:
                raise ValueError(f'{file}: {key} is there twice')
            tensors[key] = stored
        nbytes += file.stat().st_size
    if HEAD in tensors:
        tensors.setdefault(TIED, tensors[HEAD])         # some store the shared tensor as the head
    return Weights(folder, tensors, not is_nanogpt, nbytes)


def read_header(file: Path) -> dict[str, Stored]:
    """{name: Stored} of a file of safetensors."""
    try:
        with safe_open(file, framework='pt'):           # the library holds the header against the
            pass                                        # length of the file
        with open(file, 'rb') as opened:
            start = 8 + int.from_bytes(opened.read(8), 'little')
            header = json.loads(opened.read(start - 8))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f'{file.parent}: its weights are damaged or incomplete ({file.name}: '
                         f'{error}); download them again (if git brought them, by `git lfs pull`)'
                         ) from None
    header.pop('__metadata__', None)

    def stored(dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
        kind, row = DTYPES.get(dtype, dtype), math.prod(shape[1:])

        def read(first: int, last: int) -> torch.Tensor:
            tensor = torch.empty((last - first, *shape[1:]), dtype=kind)
            with open(file, 'rb') as opened:
                opened.seek(start + data_offsets[0] + first * row * kind.itemsize)
                if opened.readinto(tensor.view(torch.uint8).numpy()) < tensor.nbytes:
                    raise ValueError(f'{file}: truncated; download it again')
            return tensor
        return Stored(kind, tuple(shape), read)
    keys = 'dtype', 'shape', 'data_offsets'
    return {name: stored(*(entry[key] for key in keys)) for name, entry in header.items()}


def load_pickle(file: Path) -> dict:
    """The dict in a file that torch saved: tensors and plain types. What would have to run code to
    be read is refused."""
    try:
        found = torch.load(file, map_location='cpu', mmap=True, weights_only=True)
        with zipfile.ZipFile(file) as parts:            # torch compares no checksums
            damaged = parts.testzip()
        if damaged:
            raise ValueError(f'the checksum of {damaged} is another')
    except Exception as error:                          # torch has a class for each failure
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f'{file}: cannot be read: damaged, of torch before 1.6, or not of tensors '
                         f'and plain types alone ({reason}); if you trust it, load it once with '
                         f'the program that wrote it, and save it as safetensors') from None
    if not isinstance(found, dict):
        raise ValueError(f'{file}: given {type(found).__name__}, expected a dict of tensors')
    return found


def in_memory(tensors: Any, file: str | Path = '') -> dict[str, Stored]:
    """{name: Stored} of a state dict."""
    if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(p, torch.Tensor) and not p.is_nested
            for name, p in tensors.items()):
        raise ValueError(f'{file}: expected weights, {{name: tensor}}, and nothing else')

    def stored(p: torch.Tensor) -> Stored:
        is_plain = p.layout == torch.strided and p.device.type == 'cpu' and not p.is_quantized
        kind = p.dtype if is_plain else f'{p.dtype}, {p.layout}, {p.device}'
        return Stored(kind, tuple(p.shape), lambda first, last: p.detach()[first:last])
    return {name: stored(p) for name, p in tensors.items()}


# Into a model. transformers keeps four matrices as (in, out), nn.Linear as (out, in).

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


class HashedFile(io.FileIO):
    """A new file that is hashed while it is written."""

    def __init__(self, path: Path):
        super().__init__(path, 'wb')
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast('B')
        size = len(rest)
        self.digest.update(rest)
        while rest:                                     # a large write may end early
            rest = rest[super().write(rest):]
        return size


def write_safetensors(file: IO[bytes], tensors: dict[str, torch.Tensor]) -> None:
    """What the safetensors library writes, but in pieces that can be hashed on the way: the
    length of the header, the header as JSON, the tensors."""
    header, offset = {'__metadata__': {'format': 'pt'}}, 0
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in sorted(tensors.items()):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {'dtype': names[tensor.dtype], 'shape': list(tensor.shape),
                        'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    file.write(len(text).to_bytes(8, 'little') + text)
    for _, tensor in sorted(tensors.items()):
        file.write(tensor.cpu().view(torch.uint8).numpy().data)


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters of a model, without the padding of the vocabulary."""
    with without_memory():
        one = dict(GPT(replace(config, n_layer=1)).named_parameters())
    return {(name if i is None else f'h.{i}{name[3:]}'): tuple(p.shape)
            for name, p in one.items()
            for i in (range(config.n_layer) if name.startswith('h.0.') else [None])
            } | {TIED: (config.vocab_size, config.n_embd)}


def fit(config: GPTConfig, weights: Weights) -> GPTConfig:
    """`config`, with biases if the file has any but zeros (transformers always trains them).

    Raises ValueError unless the tensors are those of this model, all of them and no others.
    """
    try:
        layers = [re.match(r'h\.(\d{1,9})\.', name) for name in weights.tensors]
        layers = {int(found[1]) for found in layers if found}
        if len(layers) != config.n_layer or max(layers) >= config.n_layer:  # before one is built
            last = f', up to h.{max(layers)}' if layers else ''
            raise ValueError(f'its config has n_layer={config.n_layer}; the files hold '
                             f'{len(layers)} layers{last}')
        expected = shapes(replace(config, bias=True))
        check_tensors(expected, weights)
        biases = [weights.tensors[name] for name in expected.keys() - shapes(config).keys()
                  if name in weights.tensors]
        config = replace(config, bias=config.bias or any(
            stored.read(0, stored.shape[0]).any().item() for stored in biases))
        missing = [name for name in shapes(config) if name not in weights.tensors]
        if missing:
            raise ValueError(f"these weights are missing: {', '.join(missing[:4])} "
                             f'({len(missing)} in all)')
        check_head(weights.tensors)
    except ValueError as error:
        raise ValueError(f'{weights.folder}: {error}') from None
    return config


def check_tensors(expected: dict[str, tuple[int, ...]], weights: Weights) -> None:
    """Each tensor is one of those expected or harmless, of a dtype of weights and of its shape."""
    tensors, nbytes = weights.tensors, 0
    unknown = [name for name in tensors if name not in expected and name != HEAD
               and not any(re.fullmatch(pattern, name) for pattern in HARMLESS)]
    if unknown:
        names = ', '.join(map(in_words, unknown[:4]))
        raise ValueError(f"it holds weights that are not GPT-2's: {names} "
                         f'({len(unknown)} in all); adapters must be merged, and a model with '
                         f'another head is another model')
    for name, stored in tensors.items():
        shape = expected.get(TIED if name == HEAD else name)
        if not shape:
            continue
        if weights.transposed and name.endswith(TRANSPOSED):
            shape = shape[::-1]
        if stored.dtype not in DTYPES.values():
            raise ValueError(f'{name} is of {str(stored.dtype).removeprefix("torch.")}; weights '
                             f'are float64, float32, bfloat16 or float16')
        if stored.shape != shape:
            raise ValueError(f'{name}: the file holds {stored.shape}, its config promises {shape}')
        nbytes += 0 if name == HEAD else math.prod(shape) * stored.dtype.itemsize
    if nbytes > weights.nbytes:
        raise ValueError(f'its tensors have {nbytes:,} bytes, its files {weights.nbytes:,}')


def check_head(tensors: dict[str, Stored]) -> None:
    """lm_head is the embedding of the tokens, or it is not GPT-2."""
    tied, head = tensors[TIED], tensors.get(HEAD, tensors[TIED])
    for first, last in chunks(tied) if head is not tied else ():
        a, b = tied.read(first, last), head.read(first, last)
        if not torch.equal(a.double().nan_to_num(), b.double().nan_to_num()):
            raise ValueError(f'{HEAD} differs from {TIED}: its head is not tied, which model.py '
                             f'has no setting for')


def chunks(stored: Stored) -> Iterable[tuple[int, int]]:
    """(first, last) of rows that are read at once."""
    rows = stored.shape[0]
    size = max(1, CHUNK // max(1, math.prod(stored.shape[1:]) * stored.dtype.itemsize))
    return ((first, min(rows, first + size)) for first in range(0, rows, size))


@torch.no_grad()
def fill(model: GPT, weights: Weights) -> None:
    """Copy the weights into `model`, whose config fit() returned, in pieces: memory never holds a
    second copy. The vocabulary of the model may be shorter. Raises ValueError for NaN."""
    for name, p in model.named_parameters():
        stored = weights.tensors[name]
        if name == TIED:                                # rows of padding: here, and in some files
            p[model.config.vocab_size:] = 0
            p = p[:model.config.vocab_size]
        elif weights.transposed and name.endswith(TRANSPOSED):
            p = p.t()
        for first, last in chunks(stored):
            target = p[first:last]
            rows = stored.read(first, first + len(target)).to(p.dtype)
            if len(rows) and not torch.stack(rows.aminmax()).isfinite().all():
                raise ValueError(f'{weights.folder}: {name} is not finite in {p.dtype}, so the '
                                 f'model gives NaN: its weights are damaged, or another --dtype '
                                 f'is needed')
            target.copy_(rows)
