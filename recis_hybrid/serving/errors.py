"""Errors of serving."""

from __future__ import annotations


class ServingError(ValueError):
    """An export or a bundle is missing or damaged, or lacks the requested table or part."""


class InputError(ServingError):
    """The columns of a request do not fit the bundle; the message names column, value and remedy."""
