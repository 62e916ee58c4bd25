"""What is said of input that cannot be used."""

from __future__ import annotations

import pytest

from refine_verl.config.refusals import with_article


@pytest.mark.parametrize(("name", "said"), [("olmo_hybrid", "an olmo_hybrid"), ("delta_net", "a delta_net")])
def test_names_have_their_article(name: str, said: str) -> None:
    assert with_article(name) == said
