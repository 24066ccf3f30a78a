# python data/prepare.py --name=novels --tokenizer=bpe:4096 --unwrap=True novels/
# python train.py config/checkpoint.py
# python publish.py --model=out/checkpoint --to=checkpoint --about=FILE:about.md --license=mit
#
# The GPT in checkpoint/ (5.0M parameters), trained on 84 novels that checkpoint/README.md names.
# 2 CPU cores (AMD EPYC without AVX-512, float32), while other programs ran: 1 h 3 min of training,
# 7.1M tokens, 1.655 bits per byte of five other novels (`xz -9e` on the same text: 2.371).
out_dir = 'out/checkpoint'
dataset = 'novels'
n_layer = 5
n_head = 4
n_embd = 256
block_size = 256
bias = False
batch_size = 16             # x 256
total_batch_size = 16384    # after 500 updates of 4,096 tokens and 500 of 8,192
batch_warmup_iters = 1000
max_iters = 1060
eval_interval = 200
eval_tokens = 100_000
log_interval = 20
sample_interval = 200
optimizer = 'muon'
learning_rate = 5e-3
muon_learning_rate = 0.03
min_lr = 0.0
schedule = 'wsd'
warmup_iters = 40
cooldown_iters = 540
