"""A short run of `tests/helpers/fuzz.py` on fixed inputs. The long run is `python -m tests.helpers.fuzz`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from segment_anything.build_sam import CONFIGS
from tests.helpers.fuzz import Target, fuzz, make_targets

pytestmark = pytest.mark.slow

EXAMPLES = 40
KINDS = [
    "PNG",
    "JPEG",
    "other pictures",
    "npy",
    "manifest",
    "Scalabel",
    "evaluation",
    "checkpoint",
    "SAM file",
    "cache entry",
    "decoder",
]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    yield make_targets(tmp_path_factory.mktemp("fuzz"))
    del CONFIGS["small"]


def test_every_kind_is_here(targets: dict[str, Target]) -> None:
    assert list(targets) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_or_rejected(kind: str, targets: dict[str, Target]) -> None:
    fuzz(targets[kind], EXAMPLES)
