"""
Where text comes from: named data sets, any text data set of the hub, files of one's own.

find() says which files a source has, by name, size and hash, without reading any of the hub's;
Downloads brings those when their turn comes, one on the disk and the next on its way.
"""

import difflib
import glob
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from gpt.data.documents import EXPECTED, SUFFIXES
from gpt.files import digest, fetch

READY = {       # shards of GPT-2's tokens in our own format: the hub's repository
    'fineweb-10B': 'kjj0/fineweb10B-gpt2',              # 103 shards of 100M tokens
    'fineweb-edu-10B': 'kjj0/finewebedu10B-gpt2',       # 99
}
HUB = {         # text: what hub:… would be given
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
READ = (*SUFFIXES, '.json', '.json.gz', '.json.zst')    # .json: lines of it, where it is named
NAMES = ('pydocs', 'shakespeare', *READY, *HUB)


class File(NamedTuple):
    name: str
    path: object            # where it lies (Path), or None: on the hub
    size: int
    hash: str               # sha256, or git's sha1 for small files of the hub
    mtime: int = 0          # of a local one, in ns, before it was read
    repo: str = ''
    revision: str = ''


class Source(NamedTuple):
    name: str               # what the data set is called unless it is given a name
    files: list
    facts: dict             # for the manifest: equal facts stand for equal text
    begins: str = ''        # of documents.Options
    ready: bool = False     # whether the files are shards already


def find(dataset, inputs, split, downloads):
    """The Source of these inputs, else of the data set of that name."""
    if inputs and dataset not in ('pydocs', 'shakespeare'):
        raise ValueError(f'dataset: given {dataset!r} and {inputs[0]!r}, expected one of them; '
                         f'--name={Path(dataset).name} names what is made')
    if dataset == 'shakespeare':
        url, sha256 = SHAKESPEARE
        inputs = inputs or [fetch(url, downloads / 'shakespeare.txt', sha256)]
        return of_files(inputs)._replace(name=dataset)
    if inputs:
        return of_files(inputs)
    if dataset == 'pydocs':
        files = [File(str(path), path, path.stat().st_size, '') for path in python_files()]
        return Source(dataset, files, {'pydocs': f'Python {sys.version.split()[0]}'})
    if dataset in READY:
        repo = READY[dataset]
        revision, names = listed(repo, 'main')
        names = sorted((name for name in names if name.endswith('.bin')),
                       key=lambda name: ('_val_' not in name, name))
        files = described(repo, revision, names)
        facts = {'hub': repo, 'revision': revision, 'files': listing(files)}
        return Source(dataset, files, facts, ready=True)
    if dataset in HUB or dataset.startswith('hub:'):
        what = HUB.get(dataset, dataset.removeprefix('hub:'))
        repo, _, config = what.partition(':')
        if repo.count('/') > 1 or not all(repo.split('/')):
            raise ValueError(f'dataset: given {dataset!r}, expected hub:OWNER/NAME[:CONFIG]')
        files = hub_files(repo, config, split)
        facts = {'hub': what, 'split': split, 'revision': files[0].revision,
                 'files': listing(files)}
        name = dataset if dataset in HUB else what.rpartition('/')[2].replace(':', '-')
        return Source(name, files, facts, BEGINS.get(dataset, ''))
    if not Path(dataset).expanduser().exists() and not glob.has_magic(dataset):
        close = difflib.get_close_matches(dataset, NAMES, n=1)
        hint = f', did you mean {close[0]!r}' if close else ''
        raise ValueError(f"dataset: given {dataset!r}{hint}. Expected one of "
                         f"{', '.join(NAMES)}, hub:OWNER/NAME[:CONFIG], "
                         f"or a file, folder or pattern: {EXPECTED}")
    return of_files([dataset])


def listing(files):
    """What the manifest says of files."""
    return [[file.path.name if file.path else file.name, file.size, file.hash] for file in files]


# Files of one's own.

def of_files(inputs):
    found = {}
    for path in (path for text in inputs for path in text_files(text)):
        found.setdefault(path.resolve(), path)                      # each once
    paths = list(found.values())
    files = []
    for path in tqdm(paths, 'checksums', unit='file', leave=False, delay=2,
                     disable=not sys.stderr.isatty()):
        about = path.stat()
        files.append(File(str(path), path, about.st_size, digest(path), about.st_mtime_ns))
    first = Path(inputs[0]).expanduser()
    first = (first if first.exists() else paths[0].parent).resolve()
    endings = [end for end in sorted(READ, key=len) if first.name.lower().endswith(end)]
    name = first.name if first.is_dir() else first.name[:-len(endings[-1])]
    return Source(name, files, {'files': listing(files)})


def text_files(text):
    """The file `text`, or the text files in the folder or of the pattern `text`, in order."""
    if not text:
        raise ValueError("input: given '', expected a file, a folder or a pattern")
    path = Path(text).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob('*') if file.is_file()
                 and not any(part.startswith('.') for part in file.relative_to(path).parts)]
        wanted = sorted(file for file in files if file.name.lower().endswith(SUFFIXES))
        if not wanted:
            raise ValueError(f'{path}: there is no {EXPECTED} in this folder')
        others = Counter(file.suffix or file.name for file in set(files) - set(wanted))
        if others:
            print(f'{path}: passed over ' + ', '.join(
                f'{count:,} {kind}' for kind, count in sorted(others.items())))
        return wanted
    found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise ValueError(f'{path}: there is no such file or folder')
    for file in found:
        if not file.name.lower().endswith(READ):
            raise ValueError(f'{file}: expected {EXPECTED}, or a folder of these')
    return found


def python_files():
    """The modules of the standard library, without its tests and what others installed."""
    library = Path(sysconfig.get_paths()['stdlib'])
    left_out = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    return sorted(file for file in library.rglob('*.py')
                  if not left_out & set(file.relative_to(library).parts)
                  and not file.relative_to(library).parts[0].startswith('config-'))


# The hub, by its own client: its cache, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE do what they do.

def hub_files(repo, config, split):
    """The Files with the text of a data set on the hub, found by `datasets`.

    Where these are of a kind not read here, or made by a script (which nobody runs any more),
    they are the parquet files that the hub converts every public data set to.
    """
    import datasets
    try:
        found = datasets.load_dataset_builder(repo, config or None).config.data_files
    except Exception as error:                          # each way to fail has a class of its own
        if 'scripts are no longer supported' not in str(error):
            raise refused(f'hub:{repo}', error) from None
        found = None
    if found and split not in found:
        raise ValueError(f"hub:{repo}: no split {split!r} among {', '.join(map(str, found))}; "
                         f'--split names another')
    urls = [str(url) for url in found[split]] if found else []
    if urls and all(url.endswith(READ) for url in urls):
        places = [url.partition('@')[2] for url in urls]    # hf://datasets/OWNER/NAME@revision/path
        return described(repo, places[0].partition('/')[0],
                         [place.partition('/')[2] for place in places])
    revision, names = listed(repo, 'refs/convert/parquet')
    folder = config or next((name.partition('/')[0] for name in names if '/' in name), '')
    names = [name for name in names
             if name.startswith((f'{folder}/{split}/', f'{folder}/partial-{split}/'))]
    if not names:
        raise ValueError(f'hub:{repo}: holds no {EXPECTED}, and the hub has not converted it to '
                         f'parquet; download it and give its files')
    if '/partial-' in names[0]:
        print(f'hub:{repo}: the hub has converted only the first gigabytes of it, which are read')
    return described(repo, revision, names)


def listed(repo, revision):
    """(commit, names of all files) of a data set repository."""
    from huggingface_hub import HfApi
    try:
        info = HfApi().dataset_info(repo, revision=revision)
    except Exception as error:
        raise refused(f'hub:{repo}', error) from None
    return info.sha, sorted(file.rfilename for file in info.siblings)


def described(repo, revision, names):
    """The Files of these names, in this order, with their sizes and hashes."""
    from huggingface_hub import HfApi
    found = {}
    try:
        for i in range(0, len(names), 500):
            for info in HfApi().get_paths_info(repo, names[i:i + 500], revision=revision,
                                               repo_type='dataset'):
                found[info.path] = File(info.path, None, info.size,
                                        info.lfs.sha256 if info.lfs else info.blob_id,
                                        repo=repo, revision=revision)
    except Exception as error:
        raise refused(f'hub:{repo}', error) from None
    return [found[name] for name in names]


def refused(what, error):
    """What to raise for whatever the hub's client raised, in one line that says what to do."""
    from huggingface_hub import errors
    first = str(error).strip().splitlines()[0] if str(error).strip() else ''
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f'{what}: is gated: ask for access on its page, then set HF_TOKEN')
    if isinstance(error, errors.RepositoryNotFoundError) or 'exist on the Hub' in first:
        return ValueError(f'{what}: there is no such data set on the hub, or it is private '
                          f'(set HF_TOKEN)')
    if 'BuilderConfig' in first or 'Config name is missing' in first:
        return ValueError(f'{what}: {" ".join(str(error).split())[:400]}; '
                          f'give one, as in {what}:CONFIG')
    return ConnectionError(f'{what}: the hub cannot be reached or did not answer as expected '
                           f'({type(error).__name__}: {first[:200]}). Look after the network, '
                           f'name a mirror in HF_ENDPOINT, or download the files by other means '
                           f'and give them instead (ready shards: into data/NAME/)')


class Downloads:
    """The Path of file i: local, or downloaded into `folder`, where it stays until a later file is
    asked for."""

    def __init__(self, files, folder):
        self.files, self.folder, self.coming = files, folder, {}
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, i):
        if self.files[i].path:
            return self.files[i].path
        for earlier in [k for k in self.coming if k < i]:
            self.coming.pop(earlier).result().unlink(missing_ok=True)
        for k in range(i, min(i + 2, len(self.files))):
            if k not in self.coming:
                self.coming[k] = self.pool.submit(download, self.files[k], self.folder)
        return self.coming[i].result()


def download(file, folder, tries=2):
    """The Path in `folder` of a file of the hub, or of its cache, of the size and sha256 that the
    hub promises."""
    from huggingface_hub import hf_hub_download
    for _ in range(tries):
        try:
            path = Path(hf_hub_download(file.repo, file.name, repo_type='dataset',
                                        revision=file.revision, local_dir=folder))
        except Exception as error:
            raise refused(f'{file.repo}: {file.name}', error) from None
        found = digest(path)
        if path.stat().st_size == file.size and (found == file.hash or len(file.hash) < 64):
            return path
        path.unlink()
    raise ConnectionError(f'{file.repo}: {file.name} came with sha256 {found}, the hub promises '
                          f'{file.hash}: it was damaged on its way, or lies damaged in the cache '
                          f'of the hub')
