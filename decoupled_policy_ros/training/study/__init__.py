"""Studies: a grid of backbones, recipes, tasks and seeds, trained, evaluated and tabulated."""

from decoupled_policy_ros.training.study.config import StudyConfig, load_study
from decoupled_policy_ros.training.study.run import run_studies
from decoupled_policy_ros.training.study.tables import publish, require_place

__all__ = ['StudyConfig', 'load_study', 'publish', 'require_place', 'run_studies']
