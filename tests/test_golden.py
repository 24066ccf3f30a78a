"""
Constants that others have published about the test sets and protocols, reproduced.

lm-evaluation-harness (v0.2) keeps, for each task, the sha256 of all its requests and what a dummy
model gets whose k-th answer is -random.random(): data, order, rendering and metrics in one number.
The data is not in this repository: without it these tests are skipped, and say so.
"""

import hashlib
import json
import math
import random
import re
from types import SimpleNamespace

import pytest

import eval_lm
import hellaswag
from gpt import results
from gpt import tokenizer
from gpt.data import benchmarks


def shuffled(docs):
    docs = list(docs)
    random.Random(42).shuffle(docs)
    return docs


def dummy(n):
    """The dummy model's answers to n requests."""
    draw = random.Random(42)
    return [-draw.random() for _ in range(n)]


def sha256(requests):
    return hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()


def test_hellaswag_labels_and_the_dummy_model(real):
    """acc 2507 and acc_norm 2486 of 10,042; labels as counted by others."""
    rows, _ = benchmarks.hellaswag(real('hellaswag/hellaswag_val_cleaned.jsonl'))
    assert [sum(row['label'] == k for row in rows) for k in range(4)] == [2515, 2485, 2584, 2458]
    rows, answers = shuffled(rows), iter(dummy(4 * len(rows)))
    scores = [[SimpleNamespace(sum=next(answers), count=1) for _ in range(4)] for _ in rows]
    found = hellaswag.grade(rows, scores, 'lm-eval')
    assert (sum(found['acc']), sum(found['acc_norm'])) == (2507, 2486)


def test_hellaswag_requests(real):
    """What would be asked, to the letter, for all 10,042 original rows."""
    rows, found = benchmarks.hellaswag(real('hellaswag/hellaswag_val.jsonl'))
    assert found['official'] and len(rows) == 10042
    asked = []
    for row in shuffled(rows):
        context = hellaswag.clean(
            f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        asked += [[context, f' {hellaswag.clean(ending)}'] for ending in row['endings']]
    assert sha256(asked) == 'abb808c97d6529eda6c11067837a132c62d25cba0394d720f80cca6df9f7196e'


def test_lambada_requests_and_the_dummy_model(real):
    texts, found = benchmarks.lambada(real('lambada/lambada_test.jsonl'))
    assert found['official'] and len(texts) == 5153
    encoding, asked = tokenizer.gpt2(), []
    for text in shuffled(texts):
        context, word = (encoding.decode(ids)
                         for ids in eval_lm.last_word(text, encoding, 'harness'))
        asked += 2 * [[context, word]]                  # v0.2 lists each request twice
    assert sha256(asked) == '6829e6a8aa5922e6c92dd31403cc060f242dc0ede4a775e085a70da095ab2e20'
    nats = [-answer for answer in dummy(len(asked))[::2]]
    measure = results.per_unit(nats, [1] * len(nats), 'word')
    assert measure['value'] == pytest.approx(1.6479047769869253, rel=1e-12)


def test_lambada_tokens(real):
    """Lengths as counted by others: 1.276 tokens in the last word, of 77.8 % it is one."""
    texts, _ = benchmarks.lambada(real('lambada/lambada_test.jsonl'))
    encoding = tokenizer.gpt2()
    pairs = [eval_lm.last_word(text, encoding, 'harness') for text in texts]
    counts = [len(word) for _, word in pairs]
    assert round(sum(counts) / 5153, 3) == 1.276 and round(counts.count(1) / 5153, 3) == 0.778
    assert max(len(context) + len(word) for context, word in pairs) == 224


def wikitext(cfg_protocol, path):
    raw, found = benchmarks.obtain('wikitext2-raw', path)
    cfg = eval_lm.Config(task='wikitext2', protocol=cfg_protocol)
    return raw.decode(), found, cfg


def test_wikitext2_documents_and_the_dummy_model(real):
    """62 articles, detokenized as the harness does, and what is divided by."""
    text, found, cfg = wikitext('harness', real('wikitext/wiki.test.raw'))
    assert found['official']
    pages, corpus = benchmarks.articles(text), eval_lm.as_corpus(text, cfg)
    assert (len(pages), corpus.units['word'], corpus.units['byte']) == (62, 241335, 1290527)
    order = shuffled(range(62))
    asked = [[corpus.documents[i]] for i in order]
    assert sha256(asked) == 'b6f83e6cf7535ee41b0057c3e2ec2cf7f2fa5a9119b305c479a83091d1142b2c'
    nats = [-answer for answer in dummy(62)]
    words = [len(re.split(r'\s+', pages[i])) for i in order]
    measure = results.per_unit(nats, words, 'word')
    assert measure['value'] == pytest.approx(1.000118710696617, rel=1e-12)
    assert math.exp(sum(nats) / 1290527) == pytest.approx(1.0000221984224973, rel=1e-12)


def test_wikitext2_tokens(real):
    text, _, cfg = wikitext('hf', real('wikitext/wiki.test.raw'))
    encoding = tokenizer.gpt2()
    assert len(text.encode()) == 1290590 and len(text.split()) == 241211
    assert len(tokenizer.encode(encoding, text)) == 286221
    document, = eval_lm.as_corpus(text, cfg).documents
    assert len(tokenizer.encode(encoding, document)) == 287644


@pytest.mark.parametrize('task, file, size, unknown, tokens', [
    ('wikitext2', 'wikitext/wiki.test.tokens', 1256449, 15218, 295877),
    ('wikitext103', 'wikitext/wikitext-103/wiki.test.tokens', 1281077, 2492, 285234)])
def test_wikitext_tokens_files(real, task, file, size, unknown, tokens):
    raw, _ = benchmarks.obtain(task, real(file))
    text = raw.decode()
    assert (len(raw), text.count('<unk>')) == (size, unknown)
    assert len(tokenizer.encode(tokenizer.gpt2(), text)) == tokens
    corpus = eval_lm.as_corpus(text, eval_lm.Config(task=task))
    assert corpus.units['word'] == 245569               # one <eos> a line


def test_wikitext2_validation_tokens(real):
    """249,887 tokens as one string, the count in the data's own notes."""
    text = benchmarks.read_bytes(real('wikitext/wiki.valid.raw')).decode()
    assert len(tokenizer.encode(tokenizer.gpt2(), text)) == 249887


def test_ptb(real):
    raw, found = benchmarks.obtain('ptb', real('ptb/ptb.test.txt'))
    assert found['official'] and len(raw) == 449945
    corpus = eval_lm.as_corpus(raw.decode(), eval_lm.Config(task='ptb'))
    assert corpus.units['word'] == 82430


def test_words_of_the_paper_come_from_the_published_counts():
    """The paper's CBT figures are counts of 2,000 questions (of 2,500, most could not be)."""
    cbt = [value for (_, measure), (_, *row) in results.TABLE3.items()
           if measure in ('CN', 'NE') for value in row]
    assert len(cbt) == 8
    assert all(round(value * 20) == pytest.approx(value * 20) for value in cbt)
    assert sum(round(value * 25) == pytest.approx(value * 25) for value in cbt) <= 2
