"""Rules are read in the forms that people type, and everything else is told in one line."""

from pathlib import Path

import pytest

from t2iprobe.errors import UserError
from t2iprobe.hypernymy.until import TOLERANCE, Until, read_until


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("isp ± 0.005", Until("isp", half_width=0.005)),
        ("isp+-0.005", Until("isp", half_width=0.005)),
        (" isp +/- 5e-3 ", Until("isp", half_width=0.005)),
        ("isp - runs/sd-2 ± 0.01", Until("difference", half_width=0.01, run=Path("runs/sd-2"))),
        ("isp - my run +- 0.01", Until("difference", half_width=0.01, run=Path("my run"))),
        ("unknown", Until("unknown", tolerance=TOLERANCE)),
        ("unknown < 0.1", Until("unknown", tolerance=0.1)),
    ],
)
def test_forms(text: str, until: Until) -> None:
    assert read_until(text) == until
    assert read_until(str(until)) == until


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", 'it takes "isp ± 0.005"'),
        ("", "it takes"),
        ("isp", "it takes"),
        ("isp ± x", "'x' is no number between 0 and 1"),
        ("isp ± 0", "no number between 0 and 1"),
        ("isp ± 5", "no number between 0 and 1"),
        ("isp ± nan", "no number between 0 and 1"),
        ("isp - ± 0.1", "it takes"),
        ("unknown < 2", "no number between 0 and 1"),
        ("scs ± 0.01", "SCS depends on the number of pictures"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        read_until(text)
    assert "\n" not in str(told.value)
