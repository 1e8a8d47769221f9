"""Durable state: artifacts, leases, the model registry, the experiment tracker."""
