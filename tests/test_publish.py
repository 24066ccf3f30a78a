"""What is published is the run's best step in half precision, and its card tells no lies."""

import json
import math
import re
import resource
import shutil

import pytest
import torch
from conftest import TINY, command, script

from gpt import checkpoints, steps
import publish
import sample
import train
from data import prepare
from gpt.data.shards import Tokens
from gpt.scoring import rolling_loglikelihoods

PROMPTS = '--prompts=Nobody counted,The fox'


@pytest.fixture(scope='module')
def published(stories, tmp_path_factory):
    """The folder `given`, published from the folder `run` beside it."""
    folder = tmp_path_factory.mktemp('published')
    train.main(train.Config(**{**TINY, 'data_dir': str(stories), 'out_dir': str(folder / 'run'),
                               'dropout': 0.0}))
    command(publish, f"--model={folder / 'run'}", f"--to={folder / 'given'}",
            '--about=A model of | apples.', PROMPTS, '--max_new_tokens=9', f'--data_dir={stories}')
    return folder / 'given'


def test_the_weights_are_those_of_the_best_step_rounded(published):
    run = published.with_name('run')
    best, _ = checkpoints.load_model(run)
    given, encoding = checkpoints.load_model(published)
    for (name, p), q in zip(best.state_dict().items(), given.state_dict().values()):
        assert torch.equal(p.bfloat16().float(), q), name
    assert encoding.n_vocab == 300 and not (published / 'training.pt').exists()
    with open(published / 'README.md', 'a') as card:                # by hand, as one does
        card.write('More words.')
    assert steps.problem(published) == ''
    assert (published / 'log.jsonl').read_text() == (run / 'log.jsonl').read_text()


def test_transformers_opens_it(published):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    ours, encoding = checkpoints.load_model(published)
    ids = torch.tensor([encoding.encode_ordinary('The fox counted 7 apples')])
    assert json.loads((published / 'config.json').read_text())['dtype'] == 'bfloat16'
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def test_the_card_says_what_was_measured(published, stories, capsys):
    """Its loss is that of the validation text under the published weights, by gpt/scoring.py."""
    card = (published / 'README.md').read_text()
    assert 'A model of | apples.' in card and '12 updates, 3,072 tokens' in card
    model, _ = checkpoints.load_model(published)
    tokens = Tokens('tiny', 'val', 300, str(stories))
    ids = tokens.read(0, len(tokens))
    score = rolling_loglikelihoods(model, [ids])[0]
    said = float(re.search(r'validation loss \| ([\d.]+) nats', card).group(1))
    assert said == pytest.approx(-score.sum / score.count, abs=0.05)    # each block from its start
    assert f'perplexity of {math.exp(said):.1f}'[:-1] in card
    sample.main(sample.Config(model=str(published), prompt='The fox', num_samples=2,
                              max_new_tokens=9, json=True, dtype='float32'))
    for line in capsys.readouterr().out.splitlines()[-2:]:
        written = json.loads(line)
        assert '\n'.join(f'> {part}' for part in ('The fox' + written['text']).splitlines()) in card


def test_how_many_tokens_its_loss_is_of(published, stories, tmp_path):
    """All of the split at hand by default here; --eval_tokens says how many, 0 all."""
    total = len(Tokens('tiny', 'val', 300, str(stories))) - 1
    (tmp_path / 'about.md').write_bytes(b'\xef\xbb\xbfTwo\r\nlines.\r\n')
    flags = [f"--model={published.with_name('run')}", PROMPTS, '--max_new_tokens=1',
             f'--data_dir={stories}', f'--about=FILE:{tmp_path}/about.md']
    for tokens, words in ((0, f'over all {total:,} tokens of'), (10 ** 6, f'over all {total:,} '),
                          (64, f'over the first 64 of {total:,} tokens of the validation text')):
        command(publish, *flags, f'--to={tmp_path}/given', f'--eval_tokens={tokens}')
        card = (tmp_path / 'given/README.md').read_text()
        assert words in card and '\nTwo\nlines.\n' in card
    with pytest.raises(ValueError, match='eval_tokens: given -1, expected 0 or more'):
        command(publish, *flags, '--to=x', '--eval_tokens=-1')
    with pytest.raises(ValueError, match='device'):
        command(publish, *flags, '--to=x', '--device=nothing')
    with pytest.raises(ValueError, match='/dev/zero: is a device'):
        command(publish, *flags, '--to=x', '--about=FILE:/dev/zero')


def test_a_data_set_that_was_prepared_again_is_not_validated_on(published, tmp_path, capsys):
    run = published.with_name('run')
    text = tmp_path / 'other.txt'
    text.write_text(''.join(f'{i} ducks swam over the lake; {i % 7} came. ' for i in range(900)))
    flags = [f'--model={run}', f'--to={tmp_path}/given', '--prompts=', f'--data_dir={tmp_path}']
    for kind in (run, 'bytes', 'bpe:310'):     # the same tokenizer, a smaller, a larger
        prepare.main(prepare.Config(input=(str(text),), name='tiny', tokenizer=str(kind),
                                    val_fraction=0.2, data_dir=str(tmp_path), replace=True))
        capsys.readouterr()
        command(publish, *flags)
        assert re.search('^not validated: .*(prepared again|another tokenizer)',
                         capsys.readouterr().out)
        card = (tmp_path / 'given/README.md').read_text()
        assert '| not validated | the data set of the training is not at hand |' in card
        assert 'validation loss' not in card and '## Samples' not in card


def test_the_loss_of_a_mixture_is_called_a_weighted_mean(two_sets, tmp_path):
    train.main(train.Config(**{**TINY, 'data_dir': str(two_sets), 'max_iters': 2,
                               'dataset': 'tiny:0.75,other:0.25', 'out_dir': f'{tmp_path}/run'}))
    command(publish, f'--model={tmp_path}/run', f'--to={tmp_path}/given', PROMPTS,
            '--max_new_tokens=1', f'--data_dir={two_sets}')
    total = sum(len(Tokens(name, 'val', 300, str(two_sets))) - 1 for name in ('tiny', 'other'))
    assert (f'the mean of its data sets weighted as in training (tiny 75.0%, other 25.0%), over '
            f'all {total:,} tokens of the validation texts') in (
                tmp_path / 'given/README.md').read_text()


def test_it_is_replaced_and_nothing_else_is(published):
    again = (published / 'README.md').read_text()
    (published / 'README.md').write_text('old')
    (published / 'notes').write_text('of the user')
    (published / 'samples.jsonl').write_text('of another run, published there before')
    run = published.with_name('run')
    arguments = [f'--model={run}', PROMPTS, '--max_new_tokens=1', '--data_dir=/none']
    command(publish, *arguments, f'--to={published}')
    assert 'validation loss' not in (published / 'README.md').read_text() != again
    (published / 'README.md').write_text('edited again')
    command(publish, *arguments, f'--to={published}')
    assert (published / 'README.md.old').read_text() == 'old' and (published / 'notes').exists()
    assert (published / 'README.md.old1').read_text() == 'edited again'
    assert not (published / 'samples.jsonl').exists()
    assert steps.problem(published) == ''
    with pytest.raises(ValueError, match='exists and was not written by this program'):
        command(publish, *arguments, f'--to={run}')
    for other in (published, 'gpt2', 'random:gpt2'):
        with pytest.raises(ValueError, match='expected the folder of a run'):
            command(publish, f'--model={other}', '--to=x')
    with pytest.raises(ValueError, match='expected a run and a folder'):
        command(publish, f'--model={run}')


def test_a_full_disk_is_named(published, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    run = published.with_name('run')
    done = script('publish.py', f'--model={run}', f'--to={tmp_path}/given', '--prompts=',
                  '--data_dir=/none', check=False, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        f"publish.py: [Errno 27] File too large: '{tmp_path}/given'"]
    assert not list(tmp_path.iterdir())


def test_a_step_between_two_lines_of_the_log_can_be_published(published, tmp_path):
    """As one that was saved every few minutes, or when the run was stopped."""
    run = published.with_name('run')
    shutil.copytree(run, tmp_path / 'run')
    lines = (run / 'log.jsonl').read_text().splitlines()
    kept = [line for line in lines if json.loads(line)['step'] not in (7, 8, 9)]
    (tmp_path / 'run/log.jsonl').write_text('\n'.join(kept))
    command(publish, f'--model={tmp_path}/run/step_0000008', f'--to={tmp_path}/given', PROMPTS,
            '--max_new_tokens=1', '--data_dir=/none')
    assert '8 updates, 2,048 tokens' in (tmp_path / 'given/README.md').read_text()


def test_the_committed_checkpoint_is_intact_small_and_speaks(capsys, monkeypatch, tmp_path):
    """On a fresh clone, where there is no run under out/."""
    folder = steps.ROOT / 'checkpoint'
    assert steps.problem(folder) == ''
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    monkeypatch.chdir(tmp_path)
    sample.main(sample.Config(prompt='It was a dark night', max_new_tokens=20, device='cpu'))
    out, err = capsys.readouterr()
    assert out.startswith('It was a dark night') and len(out) > 40 and 'checkpoint' in err
    assert re.search(r'bits per byte \| 1\.\d+ \|', (folder / 'README.md').read_text())
