"""Record demonstrations: cameras, joint states and commands, one rosbag2 folder per episode."""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import EnvironmentVariable, LaunchConfiguration, PathJoinSubstitution
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
    DeclareLaunchArgument('output_dir', default_value='episodes', description='Folder for the episodes.'),
    DeclareLaunchArgument(
        'instruction', default_value='', description='What the arm is told to do, in words.'
    ),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([SHARE, 'config', 'episode_recorder.yaml']),
        description="The recorder's other parameters.",
    ),
    DeclareLaunchArgument(
        'use_sim_time',
        choices=SWITCH,
        default_value='false',
        description='Whether time comes from /clock, as with a simulator.',
    ),
    DeclareLaunchArgument(
        'fastdds_profiles',
        default_value=EnvironmentVariable(
            'FASTRTPS_DEFAULT_PROFILES_FILE',
            default_value=PathJoinSubstitution([SHARE, 'config', 'fastdds_large_messages.xml']),
        ),
        description="Fast DDS profiles for the recorder; the cameras' drivers need the same for raw pictures.",
    ),
    DeclareLaunchArgument('namespace', default_value='', description='Namespace of the arm.'),
]


def require(context: LaunchContext) -> None:
    """Refuse what launch would pass over, or find out once something runs, which it then leaves behind."""
    asked = context.launch_configurations
    if not Path(asked['params_file']).is_file():
        raise RuntimeError(f'params_file must be a file, got {asked["params_file"]!r}')


def value(name: str, kind: type) -> ParameterValue:
    """A launch argument as a parameter of the given type."""
    return ParameterValue(LaunchConfiguration(name), value_type=kind)


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments and start the recorder."""
    recorder = Node(
        package='decoupled_policy_ros',
        executable='episode_recorder_node',
        name='episode_recorder_node',
        namespace=LaunchConfiguration('namespace'),
        output='screen',
        # A signal must reach it in time to finish a running episode.
        sigterm_timeout='30',
        additional_env={'FASTRTPS_DEFAULT_PROFILES_FILE': LaunchConfiguration('fastdds_profiles')},
        parameters=[
            LaunchConfiguration('params_file'),
            {
                'robot': value('robot', str),
                'output_dir': value('output_dir', str),
                'instruction': value('instruction', str),
                'use_sim_time': value('use_sim_time', bool),
            },
        ],
    )
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=require), recorder])
