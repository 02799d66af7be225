# %% [markdown]
# # Differentiable prototyping
#
# Potentials, closures and duals are pure functions of arrays: they work under `jit`,
# `vmap` and `grad`, and know nothing of attention. This notebook learns a direction,
# lets points flow, and carries the colours of one photograph to another.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ott.geometry import pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear.sinkhorn import Sinkhorn
from sklearn.datasets import load_sample_image

import asap_jax
from asap_jax import plotting
from asap_jax.compiler.fitting.objective import dual_objective

# %% [markdown]
# ## A direction that learns
#
# Two clouds in the plane, alike along one direction and unlike along another. The
# transport cost of their projections comes from exact potentials, and its gradient in
# the direction flows through the sort. Ascent finds the direction along which the
# clouds differ most (the max-sliced distance of Deshpande et al., 2019).

# %%
keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (100, 2)) * jnp.array([1.0, 0.5])
side = jax.random.bernoulli(keys[1], 0.5, (100, 1)) * 2.0 - 1.0
y = x[:, ::-1] * 0.6 + side * jnp.array([1.5, 0.8])
plotting.plot_clouds({"x": x, "y": y}).figure


# %%
def sliced_cost(angle):
  """Transport cost |x - y|^2 / 2 of the projections, exact."""
  direction = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
  found = asap_jax.kantorovich_potentials(x @ direction, y @ direction, cost="squared")
  return found.phi.mean() + found.psi.mean()


angles = jnp.linspace(-0.5 * jnp.pi, 0.5 * jnp.pi, 91)
costs = jax.vmap(sliced_cost)(angles)

# %%
step = jax.jit(jax.value_and_grad(sliced_cost))
angle, path = jnp.array(-0.5), []
for _ in range(20):
  cost, slope = step(angle)
  path.append((angle, cost))
  angle = angle + 0.5 * slope

curves = {"all angles": (angles, costs), "ascent": tuple(np.transpose(path))}
labels = {"xlabel": "angle, radians", "ylabel": "sliced transport cost"}
plotting.plot_curves(curves, **labels).figure

# %% [markdown]
# The gradient is that of the cost, which is smooth but where two points change places:
# it agrees with finite differences.

# %%
gap = 1e-3
for at in (-0.5, 0.0, 1.0):
  difference = (sliced_cost(at + gap) - sliced_cost(at - gap)) / (2 * gap)
  print(f"angle {at:4}: gradient {step(at)[1]:.4f}, difference {difference:.4f}")

# %% [markdown]
# ## Points that flow
#
# The entropic cost of matching two clouds: a dual from sliced potentials (nothing
# learned), three closures, and the dual objective. Less half the cost of matching x to
# itself, which takes entropy's bias away, it is the Sinkhorn divergence (Genevay et
# al., 2018). Its gradient in the points moves them onto the other cloud.

# %%
EPSILON = 0.2


def entropic_cost(x, y):
  """Cost |x - y|^2 with entropy, from below, after three closures."""
  query = 2.0 * x / EPSILON
  logits = query @ y.T
  f = asap_jax.closures(logits, asap_jax.potentials.sliced_start(query, y), 3).f
  value = EPSILON * dual_objective(logits, f) / len(x)
  return value + (x**2).sum(-1).mean() + (y**2).sum(-1).mean()


def divergence(points):
  """From y, up to a constant."""
  return entropic_cost(points, y) - entropic_cost(points, points) / 2


flow = optax.adam(0.05)


@jax.jit
def flow_step(carry, _):
  """One step of Adam on the points."""
  points, state = carry
  updates, state = flow.update(jax.grad(divergence)(points), state)
  return (optax.apply_updates(points, updates), state), points


_, moving = jax.lax.scan(flow_step, (x, flow.init(x)), length=121)

# %%
(panels,) = plotting.subplots(1, 3, width=3.4, sharex=True, sharey=True)
for at, panel in zip((0, 20, 120), panels, strict=True):
  clouds = {"x": moving[at], "y": y}
  plotting.plot_clouds(clouds, panel, f"step {at}")
panels[0].figure

# %% [markdown]
# ## A better start for Sinkhorn
#
# The same start works in OTT-JAX's solver: `SlicedDualInitializer` is a drop-in. It
# lowers the error of the first iterations. The rate of the later ones is the problem's
# own: where the last digit counts, look whether it pays.

# %%
ITERATIONS = 60
problem = linear_problem.LinearProblem(pointcloud.PointCloud(x, y, epsilon=0.1))
starts = {"default": {}, "sliced": {"initializer": asap_jax.SlicedDualInitializer()}}
curves = {}
for name, start in starts.items():
  fixed = {"inner_iterations": 1, "threshold": 0.0, "max_iterations": ITERATIONS}
  solver = Sinkhorn(**fixed, **start)
  output = jax.jit(solver)(problem)
  curves[name] = (np.arange(1, ITERATIONS + 1), output.errors)

# %%
((left, right),) = plotting.subplots(1, 2, width=4.5)
plotting.plot_curves(curves, left, xlabel="iteration", ylabel="marginal error")
left.set_yscale("log")
plotting.plot_coupling(x, y, output.matrix, right, "the coupling")
left.figure

# %% [markdown]
# ## Colours carried from one photograph to another
#
# 500 colours of each picture, a sliced start, three closures. The key-side dual is
# enough to map *any* colour: one row of the plan, averaged (the entropic map of
# Pooladian and Niles-Weed, 2021). No pixel but the 500 was seen before.

# %%
pictures = [
  load_sample_image(name)[::4, ::4] / 255 for name in ("china.jpg", "flower.jpg")
]
random = np.random.default_rng(0)
source, target = (
  jnp.asarray(random.choice(picture.reshape(-1, 3), 500, replace=False), jnp.float32)
  for picture in pictures
)

# %%
SHARPNESS = 2.0 / 0.01


@jax.jit
def key_dual(source, target):
  """g after three closures of the sliced start."""
  query = SHARPNESS * source
  f = asap_jax.potentials.sliced_start(query, target)
  return asap_jax.closures(query @ target.T, f, 3).g


g = key_dual(source, target)


@jax.jit
def carried(colours):
  """Mean of the target's colours under the row of the plan, `[..., 3]`."""
  return jax.nn.softmax(SHARPNESS * colours @ target.T + g) @ target


# %%
(panels,) = plotting.subplots(1, 3, width=3.4, height=2.6)
shown = {
  "picture": pictures[0],
  "colours of": pictures[1],
  "carried": np.asarray(carried(pictures[0].astype(np.float32))),
}
for (title, picture), panel in zip(shown.items(), panels, strict=True):
  panel.imshow(picture)
  panel.set(title=title, xticks=[], yticks=[])
panels[0].figure

# %% [markdown]
# The map is differentiable, and the gradient of a convex function: its Jacobian is
# symmetric and has no negative eigenvalue, at any colour.

# %%
jacobians = jax.vmap(jax.jacfwd(carried))(source)
asymmetry = jnp.abs(jacobians - jnp.swapaxes(jacobians, -1, -2)).max()
print(f"largest entry {jacobians.max():.2f}, asymmetry {asymmetry:.1e}")
print(f"smallest eigenvalue {jnp.linalg.eigvalsh(jacobians).min():.1e}")
