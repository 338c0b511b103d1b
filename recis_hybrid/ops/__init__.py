"""The typed Python face of the native operators; one file a family, as in ``csrc/ops``.

Importing this package loads the native library.
"""

from recis_hybrid.ops import _library

_library.load()

from recis_hybrid.ops import blocks as blocks  # noqa: E402
from recis_hybrid.ops import hash as hash  # noqa: E402
from recis_hybrid.ops import id_map as id_map  # noqa: E402
from recis_hybrid.ops import memory as memory  # noqa: E402
from recis_hybrid.ops import transform as transform  # noqa: E402
from recis_hybrid.ops import update as update  # noqa: E402
