"""
The only reader and writer of checkpoints. A checkpoint is a Hugging Face model folder:

    out/NAME/step_0002000/
        config.json         GPT-2 as transformers knows it
        model.safetensors   weights under transformers' names and shapes
        tokenizer.json, tokenizer_config.json
        training.pt         what a resume needs besides: optimizer, step, settings
        manifest.json       size and sha256 of each; its presence is the commit mark
"""

import hashlib
import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gpt import tokenizer
from gpt import files as fetch
from gpt.distributed import on_main, pick_dtype
from gpt.cpu import pack
from model import GPT, SIZES, GPTConfig
from gpt.replicas import like, whole

ROOT = Path(__file__).resolve().parent.parent
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
MANIFEST = 'manifest.json'
TRAINING = 'training.pt'
NOT_OF_THE_MODEL = TRAINING,                        # most of the bytes; only a resume reads it
HUB_NAMES = {**{name: f'openai-community/{name}' for name in SIZES},
             'distilgpt2': 'distilbert/distilgpt2'}


# Names and shapes: transformers keeps these four matrices as (in, out), nn.Linear as (out, in).

def to_hugging_face(model):
    """{transformers' name: tensor}: rows of the true vocabulary only,
    zeros for biases we do not have."""
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
def from_hugging_face(model, tensors):
    """Fill `model` from an iterator of (transformers' name, tensor);
    every parameter must be there."""
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


def config_json(config, eot_id):
    """The config.json of a GPTConfig, as a dict; `bias` is ours, transformers passes over it."""
    return {
        'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2',
        'activation_function': 'gelu_new',
        'n_layer': config.n_layer, 'n_head': config.n_head, 'n_embd': config.n_embd,
        'n_positions': config.block_size, 'n_ctx': config.block_size,
        'vocab_size': config.vocab_size,
        'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout,
        'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'bias': config.bias,
        'bos_token_id': eot_id, 'eos_token_id': eot_id}


def read_config(folder):
    """The GPTConfig in the config.json of `folder`;
    ValueError when it is not a GPT-2 as we build one."""
    try:
        facts = dict(json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8')))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{folder}/config.json is damaged ({error})') from None
    for key in ('model_type', 'n_positions', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
        if key not in facts:
            raise ValueError(f"{folder}: not a GPT-2: its config.json has no '{key}'")
    for key, allowed in {
            'model_type': ['gpt2'], 'activation_function': ['gelu_new', 'gelu_pytorch_tanh'],
            'n_inner': [None, 4 * facts['n_embd']], 'tie_word_embeddings': [True],
            'layer_norm_epsilon': [1e-5], 'scale_attn_weights': [True],
            'scale_attn_by_inverse_layer_idx': [False]}.items():
        if facts.get(key, allowed[0]) not in allowed:
            raise ValueError(f'{folder}: not a GPT-2 that this program can run: '
                             f'{key} is {facts[key]!r}, expected {allowed[-1]!r}')
    return GPTConfig(block_size=facts['n_positions'], vocab_size=facts['vocab_size'],
                     n_layer=facts['n_layer'], n_head=facts['n_head'], n_embd=facts['n_embd'],
                     dropout=0.0, bias=facts.get('bias', True))


def load_weights(model, folder):
    """Fill `model` from the weights in `folder`."""
    files = weight_files(folder)

    def tensors():
        for file in files:
            with safe_open(file, framework='pt') as opened:
                names = opened.keys()
            for name in names:      # opened anew for each: what was read of a mapped file adds up
                with safe_open(file, framework='pt') as opened:
                    yield name, opened.get_tensor(name)
    try:
        from_hugging_face(model, tensors())
    except (SafetensorError, OSError) as error:
        raise ValueError(f'{folder}: its weights are damaged or only half there ({error}); fetch '
                         f'them again (where git brought them, by `git lfs pull`)') from None
    except ValueError as error:
        raise ValueError(f'{folder}: {error}') from None


def weight_files(folder):
    """The safetensors that hold the weights in `folder`: one file, or those that an index names."""
    if (single := Path(folder, WEIGHTS)).exists():
        return [single]
    index = Path(folder, INDEX)
    if not index.exists():
        raise ValueError(f'{folder}: there is no {WEIGHTS} here; pytorch_model.bin is not read, '
                         f'since a pickle can run programs: load it once with transformers, if you '
                         f'trust it, whose save_pretrained() writes safetensors')
    try:
        names = json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f'{index} is damaged ({error}); fetch it again') from None
    return [Path(folder, name) for name in sorted(set(names))]


def load_encoding(folder, vocab_size):
    """The tiktoken.Encoding of the model in `folder`, of which it has vocab_size rows: as many as
    there are tokens, or some more for padding, which are left out."""
    gpt2 = SIZES['gpt2']
    if file := tokenizer.stored(folder):
        encoding = tokenizer.load(file)
    elif gpt2.vocab_size <= vocab_size <= gpt2.padded_vocab_size:
        encoding = tokenizer.gpt2()
    else:
        raise ValueError(f'{folder}: there is no tokenizer.json, nor vocab.json and merges.txt; '
                         f"put the model's there (save_pretrained() of its tokenizer writes them)")
    if encoding.n_vocab > vocab_size:
        raise ValueError(f'{folder}: its tokenizer has {encoding.n_vocab:,} tokens, the model '
                         f'knows {vocab_size:,}')
    return encoding


def load_model(name, device='cpu', dtype=torch.float32):
    """(model, encoding) of the model called `name` (see find), on `device`, in eval mode."""
    return load_folder(find(name), device, dtype=dtype)


def load_folder(folder, device='cpu', dropout=0.0, dtype=torch.float32):
    """load_model() of a folder that find() gave.

    The weights are read into the model tensor by tensor: there is never a second one in memory.
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
    return model.eval(), encoding


def open_for(world, name, dtype):
    """(model, encoding, facts) of an evaluation, on every process of `world`.

    name '' is the newest run; rank 0 finds, and downloads, for all. facts identify the weights as
    they are used. On a GPU float32 products may be of TF32, as those of published numbers were; on
    a CPU the model is packed.
    """
    where = on_main(world, find, name or newest_of_all() or '')
    if world.device.type == 'cuda':
        torch.set_float32_matmul_precision('high')
    model, encoding = load_folder(where, world.device, dtype=pick_dtype(dtype, world.device)[0])
    weights = hashlib.sha256()
    for key, p in sorted(model.state_dict().items()):
        weights.update(key.encode() + p.cpu().contiguous().view(torch.uint8).numpy().data)
    facts = {'name': name or str(where), 'folder': str(where), 'sha256': weights.hexdigest(),
             'parameters': model.num_parameters(),
             'dtype': str(model.wte.weight.dtype)[6:]}
    return pack(model), encoding, facts


def official_name(name):
    """'gpt2' … 'gpt2-xl' if `name` stands for OpenAI's weights, else ''."""
    name = name.removeprefix('openai-community/')
    return name if name in SIZES else ''


def random_model(size, device, dropout, dtype):
    """What 'random:gpt2' stands for: a model of that size as it is before training, by seed 0."""
    if size not in SIZES:
        raise ValueError(f"random:{size}: expected random: and one of {', '.join(SIZES)}")
    torch.manual_seed(0)
    return GPT(replace(SIZES[size], dropout=dropout)).to(device, dtype).eval(), tokenizer.gpt2()


def find(name):
    """The folder that holds the model called `name`: a folder of the Hugging Face kind, one of our
    steps, a run (its best step, else its newest), 'gpt2' … 'gpt2-xl', or another GPT-2 on the hub.
    'random:gpt2' stands for itself.

    Raises ValueError when there is none, saying what to do.
    """
    name, folder = str(name), Path(name).expanduser()
    if name.startswith('random:'):
        return name
    if (folder / 'config.json').exists():
        ours = re.fullmatch(r'step_\d{7,}', folder.name) or (folder / MANIFEST).exists()
        if ours and (wrong := problem(folder, NOT_OF_THE_MODEL)):
            raise ValueError(f'{folder}: {wrong}; an earlier step of the run may be whole')
        return folder
    if folder.is_dir():
        found = best_step(folder) or newest_step(folder, unread=NOT_OF_THE_MODEL)[0]
        if found is None:
            theirs = "; nanoGPT's ckpt.pt is not read, being a pickle"
            raise ValueError(f'{folder}: there is no checkpoint in this folder, and no config.json '
                             f'of a model{theirs * (folder / "ckpt.pt").exists()}')
        return found
    if folder.is_file():
        raise ValueError(f'{name}: is a file, expected the folder of a model')
    owner, *repo = folder.parts
    if owner == 'out' or name.startswith(('.', '/', '~')) or len(repo) > 1 or (
            repo and Path(owner).exists()):
        raise ValueError(f'{name}: there is no such folder')
    return from_hub(HUB_NAMES.get(name, name))


def from_hub(repo):
    """The folder, in the Hugging Face cache, of the model `repo` on the hub.

    What is whole in the cache is taken as it is, without a network; else it is downloaded, or the
    download goes on. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE do what they always do.
    """
    from huggingface_hub import errors
    try:
        with suppress(errors.LocalEntryNotFoundError, ValueError):
            return hub_files(repo, local_files_only=True)
        return hub_files(repo)
    except Exception as error:                          # each way to fail has a class of its own
        if type(error) is ValueError:
            raise                                       # ours
        near = [] if repo in HUB_NAMES.values() else get_close_matches(
            repo.split('/')[-1], HUB_NAMES, 1)
        hint = f'. Did you mean {near[0]}?' if near else ''
        raise ValueError(f'{repo}: {what_to_do(repo, error)}{hint}') from None


def hub_files(repo, **how):
    """The folder of `repo` in the cache, when all is there that the hub has of the model."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
    folder = Path(hf_hub_download(repo, 'config.json', **how)).parent
    read_config(folder)                                 # refused before its weights are downloaded

    def bring(name):
        """Whether the hub has this file, which is in the cache then."""
        if try_to_load_from_cache(repo, name, revision=folder.name) is None:
            with suppress(errors.RemoteEntryNotFoundError):     # the cache notes that too
                hf_hub_download(repo, name, revision=folder.name, **how)
        return (folder / name).exists()
    if not bring('tokenizer.json') and bring('vocab.json'):     # load_encoding says what is missing
        bring('merges.txt')
    if not bring(WEIGHTS):
        bring(INDEX)
        for file in weight_files(folder):
            bring(file.name)
    return folder


def what_to_do(repo, error):
    """Why a model could not be had from the hub, and the way out."""
    from huggingface_hub import constants, errors
    if isinstance(error, errors.GatedRepoError):
        return (f'its owner wants to know who you are: accept the terms at {constants.ENDPOINT}/'
                f'{repo}, and set HF_TOKEN to a token of yours')
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (f'there is no such folder here and no such model at {constants.ENDPOINT}, '
                f'or it is private (then set HF_TOKEN)')
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return 'the hub has no config.json of it'
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        why = ('HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else
               f'{constants.ENDPOINT} cannot be reached')
        return (f'there is no such folder, it is not (whole) in the cache '
                f'{constants.HF_HUB_CACHE}, and {why}. Run this once with a network, name a '
                f'mirror in HF_ENDPOINT, or give a folder that holds config.json, {WEIGHTS} and '
                f'tokenizer.json')
    reason = str(error).strip().splitlines() or ['no reason given']
    return f'could not be had from {constants.ENDPOINT} ({type(error).__name__}: {reason[0]})'


# Saving: into a temporary folder, synced to the disk, renamed.
# Nothing half-written bears the final name.

def save(out_dir, step, model, encoding, training):
    """Write step_NNNNNNN of the run in out_dir, and return its folder.

    training: a dict of plain types and tensors. The state at a step is a function of the run's
    settings, so that a step which is already there, whole, is left alone.
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
    shutil.rmtree(final, ignore_errors=True)                    # there only if it does not verify
    partial.rename(final)
    sync(final.parent)
    return final


def publish(target, model, encoding, texts):
    """Write the model into the folder `target` without what a resume needs, and texts, {name: text}
    of other files beside it. What else is there stays."""
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


def write(partial, model, encoding, training):
    """All files of a checkpoint, synced to the disk."""
    write_model(partial, model, encoding)
    with open(partial / TRAINING, 'wb') as file:
        torch.save(training, file)
    write_manifest(partial)


def write_model(partial, model, encoding):
    partial.mkdir(parents=True)
    eot = tokenizer.eot_id(encoding)
    write_json(partial / 'config.json', {**config_json(model.config, eot),
                                         'dtype': str(model.wte.weight.dtype)[6:]})
    (partial / 'tokenizer.json').write_text(tokenizer.to_json(encoding), encoding='utf-8')
    write_json(partial / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.config.block_size,
        'clean_up_tokenization_spaces': False,
        **({} if eot is None else {'bos_token': tokenizer.EOT, 'eos_token': tokenizer.EOT})})
    save_file(to_hugging_face(model), partial / WEIGHTS, metadata={'format': 'pt'})
    (partial / WEIGHTS).chmod(0o644)                    # the library makes it readable to us alone


def write_manifest(partial):
    """Sizes and sha256 of the files, then all is synced to the disk."""
    write_json(partial / MANIFEST, {
        file.name: {'bytes': file.stat().st_size, 'sha256': fetch.digest(file)}
        for file in sorted(partial.iterdir())})
    for path in [*partial.iterdir(), partial]:
        sync(path)


def load_training(folder):
    """The dict given to save(), its tensors on the CPU."""
    return torch.load(Path(folder) / TRAINING, map_location='cpu', mmap=True,
                      weights_only=True)


def optimizer_state(model, optimizers, keep=True):
    """{parameter name: {key: tensor}} of all optimizers: step counts and moments, no learning
    rates. Of a sharded model all processes must ask, and those who `keep` it get it."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: {key: whole(value, keep) for key, value in state.items()}
            for optimizer in optimizers for p, state in optimizer.state.items()}


def restore_optimizers(model, optimizers, saved):
    """Put an optimizer_state back; the learning rates and weight decay of `optimizers`
    stay theirs."""
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        is_adamw = isinstance(optimizer, torch.optim.AdamW)
        expected = {'step', 'exp_avg', 'exp_avg_sq'} if is_adamw else {'momentum_buffer'}
        for p in (p for group in optimizer.param_groups for p in group['params']):
            state = saved.get(names[p], {})
            if set(state) != expected:
                raise ValueError(f'the checkpoint has no matching optimizer state for {names[p]}; '
                                 f'was it trained with another --optimizer?')
            optimizer.state[p] = {key: like(value, p) for key, value in state.items()}


def steps(out_dir):
    """{step: folder} of the checkpoints in out_dir, oldest first, whole or not."""
    found = (path for path in Path(out_dir).glob('step_*') if path.name[5:].isdigit())
    return dict(sorted((int(path.name[5:]), path) for path in found))


def newest_step(out_dir, until=math.inf, unread=()):
    """(folder of the newest whole checkpoint or None if there are none at all,
    [(folder, what is wrong)] of newer ones).

    Raises ValueError when there are checkpoints and not one is whole:
    that is no reason to start over.
    """
    problems = []
    for step, folder in reversed(steps(out_dir).items()):
        if step <= until:
            if not (wrong := problem(folder, unread)):
                return folder, problems
            problems.append((folder, wrong))
    if problems:
        words = [f'{folder}: {wrong}' for folder, wrong in problems]
        raise ValueError('\n'.join(['there are checkpoints, and none of them is whole:', *words,
                                    'give another --out_dir to start a new run']))
    return None, []


def back_to(out_dir, step):
    """The folder of the newest whole checkpoint of at most `step`, or None; newer ones are
    deleted."""
    folder, _ = newest_step(out_dir, step)
    if folder:
        for number, newer in steps(out_dir).items():
            if number > step:
                remove(newer)
    return folder


def mark_best(out_dir, step, val_loss):
    """Note in best.json which step of the run has the lowest validation loss."""
    partial_file = Path(out_dir) / '.best.json.partial'
    write_json(partial_file, {'step': step, 'val_loss': val_loss})
    partial_file.replace(Path(out_dir) / 'best.json')


def best_step(out_dir):
    """The folder of the step that mark_best() noted, or None when there is none, or not whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        best = json.loads((Path(out_dir) / 'best.json').read_text(encoding='utf-8'))
        folder = steps(out_dir)[best['step']]
        return folder if not problem(folder, NOT_OF_THE_MODEL) else None


def newest_of_all():
    """The run under out/ that saved a checkpoint last, else checkpoint/, else None."""
    saved = sorted(Path('out').rglob(f'step_*/{MANIFEST}'), key=lambda path: path.stat().st_mtime)
    committed = ROOT / 'checkpoint'
    return (saved[-1].parent.parent if saved else
            committed if (committed / 'config.json').exists() else None)


def problem(folder, unread=()):
    """What is wrong with a checkpoint, '' when it is whole: every byte is read and compared, of
    the files named in `unread` the size alone."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))
        for name, facts in manifest.items():
            if (folder / name).stat().st_size != facts['bytes']:
                return f'{name} is truncated'
            if name not in unread and fetch.digest(folder / name) != facts['sha256']:
                return f'{name} is damaged'
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f'it is incomplete ({error})'
    return ''


def set_aside(folder):
    """Rename a checkpoint that is not whole, so that nobody counts it among those that are."""
    aside = folder.with_name(f'{folder.name}.damaged')
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def prune(out_dir, keep, best=None):
    """Delete all checkpoints but the `keep` newest and the step `best`."""
    folders = steps(out_dir)
    for step in list(folders)[:-keep]:
        if step != best:
            remove(folders[step])


def remove(folder):
    """Delete a checkpoint as far as the disk allows; what is left of it is not whole."""
    with suppress(OSError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def lock(out_dir):
    """Take the run's folder for this process, which holds it until the returned file is closed."""
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    file = open(Path(out_dir) / '.lock', 'a')
    try:
        fetch.lock(file, wait=False)
    except BlockingIOError:
        raise ValueError(f'{out_dir}: another process is training in this folder; '
                         f'give another --out_dir, or end that process') from None
    for leftover in Path(out_dir).glob('.step_*.partial'):
        shutil.rmtree(leftover, ignore_errors=True)
    return file


def write_json(path, data):
    path.write_text(json.dumps(data, indent=1), encoding='utf-8')


def sync(path):
    if os.name == 'nt':
        return                                                      # Windows syncs no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
