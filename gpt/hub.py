"""
Models of the Hugging Face hub, by its own client and in its cache.

File by file rather than by snapshot_download: the cache then also remembers which files the hub
does not have, so that a model without a tokenizer of its own is known to be complete offline.
HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE do what they always do.
"""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

SIZES = 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'
FULL_NAMES = {**{name: f'openai-community/{name}' for name in SIZES},
              'distilgpt2': 'distilbert/distilgpt2'}
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLED, PICKLED_INDEX = 'pytorch_model.bin', 'pytorch_model.bin.index.json'
# GPT-2's pair, with tokens added to it, and files that show another kind of tokenizer
OLDER_TOKENIZERS = ('vocab.json', 'merges.txt', 'added_tokens.json', 'vocab.txt', 'spiece.model',
                    'tokenizer.model', 'sentencepiece.bpe.model')
CONNECT_SECONDS = 3
OWN_FILES = ('download the files by other means and give them instead (ready shards: into '
             'data/NAME/)')
OWN_FOLDER = f'give a folder that holds config.json, {WEIGHTS} and tokenizer.json'
ADDITIONAL = ('tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json')


def model_folder(name: str, read_config: Callable, weight_files: Callable) -> Path:
    """The folder, in the cache, of the model `name`: 'gpt2' or 'OWNER/NAME'. What the cache has
    complete is used without a network, the rest is downloaded.

    read_config(folder) judges config.json before the weights are downloaded; weight_files(folder)
    names the files that hold them. Raises ValueError that says what to do.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id
    repo = FULL_NAMES.get(name, name)
    try:
        with suppress(errors.LocalEntryNotFoundError, ValueError):
            return download_model(repo, read_config, weight_files, local_files_only=True)
        validate_repo_id(repo)
        check_reachable()
        return download_model(repo, read_config, weight_files)
    except Exception as error:                          # the client has a class for each failure
        if type(error) is ValueError:
            raise                                       # ours
        if folder := cached(repo, weight_files):
            return folder
        near = [] if repo in FULL_NAMES.values() else get_close_matches(
            repo.split('/')[-1], FULL_NAMES, 1)
        reason = hub_error(f'hub:{name}', error, OWN_FOLDER)
        hint = f'. Did you mean {near[0]}?' if near else ''
        raise ValueError(f'no such folder {name!r}; {reason}{hint}') from None


def check_reachable() -> None:
    """Raise ConnectionError if the hub's host takes no connection: its client would try for long.
    """
    from huggingface_hub import constants
    if constants.HF_HUB_OFFLINE or {'http', 'https', 'all'} & getproxies().keys():
        return
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (80 if place.scheme == 'http' else 443)
    try:
        socket.create_connection((place.hostname, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f'{constants.ENDPOINT}: {error}') from None


def cached_or_mirrored(repo: str, name: str) -> str:
    """The path of a file, in the cache; if it is not there, from a mirror, where one is named."""
    from huggingface_hub import constants, errors, hf_hub_download
    try:
        return hf_hub_download(repo, name, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        if constants.ENDPOINT == 'https://huggingface.co':
            raise
    check_reachable()
    return hf_hub_download(repo, name)


def download_model(repo: str, read_config: Callable, weight_files: Callable[[Path], Iterable[str]],
                   **how) -> Path:
    """The folder of `repo` in the cache, once everything is there that the hub has of the model."""
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache
    folder = Path(hf_hub_download(repo, 'config.json', **how)).parent
    read_config(folder)

    def obtain(name):
        """Whether the hub has this file, which is in the cache then."""
        if try_to_load_from_cache(repo, name, revision=folder.name) is None:
            with suppress(errors.RemoteEntryNotFoundError):         # the cache notes that too
                hf_hub_download(repo, name, revision=folder.name, **how)
        return (folder / name).exists()
    if not obtain('tokenizer.json'):
        for name in OLDER_TOKENIZERS:
            obtain(name)
    for name in ADDITIONAL:
        with suppress(errors.LocalEntryNotFoundError):              # not known offline
            obtain(name)
    any(map(obtain, (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)))      # the first that there is
    for name in weight_files(folder):
        obtain(name)
    return folder


def cached(repo: str, weight_files: Callable[[Path], Iterable[str]]) -> Path | None:
    """The folder of a model that other programs left in the cache, if it is enough without what is
    not known of it: weights and a tokenizer, which for GPT-2's own may be missing."""
    from huggingface_hub import try_to_load_from_cache
    with suppress(ValueError):                          # no such name, or no weights
        found = try_to_load_from_cache(repo, 'config.json')
        folder = Path(found).parent if isinstance(found, str) else None
        names = {file.name for file in folder.iterdir() if file.exists()} if folder else set()
        has_tokenizer = (repo in FULL_NAMES.values() or 'tokenizer.json' in names
                         or {'vocab.json', 'merges.txt'} <= names)
        if folder and has_tokenizer and names.issuperset(weight_files(folder)):
            return folder
    return None


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Errors of the hub's client become those of hub_error()."""
    try:
        yield
    except Exception as error:                          # the client has a class for each failure
        raise hub_error(f'hub:{repo}', error) from None


def hub_error(what: str, error: Exception, instead: str = OWN_FILES) -> Exception:
    """What to raise for an error of the hub's client: one line that says what to do.

    ConnectionError for a hub that cannot be reached or fails, ValueError for what is not there.
    """
    from huggingface_hub import constants, errors
    reason = ' '.join(str(error).split())[:400]
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f'{what} is gated: accept the terms on its page at '
                          f'{constants.ENDPOINT}, and set HF_TOKEN to your access token')
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError) or (
            'exist on the Hub' in reason):
        return ValueError(f'{what}: not found at {constants.ENDPOINT}, or it is private (then '
                          f'set HF_TOKEN)')
    if isinstance(error, errors.RemoteEntryNotFoundError):
        missing = 'config.json' if instead == OWN_FOLDER else 'such file'
        return ValueError(f'{what}: the hub has no {missing} of it')
    if 'BuilderConfig' in reason or 'Config name is missing' in reason:
        return ValueError(f'{what}: {reason}; give one, as in {what}:CONFIG')
    failure = (f'{constants.ENDPOINT} cannot be reached or failed '
               f'({type(error).__name__}: {reason})')
    if constants.HF_HUB_OFFLINE:
        failure = 'HF_HUB_OFFLINE is set'
    return ConnectionError(f'{what}: not (completely) in the cache {constants.HF_HUB_CACHE}, and '
                           f'{failure}; run this once with a network, name a mirror in '
                           f'HF_ENDPOINT, or {instead}')
