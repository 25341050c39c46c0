"""Where config/, models/ and launch/ are, whichever way the package was installed.

Four layouts exist, and one rule holds for all: the files come from where the running code comes from, so
that an edited source tree never reads an older installed copy. Searched in this order:

1. the source tree: the folder that holds both this Python package and its package.xml
   (a clone, `pip install -e`, `colcon build --symlink-install`);
2. the prefix into which this very package was installed (`colcon build`, `pip install`, `pip install --user`);
3. every prefix in AMENT_PREFIX_PATH, ROS 2's list of installed places;
4. `sys.prefix`, the running Python's own.

No ROS is needed for any of it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from decoupled_policy_ros.errors import ConfigError

PACKAGE = 'decoupled_policy_ros'


def share_dir() -> Path:
    """Return the folder that holds config/, models/ and launch/.

    Raises:
        ConfigError: no candidate holds a `config` folder; the message lists where it was looked for.
    """
    candidates = _candidates(Path(__file__).resolve().parent)
    for candidate in candidates:
        if (candidate / 'config').is_dir():
            return candidate
    looked = ', '.join(str(candidate) for candidate in candidates)
    raise ConfigError(f"no share folder of '{PACKAGE}' with a config/ inside; looked in: {looked}")


def find(relative: str | os.PathLike[str]) -> Path:
    """Return the existing path of a shipped file or folder such as `config/robots/fr3.yaml`.

    An absolute path is returned as it is, if it exists.

    Raises:
        ConfigError: it does not exist; the message names its siblings that do.
    """
    share = share_dir()
    path = share / relative
    if path.exists():
        return path
    folder = path.parent
    siblings = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    valid = f'{folder} holds {", ".join(siblings)}' if siblings else f'{folder} does not exist or is empty'
    raise ConfigError(f"'{relative}' is not part of {share}; {valid}")


def resolve_uri(uri: str, relative_to: Path) -> Path:
    """Path of `uri`: absolute, relative to the folder `relative_to`, or ``package://<package>/<path>``.

    A package is looked for in the ament index first, then among Python packages (which are found,
    not imported).

    Raises:
        ConfigError: the package is not installed, or is a ROS package without that file.
    """
    if not uri.startswith('package://'):
        return (relative_to / uri).resolve()
    package, _, inside = uri.removeprefix('package://').partition('/')
    share = _ament_share(package)
    if share is not None and (share / inside).exists():
        return share / inside
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        if share is not None:
            raise ConfigError(f'{uri!r}: there is no {inside!r} in {share}')
        raise ConfigError(
            f'{uri!r} needs the package {package!r}, which is neither in the ament index nor an installed '
            f'Python package'
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _candidates(package: Path) -> list[Path]:
    """List the folders that may be the share folder of the Python package at `package`, best first."""
    candidates = []
    source = package.parent
    if (source / 'package.xml').is_file():
        candidates.append(source)
    # <prefix>/lib/python3.X/site-packages/<package>, or dist-packages on Debian and Ubuntu.
    if package.parent.name in ('site-packages', 'dist-packages') and len(package.parents) > 3:
        candidates.append(package.parents[3] / 'share' / PACKAGE)
    candidates += [prefix / 'share' / PACKAGE for prefix in [*_ament_prefixes(), Path(sys.prefix)]]
    return candidates


def _ament_share(package: str) -> Path | None:
    """Find the share folder of a ROS package in the ament index, a folder layout that needs no ROS to be read."""
    for prefix in _ament_prefixes():
        if (prefix / 'share/ament_index/resource_index/packages' / package).is_file():
            return prefix / 'share' / package
    return None


def _ament_prefixes() -> list[Path]:
    return [Path(prefix) for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]
