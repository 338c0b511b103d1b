"""Rules of admission: by frequency, with exact counts or a sketch; by chance; and by a function.

They implement the protocols of ``embedding.gate``. The planner and the package's ``__init__`` may import this package;
tables know only the protocols.
"""

from __future__ import annotations

from recis_hybrid.embedding.admission.frequency import MinFrequency as MinFrequency
from recis_hybrid.embedding.admission.rules import AdmitIf as AdmitIf, NewIds as NewIds, Probability as Probability
