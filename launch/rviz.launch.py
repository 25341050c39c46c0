"""RViz in the frames and topics of the robot: on a running policy, with the arm's pose, the chunk, and the cameras."""

from pathlib import Path

import yaml
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

#: Refused by launch before anything is started, where something else is asked for.
SWITCH = ['true', 'false', 'True', 'False']


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start RViz."""
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                'robot', default_value='panda_sim', description='Name in config/robots, or a YAML file.'
            ),
            DeclareLaunchArgument(
                'use_sim_time', choices=SWITCH, default_value='true', description='Follow /clock.'
            ),
            DeclareLaunchArgument('namespace', default_value='', description='Namespace of the arm.'),
            DeclareLaunchArgument(
                'display', default_value='policy', description='What to show: a name of config/*.rviz.'
            ),
            OpaqueFunction(function=rviz),
        ]
    )


def rviz(context: LaunchContext) -> list[Node]:
    """RViz with the robot's base as fixed frame, and its camera topics in place of the ones in policy.rviz."""
    config = Path(FindPackageShare('decoupled_policy_ros').perform(context)) / 'config'
    robot, display = (context.launch_configurations[name] for name in ('robot', 'display'))
    file = (
        Path(robot).expanduser() if robot.endswith(('.yaml', '.yml')) else config / 'robots' / f'{robot}.yaml'
    )
    if not file.is_file():  # launch prints an exception as one line
        known = ', '.join(sorted(path.stem for path in (config / 'robots').glob('*.yaml')))
        raise RuntimeError(f'no robot {robot!r}: give a path to a .yaml file or one of {known}')
    shown = config / f'{display}.rviz'
    if not shown.is_file():
        known = ', '.join(sorted(path.stem for path in config.glob('*.rviz')))
        raise RuntimeError(f'no display {display!r}: give one of {known}')
    description = yaml.safe_load(file.read_text())
    return [
        Node(
            package='rviz2',
            executable='rviz2',
            namespace=LaunchConfiguration('namespace'),
            arguments=['-d', str(shown), '-f', description['frames']['base']],
            parameters=[
                {'use_sim_time': ParameterValue(LaunchConfiguration('use_sim_time'), value_type=bool)}
            ],
            remappings=[
                *((f'{name}/image_raw', camera['topic']) for name, camera in description['cameras'].items()),
                *((key, description['topics'][key]) for key in ('current_pose', 'target_pose')),
            ],
        )
    ]
