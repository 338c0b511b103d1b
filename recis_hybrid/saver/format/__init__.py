"""The format on disk, as ``docs/format.md`` specifies it: manifest, safetensors files, checksums.

All of ``saver`` may import it; it does not access live objects.
"""
