"""
The walkthrough: the names in it exist, its blocks run and print what it shows, links and pictures
lead to files, and the Chinese version has the same sections, commands and figures. The READMEs too.
"""

import ast
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'docs'))
import refresh

ENGLISH, CHINESE = ((ROOT / 'docs' / name).read_text(encoding='utf-8')
                    for name in ('walkthrough.md', 'walkthrough_zh.md'))
PAIRS = [('docs/walkthrough.md', 'docs/walkthrough_zh.md'), ('README.md', 'README_zh.md')]
REFERENCE = re.compile(r'`([\w/]+\.py):\s+([\w.]+)`')


def names_of(path):
    """Functions, classes with their methods, and variables of a file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif hasattr(node, 'name'):
            names |= {node.name, *(f'{node.name}.{part.name}' for part in getattr(node, 'body', [])
                                   if hasattr(part, 'name'))}
    return names


@pytest.mark.parametrize('path, name', sorted(set(REFERENCE.findall(ENGLISH + CHINESE))))
def test_a_name_exists(path, name):
    assert name in names_of(ROOT / path)


@pytest.mark.parametrize('text', [ENGLISH, CHINESE], ids=['english', 'chinese'])
def test_every_section_names_code_and_has_a_block_that_runs(text):
    sections = re.split(r'^## (?=\d+\. )', text, flags=re.MULTILINE)[1:]
    assert len(sections) == 17
    for section in sections:
        assert REFERENCE.search(section) and re.search('```(python|bash)\n', section), section[:40]


@pytest.mark.slow
def test_the_blocks_print_what_is_shown():
    """The same words; numbers to 5 % or 1.5 of their last digit, as processors round differently.
    """
    printed = refresh.run_blocks(ENGLISH)
    expected = [match[2] for match in refresh.BLOCK.finditer(ENGLISH)]
    assert len(printed) == len(expected) >= 14
    number = re.compile(r'-?\d+(?:\.\d+)?(?:e[-+]?\d+)?')
    for now, then in zip(printed, expected):
        if 'difference' in then:                                    # of rounding
            continue
        assert number.sub('#', now).split() == number.sub('#', then).split()
        for one, other in zip(number.findall(now), number.findall(then)):
            last = 10.0 ** -len(re.sub('e.*', '', other).partition('.')[2])
            assert float(one) == pytest.approx(float(other), rel=0.05, abs=1.5 * last), then


@pytest.mark.parametrize('english, chinese', PAIRS)
def test_both_languages_have_the_same_sections_commands_and_figures(english, chinese):
    one, two = ((ROOT / name).read_text(encoding='utf-8') for name in (english, chinese))
    for pattern in (r'^(#+) ', r'```\w+\n.*?```', r'src(?:set)?="([^"]+)"', REFERENCE.pattern):
        found = [re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in (one, two)]
        assert found[0] == found[1], pattern
    prose = [re.sub('```.*?```', '', text, flags=re.DOTALL) for text in (one, two)]
    figures = [sorted(re.findall(r'\d+(?:,\d{3})*(?:\.\d+)?', text)) for text in prose]
    assert figures[0] == figures[1]


@pytest.mark.parametrize('name', ['README.md', 'README_zh.md', *(
    str(path.relative_to(ROOT)) for path in sorted((ROOT / 'docs').glob('*.md')))])
def test_links_and_pictures_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding='utf-8')
    prose = re.sub('```.*?```', '', text, flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)|src(?:set)?="([^"]+)"', prose):
        target = ''.join(target)
        path, _, anchor = target.partition('#')
        if '://' in path:
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding='utf-8')), target


def anchors(text):
    """The anchors of the headings of a document."""
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
            for title in re.findall(r'^#+ (.*)', text, re.MULTILINE)}
