"""What one value of the config may be: strict, finite, and refused with the reason.

A place is a folder or a ``gs://`` prefix, a day a calendar day, a width a positive number of units.
"""

import re
from datetime import date
from typing import Annotated
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from couponflow.dates import FIRST_DAY, LAST_DAY, parse_day
from couponflow.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: unknown names, loose types and later changes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _check_time_zone(name: str) -> str:
    if name not in available_timezones():
        raise ValueError(f"unknown time zone {name!r}; use an IANA name such as America/New_York")
    ZoneInfo(name)
    return name


def _check_place(uri: str) -> str:
    # An unknown scheme would become a local folder of that name, an empty text the root of the disk.
    has_scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri)
    if not uri.strip() or uri[0] == "~" or (has_scheme and not re.match("gs://[^/]", uri)):
        raise ValueError("expected a folder or gs://bucket/prefix")
    return uri


def _parse_day(value: object) -> object:
    try:
        return parse_day(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError("expected a calendar day such as 2017-10-30") from error


TimeZone = Annotated[str, AfterValidator(_check_time_zone)]
Place = Annotated[str, AfterValidator(_check_place)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
# A TOML array is a list: tuples accept that. A quoted day is accepted; a number or an instant is no day.
Loose = Field(strict=False)
Day = Annotated[date, BeforeValidator(_parse_day), Field(ge=FIRST_DAY, le=LAST_DAY)]
Days = Annotated[tuple[Day, ...], Loose]
Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Loose]
