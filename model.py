"""
GPT-2: learned positions, pre-LayerNorm blocks, tanh GELU, a head tied to the token embedding.

Read it from the top: GPT is the whole, Block is the transformer, CausalSelfAttention and MLP its
two halves. Parameter names are those of OpenAI's release. Sources: Radford et al. 2019 and its code
(github.com/openai/gpt-2), and transformers' GPT2LMHeadModel, with which it agrees to rounding.

Shapes: B sequences, T tokens, C = n_embd channels, nh heads of size hs, V = vocab_size.
"""

import math
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
        self.initialise()

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

        positions (T,) or (B, T): places in the block, 0 .. T-1 if not given.
        mask: bool, broadcast to (B, nh, T, T), True where a query (row) may see a key;
            causal if not given.
        cache: the place of a KV cache, which this version does not have.
        """
        assert cache is None, 'there is no KV cache yet'
        B, T = ids.shape
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens are more than the block of {self.config.block_size}')
        if positions is None:
            positions = torch.arange(T, device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))                  # (B, T, C)
        for block in self.h:
            x = block(x, mask)
        return self.ln_f(x)                                                 # (B, T, C)

    def forward(self, ids, targets=None, *, positions=None, mask=None, cache=None):
        """Logits (B, T, V) of ids (B, T); with targets (B, T) their mean cross-entropy in nats."""
        x = self.hidden(ids, positions=positions, mask=mask, cache=cache)
        if targets is None:
            return self.head(x)
        return self.loss(x.flatten(0, 1), targets.flatten())

    def head(self, x):
        logits = F.linear(x, self.wte.weight)
        padded = logits.size(-1) > self.config.vocab_size
        return logits[..., :self.config.vocab_size] if padded else logits   # (..., V)

    def loss(self, x, targets):
        """Mean cross-entropy of hidden states x (N, C) against targets (N,).

        In slices of tokens whose logits the backward pass computes again, so that those of the
        whole batch never exist. (torch's F.linear_cross_entropy computes in float32 under
        autocast, and returns a loss rounded to bfloat16 when it is given bfloat16.)
        """
        slice_size = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        if len(x) <= slice_size or not torch.is_grad_enabled():
            losses = [self.slice_loss(*both)
                      for both in zip(x.split(slice_size), targets.split(slice_size))]
        else:
            losses = [checkpoint(self.slice_loss, *both, use_reentrant=False,
                                 preserve_rng_state=False)
                      for both in zip(x.split(slice_size), targets.split(slice_size))]
        return torch.stack(losses).sum() / len(targets)

    def slice_loss(self, x, targets):
        return F.cross_entropy(self.head(x).float(), targets, reduction='sum')

    def flops_per_token(self):
        """Floating-point operations of training on one token: 6 for each weight of a matrix
        product and 12 for each (layer, channel, position) of attention
        (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        weights = sum(p.numel() for p in self.parameters()) - self.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.no_grad()
    def stream(self, ids, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """Yield max_new_tokens times the next ids (B,) after ids (B, T), sampled one after another.

        Past the block the window slides: the last block_size tokens are read again from position 0.
        """
        for _ in range(max_new_tokens):
            x = self.hidden(ids[:, -self.config.block_size:])
            logits = self.head(x[:, -1]).float()                            # (B, V)
            next_ids = sample(logits, temperature, top_k, top_p, generator)
            ids = torch.cat((ids, next_ids[:, None]), dim=1)
            yield next_ids

    def generate(self, ids, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """ids (B, T) continued by max_new_tokens sampled ids: (B, T + max_new_tokens).

        temperature 0 takes the likeliest; top_k=0 and top_p=1 cut nothing off. `generator` is a
        torch.Generator on the model's device and makes the samples repeatable.
        """
        new = self.stream(ids, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                          generator=generator)
        return torch.cat((ids, *(next_ids[:, None] for next_ids in new)), dim=1)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
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

    def forward(self, x, mask):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)         # (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)                              # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate='tanh')))


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One id (B,) for each row of logits (B, V).

    top_k keeps the k likeliest ids, top_p the fewest whose probabilities sum to at least top_p
    (Holtzman et al. 2020); both are applied after the temperature, top_k first.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(dim=-1)
        cut = probs.cumsum(dim=-1) - probs >= top_p                 # what stands before suffices
        logits = logits.scatter(1, order, ordered.masked_fill(cut, -math.inf))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def crop_block(model, block_size):
    """Shorten the block of `model`, in place, by cutting off its last positions."""
    if block_size > model.config.block_size:
        raise ValueError(f'block_size={block_size} is more than '
                         f'the {model.config.block_size} of this model')
    model.config = replace(model.config, block_size=block_size)
    model.wpe.weight = nn.Parameter(model.wpe.weight[:block_size].detach().clone())
