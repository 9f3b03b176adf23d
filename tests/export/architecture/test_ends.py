"""The state at a text's end token, beside the library's own choice."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from export.architecture.ends import at_end

TEXTS = [[1, 5, 9, 9, 9], [1, 9, 4, 3, 9], [1, 2, 3, 4, 5], [9, 1, 1, 1, 1], [1, 1, 1, 1, 9]]


@pytest.mark.parametrize("end", [9, 2, 7])
def test_the_states_that_the_library_projects(end: int) -> None:
    torch.manual_seed(0)
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(**layers, vocab_size=10, max_position_embeddings=5, projection_dim=4, eos_token_id=end)
    model = CLIPTextModelWithProjection(config).eval()
    ids = torch.tensor(TEXTS)
    with torch.inference_mode():
        found = model(ids)
        ours = model.text_projection(at_end(found.last_hidden_state, ids, end))
    torch.testing.assert_close(ours, found.text_embeds)
