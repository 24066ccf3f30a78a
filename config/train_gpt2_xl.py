# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_xl.py
#
# GPT-2 XL, 1558M: what differs from config/train_gpt2.py. Not yet measured.
out_dir = 'out/gpt2-xl'
n_layer = 48
n_head = 25
n_embd = 1600
learning_rate = 2e-4
batch_size = 8              # on 80 GB; 2 fit 40 GB (computed, docs/benchmarks.md)
