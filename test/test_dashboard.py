"""Tables of `decoupled-policy watch`, from what nodes say, and from what no node should say."""

import string

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, Group

from decoupled_policy_ros.nodes.dashboard import LONGEST, SILENCE_S, Board, number, plain
from decoupled_policy_ros.nodes.watch import nothing_heard

POLICY, STREAMS = 'policy_node: policy', 'policy_node: streams'
NOW_S = 100.0
POLICY_VALUES = {
    'lifecycle': 'active', 'state_age_s': '75.2', 'cycles': '40', 'cycles_missed': '2', 'commands': '800',
    'underruns': '0', 'holds': '1', 'refusals_wrist': '3', 'latency_encode_p50_ms': '12.00',
    'latency_encode_p99_ms': '15.00', 'latency_total_p50_ms': '35.00', 'latency_total_p99_ms': '450.00',
    'cycle_period_ms': '400.00', 'command_period_ms': '20.00', 'command_rate_hz': '49.90',
    'observation_to_command_p50_ms': '60.00', 'observation_to_command_p99_ms': '90.00',
    'observation_to_command_max_ms': '120.00', 'command_jitter_p99_ms': '1.20', 'guard_checked': '41',
    'guard_time_scale_linear_velocity': '7', 'guard_reject_reach': '1',
    'guard_last_reject': 'reach: no joint angles reach waypoint 3 (reject)',
}  # fmt: skip
STREAM_VALUES = {
    'required_rate_hz': '20', 'wrist_topic': 'wrist/image_raw', 'wrist_rate_hz': '19.8', 'wrist_age_s': '0.052',
    'wrist_max_age_s': '0.2', 'wrist_observed_age_s': '0.031', 'wrist_refused': '0', 'wrist_last_refusal': '',
    'agentview_topic': 'agentview/image_raw', 'agentview_rate_hz': '3.1', 'agentview_age_s': 'never',
    'agentview_max_age_s': '0.2', 'agentview_refused': '4', 'agentview_last_refusal': 'encoding bayer',
}  # fmt: skip


def status(
    name: str, values: dict[str, str], message: str = 'following', level: bytes = b'\0'
) -> DiagnosticStatus:
    pairs = [KeyValue(key=key, value=value) for key, value in values.items()]
    return DiagnosticStatus(name=name, level=level, message=message, values=pairs)


def heard(*statuses: DiagnosticStatus, node: str = '', heard_s: float = NOW_S) -> Board:
    """A board that has taken a message of /diagnostics."""
    board = Board(node)
    for each in DiagnosticArray(status=list(statuses)).status:
        board.take(each.name, each.level[0], each.message, {v.key: v.value for v in each.values}, heard_s)
    return board


def shown(board: Board, now_s: float = NOW_S, colours: bool = False) -> list[list[str]]:
    """The words of each line of all tables."""
    console = Console(width=200, force_terminal=colours, color_system='standard' if colours else None)
    with console.capture() as capture:
        console.print(Group(*board.tables(now_s)))
    return [line.split() for line in capture.get().splitlines() if line.strip()]


def test_state_rates_latency_and_counts():
    rows = shown(
        heard(status(POLICY, POLICY_VALUES), status(STREAMS, STREAM_VALUES, 'agentview is silent', b'\1'))
    )
    assert ['policy_node:', 'policy', 'ok', 'following', '75.2', 's', '0.0', 's', 'ago'] in rows
    assert ['policy_node:', 'streams', 'warning', 'agentview', 'is', 'silent', '-', '0.0', 's', 'ago'] in rows
    assert ['wrist', '19.8', '52', '200', '31', '0'] in rows
    assert ['agentview', '3.1', 'never', '200', '-', '4', 'encoding', 'bayer'] in rows
    assert ['encode', '12.00', '15.00', '-'] in rows
    assert ['total', '35.00', '450.00', '-'] in rows
    assert ['observation', '→', 'command', '60.00', '90.00', '120.00'] in rows
    assert ['jitter', 'of', 'commands', '-', '1.20', '-'] in rows
    assert ['rate', 'of', 'commands', '(Hz)', '49.90'] in rows
    assert ['cycles', 'missed', '2'] in rows
    assert ['refused:', 'wrist', '3'] in rows


def test_the_guards_counts_stand_by_rule_with_the_last_reason():
    rows = shown(heard(status(POLICY, POLICY_VALUES)))
    assert ['linear_velocity', '7', '-', '-', '-'] in rows
    assert ['reach', '-', '-', '-', '1'] in rows
    assert ['last:', 'reach:', 'no', 'joint', 'angles', 'reach', 'waypoint', '3', '(reject)'] in rows


@pytest.mark.parametrize(
    ('key', 'value', 'colour'),
    [
        ('wrist_rate_hz', '19.8', 32), ('wrist_rate_hz', '15.0', 33), ('wrist_rate_hz', '3.0', 31),
        ('wrist_age_s', '0.050', 32), ('wrist_age_s', '0.150', 33), ('wrist_age_s', '0.250', 31),
    ],
)  # fmt: skip
def test_colours_tell_how_near_a_limit_is(key, value, colour):
    rows = shown(heard(status(STREAMS, {**STREAM_VALUES, key: value})), colours=True)
    (row,) = [row for row in rows if row[0] == 'wrist']
    figure = value if key.endswith('_hz') else f'{1e3 * float(value):.0f}'
    (cell,) = [word for word in row if figure in word and 'm' in word]
    assert f'{colour}m' in cell or f'{colour}m' in ' '.join(row[: row.index(cell)][-1:])


def test_whoever_falls_silent_is_called_silent():
    board = heard(status(POLICY, POLICY_VALUES))
    (row,) = [row for row in shown(board, NOW_S + SILENCE_S + 1.0) if row[:3] == [*POLICY.split(), 'silent']]
    assert row[-3:] == ['4.0', 's', 'ago']
    assert 'SILENT for 4 s' in board.line(NOW_S + SILENCE_S + 1.0)


def test_a_change_of_state_without_values_keeps_the_figures():
    board = heard(status(POLICY, POLICY_VALUES), status(POLICY, {}, 'holding: wrist is late', b'\1'))
    rows = shown(board)
    assert any(row[2:6] == ['warning', 'holding:', 'wrist', 'is'] for row in rows)
    assert ['encode', '12.00', '15.00', '-'] in rows


def test_only_one_node_where_one_is_asked_for():
    left, right = status('left/policy_node: policy', POLICY_VALUES), status('right/policy_node: policy', {})
    board = heard(left, right, node='/left/policy_node')
    assert [name for name, _ in board.shown] == ['left/policy_node: policy']
    assert board.nodes == ['left/policy_node', 'right/policy_node']
    assert heard(right, node='policy_node').shown == []


def test_spread_shadow_and_ways_to_the_arm_are_listed_where_they_are_there():
    further = {'spread_m': '0.012', 'shadow_divergence_m': '0.300', 'gripper': 'no action server'}
    rows = shown(heard(status(POLICY, {**POLICY_VALUES, **further})))
    assert ['spread', 'm', '0.012'] in rows and ['shadow', 'divergence', 'm', '0.300'] in rows
    assert ['gripper', 'no', 'action', 'server'] in rows
    assert not [row for row in shown(heard(status(POLICY, POLICY_VALUES))) if row[0] in ('spread', 'shadow')]


def test_a_recorders_topics_are_shown_with_their_rates():
    values = {'state': 'recording', 'rate_hz:/joint_states': '100.2', 'rate_hz:/wrist/image_raw': '0.0'}
    rows = shown(heard(status('episode_recorder_node: episodes', values, 'recording episode_3 for 2.0 s')))
    assert ['/joint_states', '100.2'] in rows and ['/wrist/image_raw', '0.0'] in rows


@pytest.mark.parametrize('bad', ['nan', 'inf', 'twelve', '1,5', '', ' ', '0x10', '9' * 400])
def test_garbled_figures_are_shown_as_they_are(bad):
    values = {
        **POLICY_VALUES,
        'latency_encode_p99_ms': bad,
        'state_age_s': bad,
        'cycle_period_ms': bad,
        'holds': bad,
    }
    rows = shown(heard(status(POLICY, values), status(STREAMS, {**STREAM_VALUES, 'wrist_age_s': bad})))
    (row,) = [row for row in rows if row[0] == 'encode']
    assert row[1] == '12.00'
    if bad.strip() and len(bad) < 20:
        assert bad in row


def test_values_of_other_machines_neither_colour_nor_move_anything():
    hostile = '[red]\x1b[2J\x1b]0;title\x07line\nbreak[/]'
    board = heard(status(POLICY, {**POLICY_VALUES, 'last_rejection': hostile}, hostile))
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(Group(*board.tables(NOW_S)))
    text = capture.get() + board.line(NOW_S)
    assert '\x1b' not in text and '\x07' not in text
    assert '[red]·[2J·]0;title·line·break[/]' in text
    assert len(plain('x' * 5000)) == LONGEST


@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from([*POLICY_VALUES, *STREAM_VALUES, 'guard_clamp_', 'rate_hz:']), st.text(max_size=8)
        ),
        st.one_of(st.text(max_size=8), st.sampled_from(['-1', '1e400', '0', 'NaN'])),
        max_size=12,
    ),
    st.text(string.ascii_letters + string.whitespace, min_size=1, max_size=20),
    st.integers(0, 255),
)
@settings(max_examples=25, deadline=None)
def test_nothing_that_is_said_breaks_the_tables(values, name, level):
    board = Board()
    board.take(name, level, name, values, NOW_S)
    assert shown(board)
    assert board.line(NOW_S)


def test_numbers_are_finite():
    assert number('1.5') == 1.5
    assert [number(value) for value in (None, '', 'nan', 'inf', 'x')] == [None] * 5


def test_where_nothing_is_heard_the_domain_is_named(monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', '7')
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    said = nothing_heard(Board(), '', 3.0)
    assert 'ROS_DOMAIN_ID 7' in said and 'RANGE LOCALHOST' in said and 'for 3 s' in said
    monkeypatch.delenv('ROS_DOMAIN_ID')
    monkeypatch.delenv('ROS_AUTOMATIC_DISCOVERY_RANGE')
    said = nothing_heard(Board(), '', 3.0)
    assert 'ROS_DOMAIN_ID 0' in said and 'RANGE SUBNET' in said
    other = nothing_heard(heard(status(POLICY, {}), node='teleop_node'), 'teleop_node', 3.0)
    assert "nothing heard of 'teleop_node'" in other and 'heard: policy_node' in other
