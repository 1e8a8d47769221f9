"""The vocabulary of Ganymede: typed configuration, artifact manifests, prompt templates, errors.

Guarantee: importing anything below this package loads the standard library, pydantic and yaml only.
"""
