"""What is said of a metric."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Description:
    meaning: str
    formula: str
    unit: str
    source: str = ""
