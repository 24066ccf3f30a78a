# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_large.py
#
# GPT-2 large, 774M: what differs from config/train_gpt2.py. Not yet measured.
out_dir = 'out/gpt2-large'
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 2.5e-4
batch_size = 4
