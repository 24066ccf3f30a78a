# nanoGPT's own defaults, to put before a config file written for nanoGPT, which names only what
# differs from them: python train.py config/nanogpt.py its/config/train_gpt2.py
# (GPT-2 124M on OpenWebText; for a run of this repository see config/train_gpt2.py)
out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200
dataset = 'openwebtext'
gradient_accumulation_steps = 5 * 8
batch_size = 12
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False
learning_rate = 6e-4
max_iters = 600_000
weight_decay = 1e-1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
decay_lr = True
warmup_iters = 2000
lr_decay_iters = 600_000
min_lr = 6e-5
