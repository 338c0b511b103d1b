"""The fast paths of DLPack: capsules by private APIs where they exist, and arrays kept from call to call.

``bridge.dlpack`` and ``bridge.tower`` may import it; it imports nothing of the bridge.
"""
