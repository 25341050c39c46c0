"""The rules of the house, read from the source: who may import whom, and what nobody may call.

Each checker is first shown a violation that it must find, then the package.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = 'decoupled_policy_ros'
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# Arrows point one way: a room may import itself and what stands behind it.
ROOMS = {
    'robot': set(),
    'observation': {'robot'},
    'policy': {'robot', 'observation'},
    'runtime': {'robot', 'observation', 'policy'},
    'data': {'robot', 'observation'},
    'teleop': {'robot'},
    'replay': {'robot', 'observation', 'policy', 'runtime', 'data'},
    'sim': {'robot', 'observation', 'data'},
    'training': {'robot', 'observation', 'policy', 'runtime', 'data', 'sim'},
    'nodes': {'robot', 'observation', 'policy', 'runtime', 'data', 'sim', 'teleop'},
}
FOUNDATION = {'errors', 'files', 'resources', '__init__'}  # anybody may import these

ROS_MODULES = {
    'rclpy',
    'rosidl_runtime_py',
    'builtin_interfaces',
    'std_srvs',
    'launch',
    'launch_ros',
    'tf2_ros',
}
SIMULATORS = {'robosuite', 'mujoco'}
HEAVY = {'sentence_transformers', 'transformers'}  # seconds of import, for some tasks only
PICKLING = {'pickle', 'cPickle', '_pickle', 'dill', 'cloudpickle', 'shelve', 'marshal', 'joblib'}
EXECUTING_CALLS = {'eval', 'exec', 'compile', '__import__'}
EXECUTING_ATTRIBUTES = {
    ('torch', 'load'), ('torch', 'save'), ('yaml', 'load'), ('yaml', 'unsafe_load'), ('yaml', 'full_load'),
    ('yaml', 'load_all'), ('os', 'system'),
}  # fmt: skip
MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 60


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(ROOT.rglob('*.py'))


def room(path: Path) -> str:
    """Name of the folder that a module is in; for a module at the top its own name."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(source: str, path: Path | None = None, *, at_import: bool = False) -> set[str]:
    """Dotted names that the module imports, relative ones resolved; `at_import` leaves out those in functions."""
    tree = ast.parse(source)
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    type_checking = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and 'TYPE_CHECKING' in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    names = set()
    for node in ast.walk(tree):
        if at_import and (id(node) in inside_functions or id(node) in type_checking):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level and path is not None:
                parents = [PACKAGE, *path.relative_to(ROOT).parts[:-1]]
                base = '.'.join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            names |= {f'{base}.{alias.name}' for alias in node.names} | {base}
    return names


def is_ros(name: str) -> bool:
    """Whether a dotted name belongs to ROS or is a message package."""
    top = name.partition('.')[0]
    return top in ROS_MODULES or top.endswith(('_msgs', '_interfaces'))


def own_rooms(names: set[str]) -> set[str]:
    """Rooms of this package among dotted names."""
    return {
        name.split('.')[1] for name in names if name.startswith(f'{PACKAGE}.') and len(name.split('.')) > 1
    }


def dangerous(source: str) -> list[str]:
    """Lines that unpickle, evaluate or load something executable."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, 'module', None) or '']
            found += [
                f'{node.lineno}: imports {name}' for name in names if name.partition('.')[0] in PICKLING
            ]
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in EXECUTING_CALLS:
            found.append(f'{node.lineno}: {function.id}()')
        name = ast.unparse(function)
        if tuple(name.split('.')) in EXECUTING_ATTRIBUTES:
            found.append(f'{node.lineno}: {name}()')
        for keyword in node.keywords:
            if keyword.arg in ('allow_pickle', 'shell') and getattr(keyword.value, 'value', None) is True:
                found.append(f'{node.lineno}: {keyword.arg}=True')
    return found


def wall_clock(source: str) -> list[int]:
    """Lines that read the wall clock, which knows nothing of simulated time."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {('time', 'time'), ('time', 'time_ns'), ('datetime', 'now')}
    ]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Cycles of a directed graph, each once, by depth-first search."""
    found, done = [], set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
            return
        if node in done:
            return
        for neighbour in sorted(graph.get(node, ())):
            visit(neighbour, [*path, node])
        done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


def module_name(path: Path) -> str:
    """Dotted name of a module."""
    name = '.'.join([PACKAGE, *path.relative_to(ROOT).with_suffix('').parts])
    return name.removesuffix('.__init__')


def test_imports_are_read_wherever_they_stand():
    source = 'import a.b\nfrom c import d\ndef f():\n    from e import g\n    import rclpy\n'
    assert imports(source) == {'a.b', 'c', 'c.d', 'e', 'e.g', 'rclpy'}
    assert imports(source, at_import=True) == {'a.b', 'c', 'c.d'}
    relative = imports('from ..robot import poses\nfrom . import x\n', ROOT / 'policy' / 'policy.py')
    assert {f'{PACKAGE}.robot.poses', f'{PACKAGE}.policy.x'} <= relative
    assert own_rooms(relative) == {'robot', 'policy'}


def test_only_nodes_import_ros():
    assert is_ros('rclpy.node') and is_ros('sensor_msgs.msg.Image') and not is_ros('rosbags.rosbag2')
    offenders = {
        str(path.relative_to(ROOT)): sorted(filter(is_ros, imports(path.read_text(), path)))
        for path in modules()
        if room(path) != 'nodes' and any(map(is_ros, imports(path.read_text(), path)))
    }
    assert offenders == {}


def test_only_sim_imports_a_simulator():
    offenders = {
        str(path.relative_to(ROOT))
        for path in modules()
        if room(path) != 'sim'
        and {name.partition('.')[0] for name in imports(path.read_text(), path)} & SIMULATORS
    }
    assert offenders == set()


def test_every_room_is_in_the_plan():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != '__pycache__'}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize('name', ROOMS)
def test_arrows_between_rooms_point_one_way(name):
    allowed = ROOMS[name] | FOUNDATION | {name}
    offenders = {
        str(path.relative_to(ROOT)): own_rooms(imports(path.read_text(), path)) - allowed - {PACKAGE}
        for path in modules()
        if room(path) == name
    }
    assert {path: rooms for path, rooms in offenders.items() if rooms} == {}


def test_rooms_allow_no_cycle():
    assert cycles({'a': {'b'}, 'b': {'c'}, 'c': {'a'}, 'd': {'a'}}) == [['a', 'b', 'c', 'a']]
    assert cycles(ROOMS) == []


def test_modules_import_each_other_without_cycles():
    names = {module_name(path) for path in modules()}
    graph = {
        module_name(path): {
            name
            for name in imports(path.read_text(), path, at_import=True) & names
            if name != module_name(path)
        }
        for path in modules()
        if path.name != '__init__.py'
    }
    assert cycles(graph) == []


@pytest.mark.parametrize(
    'line',
    [
        'import pickle', 'from joblib import dump', 'torch.load(path)', 'yaml.load(text)', 'eval(text)', 'exec(text)',
        'np.load(path, allow_pickle=True)', 'subprocess.run(text, shell=True)',
    ],
)  # fmt: skip
def test_dangerous_lines_are_seen(line):
    assert len(dangerous(line)) == 1


@pytest.mark.parametrize(
    'line', ['model.eval()', 'yaml.safe_load(text)', 're.compile(text)', 'np.load(path)']
)
def test_harmless_lines_are_left_alone(line):
    assert dangerous(line) == []


def test_nothing_unpickles_or_evaluates():
    trees = [ROOT, ROOT.parent / 'launch', ROOT.parent / 'bench']
    sources = [path for tree in trees for path in tree.rglob('*.py')]
    offenders = {str(path): dangerous(path.read_text()) for path in sources}
    assert {path: lines for path, lines in offenders.items() if lines} == {}


def test_nodes_read_the_node_clock_only():
    assert wall_clock('import time\nt = time.time()\nu = time.monotonic()\n') == [2]
    offenders = {path.name: wall_clock(path.read_text()) for path in (ROOT / 'nodes').rglob('*.py')}
    assert {name: lines for name, lines in offenders.items() if lines} == {}


def test_modules_and_functions_stay_readable():
    too_long = []
    for path in modules():
        source = path.read_text()
        if len(source.splitlines()) > MAX_MODULE_LINES:
            too_long.append(f'{path.relative_to(ROOT)}: {len(source.splitlines())} lines')
        too_long += [
            f'{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines'
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
        ]
    assert too_long == []


def imported_by(target: str) -> set[str]:
    """Top-level modules that a fresh Python has after importing `target`: the truth, lazy imports included."""
    code = f'import sys, {target}; print(*sorted({{name.partition(".")[0] for name in sys.modules}}))'
    result = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
        timeout=120,
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ('target', 'forbidden'),
    [
        ('robot.kinematics', {'torch', 'rclpy', *SIMULATORS}),
        ('observation.sampler', {'torch', 'rclpy', *SIMULATORS}),
        ('data.datasets.dataset', {'torch', 'rclpy', *SIMULATORS}),
        ('runtime.engine', {'rclpy', *SIMULATORS, *HEAVY}),
        ('training.study', {'rclpy', *SIMULATORS, *HEAVY}),
        ('replay.replay', {'rclpy', *SIMULATORS}),
        ('teleop.teleoperator', {'torch', 'rclpy', *SIMULATORS}),
        ('nodes.kinematics_recorder_node', {'torch', *SIMULATORS}),
        ('nodes.episode_recorder_node', {'torch', *SIMULATORS}),
        ('nodes.policy_node', {*SIMULATORS, *HEAVY}),
        ('nodes.command_guard_node', {'torch', *SIMULATORS}),
        ('nodes.sim_robot_node', {'torch'}),
        ('cli', {'torch', 'rclpy', *SIMULATORS}),
    ],
)
def test_importing_stays_light(target, forbidden):
    assert imported_by(f'{PACKAGE}.{target}') & forbidden == set()
