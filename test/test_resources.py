"""config/ and models/ are found from where the running code lives, in every layout."""

import shutil
from pathlib import Path

import pytest

from decoupled_policy_ros import resources
from decoupled_policy_ros.errors import ConfigError


def installed(prefix: Path, python: str = 'lib/python3.11/site-packages') -> Path:
    """Lay out an installed package below a prefix; return its Python package folder."""
    package = prefix / python / resources.PACKAGE
    package.mkdir(parents=True)
    (prefix / 'share' / resources.PACKAGE / 'config').mkdir(parents=True)
    return package


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Let the resources module believe that it lives in the package folder given to it."""

    def move(package: Path) -> None:
        monkeypatch.setattr(resources, '__file__', str(package / 'resources.py'))

    monkeypatch.delenv('AMENT_PREFIX_PATH', raising=False)
    monkeypatch.setattr('sys.prefix', str(tmp_path / 'no_such_prefix'))
    return move


def test_source_tree_reads_its_own_files(repository):
    assert resources.share_dir() == repository
    assert resources.find('config/robots/panda_sim.yaml') == repository / 'config/robots/panda_sim.yaml'


def test_absolute_path_is_left_alone(tmp_path):
    assert resources.find(tmp_path) == tmp_path


def test_missing_file_names_its_siblings():
    with pytest.raises(ConfigError, match=r"'config/robots/nobody.yaml'.*panda_sim.yaml"):
        resources.find('config/robots/nobody.yaml')


def test_missing_folder_says_so():
    with pytest.raises(ConfigError, match='no_such_folder does not exist'):
        resources.find('no_such_folder/file.yaml')


def test_a_ros_package_without_the_file_is_named(tmp_path, monkeypatch):
    """Such as one that ships xacro in place of the URDF."""
    index = tmp_path / 'share' / 'ament_index' / 'resource_index' / 'packages'
    index.mkdir(parents=True)
    (index / 'an_arm_description').touch()
    (tmp_path / 'share' / 'an_arm_description').mkdir()
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no 'urdf/arm.urdf' in .*an_arm_description"):
        resources.resolve_uri('package://an_arm_description/urdf/arm.urdf', tmp_path)


@pytest.mark.parametrize('python', ['lib/python3.12/site-packages', 'local/lib/python3.10/dist-packages'])
def test_installed_package_reads_the_share_of_its_own_prefix(tmp_path, elsewhere, monkeypatch, python):
    other, own = tmp_path / 'other', tmp_path / 'own'
    installed(other)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(other))
    elsewhere(installed(own / 'local' if python.startswith('local') else own, python.removeprefix('local/')))
    prefix = own / 'local' if python.startswith('local') else own
    assert resources.share_dir() == prefix / 'share' / resources.PACKAGE


def test_source_tree_wins_over_an_installed_copy(tmp_path, elsewhere, monkeypatch, repository):
    installed(tmp_path / 'old')
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path / 'old'))
    tree = tmp_path / 'tree'
    (tree / resources.PACKAGE).mkdir(parents=True)
    (tree / 'config').mkdir()
    shutil.copy(repository / 'package.xml', tree)
    elsewhere(tree / resources.PACKAGE)
    assert resources.share_dir() == tree


def test_ament_prefixes_are_searched_in_their_order(tmp_path, elsewhere, monkeypatch):
    elsewhere(tmp_path / 'zipped' / resources.PACKAGE)
    installed(tmp_path / 'second')
    monkeypatch.setenv('AMENT_PREFIX_PATH', f'{tmp_path / "first"}:{tmp_path / "second"}')
    assert resources.share_dir() == tmp_path / 'second' / 'share' / resources.PACKAGE


def test_nowhere_lists_where_it_looked(tmp_path, elsewhere, monkeypatch):
    elsewhere(tmp_path / 'zipped' / resources.PACKAGE)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path / 'first'))
    with pytest.raises(ConfigError, match=f'{tmp_path / "first"}.*{tmp_path / "no_such_prefix"}'):
        resources.share_dir()
