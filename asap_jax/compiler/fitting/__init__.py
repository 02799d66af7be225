"""Fitting dual maps: `stages` runs ridge regression, then descent.

`slicing` draws directions, `samples` keeps what is fitted on, `ridge` solves for the
linear map, `scales` puts parameters on one scale, `descent` refines all of them, and
`objective` replaces the teacher's plan by the dual objective.
"""
