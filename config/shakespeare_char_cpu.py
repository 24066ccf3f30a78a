# python data/prepare.py --dataset=shakespeare --tokenizer=chars
# python train.py config/shakespeare_char_cpu.py
#
# Character Shakespeare on a laptop: 1.3M parameters, 4.8 epochs. 2 CPU cores (Intel Xeon, float32):
# 4 min 33 s of training, val_loss 1.4674 over the whole validation split (means of three seeds,
# from 1.4595 to 1.4732). nanoGPT's GPU run reports a best validation loss of 1.4697.
out_dir = 'out/shakespeare_char_cpu'
dataset = 'shakespeare_char'
device = 'cpu'
compile = True
n_layer = 3
n_head = 6
n_embd = 192
block_size = 128
bias = False
batch_size = 16             # x 128
total_batch_size = 8192     # after 530 updates of 2,048 characters and 530 of 4,096
batch_warmup_iters = 1060
max_iters = 1250
optimizer = 'muon'
learning_rate = 6e-3
muon_learning_rate = 0.04
beta2 = 0.99
schedule = 'wsd'
warmup_iters = 25
cooldown_iters = 700
min_lr = 0.0
eval_interval = 250
log_interval = 50
