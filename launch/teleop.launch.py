"""Teleoperate an arm and record episodes: teleop_node and episode_recorder_node, simulator and joy_node on request.

With a gamepad, in simulation:  ros2 launch decoupled_policy_ros teleop.launch.py use_sim:=true
With a gamepad, on an arm:      ros2 launch decoupled_policy_ros teleop.launch.py robot:=fr3 instruction:='...'
With a keyboard: add device:=keyboard here, which leaves the operator out, and give it a terminal of its own:
                                ros2 run decoupled_policy_ros teleop_node --ros-args -p device:=keyboard -p robot:=fr3
(and -p use_sim_time:=true -p lockstep:=true where the arm is simulated, -r __ns:=/left where it has a namespace).
"""

from pathlib import Path

from ament_index_python.packages import PackageNotFoundError, get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    GroupAction,
    IncludeLaunchDescription,
    LogInfo,
    OpaqueFunction,
)
from launch.conditions import IfCondition
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import (
    EqualsSubstitution,
    LaunchConfiguration,
    NotEqualsSubstitution,
    PathJoinSubstitution,
)
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
        'device',
        default_value='joy',
        description='What the operator holds: joy, twist or leader_pose; keyboard: run by hand in a terminal.',
    ),
    DeclareLaunchArgument(
        'mapping',
        default_value='',
        description="Name in config/teleop, or a YAML file; empty: the device's usual one (joy: gamepad).",
    ),
    DeclareLaunchArgument(
        'joy_node',
        choices=['auto', 'true', 'false'],
        default_value='auto',
        description='Start joy_node of the package joy: true, false, or auto: for device joy, where it is installed.',
    ),
    DeclareLaunchArgument(
        'record',
        choices=SWITCH,
        default_value='true',
        description='Start the episode recorder too; buttons and keys call it.',
    ),
    DeclareLaunchArgument('output_dir', default_value='episodes', description='Folder for the episodes.'),
    DeclareLaunchArgument(
        'instruction', default_value='', description='What the arm is told to do, written into each episode.'
    ),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([SHARE, 'config', 'teleop_node.yaml']),
        description="teleop_node's other parameters.",
    ),
    DeclareLaunchArgument(
        'recorder_params_file',
        default_value=PathJoinSubstitution([SHARE, 'config', 'episode_recorder.yaml']),
        description="The episode recorder's other parameters.",
    ),
    DeclareLaunchArgument(
        'use_sim',
        choices=SWITCH,
        default_value='false',
        description='Start the simulated arm too, in step with the operator.',
    ),
    DeclareLaunchArgument(
        'sim_task', default_value='lift', description='What to simulate; docs/simulation.md has the tasks.'
    ),
    DeclareLaunchArgument('seed', default_value='0', description='Seed of the first simulated episode.'),
    DeclareLaunchArgument(
        'use_sim_time',
        choices=SWITCH,
        default_value=LaunchConfiguration('use_sim'),
        description='Follow /clock, not the wall clock.',
    ),
    DeclareLaunchArgument(
        'namespace', default_value='', description='Namespace of the arm and of the nodes.'
    ),
]


def require(context: LaunchContext) -> None:
    """Refuse what launch would pass over, or find out once something runs, which it then leaves behind."""
    asked = context.launch_configurations
    for name in ('params_file', 'recorder_params_file'):
        if not Path(asked[name]).is_file():
            raise RuntimeError(f'{name} must be a file, got {asked[name]!r}')
    if not asked['seed'].lstrip('-').isdigit():
        raise RuntimeError(f'seed must be a whole number, got {asked["seed"]!r}')


def value(name: str, kind: type) -> ParameterValue:
    """A launch argument as a parameter of the given type."""
    return ParameterValue(LaunchConfiguration(name), value_type=kind)


def include(file: str, condition: str, **arguments: LaunchConfiguration | str) -> GroupAction:
    """Another launch file of this package, when the argument `condition` is true.

    In a group, so that its arguments don't become those of this file.
    """
    source = PythonLaunchDescriptionSource(PathJoinSubstitution([SHARE, 'launch', file]))
    return GroupAction(
        [IncludeLaunchDescription(source, launch_arguments=arguments.items())],
        condition=IfCondition(LaunchConfiguration(condition)),
    )


def joy(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """joy_node, when it is asked for, or can be had and is of use."""
    asked, device, mapping = (
        context.launch_configurations[name] for name in ('joy_node', 'device', 'mapping')
    )
    if asked == 'false' or (asked == 'auto' and (device != 'joy' or mapping == 'spacemouse')):
        return []
    try:
        get_package_share_directory('joy')
    except PackageNotFoundError:
        if asked == 'true':
            raise RuntimeError('joy_node:=true needs the package joy, which is not installed') from None
        return [LogInfo(msg='the package joy is not installed: sensor_msgs/Joy must come from elsewhere')]
    return [
        Node(
            package='joy',
            executable='joy_node',
            namespace=LaunchConfiguration('namespace'),
            # A stick that is held still must go on being heard.
            parameters=[{'autorepeat_rate': 50.0}],
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start operator and recorder, and what else is asked for."""
    teleop = Node(
        package='decoupled_policy_ros',
        executable='teleop_node',
        name='teleop_node',
        namespace=LaunchConfiguration('namespace'),
        output='screen',
        sigterm_timeout='10',
        condition=IfCondition(NotEqualsSubstitution(LaunchConfiguration('device'), 'keyboard')),
        parameters=[
            LaunchConfiguration('params_file'),
            {name: value(name, str) for name in ('robot', 'device', 'mapping')},
            # The simulator waits for each command: a slow machine makes a slow simulation, never a wrong one.
            {'use_sim_time': value('use_sim_time', bool), 'lockstep': value('use_sim', bool)},
        ],
    )
    everywhere = {name: LaunchConfiguration(name) for name in ('robot', 'namespace')}
    recorder = include(
        'record_episodes.launch.py',
        'record',
        **everywhere,
        **{name: LaunchConfiguration(name) for name in ('output_dir', 'instruction', 'use_sim_time')},
        params_file=LaunchConfiguration('recorder_params_file'),
    )
    simulator = include(
        'sim.launch.py',
        'use_sim',
        **everywhere,
        task=LaunchConfiguration('sim_task'),
        seed=LaunchConfiguration('seed'),
        params_file=PathJoinSubstitution([SHARE, 'config', 'sim_robot_node.yaml']),
        rviz='false',
    )
    by_hand = LogInfo(
        msg=[
            'device keyboard: run teleop_node in a terminal, ',
            'ros2 run decoupled_policy_ros teleop_node --ros-args -p device:=keyboard -p robot:=',
            LaunchConfiguration('robot'),
            ' -p use_sim_time:=',
            LaunchConfiguration('use_sim_time'),
            ' -p lockstep:=',
            LaunchConfiguration('use_sim'),
            ' -r __ns:=',
            PathJoinSubstitution(['/', LaunchConfiguration('namespace')]),
        ],
        condition=IfCondition(EqualsSubstitution(LaunchConfiguration('device'), 'keyboard')),
    )
    # The operator last: what ends the launch must not find it running, for launch would leave it behind.
    others = [by_hand, OpaqueFunction(function=joy), recorder, simulator]
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=require), *others, teleop])
