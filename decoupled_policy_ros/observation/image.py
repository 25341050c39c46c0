"""The one resize of this package, used live and offline alike."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from decoupled_policy_ros.errors import MessageError


def fit_image(rgb: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize an image (h, w, 3) uint8 to `size` = (H, W); the whole view is kept, its aspect may change.

    Shrinking averages over pixel areas, so that fine texture does not alias; enlarging is bilinear. An image
    of the right size is returned as it is.

    Raises:
        MessageError: the image is not (h, w, 3) uint8.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise MessageError(f'expected a colour image (h, w, 3) of uint8, got {rgb.shape} of {rgb.dtype}')
    if rgb.shape[:2] == tuple(size):
        return rgb
    height, width = size
    shrinks = height <= rgb.shape[0] and width <= rgb.shape[1]
    return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
