"""The program without a script: a configuration in YAML, the command ``recis-hybrid``, scores and reports of runs.

Nothing of the package imports it; it builds on ``pipelines`` and all below.
"""
