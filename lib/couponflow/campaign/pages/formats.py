"""How the report writes numbers: counts, shares, metrics, money and time. Missing values are a dash."""

from typing import Any

from couponflow.campaign.pages import charts

DASH = "\u2013"  # shown for a missing value


def number(value: Any) -> str:
    """Count with thousands separators; a fraction keeps one digit; a missing value is a dash."""
    if not charts.is_number(value):
        return DASH if value is None or isinstance(value, float) else str(value)
    text = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.1f}"
    return text.replace("-", charts.MINUS)


def percent(value: Any, digits: int | None = None) -> str:
    """Share as a percentage: one digit below 10%, none above."""
    if not charts.is_number(value):
        return DASH
    places = digits if digits is not None else (1 if abs(value) < 0.0995 and value else 0)
    return f"{value * 100:,.{places}f}%".replace("-", charts.MINUS)


def decimal(value: Any, digits: int = 3, is_signed: bool = False) -> str:
    """Fixed number of digits, for metrics; ``is_signed`` shows a plus too."""
    if not charts.is_number(value):
        return DASH
    text = f"{value:+,.{digits}f}" if is_signed else f"{value:,.{digits}f}"
    return text.replace("-", charts.MINUS)


def money(value: Any, currency: str) -> str:
    """Amount with the currency's code in front."""
    return f"{currency}\u00a0{value:,.2f}".replace("-", charts.MINUS) if charts.is_number(value) else DASH


def duration(seconds: Any) -> str:
    """Seconds as people say them."""
    if not charts.is_number(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
