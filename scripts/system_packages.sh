#!/usr/bin/env bash
# Find which system packages this machine lacks. As root on Debian or Ubuntu install them; otherwise name them
# in one line and fail. PYTHON is the interpreter that .venv is made of, ROS the distribution that is sourced, if any.
set -euo pipefail
python=${PYTHON:-python3}
missing=()

have_library() { "$python" -c "import ctypes; ctypes.CDLL('$1')" 2>/dev/null; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "needs Python 3.10 or newer; $("$python" --version) is $python (choose another with PYTHON=...)" >&2; exit 1; }

# Off-screen rendering of the simulator; any one driver behind EGL will do.
have_library libEGL.so.1 || missing+=(libegl1)
have_library libEGL_nvidia.so.0 || have_library libEGL_mesa.so.0 || missing+=(libegl-mesa0)
# What the opencv-python wheel links against.
have_library libGL.so.1 || missing+=(libgl1)
have_library libgthread-2.0.so.0 || missing+=(libglib2.0-0)
# robosuite needs pynput needs evdev, which comes as source: a compiler and Python's headers.
command -v cc >/dev/null || missing+=(gcc libc6-dev)
"$python" -c 'import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())' ||
    missing+=(python3-dev)
# Debian and Ubuntu package venv and pip apart from Python.
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)

# ROS's own Pinocchio fits the NumPy that ROS was built with; the one of PyPI does not.
[ -z "${ROS:-}" ] || "$python" -c 'import pinocchio' 2>/dev/null || missing+=("ros-$ROS-pinocchio")

if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    echo "installing system packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
    echo "system packages are missing, install them with: sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
