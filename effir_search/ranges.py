"""Numbers with the ranges that a recipe's settings are checked against."""

from typing import Annotated

from pydantic import Field

NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NonNegativeReal = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# 0 to 1, both included.
Share = Annotated[float, Field(ge=0, le=1)]
# 0 to 1, but less than all.
PartialShare = Annotated[float, Field(ge=0, lt=1)]
