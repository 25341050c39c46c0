"""A policy on a Franka Research 3 that franka_ros2 has brought up. As it is it commands nothing: a dry run.

    ros2 launch decoupled_policy_ros franka.launch.py task:=<your task>                    what would it do?
    ros2 launch decoupled_policy_ros franka.launch.py task:=<your task> dry_run:=false     do it

What it speaks to is in config/robots/fr3.yaml, relative to the namespace: joint_states, the trajectory controller's
fr3_arm_controller/joint_trajectory, the gripper's franka_gripper/gripper_action, the URDF on robot_description.
docs/outputs.md tells how to bring up the arm for each kind of output.
"""

from pathlib import Path

from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    ExecuteProcess,
    GroupAction,
    IncludeLaunchDescription,
    LogInfo,
    OpaqueFunction,
    RegisterEventHandler,
)
from launch.conditions import IfCondition
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.events.process import ProcessExited
from launch.launch_description_entity import LaunchDescriptionEntity
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

SHARE = FindPackageShare('decoupled_policy_ros')

#: Anything else is refused by launch before anything is started, and no arm moves by a misspelling.
SWITCH = {'true': True, 'True': True, 'false': False, 'False': False}

ARGUMENTS = [
    DeclareLaunchArgument(
        'dry_run',
        choices=list(SWITCH),
        default_value='true',
        description='Run the policy and publish ~/trajectory and ~/path, but command neither arm nor gripper, nor ask '
        'for what only that needs: control_msgs, the action of the gripper.',
    ),
    DeclareLaunchArgument(
        'shadow',
        choices=list(SWITCH),
        default_value='false',
        description='Somebody else moves the arm: command nothing, say how far it is from where the policy would be.',
    ),
    DeclareLaunchArgument(
        'output',
        choices=['joint_trajectory', 'pose', 'both'],
        default_value='joint_trajectory',
        description='What the arm is told unless it is a dry run: joint_trajectory; pose for CRISP; both.',
    ),
    DeclareLaunchArgument(
        'task', default_value='lift', description='Name in models/tasks, or a task folder; trained for fr3.'
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
        'robot',
        default_value='fr3',
        description='Name in config/robots, or a copy of fr3.yaml for your cell.',
    ),
    DeclareLaunchArgument(
        'joint_states',
        default_value='joint_states',
        description='Joint states of arm and fingers; franka/joint_states is faster, but without fingers.',
    ),
    DeclareLaunchArgument(
        'trajectory_action',
        choices=list(SWITCH),
        default_value='false',
        description='Send FollowJointTrajectory goals, not messages: the controller says what went wrong.',
    ),
    DeclareLaunchArgument(
        'gripper',
        default_value='action',
        description='How the gripper is told: action, topic, or auto for what is there.',
    ),
    DeclareLaunchArgument(
        'missing_server',
        default_value='hold',
        description='Without an action server that is commanded, or a listener to gripper:=topic: hold, or go_on.',
    ),
    DeclareLaunchArgument(
        'enabled',
        choices=list(SWITCH),
        default_value='true',
        description='Begin right after activation; false: ~/enable is waited for.',
    ),
    DeclareLaunchArgument(
        'guard_file', default_value='', description="The guard's settings; empty: its defaults."
    ),
    DeclareLaunchArgument(
        'params_file',
        default_value=PathJoinSubstitution([SHARE, 'config', 'policy_node.yaml']),
        description="The policy node's other parameters; output, gripper, missing_server and trajectory_action of a "
        'file give way to the arguments here.',
    ),
    DeclareLaunchArgument(
        'recover',
        choices=list(SWITCH),
        default_value='false',
        description='First ask franka_ros2 for error recovery, as after a reflex; needs franka_msgs and ros2cli.',
    ),
    DeclareLaunchArgument(
        'namespace', default_value='', description='Namespace of the arm and of the policy node.'
    ),
    DeclareLaunchArgument(
        'use_sim_time',
        choices=list(SWITCH),
        default_value='false',
        description='Follow /clock: the arm is simulated.',
    ),
    DeclareLaunchArgument(
        'rviz', choices=list(SWITCH), default_value='false', description='Start RViz with config/policy.rviz.'
    ),
]


def require(context: LaunchContext) -> None:
    """Refuse what launch would pass over."""
    if not Path(path := context.launch_configurations['params_file']).is_file():
        raise RuntimeError(f'params_file must be a file, got {path!r}')


def recovered(event: ProcessExited, node: Node) -> list[LaunchDescriptionEntity]:
    """What follows error recovery: the policy, or the end where that failed."""
    if event.returncode == 0:
        return [node]
    reason = 'error recovery failed: the policy is not started'
    return [LogInfo(msg=reason), EmitEvent(event=Shutdown(reason=reason))]


def policy(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The policy node, and error recovery before it on request."""
    asked = context.launch_configurations
    dry = SWITCH[asked['dry_run']]
    names = ('robot', 'task', 'backbone', 'instruction', 'device', 'guard_file', 'missing_server')
    node = Node(
        package='decoupled_policy_ros',
        executable='policy_node',
        sigterm_timeout='10',  # a cycle that is being computed on a busy machine is waited for
        name='policy_node',
        namespace=asked['namespace'],
        output='screen',
        remappings=[('joint_states', asked['joint_states'])],
        parameters=[
            asked['params_file'],
            {name: ParameterValue(asked[name], value_type=str) for name in names},
            {
                name: SWITCH[asked[name]]
                for name in ('enabled', 'use_sim_time', 'trajectory_action', 'shadow')
            },
            {'output': 'none' if dry else asked['output'], 'gripper': 'auto' if dry else asked['gripper']},
            {'autostart': True, 'guard': True, 'lockstep': False},
        ],
    )
    if not SWITCH[asked['recover']]:
        return [node]
    server = '/'.join(['', *filter(None, asked['namespace'].split('/')), 'action_server/error_recovery'])
    goal = ['ros2', 'action', 'send_goal', server, 'franka_msgs/action/ErrorRecovery', '{}']
    recovery = ExecuteProcess(cmd=goal, output='screen')
    follow = OnProcessExit(target_action=recovery, on_exit=lambda event, _: recovered(event, node))
    return [RegisterEventHandler(follow), recovery]


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments, start the policy node, and RViz on request."""
    file = PythonLaunchDescriptionSource(PathJoinSubstitution([SHARE, 'launch', 'rviz.launch.py']))
    arguments = {name: LaunchConfiguration(name) for name in ('robot', 'use_sim_time', 'namespace')}
    rviz = GroupAction(
        [IncludeLaunchDescription(file, launch_arguments=arguments.items())],
        condition=IfCondition(LaunchConfiguration('rviz')),
    )
    # The policy last: what ends the launch must not find it running, for launch would leave it behind.
    return LaunchDescription(
        [*ARGUMENTS, OpaqueFunction(function=require), rviz, OpaqueFunction(function=policy)]
    )
