"""Ranges, business days and the injection cases."""

from datetime import UTC, date, datetime

import pytest

from couponflow.dates import DateRange, day_start, local_day, parse_day
from couponflow.errors import ConfigError


def test_a_range_is_inclusive_on_the_command_line_and_half_open_inside() -> None:
    dates = DateRange.parse("2024-02-28:2024-03-01")
    assert (dates.start, dates.end, dates.last) == (date(2024, 2, 28), date(2024, 3, 2), date(2024, 3, 1))
    assert [str(day) for day in dates.days()] == ["2024-02-28", "2024-02-29", "2024-03-01"]
    assert date(2024, 3, 1) in dates
    assert date(2024, 3, 2) not in dates
    assert str(dates) == "2024-02-28:2024-03-01"


def test_one_day() -> None:
    assert DateRange.parse("2024-02-29") == DateRange.day(date(2024, 2, 29))
    assert len(DateRange.day(date(2024, 2, 29))) == 1


def test_widen() -> None:
    assert str(DateRange.parse("2024-03-01").widen(1, 2)) == "2024-02-29:2024-03-03"


@pytest.mark.parametrize(
    "text",
    [
        "2024-02-30",
        "2024-1-1",
        "",
        "yesterday",
        "2024-01-01' OR '1'='1",
        "2024-01-01\n",
        "２０２４-01-01",  # noqa: RUF001 - full-width digits are the case under test
        "2024-01-02:2024-01-01",
        "2010-01-01:2024-01-01",
        "2024-01-01:2024-01-02:2024-01-03",
        "2024-01-01:",  # such as A:$B where B is not set: never one day by accident
        ":2024-01-01",
        "9999-12-31",  # has no day after it
        "0001-01-01",
    ],
)
def test_bad_dates_are_refused_with_the_next_step(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected|give|split"):
        DateRange.parse(text)


def test_parse_day_names_the_text() -> None:
    with pytest.raises(ConfigError, match="'nonsense'"):
        parse_day("nonsense")


def test_a_business_day_starts_at_local_midnight() -> None:
    assert day_start(date(2017, 10, 30), "America/New_York") == datetime(2017, 10, 30, 4, tzinfo=UTC)
    assert day_start(date(2017, 11, 6), "America/New_York") == datetime(
        2017, 11, 6, 5, tzinfo=UTC
    )  # after DST
    assert day_start(date(2017, 10, 30), "Asia/Tokyo") == datetime(2017, 10, 29, 15, tzinfo=UTC)


def test_the_last_second_belongs_to_its_day() -> None:
    assert local_day(datetime(2017, 10, 30, 3, 59, 59, tzinfo=UTC), "America/New_York") == date(2017, 10, 29)
    assert local_day(datetime(2017, 10, 30, 4, tzinfo=UTC), "America/New_York") == date(2017, 10, 30)
