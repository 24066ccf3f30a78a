"""
AdamW and Muon, the schedule of their learning rates, and a step of theirs.
"""

import math

import torch

from gpt.muon import Muon


def make_optimizers(model, cfg, dtype=torch.float32):
    """[AdamW] or [AdamW, Muon], which multiplies in dtype; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    for_muon = [p for p in model.h.parameters() if p.dim() >= 2] if cfg.optimizer == 'muon' else []
    ids = set(map(id, for_muon))
    others = [p for p in matrices if id(p) not in ids]
    groups = [{'params': others, 'weight_decay': cfg.weight_decay},
              {'params': vectors, 'weight_decay': 0.0}]
    betas = (cfg.beta1, cfg.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, fused=True)]
    if cfg.optimizer == 'muon':
        half = dtype if dtype == torch.float32 else torch.bfloat16
        optimizers.append(Muon(for_muon, lr=cfg.muon_learning_rate, weight_decay=cfg.weight_decay,
                               dtype=half))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group['initial_lr'] = group['lr']
    return optimizers


def update(optimizers, loss, norm, grad_clip):
    """One step of each, by gradients of length grad_clip at most; none if loss or norm is not
    finite. The device decides, and nobody waits for it."""
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    if norm.device.type not in ('cpu', 'cuda'):         # elsewhere the fused kernels cannot
        if not finite:
            return
        scale = 1 / (norm / grad_clip).clamp(min=1) if grad_clip else 1
        for p in (p for o in optimizers for group in o.param_groups for p in group['params']):
            p.grad.mul_(scale)
    for optimizer in optimizers:
        if norm.device.type in ('cpu', 'cuda'):
            optimizer.grad_scale = (norm / grad_clip).clamp(min=1) if grad_clip else None
            optimizer.found_inf = (~finite).float()
        optimizer.step()


def learning_rate_at(step, cfg):
    """AdamW's learning rate for the update after `step` updates; Muon's follows in proportion."""
    if not cfg.decay_lr:
        return cfg.learning_rate
    end = cfg.lr_decay_iters or cfg.max_iters
    if step < cfg.warmup_iters:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_iters + 1)
    if step >= end:
        return cfg.min_lr
    if cfg.schedule == 'cosine':
        progress = (step - cfg.warmup_iters) / (end - cfg.warmup_iters)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:                                                           # 'wsd'
        cooldown = min(cfg.cooldown_iters, end - cfg.warmup_iters)  # it begins after the warmup
        share = min(1, (end - step) / max(1, cooldown))
    return cfg.min_lr + share * (cfg.learning_rate - cfg.min_lr)
