"""
Log-likelihoods: of endings given a context, and of long texts. Knows no data set.

The endings of an item share one row, in which the context is read once:

    ids         context   ending 1   ending 2        a token sees the context before it
    positions   0 .. C-1  C ..       C ..            and its own ending, not the others

This is the same computation as a row for each ending, which share=False does, and agrees with it
to rounding. Only the hidden states from which a scored token is predicted go through the head.

A model is a GPT, or any callable from ids (B, T) to logits (B, T, V); to share it must take
positions (B, T) and a bool mask (B, 1, T, T) by name. One of transformers is
`lambda ids: model(ids).logits`, with share=False.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm


LOGITS_AT_ONCE = 2 ** 25    # the head is applied to as many positions as give so many logits
IN_A_FILE = {               # where the progress bar is no bar: a line every ten seconds
    'mininterval': 10, 'delay': 10,
    'bar_format': '{percentage:3.0f} % of {total_fmt} tokens, {rate_fmt}, {remaining} left\n'}


class Score(NamedTuple):
    logprobs: np.ndarray    # (count,) float32, of each token, in nats
    likeliest: np.ndarray   # (count,) ids that the model would have chosen in their place

    @property
    def sum(self):          # the log-probability of all tokens
        return self.logprobs.sum(dtype=np.float64).item()

    @property
    def count(self):
        return len(self.logprobs)


class Row(NamedTuple):
    """What the model reads, the columns whose predictions are scored, and what they are to be."""
    ids: np.ndarray         # (T,)
    columns: np.ndarray     # (N,)
    targets: np.ndarray     # (N,)
    positions: np.ndarray = None    # (T,), and of a shared row
    branch: np.ndarray = None       # (T,): 0 the context, k its k-th ending


def ending_loglikelihoods(model, items, *, share=True, block_size=None, banned=None, **how):
    """A list of Scores, one for each ending, of every item (context, [ending, ...]) of ids.

    share=False reads one row for each ending. block_size: that of the model, if it does not say;
        of an item that is longer the same number of tokens is cut from the left of the context
        for all endings (see excess). banned: ids (V,) as bool that are never the likeliest first
        token. how: batch_tokens, device, world, progress: see score_rows.

    Raises ValueError for an empty context or ending, and for one too long for the block.
    """
    block_size = block_size or block_of(model)
    check(items, block_size)
    parts = [rows_of(context[excess((context, endings), block_size):], endings, share)
             for context, endings in items]
    scores = []
    for both, (_, endings) in zip(score_parts(model, parts, banned=banned, **how), items):
        ends = np.cumsum([len(ending) for ending in endings])[:-1]
        scores.append([Score(*one) for one in zip(*(np.split(x, ends) for x in both))])
    return scores


def check(items, block_size):
    """Refuse items that cannot be scored; ValueError names the first."""
    for i, (context, endings) in enumerate(items):
        if not len(context) or not len(endings) or not all(map(len, endings)):
            raise ValueError(f'item {i}: a context and its endings need at least one token each')
        if excess((context, endings), block_size) >= len(context):
            raise ValueError(f'item {i}: an ending of {max(map(len, endings))} tokens leaves no '
                             f'room for a context in a block of {block_size}: '
                             f'a model with a longer block is needed')


def excess(item, block_size):
    """How many tokens of an item (context, endings) do not fit the block with its longest ending.
    """
    context, endings = item
    return max(0, len(context) + max(map(len, endings)) - 1 - (block_size or math.inf))


def reading(items, block_size, share=True):
    """(tokens the model reads to score these items, a note on those that had to be cut: a list)."""
    cuts = [excess(item, block_size) for item in items]
    tokens = sum((len(context) - cut) * (1 if share else len(endings)) + sum(map(len, endings))
                 - len(endings) for (context, endings), cut in zip(items, cuts))
    longer = sum(cut > 0 for cut in cuts)
    return tokens, [f'{longer} of {len(items)} are longer than the block of {block_size} and lost '
                    f'their beginning'] if longer else []


def rows_of(context, endings, share=True):
    """The Rows in which the endings of one context are scored: one if they share it."""
    C, counts = len(context), [len(ending) - 1 for ending in endings]   # that predict something
    if not share or len(endings) == 1:
        return [Row(np.concatenate((context, ending[:-1])).astype(np.int64),
                    np.arange(C - 1, C + n), np.asarray(ending, np.int64))
                for ending, n in zip(endings, counts)]
    columns, T = [], C
    for n in counts:
        columns += [[C - 1], np.arange(T, T + n)]
        T += n
    return [Row(np.concatenate((context, *(ending[:-1] for ending in endings))).astype(np.int64),
                np.concatenate(columns).astype(np.int64),
                np.concatenate(endings).astype(np.int64),
                np.concatenate((np.arange(C), *(np.arange(C, C + n) for n in counts))),
                np.repeat(np.arange(len(endings) + 1), (C, *counts)))]


def rolling_loglikelihood(model, ids, stride=0, **how):
    """The Score of one long text of ids; see rolling_loglikelihoods."""
    return rolling_loglikelihoods(model, [ids], stride, **how)[0]


def rolling_loglikelihoods(model, texts, stride=0, *, prefix=None, block_size=None, **how):
    """The Score of each text, every token being scored once, with as much before it as fits.

    A window is a block of tokens; the first scores all of its predictions, each further one the
    next `stride` (0: a whole block, which shares nothing with the one before), so that a token has
    at least block_size - stride tokens before it. The windows are those of lm-eval-harness.
    prefix: an id read before each text; without one the first token is not scored.
    """
    block_size = block_size or block_of(model)
    stride = stride or block_size
    if not 1 <= stride <= block_size:
        raise ValueError(f'stride: given {stride}, expected 1 to {block_size}, the block')
    return score_parts(model, [windows(ids, block_size, stride, prefix) for ids in texts], **how)


def windows(ids, block_size, stride, prefix=None):
    rows, done = [], 1                                              # ids[:done] are scored
    ids = np.concatenate(([] if prefix is None else [prefix], ids)).astype(np.int64)
    while done < len(ids):
        end = min(len(ids), done + (block_size if done == 1 else stride))
        read = ids[max(0, end - 1 - block_size):end - 1]
        rows.append(Row(read, np.arange(len(read) - (end - done), len(read)), ids[done:end]))
        done = end
    return rows


def block_of(model):
    return getattr(getattr(model, 'config', None), 'block_size', None)


def score_parts(model, parts, **how):
    """The Score of each list of Rows, whose targets follow each other."""
    scored = iter(score_rows(model, [row for part in parts for row in part], **how))
    nothing = np.empty(0, np.float32), np.empty(0, np.int64)        # of a text of one token
    return [Score(*map(np.concatenate, zip(nothing, *(next(scored) for _ in part))))
            for part in parts]


@torch.inference_mode()
def score_rows(model, rows, *, banned=None, batch_tokens=0, device=None, world=None,
               progress=False):
    """(logprobs (N,), likeliest (N,)) of every Row, as arrays.

    Rows are sorted by length and read in batches of batch_tokens, padding included (0: 1024 on a
    CPU, else 65536); one that does not fit in the memory of a GPU is halved. device: the model's,
    if it does not say. world: processes that share the batches; what a batch holds does not depend
    on their number, and so no result does. progress: show a bar.

    Raises ValueError, with the row's number, where a model gives NaN.
    """
    if device is None:
        device = next(model.parameters()).device if hasattr(model, 'parameters') else 'cpu'
    device = torch.device(device)
    batches = divide(rows, batch_tokens or (1024 if device.type == 'cpu' else 65536))
    rank, size = (world.rank, world.size) if world else (0, 1)
    bar = tqdm(total=sum(len(row.ids) for batch in batches[rank::size] for _, row in batch),
               unit='tok', unit_scale=True, disable=not progress or rank > 0, leave=False,
               **({} if sys.stderr.isatty() else IN_A_FILE))
    done = {}
    for batch in batches[rank::size]:
        results = score_batch(model, [row for _, row in batch], banned, device)
        for (i, row), (logprobs, likeliest) in zip(batch, results):
            if np.isnan(logprobs).any():
                raise ValueError(f'the model gives NaN for row {i}: its weights are damaged, '
                                 f'or the dtype is too narrow for them')
            done[i] = logprobs, likeliest
            bar.update(len(row.ids))
    bar.close()
    for part in world.gather(done) if world else []:
        done.update(part)
    return [done[i] for i in range(len(rows))]


def divide(rows, batch_tokens):
    """Batches of (number, row), the longest first, each of at most batch_tokens with its padding.
    """
    batches = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        longest = len(batches[-1][0][1].ids) if batches else batch_tokens
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
        batches[-1].append((i, rows[i]))
    return batches


def score_batch(model, rows, banned, device):
    try:
        return read_batch(model, rows, banned, device)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise ValueError(f'a row of {len(rows[0].ids)} tokens does not fit in the memory of '
                             f'{device}; --dtype=bfloat16 needs half of it') from None
    torch.cuda.empty_cache()
    half = len(rows) // 2
    return [result for part in (rows[:half], rows[half:])
            for result in score_batch(model, part, banned, device)]


def read_batch(model, rows, banned, device):
    T, counts = max(len(row.ids) for row in rows), [len(row.targets) for row in rows]
    ids = pad([row.ids for row in rows], T, 0, device)                      # (B, T)
    places = {}
    if any(row.branch is not None for row in rows):
        branch = pad([np.zeros_like(row.ids) if row.branch is None else row.branch
                      for row in rows], T, 0, device)
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        seen = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        positions = [np.arange(len(row.ids)) if row.positions is None else row.positions
                     for row in rows]
        places = {'positions': pad(positions, T, 0, device),                # (B, T)
                  'mask': (causal & seen)[:, None]}                         # (B, 1, T, T)
    x = getattr(model, 'hidden', model)(ids, **places)                      # (B, T, C or V)
    which, columns, targets = (torch.from_numpy(part).to(device) for part in (
        np.repeat(np.arange(len(rows)), counts), np.concatenate([row.columns for row in rows]),
        np.concatenate([row.targets for row in rows])))                     # (N,)
    first = torch.from_numpy(np.concatenate([row.columns == row.columns[0] for row in rows]))
    x = x[which, columns]                                                   # (N, C or V)
    logprobs, likeliest, head = [], [], getattr(model, 'head', lambda x: x)
    size = max(1, LOGITS_AT_ONCE // head(x[:1]).size(-1))
    for part in (slice(start, start + size) for start in range(0, len(targets), size)):
        logits = head(x[part]).float()                                      # (n, V)
        found = logits.gather(1, targets[part, None])[:, 0]
        logprobs.append(found - logits.logsumexp(dim=-1))
        if banned is not None:
            logits = logits.masked_fill((first[part, None] & banned).to(device), -math.inf)
        likeliest.append(logits.argmax(dim=-1))
    ends = np.cumsum(counts)[:-1]
    return list(zip(*(np.split(torch.cat(parts).cpu().numpy(), ends)
                      for parts in (logprobs, likeliest))))


def pad(parts, T, value, device):
    """Arrays (n,) as rows of one tensor (B, T), filled up with `value` at the right."""
    rows = np.full((len(parts), T), value)
    for row, part in zip(rows, parts):
        row[:len(part)] = part
    return torch.from_numpy(rows).to(device)
