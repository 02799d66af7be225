# %% [markdown]
# # Matching two images
#
# Keypoints of two photographs of one scene, and an optimal matching between them: every
# keypoint goes to its partner, or to a dustbin. The pair comes with scikit-image, and
# its disparity says which matches are right.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from skimage import color, data, feature

from asap_jax import matching

left, right, disparity = data.stereo_motorcycle()
left.shape, f"disparities up to {disparity[np.isfinite(disparity)].max():.0f} pixels"

# %% [markdown]
# ## Descriptors
#
# SIFT finds keypoints and describes each by 128 numbers. Roots of their shares are unit
# vectors, whose products are near one for partners.

# %%
random = np.random.default_rng(0)


def keypoints(image, count=1500):
  sift = feature.SIFT()
  sift.detect_and_extract(color.rgb2gray(image))
  chosen = random.permutation(len(sift.positions))[:count]
  sums = sift.descriptors[chosen].astype(np.float32)
  return sift.positions[chosen], np.sqrt(sums / sums.sum(-1, keepdims=True))


(places, query), (other_places, key) = keypoints(left), keypoints(right)
row, column = np.round(places).astype(int).T
moved = places - np.stack([0 * places[:, 0], disparity[row, column]], -1)
apart = np.linalg.norm(moved[:, None] - other_places[None], axis=-1)
same = apart < 3  # NaN, where the disparity is not known, is nobody's partner
f"{same.any(1).sum()} of {len(query)} keypoints have a partner"

# %% [markdown]
# ## What no match is worth
#
# Temperature and dustbin are learned from the pairs of the upper half of the image: the
# log plan at partners, and at the dustbins of keypoints that have none, is to be large.

# %%
upper, other_upper = places[:, 0] < 250, other_places[:, 0] < 250
known = same[upper][:, other_upper]
targets = np.zeros((upper.sum() + 1, other_upper.sum() + 1), np.float32)
targets[:-1, :-1] = known / np.maximum(known.sum(1, keepdims=True), 1)
targets[:-1, -1], targets[-1, :-1] = ~known.any(1), ~known.any(0)
seen = jnp.asarray(query[upper]), jnp.asarray(key[other_upper])
layer = matching.OptimalMatching(temperature=0.05, dustbin=20.0, iterations=5)
optimizer = nnx.Optimizer(layer, optax.adam(0.1), wrt=nnx.Param)


@nnx.jit
def step(layer, optimizer):
  def loss(layer):
    return -(layer(*seen) * targets).sum() / targets.sum()

  value, slopes = nnx.value_and_grad(loss)(layer)
  optimizer.update(layer, slopes)
  return value


losses = [float(step(layer, optimizer)) for _ in range(150)]
temperature, dustbin = jnp.exp(layer.log_temperature[...]), layer.dustbin[...]
print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}")
print(f"temperature {temperature:.3f}, dustbin {dustbin:.1f}")

# %% [markdown]
# ## Matches of the lower half
#
# Green ones are right by the disparity, red ones are not, or nobody knows.

# %%
lower, other_lower = ~upper, ~other_upper
points, other_points = places[lower], other_places[other_lower]
unseen = jnp.asarray(query[lower]), jnp.asarray(key[other_lower])
right_ones = same[lower][:, other_lower]


def judged(log_plan, threshold=0.1):
  found = np.asarray(matching.matches(log_plan, threshold).key)
  pairs = np.flatnonzero(found >= 0)
  return pairs, found[pairs], right_ones[pairs, found[pairs]]


pairs, partners, are_right = judged(layer(*unseen))
figure, axes = plt.subplots(figsize=(11, 4))
axes.imshow(np.concatenate([left, right], 1))
for is_right, colour in ((True, "lime"), (False, "red")):
  drawn = are_right == is_right
  start, end = points[pairs[drawn]], other_points[partners[drawn]]
  lines = [start[:, 1], end[:, 1] + left.shape[1]], [start[:, 0], end[:, 0]]
  axes.plot(*lines, color=colour, linewidth=0.6)
axes.axis("off")
axes.set_title(f"{are_right.sum()} right matches, {(~are_right).sum()} others")
figure.tight_layout()

# %% [markdown]
# ## Fewer iterations
#
# How far the sums of columns are from what they are to be, after each iteration: from
# zero, from Gaussians, and from the dustbin's own equation, which is the default.

# %%
options = {"temperature": float(temperature), "dustbin": float(dustbin)}
counts = [1, 2, 3, 5, 8, 12]
target = np.r_[np.ones(other_lower.sum()), lower.sum()]


def errors(start):
  for count in counts:
    log_plan = matching.sinkhorn_matching(
      *unseen, iterations=count, start=start, **options
    )
    yield float(np.abs(np.exp(log_plan).sum(0) / target - 1).mean())


figure, axes = plt.subplots(figsize=(5, 3.2))
for start in ("zero", "gaussian", "dustbin"):
  axes.semilogy(counts, list(errors(start)), marker="o", label=start)
axes.set(xlabel="iterations", ylabel="column error")
axes.legend()
figure.tight_layout()

# %%
for count in (1, 100):
  plan = matching.sinkhorn_matching(*unseen, iterations=count, **options)
  pairs, _, are_right = judged(plan)
  print(f"{count} iterations: {are_right.sum()} of {len(pairs)} matches are right")
