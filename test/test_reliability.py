"""docs/reliability.md: every fault has a test that exists, and every test of a fault stands in it."""

import re
from pathlib import Path

import pytest

TEST = Path(__file__).parent
#: What has to be there at least, in words of the table's first column.
FAULTS = (
    'stream lost', 'stream late', 'stream slow', 'stream out of order', 'clock jumps forward', 'clock jumps back',
    'zero stamps', 'wrong encoding', 'wrong size', 'wrong joint order', 'missing joint', 'NaN or inf in joints',
    'NaN from the network', 'inference slower than the chunk', 'camera restarted',
    'policy killed -9 and restarted mid-motion', 'deactivate mid-chunk', 'corrupt or truncated file',
    'foreign or other-arm file', 'two command publishers', 'target outside the box', 'unreachable pose',
    'self-collision', 'singular pose', 'joint limit', 'too fast', 'gripper action server absent',
    'instruction empty or 1 MB long', 'parameter out of range', 'disk full for logs', 'use_sim_time paused',
)  # fmt: skip


@pytest.fixture(scope='module')
def rows(repository) -> list[list[str]]:
    """Rows of the fault tables: fault, what happens, reported, goes on, test."""
    lines = (repository / 'docs' / 'reliability.md').read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines if '::test_' in line]
    assert all(len(row) == 5 for row in rows), [row for row in rows if len(row) != 5]
    return rows


def those_in(file: str) -> set[str]:
    return set(re.findall(r'^def (test_\w+)', (TEST / file).read_text(), re.MULTILINE))


def test_every_fault_is_there(rows):
    faults = [row[0] for row in rows]
    assert [fault for fault in FAULTS if not any(fault in there for there in faults)] == []
    assert len(faults) == len(set(faults)) >= 30


def test_every_row_says_what_happens_and_names_a_test_that_exists(rows):
    for fault, happens, _, goes_on, test in rows:
        assert happens and goes_on, fault
        file, name = test.strip('`').split('::')
        assert name in those_in(file), test


def test_every_test_of_a_fault_stands_in_the_table(rows):
    named = {row[4].strip('`') for row in rows}
    files = sorted(path.name for path in TEST.glob('test_faults_*.py'))
    assert len(files) >= 5
    assert {f'{file}::{name}' for file in files for name in those_in(file)} - named == set()
