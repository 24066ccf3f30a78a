# python data/prepare.py --dataset=shakespeare --tokenizer=chars
# python train.py config/shakespeare_char.py
#
# nanoGPT's GPU run on character Shakespeare, its settings unchanged: 10.7M parameters, 5000 updates
# of 16,384 characters. nanoGPT reports a best validation loss of 1.4697 after 3 minutes of an A100;
# expected here, not yet measured.
out_dir = 'out/shakespeare_char'
dataset = 'shakespeare_char'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
bias = False
dropout = 0.2           # 82 epochs
batch_size = 64
max_iters = 5000
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99            # few tokens per update
warmup_iters = 100
eval_interval = 250
always_save_checkpoint = False  # it overfits: keep only the best and the last
