"""Where files lie: in the source tree, in an installed share folder, or in another package.

No ROS import: the ament index is a folder layout below the prefixes of AMENT_PREFIX_PATH, so a plain
path look-up is enough.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from decoupled_policy_ros.errors import ConfigError

PACKAGE = 'decoupled_policy_ros'


def ament_share(package: str) -> Path | None:
    """The share folder of a ROS package in the ament index of this environment, or None."""
    for prefix in filter(None, os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep)):
        if (Path(prefix) / 'share/ament_index/resource_index/packages' / package).is_file():
            return Path(prefix) / 'share' / package
    return None


def share_folders() -> list[Path]:
    """Folders that may hold this package's config/, launch/ and models/, best first.

    A source tree wins over an installation, so that an edit in a checkout takes effect.
    """
    candidates = [
        Path(__file__).resolve().parents[2],
        ament_share(PACKAGE),
        Path(sys.prefix) / 'share' / PACKAGE,
    ]
    return [folder for folder in candidates if folder is not None and (folder / 'config/robots').is_dir()]


def resolve_uri(uri: str, relative_to: Path) -> Path:
    """Path of `uri`: absolute, relative to the folder `relative_to`, or ``package://<package>/<path>``.

    A package is looked for in the ament index first, then among Python packages (which are found,
    not imported).

    Raises:
        ConfigError: the package is not installed.
    """
    if not uri.startswith('package://'):
        return (relative_to / uri).resolve()
    package, _, inside = uri.removeprefix('package://').partition('/')
    share = ament_share(package)
    if share is not None and (share / inside).exists():
        return share / inside
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f'{uri!r} needs the package {package!r}, which is neither in the ament index nor an installed '
            f'Python package'
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside
