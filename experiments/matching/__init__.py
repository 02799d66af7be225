"""Matching keypoints of a stereo pair by optimal transport with dustbins.

`pair` has the images' keypoints and which of them are one, `methods` what matches them.
"""
