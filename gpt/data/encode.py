"""
Documents to tokens, in this process or several, and which documents are validation.

Worker processes take batches of bytes and return uint16 as bytes. Results and their order do not
depend on the number of processes.
"""

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from gpt.data import documents
from gpt.tokenizer import encode_documents, load

IN_FLIGHT_BYTES = 2 ** 26   # of batches that wait for a process or for being written
FEW = 1000                  # documents: up to these their sizes count in the split
COARSE = 2                  # a split is not to be this many times larger or smaller than asked
CUT = 1.0, 0.0              # of val_range(): long documents are cut in two
LEAST = 64                  # characters of a document's part, which no short document equals
WORKER = {}                 # what a process needs for every batch, see begin()


class SplitRule(NamedTuple):
    """The rule by which a document is train or validation."""
    seed: int
    val_fraction: float
    threshold: float        # of document_hash(): lower ones are validation; 0: cut documents
    low: float = 0.0        # but those below are not; of CUT: short documents are not cut


def tokenized(batches: Iterable[documents.Batch], workers: int, vocabulary: Path,
              options: documents.Options, rule: SplitRule) -> Iterator[tuple]:
    """(after, {split: (ids, amounts)}, counts) of every batch, in order.

    vocabulary: a tokenizer.json. ids: uint16 as bytes. amounts: tokens, documents, and bytes of the
    text as UTF-8. counts: see documents.texts().
    """
    setup = vocabulary, options, rule
    if workers == 1:
        begin(*setup)
        yield from map(tokenize, batches)
        return
    waiting, in_flight = deque(), 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), begin_process,
                             setup) as pool:
        try:
            for batch in batches:
                size = batch.size()
                while waiting and (len(waiting) > 3 * workers
                                   or in_flight + size > IN_FLIGHT_BYTES):
                    done, future = waiting.popleft()
                    yield result_of(future, pool)
                    in_flight -= done
                waiting.append((size, submit(pool, batch)))
                in_flight += size
            while waiting:
                yield result_of(waiting.popleft()[1], pool)
        except BrokenProcessPool:
            raise ChildProcessError('a worker process was killed (out of memory?); give fewer '
                                    '--workers or a smaller --max_document_mb') from None
        finally:
            pool.shutdown(cancel_futures=True)


def submit(pool: ProcessPoolExecutor, batch: documents.Batch) -> Future:
    """Submit a batch; a process that starts for it never sees Ctrl-C, which is the parent's.

    It inherits a blocked SIGINT; one that arrives here meanwhile is delivered afterwards.
    """
    if not hasattr(signal, 'pthread_sigmask'):      # Windows
        return pool.submit(tokenize, batch)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(tokenize, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def result_of(future: Future, pool: ProcessPoolExecutor) -> tuple:
    """The result of a submitted batch.

    The pool would wait forever for a process killed while it sends a result, so all of them are
    checked every second.
    """
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            processes = list((pool._processes or {}).values())
            if not all(process.is_alive() for process in processes):
                for process in processes:
                    process.kill()
                pool._result_queue._writer.close()      # else the rest of the result is awaited
                raise BrokenProcessPool from None
        except ValueError as error:             # raised here, it is reported as one of ours
            raise ValueError(str(error)) from None


def begin_process(*setup: Any) -> None:
    """Set up a worker process, which exits as soon as its parent is gone."""
    threading.Thread(target=exit_after_parent, daemon=True).start()
    begin(*setup)


def exit_after_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def begin(vocabulary: Path, options: documents.Options, rule: SplitRule) -> None:
    WORKER.update(encoding=load(vocabulary), options=options, rule=rule)


def tokenize(batch: documents.Batch) -> tuple:
    """What tokenized() yields of one batch."""
    texts, sizes, counts = {'train': [], 'val': []}, {'train': 0, 'val': 0}, {}
    for text, raw in documents.texts(batch, WORKER['options'], counts):
        for split, part, size in divide(text, raw, WORKER['rule']):
            texts[split].append(part)
            sizes[split] += size
    made = {}
    for split in texts:
        ids = encode_documents(WORKER['encoding'], texts[split])
        amounts = {'tokens': len(ids), 'documents': len(texts[split]), 'bytes': sizes[split]}
        made[split] = ids.tobytes(), amounts
    return batch.after, made, counts


def cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


# Documents with a small hash are validation: adding documents moves none, and equal texts are in
# the same split. Of few documents it is a range of hashes that gives the split about its size.

def document_hash(raw: bytes, seed: int) -> float:
    """A number from 0 to 1 that depends on (seed, text as UTF-8) alone."""
    digest = hashlib.blake2b(f'{seed}:'.encode(), digest_size=8)
    digest.update(raw)
    return int.from_bytes(digest.digest()) / 2 ** 64


def val_range(raws: Iterable[bytes], seed: int, val_fraction: float) -> tuple | None:
    """(low, high): a document (text as UTF-8) is validation if its document_hash() is in between.

    (0, val_fraction), unless one split would be empty or, of at most FEW documents, COARSE times
    larger or smaller than that in bytes; CUT where no range is better; (0, 0) for a corpus of one
    distinct document, which is cut; None for an empty one. Of many it reads FEW, and until both
    splits have one.
    """
    lowest, highest = [], -1.0                      # the two lowest hashes, and the highest
    sizes, longest = Counter(), 0
    for count, raw in enumerate(raws, 1):
        value = document_hash(raw, seed)
        lowest, highest = sorted({*lowest, value})[:2], max(highest, value)
        longest = max(longest, len(raw))
        if count <= FEW:
            sizes[value] += len(raw)
        elif lowest[0] < val_fraction <= highest:
            return 0.0, val_fraction
    if not lowest:
        return None
    if len(lowest) == 1:
        return 0.0, 0.0
    high = val_fraction
    if not lowest[0] < val_fraction <= highest:
        high = highest if highest < val_fraction else lowest[1]
    return (0.0, high) if count > FEW else few_range(sizes, high, val_fraction, longest)


def few_range(sizes: dict[float, int], high: float, val_fraction: float,
              longest: int) -> tuple[float, float]:
    """val_range() of documents whose hashes have these `sizes`; (0, high) if it is near enough."""
    hashes, total = sorted(sizes), sum(sizes.values())
    if is_near(sum(sizes[value] for value in hashes if value < high) / total, val_fraction):
        return 0.0, high
    best, found = math.inf, (0.0, high) if longest * val_fraction < 4 * LEAST else CUT
    for i, low in enumerate(hashes):                # every run of neighbours but that of all
        size = 0
        for value, following in pairwise(hashes[i:] + [2.0] * (i > 0)):
            size += sizes[value]
            distance = abs(math.log(size / total / val_fraction))
            if distance < best and is_near(size / total, val_fraction):
                best, found = distance, (low, following)
    return found


def is_near(found: float, val_fraction: float) -> bool:
    return val_fraction / COARSE <= found <= val_fraction * COARSE


def divide(text: str, raw: bytes, rule: SplitRule) -> list[tuple[str, str, int]]:
    """[('train' or 'val', text, its bytes)] of one document; `raw` is the text as UTF-8."""
    if rule.threshold == 0.0:
        cut = int(len(text) * (1 - rule.val_fraction))
        if rule.low and len(text) - cut < LEAST:
            return [('train', text, len(raw))]
        parts = ('train', text[:cut]), ('val', text[cut:])
        return [(split, part, len(part.encode())) for split, part in parts]
    is_val = rule.low <= document_hash(raw, rule.seed) < rule.threshold
    return [('val' if is_val else 'train', text, len(raw))]
