"""Prompting as a measured step: what a model makes of a text, and what examples in the prompt are worth."""
