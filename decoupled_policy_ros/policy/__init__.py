"""From an observation to a denoised chunk: encoders, conditioning, backbone, diffusion, files."""

from decoupled_policy_ros.policy.checkpoint import (
    load_backbone,
    load_policy,
    load_task,
    save_backbone,
    save_task,
)
from decoupled_policy_ros.policy.policy import Backbone, Policy, Task

__all__ = [
    'Backbone',
    'Policy',
    'Task',
    'load_backbone',
    'load_policy',
    'load_task',
    'save_backbone',
    'save_task',
]
