"""Record what the arm does, whoever moves it: joint states to Stage 1 motion files."""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
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
    DeclareLaunchArgument('output_dir', default_value='motions', description='Folder for the motion files.'),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([SHARE, 'config', 'kinematics_recorder.yaml']),
        description="The recorder's other parameters.",
    ),
    DeclareLaunchArgument(
        'use_sim_time',
        choices=SWITCH,
        default_value='false',
        description='Whether time comes from /clock, as with a simulator.',
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
        executable='kinematics_recorder_node',
        name='kinematics_recorder_node',
        namespace=LaunchConfiguration('namespace'),
        output='screen',
        # A signal must reach it in time to finish the motion's file.
        sigterm_timeout='10',
        parameters=[
            LaunchConfiguration('params_file'),
            {
                'robot': value('robot', str),
                'output_dir': value('output_dir', str),
                'use_sim_time': value('use_sim_time', bool),
            },
        ],
    )
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=require), recorder])
