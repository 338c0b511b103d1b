"""Ranks, threads and background work of saving and loading.

All of ``saver`` may import it; it imports no other package of ``saver``.
"""
