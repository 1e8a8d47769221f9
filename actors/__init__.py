"""What stays alive between calls and both halves share: engine, artifact store, registry, tracker.

Plain classes; the Ray shells over them live in `actors/workers/`.
"""
