"""Show what Stage 1 motions cover: the node that measures them, and RViz with the cloud and the markers."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, IncludeLaunchDescription
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
        'dataset', description="Folder of motion files, or dataset; several are separated by ':'."
    ),
    DeclareLaunchArgument(
        'robot', default_value='panda_sim', description='Name in config/robots, or a YAML file.'
    ),
    DeclareLaunchArgument('voxel_m', default_value='0.05', description='Longest edge of a voxel (m).'),
    DeclareLaunchArgument(
        'rate_hz',
        default_value='20.0',
        description="Rate at which recordings are resampled: the policy's (Hz).",
    ),
    DeclareLaunchArgument('namespace', default_value='', description='Namespace of the node.'),
    DeclareLaunchArgument(
        'rviz', choices=SWITCH, default_value='true', description='Start RViz with config/coverage.rviz.'
    ),
]


def value(name: str, kind: type) -> ParameterValue:
    """A launch argument as a parameter of the given type."""
    return ParameterValue(LaunchConfiguration(name), value_type=kind)


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start the node, and RViz unless it isn't wanted."""
    coverage = Node(
        package='decoupled_policy_ros',
        executable='coverage_node',
        name='coverage_node',
        namespace=LaunchConfiguration('namespace'),
        output='screen',
        sigterm_timeout='10',
        parameters=[
            {name: value(name, str) for name in ('dataset', 'robot')},
            {name: value(name, float) for name in ('voxel_m', 'rate_hz')},
        ],
    )
    rviz = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(PathJoinSubstitution([SHARE, 'launch', 'rviz.launch.py'])),
        launch_arguments={
            'robot': LaunchConfiguration('robot'),
            'namespace': LaunchConfiguration('namespace'),
            'use_sim_time': 'false',
            'display': 'coverage',
        }.items(),
        condition=IfCondition(LaunchConfiguration('rviz')),
    )
    return LaunchDescription([*ARGUMENTS, rviz, coverage])
