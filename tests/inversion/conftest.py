"""A concept's pictures."""

from pathlib import Path

import pytest
from concept_pictures import draw_concept


@pytest.fixture
def concept_folder(tmp_path: Path) -> Path:
    """Three pictures of one concept."""
    return draw_concept(tmp_path / "cat")
