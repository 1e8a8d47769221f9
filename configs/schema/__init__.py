"""Typed configuration, one module a subject."""
