"""
GPT-2: learned positions, pre-LayerNorm blocks, GELU, a head tied to the token embedding.

Read it from the top: GPT is the model, Block is a transformer layer, CausalSelfAttention and MLP
are its two halves. Parameter names are those of OpenAI's release. Sources: Radford et al. 2019 and
its code (github.com/openai/gpt-2), and GPT2LMHeadModel of transformers, with which it agrees to
rounding.

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of size hs, V = vocab_size.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_later


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024      # tokens in the longest sequence
    vocab_size: int = 50257     # token ids are 0 .. vocab_size - 1
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0        # after embeddings, attention weights and residual branches
    bias: bool = True           # in Linear and LayerNorm, as GPT-2 has them
    activation: str = 'gelu_new'    # of the MLP: GPT-2's tanh form, or 'gelu', the exact one

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


class GPT(nn.Module):
    """Parts are replaced from outside: lm_head by a packed copy (gpt.cpu.pack); in training on CUDA
    what there are kernels for (gpt.kernels.use); on several processes loss() and the blocks by
    compiled ones (gpt.trainer). gpt.trainer also sets the attributes below lm_head: they change
    speed, memory and rounding alone."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f'n_embd={config.n_embd} must be a multiple of n_head={config.n_head}')
        if config.activation not in ACTIVATIONS:
            raise ValueError(f'activation: given {config.activation!r}, '
                             f'expected one of {", ".join(ACTIVATIONS)}')
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = None     # None: wte is used; gpt/cpu.pack() puts a packed copy here
        self.checkpoint_activations = False     # True: keep only the inputs of each block and
                                                # recompute the rest in the backward pass
        self.half_residual = False      # True: the residual stream in the dtype of autocast
        self.logits_per_slice = 2 ** 26         # the loss computes this many logits at a time,
        self.slice_loss = slice_loss            # by this function
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02), biases zero; the 2 n_layer projections into the residual stream are
        scaled by 1 / sqrt(2 n_layer) (GPT-2 paper, section 2.3)."""
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                residual = name.endswith('c_proj.weight')
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(p, std=std)
        self.wte.weight[self.config.vocab_size:] = 0    # padding: gets no gradient, stays 0

    def hidden(self, ids, *, positions=None, mask=None, cache=None):
        """Final hidden states (B, T, C) of ids (B, T), after ln_f.

        cache: a gpt.generate.Cache of the tokens before these, to which these are added.
        positions (T,) or (B, T): positions in the block; default: those after the cache's.
            Where they repeat, as for alternatives side by side, T may exceed the block.
        mask: bool, broadcast to (B, nh, T, K), True where a query (row) may see a key, or what is
            added to their scores; K counts the tokens of the cache and these. Default: causal.
        """
        T, cached = ids.size(1), cache.length if cache else 0
        if positions is None and cached + T > self.config.block_size:
            raise ValueError(f'{cached + T} tokens are more than '
                             f'the block of {self.config.block_size}')
        if positions is None:
            positions = torch.arange(cached, cached + T, device=ids.device)
        if mask is None and cached and T > 1:
            mask = torch.ones(T, cached + T, dtype=torch.bool, device=ids.device).tril(cached)
        x = self.drop(self.wte(ids) + self.wpe(positions))                  # (B, T, C)
        if self.half_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for i, block in enumerate(self.h):
            i = i if cache else None            # torch.compile would compile a block for each i
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = recompute_later(block, x, mask, cache, i, use_reentrant=False)
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
        """Mean cross-entropy, in float32, of hidden states x (N, C) against targets (N,): what
        F.cross_entropy(self.head(x).float(), targets) is, in less memory and time."""
        device, slices = x.device.type, -(-len(x) * self.config.vocab_size // self.logits_per_slice)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return HeadLoss.apply(x, self.wte.weight, targets, self.config.vocab_size, dtype,
                                  slices, self.slice_loss, torch.is_grad_enabled())

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, **options):
        """ids (B, T) and up to max_new_tokens more: (B, T + new). Call eval() first.

        options: temperature, top_k, top_p, seed, stop, lengths; see gpt.generate.SamplingOptions.
        """
        from gpt.generate import stream
        for next_ids in stream(self, ids, max_new_tokens, **options):       # (B,)
            ids = torch.cat((ids, next_ids[:, None]), dim=1)
        return ids

    def crop_block(self, block_size):
        """Shorten the block, in place, by dropping its last positions."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size: given {block_size}, expected at most '
                             f'{self.config.block_size}, the block of this model')
        self.config = replace(self.config, block_size=block_size)
        self.wpe.weight = nn.Parameter(self.wpe.weight[:block_size].detach().clone())

    def num_parameters(self):
        """Learned numbers: the padding of the vocabulary does not count."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self):
        """Floating-point operations of training on one token: 6 for each weight of a matrix
        product and 12 for each (layer, channel, position) of attention
        (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


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
        qkv = self.c_attn(x)                                                # (B, T, 3 C)
        q, k, v = self.heads(qkv)                                           # (B, nh, T, hs)
        if cache:
            k, v = cache.add(i, qkv[..., C:])                               # (B, nh, K, hs)
            q = q.to(k.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                           is_causal=mask is None and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)                              # concatenate the heads
        if cache:
            y = y.to(x.dtype)
        return self.resid_dropout(self.c_proj(y))

    def heads(self, qkv):
        B, T, _ = qkv.shape
        return [part.view(B, T, self.n_head, -1).transpose(1, 2)            # (B, nh, T, hs)
                for part in qkv.chunk(3, dim=2)]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.dropout(self.c_proj(self.hidden(x)))

    def hidden(self, x):
        return self.activation(self.c_fc(x))                                # (B, T, 4 C)


def gelu_new(x):
    """GPT-2's GELU, 0.5 x (1 + tanh(z)). Compiled, the tanh becomes a sigmoid,
    2 sigmoid(2 z) - 1: an exponential is several times faster on a CPU than a tanh."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate='tanh')
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))


ACTIVATIONS = {'gelu_new': gelu_new, 'gelu': F.gelu}


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) @ weight.T (its first V rows) against targets (N,).

    It works in slices of tokens, and computes the gradients of a slice while its logits exist: the
    logits of the whole batch never do, and none are computed twice. Products are in `dtype`, all
    else is in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, V, dtype, slices, slice_loss, with_gradients):
        w, nats, dx, dw = weight.to(dtype), 0, [], 0
        for xs, ys in zip(x.to(dtype).chunk(slices), targets[:, None].chunk(slices)):
            slice_nats, g = slice_loss(xs @ w.t(), ys, V, with_gradients)
            nats = nats + slice_nats
            if with_gradients:
                dx.append(g @ w)
                dw = (g.t() @ xs).to(weight.dtype) + dw
                del g                                   # before the next logits
        if with_gradients:
            ctx.save_for_backward(torch.cat(dx).to(x.dtype), dw)
        return nats / len(x)

    @staticmethod
    def backward(ctx, grad_output):
        dx, dw = ctx.saved_tensors
        scale = grad_output / len(dx)
        return dx.mul_(scale), dw.mul_(scale), None, None, None, None, None, None


def slice_loss(logits, targets, V, with_gradients):
    """Sum of the cross-entropies of a slice, and its gradient: softmax minus one-hot, (n, rows of
    weight). logits is of that shape too, targets is (n, 1). On CUDA gpt/kernels.py does this."""
    dtype, logits = logits.dtype, logits.float()
    logits[:, V:] = -math.inf                                               # the padding
    logits -= logits.amax(dim=1, keepdim=True)
    correct = logits.gather(1, targets)                                     # (n, 1)
    exps = logits.exp_()
    sums = exps.sum(dim=1, keepdim=True)
    nats = (sums.log() - correct).sum()
    if not with_gradients:
        return nats, None
    return nats, exps.div_(sums).scatter_add_(1, targets, -torch.ones_like(correct)).to(dtype)
