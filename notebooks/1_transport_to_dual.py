# %% [markdown]
# # From one-dimensional transport to a dual
#
# Doubly stochastic attention has weights $A_{ij} = \exp(S_{ij} + f_i + g_j)$: the
# logits $S$, and two dual vectors that make every row and every column sum to one.
# Sinkhorn's algorithm finds $f$ and $g$ by iteration. Here $f$ is *predicted* from
# transport problems on the line, which one sort solves exactly, and one closure does
# the rest.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np

import asap_jax
from asap_jax import metrics, plotting
from asap_jax.potentials import directions as slices

# %% [markdown]
# ## Transport on the line
#
# For the cost $-xy$ the optimal coupling matches points in their order. Its potentials
# $\varphi$ and $\psi$ follow from the sorted points: no iteration, no regularisation.

# %%
x, y = jax.random.normal(jax.random.key(0), (2, 12))
potentials = asap_jax.kantorovich_potentials(x, y)

# %%
monotone = jax.nn.one_hot(x.argsort().argsort(), 12) @ jax.nn.one_hot(y.argsort(), 12)
((left, right),) = plotting.subplots(1, 2, width=4.5)
plotting.plot_coupling(x, y, monotone, left, "the optimal coupling")
plotting.plot_potentials(x, potentials, y, right, "its potentials")
left.figure

# %% [markdown]
# The coupling and the potentials certify each other: $\varphi_i + \psi_j \le -x_i y_j$
# everywhere, and the two problems have one value.

# %%
slack = -x[:, None] * y - potentials.phi[:, None] - potentials.psi
print(f"smallest slack {slack.min():.1e}, in float32")
print(f"primal {-(x.sort() * y.sort()).mean():.4f}")
print(f"dual   {potentials.phi.mean() + potentials.psi.mean():.4f}")

# %% [markdown]
# ## Slices
#
# Queries and keys live in more dimensions. Projected onto a direction, they are points
# on a line again. These sequences are noisy tokens around six prototypes, seen by two
# random projections, as in an attention head.

# %%
TOKENS, DIM = 32, 8


@functools.partial(jax.jit, static_argnames="count")
def sequences(key, count, sharpness):
  """Queries and keys, `[count, 1 head, tokens, dim]`, with logits query key^T."""
  keys = jax.random.split(key, 2)
  kinds = jax.random.randint(keys[0], (count, TOKENS), 0, 6)
  prototypes, *projections = jax.random.normal(jax.random.key(1), (3, 8, DIM))
  tokens = prototypes[kinds] + 0.7 * jax.random.normal(keys[1], (count, TOKENS, DIM))
  query, key = (tokens @ of_side / DIM**0.5 for of_side in projections)
  return sharpness * query[:, None] / DIM**0.5, key[:, None]


query, key = sequences(jax.random.key(2), 1, 3.0)
directions = slices.orthogonal(jax.random.key(3), 1, 8, DIM)
sliced, projected = asap_jax.sliced_potentials(query, key, directions)

# %%
(panels,) = plotting.subplots(1, 3, width=3.6)
for index, panel in enumerate(panels):
  of_slice = asap_jax.Potentials(*(part[0, 0, index] for part in sliced))
  x, y = projected[0, 0, index], key[0, 0] @ directions[0, index]
  plotting.plot_potentials(x, of_slice, y, panel, f"slice {index + 1}")
panels[0].figure

# %% [markdown]
# ## The dual is nearly a sum of potentials
#
# The target is the dual $f$ that the last of 20 Sinkhorn iterations starts from. Eight
# potentials a query, one weight each, found by least squares on 64 sequences, explain
# most of it on new ones. The query itself and two cumulants of its logits, which cost
# next to nothing, explain more.


# %%
@functools.partial(jax.jit, static_argnames="features")
def fitted(directions, sharpness, features):
  """Queries, keys, duals and predictions of 16 sequences that were not fitted."""
  cases = []
  for seed, count in ((4, 64), (5, 16)):
    query, key = sequences(jax.random.key(seed), count, sharpness)
    logits = query @ jnp.swapaxes(key, -1, -2)
    f = asap_jax.teacher.sinkhorn_source_dual(logits, 20)
    f = f - f.mean(-1, keepdims=True)
    columns = asap_jax.dual_map.dual_features(query, key, directions, features)
    cases.append((logits, f, columns))
  (_, seen, columns), (logits, f, new_columns) = cases
  matrix = columns.reshape(-1, columns.shape[-1])
  weights, *_ = jnp.linalg.lstsq(matrix, seen.ravel())
  return logits, f, new_columns @ weights


kinds = ("potentials",), ("potentials", "query", "cumulants")
(logits, f, plain), (_, _, all_features) = (
  fitted(directions, 3.0, features) for features in kinds
)

# %%
((left, right),) = plotting.subplots(1, 2, width=3.6, sharey=True)
plotting.plot_dual(f, {"potentials": plain}, left)
plotting.plot_dual(f, {"all three kinds": all_features}, right)
left.figure

# %% [markdown]
# ## The closure
#
# One step on each side, $g$ from $\hat f$ and then $f$ from $g$, is one Sinkhorn
# iteration started at the prediction. Rows are exact after it; columns are as good as
# the prediction was. Started at zero, the same step is Sinkhorn cut short.

# %%
starts = {
  "20 iterations": f,
  "one closure of\nthe prediction": all_features,
  "one iteration\nfrom zero": jnp.zeros_like(f),
}
plans = {
  name: asap_jax.plan(logits, asap_jax.closure(logits, start))
  for name, start in starts.items()
}
plotting.plot_plans({name: plan[0, 0] for name, plan in plans.items()})[0, 0].figure

# %%
teacher, *others = plans.values()
for name, plan in zip([*plans][1:], others, strict=True):
  tv = metrics.total_variation(plan, teacher).mean()
  error = metrics.column_error(plan).mean()
  print(f"{' '.join(name.split())}: TV {tv:.4f}, column error {error:.4f}")

# %% [markdown]
# ## Explore
#
# Sharper logits are harder: 20 iterations are further from converged, and their dual is
# less like a sum of potentials. More slices and more closures help. Call `explore` with
# other values; where `ipywidgets` is installed, the last cell shows sliders.


# %%
def explore(sharpness=3.0, number_of_slices=8, closures=1):
  """The fit and the closed plan of one sequence, for other parameters."""
  drawn = slices.orthogonal(jax.random.key(3), 1, number_of_slices, DIM)
  logits, f, predicted = fitted(drawn, sharpness, ("potentials",))
  duals = asap_jax.closures(logits, predicted, closures)
  closed = asap_jax.plan(logits, duals)
  teacher = asap_jax.plan(logits, asap_jax.closure(logits, f))
  tv = metrics.total_variation(closed, teacher).mean()
  ((first, second, third),) = plotting.subplots(1, 3, width=3.6)
  plotting.plot_dual(f, {"potentials": predicted}, first, f"sharpness {sharpness:g}")
  maximum = float(np.quantile(teacher[0, 0], 0.995))
  plotting.plot_plan(teacher[0, 0], second, "20 iterations", maximum=maximum)
  title = f"{number_of_slices} slices, {closures} closure(s): TV {tv:.3f}"
  plotting.plot_plan(closed[0, 0], third, title, maximum=maximum)
  return first.figure


explore(sharpness=3.0, number_of_slices=2, closures=1)

# %%
explore(sharpness=12.0, number_of_slices=8, closures=2)

# %%
try:
  from ipywidgets import interact

  interact(explore, sharpness=(1.0, 16.0), number_of_slices=(1, 16), closures=(1, 5))
except ImportError:
  print("No ipywidgets, no sliders: call explore with other values.")

# %% [markdown]
# ## A start that nothing has to learn
#
# If queries and keys were Gaussians, the entropic dual would be known in closed form.
# Taken as the start, it leaves few iterations to do, here with sharper logits. The line
# from zero has no weights to learn either.

# %%
query, key = sequences(jax.random.key(6), 4, 6.0)
sharp = query @ jnp.swapaxes(key, -1, -2)
duals = {
  "zero": jnp.zeros(query.shape[:-1]),
  "Gaussian, diagonal": asap_jax.gaussian_potential(query, key, covariances="diagonal"),
  "Gaussian, low rank": asap_jax.gaussian_potential(query, key),
}
axes = plotting.subplots(width=5.0)[0, 0]
counts = range(1, 21)
for index, (name, dual) in enumerate(duals.items()):
  errors = []
  for _ in counts:
    closed = asap_jax.closure(sharp, dual)
    errors.append(float(metrics.column_error(asap_jax.plan(sharp, closed)).mean()))
    dual = closed.f
  axes.plot(counts, errors, label=name, **plotting.series_style(index))
axes.set(yscale="log", xlabel="iterations", ylabel="column error")
axes.legend()
axes.figure
