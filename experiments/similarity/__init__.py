"""Embeddings of sentences by a pretrained encoder, converted and compiled.

How much of the similarity between texts does each attention keep, without labels?
"""
