"""Ways to compute the closures and their values, a file for each option's value.

`choice` takes one of them, and `dispatch` gives it the closures: `xla` (one n x m
kernel; `xla_short` where sequences are short), `chunked` (O(n + m) memory), `cudnn`
(fused kernels; `cudnn_sums` has what one call of them computes) or `pallas` (kernels of
our own for a TPU, `pallas_streamed` and `pallas_resident`). All are one function up to
rounding. `iterated` has the gradient of plain iterations, whichever of them runs
forward, and `streamed` the same without a kernel (`sweeps`, `sweeps_back`).
"""
