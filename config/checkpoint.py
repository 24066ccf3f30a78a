# python data/prepare.py --name=novels --tokenizer=bpe:4096 --unwrap=True novels/
# python train.py config/checkpoint.py
# python publish.py --model=out/checkpoint --to=checkpoint --about=FILE:about.md --license=mit
#
# The GPT in checkpoint/ (7.5M parameters), trained on 171 novels; checkpoint/README.md says which.
# One NVIDIA H100 80GB, torch 2.11.0+cu130: 187.2M tokens, 5.6 epochs, in 145 s of updates, 55 of
# them spent on compiling again when the batch grew. 1.387 bits per byte of six other novels
# (`xz -9e` on the same text: 2.367). On 2 CPU cores it would take many hours: give --minutes=60.
out_dir = 'out/checkpoint'
dataset = 'novels'
n_layer = 8
n_head = 4
n_embd = 256
block_size = 512
bias = False
batch_size = 128            # x 512
total_batch_size = 65536    # after 121 updates of 16,384 tokens and 120 of 32,768
batch_warmup_iters = 241
max_iters = 3007
eval_interval = 500
eval_tokens = 200_000
log_interval = 50
sample_interval = 1000
optimizer = 'muon'
learning_rate = 5e-3
muon_learning_rate = 0.03
min_lr = 0.0
schedule = 'wsd'
warmup_iters = 30
cooldown_iters = 1504
