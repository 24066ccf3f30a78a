# python data/prepare.py --dataset=fineweb-edu-10B
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# GPT-2 124M on 10B tokens of FineWeb-Edu: 19,073 updates of 524,288 tokens. The batch is the same
# on any number of GPUs: on one, run it without torchrun; with less memory, --batch_size=8 changes
# only the time. Expected, not yet measured: about 1.5 hours on 8 A100 (llm.c's rate for the same
# work), validation loss near 3.29, which OpenAI's 124M reaches on this text.
out_dir = 'out/gpt2'
dataset = 'fineweb-edu-10B'
total_batch_size = 524_288  # 2**19 tokens
batch_size = 16             # x 1024 tokens
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
max_iters = 19_073          # 10B tokens
warmup_iters = 715          # 375M tokens, as GPT-3
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
eval_interval = 250
eval_tokens = 10_485_760
