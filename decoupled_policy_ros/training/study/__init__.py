"""Studies: a grid of backbones, recipes, tasks and seeds, trained, evaluated and tabulated."""

from decoupled_policy_ros.training.study.config import StudyConfig, load_study
from decoupled_policy_ros.training.study.run import run_studies
from decoupled_policy_ros.training.study.tables import insert_table, require_place, write_results

__all__ = ['StudyConfig', 'insert_table', 'load_study', 'require_place', 'run_studies', 'write_results']
