"""instructor over OpenAI's client."""

from __future__ import annotations

import instructor
import openai
import pytest
from asked import KEY, SAID, City


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(url: str, model: str, mode: str) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=KEY), mode=getattr(instructor.Mode, mode))
    found = client.chat.completions.create(
        model=model, messages=SAID, response_model=City, max_retries=0, max_tokens=80
    )
    assert isinstance(found, City)
