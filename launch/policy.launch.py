"""A policy on an arm: the policy node, with the simulated arm and RViz on request.

On a real arm:    ros2 launch decoupled_policy_ros policy.launch.py robot:=fr3 task:=<your task>
In simulation:    ros2 launch decoupled_policy_ros policy.launch.py use_sim:=true
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, GroupAction, IncludeLaunchDescription, OpaqueFunction
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
        'task', default_value='lift', description='Name in models/tasks, or a task folder.'
    ),
    DeclareLaunchArgument(
        'backbone',
        default_value='',
        description='Name or folder of a backbone; empty: the one the task names.',
    ),
    DeclareLaunchArgument(
        'instruction',
        default_value='',
        description='What to do, in words; empty: the only instruction that the task was trained on.',
    ),
    DeclareLaunchArgument(
        'device', default_value='cpu', description='Where the network runs: cpu, cuda, cuda:1, ...'
    ),
    DeclareLaunchArgument(
        'autostart',
        choices=SWITCH,
        default_value='true',
        description='Configure and activate at once; false: ros2 lifecycle does.',
    ),
    DeclareLaunchArgument(
        'enabled',
        choices=SWITCH,
        default_value='true',
        description='Command right after activation; false: ~/enable is waited for.',
    ),
    DeclareLaunchArgument(
        'guard',
        choices=SWITCH,
        default_value='true',
        description='Check every chunk against the limits of the arm.',
    ),
    DeclareLaunchArgument(
        'guard_file', default_value='', description="The guard's settings; empty: its defaults."
    ),
    DeclareLaunchArgument(
        'shadow',
        choices=SWITCH,
        default_value='false',
        description='Somebody else moves the arm: command nothing, show where the policy would have gone.',
    ),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([SHARE, 'config', 'policy_node.yaml']),
        description="The policy node's other parameters.",
    ),
    DeclareLaunchArgument(
        'use_sim',
        choices=SWITCH,
        default_value='false',
        description='Start the simulated arm too, in step with the policy.',
    ),
    DeclareLaunchArgument(
        'sim_task', default_value='lift', description='What to simulate, whatever the task is.'
    ),
    DeclareLaunchArgument(
        'seed',
        default_value='0',
        description="Seed of the policy's noise and of the first simulated episode.",
    ),
    DeclareLaunchArgument(
        'use_sim_time',
        choices=SWITCH,
        default_value=LaunchConfiguration('use_sim'),
        description='Follow /clock, not the wall clock.',
    ),
    DeclareLaunchArgument(
        'namespace', default_value='', description='Namespace of the arm and of the policy node.'
    ),
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


def include(file: str, condition: str, **arguments: LaunchConfiguration | str) -> GroupAction:
    """Another launch file of this package, when the argument `condition` is true.

    In a group, so that its arguments don't become those of this file.
    """
    source = PythonLaunchDescriptionSource(PathJoinSubstitution([SHARE, 'launch', file]))
    return GroupAction(
        [IncludeLaunchDescription(source, launch_arguments=arguments.items())],
        condition=IfCondition(LaunchConfiguration(condition)),
    )


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start the policy node, and simulator and RViz on request."""
    policy = Node(
        package='decoupled_policy_ros',
        executable='policy_node',
        sigterm_timeout='10',  # a cycle that is being computed on a busy machine is waited for
        name='policy_node',
        namespace=LaunchConfiguration('namespace'),
        output='screen',
        parameters=[
            LaunchConfiguration('params_file'),
            {
                name: value(name, str)
                for name in ('robot', 'task', 'backbone', 'instruction', 'device', 'guard_file')
            },
            {name: value(name, bool) for name in ('autostart', 'enabled', 'guard', 'shadow', 'use_sim_time')},
            # The simulator waits for each command: a slow machine makes a slow simulation, never a wrong one.
            {'seed': value('seed', int), 'lockstep': value('use_sim', bool)},
        ],
    )
    robot, namespace = LaunchConfiguration('robot'), LaunchConfiguration('namespace')
    simulator = include(
        'sim.launch.py',
        'use_sim',
        robot=robot,
        task=LaunchConfiguration('sim_task'),
        seed=LaunchConfiguration('seed'),
        params_file=PathJoinSubstitution([SHARE, 'config', 'sim_robot_node.yaml']),
        namespace=namespace,
        rviz='false',
    )
    rviz = include(
        'rviz.launch.py',
        'rviz',
        robot=robot,
        use_sim_time=LaunchConfiguration('use_sim_time'),
        namespace=namespace,
    )
    # The policy last: what ends the launch must not find it running, for launch would leave it behind.
    return LaunchDescription([*ARGUMENTS, OpaqueFunction(function=require), rviz, simulator, policy])
