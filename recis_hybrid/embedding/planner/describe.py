"""A table of logical tables, as text."""

from __future__ import annotations

from collections.abc import Sequence

from recis_hybrid.embedding.planner.coalesce import TablePlan
from recis_hybrid.embedding.table.hash_table import HashTable


def describe(plans: Sequence[TablePlan], tables: Sequence[HashTable]) -> str:
    """Return a line for each logical table: width, dtype, record, rows, bytes, member tables and their features."""
    lines = [f"{'table':<6}{'dim':>5}  {'dtype':<9}{'record':>8}{'rows':>13}{'memory':>10}  members (features)"]
    for number, (plan, table) in enumerate(zip(plans, tables, strict=True)):
        readers: dict[int, list[str]] = {}
        for feature, member in plan.features.items():
            readers.setdefault(member, []).append(feature)
        members = ", ".join(f"{plan.members[member].name} ({', '.join(names)})" for member, names in readers.items())
        layout = plan.layout
        dtype = str(layout.dtype).removeprefix("torch.")
        memory = f"{table.memory()['total'] / 2**20:,.1f} MiB"
        frozen = "  [read-only]" if table.read_only else ""
        lines.append(
            f"{number:<6}{layout.dim:>5}  {dtype:<9}{f'{layout.record_bytes} B':>8}{len(table):>13,}{memory:>10}  "
            f"{members}{frozen}"
        )
    return "\n".join(lines)
