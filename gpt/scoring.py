"""
Log-likelihoods: of endings given a context, and of long texts. Knows no data set.

The endings of an item share one row, in which the context is read once:

    ids         context   ending 1   ending 2        a token sees the context before it
    positions   0 .. C-1  C ..       C ..            and its own ending, not the others

share=False reads a row for each ending, which gives the same numbers up to rounding. Only the
hidden states that predict a scored token go through the head.

A model is a GPT, or any callable from ids (B, T) to logits (B, T, V); to share a context it must
accept positions (B, T) and a bool mask (B, 1, T, T) by name. A model of transformers is scored as
`lambda ids: model(ids).logits`, with share=False.
"""

import hashlib
import math
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from gpt.device import without_cudnn_attention
from gpt.files import read_bytes
from gpt.script import complain, is_out_of_memory
from gpt.sharding import is_sharded
from gpt.world import World

MAX_LOGITS = 2 ** 25        # made at once: the head is applied to slices of positions
SECONDS_TO_A_LINE = 10        # of progress

Item = tuple[Sequence[int], Sequence[Sequence[int]]]                # (context, endings), of ids


class Score(NamedTuple):
    logprobs: np.ndarray    # (count,) float32, of each token, in nats
    predicted: np.ndarray   # (count,) the most likely id in place of each

    @property
    def sum(self) -> float:
        """The log-probability of all tokens."""
        return self.logprobs.sum(dtype=np.float64).item()

    @property
    def count(self) -> int:
        return len(self.logprobs)

    def fill(self, other: 'Score') -> 'Score':
        """Copy the numbers of another Score, in place; returns this one."""
        self.logprobs[:], self.predicted[:] = other
        return self


class Row(NamedTuple):
    """One row of a batch: what is read, which columns are scored, and their targets."""
    ids: np.ndarray                         # (T,)
    columns: np.ndarray                     # (N,)
    targets: np.ndarray                     # (N,)
    positions: np.ndarray | None = None     # (T,), of a shared row
    branch: np.ndarray | None = None        # (T,), of a shared row: 0 the context, k ending k


class Kept:
    """Scores of batches that are done, in a file that outlives a kill; and how much was read.

    The file has a line for each batch: the hash of its rows and of `key`, a checksum, its scores.
    key: all else that the scores depend on. Every process appends to the file, a line at once.
    """

    def __init__(self, path: Path, key: str, world: World):
        self.path, self.key, self.world = path, key, world
        self.found = world.on_main(self.read)           # {hash: scores}
        self.tokens = self.tokens_before = 0            # read in all, and before a kill

    def read(self) -> dict[bytes, bytes]:
        found = {}
        for line in read_bytes(self.path).split(b'\n') if self.path.exists() else ():
            with suppress(ValueError):                  # of a line that is damaged
                name, checksum, text = line.split()
                numbers = b64decode(text, validate=True)
                if int(checksum) == zlib.crc32(numbers):
                    found[name] = numbers
        return found

    def name(self, batch: list) -> bytes:
        total = hashlib.sha256(self.key.encode())
        for part in (part for _, row in batch for part in row if part is not None):
            total.update(b'%d ' % len(part) + part.tobytes())
        return total.hexdigest().encode()

    def restore(self, batches: list, scores: list[Score]) -> list:
        """Fill in the scores of the batches that the file has; returns the other batches."""
        missing = []
        for batch in batches:
            numbers, n_read = self.found.pop(self.name(batch), b''), tokens_of(batch)
            self.tokens += n_read
            if not numbers:
                missing.append(batch)
                continue
            self.tokens_before += n_read
            counts = [len(row.targets) for _, row in batch]
            logprobs = np.frombuffer(numbers, np.float32, sum(counts))
            predicted = np.frombuffer(numbers, np.int64, offset=4 * sum(counts))
            for (i, _), score in zip(batch, split(logprobs, predicted, counts)):
                scores[i].fill(score)
        if len(missing) < len(batches) and self.world.is_main:
            complain(f'continuing: {len(batches) - len(missing):,} of {len(batches):,} batches are '
                     f'in {self.path}\n')
        return missing

    def add(self, batch: list, scores: list[Score]) -> None:
        """Append the scores of a batch; on a full disk they are not kept."""
        raw = b''.join(np.concatenate(part).tobytes() for part in zip(*scores))
        line = b'\n%s %d %s' % (self.name(batch), zlib.crc32(raw), b64encode(raw))
        with suppress(OSError), open(self.path, 'ab', buffering=0) as file:
            file.write(line)                            # a kill may have cut off the line before


@dataclass(frozen=True)
class ScoringOptions:
    batch_tokens: int = 0       # tokens in a batch with its padding; 0: 1024 on a CPU, else 65536
    world: World | None = None  # its processes share the batches; what a batch holds does not
                                # depend on their number, so neither does a result
    progress: bool = False      # say on stderr how far it is
    banned: torch.Tensor | None = None      # (V,) bool: ids never predicted as a first token
    kept: Kept | None = None    # where batches are kept that are done


def ending_loglikelihoods(model: Callable, items: Sequence[Item], *, share: bool = True,
                          block_size: int | None = None, **options) -> list[list[Score]]:
    """The Scores of the endings of every item (context, endings).

    share: see above. block_size: of a model that does not say; an item that is longer loses as many
    tokens from the left of its context as its longest ending requires, the same for all endings.
    options: those of ScoringOptions.
    Raises ValueError for an empty context or ending, and for an ending too long for the block.
    """
    block_size = block_size or block_of(model)
    check(items, block_size)
    parts = [rows_of(context[excess((context, endings), block_size):], endings, share)
             for context, endings in items]
    scores = []
    for score, (_, endings) in zip(score_parts(model, parts, ScoringOptions(**options)), items):
        scores.append(split(*score, [len(ending) for ending in endings]))
    return scores


def check(items: Iterable[Item], block_size: int | None) -> None:
    """Raise ValueError for the first item that cannot be scored."""
    for i, (context, endings) in enumerate(items):
        if not len(context) or not len(endings) or not all(map(len, endings)):
            raise ValueError(f'item {i}: a context and its endings need at least one token each')
        if excess((context, endings), block_size) >= len(context):
            raise ValueError(f'item {i}: an ending of {max(map(len, endings))} tokens leaves no '
                             f'room for a context in a block of {block_size}: '
                             f'a model with a longer block is needed')


def excess(item: Item, block_size: int | None) -> int:
    """By how many tokens an item with its longest ending exceeds the block."""
    context, endings = item
    return max(0, len(context) + max(map(len, endings)) - 1 - (block_size or math.inf))


def cut_note(items: Sequence[Item], block_size: int) -> list[str]:
    """A note on the items that had to be cut, if there are any."""
    n_cut = sum(excess(item, block_size) > 0 for item in items)
    return [f'{n_cut} of {len(items)} are longer than the block of {block_size} and lost their '
            f'beginning'] if n_cut else []


def rows_of(context: Sequence[int], endings: Sequence[Sequence[int]],
            share: bool = True) -> list[Row]:
    """The Rows in which the endings of one context are scored: one if they share it."""
    if not share:
        return [row for ending in endings for row in rows_of(context, [ending])]
    C, inputs = len(context), [ending[:-1] for ending in endings]   # the last token is not read
    columns, T = [], C
    for n in map(len, inputs):      # the end of the context predicts the first token of each ending
        columns += [[C - 1], np.arange(T, T + n)]
        T += n
    row = Row(*(np.concatenate(parts).astype(np.int64)
                for parts in ((context, *inputs), columns, endings)))
    if len(endings) == 1:
        return [row]
    counts = [len(part) for part in inputs]
    return [row._replace(
        positions=np.concatenate((np.arange(C), *(np.arange(C, C + n) for n in counts))),
        branch=np.repeat(np.arange(len(endings) + 1), (C, *counts)))]


def rolling_loglikelihood(model: Callable, ids: Sequence[int], stride: int = 0, **options) -> Score:
    """The Score of one long text of ids; see rolling_loglikelihoods."""
    return rolling_loglikelihoods(model, [ids], stride, **options)[0]


def rolling_loglikelihoods(model: Callable, texts: Sequence[Sequence[int]], stride: int = 0, *,
                           prefix: int | None = None, block_size: int | None = None,
                           **options) -> list[Score]:
    """The Score of each text, every token scored once.

    A window is a block of tokens. The first scores all of its predictions, each further one the
    next `stride` (0: a whole block, so that windows do not overlap), so that a token has at least
    block_size - stride tokens before it. These are the windows of lm-evaluation-harness.
    prefix: an id read before each text; without one the first token is not scored.
    options: those of ScoringOptions. Raises ValueError for a stride beyond the block.
    """
    block_size = block_size or block_of(model)
    stride = stride or block_size
    if not 1 <= stride <= block_size:
        raise ValueError(f'stride: given {stride}, expected 1 to {block_size}, the block')
    parts = [windows(ids, block_size, stride, prefix) for ids in texts]
    return score_parts(model, parts, ScoringOptions(**options))


def windows(ids: Sequence[int], block_size: int, stride: int,
            prefix: int | None = None) -> list[Row]:
    """The Rows in which one text is scored."""
    ids = np.concatenate(([] if prefix is None else [prefix], ids)).astype(np.int64)
    rows, done = [], 1                                              # ids[:done] are scored
    while done < len(ids):
        end = min(len(ids), done + (block_size if done == 1 else stride))
        window = ids[max(0, end - 1 - block_size):end - 1]
        rows.append(Row(window, np.arange(len(window) - (end - done), len(window)), ids[done:end]))
        done = end
    return rows


def block_of(model: Callable) -> int | None:
    return getattr(getattr(model, 'config', None), 'block_size', None)


# Rows, of which nothing is known but their ids.

def score_parts(model: Callable, parts: Sequence[list[Row]],
                options: ScoringOptions) -> list[Score]:
    """The Score of each list of Rows, whose targets follow each other."""
    scored = iter(score_rows(model, [row for part in parts for row in part], options))
    empty = Score(np.empty(0, np.float32), np.empty(0, np.int64))   # of a text of one token
    return [Score(*map(np.concatenate, zip(empty, *(next(scored) for _ in part))))
            for part in parts]


def score_rows(model: Callable, rows: Sequence[Row], options: ScoringOptions) -> list[Score]:
    """The Score of every Row, on every rank.

    Rows are sorted by length and read in batches; a batch that does not fit in the memory of a GPU
    is halved. Raises ValueError, with the row's number, where a model gives NaN.
    """
    own = next(model.parameters()).device if hasattr(model, 'parameters') else 'cpu'
    device, world = torch.device(own), options.world or World()
    sharded = is_sharded(model)         # then a batch makes logits of all its tokens
    most = {'cpu': 1024, 'cuda': 8192 if sharded else 65536}.get(device.type, 8192)
    size = options.batch_tokens or most
    batches, scores, done = batches_of(rows, size), empty_scores(rows), {}
    if options.kept:
        batches = options.kept.restore(batches, scores)
    mine = batches[world.rank::world.size]
    if sharded and len(mine) < -(-len(batches) // world.size):
        mine.append(batches[-1])        # a second time: every rank takes part in every pass
    total, read, began = sum(map(tokens_of, mine)), 0, time.monotonic()
    said = began
    # a sharded model runs as it trains: its buffers could not keep the tensors of inference mode
    with (torch.no_grad() if sharded else torch.inference_mode(),
          world.autocast() if sharded else nullcontext(), without_cudnn_attention(device)):
        for batch in mine:
            new = score_batch(model, [row for _, row in batch], options.banned, device)
            for (i, _), score in zip(batch, new):
                if np.isnan(score.logprobs).any():
                    raise ValueError(f'the model gives NaN for row {i}: its weights are damaged, '
                                     f'or the dtype is too narrow for them')
                done[i] = scores[i].fill(score)
            if options.kept:
                options.kept.add(batch, new)
            read += tokens_of(batch)
            if options.progress and world.is_main and time.monotonic() - said > SECONDS_TO_A_LINE:
                said = time.monotonic()
                complain(f'{read / total:.0%} of {total:,} tokens, '
                         f'{(said - began) * (total / read - 1):.0f} s left\n')
    if world.size > 1:
        for part in world.gather(done):
            for i, score in part.items():
                scores[i].fill(score)
    return scores


def tokens_of(batch: list) -> int:
    """How many tokens are read of a batch, without its padding."""
    return sum(len(row.ids) for _, row in batch)


def empty_scores(rows: Sequence[Row]) -> list[Score]:
    """Scores of these rows, in memory allocated once: arrays that are allocated one after another
    between the large ones of a forward pass would keep the memory of those from being used again.
    """
    counts = [len(row.targets) for row in rows]
    return split(np.zeros(sum(counts), np.float32), np.zeros(sum(counts), np.int64), counts)


def split(logprobs: np.ndarray, predicted: np.ndarray, counts: Sequence[int]) -> list[Score]:
    """The Scores of parts of these many tokens."""
    ends = np.cumsum(counts)[:-1]
    return [Score(*pair) for pair in zip(np.split(logprobs, ends), np.split(predicted, ends))]


def batches_of(rows: Sequence[Row], batch_tokens: int) -> list[list[tuple[int, Row]]]:
    """Batches of (number, Row), the longest first, of at most batch_tokens with padding each."""
    batches = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        longest = len(batches[-1][0][1].ids) if batches else batch_tokens
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
        batches[-1].append((i, rows[i]))
    return batches


def score_batch(model: Callable, rows: list[Row], banned: torch.Tensor | None,
                device: torch.device) -> list[Score]:
    """The Scores of Rows read together, or in halves where memory does not suffice."""
    try:
        return read_batch(model, rows, banned, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1 or is_sharded(model):
            raise ValueError(f'a row of {len(rows[0].ids)} tokens does not fit in the memory of '
                             f'{device}; --dtype=bfloat16 needs half of it') from None
    torch.cuda.empty_cache()            # outside of except, where the error keeps tensors alive
    half = len(rows) // 2
    return (score_batch(model, rows[:half], banned, device)
            + score_batch(model, rows[half:], banned, device))


def read_batch(model: Callable, rows: list[Row], banned: torch.Tensor | None,
               device: torch.device) -> list[Score]:
    counts = [len(row.targets) for row in rows]
    ids, places = model_inputs(rows, device)
    body, head = body_and_head(model)
    row_of, columns, targets, is_first = (torch.from_numpy(part).to(device) for part in (
        np.repeat(np.arange(len(rows)), counts), np.concatenate([row.columns for row in rows]),
        np.concatenate([row.targets for row in rows]),
        np.concatenate([row.columns == row.columns[0] for row in rows])))   # (N,)
    banned = None if banned is None else banned.to(device)
    x = body(ids, **places)                                                 # (B, T, C or V)
    x = x[row_of, columns]                                                  # (N, C or V)
    logprobs, predicted = [], []
    size = max(1, MAX_LOGITS // head(x[:1]).size(-1))
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = head(x[part]).float()                                      # (n, V)
        of_target = logits.gather(1, targets[part, None])[:, 0]
        logprobs.append(of_target - logits.logsumexp(dim=-1))
        if banned is not None:
            logits = logits.masked_fill(is_first[part, None] & banned, -math.inf)
        predicted.append(logits.argmax(dim=-1))
    return split(torch.cat(logprobs).cpu().numpy(), torch.cat(predicted).cpu().numpy(), counts)


def body_and_head(model: Callable) -> tuple[Callable, Callable]:
    """(ids to hidden states, these to logits). A sharded model gathers its parameters only when it
    is called as a whole: as of any callable, the body gives logits, and the head nothing new."""
    if is_sharded(model) or not hasattr(model, 'hidden'):
        return model, lambda logits: logits
    return model.hidden, model.head


def model_inputs(rows: list[Row],
                 device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(ids (B, T), {positions (B, T), mask (B, 1, T, T)}); {} if no Row is shared."""
    ids = right_pad([row.ids for row in rows], device)
    if all(row.branch is None for row in rows):
        return ids, {}
    branch = right_pad([np.zeros_like(row.ids) if row.branch is None else row.branch
                        for row in rows], device)
    positions = right_pad([np.arange(len(row.ids)) if row.positions is None else row.positions
                           for row in rows], device)
    T = ids.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])    # (B, T, T)
    return ids, {'positions': positions, 'mask': (causal & visible)[:, None]}


def right_pad(arrays: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Arrays (n,) as the rows of one tensor (B, T), with zeros after the shorter ones."""
    return pad_sequence(list(map(torch.from_numpy, arrays)), batch_first=True).to(device)
