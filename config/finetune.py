# python data/prepare.py --dataset=shakespeare
# python train.py config/finetune.py --init_from=gpt2
#
# Fine-tune GPT-2 on Shakespeare: 32,768 tokens an update, so 9 updates are an epoch. --init_from
# takes gpt2 to gpt2-xl, a Hugging Face name or folder, or a run of ours; the data set must have
# that model's tokenizer. With GPT-2's weights not yet measured; docs/benchmarks.md has a small run.
out_dir = 'out/finetune'
init_from = 'gpt2'
dataset = 'shakespeare'
total_batch_size = 32_768
batch_size = 1          # x 1024 tokens: for a small card
block_size = 1024
dropout = 0.1
max_iters = 200         # at most: it overfits, and then stops by itself
eval_interval = 5
patience = 3            # 15 updates without a lower validation loss end it; the best is sampled
always_save_checkpoint = False  # the best checkpoint and the last are kept
learning_rate = 3e-5
decay_lr = False
