"""Settings from header, files and flags; and that nothing in a config file is ever executed."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from conftest import ROOT, script

from gpt.settings import PATHS, check_bounds, configure, header_defaults, section, settings

SCRIPTS = ('train', 'sample', 'plot', 'publish', 'hellaswag', 'eval_cbt', 'eval_lm', 'bench',
           'data.prepare', 'data.explore')
HEADER = {'__name__': 'script', 'batch_size': 12, 'learning_rate': 6e-4, 'eval_only': False,
          'prompt': '', 'compile': 'auto', 'runs': (), 'data_dir': '', 'MAGIC': 7}


def make(*argv, **options):
    return configure(settings(dict(HEADER)), argv, **options)


def test_settings_leave_the_script_and_become_frozen():
    script = dict(HEADER)
    cfg = settings(script)()
    assert 'batch_size' not in script and script['MAGIC'] == 7
    with pytest.raises(AttributeError):
        cfg.batch_size = 3


@pytest.mark.skipif(sys.platform != 'linux', reason='of libgomp')
def test_threads_do_not_wait_in_long_loops():
    """It must be set before torch loads; what a user sets stays."""
    for given, expected in (({}, '20000'), ({'GOMP_SPINCOUNT': '7'}, '7')):
        env = {**os.environ, 'OMP_DISPLAY_ENV': 'verbose', **given}
        done = script('train.py', '--keep=0', check=False, env=env)
        assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr and done.returncode == 2


def test_files_and_flags_apply_from_left_to_right(tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('"""A docstring."""\nbatch_size = 2 * 4  # why\n'
                    'learning_rate = batch_size / 2**3\n_own = 5\n')
    assert make(str(file), '--batch_size=4').batch_size == 4
    assert make('--batch_size=4', str(file)).batch_size == 8
    assert make(str(file)).learning_rate == 1.0


@pytest.mark.parametrize('argv, key, value', [
    (['--learning_rate=1'], 'learning_rate', 1.0),                  # nanoGPT's asserts
    (['--batch_size=1e2'], 'batch_size', 100),
    (['--batch-size', '4'], 'batch_size', 4),
    (['--prompt=a=b'], 'prompt', 'a=b'), (['--prompt', '- x'], 'prompt', '- x'),
    (['-p', '123'], 'prompt', '123'),
    (['--eval_only'], 'eval_only', True), (['--eval_only', 'False'], 'eval_only', False),
    (['--compile=False'], 'compile', False), (['--compile', 'auto'], 'compile', 'auto'),
    (['out/a', 'out/b'], 'runs', ('out/a', 'out/b')), (['--runs=a,b'], 'runs', ('a', 'b'))])
def test_command_line(argv, key, value):
    found = getattr(make(*argv, short={'-p': 'prompt'}, collect='runs'), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('argv, message', [
    (['--batchsize=4'], "did you mean 'batch_size'"),
    (['--batch_size=x'], "given 'x', expected a whole number"),
    (['--batch_size=1.5'], 'given 1.5'), (['--eval_only=yes'], 'True or False'),
    (['--batch_size'], 'expected a value'), (['--batch_size=True'], 'given True'),
    (['--batch_size=8/0'], 'given .8/0., expected a whole number'),
    (['nowhere.py'], 'nowhere.py: cannot read'),
    (['foo'], "given 'foo', expected a config file"),
    (['-p', '--eval_only'], '-p: expected a value'),
    (['--batch_size=2**64'], "given '2.*64', expected a whole number below 2..63"),
    (['--batch_size=1e300'], 'given 1e.300, expected a whole number below 2..63'),
    (['--learning_rate=1e999'], "given '1e999', expected a number"),
    (['--learning_rate=9.0**64*1e300'], 'expected a number'),
    (['--learning_rate=(-8)**0.5'], 'expected a number'),
    (['--batch_size=' + '-' * 100_000 + '1'], "given '---.*, expected a whole number"),
    (['--batch_size=' + '1' * 5000], "given '111.*, expected a whole number"),
    (['--batch_size=0x' + 'f' * 50_000], "given '0xfff.*, expected a whole number"),
    (['--batch_size=' + '9**' * 5000 + '9'], "given '9..9.*, expected a whole number"),
    (['--batch_size="%*d" % (10**10, 5)'], 'expected a whole number'),
    (['--batch_size=True+1'], 'expected a whole number')])
def test_refusals_name_the_flag_and_what_was_expected(argv, message):
    with pytest.raises(ValueError, match=message):
        make(*argv, short={'-p': 'prompt'})


def test_a_home_folder_is_expanded_in_what_names_files(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg = make('--data_dir=~/a', '--runs=~/b,c~', '--prompt=~/d')
    assert (cfg.data_dir, cfg.runs, cfg.prompt) == (f'{tmp_path}/a', (f'{tmp_path}/b', 'c~'), '~/d')


@pytest.mark.parametrize('name', SCRIPTS)
def test_settings_that_take_files_are_known_as_paths(name):
    """A header names files in capitals, FILE or FOLDER, or says file or folder."""
    script = __import__(name, fromlist=['Config'])
    header = (ROOT / f"{name.replace('.', '/')}.py").read_text().split('# ' + '-' * 77)[1]
    said = re.findall(r'^(\w+) = \S+ +# (?:the |a |two |a run.s )?(?:FILE|file|folder|FOLDER)s?',
                      header, re.MULTILINE)
    assert set(said) <= PATHS and PATHS & set(script.Config.__dataclass_fields__)


@pytest.mark.parametrize('name', ['train.py', 'plot.py', 'data/prepare.py'])
def test_help_prints_the_header(name):
    done = script(name, '--help')
    source = (ROOT / name).read_text()
    header = source.split('# ' + '-' * 77)[1]
    assert header.strip() in done.stdout and not done.stderr


def test_a_section_takes_the_settings_that_are_its_fields():
    @dataclass(frozen=True)
    class Section:
        batch_size: int
        prompt: str
        extra: int = 5
        other: int = 6

    cfg = make('--batch_size=3')
    assert section(cfg, Section) == Section(3, '', 5, 6)
    assert section(cfg, Section, prompt='a', other=7) == Section(3, 'a', 5, 7)


def test_a_setting_out_of_bounds_is_named():
    bounds = [('1 or more', lambda value: value >= 1, 'batch_size learning_rate')]
    check_bounds(make('--learning_rate=1'), bounds)
    with pytest.raises(ValueError, match='learning_rate: given 0.0006, expected 1 or more'):
        check_bounds(make(), bounds)


def test_the_defaults_of_a_header_are_read_without_importing_it():
    import train
    assert header_defaults(ROOT / 'train.py') == asdict(train.Config())


# The beginning and the end of every script.

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs /proc')
@pytest.mark.parametrize('seconds', [0, 0.3])
def test_ctrl_c_during_the_imports_is_quiet(seconds):
    process = subprocess.Popen([sys.executable, 'train.py', '--device=cpu'], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while '/torch/lib' not in Path(f'/proc/{process.pid}/maps').read_text():
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300)[1] == b'' and process.returncode == 130


def test_an_ignored_ctrl_c_stays_ignored_during_the_imports():
    process = subprocess.Popen([sys.executable, 'train.py', '--max_iters=-1'], cwd=ROOT,
                               stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert b'max_iters: given -1' in process.communicate(timeout=300)[1] and process.returncode == 2


@pytest.mark.parametrize('flags, message', [
    (['--max_itres=3'], "did you mean 'max_iters'"),
    (['--max_iters=many'], 'expected a whole number'),
    (['--dataset=nowhere'], 'python data/prepare.py --name=nowhere')])
def test_a_user_sees_one_line_and_status_2(flags, message):
    done = script('train.py', '--device=cpu', *flags, check=False)
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr


def test_a_bug_shows_its_traceback_and_ends_with_status_1():
    code = ('from gpt import settings\nclass C: __module__ = "__main__"\n'
            'settings.configure = lambda *a: None\nsettings.run(lambda cfg: {}["x"], C)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'KeyError' in done.stderr and 'Traceback' in done.stderr


def test_an_error_of_a_library_is_a_bug_and_one_of_ours_is_not():
    """Ours are known by the file that raised them, in any of our folders."""
    code = ('import sys, json\nfrom gpt import settings\nclass C: __module__ = "__main__"\n'
            'settings.configure = lambda *a: None\n')
    for call, status in (('json.loads("{")', 1), ('settings.known("a", {"b": 1}, "--a")', 2)):
        done = subprocess.run([sys.executable, '-c', f'{code}settings.run(lambda cfg: {call}, C)'],
                              cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and ('Traceback' in done.stderr) == (status == 1)


def test_a_path_that_is_not_utf8_is_refused():
    """As it comes from a command line; config.py and the manifest could not name it."""
    with pytest.raises(ValueError, match='data_dir: given .*udcff.*, expected a path in UTF-8'):
        make('--data_dir=a\udcff')
