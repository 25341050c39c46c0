"""Tables of what nodes say of themselves on /diagnostics and ~/status, for a terminal.

Nothing here knows ROS: whoever listens hands over names, levels and texts. What is missing is shown as missing, what
is no number as it stands; a value from another machine can neither colour nor move anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

#: Each node speaks once a second: after so long (s) it has fallen silent.
SILENCE_S = 3.0

OK, WARN, ERROR, STALE = range(4)
LEVELS = {
    OK: ('ok', 'green'),
    WARN: ('warning', 'yellow'),
    ERROR: ('error', 'bold red'),
    STALE: ('stale', 'red'),
}
GOOD, POOR, BAD = 'green', 'yellow', 'bold red'
MISSING = '-'
LONGEST = 120

STAGES = ('sample', 'encode', 'modulate', 'denoise', 'guard', 'total')
COUNTS = (
    'cycles', 'cycles_missed', 'underruns', 'holds', 'bridged_ticks', 'rejected_chunks', 'commands',
    'refused_instructions',
)  # fmt: skip
TROUBLES = frozenset(('cycles_missed', 'underruns', 'holds', 'rejected_chunks', 'refused_instructions'))
OUTCOMES = ('time_scale', 'clamp', 'truncate', 'reject')
#: Whatever begins so is listed as it is: it is there only in some ways to run a policy.
FURTHER = ('spread', 'shadow', 'divergence', 'gripper', 'joint_trajectory', 'task')


@dataclass
class Heard:
    """The last that was said under one name.

    Attributes:
        level: one of OK, WARN, ERROR and STALE.
        message: state and reason.
        values: of the last message that had any: a change of state is said without them.
        heard_s: when, on the clock of whoever listens.
    """

    level: int = STALE
    message: str = ''
    values: dict[str, str] = field(default_factory=dict)
    heard_s: float = 0.0


class Board:
    """Everything that was heard, by the name of its status ('NODE: PART').

    Args:
        node: show only this node, namespace and name; '' is everybody.
    """

    def __init__(self, node: str = ''):
        self._node = node.lstrip('/')
        self._heard: dict[str, Heard] = {}

    def take(self, name: str, level: int, message: str, values: Mapping[str, str], now_s: float) -> None:
        """Remember a status."""
        heard = self._heard.setdefault(name, Heard())
        heard.level, heard.message, heard.heard_s = level, message, now_s
        if values:
            heard.values = dict(values)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that were heard, shown or not."""
        return sorted({name.partition(':')[0] for name in self._heard})

    @property
    def shown(self) -> list[tuple[str, Heard]]:
        """What is shown, by name."""
        return sorted(
            (name, heard)
            for name, heard in self._heard.items()
            if not self._node or name.partition(':')[0] == self._node
        )

    def tables(self, now_s: float) -> list[Table]:
        """The table of states, then what there is of each node."""
        made = [
            make(name, heard.values)
            for make in (_streams, _latency, _counts, _guard, _further)
            for name, heard in self.shown
        ]
        return [self._states(now_s), *(table for table in made if table is not None and table.row_count)]

    def line(self, now_s: float) -> str:
        """All states in one line, with rates and latencies, for a log."""
        return ' | '.join(_line(name, heard, now_s) for name, heard in self.shown)

    def _states(self, now_s: float) -> Table:
        table = _table('', ('', 'level', 'state and reason', 'since', 'heard'))
        for name, heard in self.shown:
            silence_s = now_s - heard.heard_s
            silent = silence_s > SILENCE_S
            level, colour = ('silent', BAD) if silent else LEVELS.get(heard.level, LEVELS[STALE])
            table.add_row(
                plain(name),
                Text(level, colour),
                plain(heard.message, colour),
                _duration(heard.values.get('state_age_s')),
                Text(f'{silence_s:.1f} s ago', BAD if silent else ''),
            )
        return table


def plain(text: str, style: str = '') -> Text:
    """Text as it stands, in one line: no markup, and nothing that a terminal would obey."""
    shown = ''.join(character if character.isprintable() else '·' for character in text)
    return Text(shown if len(shown) <= LONGEST else f'{shown[: LONGEST - 1]}…', style)


def number(value: str | None) -> float | None:
    """A value as a finite number; None if it is missing or none."""
    try:
        parsed = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return parsed if math.isfinite(parsed) else None


def _cell(value: str | None, good: float | None = None, bad: float | None = None, scale: float = 1.0) -> Text:
    """A figure; green up to `good`, yellow up to `bad`, red beyond, and red if it should be a number and is none.

    With `good` above `bad` more is better.
    """
    if value is None or value == '':
        return Text(MISSING)
    figure = number(value)
    if figure is None:
        return plain(value, BAD)
    text = value if scale == 1.0 else f'{figure * scale:.0f}'
    if good is None or bad is None:
        return Text(text)
    sign = 1.0 if good <= bad else -1.0
    if sign * figure <= sign * good:
        return Text(text, GOOD)
    return Text(text, POOR if sign * figure <= sign * bad else BAD)


def _duration(value: str | None) -> Text:
    seconds = number(value)
    if seconds is None:
        return _cell(value)
    if seconds < 120:
        return Text(f'{seconds:.1f} s')
    minutes, rest = divmod(int(seconds), 60)
    return Text(
        f'{minutes} min {rest:02d} s' if minutes < 120 else f'{minutes // 60} h {minutes % 60:02d} min'
    )


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(
        title=plain(title, 'bold') if title else None, title_justify='left', box=SIMPLE, pad_edge=False
    )
    table.caption_justify = 'left'
    for i, column in enumerate(columns):
        words = i == 0 or column in ('', 'level', 'state and reason', 'topic', 'last refusal')
        table.add_column(column, justify='left' if words else 'right', overflow='fold')
    return table


def _streams(name: str, values: Mapping[str, str]) -> Table | None:
    """Rates and ages: what a policy sees, or the topics of a recorder."""
    recorded = {key.partition(':')[2]: key for key in values if key.startswith('rate_hz:')}
    if recorded:
        table = _table(name, ('topic', 'rate (Hz)'))
        for topic, key in sorted(recorded.items()):
            table.add_row(plain(topic), _cell(values[key], 0.05, 0.05))  # 0.0 is silence
        return table
    streams = [key.removesuffix('_topic') for key in values if key.endswith('_topic')]
    if not streams:
        return None
    required_hz = number(values.get('required_rate_hz'))
    refused = ('last refusal',) if any(values.get(f'{stream}_last_refusal') for stream in streams) else ()
    columns = ('stream', 'rate (Hz)', 'age (ms)', 'limit (ms)', 'in last chunk (ms)', 'refused')
    table = _table(name, (*columns, *refused))
    for stream in streams:
        of = {
            key: values.get(f'{stream}_{key}') for key in ('rate_hz', 'age_s', 'max_age_s', 'observed_age_s')
        }
        limit_s = number(of['max_age_s'])
        half_s = None if limit_s is None else limit_s / 2
        enough = (None, None) if required_hz is None else (0.9 * required_hz, 0.5 * required_hz)
        table.add_row(
            plain(stream),
            _cell(of['rate_hz'], *enough),
            _cell(of['age_s'], half_s, limit_s, 1e3),
            _cell(of['max_age_s'], scale=1e3),
            _cell(of['observed_age_s'], half_s, limit_s, 1e3),
            _cell(values.get(f'{stream}_refused'), 0, 0),
            *(plain(values.get(f'{stream}_last_refusal', '')) for _ in refused),
        )
    return table


def _latency(name: str, values: Mapping[str, str]) -> Table | None:
    """Durations of a cycle's stages, the time from light to command, and the commands' jitter."""
    stages = [stage for stage in STAGES if f'latency_{stage}_p50_ms' in values]
    stages += sorted(
        stage
        for key in values
        if key.startswith('latency_') and key.endswith('_p50_ms')
        and (stage := key.removeprefix('latency_').removesuffix('_p50_ms')) not in STAGES
    )  # fmt: skip
    cycle_ms, command_ms = number(values.get('cycle_period_ms')), number(values.get('command_period_ms'))
    rows: list[tuple[str, str, float | None]] = [(stage, f'latency_{stage}', cycle_ms) for stage in stages]
    rows.append(('observation → command', 'observation_to_command', cycle_ms))
    rows.append(('jitter of commands', 'command_jitter', command_ms))
    table = _table(name, ('latency (ms)', 'p50', 'p99', 'max'))
    for label, key, limit_ms in rows:
        if f'{key}_p50_ms' in values or f'{key}_p99_ms' in values:
            half_ms = None if limit_ms is None else limit_ms / 2
            cells = [
                _cell(values.get(f'{key}_{which}_ms'), half_ms, limit_ms) for which in ('p50', 'p99', 'max')
            ]
            table.add_row(label, *cells)
    if (rate := values.get('command_rate_hz')) is not None:
        wanted_hz = None if not command_ms else 1e3 / command_ms
        enough = (None, None) if wanted_hz is None else (0.95 * wanted_hz, 0.8 * wanted_hz)
        table.add_row('rate of commands (Hz)', _cell(rate, *enough), '', '')
    return table


def _counts(name: str, values: Mapping[str, str]) -> Table | None:
    """What has happened since activation."""
    keys = [key for key in COUNTS if key in values] + sorted(k for k in values if k.startswith('refusals_'))
    if 'cycles' not in values:
        return None
    table = _table(name, ('since activation', 'count'))
    for key in keys:
        bad = key in TROUBLES or key.startswith('refusals_')
        label = key.replace('refusals_', 'refused: ').replace('_', ' ')
        table.add_row(plain(label), _cell(values[key], 0, math.inf) if bad else _cell(values[key]))
    if last := values.get('last_rejection'):
        table.caption = plain(f'last rejection: {last}')
    return table


def _guard(name: str, values: Mapping[str, str]) -> Table | None:
    """How often each rule was broken, and what was done about it."""
    if 'guard_checked' not in values:
        return None
    counts: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        for outcome in OUTCOMES:
            prefix = f'guard_{outcome}_'
            if key.startswith(prefix):
                counts.setdefault(key.removeprefix(prefix), {})[outcome] = value
    table = _table(name, ('guard, by rule', 'slowed', 'clamped', 'cut off', 'rejected'))
    for rule, by_outcome in sorted(counts.items()):
        cells = [_cell(by_outcome.get(outcome), 0, math.inf) for outcome in OUTCOMES[:-1]]
        table.add_row(plain(rule), *cells, _cell(by_outcome.get('reject'), 0, 0))
    for key in ('guard_checked', 'guard_largest_time_scale', 'guard_longest_ms'):
        if key in values:
            table.add_row(plain(key.removeprefix('guard_').replace('_', ' ')), _cell(values[key]), '', '', '')
    last = [text for outcome in OUTCOMES if (text := values.get(f'guard_last_{outcome}'))]
    if last:
        table.caption = plain(f'last: {last[-1]}')  # of the strictest kind
    return table


def _further(name: str, values: Mapping[str, str]) -> Table | None:
    """What only some ways of running a policy have: spread of samples, shadow mode, what the arm is told through."""
    table = _table(name, ('', 'value'))
    for key in sorted(key for key in values if key.startswith(FURTHER)):
        table.add_row(plain(key.replace('_', ' ')), plain(values[key]))
    return table


def _line(name: str, heard: Heard, now_s: float) -> str:
    if now_s - heard.heard_s > SILENCE_S:
        return f'{plain(name)} SILENT for {now_s - heard.heard_s:.0f} s'
    values, parts = heard.values, [f'{plain(name)} {plain(heard.message)}']
    for key, unit in (
        ('command_rate_hz', 'Hz'), ('latency_total_p99_ms', 'ms'), ('observation_to_command_p99_ms', 'ms'),
        ('cycles_missed', ''), ('underruns', ''), ('rejected_chunks', ''),
    ):  # fmt: skip
        if key in values:
            parts.append(
                f'{key.removesuffix("_hz").removesuffix("_ms").replace("_", " ")} {plain(values[key])} {unit}'
            )
    for key in values:
        if key.endswith('_rate_hz') and f'{key.removesuffix("_rate_hz")}_topic' in values:
            parts.append(f'{plain(key.removesuffix("_rate_hz"))} {plain(values[key])} Hz')
    return ', '.join(part.rstrip() for part in parts)
