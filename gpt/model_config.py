"""
config.json both ways: what a folder says of its model. Every key is used, holds the value that
model.py computes with, is known to be harmless, or is refused by name.

Fields of GPTConfig that transformers does not know are kept under gpt_config, by their names.
Where one is not at its default, the folder is no plain GPT-2: model_type says so, and transformers
refuses it.
"""

import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from gpt.files import read_json
from gpt.shapes import Positive, checked, in_words
from gpt.weights import NANOGPT, file_in, load_pickle, shapes
from model import GPTConfig

HUGGING_FACE_KEYS = {                   # for the fields of GPTConfig
    'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer',
    'n_head': 'n_head', 'n_embd': 'n_embd', 'bias': 'bias', 'activation': 'activation_function'}
ALIASES = {                             # other names that transformers takes for the same
    'hidden_size': 'n_embd', 'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head', 'num_hidden_layers': 'n_layer'}
ACTIVATIONS = {                         # transformers' names for two functions
    'gelu_new': 'gelu_new', 'gelu_pytorch_tanh': 'gelu_new', 'gelu_python_tanh': 'gelu_new',
    'gelu_fast': 'gelu_new', 'gelu_accurate': 'gelu_new', 'gelu': 'gelu', 'gelu_python': 'gelu'}
FIXED_KEYS = {                          # the values that model.py computes with, the usual one last
    'model_type': ('gpt2-variant', 'gpt2'), 'layer_norm_epsilon': (1e-5,),
    'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,),
    'tie_word_embeddings': (True,), 'is_encoder_decoder': (False,), 'pruned_heads': (None, {}),
    'quantization_config': (None,), 'per_layer_config': (None,), 'auto_map': (None, {})}
HARMLESS_KEYS = frozenset("""
    architectures transformers_version torch_dtype dtype name_or_path _name_or_path _commit_hash
    attn_implementation _attn_implementation _attn_implementation_autoset tokenizer_class
    unsloth_version unsloth_fixed n_ctx n_special predict_special_tokens initializer_range
    gradient_checkpointing resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout use_cache output_past
    reorder_and_upcast_attn add_cross_attention cross_attention_hidden_size is_decoder
    chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss return_dict output_hidden_states
    output_attentions bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id
    mask_token_id decoder_start_token_id prefix task_specific_params finetuning_task problem_type
    num_labels _num_labels id2label label2id max_length min_length max_new_tokens min_new_tokens
    max_time stop_strings do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores output_logits return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values renormalize_logits suppress_tokens
    begin_suppress_tokens forced_decoder_ids exponential_decay_length_penalty sequence_bias
    guidance_scale low_memory penalty_alpha constraints force_words_ids cache_implementation
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_lookbehind target_lookbehind
    """.split())                        # metadata, training, heads of others, generation
LARGEST = 2 ** 24                       # number of layers, channels, positions or tokens


# What is read, by type: numbers of transformers' keys are 1 or more.

SIZES = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'
OwnSettings = TypedDict('OwnSettings', {
    field.name: type(field.default) for field in fields(GPTConfig)
    if field.name not in HUGGING_FACE_KEYS and field.name != 'dropout'}, total=False)
ConfigJson = TypedDict('ConfigJson', {
    'model_type': str, **{HUGGING_FACE_KEYS[name]: Positive for name in SIZES},
    'bias': NotRequired[bool], 'activation_function': NotRequired[str],
    'gpt_config': NotRequired[OwnSettings]})
NanoGPTArgs = TypedDict('NanoGPTArgs', {
    **{name: Positive for name in SIZES}, 'bias': NotRequired[bool],
    'dropout': NotRequired[float]})


def config_json(config: GPTConfig, eot_id: int | None) -> dict[str, Any]:
    """The config.json of a model."""
    own = own_settings(config)
    is_plain = own == own_settings(GPTConfig())
    return {
        'architectures': ['GPT2LMHeadModel' if is_plain else 'GPT'],
        'model_type': 'gpt2' if is_plain else 'gpt2-variant',
        'activation_function': config.activation,
        **{key: getattr(config, name) for name, key in HUGGING_FACE_KEYS.items()},
        **({'gpt_config': own} if own else {}), 'n_ctx': config.block_size,
        'resid_pdrop': config.dropout, 'embd_pdrop': config.dropout, 'attn_pdrop': config.dropout,
        'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True,
        'bos_token_id': eot_id, 'eos_token_id': eot_id}


def own_settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of a model that transformers' GPT-2 does not have."""
    return {name: value for name, value in asdict(config).items()
            if name not in HUGGING_FACE_KEYS and name != 'dropout'}


def read_config(folder: str | Path) -> GPTConfig:
    """The GPTConfig of the model in `folder`, without dropout; ValueError if it is not a GPT-2 that
    model.py builds."""
    file = file_in(folder, 'config.json')
    if not file:
        return read_nanogpt_config(folder)
    config = read_json(file, ConfigJson)
    try:
        for key, value in config.items():
            check_key(key, value, config)
        activation = ACTIVATIONS[config.get('activation_function', 'gelu_new')]
        return bounded_config({**{name: config[key] for name, key in HUGGING_FACE_KEYS.items()
                                  if key in config}, 'activation': activation,
                               **config.get('gpt_config', {})})
    except ValueError as error:
        raise ValueError(f'{folder}: not a GPT-2 that this program can run: {error}') from None


def check_key(key: str, value: Any, config: dict[str, Any]) -> None:
    """Refuse a key of config.json that is not understood, or a value that model.py cannot do."""
    allowed = {**FIXED_KEYS, 'activation_function': tuple(ACTIVATIONS),
               'n_inner': (None, 4 * config['n_embd']),
               **{alias: (config[name],) for alias, name in ALIASES.items()}}
    if key == 'gpt_config':
        for name in value.keys() - own_settings(GPTConfig()).keys():
            raise ValueError(f'its model was built with {name}={value[name]!r}, a setting that '
                             f'model.py does not have')
    elif key in allowed:
        if value not in allowed[key]:
            usual = allowed[key] if key == 'activation_function' else allowed[key][-1:]
            raise ValueError(f'{key} is {in_words(value)}, expected '
                             f"{' or '.join(map(repr, usual))}")
    elif key not in HARMLESS_KEYS and key not in HUGGING_FACE_KEYS.values():
        raise ValueError(f'config.json has {in_words(key)} ({in_words(value)}), which may change '
                         f'what the model computes; if it does not, delete that key')


def bounded_config(values: dict[str, Any]) -> GPTConfig:
    """GPTConfig(**values); ValueError for a number that is out of bounds."""
    config = GPTConfig(**values)
    for name in HUGGING_FACE_KEYS:
        value = getattr(config, name)
        if type(value) is int and value > LARGEST:
            raise ValueError(f'{name}: given {value:,}, expected at most {LARGEST:,}')
    if config.n_embd % config.n_head:
        raise ValueError(f'n_embd: given {config.n_embd}, which must be a multiple of '
                         f'n_head={config.n_head}')
    return config


def check_size(config: GPTConfig) -> None:
    """Raise ValueError for a model that cannot be built here; nothing is allocated for that."""
    bounded_config(vars(config))
    one, two = (sum(map(math.prod, shapes(replace(config, n_layer=n)).values())) for n in (1, 2))
    size = 4 * (one + (config.n_layer - 1) * (two - one))           # float32
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') if os.name == 'posix' else (
        math.inf)
    if size > memory:
        raise ValueError(f'n_layer={config.n_layer}, n_embd={config.n_embd}: given weights of '
                         f'{size / 1e9:,.0f} GB, expected at most {memory / 1e9:,.0f} GB, the '
                         f'memory here; give smaller ones')


def read_nanogpt_config(folder: str | Path) -> GPTConfig:
    """The GPTConfig of a checkpoint of nanoGPT, whose MLP has the exact GELU."""
    file = file_in(folder, NANOGPT)
    if not file:
        raise ValueError(f'{folder}: no config.json in this folder')
    where = f'{file}: model_args'
    args = checked(load_pickle(file).get('model_args'), where, NanoGPTArgs)
    for name in args.keys() - NanoGPTArgs.__annotations__.keys():
        raise ValueError(f'{where} has {in_words(name)}, which nanoGPT does not have')
    try:
        return bounded_config({**args, 'dropout': 0.0, 'activation': 'gelu'})
    except ValueError as error:
        raise ValueError(f'{where}: {error}') from None
