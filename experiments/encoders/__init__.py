"""Pretrained text encoders, read from local directories of Hugging Face's form."""

from experiments.encoders.bert import BertConfig, BertEncoder
from experiments.encoders.directory import directory_of, load_encoder
from experiments.encoders.tokens import TextCoder

__all__ = ["BertConfig", "BertEncoder", "TextCoder", "directory_of", "load_encoder"]
