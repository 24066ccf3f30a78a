# python data/prepare.py --dataset=shakespeare --tokenizer=chars
# python train.py config/shakespeare_char_seconds.py
#
# Character Shakespeare in seconds: 0.4M parameters, half an epoch. 2 CPU cores (Intel Xeon,
# float32): 12.6 s of training, val_loss 1.872 over the whole validation split. nanoGPT's CPU run on
# the same machine reaches 1.880 after 65.5 s.
out_dir = 'out/shakespeare_char_seconds'
dataset = 'shakespeare_char'
device = 'cpu'
n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
bias = False
batch_size = 32             # x 64
max_iters = 270
optimizer = 'muon'
learning_rate = 6e-3
muon_learning_rate = 0.05
beta2 = 0.99
schedule = 'wsd'
warmup_iters = 10
cooldown_iters = 135
min_lr = 0.0
eval_interval = 270
log_interval = 50
