"""The tiny models of the engine's tests."""

from tests.actors.conftest import make_model, tokenizer_folder
from tests.actors.engine.conftest import make_encoder, make_seq2seq

__all__ = ["make_encoder", "make_model", "make_seq2seq", "tokenizer_folder"]
