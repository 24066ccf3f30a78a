"""Config files are lists of assignments: evaluated, never executed."""

from dataclasses import asdict

import pytest
from test_settings import make

from gpt.config_file import as_config_file
from gpt.settings import read_config_file


@pytest.mark.parametrize('source, message', [
    ('batchsize = 4', "c.py:1: unknown setting 'batchsize', did you mean 'batch_size'"),
    ("learning_rate = '3e-4'", "c.py:1: learning_rate: given '3e-4', expected a number"),
    ('import os', 'assignments such as'),
    ('batch_size = __import__("os").system("true")', 'expected a literal'),
    ('prompt = f"{1}"', 'expected a literal'), ('batch_size: int = 4', 'assignments such as'),
    ('if True:\n    batch_size = 4', 'assignments such as'),
    ('prompt = "".__class__', 'expected a literal'),
    ('batch_size = 9 ** 9 ** 9', 'exponent'), ('batch_size = 1 / 0', 'division by zero'),
    ('a b', 'not a config file: line 1: invalid syntax'), ('\0', 'not a config file'),
    ('batch_size = 9**9**9**9**9', 'is too large an exponent'),
    ('batch_size = 99**64*99**64*99**64', 'given `99 .. 64`, expected a number below'),
    ('batch_size = ' + '-' * 100_000 + '1', 'nested too deeply'),
    ('batch_size = ' + '1+' * 50_000 + '1', 'nested too deeply'),
    ('batch_size = ' + '(' * 1000 + '1' + ')' * 1000, 'not a config file'),
    ('prompt = "%*d" % (10**10, 5)', 'expected arithmetic of numbers'),
    ('prompt = "a" * 10**10', 'expected arithmetic of numbers'),
    ('prompt = "a" + "b"', 'expected arithmetic of numbers'),
    ('runs = ("a",) * 3', 'expected arithmetic of numbers'),
    ('runs = (1, 2)', 'c.py:1: runs: given .1, 2., expected a list of texts'),
    ('prompt = "\\ud800"', 'expected a text'),
    ('data_dir = "a\\0b"', 'data_dir: given .a.x00b., expected a path')])
def test_a_config_file_holds_assignments_and_nothing_else(tmp_path, source, message):
    file = tmp_path / 'c.py'
    file.write_text(source)
    with pytest.raises(ValueError, match=message):
        make(str(file))


def test_a_config_file_of_windows(tmp_path):
    file = tmp_path / 'c.py'
    file.write_bytes(b'\xef\xbb\xbfbatch_size = 2\r\nprompt = "caf\xc3\xa9"\r\n')
    assert make(str(file)).batch_size == 2 and make(str(file)).prompt == 'café'
    file.write_bytes(b'\xef\xbb\xbf\r\nprompt = "caf\xe9"\r\n')
    with pytest.raises(ValueError, match='c.py:2: not UTF-8'):
        make(str(file))


@pytest.mark.parametrize('end', ['\n', '\r', '\r\n'])
def test_a_line_break_in_a_setting_or_the_command_makes_no_line(tmp_path, end):
    cfg, file = make(f'--prompt=a{end}batch_size = 9'), tmp_path / 'config.py'
    file.write_text(as_config_file(cfg, f'train.py{end}batch_size = 7'), newline='')
    assert asdict(make(str(file))) == asdict(cfg)
    assert len(file.read_text().splitlines()) == 1 + len(asdict(cfg))


def test_resolved_settings_make_a_config_file_that_gives_them_again(tmp_path):
    cfg = make('--prompt=it\'s "so"\n', '--learning_rate=1e-30', '--compile=True', '--runs=a,b')
    file = tmp_path / 'config.py'
    file.write_text(as_config_file(cfg, 'python script.py'))
    assert asdict(make(str(file))) == asdict(cfg)


def test_a_config_may_use_settings_made_before(tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('learning_rate = batch_size * 1e-4')
    found = read_config_file(str(file), {'batch_size': 5}, {'learning_rate': 0.0})
    assert found == {'learning_rate': 5e-4}
