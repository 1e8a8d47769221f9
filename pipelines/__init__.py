"""The batch half: corpus, training, evaluation, and one stage module each under `pipelines/stages`."""
