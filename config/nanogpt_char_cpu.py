# python data/prepare.py --dataset=shakespeare --tokenizer=chars
# python train.py config/nanogpt_char_cpu.py
#
# nanoGPT's documented CPU run on character Shakespeare, its settings unchanged, for comparison:
# 0.8M parameters, 2000 updates of 768 characters. nanoGPT reports 1.88.
# 2 CPU cores (AMD EPYC): 1.909 over the whole validation split, 88 s. nanoGPT's own code, at the
# same time, ends at 1.898 over the whole split (its own estimate from 20 batches: 1.886).
out_dir = 'out/nanogpt_char_cpu'
dataset = 'shakespeare_char'
device = 'cpu'
dtype = 'float32'
compile = False
n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False
dropout = 0.0
batch_size = 12
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
eval_interval = 250
log_interval = 50
always_save_checkpoint = False
