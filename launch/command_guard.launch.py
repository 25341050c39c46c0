"""The command guard between whoever publishes target_pose_in and the arm.

For example a person:
    ros2 launch decoupled_policy_ros command_guard.launch.py robot:=fr3
    ros2 run decoupled_policy_ros teleop_node --ros-args -p robot:=fr3 -r target_pose:=target_pose_in
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

#: Refused by launch before anything is started, where something else is asked for.
SWITCH = ['true', 'false', 'True', 'False']

ARGUMENTS = [
    DeclareLaunchArgument(
        'robot', default_value='panda_sim', description='Name in config/robots, or a YAML file.'
    ),
    DeclareLaunchArgument(
        'guard_file',
        default_value='',
        description="YAML file with the guard's settings; empty: its defaults.",
    ),
    DeclareLaunchArgument(
        'input_topic', default_value='target_pose_in', description='Topic of the targets to check.'
    ),
    DeclareLaunchArgument('control_rate_hz', default_value='50.0', description='Rate of target_pose (Hz).'),
    DeclareLaunchArgument(
        'horizon_s', default_value='0.05', description='A target is to be reached so much later (s).'
    ),
    DeclareLaunchArgument(
        'target_timeout_s',
        default_value='0.2',
        description='Silence since the last target from which on the arm comes to rest (s).',
    ),
    DeclareLaunchArgument(
        'use_sim_time',
        choices=SWITCH,
        default_value='false',
        description='Follow /clock, not the wall clock.',
    ),
    DeclareLaunchArgument('namespace', default_value='', description='Namespace of the arm and of the node.'),
]


def value(name: str, kind: type) -> ParameterValue:
    """A launch argument as a parameter of the given type."""
    return ParameterValue(LaunchConfiguration(name), value_type=kind)


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the node."""
    guard = Node(
        package='decoupled_policy_ros',
        executable='command_guard_node',
        name='command_guard_node',
        namespace=LaunchConfiguration('namespace'),
        output='screen',
        parameters=[
            {name: value(name, str) for name in ('robot', 'guard_file', 'input_topic')},
            {name: value(name, float) for name in ('control_rate_hz', 'horizon_s', 'target_timeout_s')},
            {'use_sim_time': value('use_sim_time', bool)},
        ],
    )
    return LaunchDescription([*ARGUMENTS, guard])
