"""Builders with defaults: a test states the few values that matter to it."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from couponflow.config import Config, load_config
from couponflow.lake import schemas

T0 = datetime(2024, 1, 10, tzinfo=UTC)
D0 = date(2024, 1, 10)
_DEFAULTS: dict[str, Any] = {
    "string": "x",
    "int": 0,
    "bigint": 0,
    "double": 0.0,
    "boolean": False,
    "timestamp": T0,
    "date": D0,
    "binary": b"",
}


def test_config(folder: Path, *overrides: str) -> Config:
    """A config whose lake and export lie in ``folder``; UTC, no pseudonyms, any OOV share."""
    base = (
        f"lake.root_uri='{folder / 'lake'}'",
        f"export.target_uri='{folder / 'export'}'",
        "events.pseudonymise=false",
        "export.auto_approve=true",
        "vocabulary.max_oov_share=1.0",  # worlds of a few events
    )
    return load_config(None, (*base, *overrides))


test_config.__test__ = False  # type: ignore[attr-defined]  # a builder, not a test


def minutes(number: float) -> datetime:
    """``T0`` plus some minutes."""
    return T0 + timedelta(minutes=number)


def make_row(table: str, **over: Any) -> dict[str, Any]:
    """One row of a declared table: required columns get a neutral value, optional ones None."""
    declared = schemas.TABLES[table]
    unknown = set(over) - set(declared.column_names)
    assert not unknown, f"{table} has no column {unknown}"
    row = {c.name: None if c.nullable else _DEFAULTS.get(c.type) for c in declared.columns}
    return row | over


def make_event(user_id: str = "u1", minute: float = 0, **over: Any) -> dict[str, Any]:
    """A purchase at ``T0 + minute``, delivered at once."""
    when = minutes(minute)
    base = {
        "event_id": f"{user_id}-{minute}-{over.get('item_id', 'i1')}",
        "user_id": user_id,
        "event_type": "purchase",
        "event_time": when,
        "ingest_time": when,
        "event_date": when.date(),
        "ingest_date": when.date(),
        "item_id": "i1",
        "category_id": "c1",
        "shop_id": "s1",
        "price": 1.0,
        "quantity": 1,
    }
    return make_row("events", **(base | over))


def make_frame(spark: Any, table: str, rows: list[dict[str, Any]]) -> Any:
    """A DataFrame of a declared table."""
    from couponflow.lake import literals, tables

    declared = schemas.TABLES[table]
    data = [tuple(row[name] for name in declared.column_names) for row in rows]
    return literals.frame(spark, data, tables.struct_type(declared.columns))
