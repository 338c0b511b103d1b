"""An HTTP server of a bundle, which speaks the Open Inference Protocol.

Needs the extra ``serve``. Only the command ``recis-hybrid serve`` may import it.
"""

from __future__ import annotations

from recis_hybrid.serving.server.options import ServerOptions as ServerOptions
from recis_hybrid.serving.server.run import Server as Server
