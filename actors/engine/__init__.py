"""The inference engine: continuous batching over models in the Hugging Face format.

Guarantee: nothing below this package imports Ray, MLflow or a web framework; `request` and `scheduler` do not import
torch either.
"""
