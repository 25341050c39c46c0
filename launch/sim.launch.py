"""The simulated arm alone: robosuite behind the topics of a real robot."""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription, OpaqueFunction
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare('decoupled_policy_ros')
#: Refused by launch before anything is started, where something else is asked for.
SWITCH = ['true', 'false', 'True', 'False']

ARGUMENTS = [
    DeclareLaunchArgument(
        'robot', default_value='panda_sim', description='Name in config/robots, or a YAML file.'
    ),
    DeclareLaunchArgument(
        'task', default_value='lift', description='What to simulate; docs/simulation.md has the tasks.'
    ),
    DeclareLaunchArgument(
        'seed', default_value='0', description='Seed of the first episode; each reset adds one.'
    ),
    DeclareLaunchArgument(
        'motion',
        default_value='',
        description='What the arm does by itself: wander or <task>_expert; empty: it follows commands.',
    ),
    DeclareLaunchArgument(
        'publish_images',
        choices=SWITCH,
        default_value='true',
        description='Render the cameras; a recording of motion needs none.',
    ),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([SHARE, 'config', 'sim_robot_node.yaml']),
        description="The simulator's other parameters.",
    ),
    DeclareLaunchArgument(
        'use_sim_time',
        choices=SWITCH,
        default_value='true',
        description='Whether RViz follows /clock, which the simulator publishes.',
    ),
    DeclareLaunchArgument('namespace', default_value='', description='Namespace of the arm.'),
    DeclareLaunchArgument(
        'rviz', choices=SWITCH, default_value='false', description='Start RViz with config/policy.rviz.'
    ),
]


def require(context: LaunchContext) -> None:
    """Refuse what launch would pass over, or find out once something runs, which it then leaves behind."""
    asked = context.launch_configurations
    if not Path(asked['params_file']).is_file():
        raise RuntimeError(f'params_file must be a file, got {asked["params_file"]!r}')
    if not asked['seed'].lstrip('-').isdigit():
        raise RuntimeError(f'seed must be a whole number, got {asked["seed"]!r}')


def value(name: str, kind: type) -> ParameterValue:
    """A launch argument as a parameter of the given type."""
    return ParameterValue(LaunchConfiguration(name), value_type=kind)


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start the simulator, and RViz on request."""
    simulator = Node(
        package='decoupled_policy_ros',
        executable='sim_robot_node',
        sigterm_timeout='10',
        name='sim_robot_node',
        namespace=LaunchConfiguration('namespace'),
        output='screen',
        parameters=[
            LaunchConfiguration('params_file'),
            {name: value(name, str) for name in ('robot', 'task', 'motion')},
            {'seed': value('seed', int), 'publish_images': value('publish_images', bool)},
        ],
    )
    rviz = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([SHARE, 'launch', 'rviz.launch.py'])),
        launch_arguments={
            name: LaunchConfiguration(name) for name in ('robot', 'use_sim_time', 'namespace')
        }.items(),
        condition=IfCondition(LaunchConfiguration('rviz')),
    )
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=require), rviz, simulator])
