# python data/prepare.py --dataset=shakespeare --tokenizer=chars
# python train.py config/shakespeare_char_seconds.py
#
# Character Shakespeare while you wait: 0.4M parameters, 0.6 epochs.
out_dir = 'out/shakespeare_char_seconds'
dataset = 'shakespeare_char'
device = 'cpu'
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
bias = False
batch_size = 16             # x 64
total_batch_size = 4096     # after 120 updates of 1,024 characters and 120 of 2,048
batch_warmup_iters = 240
max_iters = 300
optimizer = 'muon'
learning_rate = 6e-3
muon_learning_rate = 0.05
beta2 = 0.99
schedule = 'wsd'
warmup_iters = 10
cooldown_iters = 180
min_lr = 0.0
eval_interval = 300
log_interval = 50
