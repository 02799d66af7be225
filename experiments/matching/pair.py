"""Keypoints of a stereo pair whose disparity is known, from scikit-image.

The pair is "Motorcycle" of Middlebury's stereo data sets (Scharstein et al., 2014), a
quarter of its size, which comes with scikit-image.
"""

from typing import NamedTuple

import numpy as np

# Pixels between a keypoint and where the disparity puts it.
NEAR = 3.0


class Keypoints(NamedTuple):
  """Keypoints of an image.

  Attributes:
    positions: row and column, `[n, 2]`.
    descriptors: roots of SIFT's, which have unit length (Arandjelovic and Zisserman,
      2012), `[n, 128]`.
  """

  positions: np.ndarray
  descriptors: np.ndarray

  def taken(self, places: np.ndarray) -> "Keypoints":
    """Some of them."""
    return Keypoints(self.positions[places], self.descriptors[places])


class Pair(NamedTuple):
  """Keypoints of both images, and how far things move from left to right.

  Attributes:
    left: of the left image.
    right: of the right one.
    moved: rows and columns of the left keypoints in the right image, `[n, 2]`, NaN
      where the disparity is not known.
    rows: of the images.
  """

  left: Keypoints
  right: Keypoints
  moved: np.ndarray
  rows: int

  def half(self, lower: bool) -> "Pair":
    """Keypoints of the upper or of the lower half: rows are the same in both images."""
    middle = self.rows / 2
    left, right = (
      np.flatnonzero((each.positions[:, 0] >= middle) == lower)
      for each in (self.left, self.right)
    )
    return Pair(
      self.left.taken(left), self.right.taken(right), self.moved[left], self.rows
    )

  def drawn(self, points: int, random: np.random.Generator) -> "Pair":
    """So many keypoints of either image, at random."""
    left, right = (
      random.permutation(len(each.positions))[:points]
      for each in (self.left, self.right)
    )
    return Pair(
      self.left.taken(left), self.right.taken(right), self.moved[left], self.rows
    )

  @property
  def same(self) -> np.ndarray:
    """Which keypoints are one, `[n, m]`."""
    return self.distances <= NEAR

  @property
  def distances(self) -> np.ndarray:
    """Of keypoints in the right image, `[n, m]`; infinite where nothing is known."""
    apart = self.moved[:, None] - self.right.positions[None]
    return np.nan_to_num(np.linalg.norm(apart, axis=-1), nan=np.inf)

  @property
  def targets(self) -> np.ndarray:
    """What a plan should hold, dustbins last, `[n + 1, m + 1]`.

    Of several keypoints in one place only those that are each other's nearest pair.
    """
    far, same = self.distances, self.same
    nearest = far.argmin(1)
    rows = np.arange(len(far))
    mutual = (far.argmin(0)[nearest] == rows) & same[rows, nearest]
    wanted = np.zeros((far.shape[0] + 1, far.shape[1] + 1), np.float32)
    wanted[rows[mutual], nearest[mutual]] = 1.0
    wanted[:-1, -1], wanted[-1, :-1] = ~same.any(1), ~same.any(0)
    return wanted


def load_pair() -> Pair:
  """The keypoints of the motorcycle.

  Raises:
    ImportError: without scikit-image.
  """
  from skimage.data import stereo_motorcycle

  left, right, disparity = stereo_motorcycle()
  found = keypoints(left), keypoints(right)
  return Pair(*found, moved_by(disparity, found[0].positions), left.shape[0])


def keypoints(image: np.ndarray) -> Keypoints:
  """SIFT's keypoints of an image in colours; of several in one place the first."""
  from skimage.color import rgb2gray
  from skimage.feature import SIFT

  sift = SIFT()
  sift.detect_and_extract(rgb2gray(image))
  positions = np.round(np.asarray(sift.positions), 3)
  _, first = np.unique(positions, axis=0, return_index=True)
  first = np.sort(first)
  sums = np.asarray(sift.descriptors, np.float32)[first]
  sums /= sums.sum(-1, keepdims=True)
  return Keypoints(positions[first], np.sqrt(sums))


def moved_by(disparity: np.ndarray, positions: np.ndarray) -> np.ndarray:
  """Where points of the left image are in the right one, NaN where nobody knows."""
  most = np.array(disparity.shape) - 1
  row, column = np.clip(np.round(positions).astype(int), 0, most).T
  by = disparity[row, column]
  moved = positions.copy()
  moved[:, 1] -= np.where(np.isfinite(by), by, np.nan)
  return moved
