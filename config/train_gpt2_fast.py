# python data/prepare.py --dataset=fineweb-10B
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/train_gpt2_fast.py
#
# GPT-2 124M in fewer tokens, with the same architecture: Muon, and a learning rate that stays
# constant and then falls to 0. Expected, not yet measured: validation loss 3.28 on FineWeb, for
# which llm.c needs 10B tokens, after 4.7B. (An estimate: modded-nanogpt in June 2024 needed 6.4B,
# with AdamW at 1.8e-3 on nearly this architecture, and Muon later gave it a factor of 1.36.) With
# AdamW: --optimizer=adamw --max_iters=12288 --cooldown_iters=2048.
out_dir = 'out/gpt2-fast'
dataset = 'fineweb-10B'
max_iters = 9_000           # x 524,288 = 4.7B tokens
optimizer = 'muon'
learning_rate = 1.8e-3
muon_learning_rate = 0.02
schedule = 'wsd'
warmup_iters = 256
cooldown_iters = 3_600
min_lr = 0.0
