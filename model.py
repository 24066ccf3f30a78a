"""
GPT-2: learned positions, pre-LayerNorm blocks, tanh GELU, a head tied to the token embedding.

Read it from the top: GPT is the whole, Block is the transformer, CausalSelfAttention and MLP its
two halves. Parameter names are those of OpenAI's release. Sources: Radford et al. 2019 and its code
(github.com/openai/gpt-2), and transformers' GPT2LMHeadModel, with which it agrees to rounding.

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of size hs, V = vocab_size.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024      # the longest sequence
    vocab_size: int = 50257     # token ids are 0 .. vocab_size - 1
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0        # after embeddings, attention weights and residual branches
    bias: bool = True           # in Linear and LayerNorm, as GPT-2 has them

    @property
    def padded_vocab_size(self):
        """Rows of the embedding: a large vocabulary is padded to a multiple of 128 for speed."""
        return self.vocab_size if self.vocab_size <= 4096 else -(-self.vocab_size // 128) * 128


SIZES = {
    'gpt2': GPTConfig(n_layer=12, n_head=12, n_embd=768),           # 124M parameters
    'gpt2-medium': GPTConfig(n_layer=24, n_head=16, n_embd=1024),   # 355M
    'gpt2-large': GPTConfig(n_layer=36, n_head=20, n_embd=1280),    # 774M
    'gpt2-xl': GPTConfig(n_layer=48, n_head=25, n_embd=1600),       # 1558M
}
LOGITS_AT_ONCE = 2 ** 26    # the loss makes float32 logits for this many (token, id) pairs at once


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd={config.n_embd} must be a multiple of n_head={config.n_head}')
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = None     # wte itself, unless pack() made a copy to read faster
        self.checkpoint_activations = False     # True: keep what goes into a block, not what it
        self.initialise()                       # makes, and make that again in the backward pass

    @torch.no_grad()
    def initialise(self):
        """Normal(0, 0.02), biases zero; the projections into the residual stream, of which there
        are 2 n_layer, are scaled by 1 / sqrt(2 n_layer) (GPT-2 paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                residual = name.endswith('c_proj.weight')
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(p, std=std)
        self.wte.weight[self.config.vocab_size:] = 0    # padding: no gradient ever reaches it

    def hidden(self, ids, *, positions=None, mask=None, cache=None):
        """Final hidden states (B, T, C) of ids (B, T), after ln_f.

        cache: a Cache, whose tokens come before these; keys and values of these are added to it.
        positions (T,) or (B, T): places in the block; if not given, those after the cache's.
            Where they repeat, as for alternatives side by side, T may exceed the block.
        mask: bool, broadcast to (B, nh, T, K), True where a query (row) may see a key. K counts
            the tokens of the cache and these. Causal if not given.
        """
        T, before = ids.size(1), cache.length if cache else 0
        if positions is None and before + T > self.config.block_size:
            raise ValueError(f'{before + T} tokens are more than '
                             f'the block of {self.config.block_size}')
        if positions is None:
            positions = torch.arange(before, before + T, device=ids.device)
        if mask is None and before and T > 1:
            mask = torch.ones(T, before + T, dtype=torch.bool, device=ids.device).tril(before)
        x = self.drop(self.wte(ids) + self.wpe(positions))                  # (B, T, C)
        for i, block in enumerate(self.h):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, i, use_reentrant=False)
            else:
                x = block(x, mask, cache, i)
        if cache:
            cache.length += T
        return self.ln_f(x)                                                 # (B, T, C)

    def forward(self, ids, targets=None, *, positions=None, mask=None, cache=None):
        """Logits (B, T, V) of ids (B, T); with targets (B, T) their mean cross-entropy in nats."""
        x = self.hidden(ids, positions=positions, mask=mask, cache=cache)
        if targets is None:
            return self.head(x)
        return self.loss(x.flatten(0, 1), targets.flatten())

    def head(self, x):
        logits = self.lm_head(x) if self.lm_head else F.linear(x, self.wte.weight)
        padded = logits.size(-1) > self.config.vocab_size
        return logits[..., :self.config.vocab_size] if padded else logits   # (..., V)

    def loss(self, x, targets):
        """Mean cross-entropy, in float32, of hidden states x (N, C) against targets (N,)."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return HeadLoss.apply(x, self.wte.weight, targets, self.config.vocab_size, dtype,
                                  torch.is_grad_enabled())

    def num_parameters(self):
        """How many numbers were learnt: the padding of the vocabulary does not count."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self):
        """Floating-point operations of training on one token: 6 for each weight of a matrix
        product and 12 for each (layer, channel, position) of attention
        (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def stream(self, ids, max_new_tokens, *, lengths=None, temperature=1.0, top_k=0, top_p=1.0,
               seed=None, stop=()):
        """Yield the next ids (B,) after ids (B, T), up to max_new_tokens times; eval() comes first.

        lengths (B,): row b's prompt is the last lengths[b] of its ids (see left_pad); else all.
        temperature, top_k, top_p: see sample(). seed: row b is drawn with seed + b, and so is
            the same, in float32, alone and in any batch; torch's own generator if not given.
        stop: a list of ids; one ends its row, which repeats it until all rows have ended.

        Past the block the window slides: when the block is full, a row drops its oldest quarter,
        and the rest is read anew from position 0. That costs a forward pass over three quarters
        of the block for each quarter of it that is written; rows of different lengths come to it
        at different times, and each time all of them are read.
        """
        B, T = ids.shape
        lengths = torch.as_tensor([T] * B if lengths is None else lengths, device=ids.device)
        if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
            raise ValueError(f'the lengths of {B} prompts: given {lengths.tolist()}, expected {B} '
                             f'from 1 to {T}; <|endoftext|> alone begins a text from nothing')
        start = T - lengths                                                 # of each row's window
        generators = seed is not None and [torch.Generator().manual_seed(seed + b)
                                           for b in range(B)]
        ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
        cache = None
        for left in range(max_new_tokens, 0, -1):
            if cache is None or cache.length == self.config.block_size:     # read, or read anew
                start = slide(start, ids.size(1), self.config.block_size)
                low, padded = start.min().item(), (start != start[0]).any().item()
                size = min(ids.size(1) - low + left - 1, self.config.block_size)
                cache, new_ids = Cache(self, B, size), ids[:, low:]
            else:
                new_ids = ids[:, -1:]
            places = padding(start - low, cache.length, new_ids.size(1)) if padded else {}
            with plain_products(new_ids, self.wte.weight), torch.inference_mode():
                logits = self.next_logits(self.hidden(new_ids, cache=cache, **places)[:, -1])
            next_ids = sample(logits, temperature, top_k, top_p, generators)
            if stop:
                next_ids = torch.where(ended, ids[:, -1], next_ids)
                ended |= torch.isin(next_ids, torch.tensor(list(stop), device=ids.device))
            ids = torch.cat((ids, next_ids[:, None]), dim=1)
            yield next_ids
            if stop and ended.all():
                return

    def next_logits(self, x):
        """float32 logits (B, V) of hidden states x (B, C).

        Half precision rounds a logit near -100, as GPT-2 has them, to a multiple of 0.5, and so
        makes ties of the likeliest; these are computed again in float32.
        """
        logits = self.head(x)
        if logits.dtype != torch.float32:
            likely = logits.topk(min(64, logits.size(-1))).indices          # (B, 64)
            again = self.wte.weight[likely].float() @ x.float()[:, :, None]
            logits = logits.float().scatter(1, likely, again[:, :, 0])
        return logits

    def generate(self, ids, max_new_tokens, **options):
        """ids (B, T), padding and all, and what stream() yields with these options: (B, T + new).

        Row b's new text is [b, T:], up to its stop id.
        """
        new = self.stream(ids, max_new_tokens, **options)
        return torch.cat((ids, *(next_ids[:, None] for next_ids in new)), dim=1)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache, i):
        x = x + self.attn(self.ln_1(x), mask, cache, i)
        x = x + self.mlp(self.ln_2(x))
        return x


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)     # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, cache, i):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)         # (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=2))
        if cache:
            k, v = cache.add(i, k, v)                                       # (B, nh, K, hs)
            q = q.to(k.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=mask is None and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)                  # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(gelu(self.c_fc(x))))


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) @ weight.T (its first V rows) against targets (N,).

    In slices of tokens, and the gradients of a slice are made while its logits are there: those
    of the whole batch never exist, and none are computed twice. Products are made in `dtype`, all
    else in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, V, dtype, with_gradients):
        slices = -(-x.size(0) * V // LOGITS_AT_ONCE)
        w, nats, dx, dw = weight.to(dtype), 0, [], 0
        for xs, ids in zip(x.to(dtype).chunk(slices), targets[:, None].chunk(slices)):
            logits = (xs @ w.t()).float()                                   # (n, rows of weight)
            logits[:, V:] = -math.inf                                       # the padding
            logits -= logits.amax(dim=1, keepdim=True)
            right = logits.gather(1, ids)                                   # (n, 1)
            exps = logits.exp_()
            sums = exps.sum(dim=1, keepdim=True)
            nats = nats + (sums.log() - right).sum()
            if with_gradients:                                  # softmax - one-hot, times x or w
                g = exps.div_(sums).scatter_add_(1, ids, -torch.ones_like(right)).to(dtype)
                dx.append(g @ w)
                dw = (g.t() @ xs).to(weight.dtype) + dw
        if with_gradients:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype), dw)
        return nats / len(x)

    @staticmethod
    def backward(ctx, scale):
        dx, dw = ctx.saved_tensors
        scale = scale / len(dx)
        return dx.mul_(scale), dw.mul_(scale), None, None, None, None


def gelu(x):
    """GPT-2's GELU, 0.5 x (1 + tanh(z)). Compiled, its tanh is a sigmoid, 2 sigmoid(2 z) - 1: an
    exponential is several times faster on a CPU than a hyperbolic tangent."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate='tanh')
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))


class Cache:
    """Keys and values of the tokens that were read, in all layers of a GPT, in memory taken once.

    On a CPU they are float32 whatever the weights are: attention is several times faster so.
    """

    def __init__(self, gpt, B, size):
        c, weight = gpt.config, gpt.wte.weight
        shape = (B, c.n_head, size, c.n_embd // c.n_head)
        dtype = torch.float32 if weight.device.type == 'cpu' else weight.dtype
        self.keys, self.values = ([torch.empty(shape, dtype=dtype, device=weight.device)
                                   for _ in range(c.n_layer)] for _ in range(2))
        self.length = 0

    def add(self, i, k, v):
        """Keep k and v (B, nh, T, hs) of layer i; all of its keys and values (B, nh, K, hs)."""
        both, T = ((self.keys[i], k), (self.values[i], v)), k.size(2)
        for memory, new in both:
            memory.narrow(2, self.length, T).copy_(new)
        return [memory.narrow(2, 0, self.length + T) if self.length else new
                for memory, new in both]


def left_pad(prompts):
    """(ids (B, T), lengths (B,)) for stream(), of B lists of ids: zeros before all but the longest.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = [[0] * (max(lengths) - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), lengths


def slide(start, end, block_size):
    """Where windows that began at `start` (B,) begin, if they are to reach to `end` and fit the
    block: moved on by the fewest quarters of it."""
    quarter = max(1, block_size // 4)
    excess = (end - start - block_size).clamp(min=0)
    return start + (excess + quarter - 1) // quarter * quarter


def padding(pad, before, T):
    """{positions (B, T), mask (B, 1, T, K)} of T tokens after `before` cached ones, where row b
    begins with pad[b] columns of padding. Padding sees itself only, lest its softmax be of nothing.
    """
    queries = torch.arange(before, before + T, device=pad.device)
    keys = torch.arange(before + T, device=pad.device)
    causal, itself = keys <= queries[:, None], keys == queries[:, None]     # (T, K)
    mask = causal & (keys >= pad[:, None, None]) | itself                   # (B, T, K)
    return {'positions': (queries - pad[:, None]).clamp(min=0), 'mask': mask[:, None]}


@contextmanager
def plain_products(ids, weight):
    """For one token in bfloat16 on a CPU: without oneDNN, which rearranges a weight at every
    product, and so takes twice as long as reading it does."""
    if ids.numel() > 1 or weight.device.type != 'cpu' or weight.dtype != torch.bfloat16:
        yield
        return
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


class PackedLinear(nn.Module):
    """An nn.Linear whose weight lies as oneDNN reads it; for inference."""

    def __init__(self, weight, bias):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
        self.bias = bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


def pack(model):
    """Rearrange the weights of `model`, in place, for fast inference on a CPU, where F.linear does
    so at every call; a packed model is not to be trained or saved, since its weights are gone.

    Nothing is done on other devices, without oneDNN, or in a dtype that it has not on this CPU.
    """
    weight, onednn = model.wte.weight, torch.backends.mkldnn.is_available()
    if weight.device.type != 'cpu' or not onednn or not (
            weight.dtype == torch.float32 or weight.dtype == torch.bfloat16
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return model
    for module in [module for block in model.h for module in (block.attn, block.mlp)]:
        for name, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(module, name, PackedLinear(linear.weight, linear.bias))
    model.lm_head = PackedLinear(model.wte.weight, None)
    return model


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generators=None):
    """One id (B,) for each row of logits (B, V), row b's by generators[b], torch.Generators on
    the CPU.

    temperature 0 takes the likeliest. top_k keeps the k likeliest ids, top_p the fewest whose
    probabilities sum to at least top_p (Holtzman et al. 2020); 0 and 1 keep all. Both are applied
    after the temperature, top_k first.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    V, ids = logits.size(-1), None
    if 0 < top_k < V or top_p < 1:
        logits, ids = logits.topk(min(top_k or V, V))                       # the likeliest first
    probs = (logits / max(temperature, 1e-6)).softmax(dim=-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)     # enough before it
    draws = torch.cat([torch.rand(1, generator=g) for g in generators or [None] * len(probs)])
    # the first id with which the sum of probabilities reaches a number in (0, 1]
    sums = probs.cumsum(dim=-1)
    chosen = torch.searchsorted(sums, (1 - draws).to(sums.device)[:, None] * sums[:, -1:])
    return (chosen if ids is None else ids.gather(1, chosen))[:, 0]


def crop_block(model, block_size):
    """Shorten the block of `model`, in place, by cutting off its last positions."""
    if block_size > model.config.block_size:
        raise ValueError(f'block_size={block_size} is more than '
                         f'the {model.config.block_size} of this model; give that or less')
    model.config = replace(model.config, block_size=block_size)
    model.wpe.weight = nn.Parameter(model.wpe.weight[:block_size].detach().clone())
