"""Launch files and parameter files against the nodes that they start.

launch itself comes with a ROS installation only, so the files are read here, not run.
"""

import ast
import dataclasses
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import yaml

from decoupled_policy_ros.nodes.coverage_node import CoverageNodeSettings
from decoupled_policy_ros.nodes.kinematics_recorder_node import RecorderNodeSettings
from decoupled_policy_ros.nodes.policy_settings import PolicySettings
from decoupled_policy_ros.nodes.sim_robot_node import SimSettings
from decoupled_policy_ros.nodes.teleop_settings import TeleopSettings
from decoupled_policy_ros.robot.description import robot_names
from decoupled_policy_ros.sim.tasks import TASKS

ARGUMENTS = {
    'command_guard': {'robot', 'guard_file', 'input_topic', 'control_rate_hz', 'use_sim_time', 'namespace'},
    'coverage': {'dataset', 'robot', 'voxel_m', 'rate_hz', 'rviz', 'namespace'},
    'franka': {
        'dry_run',
        'shadow',
        'output',
        'task',
        'robot',
        'joint_states',
        'recover',
        'use_sim_time',
        'namespace',
    },
    'policy': {
        'robot',
        'task',
        'backbone',
        'instruction',
        'shadow',
        'use_sim',
        'use_sim_time',
        'rviz',
        'namespace',
    },
    'record_episodes': {'robot', 'output_dir', 'instruction', 'use_sim_time', 'namespace'},
    'record_kinematics': {'robot', 'output_dir', 'use_sim_time', 'namespace'},
    'rviz': {'robot', 'use_sim_time', 'namespace', 'display'},
    'sim': {'robot', 'task', 'seed', 'use_sim_time', 'rviz', 'namespace'},
    'teleop': {
        'robot',
        'device',
        'mapping',
        'output_dir',
        'instruction',
        'use_sim',
        'use_sim_time',
        'namespace',
    },
}
SETTINGS = {
    'policy_node': PolicySettings,
    'sim_robot_node': SimSettings,
    'kinematics_recorder': RecorderNodeSettings,
    'teleop_node': TeleopSettings,
}


def calls(repository, launch: str, name: str) -> list[ast.Call]:
    """Calls of a name in a launch file."""
    tree = ast.parse((repository / 'launch' / f'{launch}.launch.py').read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def keywords(call: ast.Call) -> dict[str, str]:
    """Keyword arguments of a call that are constants."""
    return {k.arg: k.value.value for k in call.keywords if k.arg and isinstance(k.value, ast.Constant)}


def test_every_launch_file_is_covered(repository):
    assert {path.name for path in (repository / 'launch').iterdir() if path.is_file()} == {
        f'{name}.launch.py' for name in ARGUMENTS
    }


@pytest.mark.parametrize('launch', ARGUMENTS)
def test_arguments_are_there_and_described(repository, launch):
    declared = calls(repository, launch, 'DeclareLaunchArgument')
    assert {call.args[0].value for call in declared} >= ARGUMENTS[launch]
    assert [call.args[0].value for call in declared if len(keywords(call).get('description', '')) < 10] == []


@pytest.mark.parametrize('launch', ARGUMENTS)
def test_what_can_end_the_launch_comes_before_the_node_that_commands(repository, launch):
    """launch starts a process later than it visits its action, and forgets it where an action in between fails."""
    (description,) = calls(repository, launch, 'LaunchDescription')
    order = [ast.unparse(element) for element in description.args[0].elts]
    last = {
        'policy': 'policy', 'teleop': 'teleop', 'sim': 'simulator', 'coverage': 'coverage',
        'franka': 'OpaqueFunction(function=policy)', 'command_guard': 'guard', 'rviz': 'OpaqueFunction(function=rviz)',
    }.get(launch, 'recorder')  # fmt: skip
    assert order[-1] == last


@pytest.mark.parametrize('launch', ARGUMENTS)
def test_switches_are_refused_by_launch_where_they_are_misspelled(repository, launch):
    tree = ast.parse((repository / 'launch' / f'{launch}.launch.py').read_text())
    (switch,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == 'SWITCH')
    # A parameter is what YAML makes of it: '1' would be a number, and end the launch with the nodes before it running.
    assert sorted(choices := ast.literal_eval(switch)) == ['False', 'True', 'false', 'true']
    assert all(type(yaml.safe_load(choice)) is bool for choice in choices)
    declared = {c.args[0].value: c for c in calls(repository, launch, 'DeclareLaunchArgument')}
    limited = {
        name
        for name, call in declared.items()
        if any(k.arg == 'choices' and 'SWITCH' in ast.unparse(k.value) for k in call.keywords)
    }
    constant = {name for name, value in defaults(repository, launch).items() if value in ('true', 'false')}
    assert limited == constant | ({'use_sim_time'} & set(declared))


@pytest.mark.parametrize('launch', ARGUMENTS)
def test_executables_exist(repository, launch):
    entry_points = re.findall(r"'([\w-]+) = decoupled_policy_ros", (repository / 'setup.py').read_text())
    assert len(entry_points) >= 4
    nodes = [keywords(call) for call in calls(repository, launch, 'Node')]
    assert nodes
    for node in nodes:
        others = {'rviz2': ['rviz2'], 'joy': ['joy_node']}
        known = entry_points if node['package'] == 'decoupled_policy_ros' else others[node['package']]
        assert node['executable'] in known


@pytest.mark.parametrize('file', SETTINGS)
def test_parameter_files_hold_parameters_of_their_node_at_their_defaults(repository, file):
    fields = {field.name: field.default for field in dataclasses.fields(SETTINGS[file])}
    values = yaml.safe_load((repository / 'config' / f'{file}.yaml').read_text())['/**']['ros__parameters']
    assert set(values) - set(fields) == set()
    assert {name: (value, type(value)) for name, value in values.items()} == {
        name: (fields[name], type(fields[name])) for name in values
    }


def defaults(repository, launch: str) -> dict[str, str]:
    """Constant defaults of a launch file's arguments."""
    declared = calls(repository, launch, 'DeclareLaunchArgument')
    return {
        c.args[0].value: value for c in declared if (value := keywords(c).get('default_value')) is not None
    }


@pytest.mark.parametrize('argument', ['policy: sim_task', 'sim: task'])
def test_what_is_simulated_by_default_can_be_simulated(repository, argument):
    launch, name = argument.split(': ')
    # A constant: the policy's task is often a folder of one's own, which no simulator knows.
    assert defaults(repository, launch)[name] in TASKS


def test_rviz_names_the_robots_when_there_is_none_of_that_name(repository, monkeypatch):
    class Anything:
        def __init__(self, *args, **options):
            self.options = options

        def perform(self, context):
            return str(repository)

    for module, names in {
        'launch': ['LaunchContext', 'LaunchDescription'],
        'launch.actions': ['DeclareLaunchArgument', 'OpaqueFunction'],
        'launch.substitutions': ['LaunchConfiguration'],
        'launch_ros.actions': ['Node'],
        'launch_ros.parameter_descriptions': ['ParameterValue'],
        'launch_ros.substitutions': ['FindPackageShare'],
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names, Anything)))
    rviz = runpy.run_path(str(repository / 'launch/rviz.launch.py'))['rviz']
    with pytest.raises(RuntimeError, match=r"no display 'wrist': give one of coverage, policy$"):
        rviz(SimpleNamespace(launch_configurations={'robot': 'fr3', 'display': 'wrist'}))
    with pytest.raises(RuntimeError) as error:
        rviz(SimpleNamespace(launch_configurations={'robot': 'pandora', 'display': 'policy'}))
    assert str(error.value) == (
        f"no robot 'pandora': give a path to a .yaml file or one of {', '.join(robot_names())}"
    )
    (node,) = rviz(SimpleNamespace(launch_configurations={'robot': 'fr3', 'display': 'policy'}))
    assert ('wrist/image_raw', 'wrist/color/image_raw') in node.options['remappings']


def rviz_display(repository, name: str) -> tuple[dict, dict[str, dict]]:
    """An RViz configuration, and its topics with their settings."""
    rviz = yaml.safe_load((repository / 'config' / f'{name}.rviz').read_text())
    displays = rviz['Visualization Manager']['Displays']
    return rviz, {display['Topic']['Value']: display['Topic'] for display in displays if 'Topic' in display}


def test_rviz_shows_coverage_to_whoever_comes_late(repository):
    rviz, topics = rviz_display(repository, 'coverage')
    source = (repository / 'decoupled_policy_ros/nodes/coverage_node.py').read_text()
    published = re.findall(r"create_publisher\(\w+, '~/(\w+)', LATCHED\)", source)
    assert set(topics) == {f'coverage_node/{name}' for name in published}
    assert {topic['Durability Policy'] for topic in topics.values()} == {'Transient Local'}
    robot = yaml.safe_load((repository / 'config/robots/panda_sim.yaml').read_text())
    assert rviz['Visualization Manager']['Global Options']['Fixed Frame'] == robot['frames']['base']


def test_coverage_is_launched_with_parameters_that_it_has(repository):
    (node,) = calls(repository, 'coverage', 'Node')
    parameters = {
        constant.value
        for keyword in node.keywords
        if keyword.arg == 'parameters'
        for generator in ast.walk(keyword.value)
        if isinstance(generator, ast.comprehension)
        for constant in ast.walk(generator.iter)
        if isinstance(constant, ast.Constant)
    }
    settings = {field.name: field.default for field in dataclasses.fields(CoverageNodeSettings)}
    assert parameters == {'dataset', 'robot', 'voxel_m', 'rate_hz'}
    assert parameters <= set(settings)
    assert defaults(repository, 'coverage') == {
        **{name: str(settings[name]) for name in ('robot', 'voxel_m', 'rate_hz')}, 'namespace': '', 'rviz': 'true',
    }  # fmt: skip


def test_joy_node_is_started_where_it_is_installed_and_of_use(repository, monkeypatch):
    class Anything:
        def __init__(self, *args, **options):
            self.options = options

    class NotFoundError(Exception):
        pass

    installed = set()

    def share(package):
        if package not in installed:
            raise NotFoundError(package)

    for module, names in {
        'launch': ['LaunchContext', 'LaunchDescription'],
        'launch.actions': [
            'DeclareLaunchArgument', 'GroupAction', 'IncludeLaunchDescription', 'LogInfo', 'OpaqueFunction',
        ],
        'launch.conditions': ['IfCondition'],
        'launch.launch_description_entity': ['LaunchDescriptionEntity'],
        'launch.launch_description_sources': ['PythonLaunchDescriptionSource'],
        'launch.substitutions': [
            'EqualsSubstitution', 'LaunchConfiguration', 'NotEqualsSubstitution', 'PathJoinSubstitution',
        ],
        'launch_ros.actions': ['Node'],
        'launch_ros.parameter_descriptions': ['ParameterValue'],
        'launch_ros.substitutions': ['FindPackageShare'],
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names, Anything)))
    index = SimpleNamespace(PackageNotFoundError=NotFoundError, get_package_share_directory=share)
    monkeypatch.setitem(sys.modules, 'ament_index_python.packages', index)
    joy = runpy.run_path(str(repository / 'launch/teleop.launch.py'))['joy']

    def started(asked, device='joy', mapping=''):
        arguments = {'joy_node': asked, 'device': device, 'mapping': mapping}
        return [x.options.get('executable') for x in joy(SimpleNamespace(launch_configurations=arguments))]

    assert started('auto') == [None]  # a line in the log
    with pytest.raises(RuntimeError, match='needs the package joy, which is not installed'):
        started('true')
    installed.add('joy')
    assert started('auto') == started('true', 'leader_pose') == ['joy_node']
    assert started('auto', 'leader_pose') == started('false') == started('auto', 'joy', 'spacemouse') == []


def test_rviz_shows_topics_that_exist(repository):
    rviz, topics = rviz_display(repository, 'policy')
    robot = yaml.safe_load((repository / 'config/robots/panda_sim.yaml').read_text())
    cameras = {camera['topic'] for camera in robot['cameras'].values()}
    poses = {robot['topics']['current_pose'], robot['topics']['target_pose']}
    ours = {f'policy_node/{name}' for name in ('path', 'samples', 'guard_markers')}
    assert set(topics) == {*ours, *cameras, *poses}
    assert rviz['Visualization Manager']['Global Options']['Fixed Frame'] == robot['frames']['base']


def test_franka_is_a_dry_run_unless_it_is_plainly_told_not_to_be(repository, monkeypatch):
    class Anything:
        def __init__(self, *args, **options):
            self.args, self.options = args, options

    for module, names in {
        'launch': ['LaunchContext', 'LaunchDescription'],
        'launch.actions': [
            'DeclareLaunchArgument', 'EmitEvent', 'ExecuteProcess', 'GroupAction', 'IncludeLaunchDescription',
            'LogInfo', 'OpaqueFunction', 'RegisterEventHandler',
        ],
        'launch.conditions': ['IfCondition'],
        'launch.event_handlers': ['OnProcessExit'],
        'launch.events': ['Shutdown'],
        'launch.events.process': ['ProcessExited'],
        'launch.launch_description_entity': ['LaunchDescriptionEntity'],
        'launch.launch_description_sources': ['PythonLaunchDescriptionSource'],
        'launch.substitutions': ['LaunchConfiguration', 'PathJoinSubstitution'],
        'launch_ros.actions': ['Node'],
        'launch_ros.parameter_descriptions': ['ParameterValue'],
        'launch_ros.substitutions': ['FindPackageShare'],
    }.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**dict.fromkeys(names, Anything)))
    policy = runpy.run_path(str(repository / 'launch/franka.launch.py'))['policy']

    def launched(**asked):
        arguments = {**defaults(repository, 'franka'), 'params_file': 'x.yaml', **asked}
        return policy(SimpleNamespace(launch_configurations=arguments))

    def parameters(node):
        return {
            k: v for part in node.options['parameters'] if isinstance(part, dict) for k, v in part.items()
        }

    (node,) = launched()
    assert parameters(node)['output'] == 'none'
    known = {field.name for field in dataclasses.fields(PolicySettings)} | {'use_sim_time'}
    assert set(parameters(node)) <= known
    (node,) = launched(dry_run='False', joint_states='franka/joint_states')
    chosen = parameters(node)
    assert (chosen['output'], chosen['gripper'], chosen['guard']) == ('joint_trajectory', 'action', True)
    assert node.options['remappings'] == [('joint_states', 'franka/joint_states')]
    with pytest.raises(KeyError, match='flase'):  # whoever gets past the choices
        launched(dry_run='flase')
    for namespace, server in ('', '/action_server'), ('/left/', '/left/action_server'):
        handler, recovery = launched(recover='True', namespace=namespace)
        assert recovery.options['cmd'][3] == f'{server}/error_recovery'
        (after,) = handler.args  # first the arm recovers, then the policy starts
        assert after.options['target_action'] is recovery
        on_exit = after.options['on_exit']
        assert [parameters(node)['output'] for node in on_exit(SimpleNamespace(returncode=0), None)] == [
            'none'
        ]
        said, end = on_exit(SimpleNamespace(returncode=1), None)
        assert 'recovery failed' in said.options['msg'] == end.options['event'].options['reason']
