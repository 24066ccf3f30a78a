"""
Documents to tokens, here or in several processes, and which of them are validation.

Processes get batches of bytes and give back bytes of uint16; what comes of them, and in which
order, does not depend on how many there are.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from gpt.data import documents
from gpt.tokenizer import encode_documents, load

IN_FLIGHT_BYTES = 2 ** 26   # of batches that wait for a process or for being written
SHARED = {}                 # what a process needs for every batch, see begin()


def tokenized(batches, workers, *setup):
    """(after, {split: (ids, tokens, documents, bytes)}, counts) of every batch, in order."""
    if workers == 1:
        begin(*setup)
        yield from map(tokenize, batches)
        return
    waiting, in_flight = deque(), 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), begin_process,
                             setup) as pool:
        try:
            for batch in batches:
                while waiting and (len(waiting) > 3 * workers or
                                   in_flight + batch.size() > IN_FLIGHT_BYTES):
                    size, future = waiting.popleft()
                    yield result_of(future, pool)
                    in_flight -= size
                before = signal.signal(signal.SIGINT, signal.SIG_IGN)   # for processes that begin
                try:
                    waiting.append((batch.size(), pool.submit(tokenize, batch)))
                finally:
                    signal.signal(signal.SIGINT, before)
                in_flight += batch.size()
            while waiting:
                yield result_of(waiting.popleft()[1], pool)
        except BrokenProcessPool:
            raise ChildProcessError('a process that tokenizes was killed (for want of memory?); '
                                    'give fewer --workers, or a smaller --max_document_mb'
                                    ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def result_of(future, pool):
    """A process that is killed within its answer would be waited for without end: hence the look
    at all of them every second."""
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            processes = list((pool._processes or {}).values())
            if not all(process.is_alive() for process in processes):
                for process in processes:
                    process.kill()
                pool._result_queue._writer.close()      # else half an answer is waited for here
                raise BrokenProcessPool from None
        except ValueError as error:             # raised there, to be shown as one of ours
            raise ValueError(str(error)) from None


def begin_process(*setup):
    """The first thing in a process of its own; it ends when its parent is gone, however it went."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    begin(*setup)


def begin(vocabulary, options, rule):
    SHARED.update(enc=load(vocabulary), options=options, rule=rule)


def tokenize(batch):
    rule, found, counts = SHARED['rule'], {'train': ([], []), 'val': ([], [])}, {}
    for text, raw in documents.texts(batch, SHARED['options'], counts):
        for split, part, size in divide(text, raw, rule):
            texts, sizes = found[split]
            texts.append(part)
            sizes.append(size)
    made = {}
    for split, (texts, sizes) in found.items():
        ids = encode_documents(SHARED['enc'], texts)
        made[split] = (ids.tobytes(), len(ids), len(sizes), sum(sizes))
    return batch.after, made, counts


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


# Which documents are validation: those whose hash is small, so that adding documents moves none,
# and a text that comes twice is on one side only.

def document_hash(raw, seed):
    """A number from 0 to 1 that depends on (seed, text as UTF-8) alone."""
    drawn = hashlib.blake2b(f'{seed}:'.encode(), digest_size=8)
    drawn.update(raw)
    return int.from_bytes(drawn.digest()) / 2 ** 64


def val_threshold(texts, rule):
    """Documents with a hash below it are validation: val_fraction,
    unless one side would be empty then.

    0 for a corpus of one (distinct) document, which is split by position; None for one of none.
    Reads until a document of each side was seen.
    """
    lowest, fraction = [], rule['val_fraction']     # the two lowest hashes, and the highest
    highest = -1.0
    for _, raw in texts:
        drawn = document_hash(raw, rule['seed'])
        lowest, highest = sorted({*lowest, drawn})[:2], max(highest, drawn)
        if lowest[0] < fraction <= highest:
            return fraction
    if not lowest:
        return None
    return 0.0 if len(lowest) == 1 else highest if highest < fraction else lowest[1]


def divide(text, raw, rule):
    """[(split, text, its bytes)] of one document, given also as UTF-8."""
    if rule['threshold'] == 0.0:
        cut = int(len(text) * (1 - rule['val_fraction']))
        parts = ('train', text[:cut]), ('val', text[cut:])
        return [(split, part, len(part.encode())) for split, part in parts]
    below = document_hash(raw, rule['seed']) < rule['threshold']
    return [('val' if below else 'train', text, len(raw))]
