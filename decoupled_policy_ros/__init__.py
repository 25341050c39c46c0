"""Decoupled visuomotor policies for ROS 2 arms: one frozen action backbone, small task files."""

__version__ = '0.1.0'
