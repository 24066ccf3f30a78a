# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_medium.py
#
# GPT-2 medium, 355M: what differs from config/train_gpt2.py. Not yet measured.
out_dir = 'out/gpt2-medium'
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 3e-4
batch_size = 8
