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

from decoupled_policy_ros.nodes.kinematics_recorder_node import RecorderNodeSettings
from decoupled_policy_ros.nodes.policy_settings import PolicySettings
from decoupled_policy_ros.nodes.sim_robot_node import SimSettings
from decoupled_policy_ros.robot.description import robot_names
from decoupled_policy_ros.sim.environment import TASKS

ARGUMENTS = {
    'policy': {'robot', 'task', 'backbone', 'instruction', 'use_sim', 'use_sim_time', 'rviz', 'namespace'},
    'record_kinematics': {'robot', 'output_dir', 'use_sim_time', 'namespace'},
    'rviz': {'robot', 'use_sim_time', 'namespace'},
    'sim': {'robot', 'task', 'seed', 'use_sim_time', 'rviz', 'namespace'},
}
SETTINGS = {
    'policy_node': PolicySettings,
    'sim_robot_node': SimSettings,
    'kinematics_recorder': RecorderNodeSettings,
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
def test_executables_exist(repository, launch):
    entry_points = re.findall(r"'([\w-]+) = decoupled_policy_ros", (repository / 'setup.py').read_text())
    assert len(entry_points) >= 4
    nodes = [keywords(call) for call in calls(repository, launch, 'Node')]
    assert nodes
    for node in nodes:
        known = entry_points if node['package'] == 'decoupled_policy_ros' else ['rviz2']
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
    with pytest.raises(RuntimeError) as error:
        rviz(SimpleNamespace(launch_configurations={'robot': 'pandora'}))
    assert str(error.value) == (
        f"no robot 'pandora': give a path to a .yaml file or one of {', '.join(robot_names())}"
    )
    (node,) = rviz(SimpleNamespace(launch_configurations={'robot': 'fr3'}))
    assert ('wrist/image_raw', 'wrist/color/image_raw') in node.options['remappings']


def test_rviz_shows_topics_that_exist(repository):
    rviz = yaml.safe_load((repository / 'config' / 'policy.rviz').read_text())
    displays = rviz['Visualization Manager']['Displays']
    topics = {display['Topic']['Value'] for display in displays if 'Topic' in display}
    robot = yaml.safe_load((repository / 'config/robots/panda_sim.yaml').read_text())
    cameras = {camera['topic'] for camera in robot['cameras'].values()}
    poses = {robot['topics']['current_pose'], robot['topics']['target_pose']}
    assert topics == {'policy_node/path', *cameras, *poses}
    assert rviz['Visualization Manager']['Global Options']['Fixed Frame'] == robot['frames']['base']
