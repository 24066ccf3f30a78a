# python data/prepare.py --dataset=shakespeare
# python train.py config/finetune.py --init_from=gpt2
#
# Fine-tune GPT-2 on Shakespeare: 32,768 tokens per update, so 9 updates are an epoch. --init_from
# takes gpt2 to gpt2-xl, a Hugging Face name or folder, or a run of ours; the data set must have
# that model's tokenizer. Not yet measured with GPT-2's weights; docs/benchmarks.md has a small run,
# from checkpoint/ with --total_batch_size=8192 --learning_rate=3e-4; its block of 512 is used.
out_dir = 'out/finetune'
init_from = 'gpt2'
dataset = 'shakespeare'
total_batch_size = 32_768
batch_size = 1          # x 1024 tokens: for a small card
block_size = 1024
dropout = 0.1
max_iters = 200         # at most: patience stops it when it overfits
eval_interval = 5
patience = 3            # ends after 15 updates without a lower validation loss
always_save_checkpoint = False  # keep the best checkpoint and the last
learning_rate = 3e-5
decay_lr = False
