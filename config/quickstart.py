# python train.py config/quickstart.py
#
# A small GPT (4.3M parameters) on the English that comes with Python, as `make quickstart` runs it.
# 2 CPU cores (AMD EPYC, AVX-512 bf16): 2 min 56 s of training, val_loss 4.577, 1.898 bits per byte
# (`xz -9e` makes 2.410 of the same text).
out_dir = 'out/quickstart'
n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 16         # x 256 = 4,096 tokens an update
max_iters = 250         # 1.0M tokens, 1.7 epochs
eval_interval = 50
log_interval = 10
optimizer = 'muon'
learning_rate = 3e-3
min_lr = 0.0
schedule = 'wsd'
warmup_iters = 20
cooldown_iters = 125
