"""Which recordings there are to convert, and what is written beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decoupled_policy_ros.data.bags.episodes import EPISODE_FILE, PARTIAL, read_episode
from decoupled_policy_ros.data.bags.reader import is_bag
from decoupled_policy_ros.data.bags.unended import RECOVERED_SUFFIX, recording_files, unended
from decoupled_policy_ros.errors import DatasetError, DecoupledPolicyError
from decoupled_policy_ros.observation.contract import ObservationContract
from decoupled_policy_ros.robot.fingerprint import Fingerprint


def expand(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Recordings in the order given, those of a folder of recordings sorted; and what is left out there, and why.

    Raises:
        DatasetError: a folder holds none, or one is given twice.
    """
    found: list[Path] = []
    left_out: list[str] = []
    for path in paths:
        if is_bag(path) or not path.is_dir() or recording_files(path):
            found.append(path)  # what is no bag after all is refused when it is opened
            continue
        reasons = {entry: _unusable(entry) for entry in sorted(path.iterdir())}
        unusable = [reason for reason in reasons.values() if reason]
        inside = [entry for entry, reason in reasons.items() if reason == '' and is_bag(entry)]
        if not inside:
            nothing = f'{path} is no bag and has none in it' + ''.join(
                f'; {reason}' for reason in unusable[:1]
            )
            raise DatasetError(unended(path) or nothing)  # packed files have their reason
        found += inside
        left_out += unusable
    places = [path.resolve() for path in found]
    twice = sorted({str(path) for path, place in zip(found, places, strict=True) if places.count(place) > 1})
    if twice:
        raise DatasetError(f'{", ".join(twice)}: the same recording is given twice')
    return found, left_out


def _unusable(entry: Path) -> str | None:
    """Why something in a folder of recordings is left out, with what helps; '' where it isn't, None if it is hidden."""
    if PARTIAL.fullmatch(entry.name):
        return f'{entry}: unfinished; `decoupled-policy recover` completes it'
    if entry.name.startswith('.'):
        return None
    recovered = entry.with_name(entry.name + RECOVERED_SUFFIX)
    try:
        if not entry.is_dir():
            return ''
        if is_bag(recovered) and (is_bag(entry) or recording_files(entry)):
            return f'{entry}: what could be read of it is in {recovered.name}'
        if not is_bag(entry) and any(map(is_bag, entry.iterdir())) and not recording_files(entry):
            return f'{entry}: a folder of recordings in the folder; give it too'
        return unended(entry)
    except OSError as error:
        return f'{entry} can not be read: {error.strerror or error}'


def episodes_of(found: list[Path]) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """What is written beside each recording, and the problems of those where that is damaged.

    Raises:
        DatasetError: a recording does not exist.
    """
    episodes: dict[Path, dict[str, Any]] = {}
    damaged: dict[Path, str] = {}
    for path in found:
        if not path.exists():
            raise DatasetError(f'{path} does not exist; expected a rosbag2 folder, or an .mcap or .db3 file')
        folder = path if path.is_dir() else path.parent
        try:
            episode = read_episode(folder) or {}
            _require_readable(episode, folder)
            episodes[path] = episode
        except DatasetError as error:
            damaged[path] = str(error)
    return episodes, damaged


def _require_readable(episode: dict[str, Any], folder: Path) -> None:
    try:
        if 'fingerprint' in episode:
            Fingerprint.from_dict(episode['fingerprint'])
        if 'contract' in episode:
            ObservationContract.from_dict(episode['contract'])
    except (DecoupledPolicyError, TypeError, ValueError) as error:
        raise DatasetError(f'{folder / EPISODE_FILE} is damaged: {error}') from error
