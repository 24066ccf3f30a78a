"""
Where text comes from: named data sets, text data sets of the hub, your own files.

find() lists the files of a source with name, size and hash, and reads none of the hub's.
Downloads fetches those one by one, the next one in the background.
"""

import difflib
import glob
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gpt.data.documents import EXPECTED, SUFFIXES
from gpt.files import download, plain_file, sha256
from gpt.hub import check_reachable, hub_error, hub_errors
from gpt.shapes import bounded, is_text

READY = {       # shards of GPT-2's tokens in our own format: the hub's repository
    'fineweb-10B': 'kjj0/fineweb10B-gpt2',              # 103 shards of 100M tokens
    'fineweb-edu-10B': 'kjj0/finewebedu10B-gpt2',       # 99
}
HUB = {         # text: what follows hub:
    'fineweb-sample-10BT': 'HuggingFaceFW/fineweb:sample-10BT',
    'fineweb-sample-100BT': 'HuggingFaceFW/fineweb:sample-100BT',
    'fineweb-edu-sample-10BT': 'HuggingFaceFW/fineweb-edu:sample-10BT',
    'fineweb-edu-sample-100BT': 'HuggingFaceFW/fineweb-edu:sample-100BT',
    'openwebtext': 'Skylion007/openwebtext',
    'tinystories': 'roneneldan/TinyStories',
    'wikitext-103': 'Salesforce/wikitext:wikitext-103-raw-v1',
}
BEGINS = {'wikitext-103': ' = [^=]'}    # its rows are lines; an article begins at such a heading
SHAKESPEARE = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')
READABLE = (*SUFFIXES, '.json', '.json.gz', '.json.zst')    # .json: read as lines, if given by name
NAMES = ('pydocs', 'shakespeare', *READY, *HUB)


class File(NamedTuple):
    name: str               # for messages
    path: Path | None       # None: on the hub
    size: int               # bytes
    hash: str               # sha256, or git's sha1 for small files of the hub
    mtime: int = 0          # of a local file, in ns, before it was read
    label: str = ''         # of a local file: its name from the folder given on
    repo: str = ''
    revision: str = ''


class Source(NamedTuple):
    name: str               # the default name of the data set
    files: list[File]
    facts: dict             # for the manifest: equal facts mean equal text
    begins: str = ''        # of documents.Options
    ready: bool = False     # the files are shards already


def find(dataset: str, inputs: Sequence[str], split: str, downloads: Path) -> Source:
    """The Source of these inputs, or without any of the data set of that name ('': pydocs).

    downloads: a folder for what is not on the hub. Raises ValueError for an unknown name or file,
    ConnectionError without the hub.
    """
    if inputs and dataset not in ('', 'shakespeare'):
        raise ValueError(f'dataset: given {dataset!r} and {inputs[0]!r}, expected one of them; '
                         f'--name={Path(dataset).name} names the result')
    if dataset == 'shakespeare':
        url, expected = SHAKESPEARE
        inputs = inputs or [download(url, downloads / 'shakespeare.txt', expected)]
        return from_files(inputs)._replace(name=dataset)
    if inputs:
        return from_files(inputs)
    if dataset in ('', 'pydocs'):
        files = [File(str(path), path, path.stat().st_size, '') for path in python_files()]
        return Source('pydocs', files, {'pydocs': f'Python {sys.version.split()[0]}'})
    if dataset in READY:
        return ready_shards(dataset)
    if dataset in HUB or dataset.startswith('hub:'):
        return from_hub(dataset, split)
    if not Path(dataset).expanduser().exists() and not glob.has_magic(dataset):
        close = difflib.get_close_matches(dataset, NAMES, n=1)
        hint = f', did you mean {close[0]!r}' if close else ''
        raise ValueError(f"dataset: given {dataset!r}{hint}; expected one of {', '.join(NAMES)}, "
                         f"hub:OWNER/NAME[:CONFIG], or a file, folder or pattern: {EXPECTED}")
    return from_files([dataset])


def listing(files: list[File]) -> list[list]:
    """[name, size, hash] of each file, for the manifest."""
    return [[file.label or file.name, file.size, file.hash] for file in files]


# Your own files.

def from_files(inputs: Sequence[str]) -> Source:
    """The Source of files, folders and patterns; a file given twice is read once."""
    given = [text and str(Path(os.path.expanduser(text))) for text in inputs]
    found = {}
    for text in given:
        for path in text_files(text):
            found.setdefault(identity(path), path)
    folder = os.path.commonpath([folder_of(os.path.abspath(text)) for text in given])
    files = []
    for path in tqdm(found.values(), 'checksums', unit='file', leave=False, delay=2, disable=None):
        stat, label = os.stat(path), os.path.relpath(path, folder)
        files.append(File(path, Path(path), stat.st_size, sha256(path), stat.st_mtime_ns,
                          label.replace(os.sep, '/')))
    first = Path(given[0])
    if not first.exists():                              # a pattern: named by its folder
        first = files[0].path.parent
    first = first.resolve()
    if first.is_dir():
        return Source(first.name, files, {'files': listing(files)})
    suffix = max((end for end in READABLE if first.name.lower().endswith(end)), key=len)
    return Source(first.name[:-len(suffix)], files, {'files': listing(files)})


def identity(path: str) -> object:
    """Equal for two paths of one file, but not for hard links."""
    stat = os.stat(path)
    return (stat.st_dev, stat.st_ino) if stat.st_nlink == 1 else os.path.realpath(path)


def folder_of(text: str) -> str:
    """A folder itself, the folder of a file, or that in which a pattern looks."""
    while glob.has_magic(text) and not os.path.exists(text):
        text = os.path.dirname(text)
    return text if os.path.isdir(text) else os.path.dirname(text)


def text_files(text: str) -> list[str]:
    """The file `text`, or the text files in the folder or of the pattern `text`, sorted."""
    if not text:
        raise ValueError("input: given '', expected a file, a folder or a pattern")
    if os.path.isdir(text):
        return files_in(text)
    found = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
    if not found:
        raise ValueError(f'{text}: no such file or folder')
    for file in found:
        plain_file(file)
        if not file.lower().endswith(READABLE):
            raise ValueError(f'{file}: expected {EXPECTED}, or a folder of these')
    return found


def files_in(folder: str) -> list[str]:
    """The text files in a folder, sorted; hidden ones are left out, other kinds reported."""
    texts, others = [], Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            path = os.path.join(place, name)
            if name.startswith('.') or not os.path.isfile(path):
                continue
            if name.lower().endswith(SUFFIXES):
                if not is_text(path):               # the manifest could not name it
                    raise ValueError(f'{path!r}: its name is not UTF-8; rename it')
                texts.append(path)
            else:
                others[os.path.splitext(name)[1] or name] += 1
    skipped = ', '.join(f'{count:,} {kind}' for kind, count in sorted(others.items()))
    if not texts:
        hint = ("; .arrow files are those of datasets' save_to_disk: datasets.load_from_disk(…)"
                ".to_parquet('a.parquet') converts them" if others['.arrow'] else '')
        raise ValueError(f'{folder}: given {skipped or "no files"}, expected {EXPECTED}{hint}')
    if skipped:
        print(bounded(f'{folder}: skipped {skipped}'))
    return sorted(texts, key=lambda path: path.split(os.sep))


def python_files() -> list[Path]:
    """The modules of the standard library, without its tests and installed packages."""
    library = Path(sysconfig.get_paths()['stdlib'])
    excluded = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    return sorted(file for file in library.rglob('*.py')
                  if not excluded & set(file.relative_to(library).parts)
                  and not file.relative_to(library).parts[0].startswith('config-'))


# The hub, by its own client: its cache, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as usual.

def ready_shards(dataset: str) -> Source:
    repo = READY[dataset]
    revision, names = list_repo(repo, 'main')
    names = sorted((name for name in names if name.endswith('.bin')),
                   key=lambda name: ('_val_' not in name, name))
    files = describe_files(repo, revision, names)
    facts = {'hub': repo, 'revision': revision, 'files': listing(files)}
    return Source(dataset, files, facts, ready=True)


def from_hub(dataset: str, split: str) -> Source:
    """The Source of a name in HUB, or of hub:OWNER/NAME[:CONFIG]."""
    place = HUB.get(dataset, dataset.removeprefix('hub:'))
    repo, _, config = place.partition(':')
    if repo.count('/') > 1 or not all(repo.split('/')):
        raise ValueError(f'dataset: given {dataset!r}, expected hub:OWNER/NAME[:CONFIG]')
    files = hub_files(repo, config, split)
    facts = {'hub': place, 'split': split, 'revision': files[0].revision, 'files': listing(files)}
    name = dataset if dataset in HUB else place.rpartition('/')[2].replace(':', '-')
    return Source(name, files, facts, BEGINS.get(dataset, ''))


def hub_files(repo: str, config: str, split: str) -> list[File]:
    """The text files of a split of a hub data set, found by `datasets`.

    Where these are of a kind not read here, or made by a script (which is no longer supported),
    they are the parquet files to which the hub converts every public data set.
    """
    import datasets
    try:
        check_reachable()
        splits = datasets.load_dataset_builder(repo, config or None).config.data_files
    except Exception as error:                          # each failure has a class of its own
        if 'scripts are no longer supported' not in str(error):
            raise hub_error(f'hub:{repo}', error) from None
        splits = None
    if splits and split not in splits:
        raise ValueError(f"hub:{repo}: no split {split!r} among {', '.join(map(str, splits))}; "
                         f'--split names another')
    urls = [str(url) for url in splits[split]] if splits else []
    if urls and all(url.endswith(READABLE) for url in urls):
        places = [url.partition('@')[2] for url in urls]    # hf://datasets/OWNER/NAME@revision/path
        return describe_files(repo, places[0].partition('/')[0],
                              [place.partition('/')[2] for place in places])
    return converted_files(repo, config, split)


def converted_files(repo: str, config: str, split: str) -> list[File]:
    """The parquet files that the hub made of a data set, perhaps of its beginning only."""
    revision, names = list_repo(repo, 'refs/convert/parquet')
    folder = config or next((name.partition('/')[0] for name in names if '/' in name), '')
    names = [name for name in names
             if name.startswith((f'{folder}/{split}/', f'{folder}/partial-{split}/'))]
    if not names:
        raise ValueError(f'hub:{repo}: has no {EXPECTED}, and the hub has not converted it to '
                         f'parquet; download it and give its files')
    if '/partial-' in names[0]:
        print(f'hub:{repo}: reading only its first gigabytes; the hub has converted no more')
    return describe_files(repo, revision, names)


def list_repo(repo: str, revision: str) -> tuple[str, list[str]]:
    """(commit, names of all files) of a data set repository."""
    from huggingface_hub import HfApi
    with hub_errors(repo):
        check_reachable()
        info = HfApi().dataset_info(repo, revision=revision)
    return info.sha, sorted(file.rfilename for file in info.siblings)


def describe_files(repo: str, revision: str, names: list[str]) -> list[File]:
    """The Files of these names, in this order, with their sizes and hashes."""
    from huggingface_hub import HfApi
    found = {}
    with hub_errors(repo):
        for i in range(0, len(names), 500):
            for info in HfApi().get_paths_info(repo, names[i:i + 500], revision=revision,
                                               repo_type='dataset'):
                found[info.path] = File(info.path, None, info.size,
                                        info.lfs.sha256 if info.lfs else info.blob_id,
                                        repo=repo, revision=revision)
    return [found[name] for name in names]


class Downloads:
    """The path of file i: local, or downloaded to `folder` and deleted when a later one is needed.
    """

    def __init__(self, files: list[File], folder: Path):
        self.files, self.folder, self.pending = files, folder, {}
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, i: int) -> Path:
        if self.files[i].path:
            return self.files[i].path
        for earlier in [k for k in self.pending if k < i]:
            self.pending.pop(earlier).result().unlink(missing_ok=True)
        for k in range(i, min(i + 2, len(self.files))):
            if k not in self.pending:
                self.pending[k] = self.pool.submit(download_from_hub, self.files[k], self.folder)
        return self.pending[i].result()


def download_from_hub(file: File, folder: Path, tries: int = 2) -> Path:
    """The path in `folder` of a file of the hub, or in its cache; size and sha256 are checked."""
    from huggingface_hub import hf_hub_download
    for _ in range(tries):
        with hub_errors(file.repo):
            path = Path(hf_hub_download(file.repo, file.name, repo_type='dataset',
                                        revision=file.revision, local_dir=folder))
        found = sha256(path)
        has_sha256 = len(file.hash) == 64
        if path.stat().st_size == file.size and (found == file.hash or not has_sha256):
            return path
        path.unlink()
    raise ConnectionError(f'{file.repo}: {file.name}: given sha256 {found}, expected {file.hash}; '
                          f'damaged in transfer or in the cache of the hub')
