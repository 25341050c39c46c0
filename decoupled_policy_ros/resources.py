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
    valid = f"{folder} holds {', '.join(siblings)}" if siblings else f'{folder} does not exist or is empty'
    raise ConfigError(f"'{relative}' is not part of {share}; {valid}")


def _candidates(package: Path) -> list[Path]:
    """List the folders that may be the share folder of the Python package at `package`, best first."""
    candidates = []
    source = package.parent
    if (source / 'package.xml').is_file():
        candidates.append(source)
    # <prefix>/lib/python3.X/site-packages/<package>, or dist-packages on Debian and Ubuntu.
    if package.parent.name in ('site-packages', 'dist-packages') and len(package.parents) > 3:
        candidates.append(package.parents[3] / 'share' / PACKAGE)
    prefixes = [prefix for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]
    candidates += [Path(prefix) / 'share' / PACKAGE for prefix in [*prefixes, sys.prefix]]
    return candidates
