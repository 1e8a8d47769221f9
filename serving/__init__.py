"""The online half: an OpenAI-compatible endpoint on Ray Serve.

An ingress (HTTP, validation, streaming; no torch) and engine replicas are deployments of their own: replicas scale with
the requests in flight, the ingress keeps answering while they start or are replaced.
"""
