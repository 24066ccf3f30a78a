"""The Makefile on machines that lack something."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not shutil.which('make'), reason='no make on this machine')


def make(tmp_path, refuses):
    """`make install` with a Python that fails if its arguments contain `refuses`."""
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\ncase "$*" in *{refuses}*) exit 1;; esac\n'
                      f'exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return subprocess.run(['make', 'install', f'PYTHON={python}', f'VENV={tmp_path}/env'], cwd=ROOT,
                          capture_output=True, text=True)


@pytest.mark.parametrize('refuses, message', [
    ('ensurepip', 'apt-get install python3-venv'),
    ('version_info', 'Python 3.11 or newer is needed')])
def test_one_line_says_what_is_missing(tmp_path, refuses, message):
    done = make(tmp_path, refuses)
    assert done.returncode != 0 and message in done.stdout and not (tmp_path / 'env').exists()
