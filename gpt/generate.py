"""
Generation: the prompt first, then one token at a time with cached keys and values.

Shapes: B rows, T tokens, nh heads of size hs, K cached and new tokens, C channels, V ids.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from gpt.cpu import no_onednn_for_one_token
from gpt.device import without_cudnn_attention

MIN_TOKENS_TO_CAPTURE = 200     # capturing takes 0.5 s and saves 3 ms a token (GPT-2 on an H100)
MIN_TOKENS_TO_COMPILE = 60_000  # compiling the step first takes 6 to 11 s and saves 0.19 ms more
kept_steps = WeakKeyDictionary()    # {GPT: the FixedStep of its last text, for the next one}


@dataclass(frozen=True)
class SamplingOptions:
    temperature: float = 1.0            # 0 takes the most likely id
    top_k: int = 0                      # sample among the k most likely ids; 0: all
    top_p: float = 1.0                  # sample among the most likely that together reach it
    seed: int | None = None             # row b is drawn with seed + b, and is so the same, in
                                        # float32, alone and in any batch; None: torch's generator
    stop: Sequence[int] = ()            # ids that end a row, which repeats them until all rows end
    lengths: Sequence[int] | None = None    # (B,) row b's prompt is the last lengths[b] of its ids


@torch.no_grad()
def stream(model, ids: torch.Tensor, max_new_tokens: int, **options) -> Iterator[torch.Tensor]:
    """Yield the next ids (B,) after ids (B, T), at most max_new_tokens times.

    options: those of SamplingOptions. Call model.eval() first.
    Raises ValueError if `lengths` does not fit ids.

    When the block is full, the window slides: a row drops the oldest quarter of the block, and the
    rest is read again from position 0. That costs a forward pass over three quarters of the block
    for each quarter generated; rows of different lengths slide at different times, and each time
    all rows are read.
    """
    options = SamplingOptions(**options)
    block_size, (B, T) = model.config.block_size, ids.shape
    lengths = checked_lengths(options.lengths, ids)
    start = T - lengths                                         # (B,) of each row's window
    generators = options.seed is not None and [
        torch.Generator().manual_seed(options.seed + b) for b in range(B)]
    stop, ended = set(map(int, options.stop)), [False] * B
    size = min(lengths.max().item() + max_new_tokens - 1, block_size)
    step = captures(model, max_new_tokens) and take_step(model, B, size, options,
                                                         max_new_tokens >= MIN_TOKENS_TO_COMPILE)
    cache = step.cache if step else Cache(model, B, size)
    try:
        while max_new_tokens > 0 and not all(ended):
            reads_window = cache.length in (0, block_size)              # at first, or again
            if reads_window:
                start = slide(start, ids.size(1), block_size)
                low, padded = start.min().item(), (start != start[0]).any().item()
                cache.length = 0
                if step:
                    step.begin(start - low, ids.size(1) - low)
            new_ids = ids[:, low:] if reads_window else ids[:, -1:]
            places = padding(start - low, cache.length, new_ids.size(1)) if padded else {}
            with torch.inference_mode():
                draws = None if options.temperature == 0 else uniform(generators or [None] * B)
                if step and not reads_window:
                    next_ids = step(model, new_ids[:, 0], draws)
                else:
                    next_ids = pick(read(model, new_ids, cache, places), draws, options)
            if any(ended):
                next_ids = torch.where(torch.tensor(ended, device=ids.device), ids[:, -1], next_ids)
            ids = torch.cat((ids, next_ids[:, None]), dim=1)
            yield next_ids
            max_new_tokens -= 1
            ended = [i in stop for i in next_ids.tolist()] if stop else ended
    finally:
        if step and step.key:
            kept_steps[model] = step


def checked_lengths(lengths: Sequence[int] | None, ids: torch.Tensor) -> torch.Tensor:
    """The lengths (B,) of the prompts in ids (B, T), all T if not given; ValueError if they do not
    fit."""
    B, T = ids.shape
    lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=ids.device)
    if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
        raise ValueError(f'lengths: given {lengths.tolist()} for {B} prompts, expected {B} numbers '
                         f'from 1 to {T}; to start without a prompt, give <|endoftext|> alone')
    return lengths


def read(model, ids: torch.Tensor, cache: 'Cache', places: dict) -> torch.Tensor:
    """float32 logits (B, V) of what follows ids (B, T), which are added to the cache."""
    with no_onednn_for_one_token(ids, model.wte.weight), without_cudnn_attention(ids.device):
        return next_logits(model, model.hidden(ids, cache=cache, **places)[:, -1])


def next_logits(model, x: torch.Tensor) -> torch.Tensor:
    """float32 logits (B, V) of hidden states x (B, C).

    Half precision rounds a logit near -100, where GPT-2's are, to a multiple of 0.5, which makes
    ties among the most likely ids. On CUDA the product of half precision returns float32;
    elsewhere, and under autocast, the top 64 are computed again.
    """
    weight = model.wte.weight
    if x.is_cuda and torch.version.cuda and weight.dtype != torch.float32:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)[:, :model.config.vocab_size]
    logits = model.head(x)
    if logits.dtype != torch.float32:
        likely = logits.topk(min(64, logits.size(-1))).indices              # (B, 64)
        with torch.autocast(x.device.type, enabled=False):
            exact = weight[likely].float() @ x.float()[:, :, None]
        logits = logits.float().scatter(1, likely, exact[:, :, 0])
    return logits


def sample(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
           generators: Sequence[torch.Generator] | None = None) -> torch.Tensor:
    """One id (B,) for each row of logits (B, V), row b's drawn with generators[b] on the CPU.

    temperature 0 takes the most likely. top_k keeps the k most likely ids, top_p the fewest whose
    probabilities sum to at least top_p (Holtzman et al. 2020); 0 and 1 keep all. Both apply after
    the temperature, top_k first.
    """
    draws = None if temperature == 0 else uniform(generators or [None] * len(logits))
    return pick(logits, draws, SamplingOptions(temperature, top_k, top_p))


def uniform(generators: Sequence[torch.Generator | None]) -> torch.Tensor:
    """A number in [0, 1) of each generator; None is torch's."""
    return torch.cat([torch.rand(1, generator=generator) for generator in generators])


def pick(logits: torch.Tensor, draws: torch.Tensor | None,
         options: SamplingOptions) -> torch.Tensor:
    """The ids (B,) that the numbers `draws` (B,) in [0, 1) choose, see sample()."""
    if draws is None:
        return logits.argmax(dim=-1)
    V, ids = logits.size(-1), None
    if 0 < options.top_k < V or options.top_p < 1:
        logits, ids = logits.topk(min(options.top_k or V, V))               # most likely first
    probs = (logits / max(options.temperature, 1e-6)).softmax(dim=-1)
    if options.top_p < 1:                                                   # enough before it
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= options.top_p, 0)
    # the first id at which the cumulative probability reaches a number in (0, 1]
    sums = probs.cumsum(dim=-1)
    chosen = torch.searchsorted(sums, (1 - draws).to(sums.device)[:, None] * sums[:, -1:])
    return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


class Cache:
    """Keys and values of the tokens read so far, of all layers of a GPT, in memory allocated once.

    On a CPU they are float32 whatever the weights are: attention is several times faster so.
    """

    def __init__(self, model, B: int, size: int):
        c, weight = model.config, model.wte.weight
        shape = (2, B, c.n_head, size, c.n_embd // c.n_head)
        dtype = torch.float32 if weight.device.type == 'cpu' else weight.dtype
        self.layers = [torch.empty(shape, dtype=dtype, device=weight.device)
                       for _ in range(c.n_layer)]
        self.length = 0
        self.position = None        # a tensor (1,): where a FixedStep puts its token

    def add(self, i: int, kv: torch.Tensor) -> torch.Tensor:
        """Store keys and values kv (B, T, 2 C) of layer i; return all it has, (2, B, nh, K, hs)."""
        memory, (B, T, _) = self.layers[i], kv.shape
        kv = kv.view(B, T, 2, memory.size(2), -1).permute(2, 0, 3, 1, 4)        # (2, B, nh, T, hs)
        if self.position is not None:
            return memory.index_copy_(3, self.position, kv.to(memory.dtype))
        memory.narrow(3, self.length, T).copy_(kv)
        return memory.narrow(3, 0, self.length + T) if self.length else kv


class FixedStep:
    """The step from a token to the next, with attention over the whole memory of the cache. What
    changes from step to step is in tensors, none of which change their size. So on CUDA all its
    kernels are captured as one graph, and replayed: no time goes into launching them. Even so each
    kernel takes microseconds. Hence the mask is kept and not made by each layer, as attention
    makes it of a bool, or of one whose length is no multiple of 16."""

    def __init__(self, cache: Cache, options: SamplingOptions, compiled: bool = False):
        self.cache, self.options = cache, options
        _, B, _, K, _ = cache.layers[0].shape
        self.mask = cache.layers[0].new_zeros(B, K)     # additive attention mask
        self.ids, self.pad, self.position = (self.mask.new_zeros(n, dtype=torch.long)
                                             for n in (B, B, 1))
        self.draws = (None if options.temperature == 0
                      else self.mask.new_zeros(B, dtype=torch.float32))
        self.compiled = compiled and torch.compile(FixedStep.compute_eagerly, fullgraph=True,
                                                   dynamic=False)
        self.graph = self.next_ids = None
        self.can_capture = self.ids.is_cuda
        self.key = None                                 # see take_step()

    def begin(self, pad: torch.Tensor, length: int) -> None:
        """The steps to come follow `length` columns, the first pad[b] (B,) of row b padding."""
        self.pad.copy_(pad)
        columns = torch.arange(self.mask.size(1), device=pad.device)
        unseen = (columns >= length) | (columns < pad[:, None])                 # (B, K)
        self.mask.zero_().masked_fill_(unseen, -math.inf)
        for memory in self.cache.layers:                # masked out, but NaN times 0 is NaN
            memory.zero_()

    def __call__(self, model, ids: torch.Tensor, draws: torch.Tensor | None) -> torch.Tensor:
        """The ids (B,) after ids (B,), chosen by draws (B,)."""
        self.ids.copy_(ids)
        self.position.fill_(self.cache.length)
        if draws is not None:
            self.draws.copy_(draws, non_blocking=True)
        length = self.cache.length
        if self.can_capture and not self.graph:
            self.capture(model, ids.device)
        if self.graph:
            self.graph.replay()
        else:
            self.compute(model)
        self.cache.length = length + 1
        return self.next_ids.clone()

    def compute(self, model) -> None:
        self.cache.length = 0           # not to be compiled again for each length
        if self.compiled:
            try:
                return self.compiled(self, model)
            except Exception:           # compilers fail in many ways
                self.compiled = False
        return self.compute_eagerly(model)

    def compute_eagerly(self, model) -> None:
        self.mask.index_fill_(1, self.position, 0)      # unmask this token's column
        self.cache.position = self.position
        x = model.hidden(self.ids[:, None], cache=self.cache, mask=self.mask[:, None, None],
                         positions=(self.position - self.pad)[:, None])
        self.cache.position = None
        self.next_ids = pick(next_logits(model, x[:, -1]), self.draws, self.options)

    def capture(self, model, device: torch.device) -> None:
        """Run the step eagerly on a side stream, in which libraries allocate their workspaces, then
        capture it. The device must be the current one, or nothing is captured.

        Hopper GPUs keep what torch chooses for attention, cuDNN, as the shape is fixed. On
        Blackwell cuDNN was wrong for few heads (github.com/pytorch/pytorch/issues/193893).
        """
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        with torch.cuda.device(device), (nullcontext() if hopper
                                         else without_cudnn_attention(device)):
            before, side = torch.cuda.current_stream(), side_stream(device)
            side.wait_stream(before)
            with torch.cuda.stream(side):
                self.compute(model)
            before.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=side):
                    self.compute(model)
                self.graph = graph
            except RuntimeError:                        # without one it is only slower
                self.can_capture = False
                torch.cuda.set_stream(before)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


def captures(model, tokens: int) -> bool:
    """Whether a FixedStep pays off for this number of tokens."""
    return model.wte.weight.device.type == 'cuda' and tokens >= MIN_TOKENS_TO_CAPTURE


def take_step(model, B: int, size: int, options: SamplingOptions, compiled: bool) -> FixedStep:
    """A FixedStep for `size` columns: the kept one if its graph fits (same weights, rows, options),
    else a new one. Columns are rounded up to a power of two, so that more texts fit. It is not kept
    under autocast, where the graph reads temporary copies of the weights."""
    size = min(max(256, 2 ** (size - 1).bit_length()), model.config.block_size)
    key = None if torch.is_autocast_enabled(model.wte.weight.device.type) else (
        B, size, options.temperature, options.top_k, options.top_p, compiled, model.training,
        torch.get_float32_matmul_precision(), [p.data_ptr() for p in model.parameters()])
    step = kept_steps.pop(model, None)                  # not to be shared by two texts at a time
    if not step or step.key != key:
        step = None                                     # free its memory before allocating more
        with torch.inference_mode(False):               # to be used outside of it as well
            step = FixedStep(Cache(model, B, size), options, compiled)
        step.key = key
    step.cache.length, step.cache.position = 0, None    # the last text may have been interrupted
    return step


def slide(start: torch.Tensor, end: int, block_size: int) -> torch.Tensor:
    """Where windows that begin at `start` (B,) begin once they reach to `end` and fit the block:
    moved on by the fewest quarters of it."""
    quarter = max(1, block_size // 4)
    excess = (end - start - block_size).clamp(min=0)
    return start + (excess + quarter - 1) // quarter * quarter


def padding(pad: torch.Tensor, cached: int, T: int) -> dict[str, torch.Tensor]:
    """{positions (B, T), mask (B, 1, T, K)} of T tokens after `cached` ones, where row b begins
    with pad[b] columns of padding. Padding sees itself, so that no softmax row is empty.
    """
    queries = torch.arange(cached, cached + T, device=pad.device)
    keys = torch.arange(cached + T, device=pad.device)
    causal, itself = keys <= queries[:, None], keys == queries[:, None]     # (T, K)
    mask = causal & (keys >= pad[:, None, None]) | itself                   # (B, T, K)
    return {'positions': (queries - pad[:, None]).clamp(min=0), 'mask': mask[:, None]}
